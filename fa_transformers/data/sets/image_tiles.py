"""Cut a few large pictures into many small ones, to distil image models on where no collection of photos is at hand.

    python -m fa_transformers.data.image_tiles wallpapers/ tiles/ --side 448

Every picture is taken at its own size and halved until it is smaller than a tile; each size is cut into squares without
overlap. Squares of nearly one colour are left out. A picture's tiles are all for training or all for validation, by a
hash of its name.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..readers.images import convert_image, image_endings, open_image
from ..readers.tables import DataError

VALIDATION_SHARE = 0.1
FLAT = 8.0
"""Standard deviation over a tile's pixels, of 255, below which there is nothing to see in it."""


def cut_into_tiles(image: Image.Image, side: int) -> Iterator[Image.Image]:
    """Squares of `side` pixels from every size of the picture; none of a picture that is smaller."""
    while min(image.size) >= side:
        for top in range(0, image.height - side + 1, side):
            for left in range(0, image.width - side + 1, side):
                tile = image.crop((left, top, left + side, top + side))
                if np.asarray(tile, dtype=np.float32).std() >= FLAT:
                    yield tile
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def write_tiles(pictures: Path, folder: Path, side: int, max_per_picture: int) -> dict[str, int]:
    """Write the tiles of all pictures below `pictures` to `folder`/train and `folder`/validation; returns the counts.

    Raises:
        FileExistsError: `folder` is not empty.
        DataError: there is no picture as large as a tile.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder")
    endings = image_endings()
    paths = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in endings and not path.is_symlink())
    counts = {"train": 0, "validation": 0, "pictures": 0}
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
    for path in tqdm(paths, desc="tiles", unit="picture"):
        name = path.relative_to(pictures).as_posix()
        digest = hashlib.sha256(name.encode()).hexdigest()
        split = "validation" if int(digest[:8], 16) / 2**32 < VALIDATION_SHARE else "train"
        tiles = list(cut_into_tiles(convert_image(open_image(path)), side))
        chosen = np.random.default_rng(int(digest[:8], 16)).permutation(len(tiles))[:max_per_picture]
        for index in sorted(chosen):
            tiles[index].save(folder / split / f"{digest[:12]}-{index:04d}.jpg", quality=92)
        counts[split] += len(chosen)
        counts["pictures"] += bool(len(chosen))
    if not counts["train"]:
        raise DataError(f"{pictures} has no picture of {side} px or more a side")
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cut large pictures into tiles.")
    parser.add_argument("pictures", type=Path, help="folder with pictures, searched in depth")
    parser.add_argument("folder", type=Path, help="new folder for train/ and validation/")
    parser.add_argument("--side", type=int, default=448, help="of a tile, in pixels")
    parser.add_argument("--max_per_picture", type=int, default=64, help="tiles kept of one picture, drawn by its name")
    options = parser.parse_args(argv)
    print(json.dumps(write_tiles(options.pictures, options.folder, options.side, options.max_per_picture)))


if __name__ == "__main__":
    main()
