"""Protects the meaning of labels: a table is the same data from every source, and what is ambiguous is an error."""

import csv
import datetime
import json
import logging
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image
from workbooks import write_workbook

from fa_transformers.data.labelled import LabelledData, load_data
from fa_transformers.data.readers.labels import LabelError, LabelScheme, clean_label
from fa_transformers.data.readers.tables import DataError
from fa_transformers.options import CardOptions, DataOptions

TEXT, IMAGES = "text-classification", "image-classification"
NAMES = [
    "NA",
    "null",
    "None",
    "nan",
    "N/A",
    "007",
    "1.0",
    "2020-01-01",
    "True",
    "café",
    "cafe\u0301 noir",
    " sea ",
    "s e a",
]
CLEAN = ["NA", "null", "None", "nan", "N/A", "007", "1.0", "2020-01-01", "True", "café", "café noir", "sea", "s e a"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The checked documents of a test go into its own folder."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")


def write(path: Path, labels: list, column: str = "label") -> Path:
    """Write a table of numbered documents with these labels as the ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"text": [f"document {number}" for number in range(len(labels))], column: labels}
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([rows, *zip(*rows.values(), strict=True)])
    elif path.suffix == ".parquet":
        datasets.Dataset.from_dict(rows).to_parquet(path)
    elif path.suffix == ".xlsx":
        write_workbook(path, {"rows": [list(rows), *zip(*rows.values(), strict=True)]})
    else:
        lines = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        joined = json.dumps(lines) if path.suffix == ".json" else "".join(json.dumps(line) + "\n" for line in lines)
        path.write_text(joined, encoding="utf-8")
    return path


def set_of(labels: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"text": [f"document {number}" for number in range(len(labels))], "label": labels}
    )


def from_file(ending: str):
    def read(folder: Path, labels: list, **options) -> LabelledData:
        path = write(folder / f"table{ending}", labels)
        return load(train_file=path, validation_file=path, **options)

    return read


def from_folder(ending: str):
    def read(folder: Path, labels: list, **options) -> LabelledData:
        for split in ("train", "validation"):
            write(folder / "set" / f"{split}{ending}", labels)
        return load(dataset_name=str(folder / "set"), **options)

    return read


def from_saved(folder: Path, labels: list, **options) -> LabelledData:
    datasets.DatasetDict(train=set_of(labels), validation=set_of(labels)).save_to_disk(folder / "saved")
    return load(dataset_name=str(folder / "saved"), **options)


def from_rows(folder: Path, labels: list, **options) -> LabelledData:
    rows = datasets.DatasetDict(train=set_of(labels), validation=set_of(labels))
    return load_data(TEXT, DataOptions(**options), CardOptions(), 0, rows=rows)


def load(task: str = TEXT, **options) -> LabelledData:
    return load_data(task, DataOptions(**options), CardOptions(), 0)


def streamed(data: LabelledData) -> tuple:
    """The meaning of a stream's labels, all of which are read."""
    assert data.stream is not None and data.label_names is not None
    texts, labels = data.stream.read(list(data.stream.rows))
    assert texts == [f"document {number}" for number in range(len(texts))]
    return data.problem_type, data.label_names, [data.label_names[label] for label in labels]


SOURCES = {ending: from_file(ending) for ending in (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx")}
SOURCES |= {f"folder{ending}": from_folder(ending) for ending in (".csv", ".jsonl", ".parquet")}
SOURCES |= {"saved": from_saved, "rows": from_rows}


def meaning(data: LabelledData) -> tuple:
    """The problem type, the classes in their order, and the labels of train by name."""
    labels = data.dataset["train"]["label"][:]
    if data.label_names is None:
        return data.problem_type, None, labels
    names = data.label_names
    rows = [[names[number] for number in row] if isinstance(row, list) else names[row] for row in labels]
    return data.problem_type, names, rows


@pytest.mark.parametrize("source", SOURCES)
def test_awkward_names_are_the_same_classes_from_every_source(source, tmp_path):
    found = meaning(SOURCES[source](tmp_path, NAMES))
    assert found == ("single_label_classification", sorted(CLEAN), CLEAN)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx"])
@pytest.mark.parametrize("named", [False, True])
def test_a_streamed_table_has_the_rows_and_classes_of_one_that_is_read_whole(ending, named, tmp_path):
    paths = {split: write(tmp_path / "set" / f"{split}{ending}", NAMES) for split in ("train", "validation")}
    files = {f"{split}_file": path for split, path in paths.items()}
    data = load(streaming=True, **({"dataset_name": str(tmp_path / "set")} if named else files))
    assert streamed(data) == ("single_label_classification", sorted(CLEAN), CLEAN)


def test_names_of_image_folders_are_the_classes_of_a_table_of_them(tmp_path):
    names = [name for name in NAMES if "/" not in name]
    for number, name in enumerate(names):
        for split in ("train", "val"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            Image.new("L", (2, 2), number).save(tmp_path / "pictures" / split / name / "0.png")
    expected = meaning(SOURCES[".csv"](tmp_path, names))
    data = load(IMAGES, image_folder=tmp_path / "pictures")
    assert data.label_names == expected[1] and sorted(meaning(data)[2]) == sorted(expected[2])
    rows = {"image": [Image.new("L", (2, 2))] * len(names), "label": names}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    part = datasets.Dataset.from_dict(rows, features=features)
    assert meaning(given(IMAGES, {"train": part, "validation": part})) == expected


COLUMNS: dict[str, tuple[list, list[str], list[str]]] = {
    # What is written, as values with types and as the text of a csv file, and the names of its classes.
    "integers with gaps": ([3, 0, 12, -1], ["3", "0", "12", "-1"], ["3", "0", "12", "-1"]),
    "whole floats": ([3.0, 0.0, 12.0, -1.0], ["3.0", "0.0", "12.0", "-1.0"], ["3", "0", "12", "-1"]),
    "booleans": ([True, False, True, True], ["True", "False", "True", "True"], ["True", "False", "True", "True"]),
    "codes": (["007", "010", "1", "2"], ["007", "010", "1", "2"], ["007", "010", "1", "2"]),
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("source", [".csv", ".jsonl", ".parquet", ".xlsx", "saved"])
def test_numbers_and_booleans_are_the_classes_that_their_text_is(source, column, tmp_path):
    typed, text, names = COLUMNS[column]
    problem_type, classes, labels = meaning(SOURCES[source](tmp_path, text if source == ".csv" else typed))
    assert problem_type == "single_label_classification" and labels == names
    assert classes == sorted(set(names), key=lambda name: int(name) if name.lstrip("-").isdecimal() else name)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.date(2020, 1, 1), "2020-01-01"),
        (datetime.datetime(2020, 1, 1), "2020-01-01"),
        (datetime.datetime(2020, 1, 1, 12, 30), "2020-01-01 12:30:00"),
        (pandas.Timestamp("2020-01-01"), "2020-01-01"),
        (np.datetime64("2020-01-01"), "2020-01-01"),
        (np.bool_(True), "True"),
        (np.int8(7), 7),
        (float("nan"), None),
        (pandas.NA, None),
        (pandas.NaT, None),
        (np.str_(" e\u0301 "), "é"),
        (["a ", None, 1], ["a", None, 1]),
        ("  ", None),
    ],
)
def test_values_with_types_become_what_a_csv_file_has_for_them(value, text):
    assert clean_label(value) == text


def test_image_folders_of_numbers_are_sorted_by_value(tmp_path):
    for name in ("10.0", "9.0", "2.0"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("L", (2, 2), number).save(tmp_path / name / f"{number}.png")
    assert load(IMAGES, image_folder=tmp_path).label_names == ["2", "9", "10"]


def test_dates_are_the_classes_that_their_text_is(tmp_path):
    days = [datetime.datetime(2020, 1, day) for day in (1, 2, 1, 3)]
    expected = meaning(SOURCES[".csv"](tmp_path, [day.date().isoformat() for day in days]))
    for source in (".parquet", ".xlsx", "saved", "rows"):
        assert meaning(SOURCES[source](tmp_path / source, days)) == expected


@pytest.mark.parametrize("source", [".jsonl", ".parquet", "saved", "rows", "folder.parquet"])
def test_lists_of_names_are_what_a_separated_csv_cell_is(source, tmp_path):
    lists = [["sea", "law"], ["law"], [], ["air "]]
    expected = ("multi_label_classification", ["air", "law", "sea"], [["sea", "law"], ["law"], [], ["air"]])
    assert meaning(SOURCES[source](tmp_path, lists)) == expected
    cells = ["; ".join(names) for names in lists]
    assert meaning(SOURCES[".csv"](tmp_path, cells, label_separator=";")) == expected


@pytest.mark.parametrize("source", [".csv", ".jsonl", ".parquet", "saved", "rows"])
def test_rows_of_zeros_and_ones_are_one_class_an_entry(source, tmp_path, caplog):
    lists: list[Any] = [[number % 2, 1 - number % 2, 1] for number in range(4)]
    options = {}
    if source == ".csv":
        lists, options = ["|".join(map(str, row)) for row in lists], {"label_separator": "|"}
    with caplog.at_level(logging.WARNING):
        found = meaning(SOURCES[source](tmp_path, lists, **options))
    assert found == ("multi_label_classification", ["0", "1", "2"], [["1", "2"], ["0", "2"]] * 2)
    assert "each entry was taken for a class" in caplog.text and "--label_names" in caplog.text
    named = meaning(SOURCES[source](tmp_path / "named", lists, label_names=("x", "y", "z"), **options))
    assert named == ("multi_label_classification", ["x", "y", "z"], [["y", "z"], ["x", "z"]] * 2)


def test_a_class_label_of_no_and_yes_in_rows_of_zeros_and_ones_names_no_class(tmp_path):
    feature = datasets.List(datasets.ClassLabel(names=["no", "yes"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [[1, 0, 1], [1, 1, 1]]}, features=features)
    data = load_data(TEXT, DataOptions(), CardOptions(), 0, rows=datasets.DatasetDict(train=part, validation=part))
    assert meaning(data) == ("multi_label_classification", ["0", "1", "2"], [["0", "2"], ["0", "1", "2"]])


AMBIGUOUS = {
    "two_entries": ([[0, 1], [1, 0]] * 3, {}, "one 0 and one 1.*Give --label_names"),
    "a_name_twice": ([["a", "b"], ["a", "a"], ["b"]], {}, r"row 2.*'a' stands twice in the row's list"),
    "zeros_and_ones_of_two_lengths": ([[0, 1, 1], [1, 0]] * 2, {}, r"row 1.*1 stands twice|row 1.*'1' stands twice"),
    "a_row_of_another_width": (
        [[0, 1, 1], [1, 0, 1], [1]],
        {},
        r"1 bad row:\n  row 3 .*expected 3 zeros and ones.*\[1\]",
    ),
    "a_row_of_places": ([[0, 1], [1, 1], [2, 0]], {}, r"1 bad row:\n  row 3 .*expected 2 zeros and ones.*\[2, 0\]"),
    "other_width": ([[0, 1, 1], [1, 0, 0]] * 2, {"label_names": ("a", "b")}, "3 zeros and ones.*--label_names names 2"),
    "place_outside": ([0, 1, 2, 1], {"label_names": ("a", "b")}, r"row 3.*the label 2 is no place among the 2"),
    "names_of_numbers": ([0.5, 1.5, 2.0, 1.0], {"label_names": ("a", "b")}, "--label_names is for classes"),
    "a_missing_name": ([["a"], ["b", None], ["b"]], {}, r"row 2.*a label of the row's list is missing"),
    "half_a_pair": (["a", "b\ud800", "b"], {}, r"row 2.*character 2 of the label is half of a surrogate pair"),
}


@pytest.mark.parametrize(("labels", "options", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_labels_that_cannot_be_told_apart_are_errors_that_name_rows_and_flags(labels, options, message, tmp_path):
    with pytest.raises(DataError, match=f"(?s){message}"):
        SOURCES[".jsonl"](tmp_path, labels, **options)


def test_a_bad_row_among_zeros_and_ones_is_the_one_that_is_dropped(tmp_path, caplog):
    lists = [[0, 1], [1, 0], [1, 1], [1], [0, 1]]
    path = write(tmp_path / "train.jsonl", lists)
    with caplog.at_level(logging.WARNING):
        data = load(train_file=path, validation_file=path, drop_bad_rows=True)
    assert meaning(data) == ("multi_label_classification", ["0", "1"], [["1"], ["0"], ["0", "1"], ["1"]])
    assert "1 bad row left out:\n  row 4" in caplog.text


def test_names_of_integers_and_an_order_of_names_are_given_by_a_flag(tmp_path):
    for source in (".csv", ".parquet"):
        found = meaning(SOURCES[source](tmp_path / source, [1, 0, 1], label_names=("calm", "storm")))
        assert found == ("single_label_classification", ["calm", "storm"], ["storm", "calm", "storm"])
    found = meaning(SOURCES[".csv"](tmp_path, ["sea", "law", "sea"], label_names=("sea", "law", "air")))
    assert found == ("single_label_classification", ["sea", "law", "air"], ["sea", "law", "sea"])


def test_classes_that_look_alike_are_named_in_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        SOURCES[".csv"](tmp_path, ["Law", "law", "sea", "7", "007", "s  ea", "s ea"])
    assert "'Law' and 'law'" in caplog.text and "'007' and '7'" in caplog.text and "'s  ea' and 's ea'" in caplog.text


def part_of(names: list[str], present: list[str | None], task: str = TEXT) -> datasets.Dataset:
    """Rows of a ClassLabel column; None is written as -1."""
    images = [Image.new("RGB", (8, 8))] * len(present)
    content: dict[str, list] = {"image": images} if task == IMAGES else {"text": [f"{name} x" for name in present]}
    kind = datasets.Image() if task == IMAGES else datasets.Value("string")
    features = datasets.Features({next(iter(content)): kind, "label": datasets.ClassLabel(names=names)})
    numbers = [-1 if name is None else names.index(name) for name in present]
    return datasets.Dataset.from_dict(content | {"label": numbers}, features=features)


def given(task: str, splits: dict[str, datasets.Dataset], **options) -> LabelledData:
    return load_data(task, DataOptions(**options), CardOptions(), 0, rows=datasets.DatasetDict(splits))


@pytest.mark.parametrize("task", [TEXT, IMAGES])
def test_splits_that_number_classes_differently_are_read_by_name(task):
    three = ["ant", "bee", "cat"]
    train = part_of(three, three * 4, task)
    splits = {"train": train, "validation": part_of(["bee", "cat"], ["bee"], task)}
    data = given(task, splits | {"test": part_of(["cat", "bee", "ant"], ["cat", "ant"], task)})
    assert data.label_names == three
    assert data.dataset["validation"]["label"][:] == [1] and data.dataset["test"]["label"][:] == [2, 0]
    with pytest.raises(DataError, match=r"split 'test'.*\n  row 1: column 'label': the label 'dog' doesn't occur in"):
        given(task, splits | {"test": part_of(["dog"], ["dog"], task)})
    words = {"label": datasets.Value("string")}
    others = part_of(three, three, task).cast_column("label", words["label"])
    assert (
        given(task, splits | {"test": others.map(lambda row: {"label": "cat"})}).dataset["test"]["label"][:] == [2] * 3
    )


@pytest.mark.parametrize("task", [TEXT, IMAGES])
def test_an_unlabelled_test_split_is_kept_apart_and_an_unlabelled_validation_left_out(task, caplog):
    names = ["ant", "bee"]
    train = part_of(names, names * 10, task)
    content = "image" if task == IMAGES else "text"
    with caplog.at_level(logging.WARNING):
        data = given(task, {"train": train, "test": part_of(names, [None, None], task)})
    assert data.unlabelled is not None and data.unlabelled.column_names == [content, "row"]
    assert data.unlabelled["row"][:] == [1, 2]
    assert "split 'test': no row of the test data has a label" in caplog.text
    without = given(task, {"train": train, "test": part_of(names, [None] * 3, task).remove_columns("label")})
    assert without.unlabelled is not None and len(without.unlabelled) == 3
    with caplog.at_level(logging.WARNING):
        data = given(task, {"train": train, "validation": part_of(names, [None, None], task)})
    assert data.unlabelled is None and len(data.dataset["validation"]) == 2
    assert "split 'validation': no row of the validation data has a label" in caplog.text
    partly = {"train": train, "test": part_of(names, ["ant", None, "bee", None], task)}
    with pytest.raises(DataError, match=r"split 'test': 2 bad rows:\n  row 2: .*the label is missing\n  row 4: "):
        given(task, partly)
    data = given(task, partly, drop_bad_rows=True)
    assert data.dataset["test"]["label"][:] == [0, 1] and data.unlabelled is None
    with pytest.raises(DataError, match="split 'train': no row has a label"):
        given(task, {"train": part_of(names, [None, None], task)})


def test_rows_of_a_stream_that_cannot_be_used_are_named_by_file_and_row_or_dropped(tmp_path):
    names = write(tmp_path / "validation.csv", ["law", "sea"])
    (tmp_path / "a.csv").write_text("text,label\nx,law\n,sea\ny,lwa\nz,sea\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("text,label\nv,sea\nw,\n", encoding="utf-8")
    flags = {"train_file": tmp_path / "[ab].csv", "validation_file": names, "streaming": True}
    stream = load(**flags).stream
    assert stream is not None
    rows = list(stream.rows)
    with pytest.raises(DataError, match=r"a\.csv: 2 bad rows:\n  row 2 \(line 3\): the document is empty") as error:
        stream.read(rows)
    assert "row 3 (line 4): the label 'lwa' doesn't occur in the validation data" in str(error.value)
    dropped = load(**flags, drop_bad_rows=True).stream
    assert dropped is not None and dropped.read(rows) == (["x", "z", "v"], [0, 1, 1])
    whole = load(**flags, test_file=write(tmp_path / "test.jsonl", [None, None]))
    assert (
        whole.unlabelled is not None
        and whole.unlabelled["row"][:] == [1, 2]
        and set(whole.dataset)
        == {
            "train",
            "validation",
        }
    )
    with pytest.raises(DataError, match="no row has a label"):
        load(**flags | {"validation_file": tmp_path / "test.jsonl"})


@pytest.mark.parametrize("labels", [["", ""], ["-1", "-1"], None])
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".xlsx"])
def test_a_test_file_without_labels_is_predicted(ending, labels, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    train = write(tmp_path / "train.csv", ["0", "1"] * 10)
    test = write(tmp_path / f"test{ending}", labels or ["x", "y"], "label" if labels else "other")
    data = load(train_file=train, test_file=test)
    assert data.unlabelled is not None
    assert data.unlabelled[:] == {"text": ["document 0", "document 1"], "row": [1, 2]}
    assert set(data.dataset) == {"train", "validation", "test"}
    assert ("no label column 'label'; the columns are 'text', 'other'" in caplog.text) == (labels is None)


def test_minus_one_is_a_class_where_train_has_it(tmp_path):
    train = write(tmp_path / "train.csv", ["-1", "0", "1"] * 5)
    data = load(train_file=train, test_file=write(tmp_path / "test.csv", ["-1", "-1"]))
    assert data.unlabelled is None and data.label_names == ["-1", "0", "1"]
    numbers = write(tmp_path / "numbers.csv", ["-1", "0.5", "2.5"] * 5)
    data = load(train_file=numbers, test_file=write(tmp_path / "test.csv", ["-1", "-1"]))
    assert data.unlabelled is None and data.dataset["test"]["label"][:] == [-1.0, -1.0]


def test_a_split_of_another_name_is_ignored_in_a_line(caplog):
    names = ["ant", "bee"]
    splits = {"train": part_of(names, names * 10), "unsupervised": part_of(names, [None] * 5)}
    with caplog.at_level(logging.WARNING):
        data = given(TEXT, splits)
    assert "the splits 'unsupervised' are neither trained nor scored on" in caplog.text
    assert sum(map(len, data.dataset.values())) == 20


def test_all_bad_rows_are_named_at_once_and_can_be_dropped(tmp_path, caplog):
    path = tmp_path / "train.csv"
    rows = ['"sea\nsea",sea'] * 20 + [",sea", "x,", '"y\ny",law', " ,law", "z,law", "z,law,1"]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        load(train_file=path)
    for place in (
        r"row 21 (line 42): the document is empty",
        "row 24 (line 46): the document",
        "row 26 (line 48): the row",
    ):
        assert place in str(error.value)
    assert "row 22 (line 43): column 'label': the label is missing" in str(error.value)
    assert "4 bad rows" in str(error.value)
    with caplog.at_level(logging.WARNING):
        data = load(train_file=path, drop_bad_rows=True)
    assert sum(map(len, data.dataset.values())) == 22 and "4 bad rows left out" in caplog.text


def test_groups_stay_in_one_split(tmp_path, caplog):
    path = tmp_path / "train.csv"
    rows = "".join(f"{author} {number},{'ab'[number % 2]},{author}\n" for author in range(10) for number in range(6))
    path.write_text("text,label,author\n" + rows, encoding="utf-8")
    data = load(train_file=path, group_column="author")
    authors = [{text.split()[0] for text in part["text"]} for part in data.dataset.values()]
    assert sum(map(len, authors)) == 10 and set().union(*authors) == set(map(str, range(10)))
    assert all("group" not in part.column_names for part in data.dataset.values())
    with caplog.at_level(logging.WARNING):
        load(train_file=path, test_file=path, group_column="author")
    assert "10 groups of --group_column are in train and in test" in caplog.text
    path.write_text("text,label,author\na,x,1\nb,y,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 2 \(line 3\): the group is missing in column 'author'"):
        load(train_file=path, group_column="author")


def test_very_many_classes_are_numbered_without_a_search_through_their_names():
    names = tuple(f"class {number}" for number in range(100_000))
    scheme = LabelScheme("single_label_classification", names)
    start = time.perf_counter()
    assert [scheme.encode(name) for name in names] == list(range(len(names)))
    for name in names[:1000]:
        with pytest.raises(LabelError, match="the label 'no .* and 99988 more"):
            scheme.encode(f"no {name}")
    assert time.perf_counter() - start < 30, "5e9 comparisons take minutes, 100,000 look-ups half a second"


def test_broken_images_are_all_named_at_once_and_can_be_dropped(tmp_path, caplog):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("L", (2, 2), number).save(tmp_path / name / f"{number}.png")
        (tmp_path / name / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2 bad rows:\n  row 4: .*ant/3\.png: no image.*\n  row 10: .*bee/3\.png: no"):
        load(IMAGES, image_folder=tmp_path)
    data = load(IMAGES, image_folder=tmp_path, drop_bad_rows=True)
    assert sum(map(len, data.dataset.values())) == 10
    rows = {
        "image": [Image.new("L", (2, 2))] * 12,
        "label": ["a", "b"] * 6,
        "plot": [number // 2 for number in range(12)],
    }
    data = load_data(IMAGES, DataOptions(group_column="plot"), CardOptions(), 0, rows=rows)
    assert all(len(part) % 2 == 0 for part in data.dataset.values()) and set(data.dataset["train"].column_names) == {
        "image",
        "label",
    }


def test_a_folder_of_tables_is_read_by_the_rules_of_names_of_the_datasets_library(tmp_path):
    for name in ("train-0.csv", "train-1.csv", "dev.csv", "test.csv"):
        write(tmp_path / "set" / name, ["NA", "sea"])
    data = load(dataset_name=str(tmp_path / "set"))
    assert {split: len(part) for split, part in data.dataset.items()} == {"train": 4, "validation": 2, "test": 2}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--dataset_name .*empty: the folder holds no files that can be read"):
        load(dataset_name=str(tmp_path / "empty"))


WRONG_SOURCES = {
    "folder_for_text": ({"image_folder": Path("photos")}, TEXT, "--image_folder .*give --task image-classification"),
    "table_for_images": ({"train_file": Path("a.csv")}, IMAGES, "--train_file .*leave --task out for text"),
    "delimiter": ({"train_file": Path("a.csv"), "delimiter": "::"}, TEXT, "--delimiter must be one character"),
    "groups": ({"image_folder": Path("photos"), "group_column": "plot"}, IMAGES, "--image_folder has no columns"),
}


@pytest.mark.parametrize(("options", "task", "message"), WRONG_SOURCES.values(), ids=WRONG_SOURCES)
def test_a_wrong_source_is_an_error_that_says_which_flag_to_type(options, task, message):
    with pytest.raises(ValueError, match=message):
        load(task, **options)


def test_a_folder_for_a_file_and_a_misspelt_column_name_the_flag(tmp_path):
    with pytest.raises(ValueError, match=r"--train_file .* is a folder: .*--dataset_name .*--image_folder"):
        load(train_file=tmp_path)
    with pytest.raises(DataError, match="no label column 'labels'.*--label_column_name 'label'"):
        load(train_file=write(tmp_path / "train.csv", ["a", "b"]), label_column_name="labels")
