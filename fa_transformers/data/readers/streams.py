"""Labelled documents that are read as they are needed, from files or a data set of the Hub, and never all at once."""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from ..tokenizing import count_tokens, tokenize_texts
from .files import check_text
from .labels import as_name, as_number
from .tables import DataError, check_column, listing

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def open_files(pattern: str) -> datasets.IterableDataset:
    """Open the rows of all files that a shell pattern such as "shards/*.parquet" names, one shard each, sorted.

    Raises:
        DataError: there is no such file, or they have an unknown ending or several.
    """
    paths = sorted(glob.glob(pattern))
    endings = sorted({Path(path).suffix for path in paths})
    if not paths:
        raise DataError(f"{pattern}: there is no such file")
    if len(endings) > 1 or endings[0] not in READERS:
        raise DataError(f"{pattern}: files must have one of the endings {listing(READERS)}, got {listing(endings)}")
    options = {"sep": "\t"} if endings == [".tsv"] else {}
    return datasets.load_dataset(READERS[endings[0]], data_files=paths, split="train", streaming=True, **options)


def open_named(
    name: str, config_name: str | None = None
) -> tuple[datasets.IterableDataset, dict[str, datasets.Dataset]]:
    """Open the split "train" of a data set of the Hub, or of a local folder, as a stream, and load its other splits.

    Raises:
        DataError: it lacks "train" or "validation".
    """
    if (Path(name) / "dataset_dict.json").is_file():
        stored = datasets.load_from_disk(name)
        splits, others = list(stored), {split: stored[split] for split in stored if split != "train"}
    else:
        splits = datasets.get_dataset_split_names(name, config_name)
        others = {
            split: datasets.load_dataset(name, config_name, split=split)
            for split in ("validation", "test")
            if split in splits
        }
    if "train" not in splits or "validation" not in others:
        raise DataError(f"{name} has the splits {listing(splits)}: a stream needs 'train' and 'validation'")
    if (Path(name) / "dataset_dict.json").is_file():
        # One shard per stored file, so that processes can share them.
        return stored["train"].to_iterable_dataset(max(1, len(stored["train"].cache_files))), others
    return datasets.load_dataset(name, config_name, split="train", streaming=True), others


@dataclass(frozen=True)
class DocumentStream:
    """A stream of raw rows, with the meaning of their columns and labels.

    `label_names` gives the classes their numbers; None is regression. Integers of a ClassLabel column stand for its
    names. Documents of more than `max_length` tokens are cut, or an error with `strict_length`.
    """

    rows: datasets.IterableDataset
    tokenizer: Callable
    max_length: int
    problem_type: str
    label_names: Sequence[str] | None
    source: str
    text_column: str = "text"
    label_column: str = "label"
    label_separator: str | None = None
    strict_length: bool = False

    def encode(self, rows: list[dict]) -> list[dict]:
        """Tokenize and label rows: one dictionary a document, with "label" and "length" in tokens.

        Raises:
            DataError: a column is missing, or a document or label can't be used; the message shows how it begins.
        """
        if not rows:
            return []
        for role, column in (("text", self.text_column), ("label", self.label_column)):
            check_column(column, role, list(rows[0]), self.source)
        labels = []
        for row in rows:
            where = f"{self.source}, the document that begins {str(row[self.text_column])[:60]!r}"
            check_text(row[self.text_column], where)
            labels.append(self._encode_label(row[self.label_column], where))
        columns = tokenize_texts(self.tokenizer, [row[self.text_column] for row in rows], self.max_length)
        full_length = columns.pop("full_length")
        longest = max(range(len(rows)), key=lambda index: abs(full_length[index]))
        if self.strict_length and abs(full_length[longest]) > self.max_length:
            text = rows[longest][self.text_column]
            raise DataError(
                f"{self.source}, the document that begins {text[:60]!r} has {count_tokens(self.tokenizer, text)} "
                f"tokens, the limit is {self.max_length}: raise max_length, shorten it, or leave strict_length off to "
                "truncate"
            )
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [example | {"label": label} for example, label in zip(examples, labels, strict=True)]

    def _encode_label(self, label: object, where: str) -> int | float | list[int]:
        if label is None:
            raise DataError(f"{where}: the label is missing")
        if self.label_names is None:
            number = as_number(label)
            if number is None:
                raise DataError(f"{where}: the label {label!r} is not a finite float32 number, which regression needs")
            return number
        if self.label_separator is not None and isinstance(label, str):
            label = [name.strip() for name in label.split(self.label_separator) if name.strip()]
        several = self.problem_type == "multi_label_classification"
        if several != isinstance(label, list):
            wanted = "a list of labels" if several else "one label"
            raise DataError(f"{where}: expected {wanted}, got {label!r}")
        numbers = [self._number_of(value, where) for value in (label if isinstance(label, list) else [label])]
        return numbers if several else numbers[0]

    def _number_of(self, value: object, where: str) -> int:
        feature = (self.rows.features or {}).get(self.label_column)
        feature = getattr(feature, "feature", feature)
        name = feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else None
        name = as_name(value, where, self.label_column) if name is None else name
        if self.label_names is None or name not in self.label_names:
            raise DataError(
                f"{where}: the label {name!r} doesn't occur in the validation data, which names the labels of a "
                f"stream: {listing(self.label_names or [])}. Mend the row, or add such a document there"
            )
        return self.label_names.index(name)
