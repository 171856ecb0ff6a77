"""Pictures with objects on their way to the network: random views for training, whole pictures for scores, batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor

from ..models.image_processing_fa_dense import resized_size
from .augment import GREY, AugmentOptions, Example, augment, labels_of, view
from .readers.objects import DenseImage

PLACE_PX = 64
"""Pixels that count as one token in figures of speed: one place of the heat map."""


@dataclass(frozen=True)
class DenseRow:
    """A view of the picture in `row` of its split, and the (height, width) of the picture itself."""

    row: int
    example: Example
    original_size: tuple[int, int]


class DenseExamples(torch.utils.data.Dataset):
    """Pictures at the size that a processor's `size` gives them; with `views` a random view of each.

    Views of a `crop_size` are filled up to it. What is drawn depends on seed, epoch and index alone, so that a resumed
    run sees the same. Masks are run-length encoded until a view is made. `lengths` are in places of the heat map.
    """

    def __init__(
        self,
        images: Sequence[DenseImage],
        size: dict[str, int] | None = None,
        views: AugmentOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.size, self.views, self.seed = list(images), size, views, seed
        side = views.crop_size if views else None
        sizes = [(side, side) if side else resized_size(image.size, size) for image in self.images]
        self.lengths = [max(1, height * width // PLACE_PX) for height, width in sizes]
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the views of `epoch`."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> DenseRow:
        image = self.images[index]
        height, width = image.size
        size = resized_size(image.size, self.size)
        if self.views is None:
            return DenseRow(index, view(image, (0, 0, width, height), size), image.size)
        factor = size[0] / height
        views = replace(self.views, scale=(factor * self.views.scale[0], factor * self.views.scale[1]))
        example = augment(image, views, (self.seed, self._epoch, index))
        if self.views.crop_size is not None:  # of one size, else the network would run each view by itself
            example = fill_up(example, self.views.crop_size)
        return DenseRow(index, example, image.size)


def fill_up(example: Example, side: int) -> Example:
    """Return a view with grey on its right and below it, up to a square of `side` pixels, where it is smaller."""
    height, width = example.pixels.shape[:2]
    if height >= side and width >= side:
        return example
    edges = ((0, max(0, side - height)), (0, max(0, side - width)))
    pixels = np.pad(example.pixels, (*edges, (0, 0)), constant_values=GREY)
    masks = None if example.masks is None else np.pad(example.masks, ((0, 0), *edges))
    ignore = None if example.ignore is None else np.pad(example.ignore, edges)
    return replace(example, pixels=pixels, masks=masks, ignore=ignore)


class DenseCollator:
    """Makes batches of views: what the image processor gives, and labels as DETR's.

    Labels have `row`, the picture's number in its split, and `orig_size` too; masks only with `with_masks`.
    """

    def __init__(self, processor: BaseImageProcessor, with_masks: bool) -> None:
        self.processor, self.with_masks = processor, with_masks

    def __call__(self, rows: Sequence[DenseRow]) -> dict[str, Any]:
        batch = dict(self.processor([row.example.pixels for row in rows], do_resize=False, return_tensors="pt"))
        return batch | {"labels": [self._labels(row) for row in rows]}

    def _labels(self, row: DenseRow) -> dict[str, torch.Tensor]:
        labels = labels_of(row.example)
        if not self.with_masks:
            labels.pop("masks", None)
        labels |= {"row": np.array(row.row), "orig_size": np.array(row.original_size)}
        return {name: torch.from_numpy(np.asarray(value)) for name, value in labels.items()}
