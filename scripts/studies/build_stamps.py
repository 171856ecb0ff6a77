"""Build a set of real objects with exact masks: Tux Paint's stamps on photographs of OpenCV's samples, in COCO format.

python scripts/studies/build_stamps.py                                # about 0.6 s a picture
python scripts/studies/build_stamps.py --num_train 60 --size_px 512   # a small one

Needs two packages of Debian, which are read where they are installed, or from the folders that the flags name:
`apt-get install tuxpaint-stamps-default opencv-doc`. A stamp's opacity is its mask; the six classes are its folders.
Stamps and photographs of one split are in no other one. The set is for use on this machine: the stamps' licence is
GPL-2, the photographs have several. Writes train, validation and test, and sheet.png to look at.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from fa_transformers.checks import check_not_negative, check_positive
from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.data.readers.coco import load_coco_folder
from fa_transformers.data.readers.images import convert_image, open_image
from fa_transformers.data.readers.objects import ObjectOptions
from fa_transformers.data.readers.tables import DataError
from fa_transformers.data.sets.coco_folder import write_split
from fa_transformers.data.sets.scenes import COVERED, SPLITS, Scene, draw_scene
from fa_transformers.drawings import draw_objects, draw_sheet
from fa_transformers.options import OptionGroup, option

CLASSES = ("animals", "food", "household", "plants", "town", "vehicles")
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
# None shows an object of the six classes, which would be there without a mask. Views of one scene are in one split.
PHOTOGRAPHS = {
    "train": ("aero1.jpg", "aero3.jpg", "ela_original.jpg", "graf1.png", "graf3.png", "rubberwhale1.png",
              "rubberwhale2.png", "sudoku.png", "text_motion.jpg"),
    "validation": ("left.jpg", "right.jpg"),
    "test": ("board.jpg", "pca_test1.jpg", "starry_night.jpg", "stuff.jpg"),
}  # fmt: skip
PIECE_PX = (300, 560)
STAMP_PX = (40, 240)
"""Longer side of a stamp on a canvas of 1,024 px, drawn evenly on a log scale."""
STAMPS_ON_CANVAS = (5, 20)
TURN_DEGREES = 15.0
OPAQUE = 0.98
"""Share of covered pixels from which on a stamp has no outline: some are pictures on white paper."""


@dataclass(frozen=True)
class StampOptions(OptionGroup):
    """Where stamps and photographs are, and how many pictures are made of them."""

    stamps: Path = option(Path("/usr/share/tuxpaint/stamps"), "folder of the stamps", group="stamps", common=True)
    photographs: Path = option(
        Path("/usr/share/doc/opencv-doc/examples/data"), "folder of the photographs", group="stamps", common=True
    )
    output_dir: Path = option(Path("outputs/stamps"), "new folder for the set", group="stamps", common=True)
    num_train: int = option(600, "pictures of train", group="stamps", common=True)
    num_validation: int = option(60, "pictures of validation", group="stamps", common=True)
    num_test: int = option(120, "pictures of test", group="stamps", common=True)
    size_px: int = option(1024, "side of a picture in pixels", group="stamps", common=True)
    seed: int = option(0, "of everything that is drawn", group="stamps", common=True)


def parse(argv: Sequence[str] | None = None) -> StampOptions:
    """Return the options, checked."""
    parser = script_parser("python scripts/studies/build_stamps.py", __doc__)
    parser.add_options(StampOptions, ("stamps",), "stamps")
    parsed = parser.parse(argv)
    try:
        check_positive(parsed[StampOptions], "num_train", "num_validation", "num_test", "size_px")
        check_not_negative(parsed[StampOptions], "seed")
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[StampOptions]


def read_stamps(folder: Path) -> list[list[Image.Image]]:
    """Return the stamps of each class, cut to what is opaque, sorted by name; those without an outline are left out.

    Raises:
        DataError: a class has no stamp.
    """
    stamps = []
    for name in CLASSES:
        found = []
        for path in tqdm(sorted((folder / name).rglob("*.png")), desc=name, unit="stamp"):
            stamp = open_image(path).convert("RGBA")
            covered = np.asarray(stamp.getchannel("A")) >= COVERED
            if 0 < covered.mean() < OPAQUE:
                found.append(stamp.crop(Image.fromarray(covered).getbbox()))
        if not found:
            raise DataError(f"{folder / name}: there is no stamp; install tuxpaint-stamps-default or give --stamps")
        stamps.append(found)
    return stamps


def split_stamps(stamps: list[list[Image.Image]], seed: int) -> dict[str, list[list[Image.Image]]]:
    """Return the stamps of each class for each split, drawn."""
    random = np.random.default_rng(seed)
    parts: dict[str, list[list[Image.Image]]] = {split: [] for split in SPLITS}
    for found in stamps:
        order = random.permutation(len(found))
        ends = np.round(np.cumsum(list(SHARES.values()))[:-1] * len(found)).astype(int)
        for split, chosen in zip(SHARES, np.split(order, ends), strict=True):
            parts[split].append([found[index] for index in chosen])
    return parts


def read_photographs(folder: Path) -> dict[str, list[Image.Image]]:
    """Return the photographs of each split.

    Raises:
        DataError: one is missing or broken.
    """
    for name in (name for names in PHOTOGRAPHS.values() for name in names):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: there is no such file; install opencv-doc or give --photographs")
    return {split: [convert_image(open_image(folder / name)) for name in names] for split, names in PHOTOGRAPHS.items()}


def turn_and_scale(stamp: Image.Image, scale: float, random: np.random.Generator) -> Image.Image:
    """Return a stamp mirrored or not, turned and resized."""
    longest = scale * float(np.exp(random.uniform(*np.log(STAMP_PX))))
    stamp = ImageOps.mirror(stamp) if random.integers(2) else stamp
    factor = longest / max(stamp.size)
    stamp = stamp.resize([max(4, round(side * factor)) for side in stamp.size], Image.Resampling.LANCZOS)
    angle = float(random.uniform(-TURN_DEGREES, TURN_DEGREES))
    return stamp.rotate(angle, Image.Resampling.BICUBIC, expand=True)


def draw_stamps(
    row: int,
    split: str,
    stamps: Sequence[Sequence[Image.Image]],
    photographs: Mapping[str, Sequence[Image.Image]],
    options: StampOptions,
) -> Scene:
    """Return picture `row` of a split, which depends on split, seed and row alone."""
    random = np.random.default_rng([options.seed, SPLITS.index(split), row])
    labels = random.integers(len(CLASSES), size=random.integers(STAMPS_ON_CANVAS[0], STAMPS_ON_CANVAS[1] + 1))
    scale = options.size_px / 1024

    def draw(index: int, random: np.random.Generator) -> Image.Image:
        of_class = stamps[labels[index]]
        return turn_and_scale(of_class[int(random.integers(len(of_class)))], scale, random)

    return draw_scene(photographs[split], labels.tolist(), draw, options.size_px, random, PIECE_PX)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    folder = options.output_dir
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give another --output_dir")
    photographs = read_photographs(options.photographs)
    parts = split_stamps(read_stamps(options.stamps), options.seed)
    counts = {"train": options.num_train, "validation": options.num_validation, "test": options.num_test}
    for split, count in counts.items():
        rows = tqdm(range(count), desc=f"drawing {split}", unit="image")
        write_split(
            folder / split, CLASSES, (draw_stamps(row, split, parts[split], photographs, options) for row in rows)
        )
    data = load_coco_folder(folder, ObjectOptions(masks=True, check_pictures=False))
    shown = [images[0] for images in data.splits.values()]
    drawn = [draw_objects(each.open(), each.boxes, each.labels, CLASSES, masks=each.masks()) for each in shown]
    draw_sheet([image for pair in zip([each.open() for each in shown], drawn, strict=True) for image in pair], 2,
               folder / "sheet.png")  # fmt: skip
    objects = {split: sum(len(image.labels) for image in images) for split, images in data.splits.items()}
    print(json.dumps({"images": counts, "objects": objects, "stamps": {s: sum(map(len, p)) for s, p in parts.items()}}))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
