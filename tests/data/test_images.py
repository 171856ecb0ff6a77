"""Protects image data: the generated canvases give their label away only at full resolution, and bad files are found.

If brightness, histogram or the downscaled picture told the label, the comparison of resolutions would show nothing.
"""

import io
import logging
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from fa_transformers.data.readers.images import convert_image, load_image_folder, open_image
from fa_transformers.data.readers.tables import DataError, ReadingOptions
from fa_transformers.data.sets import digit_canvas
from fa_transformers.data.sets.digit_canvas import (
    CELL_PX,
    DIGIT_PX,
    draw_canvas,
    enlarge_digits,
    generate_canvases,
    load_digit_canvas,
    scramble_quarters,
    split_digits,
)

NOISE = np.random.default_rng(0).integers(0, 256, size=(24, 32, 3), dtype=np.uint8)


def draw(split: str, count: int, size_px: int = 256, digits_per_class: int = 8, seed: int = 0):
    """Canvases [count, size_px, size_px] and labels [count]."""
    rows = list(generate_canvases(split, count, size_px, digits_per_class, seed))
    canvases = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
    return canvases, np.array([row["label"] for row in rows])


def test_the_splits_share_no_handwritten_digit_and_each_has_every_class():
    splits = split_digits(seed=5)
    indices = np.concatenate([index for index, _ in splits.values()])
    assert sorted(indices) == list(range(1797))
    for _, classes in splits.values():
        counts = np.bincount(classes, minlength=10)
        assert counts.max() - counts.min() <= 0.1 * counts.max() + 1


def test_only_the_digits_of_the_label_are_whole_and_they_come_from_the_split():
    digits_per_class = 8
    classes = dict(zip(*split_digits()["test"], strict=True))
    pictures = enlarge_digits(DIGIT_PX)
    whole = {pictures[index].tobytes(): classes.get(index) for index in range(len(pictures))}
    offsets = range(CELL_PX - DIGIT_PX + 1)
    for canvas, label in zip(*draw("test", 10, digits_per_class=digits_per_class), strict=True):
        found = []
        for top in range(0, len(canvas), CELL_PX):
            for left in range(0, len(canvas), CELL_PX):
                crops = {
                    canvas[top + row :, left + column :][:DIGIT_PX, :DIGIT_PX].tobytes()
                    for row in offsets
                    for column in offsets
                }
                found += [whole[crop] for crop in crops if crop in whole]
        assert found == digits_per_class * [label]


def test_scrambling_keeps_every_pixel_and_moves_every_quarter():
    pictures = np.random.default_rng(1).integers(0, 256, size=(50, 12, 12), dtype=np.uint8)
    scrambled = scramble_quarters(pictures, np.random.default_rng(2))
    assert np.array_equal(np.sort(scrambled.reshape(50, -1)), np.sort(pictures.reshape(50, -1)))
    for rows in (slice(0, 6), slice(6, 12)):
        for columns in (slice(0, 6), slice(6, 12)):
            before = np.sort(pictures[:, rows, columns].reshape(50, -1))
            after = np.sort(scrambled[:, rows, columns].reshape(50, -1))
            assert not (before == after).all(axis=1).any()


def test_the_stated_mean_and_deviation_are_those_of_a_canvas_of_default_density():
    canvases, _ = draw("train", 10, size_px=512, digits_per_class=60)
    assert canvases.mean() / 255 == pytest.approx(digit_canvas.IMAGE_MEAN, rel=0.02)
    assert canvases.std() / 255 == pytest.approx(digit_canvas.IMAGE_STD, rel=0.02)


def test_canvases_depend_on_seed_split_and_row_alone():
    few, few_labels = draw("train", 5)
    many, many_labels = draw("train", 20)
    assert np.array_equal(few, many[:5]) and np.array_equal(few_labels, many_labels[:5])
    assert sorted(many_labels[:10]) == sorted(many_labels[10:]) == list(range(10))
    assert not np.array_equal(many, draw("train", 20, seed=1)[0])
    assert not np.array_equal(few, draw("test", 5)[0])


@pytest.mark.slow
def test_histogram_and_downscaled_pixels_do_not_tell_the_label():
    """A quarter of a default canvas, at the same scale: 512 px with a quarter of the digits, downscaled to 112 px."""
    settings = {"size_px": 512, "digits_per_class": 60}
    train, train_labels = draw("train", 800, **settings)
    test, test_labels = draw("test", 400, **settings)
    # Ten classes: chance is 0.1 with a standard deviation of sqrt(0.1 * 0.9 / 400) = 0.015; four of them are 0.16.
    highest = 0.1 + 4 * (0.1 * 0.9 / len(test)) ** 0.5

    def histograms(canvases):
        return np.stack([np.bincount(canvas.ravel(), minlength=256)[1:] for canvas in canvases])

    def downscaled(canvases):
        small = [Image.fromarray(canvas).resize((112, 112), Image.Resampling.BILINEAR) for canvas in canvases]
        return np.stack([np.asarray(canvas).ravel() for canvas in small]).astype(np.float32)

    scaler = StandardScaler().fit(histograms(train))
    by_histogram = LogisticRegression(max_iter=500).fit(scaler.transform(histograms(train)), train_labels)
    assert by_histogram.score(scaler.transform(histograms(test)), test_labels) < highest
    by_pixels = RidgeClassifier(alpha=1e4).fit(downscaled(train), train_labels)
    assert by_pixels.score(downscaled(test), test_labels) < highest


def test_the_canvas_set_has_grey_images_of_the_asked_size_and_named_classes(tmp_path):
    dataset = load_digit_canvas(12, 3, 4, size_px=192, digits_per_class=8, cache_dir=tmp_path)
    assert {split: len(part) for split, part in dataset.items()} == {"train": 12, "validation": 3, "test": 4}
    assert dataset["train"].features["label"].names == [str(digit) for digit in range(10)]
    image = dataset["test"][0]["image"]
    assert (image.mode, image.size) == ("L", (192, 192))


def test_a_second_load_reads_the_kept_canvases(tmp_path, monkeypatch):
    settings = {"size_px": 192, "digits_per_class": 8, "cache_dir": tmp_path}
    first = load_digit_canvas(2, 1, 1, **settings)

    def refuse(*_):
        raise AssertionError("a kept set was drawn again")

    monkeypatch.setattr(digit_canvas, "draw_canvas", refuse)
    again = load_digit_canvas(2, 1, 1, **settings)
    assert np.array_equal(np.asarray(again["train"][1]["image"]), np.asarray(first["train"][1]["image"]))
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        load_digit_canvas(3, 1, 1, **settings)


def test_a_canvas_may_have_fewer_scrambled_digits_than_whole_ones():
    random = np.random.default_rng(0)
    inks = [np.full((4, 12, 12), 10 * (number + 1), np.uint8) for number in range(10)]  # a class by its grey
    canvas, _ = draw_canvas(3, inks, 128, 5, random, scrambled_per_class=2)
    counts = [int((canvas == 10 * (number + 1)).sum()) // 144 for number in range(10)]
    assert counts == [2, 2, 2, 5, 2, 2, 2, 2, 2, 2]
    equal = [draw_canvas(3, inks, 256, 5, np.random.default_rng(1), scrambled)[0] for scrambled in (None, 5)]
    assert (equal[0] == equal[1]).all()
    with pytest.raises(ValueError, match="too few for 60 \\+ 9 x 2 digits"):
        load_digit_canvas(1, 1, 1, size_px=128, digits_per_class=60, scrambled_per_class=2)
    with pytest.raises(ValueError, match="scrambled_per_class must be at least 0, got -1"):
        load_digit_canvas(1, 1, 1, scrambled_per_class=-1)


def test_bad_canvas_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="num_test must be at least 1, got 0"):
        load_digit_canvas(1, 1, 0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="size_px=128 has 64 cells of 16 px, too few for 10 x 240 digits"):
        load_digit_canvas(1, 1, 1, size_px=128, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="digits_per_class must be at least 1, got 0"):
        load_digit_canvas(1, 1, 1, digits_per_class=0, cache_dir=tmp_path)


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of five colour images each."""
    folder = tmp_path / "pictures"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(np.roll(NOISE, number, axis=0)).save(folder / name / f"{number}.png")
    return folder


def test_class_folders_become_labels_and_missing_splits_are_drawn(image_folder):
    dataset = load_image_folder(image_folder, ReadingOptions(seed=1))
    assert {split: len(part) for split, part in dataset.items()} == {"train": 6, "validation": 2, "test": 2}
    assert dataset["train"].features["label"].names == ["cat", "dog"]
    for part in dataset.values():
        for row in part:
            number = int(Path(row["image"].filename).stem)
            assert Path(row["image"].filename).parent.name == ["cat", "dog"][row["label"]]
            assert np.array_equal(np.asarray(row["image"]), np.roll(NOISE, number, axis=0))


def test_split_folders_are_kept_as_they_are(image_folder, tmp_path):
    (tmp_path / "split").mkdir()
    image_folder.rename(tmp_path / "split" / "train")
    (tmp_path / "split" / "val" / "dog").mkdir(parents=True)
    Image.fromarray(NOISE).save(tmp_path / "split" / "val" / "dog" / "new.JPG", "JPEG")
    dataset = load_image_folder(tmp_path / "split")
    assert {split: len(part) for split, part in dataset.items()} == {"train": 10, "validation": 1}
    assert dataset["validation"]["label"][:] == [1]


def test_files_that_are_no_images_by_name_are_left_out_and_counted(image_folder, caplog):
    (image_folder / "cat" / "notes.txt").write_text("not an image")
    (image_folder / "cat" / ".hidden").write_text("nor this")
    with caplog.at_level(logging.WARNING):
        dataset = load_image_folder(image_folder)
    assert sum(len(part) for part in dataset.values()) == 10
    assert "1 file without the ending of an image was left out" in caplog.text and "notes.txt" in caplog.text


def test_images_in_no_class_folder_are_a_split_without_labels_or_told(image_folder, tmp_path, caplog):
    root = tmp_path / "split"
    for name in ("test", "val"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (2, 2), number).save(root / name / f"{number}.png")
    image_folder.rename(root / "train")
    Image.fromarray(NOISE).save(root / "train" / "loose.png")
    with caplog.at_level(logging.WARNING):
        dataset = load_image_folder(root)
    assert dataset.unlabelled is not None and dataset.unlabelled["row"][:] == [1, 2, 3]
    assert [image.getpixel((0, 0)) for image in dataset.unlabelled["image"]] == [0, 1, 2]
    assert sum(map(len, dataset.values())) == 10
    assert "test: no row of the test data has a label: they are predicted" in caplog.text
    assert "val: no row of the validation data has a label: it is left out" in caplog.text
    assert "train: 1 image lies in no class folder and was left out, first loose.png" in caplog.text


def png_bytes(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


BROKEN_IMAGES = {
    "no_bytes": ("bad.png", b"", r"the file is empty \(0 bytes\)"),
    "text": ("bad.png", b"hello", r"no image that Pillow can read"),
    "cut_png": ("bad.png", png_bytes(Image.fromarray(NOISE))[:-900], r"broken or truncated"),
    "damaged_png": ("bad.png", png_bytes(Image.fromarray(NOISE)).replace(b"IDAT", b"IDAX"), r"or a broken one"),
    "no_pixels": ("bad.pgm", b"P5 0 4 255\n", r"no pixels|broken or truncated|no image"),
    "floating_point": ("bad.tiff", None, r"floating-point pixels \(mode F\)"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN_IMAGES.values(), ids=BROKEN_IMAGES)
def test_a_broken_image_is_an_error_that_names_the_file(image_folder, name, content, message):
    path = image_folder / "dog" / name
    if content is None:
        Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_image_folder(image_folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("limit", [700, 300], ids=["above_the_limit", "above_twice_the_limit"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_enormous_image_is_an_error_that_names_the_limit(image_folder, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"cat/0\.png: .*MAX_IMAGE_PIXELS = {limit} pixels: scale"):
        load_image_folder(image_folder)


def test_bad_folders_are_named(image_folder, tmp_path):
    with pytest.raises(DataError, match="absent: there is no such folder"):
        load_image_folder(tmp_path / "absent")
    (image_folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty: the class folder has no images"):
        load_image_folder(image_folder)
    (image_folder / "empty").rmdir()
    with pytest.raises(DataError, match=r"found 0 class folders \(none\)"):
        load_image_folder(image_folder / "cat")
    (tmp_path / "split").mkdir()
    image_folder.rename(tmp_path / "split" / "train")
    (tmp_path / "split" / "test" / "cow").mkdir(parents=True)
    Image.fromarray(NOISE).save(tmp_path / "split" / "test" / "cow" / "0.png")
    with pytest.raises(DataError, match=r"test/cow: the class 'cow' doesn't occur in train.*'cat', 'dog'"):
        load_image_folder(tmp_path / "split")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize(("num_channels", "wanted"), [(1, "L"), (3, "RGB")])
def test_every_mode_becomes_what_the_model_wants(mode, num_channels, wanted):
    grey = Image.fromarray(NOISE[:, :, 0])
    image = Image.fromarray(NOISE[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    assert image.mode == mode
    converted = convert_image(image, num_channels)
    assert (converted.mode, converted.size) == (wanted, grey.size)
    if mode != "1":
        values = np.asarray(converted.convert("L")).astype(int)
        # Colour spaces round once each way.
        assert np.abs(values - NOISE[:, :, 0]).max() <= 2


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, kind):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 10, 10, 255))
    if kind == "P":
        image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 10, 10, 10])
        image.info["transparency"] = 0
    else:
        image = image.convert(kind)
    image.save(tmp_path / "image.png")
    converted = convert_image(open_image(tmp_path / "image.png"))
    assert [converted.getpixel((0, 0)), converted.getpixel((1, 0))] == [(255, 255, 255), (10, 10, 10)]


def test_sixteen_bit_files_keep_their_contrast(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(convert_image(open_image(tmp_path / "deep.png"), 1)).tolist() == [[0, 100, 255]]
    with pytest.raises(DataError, match="integer pixels from 0 to 70000, outside 0 to 65535"):
        convert_image(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))
    with pytest.raises(ValueError, match="num_channels must be 1 .* got 4"):
        convert_image(Image.new("L", (1, 1)), 4)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(NOISE).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.rot90(NOISE, -1))


def test_text_beside_the_pixels_that_is_too_long_is_named_by_its_file(tmp_path, monkeypatch):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "many words " * 20, zip=True)
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path, pnginfo=text)
    open_image(path)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 50)
    with pytest.raises(DataError, match=r"a\.png: the image is broken or truncated \(Decompressed data too large"):
        open_image(path)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_all_16_bit_values_are_scaled_as_one_by_one(mode):
    values = np.arange(65536).reshape(256, 256)
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    assert np.array_equal(np.asarray(convert_image(image, 1)), np.round(values * (255 / 65535)).astype(np.uint8))


def test_a_16_bit_image_is_converted_in_little_memory():
    image = Image.fromarray(np.zeros((3000, 3000), np.uint16))
    tracemalloc.start()
    convert_image(image, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 3000 * 3000, "8 bytes a pixel would be one array of int64"
