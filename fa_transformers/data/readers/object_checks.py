"""The checks of one object in COCO's form: its box, area, crowd flag and mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...models.fa_rle import compress_runs, encode_polygons, mask_size, rle_area, rle_box, run_lengths
from ..boxes_and_masks import box_areas, box_ious, boxes_from_coco, clip_boxes

ROUNDING_PX = 1.0
"""Pixels by which a box may stick out of its image, as roundings make it do; they are cut off."""
COMPARED_AREA = 64.0
"""Square pixels from which on a box and a mask of one object must agree; roundings decide about smaller ones."""


def check_object(record: Mapping[str, Any], size: tuple[int, int], masks: bool) -> tuple[Any, ...]:
    """Return box [4], area, crowd flag, RLE and its tight box [4] (both None without `masks`) of one object.

    A missing box is the mask's tight one; a missing area, or one of 0, is the mask's, else the box's.

    Raises:
        ValueError: one of them is missing, broken, empty, outside the image of `size` (height, width), or contradicts
            another.
    """
    rle = read_mask(record.get("segmentation"), size) if masks else None
    tight = None if rle is None else rle_box(rle)
    box = tight if record.get("bbox") is None else read_box(record["bbox"], size)
    if box is None:
        raise ValueError("there is no bbox: give (left, top, width, height) in pixels")
    if tight is not None and min(box_areas(np.stack([box, tight]))) >= COMPARED_AREA:
        overlap = float(box_ious(box[None], tight[None])[0, 0])
        if overlap < 0.5:
            raise ValueError(
                f"bbox {shorten(record['bbox'])} and mask overlap by {overlap:.2f}: the mask's box is (left, top, "
                f"width, height) {shorten([*tight[:2], *(tight[2:] - tight[:2])])}"
            )
    crowd = record.get("iscrowd") or 0
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd must be 0 or 1, got {crowd!r}")
    area = record.get("area")
    if area is not None and not (_is_number(area) and area >= 0):
        raise ValueError(f"area must be a number of square pixels, got {area!r}")
    if not area:
        area = rle_area(rle) if rle is not None else box_areas(box[None])[0]
    return box, float(area), bool(crowd), rle, tight


def read_box(box: Any, size: tuple[int, int]) -> np.ndarray:
    """Return (left, top, right, bottom), float32 [4], of COCO's (left, top, width, height).

    Raises:
        ValueError: it is no list of four finite numbers, has no area, or sticks out of the image by more than
            `ROUNDING_PX`.
    """
    is_list = isinstance(box, Sequence | np.ndarray) and not isinstance(box, str | bytes)
    if not is_list or len(box) != 4 or not all(_is_number(number) for number in box):
        raise ValueError(f"bbox must be four finite numbers, (left, top, width, height) in pixels, got {shorten(box)}")
    if min(box[2:]) <= 0:
        raise ValueError(f"bbox {shorten(box)} is empty: its width and height must be above 0")
    edges = boxes_from_coco([box])
    inside = clip_boxes(edges, *size)
    if np.abs(edges - inside).max() > ROUNDING_PX or not box_areas(inside)[0]:
        raise ValueError(
            f"bbox {shorten(box)}, (left, top, width, height), is not inside the image of {size[1]} x {size[0]} pixels"
        )
    return inside[0]


def read_mask(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return the compressed RLE of a list of polygons or of either kind of RLE.

    Raises:
        ValueError: it is none of these, doesn't decode, is empty, or is for an image of another size than `size`.
    """
    if isinstance(segmentation, Mapping):
        if mask_size(segmentation) != size:
            height, width = mask_size(segmentation)
            raise ValueError(f"the mask has {width} x {height} pixels, and the image {size[1]} x {size[0]}")
        rle = {"size": list(size), "counts": compress_runs(run_lengths(segmentation))}
    elif isinstance(segmentation, Sequence) and not isinstance(segmentation, str) and len(segmentation):
        if _is_number(segmentation[0]):
            raise ValueError(
                "segmentation must be a list of polygons, each a list of numbers, got one list of numbers: put it into"
                " a list"
            )
        rle = encode_polygons(segmentation, *size)
    else:
        raise ValueError(
            f"there is no mask: segmentation must be a list of polygons or an RLE, got {shorten(segmentation)}"
        )
    if not rle_area(rle):
        raise ValueError("the mask is empty: no pixel of the image is inside")
    return rle


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def shorten(value: Any) -> str:
    """Return a value for a message, four of a list's entries at most."""
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        return f"[{', '.join(f'{x:g}' if _is_number(x) else repr(x) for x in value[:4])}{', ...' * (len(value) > 4)}]"
    return repr(value)[:60]
