"""Pictures with objects from files in COCO's format: found in the usual layouts, read, checked, split.

A COCO file is JSON with "images" (id, file_name, width, height), "categories" (id, name) and "annotations" (image_id,
category_id, bbox, segmentation, area, iscrowd). Ids of annotations are not used, so that 0, missing and repeated ones
do no harm; an annotation that is there twice is a fault.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tables import counted
from .images import SPLIT_FOLDERS
from .objects import DenseData, Faults, ObjectOptions, Record, Source, build_data
from .tables import DataError, listing

logger = logging.getLogger(__name__)

DEFAULTS = ObjectOptions()
PARTS_OF_COCO = ("images", "annotations", "categories")
OTHER_TASKS = ("captions", "person_keypoints", "image_info", "panoptic", "stuff")
"""Beginnings of the names of COCO's files without objects of this kind."""


def load_coco_folder(folder: str | Path, options: ObjectOptions = DEFAULTS) -> DenseData:
    """Read a folder in COCO's or Roboflow's layout, or any that has a JSON file for each split beside its pictures.

    COCO: `annotations/instances_train2017.json` with the pictures in `train2017/` or `images/train2017/`. Roboflow:
    `train/_annotations.coco.json` beside the pictures. A folder with one file alone is train, and the other splits are
    drawn from it with `options.seed`. Splits are recognised by "train", "val", "valid", "validation" or "test" in the
    name of the file or of its folder.

    Raises:
        DataError: there is no file, or two for one split; or as `load_coco_files` says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    return load_coco_files(find_coco_files(folder), options=options, root=folder)


def load_coco_files(
    files: Mapping[str, str | Path],
    image_folders: Mapping[str, str | Path] | None = None,
    options: ObjectOptions = DEFAULTS,
    root: str | Path | None = None,
) -> DenseData:
    """Read a COCO file for each split, "train" and, if there are any, "validation" and "test".

    Args:
        files: split -> JSON file.
        image_folders: split -> folder that its "file_name" entries begin in; without one, the folders that the usual
            layouts have are searched.
        options: what is read, and what happens to faults.
        root: of the data, for that search; the folder of each file where it is None.

    Raises:
        DataError: a file can't be read or isn't COCO's; train is missing; a later split has a class that train lacks;
            or pictures and objects have faults, as `Faults` and `check_object` say, and `options.drop_bad` is False.
    """
    sources = {}
    for split, file in files.items():
        path = Path(file)
        given = [Path(image_folders[split])] if image_folders and split in image_folders else None
        folders = given or _image_folders(path, Path(root) if root else path.parent)
        sources[split] = _read_file(path, folders, options)
    return build_data(sources, options)


def find_coco_files(folder: Path) -> dict[str, Path]:
    """Return the COCO file of each split of a folder.

    Raises:
        DataError: there is none, or two for one split.
    """
    places = [folder / "annotations", folder]
    places += [folder / name for names in SPLIT_FOLDERS.values() for name in names]
    found: dict[str, list[Path]] = {}
    files = [path for place in places if place.is_dir() for path in sorted(place.glob("*.json"))]
    files = [path for path in files if not path.name.startswith((*OTHER_TASKS, "."))]
    for path in files:
        split = _split_of(path.stem) or (_split_of(path.parent.name) if path.parent != folder else None)
        found.setdefault(split or "", []).append(path)
    unnamed = found.pop("", [])
    if not found and len(unnamed) == 1:
        return {"train": unnamed[0]}
    for split, paths in found.items():
        instances = [path for path in paths if path.name.startswith("instances")]
        if len(paths) > 1 and len(instances) != 1:
            names = listing(path.relative_to(folder).as_posix() for path in paths)
            raise DataError(f"{folder}: {names} are all for {split}: leave one, or name the files")
        found[split] = instances or paths
    if "train" not in found:
        raise DataError(
            f"{folder}: there is no COCO file of train, such as annotations/instances_train.json or "
            f"train/_annotations.coco.json; found {listing(map(str, files)) or 'no JSON file'}"
        )
    return {split: found[split][0] for split in SPLIT_FOLDERS if split in found}


def _split_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in SPLIT_FOLDERS.items() if set(names) & set(words)), None)


def _image_folders(file: Path, root: Path) -> list[Path]:
    """Folders in which the pictures of a COCO file may lie, the likeliest first."""
    named = file.stem.partition("_")[2]  # train2017 of instances_train2017
    split = _split_of(file.stem)
    names = [named, *(SPLIT_FOLDERS[split] if split else ())]
    folders = [folder / name for folder in (root, root / "images") for name in names if name]
    return [*folders, file.parent, file.parent / "images", root / "images", root]


def _read_file(path: Path, folders: list[Path], options: ObjectOptions) -> Source:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON in UTF-8 ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in PARTS_OF_COCO):
        raise DataError(f"{path}: a COCO file is an object with the lists {listing(PARTS_OF_COCO)}")
    classes = _read_categories(path, content["categories"])
    faults = Faults(str(path), options.drop_bad)
    by_image = _group_by_image(content["annotations"], faults)
    records = []
    for index, image in enumerate(content["images"]):
        is_named = isinstance(image, dict) and isinstance(image.get("file_name"), str)
        if not is_named or not isinstance(image.get("id"), int | str):
            faults.add(f"entry {index + 1} of images", "it needs an id, a number or a string, and a file_name")
            continue
        paths = [folder / image["file_name"] for folder in folders]
        picture = next((found for found in paths if found.is_file()), paths[0])
        width, height = image.get("width"), image.get("height")
        stated = (width, height) if isinstance(width, int) and isinstance(height, int) else None
        where = f"image {image['id']!r} ({image['file_name']})"
        records.append(Record(where, image["id"], picture, stated, by_image.pop(image["id"], [])))
    for image_id, objects in by_image.items():
        for each in objects:
            faults.add(f"annotation {each.get('id')!r}", f"its image_id {image_id!r} is none of the images")
    return Source(classes, records, faults)


def _read_categories(path: Path, categories: list[Any]) -> dict[Any, str]:
    """Name of each category by its id, sorted by the id."""
    names: dict[Any, str] = {}
    for index, category in enumerate(categories):
        if not isinstance(category, dict) or not isinstance(category.get("name"), str) or "id" not in category:
            raise DataError(f"{path}: entry {index + 1} of categories needs an id and a name, got {category!r}")
        if category["id"] in names or category["name"] in names.values():
            raise DataError(
                f"{path}: the category {category['id']!r}, {category['name']!r}, has the id or name of another"
            )
        names[category["id"]] = category["name"]
    if not names:
        raise DataError(f"{path}: there are no categories")
    return dict(sorted(names.items()))


def _group_by_image(annotations: list[Any], faults: Faults) -> dict[Any, list[dict[str, Any]]]:
    """Annotations by the id of their image; one that is there twice is a fault."""
    by_image: dict[Any, list[dict[str, Any]]] = {}
    by_id: dict[Any, dict[str, Any]] = {}
    num_shared = 0
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("image_id"), int | str):
            faults.add(f"entry {index + 1} of annotations", "it needs the image_id of an image")
            continue
        name = annotation.get("id")
        if isinstance(name, int | str):
            if by_id.get(name) == annotation:
                faults.add(f"image {annotation['image_id']!r}, annotation {name!r}", "it is there twice: remove one")
                continue
            num_shared += name in by_id
            by_id[name] = annotation
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    if num_shared:
        logger.warning(
            "%s: %s the id of another one; every one counts, since ids are not used",
            faults.source,
            counted(num_shared, "annotation", "has", "have"),
        )
    return by_image
