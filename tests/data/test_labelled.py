"""Protects data that is given in Python: the checks and the result of a file, for text and images, and clear errors."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from fa_transformers.data.collators import ImageCollator, TextCollator
from fa_transformers.data.examples import ImageExamples, TextExamples, build_examples
from fa_transformers.data.labelled import describe_user_data, load_data
from fa_transformers.data.readers.tables import DataError
from fa_transformers.options import CardOptions, DataOptions, LoopOptions, ModelOptions

TEXT, IMAGES = "text-classification", "image-classification"
COLUMNS = {
    "text": [f"document {number} about {topic}" for number in range(10) for topic in ("law", "sea")],
    "label": ["law", "sea"] * 10,
}
MANY = {name: values * 10 for name, values in COLUMNS.items()}  # more than are read at a time
PIXELS = np.random.default_rng(0).integers(0, 256, size=(24, 32, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The checked documents of a test go into its own folder."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")


def load(task, rows, data=None, card=None, seed=3):
    return load_data(task, data or DataOptions(), card or CardOptions(), seed, rows=rows)


def contents(data) -> dict[str, dict]:
    return {split: part[:] for split, part in data.dataset.items()}


@pytest.fixture
def from_file(tmp_path):
    """The same rows from a csv file."""
    path = tmp_path / "train.csv"
    datasets.Dataset.from_dict(COLUMNS).to_csv(path)
    return load_data(TEXT, DataOptions(train_file=path), CardOptions(), 3)


@pytest.mark.parametrize(
    "rows",
    [
        COLUMNS,
        {name: np.array(values) for name, values in COLUMNS.items()},
        {name: tuple(values) for name, values in COLUMNS.items()} | {"other": "ignored"},
        datasets.Dataset.from_dict(COLUMNS),
        datasets.DatasetDict({"train": datasets.Dataset.from_dict(COLUMNS)}),
    ],
    ids=["lists", "arrays", "tuples_and_more", "Dataset", "DatasetDict"],
)
def test_rows_given_in_python_are_what_a_file_of_them_is(from_file, rows):
    given = load(TEXT, rows)
    assert contents(given) == contents(from_file)
    assert (given.problem_type, given.label_names) == (from_file.problem_type, from_file.label_names)
    assert not given.is_demo and given.stream is None
    assert given.facts.name == "rows given in Python" and from_file.facts.name == "train.csv"


@pytest.mark.parametrize("rows", [MANY, datasets.Dataset.from_dict(MANY)], ids=["columns", "Dataset"])
def test_all_of_many_given_rows_are_read(rows):
    parts = contents(load(TEXT, rows)).values()
    found = [
        (text, COLUMNS["label"][label]) for part in parts for text, label in zip(*map(part.get, COLUMNS), strict=True)
    ]
    assert sorted(found) == sorted(zip(MANY["text"], MANY["label"], strict=True))


def test_the_options_say_what_columns_and_labels_of_given_rows_mean():
    rows = {"body": ["a", "b", "c", "d"], "stars": torch.tensor([1.5, 2.0, 3.0, 5.0])}
    options = DataOptions(text_column_name="body", label_column_name="stars", problem_type="regression")
    card = CardOptions(data_name="my stars", data_license="mit", data_attribution="me")
    data = load(TEXT, rows, options, card)
    assert data.problem_type == "regression" and data.label_names is None and data.num_labels == 1
    assert sorted(label for part in data.dataset.values() for label in part["label"]) == [1.5, 2.0, 3.0, 5.0]
    assert (data.facts.name, data.facts.license, data.facts.attribution) == ("my stars", "mit", "me")
    rows = {"text": ["a", "b", "c", "d"], "label": ["x|y", "y", "", "x"]}
    data = load(TEXT, rows, DataOptions(label_separator="|"))
    assert data.problem_type == "multi_label_classification" and data.label_names == ["x", "y"]
    integers = load(TEXT, {"text": ["a", "b", "c", "d"], "label": np.array([10, 9, 9, 10])})
    assert integers.label_names == ["9", "10"]


def test_splits_of_a_given_set_are_kept_and_limits_count():
    part = datasets.Dataset.from_dict(COLUMNS)
    rows = datasets.DatasetDict({"train": part, "validation": part.select(range(6)), "test": part.select(range(8))})
    data = load(TEXT, rows, DataOptions(max_train_samples=7, max_eval_samples=5))
    assert {split: len(part) for split, part in data.dataset.items()} == {"train": 7, "validation": 5, "test": 5}
    assert data.score_split == "test"
    assert contents(load(TEXT, rows, DataOptions(max_train_samples=7), seed=4))["train"] != contents(data)["train"]


BAD_ROWS = {
    "no_label_column": ({"text": ["a"]}, r"rows: there is no label column 'label'; the columns are 'text'.*label_colu"),
    "empty_document": (
        COLUMNS | {"text": [*COLUMNS["text"][:19], " "]},
        r"rows: 1 bad row:\n  row 20: the document is empty",
    ),
    "document_of_another_type": (
        COLUMNS | {"text": [5] * 20},
        r"rows: 20 bad rows:\n  row 1: the document must be a string, got int: 5\n  row 2",
    ),
    "label_missing": (
        COLUMNS | {"label": ["law", None] * 10},
        r"rows: 10 bad rows:\n  row 2: column 'label': the label is missing\n  row 4",
    ),
    "labels_of_mixed_types": (COLUMNS | {"label": ["law", 0.5] * 10}, r"row 2: .*a string or an integer, got 0\.5"),
    "one_class": (COLUMNS | {"label": ["law"] * 20}, r"two or more labels, the only one is 'law'"),
    "fewer_labels": (COLUMNS | {"label": ["law", "sea"]}, r"'text' has 20 values and 'label' has 2"),
    "a_string": ({"text": "abc", "label": "xyz"}, r"rows, column 'text': a column must be a list of values, got str"),
    "no_rows": ({"text": [], "label": []}, r"rows: there are no rows"),
    "too_few": ({"text": ["a", "b"], "label": ["x", "y"]}, r"2 rows are too few to draw"),
    "no_train": (datasets.DatasetDict(test=datasets.Dataset.from_dict(COLUMNS)), r"no split 'train', only 'test'"),
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_errors_that_name_the_row_and_the_mend(rows, message):
    with pytest.raises(DataError, match=message):
        load(TEXT, rows)


@pytest.mark.parametrize("rows", [[{"text": "a", "label": "b"}], "train.csv", (COLUMNS,), 5])
def test_rows_of_another_type_are_an_error_that_says_what_to_give(rows):
    with pytest.raises(TypeError, match=rf"a mapping of columns.*got {type(rows).__name__}; .*from_list"):
        load(TEXT, rows)


def test_a_mapping_of_splits_two_sources_and_unknown_tasks_are_errors(tmp_path):
    with pytest.raises(TypeError, match="mapping of splits must be a datasets.DatasetDict"):
        load(TEXT, {"train": datasets.Dataset.from_dict(COLUMNS)})
    with pytest.raises(TypeError, match="mapping of splits must be a datasets.DatasetDict"):
        load(TEXT, {"train": COLUMNS})
    with pytest.raises(ValueError, match="rows and --train_file are two sources"):
        load(TEXT, COLUMNS, DataOptions(train_file=tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="--streaming .* rows are in memory"):
        load(TEXT, COLUMNS, DataOptions(streaming=True))
    with pytest.raises(ValueError, match="task must be 'text-classification' or"):
        load("regression", COLUMNS)
    with pytest.raises(ValueError, match="need `canvas`"):
        load(IMAGES, None)
    with pytest.raises(ValueError, match="--streaming needs a --validation_file"):
        load(TEXT, None, DataOptions(train_file=tmp_path / "a.csv", streaming=True))
    with pytest.raises(ValueError, match="--image_folder is for images"):
        load(TEXT, None, DataOptions(image_folder=tmp_path))


def shifted(number: int) -> np.ndarray:
    return np.roll(PIXELS, number, axis=0)


def as_png(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(shifted(number)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    "draw", [shifted, as_png, lambda number: Image.fromarray(shifted(number))], ids=["arrays", "bytes", "Pillow"]
)
def test_images_given_in_python_are_those_of_a_folder(tmp_path, draw):
    labels = ["dog", "cat"] * 6
    for number, label in enumerate(labels):
        (tmp_path / "pictures" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / label / f"{number:02d}.png").write_bytes(as_png(number))
    folder = load(IMAGES, None, DataOptions(image_folder=tmp_path / "pictures"))
    given = load(IMAGES, {"image": [draw(number) for number in range(12)], "label": labels})
    assert given.label_names == folder.label_names == ["cat", "dog"]
    assert not given.is_demo and given.facts.name == "rows given in Python"

    def pairs(data) -> set[tuple]:
        rows = [row for part in data.dataset.values() for row in part]
        return {(np.asarray(row["image"]).tobytes(), data.label_names[row["label"]]) for row in rows}

    assert pairs(given) == pairs(folder) and len(pairs(given)) == 12
    assert {split: len(part) for split, part in given.dataset.items()} == {"train": 8, "validation": 2, "test": 2}


FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
BAD_IMAGES = {
    "no_image_column": (
        {"label": ["a"]},
        r"rows: there is no image column 'image'; the columns are 'label'.*--image_column_name",
    ),
    "fewer_labels": ({"image": [PIXELS], "label": []}, r"'image' has 1 values and 'label' has 0"),
    "a_string": ({"image": "a.png", "label": ["a"]}, r"column 'image': a column must be a list of images, got str"),
    "a_number": ({"image": [5, 6], "label": ["a", "b"]}, r"rows, row 1: an image must be Pillow's, an array.*got int"),
    "an_odd_array": ({"image": [np.ones((2, 2, 7), dtype=complex)] * 2, "label": ["a", "b"]}, r"can't be stored"),
    "broken": ({"image": [as_png(0), b"no image"], "label": ["a", "b"]}, r"rows: 1 bad row:\n  row 2: "),
    "missing": ({"image": [PIXELS, None], "label": ["a", "b"]}, r"rows: 1 bad row:\n  row 2: the image is missing"),
    "no_label": ({"image": [PIXELS, PIXELS], "label": ["a", None]}, r"row 2: column 'label': the label is missing"),
    "no_label_in_a_set": (
        datasets.Dataset.from_dict({"image": [PIXELS, PIXELS], "label": ["a", None]}, features=FEATURES),
        r"split 'train': 1 bad row:\n  row 2: column 'label': the label is missing",
    ),
    "not_images": (datasets.Dataset.from_dict({"image": ["a"], "label": ["b"]}), r"'image' holds .*, not images"),
    "floating_point": (
        {"image": [PIXELS, Image.fromarray(np.ones((4, 4), dtype=np.float32))], "label": ["a", "b"]},
        r"row 2: .*floating-point pixels",
    ),
}


@pytest.mark.parametrize(("rows", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_errors_that_name_the_row(rows, message):
    with pytest.raises(DataError, match=message):
        load(IMAGES, rows)


class Words:
    """A tokenizer of the lengths of words, from 3 on."""

    def __call__(self, texts: list[str], truncation: bool, max_length: int | None = None, **_) -> dict[str, list]:
        limit = max_length if truncation else None
        return {"input_ids": [[2 + len(word) for word in text.split()][:limit] for text in texts]}

    def pad(self, rows: list[dict], return_tensors: str) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {"input_ids": torch.tensor(ids)}


def test_given_text_becomes_examples_and_batches_with_labels():
    labelled = load(TEXT, COLUMNS)
    loop = LoopOptions(short_epochs=1, short_length=3, packing=False, seed=0)
    data, model = DataOptions(preprocessing_num_workers=1), ModelOptions()
    examples, collate = build_examples(labelled, Words(), 16, TEXT, data, model, loop)
    assert {split: type(part) for split, part in examples.items()} == dict.fromkeys(labelled.dataset, TextExamples)
    train = examples["train"]
    assert list(train.lengths) == [4] * 16
    assert len(train[0]["input_ids"]) == 3 and len(examples["test"][0]["input_ids"]) == 4  # only train begins short
    train.set_epoch(1)
    assert len(train[0]["input_ids"]) == 4
    batch = collate([train[0], train[1]])
    assert isinstance(collate, TextCollator) and batch["input_ids"].shape == (2, 4)
    assert batch["labels"].tolist() == labelled.dataset["train"]["label"][:2]
    with pytest.raises(DataError, match="the limit is 3"):
        build_examples(labelled, Words(), 3, TEXT, data, ModelOptions(strict_length=True), loop)


def test_given_images_become_examples_and_batches_with_labels():
    labelled = load(IMAGES, {"image": [shifted(number) for number in range(12)], "label": ["dog", "cat"] * 6})
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    data, loop = DataOptions(random_flip=True, random_crop=True), LoopOptions(seed=5)
    examples, collate = build_examples(labelled, processor, 4, IMAGES, data, ModelOptions(), loop)
    assert all(isinstance(part, ImageExamples) and set(part.lengths) == {4} for part in examples.values())
    batch = collate([examples["train"][index] for index in range(3)])
    assert isinstance(collate, ImageCollator) and batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == labelled.dataset["train"]["label"][:3]
    examples["train"].set_epoch(1)  # another draw of crops; the other splits have none
    assert not torch.equal(examples["train"][0]["pixel_values"], batch["pixel_values"][0])
    before = examples["test"][0]["pixel_values"]
    examples["test"].set_epoch(1)
    assert torch.equal(examples["test"][0]["pixel_values"], before)


def test_collators_without_data_leave_labels_out():
    rows = [{"input_ids": [5, 6], "label": 1}, {"input_ids": [7]}]
    assert {name: value.tolist() for name, value in TextCollator(Words())(rows).items()} == {
        "input_ids": [[5, 6], [7, 0]]
    }
    images = [{"pixel_values": torch.full((3, 2, 2), float(number)), "label": 0} for number in range(2)]
    batch = ImageCollator()(images)
    assert batch.keys() == {"pixel_values"} and batch["pixel_values"][:, 0, 0, 0].tolist() == [0.0, 1.0]


def test_a_card_names_a_local_data_set_by_its_last_part_and_no_hub_id(tmp_path):
    facts = describe_user_data(DataOptions(dataset_name=str(tmp_path)), CardOptions())
    assert facts.name == tmp_path.name and facts.hub_id is None
    (tmp_path / "a.csv").touch()
    for data in (DataOptions(train_file=tmp_path / "a.csv"), DataOptions(image_folder=tmp_path)):
        assert "/" not in describe_user_data(data, CardOptions()).name
    assert describe_user_data(DataOptions(dataset_name="owner/name"), CardOptions()).hub_id == "owner/name"
