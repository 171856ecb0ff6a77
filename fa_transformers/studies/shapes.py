"""Pictures of coloured frames whose class stands elsewhere in the picture: a detector's encoder has to look it up.

A picture has two or three solid marks, a disc, a square or a triangle, each in a colour of its own, and hollow frames
in these colours. The frames are the objects to find, and a frame's class is the kind of the mark in its colour: what
lies around the frame says nothing of it. Marks and frames don't overlap and stand on a smooth grey ground with noise.
They are drawn in milliseconds, and detectors learn them within minutes of a core.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASS_NAMES = ("disc", "square", "triangle")
"""Classes of a frame: the kinds of marks."""
COLOURS = ((220, 50, 50), (50, 180, 60), (60, 80, 230), (230, 210, 50), (210, 60, 200), (50, 200, 210))
FRAME_KIND = len(CLASS_NAMES)
NUM_APPEARANCES = (len(CLASS_NAMES) + 1) * len(COLOURS)
"""Appearances of an object: its kind, a frame's after those of the marks, and its colour."""
SIDE_PX = 96
MARK_PX = (16, 22)
FRAME_PX = (28, 38)
FRAME_WIDTH_PX = 5
FRAMES_OF_A_COLOUR = (1, 2)
TRIES = 30
"""Draws of an object's place, after which a full picture goes without it."""


@dataclass(frozen=True)
class ShapePicture:
    """A picture and its n frames, as `metrics.detection` takes them for truths.

    Args:
        image_id: its number.
        pixels: uint8 [SIDE_PX, SIDE_PX, 3].
        labels: int64 [n], indices of `CLASS_NAMES`.
        boxes: float32 [n, 4] as (left, top, right, bottom) in pixel edges, tight.
        appearances: int64 [SIDE_PX, SIDE_PX], the appearance of the object whose box lies over a pixel, from 0 to
            `NUM_APPEARANCES` - 1, or `NUM_APPEARANCES` where there is none.
    """

    image_id: int
    pixels: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    appearances: np.ndarray
    rles: None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return SIDE_PX, SIDE_PX

    @property
    def areas(self) -> np.ndarray:
        """Areas of the boxes in square pixels, float64 [n]."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return sides.prod(axis=1).astype(np.float64)

    @property
    def is_crowd(self) -> np.ndarray:
        """False for every frame, bool [n]."""
        return np.zeros(len(self.labels), dtype=bool)


def draw_pictures(count: int, seed: int) -> list[ShapePicture]:
    """Draw pictures that depend on `seed` and on their number alone."""
    return [_draw(number, np.random.default_rng([seed, number])) for number in range(count)]


class _Canvas:
    """A ground on which objects are drawn where there is room."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.rows, self.columns = np.mgrid[:SIDE_PX, :SIDE_PX]
        coarse = random.uniform(70.0, 180.0, (1, 1, 4, 4)) + random.uniform(-20.0, 20.0, (1, 3, 4, 4))
        ground = F.interpolate(torch.from_numpy(coarse), size=(SIDE_PX, SIDE_PX), mode="bicubic")[0]
        self.pixels = ground.permute(1, 2, 0).numpy() + random.normal(0.0, 10.0, (SIDE_PX, SIDE_PX, 3))
        self.appearances = np.full((SIDE_PX, SIDE_PX), NUM_APPEARANCES)

    def add(self, kind: int, colour: int) -> tuple[int, int, int, int] | None:
        """Draw an object of a kind and colour; returns its box (left, top, right, bottom), None without room."""
        for _ in range(TRIES):
            low, high = FRAME_PX if kind == FRAME_KIND else MARK_PX
            width, height = (int(side) for side in self.random.integers(low, high + 1, 2))
            left, top = (int(self.random.integers(SIDE_PX - side + 1)) for side in (width, height))
            place = slice(top, top + height), slice(left, left + width)
            if (self.appearances[place] == NUM_APPEARANCES).all():
                break
        else:
            return None
        inside = np.zeros((SIDE_PX, SIDE_PX), dtype=bool)
        inside[place] = _outline(kind, height, width)
        self.appearances[place] = kind * len(COLOURS) + colour
        tint = np.array(COLOURS[colour]) + self.random.uniform(-20.0, 20.0, 3)
        self.pixels[inside] = tint + self.random.normal(0.0, 8.0, (int(inside.sum()), 3))
        return left, top, left + width, top + height


def _outline(kind: int, height: int, width: int) -> np.ndarray:
    """Return which pixels of a box an object of a kind fills; every side of the box has some."""
    rows, columns = np.mgrid[:height, :width]
    if kind == FRAME_KIND:
        to_edge = np.minimum.reduce([rows, columns, height - 1 - rows, width - 1 - columns])
        return to_edge < FRAME_WIDTH_PX
    # From -1 to 1 over the shape's sides.
    x, y = (columns + 0.5) / width * 2 - 1, (rows + 0.5) / height * 2 - 1
    return (x**2 + y**2 <= 1, np.ones((height, width), dtype=bool), y >= 2 * np.abs(x) - 1)[kind]


def _draw(number: int, random: np.random.Generator) -> ShapePicture:
    canvas = _Canvas(random)
    colours = random.permutation(len(COLOURS))[: random.integers(1, len(CLASS_NAMES) + 1)]
    kinds = random.permutation(len(CLASS_NAMES))[: len(colours)]
    # All marks before any frame: no frame is without its mark.
    marked = [(int(kind), int(colour)) for kind, colour in zip(kinds, colours, strict=True) if canvas.add(kind, colour)]
    boxes, labels = [], []
    for kind, colour in marked:
        for _ in range(random.integers(FRAMES_OF_A_COLOUR[0], FRAMES_OF_A_COLOUR[1] + 1)):
            box = canvas.add(FRAME_KIND, colour)
            if box is not None:
                boxes.append(box)
                labels.append(kind)
    return ShapePicture(
        number,
        canvas.pixels.clip(0, 255).astype(np.uint8),
        np.array(labels, dtype=np.int64),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        canvas.appearances,
    )


def detr_labels(picture: ShapePicture) -> dict[str, Tensor]:
    """Return the labels of a picture as DETR takes them: boxes as (centre x, centre y, width, height), in fractions."""
    corners = torch.from_numpy(picture.boxes) / SIDE_PX
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    return {"class_labels": torch.from_numpy(picture.labels), "boxes": boxes}


def appearance_map(picture: ShapePicture, stride: int) -> Tensor:
    """Return what is seen at the middle of each place of a map, int64 [rows, columns], as in `appearances`."""
    return torch.from_numpy(picture.appearances[stride // 2 :: stride, stride // 2 :: stride])


def class_map(picture: ShapePicture, stride: int) -> Tensor:
    """Return the label of the frame over each place of a map, int64 [rows, columns]; -100 is none."""
    pixels = torch.full((SIDE_PX, SIDE_PX), -100)
    for (left, top, right, bottom), label in zip(picture.boxes.astype(int), picture.labels, strict=True):
        pixels[top:bottom, left:right] = int(label)
    return pixels[stride // 2 :: stride, stride // 2 :: stride]
