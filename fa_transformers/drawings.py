"""Pictures of objects: boxes, masks and names drawn on an image, and sheets of several, as PNGs."""

import colorsys
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import written_by_rename

GOLDEN_TURN = 0.618034
"""Step of the hue from class to class, which keeps any number of first classes apart."""
MASK_OPACITY = 0.45
FONT_PX = 12


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the colour of a class, RGB from 0 to 255."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_TURN % 1, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike | None = None,
    *,
    masks: np.ndarray | None = None,
    scores: Sequence[float] | np.ndarray | None = None,
) -> Image.Image:
    """Return a copy of an image with its n objects on it, and write it to `path` as a PNG if there is one.

    Args:
        image: in mode RGB, W x H pixels.
        boxes: [n, 4] as (left, top, right, bottom) in pixel edges.
        labels: [n] indices of `names`.
        masks: bool [n, H, W], laid over the image in the class's colour.
        scores: [n], printed beside the name.

    Raises:
        ValueError: the counts or the sizes of boxes, labels, masks and scores differ.
        OSError: the file can't be written.
    """
    counts = {len(boxes), len(labels)} | {len(each) for each in (masks, scores) if each is not None}
    if len(counts) != 1:
        raise ValueError(f"boxes, labels, masks and scores must be of one length, got {sorted(counts)}.")
    if masks is not None and np.shape(masks)[1:] != (image.height, image.width):
        raise ValueError(f"masks have {np.shape(masks)[1:]} pixels, and the image {(image.height, image.width)}.")
    pixels = np.array(image.convert("RGB"), dtype=np.float32)
    for index, label in enumerate(labels if masks is not None else ()):
        inside = masks[index] if masks is not None else ...
        pixels[inside] += MASK_OPACITY * (np.array(class_colour(int(label))) - pixels[inside])
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(FONT_PX)
    for index, (left, top, right, bottom) in enumerate(np.asarray(boxes, dtype=float).tolist()):
        colour = class_colour(int(labels[index]))
        # A rectangle's line is drawn on the pixels that its corners name, which are inside the box.
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour)
        text = names[int(labels[index])] + (f" {scores[index]:.2f}" if scores is not None else "")
        corner = (left + 1, top - FONT_PX - 3 if top > FONT_PX + 3 else bottom + 1)
        draw.rectangle(draw.textbbox(corner, text, font=font), fill=colour)
        draw.text(corner, text, fill="black", font=font)
    if path is not None:
        _save(drawn, path)
    return drawn


def draw_sheet(images: Sequence[Image.Image], num_columns: int, path: str | os.PathLike) -> None:
    """Write images side by side, in rows of `num_columns` and at their own size, to `path` as a PNG.

    Raises:
        ValueError: there are no images.
        OSError: the file can't be written.
    """
    if not images:
        raise ValueError("images is empty: a sheet needs at least one.")
    width, height = max(image.width for image in images), max(image.height for image in images)
    num_columns = min(num_columns, len(images))
    sheet = Image.new("RGB", (num_columns * width, -(-len(images) // num_columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % num_columns * width, index // num_columns * height))
    _save(sheet, path)


def _save(image: Image.Image, path: str | os.PathLike) -> None:
    with written_by_rename(path) as temporary:
        image.save(temporary, "PNG")
