"""Labelled documents or images: read from what the options name or from Python, every row checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import datasets

from ..checks import check_sources
from ..options import CardOptions, DataOptions
from .facts import DataFacts
from .readers.files import encode_columns, encode_dataset, load_text_files
from .readers.images import collect_images, encode_images, load_image_folder
from .readers.labels import label_names, problem_type_of
from .readers.streams import open_files, open_named
from .readers.tables import DataError, ReadingOptions
from .sets import digit_canvas, license_documents

Task = Literal["text-classification", "image-classification"]
Rows: TypeAlias = Mapping[str, Sequence] | datasets.Dataset | datasets.DatasetDict
"""Rows given in Python: {name of a column: its values}, or what the datasets library makes of them."""


@dataclass(frozen=True)
class LabelledData:
    """Checked raw data and what its labels are.

    `dataset` has the splits train and validation, and perhaps test, with the columns "label" and "text" or "image";
    `label_names` is None for regression. With `stream`, the rows to train on come from there, raw, and the split train
    is the validation data once more.
    """

    dataset: datasets.DatasetDict
    problem_type: str
    label_names: list[str] | None
    facts: DataFacts
    is_demo: bool
    stream: datasets.IterableDataset | None = None
    unlabelled: datasets.Dataset | None = None

    @property
    def num_labels(self) -> int:
        """The number of a model's outputs: the classes, or 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def config_fields(self) -> dict:
        """Fields of a model's config that say what the labels are."""
        fields = {"num_labels": self.num_labels, "problem_type": self.problem_type}
        if self.label_names is not None:
            fields["id2label"] = dict(enumerate(self.label_names))
            fields["label2id"] = {name: index for index, name in enumerate(self.label_names)}
        return fields

    @property
    def image_statistics(self) -> dict:
        """Mean and deviation that a new image processor normalises this data by; its own defaults for users' data."""
        if not self.is_demo:
            return {}
        return {"image_mean": [digit_canvas.IMAGE_MEAN] * 3, "image_std": [digit_canvas.IMAGE_STD] * 3}

    @property
    def score_split(self) -> str:
        """The split that the final scores are on."""
        return "test" if "test" in self.dataset else "validation"


def load_data(
    task: Task,
    data: DataOptions,
    card: CardOptions,
    seed: int,
    canvas: dict | None = None,
    rows: Rows | None = None,
) -> LabelledData:
    """Read the data that the options name, or build the task's demo data, and check every row.

    Args:
        task: "text-classification" or "image-classification".
        data: which data, and what its columns mean.
        card: how the model card is to speak of it.
        seed: draws missing splits and the rows that `data.max_train_samples` and `data.max_eval_samples` keep.
        canvas: arguments of `load_digit_canvas`, the demo data of images.
        rows: the data itself instead of a file: a mapping of columns such as {"text": [...], "label": [...]} or
            {"image": [...], "label": [...]}, a `datasets.Dataset`, or a `datasets.DatasetDict` with a split "train".

    Raises:
        DataError: a file, row, column or label can't be used; the message names it and says what to do.
        TypeError: `rows` is of another type.
        ValueError: there is no such task, two sources of data are given, or one of the other kind.
    """
    if task not in ("text-classification", "image-classification"):
        raise ValueError(f"task must be 'text-classification' or 'image-classification', got {task!r}")
    is_text = task == "text-classification"
    check_sources(data, is_text=is_text)
    if rows is not None:
        _check_rows(rows, data)
    is_demo = rows is None and data.is_demo
    stream = None
    if is_demo and is_text:
        dataset = encode_dataset(license_documents.load_license_documents())
        facts = _demo_facts("ScanCode licence documents", license_documents)
    elif is_demo:
        if canvas is None:
            raise ValueError("the demo images need `canvas`, the arguments of load_digit_canvas; or name images.")
        dataset = digit_canvas.load_digit_canvas(**{"seed": seed} | canvas)
        facts = _demo_facts("Digit canvas (generated)", digit_canvas)
    elif is_text:
        dataset, stream = _read_text(data, _reading_options(data, seed), rows)
        facts = describe_user_data(data, card)
    else:
        dataset = _read_images(data, seed, rows)
        facts = describe_user_data(data, card)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_eval_samples}
    kept = {}
    for split, part in dataset.items():
        limit = limits[split] or len(part)
        kept[split] = part if limit >= len(part) else part.shuffle(seed=seed).select(range(limit))
    names = label_names(dataset)
    return LabelledData(datasets.DatasetDict(kept), problem_type_of(dataset), names, facts, is_demo, stream)


def load_named(name: str, config_name: str | None) -> datasets.DatasetDict:
    """Load a data set of the Hub, or the local folder of one."""
    if (Path(name) / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)
    loaded = datasets.load_dataset(name, config_name)
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"--dataset_name {name} has no splits; it needs at least 'train'.")
    return loaded


def _check_rows(rows: Any, data: DataOptions) -> None:
    if data.sources:
        raise ValueError(f"rows and --{data.sources[0]} are two sources of data; give one.")
    if data.streaming:
        raise ValueError("--streaming reads files or a data set while training, and rows are in memory: leave it out.")
    if isinstance(rows, datasets.DatasetDict | datasets.Dataset):
        return
    if not isinstance(rows, Mapping):
        raise TypeError(
            "rows must be a mapping of columns such as {'text': [...], 'label': [...]}, a datasets.Dataset or a "
            f"datasets.DatasetDict, got {type(rows).__name__}; datasets.Dataset.from_list makes one of a list of "
            "dictionaries, from_pandas of a table"
        )
    if any(isinstance(value, datasets.Dataset | Mapping) for value in rows.values()):
        raise TypeError("rows: a mapping of splits must be a datasets.DatasetDict, a plain one holds columns.")


def _reading_options(data: DataOptions, seed: int) -> ReadingOptions:
    return ReadingOptions(
        text_column=data.text_column_name,
        label_column=data.label_column_name,
        problem_type=data.problem_type,
        label_separator=data.label_separator,
        seed=seed,
    )


def _read_text(
    data: DataOptions, options: ReadingOptions, rows: Rows | None
) -> tuple[datasets.DatasetDict, datasets.IterableDataset | None]:
    """Documents of all splits and the stream to train on, None without `data.streaming`."""
    if rows is not None:
        if isinstance(rows, datasets.DatasetDict | datasets.Dataset):
            return encode_dataset(_as_splits(rows), options), None
        return encode_columns(rows, options), None
    if data.train_file:
        if not data.streaming:
            return load_text_files(data.train_file, data.validation_file, data.test_file, options), None
        if data.validation_file is None:
            raise ValueError("--streaming needs a --validation_file, which is read whole and names the labels.")
        stream = open_files(str(data.train_file))
        return load_text_files(data.validation_file, data.validation_file, data.test_file, options), stream
    assert data.dataset_name is not None  # else this is the demo
    if not data.streaming:
        return encode_dataset(load_named(data.dataset_name, data.dataset_config_name), options), None
    stream, others = open_named(data.dataset_name, data.dataset_config_name)
    loaded = datasets.DatasetDict({"train": others["validation"]} | others)
    return encode_dataset(loaded, options), stream


def _read_images(data: DataOptions, seed: int, rows: Rows | None) -> datasets.DatasetDict:
    if data.image_folder:
        return load_image_folder(data.image_folder, seed=seed)
    columns = (data.image_column_name, data.label_column_name)
    if rows is None:
        assert data.dataset_name is not None  # else this is the demo
        return encode_images(load_named(data.dataset_name, data.dataset_config_name), *columns, seed)
    loaded = rows if isinstance(rows, datasets.DatasetDict | datasets.Dataset) else collect_images(rows, *columns)
    return encode_images(_as_splits(loaded), *columns, seed, check=True)


def _as_splits(rows: datasets.DatasetDict | datasets.Dataset) -> datasets.DatasetDict:
    return datasets.DatasetDict({"train": rows}) if isinstance(rows, datasets.Dataset) else rows


def describe_user_data(data: DataOptions, card: CardOptions) -> DataFacts:
    """Return what the model card says of data that the options name, or of rows given in Python."""
    hub_id = None
    if data.train_file:
        name = data.train_file.name
    elif data.image_folder:
        name = data.image_folder.resolve().name
    elif data.dataset_name:
        name, hub_id = data.dataset_name, None if Path(data.dataset_name).exists() else data.dataset_name
    else:
        name = "rows given in Python"
    return DataFacts(
        name=card.data_name or name, license=card.data_license, attribution=card.data_attribution, hub_id=hub_id
    )


def _demo_facts(name: str, module: ModuleType) -> DataFacts:
    return DataFacts(name=name, license=module.LICENSE, attribution=module.ATTRIBUTION)
