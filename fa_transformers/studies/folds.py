"""Folds for cross-validation that cut no group of documents."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from ..data.labelled import LabelledData
from ..data.readers.files import group_of
from ..data.readers.formats import open_rows
from ..data.readers.named import find_tables, load_named
from ..data.readers.problems import BadRows, check_column
from ..data.sets.license_documents import load_license_documents
from ..options import DataOptions


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a document, of SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]


def read_groups(data: DataOptions) -> dict[bytes, str]:
    """Return for the digest of each document the group that no fold may cut.

    That is the value of `data.group_column`, for the licence documents the family; without a column there are none.

    Raises:
        DataError: the data have no such column.
    """
    if data.is_demo:
        loaded, text_column, column = load_license_documents(), "text", "family"
    elif data.group_column is None:
        return {}
    else:
        files = [path for path in (data.train_file, data.validation_file, data.test_file) if path is not None]
        if data.dataset_name:
            tables = find_tables(data.dataset_name, data.dataset_config_name)
            files = [path for paths in (tables or {}).values() for path in paths]
        if files:
            return _groups_of_files(files, data, data.group_column)
        loaded = load_named(str(data.dataset_name), data.dataset_config_name)
        text_column, column = data.text_column_name, data.group_column
    groups: dict[bytes, str] = {}
    for split, part in loaded.items():
        check_column(column, "group", part.column_names, f"split {split!r}")
        for batch in part.select_columns([text_column, column]).iter(batch_size=64):
            groups |= _groups_of(zip(batch[text_column], batch[column], strict=True))
    return groups


def _groups_of_files(files: Sequence[Path], data: DataOptions, column: str) -> dict[bytes, str]:
    groups: dict[bytes, str] = {}
    for path in files:
        bad = BadRows(str(path), data.drop_bad_rows)
        columns = {"text": data.text_column_name, "group": column}
        groups |= _groups_of(row.values for row in open_rows(path, columns, bad, delimiter=data.delimiter))
    return groups


def _groups_of(rows: Iterable[Sequence]) -> dict[bytes, str]:
    """The groups of rows of a document and a group; those without either, which were dropped, are left out."""
    return {
        digest(text): name for text, group in rows if isinstance(text, str) and (name := group_of(group)) is not None
    }


def split_folds(data: LabelledData, groups: dict[bytes, str], num_folds: int) -> list[LabelledData]:
    """Deal out all rows of all splits `num_folds` times: a fold is the test split once, and validation once.

    A group stays whole, and so do equal texts; a document without a group is one of its own. The folds have similar
    shares of each label, and are the same for every contender and seed.

    Raises:
        ValueError: there are fewer than 3 folds, or fewer groups than folds.
    """
    rows = datasets.concatenate_datasets(list(data.dataset.values()))
    names = []
    for batch in rows.select_columns("text").iter(batch_size=64):
        keys = [digest(text) for text in batch["text"]]
        names += [groups.get(key, key.hex()) for key in keys]
    if not 3 <= num_folds <= len(set(names)):
        raise ValueError(
            f"--folds must be at least 3 (train, validation, test) and at most the {len(set(names))} groups of "
            f"documents, got {num_folds}."
        )
    is_single = data.problem_type == "single_label_classification"
    make = StratifiedGroupKFold if is_single else GroupKFold
    labels = list(rows["label"]) if is_single else None
    folds = [test for _, test in make(num_folds, shuffle=True, random_state=0).split(names, labels, names)]
    parts = []
    for number in range(num_folds):
        validation = (number + 1) % num_folds
        train = [fold for other, fold in enumerate(folds) if other not in (number, validation)]
        chosen = {"train": np.concatenate(train), "validation": folds[validation], "test": folds[number]}
        splits = {split: rows.select(np.sort(indices)) for split, indices in chosen.items()}
        parts.append(replace(data, dataset=datasets.DatasetDict(splits)))
    return parts
