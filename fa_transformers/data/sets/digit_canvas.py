"""Large generated images whose answer is only visible at full resolution: small real digits among scrambled ones.

Every image is a black square canvas that carries the same number of handwritten digits of all ten classes, at random
places that don't overlap. The digits of one class are whole, and that class is the label; the digits of the nine other
classes are cut into quarters, which are shuffled and turned. Cutting keeps every pixel, so brightness, histogram and
stroke energy say nothing about the label, and after downscaling to 224 px a digit is under three pixels wide.

A canvas is a lattice of 16 px cells, and a digit of 12 px lies anywhere inside a cell of its own. A model with patches
of 16 px therefore never sees a digit cut in two, which is what lets a small one learn from scratch in minutes.

The digits are scikit-learn's copy of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine
Learning Repository, 1998, CC-BY-4.0): 1797 pictures of 8x8 pixels. The three splits use disjoint pictures.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_CLASSES = 10
SPLIT_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
# Kept sets are found again by their settings; this number stands for the code, and goes up when the pictures change.
RECIPE = 1
CELL_PX = 16
DIGIT_PX = 12
# Of a default canvas, in units of white. Without this normalization the black paper drowns the strokes, and a model
# that starts from scratch stays at chance for hundreds of steps.
IMAGE_MEAN = 0.101
IMAGE_STD = 0.235
LICENSE = "cc-by-4.0"
ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, "
    "as distributed with scikit-learn; placed on generated canvases."
)


def split_digits(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Indices and classes of the 1797 digits for each split: disjoint, with the same share of every class.

    Returns, for "train", "validation" and "test", two integer arrays of one length: index into `load_digits()`, class.
    """
    targets = load_digits().target
    random = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLIT_SHARES}
    for digit_class in range(NUM_CLASSES):
        members = random.permutation(np.flatnonzero(targets == digit_class))
        ends = np.round(np.cumsum(list(SPLIT_SHARES.values()))[:-1] * len(members)).astype(int)
        for name, part in zip(SPLIT_SHARES, np.split(members, ends), strict=True):
            parts[name].append(part)
    indices = {name: np.concatenate(part) for name, part in parts.items()}
    return {name: (index, targets[index]) for name, index in indices.items()}


def enlarge_digits(digit_px: int) -> np.ndarray:
    """All 1797 digits, bilinearly enlarged from 8x8 to `digit_px` x `digit_px`, as bytes 0 (paper) to 255 (ink)."""
    pictures = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    enlarged = [
        Image.fromarray(picture).resize((digit_px, digit_px), Image.Resampling.BILINEAR) for picture in pictures
    ]
    return np.stack([np.asarray(picture) for picture in enlarged])


def scramble_quarters(pictures: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Cut each picture [n, S, S] into quarters, move every quarter elsewhere and turn it; the pixels stay the same.

    The quarters, in reading order, go round by one to three places, so that none stays where it was; each is turned by
    0, 90, 180 or 270 degrees.
    """
    num_pictures, side, _ = pictures.shape
    half = side // 2
    quarters = pictures.reshape(num_pictures, 2, half, 2, half).transpose(0, 1, 3, 2, 4)
    quarters = quarters.reshape(num_pictures, 4, half, half)
    shift = random.integers(1, 4, size=(num_pictures, 1))
    order = (np.arange(4) + shift) % 4
    quarters = np.take_along_axis(quarters, order[:, :, None, None], axis=1)
    turns = random.integers(0, 4, size=(num_pictures, 4))
    turned = np.stack([np.rot90(quarters, turn, axes=(2, 3)) for turn in range(4)])
    quarters = np.take_along_axis(turned, turns[None, :, :, None, None], axis=0)[0]
    return quarters.reshape(num_pictures, 2, 2, half, half).transpose(0, 1, 3, 2, 4).reshape(pictures.shape)


def draw_canvas(
    label: int,
    digits_by_class: list[np.ndarray],
    size_px: int,
    digits_per_class: int,
    random: np.random.Generator,
    scrambled_per_class: int | None = None,
) -> tuple[np.ndarray, list[int]]:
    """One canvas [size_px, size_px] of bytes: `digits_per_class` digits of each class, all but `label`'s scrambled.

    `digits_by_class` holds, for each class, pictures [n, S, S] to draw from with replacement. `scrambled_per_class` is
    the number of scrambled ones of each class, None: as many.

    Returns:
        The canvas, and the cells with whole digits, counted row by row.
    """
    scrambled = digits_per_class if scrambled_per_class is None else scrambled_per_class
    counts = [digits_per_class if number == label else scrambled for number in range(len(digits_by_class))]
    chosen = [
        pictures[random.integers(len(pictures), size=count)]
        for pictures, count in zip(digits_by_class, counts, strict=True)
    ]
    whole = chosen.pop(label)
    stamps = np.concatenate([whole, scramble_quarters(np.concatenate(chosen), random)])
    side = stamps.shape[1]
    cells_per_side = size_px // CELL_PX
    cells = random.choice(cells_per_side**2, size=len(stamps), replace=False)
    corners = np.stack([cells // cells_per_side, cells % cells_per_side]) * CELL_PX
    corners += random.integers(0, CELL_PX - side + 1, size=corners.shape)
    rows = corners[0][:, None, None] + np.arange(side)[None, :, None]
    columns = corners[1][:, None, None] + np.arange(side)[None, None, :]
    canvas = np.zeros((size_px, size_px), dtype=np.uint8)
    canvas[rows, columns] = stamps
    return canvas, cells[: len(whole)].tolist()


def draw_canvases(
    split: str, count: int, size_px: int, digits_per_class: int, seed: int, scrambled_per_class: int | None = None
) -> Iterator[tuple[np.ndarray, int, list[int]]]:
    """Yield `count` canvases as bytes [size_px, size_px], their labels and their cells with whole digits.

    Ten rows in a row have ten labels. Row i depends on the split, the seed and i alone, so a larger set begins with the
    smaller one.
    """
    indices, classes = split_digits(seed)[split]
    pictures = enlarge_digits(DIGIT_PX)
    digits_by_class = [pictures[indices[classes == digit_class]] for digit_class in range(NUM_CLASSES)]
    split_number = list(SPLIT_SHARES).index(split)
    for row in range(count):
        order = np.random.default_rng([seed, split_number, 0, row // NUM_CLASSES]).permutation(NUM_CLASSES)
        label = int(order[row % NUM_CLASSES])
        random = np.random.default_rng([seed, split_number, 1, row])
        canvas, whole = draw_canvas(label, digits_by_class, size_px, digits_per_class, random, scrambled_per_class)
        yield canvas, label, whole


def generate_canvases(
    split: str,
    count: int,
    size_px: int,
    digits_per_class: int,
    seed: int,
    recipe: int = RECIPE,
    scrambled_per_class: int | None = None,
) -> Iterator[dict]:
    """Yield the rows of `draw_canvases` with "image" (the bytes of a grey PNG) and "label"."""
    if recipe != RECIPE:
        raise ValueError(f"recipe must be {RECIPE}, the only one that this version draws, got {recipe}")
    for canvas, label, _ in draw_canvases(split, count, size_px, digits_per_class, seed, scrambled_per_class):
        png = io.BytesIO()
        Image.fromarray(canvas).save(png, "PNG", compress_level=1)
        yield {"image": {"bytes": png.getvalue(), "path": None}, "label": label}


def load_digit_canvas(
    num_train: int,
    num_validation: int,
    num_test: int,
    size_px: int = 1024,
    seed: int = 0,
    *,
    digits_per_class: int = 240,
    scrambled_per_class: int | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict:
    """Generated canvases as train, validation and test; columns image (grey) and label (ClassLabel "0" to "9").

    `num_train`, `num_validation` and `num_test` count images, `size_px` is the side of a canvas in pixels, and
    `digits_per_class` the number of digits of each class on every canvas; with `scrambled_per_class` the classes that
    aren't the label have so many, which makes the task easier. The set is drawn once (about 30 ms an image) and kept by
    `datasets` in `cache_dir`, by default in Hugging Face's cache.

    Raises ValueError for a count below 1 and for a canvas without a cell for every digit.
    """
    counts = {"train": num_train, "validation": num_validation, "test": num_test}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"num_{name} must be at least 1, got {count}")
    if digits_per_class < 1:
        raise ValueError(f"digits_per_class must be at least 1, got {digits_per_class}")
    if scrambled_per_class is not None and scrambled_per_class < 0:
        raise ValueError(f"scrambled_per_class must be at least 0, got {scrambled_per_class}")
    num_cells = (size_px // CELL_PX) ** 2
    others = digits_per_class if scrambled_per_class is None else scrambled_per_class
    wanted = f"{NUM_CLASSES} x {others}" if others == digits_per_class else f"{digits_per_class} + 9 x {others}"
    if digits_per_class + (NUM_CLASSES - 1) * others > num_cells:
        raise ValueError(
            f"a canvas of size_px={size_px} has {num_cells} cells of {CELL_PX} px, too few for {wanted} "
            "digits: raise size_px or lower digits_per_class"
        )
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(NUM_CLASSES)])}
    )
    settings = {"size_px": size_px, "digits_per_class": digits_per_class, "seed": seed, "recipe": RECIPE}
    if scrambled_per_class is not None:  # sets that are kept are found by their settings
        settings["scrambled_per_class"] = scrambled_per_class
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_generator(
                generate_canvases,
                features=features,
                cache_dir=str(cache_dir) if cache_dir else None,
                gen_kwargs={"split": split, "count": count, **settings},
            )
            for split, count in counts.items()
        }
    )
