"""Random views of pictures with objects: crop, scale, flip, colour, with boxes that stay those of the masks.

Every step returns a new example and leaves its input as it was. Where there are masks, boxes are computed from them
after every step; else they are cut to the picture. An object of which too little is left is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..models.fa_rle import tight_boxes
from .boxes_and_masks import box_areas, boxes_to_fractions, clip_boxes, decode_window
from .readers.objects import DenseImage

Window = tuple[int, int, int, int]
"""(left, top, right, bottom) in whole pixels."""
CROP_TRIES = 4
GREY = 128


@dataclass(frozen=True)
class Example:
    """A view of a picture and its n objects.

    Args:
        pixels: uint8 [H, W, 3].
        labels: int64 [n].
        boxes: float32 [n, 4] in pixel edges of the view; the tight boxes of the masks where there are masks.
        masks: bool [n, H, W], or None.
        visible: float32 [n], the share of the object's area in the picture that the view shows.
        ignore: bool [H, W], where crowds are, in which found objects are no mistake; None where there are none.
    """

    pixels: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None
    visible: np.ndarray
    ignore: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """The random views of a picture.

    Args:
        crop_size: side of the view in pixels; a smaller picture gives a smaller view. None takes the whole picture.
        scale: (lowest, highest) factor by which the picture is resized before the crop, drawn evenly on a log scale.
        flip: probability of a view mirrored left to right; 0 where that changes a class, as for digits.
        min_visible: share of an object below which it is dropped.
        colour: largest relative change of brightness, contrast, saturation and each channel.
        swap_colours: also permute the channels and invert the picture, where no class has a colour of its own.
    """

    crop_size: int | None = None
    scale: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    min_visible: float = 0.3
    colour: float = 0.2
    swap_colours: bool = False

    def __post_init__(self) -> None:
        if self.crop_size is not None and self.crop_size < 1:
            raise ValueError(f"crop_size must be at least 1 pixel, got {self.crop_size}.")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two factors above 0, the lower first, got {self.scale}.")
        for name in ("flip", "min_visible", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")


def augment(
    image: DenseImage, options: AugmentOptions, seed: Sequence[int], picture: Image.Image | None = None
) -> Example:
    """Return a random view of a picture and of its objects; crowds are none, but a region to ignore.

    Args:
        image: the picture and its objects.
        options: what is drawn.
        seed: numbers that decide every draw, such as (seed of the run, epoch, index of the picture).
        picture: the decoded picture, where the caller keeps it; it stays as it is.
    """
    random = np.random.default_rng(list(seed))
    window, size = draw_window(image, options, random)
    example = view(image, window, size, options.min_visible, picture)
    if random.random() < options.flip:
        example = flip(example)
    return change_colours(example, random, options.colour, options.swap_colours)


def draw_window(
    image: DenseImage, options: AugmentOptions, random: np.random.Generator
) -> tuple[Window, tuple[int, int]]:
    """Return a random window of a picture, and the (height, width) that it is resized to.

    Of a few windows the first with the centre of an object is taken, so that sparse pictures don't give empty views.
    """
    height, width = image.size
    factor = float(np.exp(random.uniform(*np.log(options.scale))))
    sides = [height, width] if options.crop_size is None else [max(1, round(options.crop_size / factor))] * 2
    cut_height, cut_width = min(height, sides[0]), min(width, sides[1])
    centres = (image.mask_boxes[:, :2] + image.mask_boxes[:, 2:]) / 2
    for _ in range(CROP_TRIES):
        top = int(random.integers(height - cut_height + 1))
        left = int(random.integers(width - cut_width + 1))
        window = (left, top, left + cut_width, top + cut_height)
        if ((centres >= window[:2]) & (centres < window[2:])).all(axis=1).any():
            break
    size = tuple(
        # Exactly, where the picture is large enough: rounding twice would give views one pixel apart.
        options.crop_size if options.crop_size is not None and cut == side else max(1, round(cut * factor))
        for cut, side in zip((cut_height, cut_width), sides, strict=True)
    )
    return window, (size[0], size[1])


def view(
    image: DenseImage,
    window: Window,
    size: tuple[int, int],
    min_visible: float = 0.0,
    picture: Image.Image | None = None,
) -> Example:
    """Return what a window of a picture shows, resized to `size` (height, width); only masks in it are decoded.

    It is what `crop` and `resize` make of the whole picture. Crowds are a region to ignore.
    """
    picture = image.open() if picture is None else picture
    cut = picture.crop(window)
    if cut.size != size[::-1]:
        cut = cut.resize(size[::-1], Image.Resampling.BILINEAR)
    inside = _cut_boxes(image.mask_boxes, window)
    chosen = np.flatnonzero((box_areas(inside) > 0) & ~image.is_crowd)
    height, width = window[3] - window[1], window[2] - window[0]
    if image.rles is None:
        masks = None
        visible = box_areas(inside[chosen]) / box_areas(image.boxes[chosen])
    else:
        masks = np.zeros((len(chosen), *size), dtype=bool)
        visible = np.zeros(len(chosen), dtype=np.float32)
        rows, columns = _nearest(height, size[0]), _nearest(width, size[1])
        for index, number in enumerate(chosen):
            part, corner = decode_window(image.rles[number], image.mask_boxes[number], window)
            visible[index] = part.sum() / max(1, image.mask_areas[number])
            _paste_resized(masks[index], part, corner, rows, columns)
    example = Example(
        pixels=np.array(cut),
        labels=image.labels[chosen],
        boxes=_scale_boxes(inside[chosen], (height, width), size),
        masks=masks,
        visible=np.minimum(1, visible).astype(np.float32),
        ignore=_view_crowds(image, np.flatnonzero((box_areas(inside) > 0) & image.is_crowd), window, size),
    )
    return _drop(example, min_visible)


def _view_crowds(image: DenseImage, crowds: np.ndarray, window: Window, size: tuple[int, int]) -> np.ndarray | None:
    """The part of the crowds with these numbers, masks or else boxes, that a window shows, resized to `size`."""
    if not len(crowds):
        return None
    rows, columns = _nearest(window[3] - window[1], size[0]), _nearest(window[2] - window[0], size[1])
    ignore = np.zeros(size, dtype=bool)
    for number in crowds:
        mask = np.zeros(size, dtype=bool)
        if image.rles is None:
            left, top, right, bottom = _cut_boxes(image.boxes[number], window).round().astype(int)
            part, corner = np.ones((bottom - top, right - left), dtype=bool), (top, left)
        else:
            part, corner = decode_window(image.rles[number], image.mask_boxes[number], window)
        _paste_resized(mask, part, corner, rows, columns)
        ignore |= mask
    return ignore


def crop(example: Example, window: Window, min_visible: float = 0.0) -> Example:
    """Return what a window of an example shows; objects of which less than `min_visible` is left are dropped.

    Raises:
        ValueError: the window is not inside.
    """
    height, width = example.pixels.shape[:2]
    left, top, right, bottom = window
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"the window {window} is not inside an example of {width} x {height} pixels.")
    boxes = _cut_boxes(example.boxes, window)
    if example.masks is None:
        masks = None
        before, after = box_areas(example.boxes), box_areas(boxes)
    else:
        masks = example.masks[:, top:bottom, left:right]
        before, after = example.masks.sum(axis=(1, 2)), masks.sum(axis=(1, 2))
    visible = example.visible * (after / np.maximum(before, 1e-6))
    pixels = example.pixels[top:bottom, left:right]
    ignore = None if example.ignore is None else example.ignore[top:bottom, left:right]
    return _drop(Example(pixels, example.labels, boxes, masks, visible.astype(np.float32), ignore), min_visible)


def resize(example: Example, height: int, width: int) -> Example:
    """Return an example of another size: pixels are interpolated and smoothed, a mask takes the nearest pixel's."""
    before = example.pixels.shape[:2]
    picture = Image.fromarray(example.pixels).resize((width, height), Image.Resampling.BILINEAR)
    rows, columns = _nearest(before[0], height), _nearest(before[1], width)
    masks, ignore = (
        None if part is None else part[..., rows, :][..., columns] for part in (example.masks, example.ignore)
    )
    boxes = _scale_boxes(example.boxes, before, (height, width))
    return _drop(replace(example, pixels=np.array(picture), boxes=boxes, masks=masks, ignore=ignore))


def flip(example: Example) -> Example:
    """Return an example mirrored left to right."""
    width = example.pixels.shape[1]
    boxes = example.boxes.copy()
    boxes[:, [0, 2]] = width - example.boxes[:, [2, 0]]
    masks, ignore = (
        None if part is None else np.ascontiguousarray(part[..., ::-1]) for part in (example.masks, example.ignore)
    )
    pixels = np.ascontiguousarray(example.pixels[:, ::-1])
    return replace(example, pixels=pixels, boxes=boxes, masks=masks, ignore=ignore)


def change_colours(example: Example, random: np.random.Generator, strength: float, swap: bool = False) -> Example:
    """Return an example with other colours: saturation, contrast, brightness and channels changed by up to `strength`.

    With `swap` the channels are permuted too, and every second picture is inverted.
    """
    saturation, contrast, brightness = 1 + random.uniform(-strength, strength, size=3)
    gains = brightness * (1 + random.uniform(-strength, strength, size=(3, 1)) / 2)
    values = gains * (GREY + contrast * (np.arange(256) - GREY))
    picture = Image.fromarray(example.pixels)
    if swap:
        bands = picture.split()
        picture = Image.merge("RGB", [bands[index] for index in random.permutation(3)])
        values = 255 - values if random.integers(2) else values
    table = np.clip(np.round(values), 0, 255).astype(int)
    grey = picture.convert("L").convert("RGB")
    picture = Image.blend(grey, picture, float(saturation)).point(table.ravel().tolist())
    return replace(example, pixels=np.array(picture))


def labels_of(example: Example) -> dict[str, Any]:
    """Return the labels of an example as DETR's: class_labels [n], boxes [n, 4] as fractions, any masks and ignore."""
    labels = {"class_labels": example.labels, "boxes": boxes_to_fractions(example.boxes, *example.pixels.shape[:2])}
    given = {"masks": example.masks, "ignore": example.ignore}
    return labels | {name: part for name, part in given.items() if part is not None}


def _cut_boxes(boxes: np.ndarray, window: Window) -> np.ndarray:
    """Boxes [n, 4] as seen from a window's corner, cut to the window."""
    left, top, right, bottom = window
    return clip_boxes(boxes - np.array([left, top, left, top], dtype=np.float32), bottom - top, right - left)


def _scale_boxes(boxes: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    factors = np.array([after[1] / before[1], after[0] / before[0]] * 2, dtype=np.float32)
    return clip_boxes(boxes * factors, *after)


def _nearest(before: int, after: int) -> np.ndarray:
    """The pixel of `before` in whose middle's neighbourhood each of `after` pixels has its own middle."""
    return ((np.arange(after) + 0.5) * (before / after)).astype(np.int64).clip(max=before - 1)


def _paste_resized(
    mask: np.ndarray, part: np.ndarray, corner: tuple[int, int], rows: np.ndarray, columns: np.ndarray
) -> None:
    """Fill `mask` with `part`, at `corner` of a window whose nearest rows and columns are given."""
    (top, bottom), (left, right) = (
        np.searchsorted(places, (start, start + side))
        for places, start, side in zip((rows, columns), corner, part.shape, strict=True)
    )
    mask[top:bottom, left:right] = part[rows[top:bottom] - corner[0]][:, columns[left:right] - corner[1]]


def _drop(example: Example, min_visible: float = 0.0) -> Example:
    """The example without objects of which nothing, or less than `min_visible`, is left; boxes are the masks'."""
    boxes = example.boxes if example.masks is None else tight_boxes(example.masks)
    kept = (box_areas(boxes) > 0) & (example.visible >= min_visible)
    masks = None if example.masks is None else example.masks[kept]
    ignore = example.ignore if example.ignore is not None and example.ignore.any() else None
    return Example(example.pixels, example.labels[kept], boxes[kept], masks, example.visible[kept], ignore)
