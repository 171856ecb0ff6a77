"""Scenes for detection: objects with exact masks on cluttered photographs.

The photographs are scikit-learn's two, `china.jpg` and `flower.jpg`. Train has their left 60 %, validation the upper
and test the lower half of the rest, so that no pixel of one split is in another.

A background is an enlarged piece of a photograph under patches of others, ellipses and polygons, strokes as wide as
those of handwriting, and noise. Objects are pasted without overlap, the largest first. A pixel belongs to an object
where the object covers half of it or more.

The photographs have the licence CC-BY-2.0: china.jpg by danielbuechele, flower.jpg by vultilion, both from Flickr, as
distributed with scikit-learn.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ...models.fa_rle import encode_part

SPLITS = ("train", "validation", "test")
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
TRAIN_WIDTH = 0.6
PIECE_PX = (130, 210)
"""Shortest and longest side of the piece of a photograph that fills the background."""
PATCH_PX = (24, 140)
STROKE_PX = (2, 7)
CLUTTERED_PX = 1024
"""Side of a canvas on which there are `NUM_PATCHES` and `NUM_STROKES`; on others as many in proportion to the area."""
NUM_PATCHES, NUM_STROKES = 40, 60
NOISE = 6.0
"""Standard deviation of the noise, of 255."""
GAP_PX = 3
PLACE_TRIES, LAYOUT_TRIES = 200, 20
CONTRAST = 90.0
"""Distance in RGB that an object's colour has from the mean colour under it."""
COVERED = 128


@dataclass(frozen=True)
class Scene:
    """A drawn picture and its objects: "label", and "bbox", "area" and "segmentation" as in a COCO file."""

    image: Image.Image
    objects: list[dict[str, Any]]


@functools.cache
def photograph_parts() -> dict[str, list[Image.Image]]:
    """Parts of the photographs for each split, disjoint."""
    from sklearn.datasets import load_sample_image

    parts: dict[str, list[Image.Image]] = {split: [] for split in SPLITS}
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(load_sample_image(name))
        (width, height), cut = photograph.size, round(TRAIN_WIDTH * photograph.width)
        boxes = ((0, 0, cut, height), (cut, 0, width, height // 2), (cut, height // 2, width, height))
        for split, box in zip(SPLITS, boxes, strict=True):
            parts[split].append(photograph.crop(box))
    return parts


def draw_background(parts: Sequence[Image.Image], size_px: int, random: np.random.Generator) -> Image.Image:
    """Return a cluttered square picture of `size_px`, made of pieces of `parts`."""
    canvas = _cut_piece(parts, random, PIECE_PX).resize((size_px, size_px), Image.Resampling.BICUBIC)
    share = (size_px / CLUTTERED_PX) ** 2
    for _ in range(round(NUM_PATCHES * share)):
        patch = _cut_piece(parts, random, PATCH_PX)
        outline = Image.new("L", patch.size)
        draw = ImageDraw.Draw(outline)
        if random.integers(2):
            draw.ellipse((0, 0, patch.width - 1, patch.height - 1), fill=255)
        else:
            angles = np.sort(random.uniform(0, 2 * np.pi, size=random.integers(3, 8)))
            corners = (np.stack([np.cos(angles), np.sin(angles)], axis=1) + 1) / 2 * patch.size
            draw.polygon([tuple(corner) for corner in corners], fill=255)
        canvas.paste(patch, _corner(size_px, patch.size, random), outline)
    draw = ImageDraw.Draw(canvas)
    for _ in range(round(NUM_STROKES * share)):
        steps = random.normal(0, 22, size=(random.integers(2, 6), 2))
        points = random.uniform(0, size_px, size=2) + np.cumsum(steps, axis=0)
        width = int(random.integers(STROKE_PX[0], STROKE_PX[1] + 1))
        draw.line([tuple(point) for point in points], fill=_colour(random), width=width, joint="curve")
    return canvas


def _cut_piece(parts: Sequence[Image.Image], random: np.random.Generator, sides: tuple[int, int]) -> Image.Image:
    """A rectangle of one of `parts`, mirrored or not, in other colours."""
    part = parts[int(random.integers(len(parts)))]
    width, height = (min(part_side, int(random.integers(sides[0], sides[1] + 1))) for part_side in part.size)
    left, top = (int(random.integers(whole - side + 1)) for whole, side in zip(part.size, (width, height), strict=True))
    piece = part.crop((left, top, left + width, top + height))
    piece = ImageOps.mirror(piece) if random.integers(2) else piece
    gains = random.uniform(0.6, 1.2, size=(3, 1))
    return piece.point(np.clip(np.arange(256) * gains, 0, 255).astype(int).ravel().tolist())


def _corner(size_px: int, sides: tuple[int, int], random: np.random.Generator) -> tuple[int, int]:
    """(left, top) of something that may stick out of the canvas by half."""
    left, top = (int(random.integers(-side // 2, size_px - side // 2)) for side in sides)
    return left, top


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(number) for number in random.integers(0, 256, size=3))
    return red, green, blue


def draw_scene(
    parts: Sequence[Image.Image],
    labels: Sequence[int],
    draw_object: Callable[[int, np.random.Generator], Image.Image],
    size_px: int,
    random: np.random.Generator,
) -> Scene:
    """Return a scene with one object for each of `labels`.

    Args:
        parts: pieces of photographs for the background.
        labels: the class of each object.
        draw_object: (index in `labels`, generator) -> the object, in mode "L", how much of each pixel it covers, to be
            filled with a random colour, or "RGBA".
        size_px: side of the canvas.
        random: decides everything that is drawn.

    Raises:
        ValueError: the objects find no place.
    """
    canvas = draw_background(parts, size_px, random)
    stamps = [_trim(draw_object(index, random)) for index in range(len(labels))]
    places = place_boxes([stamp.size for stamp in stamps], size_px, random)
    objects = []
    for label, stamp, (left, top) in zip(labels, stamps, places, strict=True):
        coverage = stamp.getchannel("A") if stamp.mode == "RGBA" else stamp
        if stamp.mode == "L":
            under = np.asarray(canvas.crop((left, top, left + stamp.width, top + stamp.height))).mean(axis=(0, 1))
            stamp = Image.new("RGB", stamp.size, _contrasting_colour(under, random))
        canvas.paste(stamp.convert("RGB"), (left, top), coverage)
        inside = np.asarray(coverage) >= COVERED
        height, width = inside.shape
        objects.append(
            {
                "label": int(label),
                "bbox": [left, top, width, height],
                "area": int(inside.sum()),
                "segmentation": encode_part(inside, top, left, size_px, size_px),
            }
        )
    pixels = np.asarray(canvas, dtype=np.float32)
    pixels = pixels + NOISE * random.standard_normal(pixels.shape, dtype=np.float32)
    return Scene(Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8)), objects)


def _trim(stamp: Image.Image) -> Image.Image:
    """The object cut to what its mask will be."""
    coverage = stamp.getchannel("A") if stamp.mode == "RGBA" else stamp
    box = coverage.point(lambda value: 255 * (value >= COVERED)).getbbox()
    if box is None:
        raise ValueError("an object covers no pixel by half: draw it larger.")
    return stamp.crop(box)


def _contrasting_colour(under: np.ndarray, random: np.random.Generator) -> tuple[int, int, int]:
    while True:
        colour = _colour(random)
        if np.linalg.norm(np.array(colour) - under) >= CONTRAST:
            return colour


def place_boxes(sizes: Sequence[tuple[int, int]], size_px: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Return (left, top) of boxes of (width, height) on a square canvas, `GAP_PX` apart, the largest placed first.

    Raises:
        ValueError: there is no room for them.
    """
    order = sorted(range(len(sizes)), key=lambda index: -max(sizes[index]))
    if any(max(size) > size_px for size in sizes):
        raise ValueError(f"an object of {max(map(max, sizes))} px is larger than the canvas of size_px={size_px}.")
    for _ in range(LAYOUT_TRIES):
        placed: dict[int, tuple[int, int, int, int]] = {}
        for index in order:
            width, height = sizes[index]
            taken = np.array(list(placed.values())).reshape(-1, 4)
            for _ in range(PLACE_TRIES):
                left, top = int(random.integers(size_px - width + 1)), int(random.integers(size_px - height + 1))
                apart = (
                    (taken[:, 0] >= left + width + GAP_PX)
                    | (taken[:, 2] + GAP_PX <= left)
                    | (taken[:, 1] >= top + height + GAP_PX)
                    | (taken[:, 3] + GAP_PX <= top)
                )
                if apart.all():
                    placed[index] = (left, top, left + width, top + height)
                    break
            else:
                break
        if len(placed) == len(sizes):
            return [placed[index][:2] for index in range(len(sizes))]
    raise ValueError(f"{len(sizes)} objects find no place on a canvas of size_px={size_px}: fewer, or a larger canvas.")
