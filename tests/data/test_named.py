"""Protects folders of tables: every file that names show is read, of whatever type, or the message says which isn't."""

import json
import logging
from pathlib import Path

import datasets
import pytest
from workbooks import write_workbook

from fa_transformers.data.readers.named import find_tables
from fa_transformers.data.readers.tables import DataError

ROWS = [("a", "x"), ("b", "y")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")


def make(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        path = folder / name
        if path.suffix == ".xlsx":
            write_workbook(path, {"rows": [("text", "label"), *ROWS]})
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
        else:
            path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS))
    return folder


def found_in(folder: Path) -> dict[str, list[str]]:
    tables = find_tables(str(folder), None)
    assert tables is not None
    return {split: sorted(path.name for path in paths) for split, paths in tables.items()}


@pytest.mark.parametrize("other", ["test.jsonl", "test.tsv", "test.xlsx", "test.CSV"])
def test_splits_may_be_of_different_types(other, tmp_path):
    assert found_in(make(tmp_path / "set", "train.csv", other)) == {"train": ["train.csv"], "test": [other]}


def test_no_file_of_a_split_is_lost_because_others_are_of_another_type(tmp_path):
    names = ["train-0.csv", "train-1.jsonl", "train-2.xlsx"]
    assert found_in(make(tmp_path / "set", *names)) == {"train": names}


def test_a_card_chooses_the_files_and_the_others_are_told(tmp_path, caplog):
    folder = make(tmp_path / "set", "train-0.csv", "train-1.jsonl")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train-0.csv\n---\n")
    with caplog.at_level(logging.WARNING):
        assert found_in(folder) == {"train": ["train-0.csv"]}
    assert "set: tables that are not read: 'train-1.jsonl'" in caplog.text


def test_a_split_that_is_no_table_and_an_unknown_configuration_are_errors_that_name_the_flag(tmp_path):
    folder = make(tmp_path / "set", "train.csv", "test.txt")
    with pytest.raises(DataError, match="--dataset_name .*set: the files of split 'test' are no tables"):
        find_tables(str(folder), None)
    with pytest.raises(DataError, match="--dataset_name .*set2: .*'other' not found"):
        find_tables(str(make(tmp_path / "set2", "train.csv")), "other")
