"""Pictures of a detector's objects beside the true ones."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from ..data.readers.objects import DenseImage
from ..drawings import draw_objects, draw_sheet
from ..models.fa_rle import decode_mask
from .dense_scores import forward_pictures

logger = logging.getLogger(__name__)

NUM_PICTURES = 8
SHOWN_SCORE = 0.3
"""Probability from which on a found object is drawn."""


def draw_pictures(
    model: PreTrainedModel, processor: Any, images: Sequence[DenseImage], names: Sequence[str], folder: Path
) -> None:
    """Draw the first pictures of `images` into `folder`, each with its true objects left of those that were found.

    A picture is decoration: a failure is a warning.
    """
    for number, image in enumerate(images[:NUM_PICTURES], start=1):
        try:
            draw_picture(model, processor, image, names, folder / f"{number}.png")
        except Exception as error:  # whatever it is: the run is complete without the picture
            logger.warning("picture %d was not drawn: %s: %s", number, type(error).__name__, error)


def draw_picture(model: PreTrainedModel, processor: Any, image: DenseImage, names: Sequence[str], path: Path) -> None:
    """Write one picture with its true objects and those that were found, side by side."""
    (found,) = forward_pictures(model, processor, [image], SHOWN_SCORE)
    picture = image.open()
    masks = None if image.rles is None else image.masks()
    found_masks = None
    if found.rles is not None:
        found_masks = np.stack([decode_mask(rle) for rle in found.rles]) if found.rles else np.zeros((0, *image.size))
        found_masks = found_masks.astype(bool)
    panels: list[Image.Image] = [
        draw_objects(picture, image.boxes, image.labels, names, masks=masks),
        draw_objects(
            picture, np.asarray(found.boxes), np.asarray(found.labels), names, masks=found_masks,
            scores=np.asarray(found.scores),
        ),
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(panels, 2, path)
