"""Protects the drawn sets of scenes: exact masks, splits apart, context alone decides what is odd, a cache to share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from repository import ROOT

from fa_transformers.data.readers.objects import DenseData
from fa_transformers.data.sets import coco_folder, digit_scenes, scenes
from fa_transformers.data.sets.coco_folder import SetSettings, load_drawn_set
from fa_transformers.data.sets.digit_scenes import (
    DIGIT_PX,
    draw_digit,
    draw_digit_scene,
    draw_odd_kinds,
    load_digit_scenes,
    load_odd_one_out,
)
from fa_transformers.data.sets.scenes import GAP_PX, draw_scene, photograph_parts, place_boxes
from fa_transformers.models.fa_rle import decode_mask, tight_boxes

SMALL = {"size_px": 160, "num_objects": (2, 4)}


def test_the_parts_of_the_photographs_are_apart_and_make_up_the_whole():
    from sklearn.datasets import load_sample_image

    parts = photograph_parts()
    for index, name in enumerate(scenes.PHOTOGRAPHS):
        whole = load_sample_image(name)
        train, validation, test = (np.asarray(parts[split][index]) for split in scenes.SPLITS)
        assert np.array_equal(np.hstack([train, np.vstack([validation, test])]), whole)
        assert train.shape[1] == round(0.6 * whole.shape[1])


def test_digits_have_the_stated_size_and_are_never_nothing():
    random = np.random.default_rng(0)
    sizes = np.array([max(draw_digit(index, random).size) for index in random.integers(1797, size=100)])
    assert sizes.min() >= DIGIT_PX[0] - 1 and sizes.max() <= DIGIT_PX[1] + 1
    assert np.median(sizes) == pytest.approx(np.sqrt(DIGIT_PX[0] * DIGIT_PX[1]), rel=0.15)


def test_a_mask_is_what_the_object_covers():
    """An object in one colour on a canvas without noise: its colour is found where the mask is, and only there.

    Pixels that it covers by less than half, 100 of 255, are of a mixed colour and not in the mask.
    """

    def draw(index: int, random: np.random.Generator) -> Image.Image:
        coverage = np.maximum(random.choice([0, 100, 255], size=(5, 4)), 255 * np.eye(5, 4, dtype=int))
        return Image.fromarray(np.kron(coverage, np.ones((6, 6))).astype(np.uint8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "NOISE", 0.0)
        patch.setattr(scenes, "_contrasting_colour", lambda under, random: (255, 0, 254))
        scene = draw_scene(photograph_parts()["test"], [0, 1, 2], draw, 200, np.random.default_rng(5))
    found = (np.asarray(scene.image) == (255, 0, 254)).all(axis=-1)
    masks = np.stack([decode_mask(each["segmentation"]) for each in scene.objects])
    assert np.array_equal(masks.any(axis=0), found) and masks.sum(axis=0).max() == 1
    for each, mask, (left, top, right, bottom) in zip(scene.objects, masks, tight_boxes(masks), strict=True):
        assert each["bbox"] == [left, top, right - left, bottom - top] and each["area"] == mask.sum()


def test_objects_lie_apart_and_too_many_are_an_error():
    random = np.random.default_rng(1)
    sizes = [(int(w), int(h)) for w, h in random.integers(8, 40, size=(25, 2))]
    canvas = np.zeros((300, 300), dtype=int)
    for (width, height), (left, top) in zip(sizes, place_boxes(sizes, 300, random), strict=True):
        assert left + width <= 300 and top + height <= 300
        canvas[top : top + height + GAP_PX, left : left + width + GAP_PX] += 1
    assert canvas.max() == 1
    with pytest.raises(ValueError, match="25 objects find no place on a canvas of size_px=90"):
        place_boxes(sizes, 90, random)
    with pytest.raises(ValueError, match="larger than the canvas"):
        place_boxes([(91, 3)], 90, random)


def test_a_canvas_depends_on_split_seed_and_row_alone():
    def draw(split: str = "train", row: int = 3, seed: int = 0) -> bytes:
        scene = draw_digit_scene(split, row, 128, seed, (2, 3))
        return scene.image.tobytes() + json.dumps(scene.objects).encode()

    assert draw() == draw()
    assert len({draw(), draw(split="test"), draw(row=4), draw(seed=1)}) == 4


def test_what_a_digit_looks_like_says_nothing_about_its_class_and_the_whole_canvas_says_all():
    random = np.random.default_rng(0)
    counts = np.zeros((10, 2))
    for _ in range(3000):
        kinds, labels = draw_odd_kinds(random)
        occurrences = np.bincount(kinds, minlength=10)
        assert np.array_equal(labels, (occurrences[kinds] > 1).astype(int))
        assert 8 <= len(kinds) <= 12
        np.add.at(counts, (kinds, labels), 1)
    shares = counts[:, 0] / counts.sum(axis=1)
    overall = counts[:, 0].sum() / counts.sum()
    # A canvas has a kind once or up to six times, so that its digits aren't independent: 6 times the variance.
    deviation = np.sqrt(6 * overall * (1 - overall) / counts.sum(axis=1))
    assert (np.abs(shares - overall) < 4 * deviation).all()
    assert 0.4 < overall < 0.6


def test_neither_size_nor_place_of_a_digit_says_its_class():
    drawn = [each for row in range(14) for each in draw_digit_scene("train", row, 224, 0, None).objects]
    labels = np.array([each["label"] for each in drawn])
    for values in (np.array([each["area"] for each in drawn]), *np.array([each["bbox"][:2] for each in drawn]).T):
        single, repeated = values[labels == 0], values[labels == 1]
        error = np.hypot(single.std() / len(single) ** 0.5, repeated.std() / len(repeated) ** 0.5)
        assert abs(single.mean() - repeated.mean()) < 4 * error


def ids_of(data: DenseData) -> dict[str, int]:
    return {split: len(images) for split, images in data.splits.items()}


def test_the_sets_are_read_from_the_folder_that_keeps_them(tmp_path, capfd):
    data = load_digit_scenes(3, 1, 2, cache_dir=tmp_path, **SMALL)
    assert "drawing digits, train" in capfd.readouterr().err
    assert ids_of(data) == {"train": 3, "validation": 1, "test": 2} and data.has_masks
    assert data.class_names == list("0123456789")
    for image in data.splits["train"]:
        assert image.size == (160, 160) and 2 <= len(image.labels) <= 4
        assert np.array_equal(image.boxes, tight_boxes(image.masks()))
    again = load_digit_scenes(3, 1, 2, cache_dir=tmp_path, **SMALL)
    assert "drawing" not in capfd.readouterr().err
    assert [i.rles for i in again.splits["test"]] == [i.rles for i in data.splits["test"]]
    odd = load_odd_one_out(1, 1, 1, size_px=300, cache_dir=tmp_path)
    assert odd.class_names == ["single", "repeated"] and 8 <= len(odd.splits["train"][0].labels) <= 12
    assert len(list(tmp_path.iterdir())) == 2, "nothing half-written is left"


def overwrite(folder: Path) -> None:
    next(folder.rglob("00002.jpg")).write_bytes(b"another picture")


def remove(folder: Path) -> None:
    next(folder.rglob("_annotations.coco.json")).unlink()


def add(folder: Path) -> None:
    (folder / "train" / "extra.jpg").touch()


def lose_checksums(folder: Path) -> None:
    (folder / "sha256.json").write_text("{")


@pytest.mark.parametrize("damage", [overwrite, remove, add, lose_checksums])
def test_a_damaged_set_is_drawn_again(tmp_path, damage):
    data = load_digit_scenes(2, 1, 1, cache_dir=tmp_path, **SMALL)
    (folder,) = tmp_path.iterdir()
    expected = coco_folder._checksums(folder)
    damage(folder)
    assert not coco_folder.is_whole(folder)
    again = load_digit_scenes(2, 1, 1, cache_dir=tmp_path, **SMALL)
    assert coco_folder.is_whole(folder) and coco_folder._checksums(folder) == expected
    assert [i.rles for i in again.splits["train"]] == [i.rles for i in data.splits["train"]]
    assert list(tmp_path.iterdir()) == [folder]


def test_of_two_processes_that_draw_one_set_both_read_it_whole(tmp_path):
    """The second one draws the whole set while the first is in the middle of it."""
    settings = SetSettings("twice", 1, 64, 0, (2, 1, 1), None)
    inner: list[DenseData] = []
    kept: list[int] = []

    def draw(split: str, row: int) -> scenes.Scene:
        if split == "validation" and not inner:
            inner.append(load_drawn_set(settings, ["a"], draw_plain, tmp_path))
            kept.append((tmp_path / settings.folder).stat().st_ino)
        return draw_plain(split, row)

    def draw_plain(split: str, row: int) -> scenes.Scene:
        image = Image.new("RGB", (64, 64), (row, 0, 0))
        mask = {"size": [64, 64], "counts": [5, 9, 64 * 64 - 14]}
        return scenes.Scene(image, [{"label": 0, "segmentation": mask}])

    inner_outer = [load_drawn_set(settings, ["a"], draw, tmp_path), *inner]
    assert len(inner_outer) == 2
    for data in inner_outer:
        assert ids_of(data) == {"train": 2, "validation": 1, "test": 1}
        assert all(image.open().size == (64, 64) for images in data.splits.values() for image in images)
    assert [path.name for path in tmp_path.iterdir()] == [settings.folder]
    assert kept == [(tmp_path / settings.folder).stat().st_ino], "what the first to end has put there stays"


@pytest.mark.slow
def test_processes_that_start_at_once_share_one_set(tmp_path):
    code = (
        "import sys; from fa_transformers.data.sets.digit_scenes import load_digit_scenes\n"
        "data = load_digit_scenes(4, 1, 1, size_px=160, num_objects=(2, 4), cache_dir=sys.argv[1])\n"
        "print(sum(len(image.labels) for images in data.splits.values() for image in images))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode == 0 for process in running) and outputs[0] == outputs[1]
    assert len(list(tmp_path.iterdir())) == 1


def test_counts_that_mean_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match="num_validation must be at least 1, got 0"):
        load_odd_one_out(1, 0, 1, cache_dir=tmp_path)
    for num_objects in ((0, 3), (5, 4)):
        with pytest.raises(ValueError, match="num_objects"):
            load_digit_scenes(1, 1, 1, num_objects=num_objects, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_odd_one_out_set_of_other_digits_is_another_kept_set(tmp_path, monkeypatch):
    load_odd_one_out(1, 1, 1, size_px=300, cache_dir=tmp_path)
    monkeypatch.setattr(digit_scenes, "NUM_COPIES", (2, 2))
    load_odd_one_out(1, 1, 1, size_px=300, cache_dir=tmp_path)
    assert len([path for path in tmp_path.rglob("odd-one-out-*") if path.is_dir()]) == 2
