"""Geometry of boxes and masks: pure functions on numpy arrays.

n boxes or masks, H and W of the image in pixels. Boxes are float32 [n, 4] as (left, top, right, bottom) in pixel edges,
x from 0 to W and y from 0 to H, unless a name says otherwise; masks are booleans [n, H, W]. The tight box of a mask is
(min x, min y, max x + 1, max y + 1). Run-length encoded masks are in `models.fa_rle`.
"""

from collections.abc import Sequence

import numpy as np

from ..models.fa_rle import Rle, decode_columns, mask_size


def boxes_from_coco(boxes: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Return boxes [n, 4] of COCO's (left, top, width, height)."""
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def boxes_to_coco(boxes: np.ndarray) -> np.ndarray:
    """Return COCO's (left, top, width, height), float32 [n, 4], of boxes [n, 4]."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def boxes_to_fractions(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return (centre x, centre y, width, height) as fractions of the image, float32 [n, 4], of boxes [n, 4].

    This is the form of the labels and outputs of DETR.
    """
    sides = np.array([width, height], dtype=np.float32)
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2 / sides, (boxes[:, 2:] - boxes[:, :2]) / sides], axis=1)


def boxes_from_fractions(fractions: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return boxes [n, 4] in pixels of (centre x, centre y, width, height) as fractions of the image, [n, 4]."""
    sides = np.array([width, height], dtype=np.float32)
    centres, halves = fractions[:, :2] * sides, fractions[:, 2:] * sides / 2
    return np.concatenate([centres - halves, centres + halves], axis=1)


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the parts of boxes [n, 4] that lie in the image; a box outside keeps no area."""
    limits = np.array([width, height, width, height], dtype=np.float32)
    return np.clip(boxes, 0, limits)


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """Return areas in square pixels, float32 [n]; a box whose right is left of its left has none."""
    sides = np.maximum(0, boxes[:, 2:] - boxes[:, :2])
    return sides[:, 0] * sides[:, 1]


def intersection_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the areas that boxes [n, 4] share with others [m, 4], float32 [n, m]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = np.maximum(0, high - low)
    return sides[..., 0] * sides[..., 1]


def box_ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return intersection over union of boxes [n, 4] and others [m, 4], float32 [n, m]; 0 where both have no area."""
    shared = intersection_areas(boxes, others)
    union = box_areas(boxes)[:, None] + box_areas(others)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def mask_ious(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return intersection over union of masks [n, H, W] and others [m, H, W], float32 [n, m]; 0 where both are empty.

    The counts of pixels are exact up to images of 2²⁴ pixels.
    """
    flat, other_flat = (part.reshape(len(part), -1).astype(np.float32) for part in (masks, others))
    shared = flat @ other_flat.T
    union = flat.sum(axis=1)[:, None] + other_flat.sum(axis=1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def decode_window(rle: Rle, box: np.ndarray, window: tuple[int, int, int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Return what a window shows of a mask, cut to the mask's tight box: booleans [h, w], and (top, left) of the cut.

    `box` [4] is the tight box, as `fa_rle.rle_box` returns it, `window` (left, top, right, bottom) in whole pixels of
    the image, and (top, left) are counted from its corner. Only the columns of the box are decoded, so that small
    objects cost little on a large image. The cut has no pixels where the window misses the box.

    Raises:
        ValueError: `rle` doesn't decode, or the window is not inside the image.
    """
    height, width = mask_size(rle)
    left, top, right, bottom = window
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"the window {window} is not inside an image of {width} x {height} pixels.")
    first, end = max(left, int(box[0])), min(right, int(box[2]))
    upper, lower = max(top, int(box[1])), min(bottom, int(box[3]))
    if first >= end or upper >= lower:
        return np.zeros((0, 0), dtype=bool), (0, 0)
    return decode_columns(rle, first, end)[upper:lower], (upper - top, first - left)
