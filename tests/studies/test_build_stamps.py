"""Protects build_stamps.py: opacity is the mask, no stamp is in two splits, and missing sources are named."""

import json

import numpy as np
import pytest
from PIL import Image
from repository import load_script

from fa_transformers.data.readers.coco import load_coco_folder

stamps = load_script("build_stamps")


@pytest.fixture
def sources(tmp_path):
    """Ten stamps of each class, discs of a colour of their own, and the photographs, noise of a colour of its own."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:60, :60]
    for name in stamps.CLASSES:
        (tmp_path / "stamps" / name / "more").mkdir(parents=True)
        for index in range(10):
            pixels = np.full((60, 60, 4), 255, dtype=np.uint8)
            pixels[..., :3] = random.integers(0, 256, size=3)
            pixels[..., 3] = 255 * ((x - 30) ** 2 + (y - 30) ** 2 < 20**2)
            Image.fromarray(pixels).save(tmp_path / "stamps" / name / ("more" if index % 2 else "") / f"{index}.png")
    Image.new("RGB", (60, 60)).save(tmp_path / "stamps" / "town" / "opaque.png")
    (tmp_path / "photographs").mkdir()
    for names in stamps.PHOTOGRAPHS.values():
        for name in names:
            Image.effect_noise((310, 300), 60).convert("RGB").save(tmp_path / "photographs" / name)
    return ["--stamps", str(tmp_path / "stamps"), "--photographs", str(tmp_path / "photographs")]


def test_the_set_is_a_coco_folder_of_masked_objects(tmp_path, sources, capsys):
    flags = ["--num_train", "3", "--num_validation", "1", "--num_test", "1", "--size_px", "256"]
    stamps.main([*sources, *flags, "--output_dir", str(tmp_path / "set")])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["stamps"] == {"train": 42, "validation": 6, "test": 12}, "the opaque one is left out"
    data = load_coco_folder(tmp_path / "set")
    assert tuple(data.class_names) == stamps.CLASSES and data.has_masks
    assert {split: len(images) for split, images in data.splits.items()} == printed["images"]
    for image in data.splits["train"]:
        for mask, area in zip(image.masks(), image.areas, strict=True):
            rows, columns = np.nonzero(mask)
            # A disc fills pi / 4 of its box; small ones lose some of it to their pixels.
            assert mask.sum() == area
            assert 0.6 < area / (np.ptp(rows) + 1) / (np.ptp(columns) + 1) < 0.95
    assert Image.open(tmp_path / "set" / "sheet.png").size == (512, 768)
    with pytest.raises(FileExistsError, match="is not empty"):
        stamps.main([*sources, *flags, "--output_dir", str(tmp_path / "set")])


def test_no_stamp_and_no_photograph_is_in_two_splits():
    named = [[f"{name} {index}" for index in range(30)] for name in stamps.CLASSES]
    parts = stamps.split_stamps(named, 0)
    every = sorted(stamp for split in parts.values() for of_class in split for stamp in of_class)
    assert every == sorted(stamp for of_class in named for stamp in of_class)
    photographs = [name for names in stamps.PHOTOGRAPHS.values() for name in names]
    assert len(photographs) == len(set(photographs))


def test_missing_sources_are_named(tmp_path, sources):
    (tmp_path / "photographs" / "board.jpg").unlink()
    missing = r"board.jpg: there is no such file; install opencv-doc or give --photographs"
    with pytest.raises(stamps.DataError, match=missing):
        stamps.main([*sources, "--output_dir", str(tmp_path / "set")])
    with pytest.raises(stamps.DataError, match="there is no stamp; install tuxpaint-stamps-default or give --stamps"):
        stamps.read_stamps(tmp_path)
