"""Unlabelled text and images to distil on: what the options name, or rows given in Python, split and checked."""

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np

from ..data.facts import DataFacts
from ..data.labelled import describe_user_data, reading_options
from ..data.pieces import check_texts
from ..data.readers.files import read_documents
from ..data.readers.formats import FILE_TYPES
from ..data.readers.images import find_sound_images, find_split_folders, image_endings
from ..data.readers.named import find_tables, load_named
from ..data.readers.problems import BadRows, check_column
from ..data.readers.tables import DataError
from ..data.sets import broad_text, license_documents
from ..options import CardOptions, DataOptions
from ..tables import counted

Rows: TypeAlias = Sequence | Mapping[str, Sequence] | datasets.Dataset | datasets.DatasetDict
"""Rows given in Python: a list of texts or images, {name of a column: its values}, or data sets of `datasets`."""

VALIDATION_SHARE = 0.02
SAME_KINDS = "same kinds"
"""Name of the held-out data that is like the data to train on."""

LICENSE_FACTS = DataFacts(
    name="ScanCode licence documents (held out)",
    license=license_documents.LICENSE,
    attribution=license_documents.ATTRIBUTION,
)


@dataclass(frozen=True)
class UnlabelledRows:
    """Rows to train on, and held-out rows by the name of their kind: documents in the column "text", or images in
    "image" beside a "label" that means nothing. `facts` says what a model card says of them, one for each source.
    """

    train: datasets.Dataset
    heldout: dict[str, datasets.Dataset]
    facts: list[DataFacts]


def read_text(data: DataOptions, card: CardOptions, seed: int, rows: Rows | None = None) -> UnlabelledRows:
    """Read the documents of `rows`, of `--train_file` (and `--validation_file`), or of `--dataset_name`.

    Without any of these it is prose that comes with installed Python packages, and the licence documents are a second
    kind of held-out text, which is never trained on.

    Raises:
        DataError: a file's type is unknown, the text column is missing, or there is nothing to hold out.
        TypeError: `rows` is no list, mapping or data set.
    """
    if rows is None and data.is_demo:
        heldout = broad_text.load_broad_text(split="heldout").shuffle(seed=seed)
        unseen = license_documents.load_license_documents()["test"].select_columns("text")
        kinds = {SAME_KINDS: heldout.select_columns("text"), "licences": unseen}
        prose = DataFacts(
            name="Prose of installed Python packages", license="various", attribution=broad_text.ATTRIBUTION
        )
        return UnlabelledRows(_limit(broad_text.load_broad_text(), data, seed), kinds, [prose, LICENSE_FACTS])
    column = data.text_column_name
    if rows is not None:
        loaded = as_splits(rows, column)
    elif data.train_file:
        loaded, column = _read_files(data, seed), "text"
    elif files := find_tables(str(data.dataset_name), data.dataset_config_name):
        _check_train(files, data)
        wanted = {split: paths for split, paths in files.items() if split in ("train", "validation")}
        loaded, column = read_documents(wanted, reading_options(data, seed)), "text"
    else:
        loaded = _load_named_with_train(data)
    check_column(column, "text", loaded["train"].column_names, "rows" if rows is not None else str(data.dataset_name))
    parts = {name: _only(part, column, "text") for name, part in _with_validation(loaded, seed).items()}
    facts = describe_user_data(data, card)
    return UnlabelledRows(_limit(parts["train"], data, seed), {SAME_KINDS: parts["validation"]}, [facts])


def read_images(
    data: DataOptions, card: CardOptions, seed: int, rows: Rows | None = None, task: str = "images"
) -> UnlabelledRows:
    """Read the images of `rows`, those below `--image_folder`, or those of `--dataset_name`.

    Raises:
        DataError: there is no image, or only one, or a broken one; or the column of the data set holds none.
        TypeError: `rows` is no list, mapping or data set.
    """
    if rows is None and data.is_demo:
        raise DataError(f"--task {task} needs an --image_folder or a --dataset_name: no images come with the package")
    if rows is None and data.image_folder:
        train, heldout = _images_of_folder(data.image_folder, seed, data.drop_bad_rows)
    else:
        loaded = _load_named_with_train(data) if rows is None else as_splits(rows, data.image_column_name, images=True)
        train, heldout = _images_of(loaded, data, seed)
    heldout = heldout.shuffle(seed=seed)  # files lie class by class, and only the first ones are taken
    return UnlabelledRows(_limit(train, data, seed), {SAME_KINDS: heldout}, [describe_user_data(data, card)])


def as_splits(rows: Any, column: str, *, images: bool = False) -> datasets.DatasetDict:
    """Return rows given in Python as a DatasetDict with the split "train"; a plain list becomes the column `column`.

    Raises:
        DataError: a DatasetDict has no split "train".
        TypeError: `rows` is no list, mapping or data set.
    """
    if isinstance(rows, datasets.Dataset):
        return datasets.DatasetDict({"train": rows})
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows:
            raise DataError(f"rows have no split 'train', only {sorted(rows)}")
        return rows
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        rows = {column: list(rows)}
    if not isinstance(rows, Mapping):
        raise TypeError(
            f"rows must be a list of {'images' if images else 'texts'}, a mapping of columns such as "
            f"{{{column!r}: [...]}}, a datasets.Dataset or a datasets.DatasetDict, got {type(rows).__name__}"
        )
    check_column(column, "image" if images else "text", list(rows), "rows")
    values = list(rows[column])
    if not images:
        check_texts(values)
    kind = datasets.Image() if images else datasets.Value("string")
    features = datasets.Features({column: kind})
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict({column: values}, features=features)})


def _limit(rows: datasets.Dataset, data: DataOptions, seed: int) -> datasets.Dataset:
    """At most `--max_train_samples` of the rows, drawn by `seed`."""
    if not data.max_train_samples:
        return rows
    return rows.shuffle(seed=seed).select(range(min(data.max_train_samples, len(rows))))


def _read_files(data: DataOptions, seed: int) -> datasets.DatasetDict:
    """The documents of `--train_file` and `--validation_file`, each a file or a pattern; a txt file is one document."""
    assert data.train_file is not None
    named = {"train": data.train_file} | ({"validation": data.validation_file} if data.validation_file else {})
    files = {}
    for split, path in named.items():
        is_pattern = any(character in path.name for character in "*?[") and not path.is_file()
        files[split] = [Path(found) for found in sorted(glob.glob(str(path)))] if is_pattern else [path]
        if not files[split] or not files[split][0].is_file():
            raise DataError(f"--{split}_file {path}: there is no such file")
    endings = {path.suffix.lower() for paths in files.values() for path in paths}
    if endings == {".txt"}:
        return datasets.load_dataset(  # by document, else every line were one
            "text", data_files={split: list(map(str, paths)) for split, paths in files.items()}, sample_by="document"
        )
    if not endings <= set(FILE_TYPES):
        raise DataError(f"--train_file {data.train_file}: give one of {', '.join((*FILE_TYPES, '.txt'))}")
    return read_documents(files, reading_options(data, seed))


def _load_named_with_train(data: DataOptions) -> datasets.DatasetDict:
    assert data.dataset_name is not None  # no other source is left
    loaded = load_named(data.dataset_name, data.dataset_config_name)
    _check_train(loaded, data)
    return loaded


def _check_train(splits: Iterable[str], data: DataOptions) -> None:
    if "train" not in splits:
        raise DataError(f"--dataset_name {data.dataset_name} has no split 'train', only {sorted(splits)}")


def _with_validation(loaded: datasets.DatasetDict, seed: int) -> dict[str, datasets.Dataset]:
    """The splits "train" and "validation"; the latter a share of the former if there is none."""
    if "validation" in loaded:
        return {name: loaded[name] for name in ("train", "validation")}
    if len(loaded["train"]) < 2:
        raise DataError(f"{counted(len(loaded['train']), 'row', 'is', 'are')} not enough to train and hold out")
    parts = loaded["train"].train_test_split(max(1, int(VALIDATION_SHARE * len(loaded["train"]))), seed=seed)
    return {"train": parts["train"], "validation": parts["test"]}


def _only(rows: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    """One column, under another name."""
    rows = rows.select_columns(column)
    return rows if column == name else rows.rename_column(column, name)


def _images_of(loaded: datasets.DatasetDict, data: DataOptions, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and held-out rows of a loaded data set: its split "validation", or else a share of all."""
    column, features = data.image_column_name, loaded["train"].features
    if not isinstance(features.get(column), datasets.Image):
        source = f"--dataset_name {data.dataset_name}" if data.dataset_name else "rows"
        raise DataError(
            f"{source}: the column {column!r} holds no images; its columns are {sorted(features)}: give "
            "--image_column_name"
        )
    parts = _with_validation(loaded, seed).values()
    train, heldout = (_only(part, column, "image").add_column("label", [0] * len(part)) for part in parts)
    return train, heldout


def _images_of_folder(
    folder: Path, seed: int, drop_bad_rows: bool = False
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and held-out rows of `--image_folder`: its folders "train" and "validation", where it has them.

    Without "train" all images in no folder of a split are trained on; without "validation" a share of those is held
    out. Images in "test" are read neither way.
    """
    splits = find_split_folders(folder)
    chosen = find_images(splits.get("train", folder))
    if "train" not in splits:
        chosen = [path for path in chosen if not any(path.is_relative_to(split) for split in splits.values())]
    if "validation" in splits:
        heldout = find_images(splits["validation"])
    else:
        shuffled = [chosen[index] for index in np.random.default_rng(seed).permutation(len(chosen))]
        count = max(1, int(VALIDATION_SHARE * len(chosen)))
        heldout, chosen = sorted(shuffled[:count]), sorted(shuffled[count:])
    paths, bad = [*chosen, *heldout], BadRows(str(folder), drop_bad_rows)
    sound = find_sound_images(paths, bad)
    bad.check()
    train = [paths[index] for index in sound if index < len(chosen)]
    kept = [paths[index] for index in sound if index >= len(chosen)]
    if not train or not kept:
        raise DataError(
            f"--image_folder {folder} has {counted(len(sound), 'image')} outside of 'test': not enough to train and "
            "hold out"
        )
    return as_image_rows(train), as_image_rows(kept)


def find_images(folder: Path) -> list[Path]:
    """Return all images below `folder`, sorted; hidden files are none.

    Raises:
        DataError: there is none.
    """
    endings = image_endings()
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise DataError(f"{folder} holds no file with the ending of an image")
    return found


def as_image_rows(paths: list[Path]) -> datasets.Dataset:
    """Return rows as `ImageExamples` takes them, with one label for all."""
    rows = {"image": [str(path) for path in paths], "label": [0] * len(paths)}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
