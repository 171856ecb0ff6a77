"""Generated stereo pairs with exact disparities and occlusions: slanted surfaces with the textures of real photographs.

A scene is a wall, perhaps a floor, and ellipses, boxes and diamonds before them. Every surface is a plane in disparity,
d(x, y) = d0 + a·(x - x0) + b·(y - y0) with x and y in pixels of the left image, and of the surfaces that cover a pixel
the one of the largest disparity is seen. A point at x of the left image stands at x - d(x, y) in the right one; the
right image is made by the exact inverse of that, x = (u + d0 - a·x0 + b·(y - y0)) / (1 - a), and the same rule for what
is seen. So disparities are exact to rounding at every pixel, occluded or not, and which ones are occluded is exact too.

The right image has a gain and an offset of its own, and both have noise, as two cameras do. Textures are pieces of
scikit-learn's two photographs ("china.jpg", "flower.jpg"), turned and with changed colours, under some grain of their
own, since smooth pieces would have no answer. Training and held-out scenes take them from disjoint parts of the
photographs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ..readers.stereo_folders import StereoSample

SPLITS = ("train", "validation", "test")
# Columns of a photograph that a split takes its textures from, as shares of the width.
PHOTO_PARTS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
# Kept sets are found again by their settings; this number stands for the code, and goes up when the pictures change.
RECIPE = 1
TEXTURE_PX = 256
SMALLEST_PIECE_PX = 80
NUM_OBJECTS = (8, 20)
GREATEST_SLOPE = 0.12
"""Disparity that a surface gains or loses over a pixel, along either axis."""
WALL_SHARES = (0.05, 0.3)
"""Disparity of the wall at the middle of the image, as a share of the greatest one."""
SHAPES = ("ellipse", "box", "diamond")
LICENSE = "cc-by-2.0"
ATTRIBUTION = (
    'The photographs "china.jpg" and "flower.jpg" (CC-BY-2.0) as distributed with scikit-learn, cut into the textures '
    "of generated scenes."
)


@dataclass(frozen=True)
class Surface:
    """A textured plane in disparity with the outline of a shape; "plane" has none.

    Args:
        shape: "plane", "ellipse", "box" or "diamond".
        centre: (x0, y0) in pixels of the left image.
        half_sizes: half the widths along the shape's own axes, in pixels.
        angle: of these axes, in radians.
        disparity: d0, at the centre.
        slopes: (a, b), the disparity gained over a pixel to the right and down; a is below 1.
        texture: numbers [h, w, 3] of 0 to 255, one texel a pixel of the left image, mirrored beyond its borders.
        texture_origin: (x, y) in pixels of the left image where the texture begins.
    """

    shape: str
    centre: tuple[float, float]
    half_sizes: tuple[float, float]
    angle: float
    disparity: float
    slopes: tuple[float, float]
    texture: np.ndarray
    texture_origin: tuple[float, float] = (0.0, 0.0)

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tell whether points of the left image, of any and equal shapes, lie inside of the outline."""
        if self.shape == "plane":
            return np.ones(np.broadcast(x, y).shape, bool)
        across, down = x - self.centre[0], y - self.centre[1]
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        first = np.abs(cosine * across + sine * down) / self.half_sizes[0]
        second = np.abs(cosine * down - sine * across) / self.half_sizes[1]
        if self.shape == "ellipse":
            return first**2 + second**2 <= 1
        return (np.maximum(first, second) if self.shape == "box" else first + second) <= 1

    def disparity_at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return d(x, y)."""
        return self.disparity + self.slopes[0] * (x - self.centre[0]) + self.slopes[1] * (y - self.centre[1])

    def left_column(self, u: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the x of the left image whose point stands at column u of the right one: x - d(x, y) = u."""
        (a, b), (x0, y0) = self.slopes, self.centre
        return (u + self.disparity - a * x0 + b * (y - y0)) / (1 - a)

    def reach(self, height: int, width: int, in_right: bool) -> tuple[slice, slice]:
        """Return the rows and columns of an image outside of which the surface is not seen."""
        if self.shape == "plane":
            return slice(0, height), slice(0, width)
        (x0, y0), radius = self.centre, math.hypot(*self.half_sizes)
        corners_x, corners_y = np.array([-1, 1, -1, 1]) * radius + x0, np.array([-1, -1, 1, 1]) * radius + y0
        columns = corners_x - (self.disparity_at(corners_x, corners_y) if in_right else 0.0)

        def inside(low: float, high: float, size: int) -> slice:
            return slice(min(max(math.floor(low), 0), size), min(max(math.ceil(high) + 1, 0), size))

        return inside(y0 - radius, y0 + radius, height), inside(columns.min(), columns.max(), width)

    def colours(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the texture at points of the left image, between texels linearly: [n] and [n] -> [n, 3]."""
        height, width, _ = self.texture.shape
        column, row = _mirror(x - self.texture_origin[0], width), _mirror(y - self.texture_origin[1], height)
        left, top = np.minimum(column.astype(int), width - 2), np.minimum(row.astype(int), height - 2)
        right_share = (column - left)[:, None].astype(np.float32)
        low_share = (row - top)[:, None].astype(np.float32)
        texels = self.texture.reshape(-1, 3)
        first = top * width + left
        upper = texels[first] * (1 - right_share) + texels[first + 1] * right_share
        lower = texels[first + width] * (1 - right_share) + texels[first + width + 1] * right_share
        return upper * (1 - low_share) + lower * low_share


def _mirror(place: np.ndarray, size: int) -> np.ndarray:
    """Fold places on a line back into 0 to size - 1, as between two mirrors."""
    folded = np.mod(place, 2 * (size - 1))
    return np.minimum(folded, 2 * (size - 1) - folded)


@dataclass(frozen=True)
class View:
    """One image of a scene before noise: colours [H, W, 3], disparities [H, W], and the surface seen at every pixel."""

    colours: np.ndarray
    disparity: np.ndarray
    surface: np.ndarray


def render(surfaces: list[Surface], height: int, width: int, in_right: bool) -> View:
    """Draw one view of a scene: at every pixel the surface of the largest disparity there.

    Of the right view, `disparity` is that of the left pixel that shows the same point.
    """
    nearest = np.full((height, width), -np.inf)
    seen = np.full((height, width), -1)
    place = np.zeros((height, width))
    for index, surface in enumerate(surfaces):
        rows, columns = surface.reach(height, width, in_right)
        y, x = np.mgrid[rows, columns].astype(float)
        if in_right:
            x = surface.left_column(x, y)
        disparity = surface.disparity_at(x, y)
        nearer = surface.covers(x, y) & (disparity > nearest[rows, columns])
        nearest[rows, columns][nearer] = disparity[nearer]
        seen[rows, columns][nearer] = index
        place[rows, columns][nearer] = x[nearer]
    colours = np.zeros((height, width, 3), np.float32)
    for index, surface in enumerate(surfaces):
        row, column = np.nonzero(seen == index)
        if len(row):
            colours[row, column] = surface.colours(place[row, column], row.astype(float))
    return View(colours, nearest, seen)


def find_occluded(surfaces: list[Surface], left: View) -> np.ndarray:
    """Return bool [H, W], True where the point of a left pixel is hidden in the right view, or is outside of it."""
    height, width = left.disparity.shape
    y, x = np.mgrid[:height, :width].astype(float)
    column = x - left.disparity
    occluded = (column < 0) | (column > width - 1)
    for index, surface in enumerate(surfaces):
        rows, _ = surface.reach(height, width, in_right=True)
        there = surface.left_column(column[rows], y[rows])
        hides = surface.covers(there, y[rows]) & (surface.disparity_at(there, y[rows]) > left.disparity[rows])
        # A surface doesn't hide itself, whatever rounding makes of the way to the right view and back.
        occluded[rows] |= hides & (left.surface[rows] != index)
    return occluded


@dataclass(frozen=True)
class Scene(StereoSample):
    """A generated pair: `disparity` is known everywhere, and `occluded` tells which left pixels the right one lacks."""

    occluded: np.ndarray | None = None


def draw_scene(split: str, index: int, seed: int, height: int, width: int, max_disparity: int) -> Scene:
    """Draw scene `index` of a split; it depends on nothing but the arguments. Disparities lie from 0 to max_disparity.

    Raises:
        ValueError: `split` is unknown, a size is below 16, or `max_disparity` is below 4 or above the width.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if min(height, width) < 16 or not 4 <= max_disparity <= width:
        raise ValueError(
            f"a scene needs sides of 16 px or more and a max_disparity from 4 to its width, got {width} x {height} and "
            f"{max_disparity}"
        )
    random = np.random.default_rng([seed, SPLITS.index(split), index])
    surfaces = compose(random, photo_parts(split), height, width, max_disparity)
    views = [render(surfaces, height, width, in_right) for in_right in (False, True)]
    gain, offset = random.uniform(0.9, 1.1), random.uniform(-8, 8)
    noise = random.uniform(0.5, 2.5)
    pictures = []
    for colours in (views[0].colours, views[1].colours * gain + offset):
        noisy = colours + random.normal(0, noise, colours.shape)
        pictures.append(np.clip(np.round(noisy), 0, 255).astype(np.uint8))
    disparity = views[0].disparity.astype(np.float32)
    everywhere = np.ones(disparity.shape, bool)
    return Scene(pictures[0], pictures[1], disparity, everywhere, find_occluded(surfaces, views[0]))


def compose(
    random: np.random.Generator, photos: list[np.ndarray], height: int, width: int, max_disparity: int
) -> list[Surface]:
    """Draw the surfaces of a scene: a wall, in half of the scenes a floor, and objects before them."""
    wall = random.uniform(*WALL_SHARES) * max_disparity
    # Over the whole image and what the right one sees beyond it, the wall stays in front of infinity.
    steepest = min(GREATEST_SLOPE, 0.8 * wall / (width + max_disparity + height))
    middle, everywhere = (width / 2, height / 2), (math.inf, math.inf)
    slopes = tuple(random.uniform(-steepest, steepest, 2))

    def texture() -> tuple[np.ndarray, tuple[float, float]]:
        return cut_texture(random, photos), tuple(random.uniform(0, TEXTURE_PX, 2))

    surfaces = [Surface("plane", middle, everywhere, 0.0, wall, slopes, *texture())]
    if random.random() < 0.5:
        nearest = random.uniform(wall, 0.8 * max_disparity)
        horizon = random.uniform(0.4, 0.8) * height
        slope = (nearest - wall) / (height - horizon)
        surfaces.append(Surface("plane", (width / 2, horizon), everywhere, 0.0, wall, (0.0, slope), *texture()))
    for _ in range(random.integers(*NUM_OBJECTS, endpoint=True)):
        half_sizes = tuple(np.exp(random.uniform(np.log(0.05), np.log(0.3), 2)) * height)
        radius = math.hypot(*half_sizes)
        disparity = random.uniform(wall, 0.95 * max_disparity)
        # The nearest and the farthest point of the object stay between infinity and max_disparity.
        steepest = min(GREATEST_SLOPE, 0.7 * min(disparity, max_disparity - disparity) / radius)
        surfaces.append(
            Surface(
                SHAPES[random.integers(len(SHAPES))],
                # In reach of the right view, too.
                (random.uniform(0, width + disparity), random.uniform(0, height)),
                half_sizes,
                random.uniform(0, math.pi),
                disparity,
                tuple(random.uniform(-steepest, steepest, 2)),
                *texture(),
            )
        )
    return surfaces


@cache
def photo_parts(split: str) -> list[np.ndarray]:
    """Return the parts of the photographs that a split takes its textures from, bytes [h, w, 3]."""
    low, high = PHOTO_PARTS[split]
    return [photo[:, round(low * photo.shape[1]) : round(high * photo.shape[1])] for photo in _photographs()]


@cache
def _photographs() -> list[np.ndarray]:
    return load_sample_images().images


def cut_texture(random: np.random.Generator, photos: list[np.ndarray]) -> np.ndarray:
    """Cut a piece of a photograph and change its orientation, colours and grain; float32, TEXTURE_PX a side."""
    photo = photos[random.integers(len(photos))]
    side = random.integers(SMALLEST_PIECE_PX, min(photo.shape[:2]) + 1)
    top, left = (random.integers(0, size - side + 1) for size in photo.shape[:2])
    piece = photo[top : top + side, left : left + side]
    resized = Image.fromarray(piece).resize((TEXTURE_PX, TEXTURE_PX), Image.Resampling.BICUBIC)
    texture = np.rot90(np.asarray(resized, np.float32), int(random.integers(4)))[:, :: random.choice([-1, 1])]
    texture = texture[:, :, random.permutation(3)]
    if random.random() < 0.3:
        texture = 255 - texture
    # Contrast and brightness of the piece, and its grain: half of it a pixel wide, half two pixels.
    texture = (texture - texture.mean()) * random.uniform(0.6, 1.4) + random.uniform(60, 195)
    fine = random.normal(0, 1, (TEXTURE_PX, TEXTURE_PX))
    coarse = np.repeat(np.repeat(random.normal(0, 1, (TEXTURE_PX // 2, TEXTURE_PX // 2)), 2, axis=0), 2, axis=1)
    grain = (fine + coarse)[:, :, None] * random.uniform(2, 8)
    return np.clip(texture + grain, 0, 255).astype(np.float32)


def generate_scenes(
    split: str, count: int, height: int, width: int, max_disparity: int, seed: int, recipe: int = RECIPE
) -> Iterator[dict]:
    """Yield `count` rows with left and right (the bytes of PNG files), disparity, valid and occluded.

    Row i depends on the split, the seed, the sizes and i alone, so a larger set begins with the smaller one.
    """
    if recipe != RECIPE:
        raise ValueError(f"recipe must be {RECIPE}, the only one that this version draws, got {recipe}")
    for index in range(count):
        scene = draw_scene(split, index, seed, height, width, max_disparity)
        yield {
            "left": Image.fromarray(scene.left),
            "right": Image.fromarray(scene.right),
            "disparity": scene.disparity,
            "occluded": scene.occluded,
        }


def load_stereo_scenes(
    num_train: int,
    num_validation: int,
    num_test: int,
    size: tuple[int, int] = (256, 512),
    max_disparity: int = 64,
    seed: int = 0,
    *,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict:
    """Generated pairs as train, validation and test; columns left, right (images), disparity and occluded [H, W].

    `size` is (height, width) in pixels and `max_disparity` bounds the disparities, which are of the left image and in
    pixels. The set is drawn once and kept by `datasets` in `cache_dir`, by default in Hugging Face's cache.

    Raises:
        ValueError: a count is below 1, or `draw_scene` can't draw the sizes.
    """
    counts = {"train": num_train, "validation": num_validation, "test": num_test}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"num_{name} must be at least 1, got {count}")
    height, width = size
    features = datasets.Features(
        {
            "left": datasets.Image(),
            "right": datasets.Image(),
            "disparity": datasets.Array2D((height, width), "float32"),
            "occluded": datasets.Array2D((height, width), "bool"),
        }
    )
    settings = {"height": height, "width": width, "max_disparity": max_disparity, "seed": seed, "recipe": RECIPE}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_generator(
                generate_scenes,
                features=features,
                cache_dir=str(cache_dir) if cache_dir else None,
                gen_kwargs={"split": split, "count": count, **settings},
            )
            for split, count in counts.items()
        }
    )
