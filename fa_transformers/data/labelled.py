"""Labelled documents or images: read from what the options name or from Python, every row checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import datasets

from ..checks import check_sources
from ..options import CardOptions, DataOptions
from .facts import DataFacts
from .readers.files import (
    encode_columns,
    encode_dataset,
    fill,
    load_text_files,
    read_dataset,
    read_files,
    splits_to_read,
)
from .readers.images import encode_image_columns, encode_images, load_image_folder
from .readers.labelling import LabelledSplits
from .readers.labels import label_names, problem_type_of
from .readers.named import find_tables, load_named
from .readers.streams import LabelledStream, open_files, open_named
from .readers.tables import ReadingOptions
from .sets import digit_canvas, license_documents

Task = Literal["text-classification", "image-classification"]
Rows: TypeAlias = Mapping[str, Sequence] | datasets.Dataset | datasets.DatasetDict
"""Rows given in Python: {name of a column: its values}, or what the datasets library makes of them."""


@dataclass(frozen=True)
class LabelledData:
    """Checked raw data and what its labels are.

    `dataset` has the splits train and validation, and perhaps test, with the columns "label" and "text" or "image";
    `label_names` is None for regression. With `stream`, the rows to train on come from there, raw, and the split train
    is the validation data once more. `unlabelled` are the rows of a test split without labels, to be predicted, in the
    columns "text" or "image" and "row", the number in the source.
    """

    dataset: datasets.DatasetDict
    problem_type: str
    label_names: list[str] | None
    facts: DataFacts
    is_demo: bool
    stream: LabelledStream | None = None
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
    dataset: datasets.DatasetDict
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
        options = reading_options(data, seed)
        dataset, stream = _read_stream(data, options) if data.streaming else (_read_text(data, options, rows), None)
        facts = describe_user_data(data, card)
    else:
        dataset = _read_images(data, reading_options(data, seed), rows)
        facts = describe_user_data(data, card)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_eval_samples}
    kept = {}
    for split, part in dataset.items():
        limit = limits[split] or len(part)
        kept[split] = part if limit >= len(part) else part.shuffle(seed=seed).select(range(limit))
    names = label_names(dataset)
    unlabelled = dataset.unlabelled if isinstance(dataset, LabelledSplits) else None
    return LabelledData(datasets.DatasetDict(kept), problem_type_of(dataset), names, facts, is_demo, stream, unlabelled)


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


def reading_options(data: DataOptions, seed: int = 0) -> ReadingOptions:
    """Return the meaning of columns that the options of a run give, and the seed of drawn splits."""
    return ReadingOptions(
        text_column=data.text_column_name,
        image_column=data.image_column_name,
        label_column=data.label_column_name,
        problem_type=data.problem_type,
        label_separator=data.label_separator,
        label_names=data.label_names,
        group_column=data.group_column,
        delimiter=data.delimiter,
        drop_bad_rows=data.drop_bad_rows,
        seed=seed,
    )


def _read_text(data: DataOptions, options: ReadingOptions, rows: Rows | None) -> LabelledSplits:
    if rows is not None:
        if isinstance(rows, datasets.DatasetDict | datasets.Dataset):
            return encode_dataset(_as_splits(rows), options)
        return encode_columns(rows, options)
    if data.train_file:
        return load_text_files(data.train_file, data.validation_file, data.test_file, options)
    assert data.dataset_name is not None  # else this is the demo
    files = find_tables(data.dataset_name, data.dataset_config_name)
    if files is None:
        return encode_dataset(load_named(data.dataset_name, data.dataset_config_name), options)
    read = {split: files[split] for split in splits_to_read(files, data.dataset_name)}
    return fill(read_files(read, options), options)


def _read_stream(data: DataOptions, options: ReadingOptions) -> tuple[LabelledSplits, LabelledStream]:
    """The splits that are read whole, "train" being the validation data once more, and the stream to train on."""
    others: datasets.DatasetDict | dict[str, list[Path]]
    if data.train_file:
        if data.validation_file is None:
            raise ValueError("--streaming needs a --validation_file, which is read whole and names the labels.")
        others = {"validation": [data.validation_file]} | ({"test": [data.test_file]} if data.test_file else {})
        rows = open_files(str(data.train_file), options)
    else:
        assert data.dataset_name is not None  # `check_sources` and `_check_rows` leave nothing else
        rows, others = open_named(data.dataset_name, data.dataset_config_name, options)
    if isinstance(others, datasets.DatasetDict):
        splits = read_dataset(others, options, train="validation")
    else:
        splits = read_files(others, options, train="validation")
    splits["validation"] = splits["train"]
    origin = ("the validation data, which names the labels of a stream:", "mend the row, or add such a document there")
    scheme = replace(splits.labels, origin=origin)
    source = str(data.train_file or data.dataset_name)
    columns = {"text_column": data.text_column_name, "label_column": data.label_column_name}
    return splits, LabelledStream(rows, scheme, source, **columns, drop_bad_rows=data.drop_bad_rows)


def _read_images(data: DataOptions, options: ReadingOptions, rows: Rows | None) -> LabelledSplits:
    if data.image_folder:
        return load_image_folder(data.image_folder, options)
    if rows is None:
        assert data.dataset_name is not None  # else this is the demo
        return encode_images(load_named(data.dataset_name, data.dataset_config_name), options)
    if isinstance(rows, datasets.DatasetDict | datasets.Dataset):
        return encode_images(_as_splits(rows), options, check=True)
    return encode_image_columns(rows, options)


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
        is_folder = Path(data.dataset_name).exists()
        name = Path(data.dataset_name).resolve().name if is_folder else data.dataset_name
        hub_id = None if is_folder else data.dataset_name
    else:
        name = "rows given in Python"
    return DataFacts(
        name=card.data_name or name, license=card.data_license, attribution=card.data_attribution, hub_id=hub_id
    )


def _demo_facts(name: str, module: ModuleType) -> DataFacts:
    return DataFacts(name=name, license=module.LICENSE, attribution=module.ATTRIBUTION)
