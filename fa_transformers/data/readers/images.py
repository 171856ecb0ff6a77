"""A user's own images: a folder, a loaded data set or rows in Python, checked, and brought to what a model wants."""

import io
import logging
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from tqdm.auto import tqdm

from ...tables import counted
from .files import DEFAULTS, OPTIONAL_ROLES, class_names_of, fill, group_of, list_of, splits_to_read
from .labelling import LabelledSplits, Table, encode_tables
from .labels import clean_label
from .problems import BadRows, Place, check_column, check_columns
from .tables import DataError, ReadingOptions, listing

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
LARGEST_16_BIT = 65535
TURNED = (5, 6, 7, 8)
"""EXIF orientations of pictures that lie on their side."""


def load_image_folder(folder: str | Path, options: ReadingOptions = DEFAULTS) -> LabelledSplits:
    """Read images from one subfolder per class into splits with "image" and "label" (ClassLabel).

    `folder` holds either the splits (train, and validation and test if there are any), each with the class folders, or
    the class folders themselves. A split of images in no class folder has no labels: a test split is then returned
    apart, a validation split is left out. Missing splits are drawn from train, as in `load_text_files`.

    Classes are the names of train's folders, read and sorted like those of a file. Files are read in any format that
    Pillow opens; of an animation the first frame counts; files of other endings are left out and counted in a warning.
    Images are decoded again when they are accessed, so only paths are held in memory.

    Raises DataError for broken, truncated or empty images, for those of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`
    (89,478,485 unless you set it; larger files may be decompression bombs), for a class without images, and for a
    class that train doesn't have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    split_folders = find_split_folders(folder)
    if "train" not in split_folders:
        split_folders = {"train": folder}
    files = {split: find_class_images(path) for split, path in split_folders.items()}
    names = sorted(files["train"])
    if len(names) < 2:
        raise DataError(
            f"{split_folders['train']}: found {len(names)} class folders ({listing(names) or 'none'}); a classifier "
            "needs two or more, one subfolder of images per class"
        )
    known = set(map(clean_label, names))
    tables = {}
    for split, by_class in files.items():
        unknown = sorted(name for name in by_class if clean_label(name) not in known)
        if unknown and not options.drop_bad_rows:
            raise DataError(
                f"{split_folders[split] / unknown[0]}: the class {unknown[0]!r} doesn't occur in train, whose classes "
                f"are {listing(names)}; rename the folder or add such images to train (images without labels lie in no "
                "class folder)"
            )
        paths = [path for name in sorted(by_class) for path in by_class[name]]
        labels: list[str | None] = [name for name in sorted(by_class) for _ in by_class[name]]
        if not by_class:
            paths = _images_in(split_folders[split])
            labels = [None] * len(paths)
        bad = BadRows(str(split_folders[split]), options.drop_bad_rows)
        features = datasets.Features({"image": datasets.Image()})
        images = datasets.Dataset.from_dict({"image": list(map(str, paths))}, features=features)
        tables[split] = [_sound_table(images, labels, bad, find_sound_images(paths, bad))]
    return fill(encode_tables(tables, _as_classes(options)), options)


def _as_classes(options: ReadingOptions) -> ReadingOptions:
    """The options for names of folders, which are never numbers to predict."""
    if options.problem_type not in (None, "single_label_classification"):
        raise DataError(f"--problem_type {options.problem_type}: folders of images stand for single labels")
    return replace(options, problem_type="single_label_classification")


def _sound_table(
    images: datasets.Dataset,
    labels: Sequence[Any],
    bad: BadRows,
    sound: Sequence[int],
    groups: Sequence[str | None] | None = None,
    class_names: Sequence[str] | None = None,
) -> Table:
    """The table of the rows with these indices; a train row without a group has none of them."""
    if not sound:
        bad.check()
        raise DataError(f"{bad.source}: there are no rows" + (" left" if bad.count else ""))
    return Table(
        images if len(sound) == len(images) else images.select(sound),
        [labels[index] for index in sound],
        [index + 1 for index in sound],
        bad,
        class_names=class_names,
        groups=None if groups is None else [groups[index] for index in sound],
    )


def encode_images(
    dataset: datasets.DatasetDict, options: ReadingOptions = DEFAULTS, check: bool = False
) -> LabelledSplits:
    """Reduce a loaded DatasetDict to the columns "image" and "label"; missing splits are drawn from train.

    Labels are read as those of documents are. With `check` every image is decoded once, as `load_image_folder` does.

    Raises:
        DataError: a column is missing or has another type, a label is missing or not one of train's, or with `check`
            an image is missing, broken or of a mode that can't be converted.
    """
    tables = {
        split: [_table_of(dataset[split], split, options, check)] for split in splits_to_read(dataset, "the data set")
    }
    return fill(encode_tables(tables, options), options)


def _table_of(part: datasets.Dataset, split: str, options: ReadingOptions, check: bool) -> Table:
    source, is_train = f"split {split!r}", split == "train"
    check_columns(options.image_columns, part.column_names, source, () if is_train else OPTIONAL_ROLES)
    images = part.select_columns(options.image_column)
    if not isinstance(images.features[options.image_column], datasets.Image):
        raise DataError(
            f"{source}: column {options.image_column!r} holds {images.features[options.image_column]}, not images"
        )
    if options.image_column != "image":
        images = images.rename_column(options.image_column, "image")

    def values_of(column: str | None) -> list:
        if column not in part.column_names:
            return [None] * len(part)
        return list(part.select_columns(column).with_format(None)[:][column])

    bad = BadRows(source, options.drop_bad_rows)
    groups = [group_of(value) for value in values_of(options.group_column)] if options.group_column else None
    sound = list(_sound_rows(images, bad, check, groups if is_train else None))
    class_names = class_names_of(part.features, options.label_column)
    return _sound_table(images, values_of(options.label_column), bad, sound, groups, class_names)


def _sound_rows(
    images: datasets.Dataset, bad: BadRows, check: bool, groups: Sequence[str | None] | None
) -> Iterator[int]:
    """Yield the indices of rows that have an image that can be used, if that is to be checked, and a group."""
    for index in tqdm(range(len(images)), desc="checking images", unit="image", disable=not check):
        try:
            if check and (image := images[index]["image"]) is not None:
                convert_image(image)
            elif check:
                raise DataError("the image is missing: remove the row or give it one")
            if groups is not None and groups[index] is None:
                raise DataError("the group is missing")
        except (OSError, SyntaxError, ValueError) as error:  # DataError is a ValueError
            bad.add(Place(index + 1), str(error))
        else:
            yield index


def encode_image_columns(columns: Mapping[str, Sequence], options: ReadingOptions = DEFAULTS) -> LabelledSplits:
    """Check and label images that are given in Python, {name of a column: its values}, as `load_image_folder` does.

    Images may be Pillow's, arrays [height, width, channels] of bytes, paths of files, or the bytes of files. All rows
    are train's; other splits are drawn from them.

    Raises:
        DataError: a column is missing, is no list, or is longer than the other; or an image is none of these.
    """
    for role, column in options.image_columns.items():
        check_column(column, role, list(columns), "rows")
    images = columns[options.image_column]
    if isinstance(images, str | bytes) or not isinstance(images, Sequence | np.ndarray):
        raise DataError(
            f"rows, column {options.image_column!r}: a column must be a list of images, got {type(images).__name__}"
        )
    others = {}
    for role, column in options.image_columns.items():
        if role != "image":
            others[role] = list_of(columns[column], f"rows, column {column!r}")
            if len(images) != len(others[role]):
                raise DataError(
                    f"rows: column {options.image_column!r} has {len(images)} values and {column!r} has "
                    f"{len(others[role])}: give one {role} for each image"
                )
    bad = BadRows("rows", options.drop_bad_rows)
    stored = _store_images(images, f"rows, column {options.image_column!r}")
    groups = [group_of(value) for value in others["group"]] if options.group_column else None
    sound = list(_sound_rows(stored, bad, True, groups))
    table = _sound_table(stored, others["label"], bad, sound, groups)
    return fill(encode_tables({"train": [table]}, options), options)


def _store_images(images: Sequence, where: str) -> datasets.Dataset:
    for number, image in enumerate(images, start=1):
        if not isinstance(image, Image.Image | np.ndarray | str | Path | bytes | None):
            raise DataError(
                f"rows, row {number}: an image must be Pillow's, an array, a path or a file's bytes, got "
                f"{type(image).__name__}"
            )
    try:
        return datasets.Dataset.from_dict(
            {"image": list(images)}, features=datasets.Features({"image": datasets.Image()})
        )
    except (pyarrow.ArrowException, TypeError, ValueError, OSError) as error:
        raise DataError(f"{where}: an image can't be stored: {error}") from error


def convert_image(image: Image.Image, num_channels: int = 3) -> Image.Image:
    """Bring an image of any mode to 8 bits and the model's channels: 1 gives mode "L" (grey), 3 gives "RGB".

    Transparent pixels (RGBA, LA, palettes with a transparent colour) are laid over white, because what is stored under
    them is arbitrary. 16-bit grey is scaled so that 65535 becomes 255. Floating-point images (mode "F"), and 32-bit
    integers outside 0 to 65535, have no agreed white and are a DataError.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels must be 1 (grey) or 3 (RGB), got {num_channels}")
    target = "L" if num_channels == 1 else "RGB"
    if image.mode == "F":
        raise DataError(
            "the image has floating-point pixels (mode F), whose range isn't known: save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > LARGEST_16_BIT:
            raise DataError(
                f"the image has integer pixels from {values.min()} to {values.max()}, outside 0 to {LARGEST_16_BIT}: "
                "save it with 8 or 16 bits"
            )
        image = Image.fromarray(_to_8_bits(values))
    if image.mode in MODES_WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert(target)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Integers from 0 to 65535 scaled to 0 to 255, some rows at a time: numpy's indices take 8 bytes a pixel."""
    scaled = np.round(np.arange(LARGEST_16_BIT + 1) * (255 / LARGEST_16_BIT)).astype(np.uint8)
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 64):
        result[start : start + 64] = scaled[values[start : start + 64]]
    return result


def read_sizes(images: datasets.Dataset) -> list[tuple[int, int]]:
    """Return the (height, width) of each image in the column "image", upright.

    No pixels are decoded, but of PNG files with EXIF or XMP behind their pixels, which may say how to turn them.
    """
    sizes = []
    for index, row in enumerate(images.cast_column("image", datasets.Image(decode=False))):
        stored = row["image"]
        if stored["bytes"] is None and not Path(stored["path"]).is_file():  # an address, which datasets opens
            width, height = images[index]["image"].size
        else:
            with Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])) as image:
                width, height = image.size
                # The base class's method: that of PNG files decodes the whole image.
                exif = image.getexif() if _has_facts_behind_pixels(image) else Image.Image.getexif(image)
                if exif.get(ExifTags.Base.Orientation) in TURNED:
                    width, height = height, width
        sizes.append((height, width))
    return sizes


def _has_facts_behind_pixels(image: Image.Image) -> bool:
    """True for a PNG file with a chunk of EXIF or XMP after its pixels; the chunks before are passed over unread."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or image.fp is None:
        return False
    file, has_pixels = image.fp, False
    place = file.tell()
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            has_pixels |= kind == b"IDAT"
            start = file.read(min(size, 32)) if has_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt") else b""
            if start and (kind == b"eXIf" or start.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp"))):
                return True
            file.seek(size - len(start) + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def open_image(path: str | Path) -> Image.Image:
    """Decode one image file completely, turned as its EXIF orientation says.

    Raises DataError, naming the file, if it is empty, not an image, broken, truncated or larger than Pillow's limit.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes): remove it or copy it again")
    try:
        with Image.open(path) as image:
            _check_size(path, image.size)
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}. {_limit_advice()}") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{path}: no image that Pillow can read, or a broken one: remove it, copy it again or "
            "convert it to PNG or JPEG"
        ) from error
    except DataError:
        raise
    # Pillow's own limits, such as that on texts beside the pixels, are ValueErrors.
    except (OSError, SyntaxError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: the image is broken or truncated ({error}): remove it or copy it again") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if width == 0 or height == 0:
        raise DataError(f"{path}: the image has no pixels ({width} x {height}): remove it")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(f"{path}: the image has {width} x {height} = {width * height:,} pixels. {_limit_advice()}")


def image_endings() -> set[str]:
    """Endings of the files that can be read, in lower case; pictures are written to more, such as .pdf."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _limit_advice() -> str:
    return (
        f"The limit against decompression bombs is PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS:,} pixels: "
        "scale the image down, or raise the limit if you trust the file"
    )


def find_split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits "train", "validation" and "test" in `folder`, of those that are there."""
    found = {
        split: next((folder / name for name in names if (folder / name).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    return {split: path for split, path in found.items() if path}


def find_class_images(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, sorted, from the class folders and whatever folders lie inside them.

    Images beside class folders are left out with a warning. Raises DataError for a class without images.
    """
    endings = image_endings()
    found: dict[str, list[Path]] = {}
    left_out: list[Path] = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in class_folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        found[class_folder.name] = [path for path in files if path.suffix.lower() in endings]
        left_out += [path for path in files if path.suffix.lower() not in endings]
        if not found[class_folder.name]:
            raise DataError(f"{class_folder}: the class folder has no images: add some or remove the folder")
    if found and (loose := _images_in(folder)):
        logger.warning(
            "%s: %s left out, first %s",
            folder,
            counted(len(loose), "image", "lies in no class folder and was", "lie in no class folder and were"),
            loose[0].name,
        )
    if left_out:
        logger.warning(
            "%s: %s left out, first %s",
            folder,
            counted(len(left_out), "file", "without the ending of an image was", "without the ending of one were"),
            left_out[0],
        )
    return found


def _images_in(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, sorted."""
    endings = image_endings()
    found = (path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def find_sound_images(paths: Sequence[Path], bad: BadRows) -> list[int]:
    """Decode every image once, in a few threads: Pillow's decoders run outside Python's lock.

    Returns the indices of those that can be used; the others are noted as bad with the name of the file.
    """

    def problem_of(path: Path) -> str | None:
        try:
            image = open_image(path)
        except DataError as error:
            return str(error)
        try:
            convert_image(image)
        except DataError as error:
            return f"{path}: {error}"
        return None

    sound = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = tqdm(pool.map(problem_of, paths), total=len(paths), desc="checking images", unit="image")
        for index, problem in enumerate(problems):
            if problem is None:
                sound.append(index)
            else:
                bad.add(Place(index + 1), problem)
    return sound
