"""Two sets for detection and instance segmentation: handwritten digits on cluttered photographs, with exact masks.

`load_digit_scenes`: ten to sixty digits of 20 to 64 px on canvases of 1,024 px, turned by up to 15 degrees, in random
colours; the classes are "0" to "9".

`load_odd_one_out`: such canvases with fewer and larger digits, where the class of a digit depends on the whole picture:
"single" if no other digit of its kind is on the canvas, else "repeated". One kind is repeated, and makes up about half
of the digits. Kinds are drawn alike for both, so that what a digit looks like says nothing about its class: a model has
to compare it with all others.

The digits are scikit-learn's copy of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine
Learning Repository, 1998, CC-BY-4.0), 8 x 8 pixels each; splits use disjoint digits and disjoint parts of the
photographs (`scenes`).
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from ..readers.objects import DenseData
from . import digit_canvas
from .coco_folder import SetSettings, load_drawn_set
from .digit_canvas import NUM_CLASSES, split_digits
from .scenes import SPLITS, Scene, draw_scene, photograph_parts

LICENSE = "cc-by-4.0 and cc-by-2.0"
ATTRIBUTION = (
    f'{digit_canvas.ATTRIBUTION} The photographs "china.jpg" (danielbuechele) and "flower.jpg" (vultilion), '
    "CC-BY-2.0, as distributed with scikit-learn."
)
RECIPE, ODD_RECIPE = 1, 2
"""Stand for the code in the names of kept sets, and go up when their pictures change."""
DIGIT_PX = (20, 64)
"""Longer side of a digit's tight box, drawn evenly on a log scale."""
TURN_DEGREES = 15.0
NUM_SINGLE, NUM_COPIES, ODD_DIGIT_PX = (4, 6), (4, 6), (40, 72)
"""Of an odd-one-out canvas: fewest and most single digits, and digits of the kind that is repeated; their sizes."""
ODD_CLASSES = ("single", "repeated")
DRAWN_PX = 128
INK = (0.3, 0.7)
"""Share of the darkest ink at which a pixel counts as empty, and as covered whole: between, a stroke has its edge."""


@functools.cache
def _pictures() -> np.ndarray:
    """All digits, bytes [1797, 10, 10]: an empty pixel around each lets strokes at the border end round."""
    from sklearn.datasets import load_digits

    return np.pad(np.round(load_digits().images * (255 / 16)).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))


@functools.cache
def _stretch_ink() -> np.ndarray:
    low, high = (255 * share for share in INK)
    return np.clip(np.round((np.arange(256) - low) / (high - low) * 255), 0, 255).astype(int)


_split_digits = functools.cache(split_digits)


def draw_digit(index: int, random: np.random.Generator, digit_px: tuple[int, int] = DIGIT_PX) -> Image.Image:
    """Return digit `index` of scikit-learn's, turned, `digit_px` long: mode "L", how much of a pixel the ink covers."""
    drawn = max(DRAWN_PX, digit_px[1])
    picture = Image.fromarray(_pictures()[index]).resize((drawn, drawn), Image.Resampling.BICUBIC)
    picture = picture.rotate(float(random.uniform(-TURN_DEGREES, TURN_DEGREES)), Image.Resampling.BICUBIC, expand=True)
    picture = picture.point(_stretch_ink().tolist())
    picture = picture.crop(picture.point(lambda value: 255 * (value >= 128)).getbbox())
    longest = float(np.exp(random.uniform(*np.log(digit_px))))
    factor = longest / max(picture.size)
    return picture.resize([max(2, round(side * factor)) for side in picture.size], Image.Resampling.BOX)


def draw_digit_scene(
    split: str,
    row: int,
    size_px: int,
    seed: int,
    num_objects: tuple[int, int] | None,
    digit_px: tuple[int, int] = DIGIT_PX,
) -> Scene:
    """Return canvas `row` of a split, which depends on split, seed, row and what it is to show alone.

    Args:
        num_objects: fewest and most digits, of which the classes are those of the digits; None draws an odd-one-out
            canvas, with the classes `ODD_CLASSES`.
        digit_px: shortest and longest of the digits' longer sides.
    """
    random = np.random.default_rng([seed, SPLITS.index(split), row])
    indices, kinds = _split_digits(seed)[split]
    if num_objects is None:
        chosen, labels = draw_odd_kinds(random)
    else:
        chosen = random.integers(NUM_CLASSES, size=random.integers(num_objects[0], num_objects[1] + 1))
        labels = chosen
    digits = [random.choice(indices[kinds == kind]) for kind in chosen]
    parts = photograph_parts()[split]

    def draw(index: int, random: np.random.Generator) -> Image.Image:
        return draw_digit(digits[index], random, digit_px)

    return draw_scene(parts, labels.tolist(), draw, size_px, random)


def draw_odd_kinds(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the kinds 0 to 9 of the digits of one odd-one-out canvas and their labels, both int64 [n], shuffled."""
    kinds = random.permutation(NUM_CLASSES)
    num_single = int(random.integers(NUM_SINGLE[0], NUM_SINGLE[1] + 1))
    single = kinds[:num_single]
    repeated = np.repeat(kinds[num_single], random.integers(NUM_COPIES[0], NUM_COPIES[1] + 1))
    labels = np.repeat([0, 1], [len(single), len(repeated)])
    order = random.permutation(len(labels))
    return np.concatenate([single, repeated])[order], labels[order]


def load_digit_scenes(
    num_train: int,
    num_validation: int,
    num_test: int,
    size_px: int = 1024,
    seed: int = 0,
    *,
    num_objects: tuple[int, int] = (10, 60),
    digit_px: tuple[int, int] = DIGIT_PX,
    cache_dir: str | Path | None = None,
) -> DenseData:
    """Handwritten digits on cluttered photographs, classes "0" to "9", every one with its mask.

    The set is drawn once, about 0.1 s a canvas of 1,024 px, and kept as a COCO folder in `cache_dir`, by default in
    Hugging Face's cache.

    Args:
        num_train, num_validation, num_test: canvases.
        size_px: side of a canvas in pixels.
        num_objects: fewest and most digits on a canvas.
        digit_px: shortest and longest of the digits' longer sides in pixels.

    Raises:
        ValueError: a count is below 1, or so many digits find no place.
    """
    if not 1 <= num_objects[0] <= num_objects[1]:
        raise ValueError(f"num_objects must be two counts from 1 on, the lower first, got {num_objects}.")
    if not 8 <= digit_px[0] <= digit_px[1]:
        raise ValueError(f"digit_px must be two lengths from 8 on, the lower first, got {digit_px}.")
    name = "digits" if digit_px == DIGIT_PX else f"digits-of-{digit_px[0]}-to-{digit_px[1]}px"
    settings = SetSettings(name, RECIPE, size_px, seed, (num_train, num_validation, num_test), num_objects)
    names = [str(kind) for kind in range(NUM_CLASSES)]
    draw = functools.partial(draw_digit_scene, size_px=size_px, seed=seed, num_objects=num_objects, digit_px=digit_px)
    return load_drawn_set(settings, names, draw, cache_dir)


def load_odd_one_out(
    num_train: int,
    num_validation: int,
    num_test: int,
    size_px: int = 512,
    seed: int = 0,
    *,
    cache_dir: str | Path | None = None,
) -> DenseData:
    """Handwritten digits on cluttered photographs, classes "single" and "repeated": what is there once, and more often.

    A canvas has 8 to 12 digits. Train on whole canvases: a part of one would have other classes.

    Raises:
        ValueError: a count is below 1, or the digits find no place.
    """
    drawn = (NUM_SINGLE, NUM_COPIES, ODD_DIGIT_PX)  # a kept set of other digits is another set
    name = "odd-one-out-" + "-".join(f"{low}to{high}" for low, high in drawn)
    settings = SetSettings(name, ODD_RECIPE, size_px, seed, (num_train, num_validation, num_test), None)
    draw = functools.partial(draw_digit_scene, size_px=size_px, seed=seed, num_objects=None, digit_px=ODD_DIGIT_PX)
    return load_drawn_set(settings, list(ODD_CLASSES), draw, cache_dir)
