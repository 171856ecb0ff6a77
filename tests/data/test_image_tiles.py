"""Protects the tiles that image models are distilled on: every size of a picture, nothing flat, splits by picture."""

import numpy as np
import pytest
from PIL import Image

from fa_transformers.data.readers.tables import DataError
from fa_transformers.data.sets.image_tiles import cut_into_tiles, write_tiles


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_tiles_cover_the_picture_at_every_size_and_leave_flat_ones_out():
    picture = noise(130, 70)
    tiles = list(cut_into_tiles(picture, 32))
    assert len(tiles) == 4 * 2 + 2 * 1  # 130 x 70, then 65 x 35
    assert np.array_equal(np.asarray(tiles[5]), np.asarray(picture)[32:64, 32:64])
    assert list(cut_into_tiles(Image.new("RGB", (64, 64), "white"), 32)) == []
    assert list(cut_into_tiles(noise(31, 200), 32)) == []


def test_a_picture_lies_in_one_split_and_both_are_the_same_on_every_run(tmp_path):
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    for index in range(40):
        noise(70, 40, index).save(tmp_path / "pictures" / "below" / f"photo-{index}.png")
    counts = write_tiles(tmp_path / "pictures", tmp_path / "tiles", 32, max_per_picture=1)
    assert counts["pictures"] == counts["train"] + counts["validation"] == 40 and counts["validation"] > 0
    names = [{path.name for path in (tmp_path / "tiles" / split).iterdir()} for split in ("train", "validation")]
    pictures = [{name.split("-")[0] for name in part} for part in names]
    assert not pictures[0] & pictures[1]
    write_tiles(tmp_path / "pictures", tmp_path / "again", 32, max_per_picture=1)
    assert {path.name for path in (tmp_path / "again" / "train").iterdir()} == names[0]
    with pytest.raises(FileExistsError, match="not empty"):
        write_tiles(tmp_path / "pictures", tmp_path / "tiles", 32, 1)
    with pytest.raises(DataError, match="no picture of 512 px"):
        write_tiles(tmp_path / "pictures", tmp_path / "larger", 512, 1)
