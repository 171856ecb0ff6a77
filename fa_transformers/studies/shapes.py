"""Pictures of coloured shapes with exact boxes, drawn in milliseconds: detectors learn them within minutes of a core.

A picture has one to four discs, squares and triangles of 20 to 48 px that don't overlap, of random colours, on a smooth
random ground with noise.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASS_NAMES = ("disc", "square", "triangle")
CONTEXT_NAMES = ("single", "repeated")
"""Classes of a shape by the others of its picture: none, or at least one, is of its kind."""
SIDE_PX = 96
OBJECT_PX = (20, 48)
NUM_OBJECTS = (1, 4)
TRIES = 20
"""Draws of a shape's place, after which a full picture goes without it."""


@dataclass(frozen=True)
class ShapePicture:
    """A picture and its n shapes, as `metrics.detection` takes them for truths.

    Args:
        image_id: its number.
        pixels: uint8 [SIDE_PX, SIDE_PX, 3].
        labels: int64 [n], indices of `CLASS_NAMES`.
        boxes: float32 [n, 4] as (left, top, right, bottom) in pixel edges, tight.
    """

    image_id: int
    pixels: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
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
        """False for every shape, bool [n]."""
        return np.zeros(len(self.labels), dtype=bool)


def draw_pictures(count: int, seed: int) -> list[ShapePicture]:
    """Draw pictures that depend on `seed` and on their number alone."""
    return [_draw(number, np.random.default_rng([seed, number])) for number in range(count)]


def draw_context_pictures(count: int, seed: int) -> list[ShapePicture]:
    """Draw pictures of at least two shapes, whose labels are indices of `CONTEXT_NAMES`."""
    drawn = [picture for picture in draw_pictures(2 * count, seed) if len(picture.labels) > 1][:count]
    return [
        replace(picture, image_id=index, labels=(np.bincount(picture.labels)[picture.labels] > 1).astype(np.int64))
        for index, picture in enumerate(drawn)
    ]


def _draw(number: int, random: np.random.Generator) -> ShapePicture:
    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX] + 0.5
    coarse = torch.from_numpy(random.uniform(60.0, 190.0, (1, 3, 4, 4)))
    ground = F.interpolate(coarse, size=(SIDE_PX, SIDE_PX), mode="bicubic")[0].permute(1, 2, 0).numpy()
    pixels = ground + random.normal(0.0, 12.0, ground.shape)
    taken = np.zeros((SIDE_PX, SIDE_PX), dtype=bool)
    boxes, labels = [], []
    for _ in range(random.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1)):
        label = int(random.integers(len(CLASS_NAMES)))
        for _ in range(TRIES):
            width, height = random.uniform(*OBJECT_PX, size=2)
            left, top = random.uniform(0.0, SIDE_PX - width), random.uniform(0.0, SIDE_PX - height)
            # From -1 to 1 over the shape's sides.
            x, y = (columns - left) / width * 2 - 1, (rows - top) / height * 2 - 1
            square = (np.abs(x) <= 1) & (np.abs(y) <= 1)
            if not (taken & square).any():
                break
        else:
            continue
        inside = (x**2 + y**2 <= 1, square, square & (y >= 2 * np.abs(x) - 1))[label]
        taken |= square
        pixels[inside] = random.uniform(0.0, 255.0, 3) + random.normal(0.0, 8.0, (inside.sum(), 3))
        (found_rows, found_columns) = np.nonzero(inside)
        boxes.append([found_columns.min(), found_rows.min(), found_columns.max() + 1, found_rows.max() + 1])
        labels.append(label)
    return ShapePicture(
        number, pixels.clip(0, 255).astype(np.uint8), np.array(labels), np.array(boxes, dtype=np.float32)
    )


def detr_labels(picture: ShapePicture) -> dict[str, Tensor]:
    """Return the labels of a picture as DETR takes them: boxes as (centre x, centre y, width, height), in fractions."""
    corners = torch.from_numpy(picture.boxes) / SIDE_PX
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    return {"class_labels": torch.from_numpy(picture.labels), "boxes": boxes}


def class_map(picture: ShapePicture, stride: int) -> Tensor:
    """Return the label of the box over each place of a map, int64 [rows, columns]; -100 is none."""
    pixels = torch.full((SIDE_PX, SIDE_PX), -100)
    for (left, top, right, bottom), label in zip(picture.boxes.astype(int), picture.labels, strict=True):
        pixels[top:bottom, left:right] = int(label)
    return pixels[stride // 2 :: stride, stride // 2 :: stride]
