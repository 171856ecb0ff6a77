"""Protects the data to distil on: files, folders, data sets and rows given in Python, split, cut and checked."""

import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
from tiny_distillation import WORDS, levels_of, make_texts, paint, run_options, write_texts
from tiny_models import make_tokenizer
from transformers import ViTImageProcessor

from fa_transformers import CardOptions, DataError, DataOptions, distill
from fa_transformers.data.readers.images import find_split_folders
from fa_transformers.distillation.pieces import build_image_pieces, build_text_pieces
from fa_transformers.distillation.unlabelled import as_splits, read_images, read_text

CARD = CardOptions(data_name="mine", data_license="cc0-1.0", data_attribution="me")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "texts.csv",
            'text\nred\n""\nblue\ngreen\n',
            r"1 bad row:\n  row 2 \(line 3\): the document is empty",
        ),
        ("texts.tsv", "text\tnumber\nred\t1\nblue\t2\ngreen\t3\n", "no document has 32 tokens"),
        ("texts.xml", "red", "give one of .csv, .*.txt"),
    ],
)
def test_unlabelled_files_that_cannot_be_used_are_named(tmp_path, stock, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        distill(**run_options(tmp_path, stock, train_file=path, validation_file=path))


def test_too_little_text_is_refused(tmp_path, stock):
    short = write_texts(tmp_path / "short.jsonl", 20, words=5)
    with pytest.raises(DataError, match="not enough text"):
        distill(**run_options(tmp_path, stock, train_file=short))


def test_too_few_held_out_pieces_are_refused(tmp_path, stock):
    few = write_texts(tmp_path / "few.jsonl", 1, words=60)
    with pytest.raises(DataError, match="1 held-out pieces"):
        distill(**run_options(tmp_path, stock, validation_file=few))


def texts_of(rows: datasets.Dataset) -> list[str]:
    assert rows.column_names == ["text"]
    return rows["text"][:]


def test_texts_given_in_python_are_read_as_a_file_of_them_is(tmp_path):
    texts = make_texts(100)
    data = DataOptions(text_column_name="body")
    ways = {
        "list": texts,
        "columns": {"body": texts, "number": list(range(100))},
        "data set": datasets.Dataset.from_dict({"body": texts, "number": range(100)}),
        "splits": datasets.DatasetDict({"train": datasets.Dataset.from_dict({"body": texts})}),
    }
    found = {way: read_text(data, CARD, seed=3, rows=rows) for way, rows in ways.items()}
    path = tmp_path / "texts.txt"
    path.write_text("unread")
    frame = datasets.Dataset.from_dict({"body": texts})
    frame.to_json(tmp_path / "texts.jsonl")
    of_file = read_text(DataOptions(train_file=tmp_path / "texts.jsonl", text_column_name="body"), CARD, seed=3)
    for read in found.values():
        assert texts_of(read.train) == texts_of(of_file.train) and len(read.train) == 98
        assert texts_of(read.heldout["same kinds"]) == texts_of(of_file.heldout["same kinds"])
        assert read.facts == of_file.facts and read.facts[0].name == "mine" and read.facts[0].license == "cc0-1.0"
    assert read_text(data, CardOptions(), seed=3, rows=texts).facts[0].name == "rows given in Python"


def test_a_split_for_validation_is_held_out_and_fewer_rows_are_drawn_by_the_seed():
    rows = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"text": make_texts(num)})
            for name, num in (("train", 50), ("validation", 7))
        }
    )
    read = read_text(DataOptions(max_train_samples=20), CARD, seed=0, rows=rows)
    assert texts_of(read.heldout["same kinds"]) == make_texts(7)
    other = read_text(DataOptions(max_train_samples=20), CARD, seed=1, rows=rows)
    assert len(read.train) == len(other.train) == 20 and texts_of(read.train) != texts_of(other.train)
    assert set(texts_of(read.train)) <= set(make_texts(50))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("one text", TypeError, "rows must be a list of texts, .* got str"),
        (7, TypeError, "rows must be a list of texts, .* got int"),
        ({"body": ["a"]}, DataError, "no text column 'text'; the columns are 'body'. .*--text_column_name"),
        (datasets.Dataset.from_dict({"body": ["a"]}), DataError, "no text column 'text'"),
        (datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}), DataError, "no split 'train'"),
        (["a", None], DataError, "row 2 of the texts has None"),
        ([{"text": "a"}], DataError, "row 1 of the texts has {'text': 'a'}"),
        (["a"], DataError, "1 row is not enough to train and hold out"),
        ([], DataError, "0 rows are not enough"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, error, message):
    with pytest.raises(error, match=message):
        read_text(DataOptions(), CARD, seed=0, rows=rows)


def test_pieces_are_cut_at_the_length_and_held_out_by_kind():
    tokenizer = make_tokenizer(WORDS, max_length=1000)
    rows = read_text(DataOptions(), CARD, seed=0, rows=make_texts(300, words=150))
    data = build_text_pieces(rows, tokenizer, 64, max_eval_samples=4, long_length=160)
    assert max(data.train(64).lengths) == 64 and max(data.train(100).lengths) == 100
    assert min(data.train(64).lengths) >= 32  # the rest of a document is left out where it is shorter
    assert {kind: len(pieces) for kind, pieces in data.heldout.items()} == {
        "same kinds": 4,
        "same kinds, 65 to 160 tokens": 4,
    }
    assert min(data.heldout["same kinds, 65 to 160 tokens"].lengths) > 64
    whole = build_text_pieces(rows, tokenizer, 64)
    assert list(whole.heldout) == ["same kinds"]
    assert len(whole.heldout["same kinds"]) == 6 * 2  # of 2 % of 300 texts, the last 28 of 152 tokens are left out
    batch = data.collate([data.train(64)[index] for index in range(3)])
    assert set(batch) == {"input_ids", "attention_mask"} | ({"token_type_ids"} & set(batch))


def pictures_of(num: int) -> list[PIL.Image.Image]:
    generator = np.random.default_rng(0)
    return [PIL.Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(num)]


def test_images_of_a_named_data_set_are_distilled_on(tmp_path):
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"photo": pictures_of(200), "label": ["x"] * 200}, features=features)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    options = DataOptions(dataset_name=str(tmp_path / "data"), image_column_name="photo")
    data = build_image_pieces(
        read_images(options, CARD, seed=0), ViTImageProcessor(size={"height": 16, "width": 16}), 16, options
    )
    assert len(data.train(0)) == 196 and len(data.validation) == 4
    assert data.collate([data.train(0)[0]])["pixel_values"].shape == (1, 3, 16, 16)
    labels = DataOptions(dataset_name=str(tmp_path / "data"), image_column_name="label")
    with pytest.raises(DataError, match="'label' holds no images"):
        read_images(labels, CARD, seed=0)
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "other")
    other = DataOptions(dataset_name=str(tmp_path / "other"), image_column_name="photo")
    with pytest.raises(DataError, match=r"no split 'train', only \['test'\]"):
        read_images(other, CARD, seed=0)


def test_images_given_in_python_are_read_as_a_data_set_is():
    pictures = pictures_of(200)
    features = datasets.Features({"image": datasets.Image()})
    whole = read_images(DataOptions(), CARD, 0, datasets.Dataset.from_dict({"image": pictures}, features=features))
    assert len(whole.train) == 196 and whole.facts[0].name == "mine"
    for rows in (pictures, {"image": pictures}):
        read = read_images(DataOptions(), CARD, 0, rows)
        assert [np.asarray(image).sum() for image in read.train["image"]] == [
            np.asarray(image).sum() for image in whole.train["image"]
        ]
    with pytest.raises(DataError, match="rows: the column 'image' holds no images"):
        read_images(DataOptions(), CARD, 0, datasets.Dataset.from_dict({"image": ["a", "b"]}))
    with pytest.raises(DataError, match="no image column 'image'; the columns are .*--image_column_name"):
        read_images(DataOptions(), CARD, 0, {"photo": pictures})
    with pytest.raises(TypeError, match="rows must be a list of images"):
        as_splits(7, "image", images=True)
    with pytest.raises(DataError, match="--task images needs an --image_folder or a --dataset_name"):
        read_images(DataOptions(), CARD, 0)


def test_images_to_train_on_are_cropped_and_mirrored_and_held_out_ones_are_not():
    processor, options = ViTImageProcessor(size={"height": 16, "width": 16}), DataOptions()
    rows = read_images(options, CARD, 0, pictures_of(200))
    plain = build_image_pieces(rows, processor, 16, options)
    for change in (DataOptions(random_crop=True), DataOptions(random_flip=True)):
        changed = build_image_pieces(rows, processor, 16, change, seed=1)
        for pieces, others, differ in (
            (changed.train(0), plain.train(0), True),
            (changed.validation, plain.validation, False),
            (changed.heldout["same kinds"], plain.heldout["same kinds"], False),
        ):
            same = [pieces[i]["pixel_values"].equal(others[i]["pixel_values"]) for i in range(4)]
            assert not all(same) if differ else all(same)


def test_images_of_a_folder_are_split_as_fine_tuning_splits_them(tmp_path):
    folder = tmp_path / "photos"
    for level, place in (
        (50, "train/dogs"),
        (60, "train/cats"),
        (200, "test/dogs"),
        (100, "val/dogs"),
        (110, "val/cats"),
    ):
        paint(folder / place, level, 30)
    (folder / "train" / "cats" / "._000.png").write_bytes(b"left by a file manager")
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False)

    def read(**limits):
        options = DataOptions(image_folder=folder, **limits)
        return build_image_pieces(read_images(options, CARD, seed=0), processor, 16, options)

    limits = dict(max_train_samples=20, max_eval_samples=10)
    data = read(**limits)
    assert levels_of(data.train(0)) == {50, 60} and len(data.train(0)) == 20  # the first 20 are all cats
    assert levels_of(data.heldout["same kinds"]) == {100, 110}
    (folder / "train").rename(folder / "dogs and cats")
    data = read(**limits)
    assert levels_of(data.train(0)) == {50, 60} and levels_of(data.heldout["same kinds"]) == {100, 110}
    (folder / "val").rename(folder / "validation")
    paint(folder / "val", 220, 3)
    assert find_split_folders(folder)["validation"].name == "validation"
    shutil.rmtree(folder / "val")
    (folder / "validation").rename(folder / "val")
    (folder / "val").rename(folder / "birds")
    paint(folder / "frogs", 150, 100)
    data = read()
    assert levels_of(data.train(0)) == {50, 60, 100, 110, 150} and len(data.train(0)) == 216
    (folder / "birds" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png: no image that Pillow can read"):
        read()
