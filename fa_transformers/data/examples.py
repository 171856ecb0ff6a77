"""Examples of each split: tokenized documents, or images that are processed when asked for, with their lengths."""

import math
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..models import FAViTConfig, FAViTImageProcessor
from ..options import DataOptions, LoopOptions, ModelOptions
from .collators import ImageCollator, TextCollator
from .labelled import LabelledData
from .readers.images import convert_image, read_sizes
from .readers.streams import DocumentStream
from .tokenizing import tokenize_documents


class TokenizedRows(torch.utils.data.Dataset):
    """Rows of token ids; `lengths`, in tokens, are the column "length"."""

    def __init__(self, rows: datasets.Dataset):
        self.lengths = rows.with_format("numpy")["length"][:]
        self._rows = rows.remove_columns("length")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return self._rows[index]


class TextExamples(TokenizedRows):
    """Tokenized documents of one split; `lengths` in tokens.

    In the first `short_epochs` epochs a document is cut to `short_length` tokens; the closing token stays the last.
    """

    def __init__(self, tokenized: datasets.Dataset, *, short_epochs: int = 0, short_length: int = 0):
        super().__init__(tokenized)
        self._short_epochs, self._short_length, self._epoch = short_epochs, short_length, 0

    def set_epoch(self, epoch: int) -> None:
        """Give the examples as epoch number `epoch`, from 0 on, has them."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict:
        row = super().__getitem__(index)
        if self._epoch >= self._short_epochs or self.lengths[index] <= self._short_length:
            return row
        kept = self._short_length - 1
        return {name: value if name == "label" else value[:kept] + value[-1:] for name, value in row.items()}


class ImageExamples(torch.utils.data.Dataset):
    """Images of one split, processed when asked for; `lengths` in patches.

    With a `FAViTImageProcessor` each image has the grid of patches that its own shape asks for, a crop of it as well,
    and `kinds` numbers the grids; with any other processor all images have `num_patches`, and `kinds` is None.

    Crops and mirror images are drawn from (seed, epoch, index), so that they don't depend on the order in which images
    are asked for.
    """

    def __init__(
        self,
        images: datasets.Dataset,
        processor: BaseImageProcessor,
        num_patches: int,
        *,
        random_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
    ):
        self.lengths = [num_patches] * len(images)
        self.kinds: list[int] | None = None
        self._grids: list[tuple[int, int]] | None = None
        if isinstance(processor, FAViTImageProcessor):
            self._grids = [processor.grid_of(*size) for size in read_sizes(images)]
            self.lengths = [math.prod(grid) for grid in self._grids]
            numbers = {grid: number for number, grid in enumerate(sorted(set(self._grids)))}
            self.kinds = [numbers[grid] for grid in self._grids] if len(numbers) > 1 else None
        self._images, self._processor, self._seed, self._epoch = images, processor, seed, 0
        self._random_crop, self._random_flip = random_crop, random_flip

    def set_epoch(self, epoch: int) -> None:
        """Give the examples as epoch number `epoch`, from 0 on, has them."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict:
        row = self._images[index]
        image = convert_image(row["image"])
        random = np.random.default_rng([self._seed, self._epoch, index])
        if self._random_crop:
            image = crop_randomly(image, random)
        if self._random_flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        grid = {} if self._grids is None else {"grid": self._grids[index]}
        processed = self._processor(images=image, return_tensors="pt", **grid)
        kept = [name for name in ("pixel_values", "pixel_mask") if name in processed]
        return {name: processed[name][0] for name in kept} | {name: row[name] for name in ("label",) if name in row}


def count_patches(image_size: int, config: FAViTConfig) -> int:
    """Return the number of patches of a square image of `image_size` pixels a side, incomplete ones included."""
    return math.prod(-(-image_size // side) for side in config.patch_shape)


def crop_randomly(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return a crop of 60 to 100 % of the area with sides in a ratio from 3:4 to 4:3 times the image's own."""
    area, log_ratio = random.uniform(0.6, 1.0), random.uniform(np.log(3 / 4), np.log(4 / 3))
    width = min(image.width, max(1, round(image.width * (area * np.exp(log_ratio)) ** 0.5)))
    height = min(image.height, max(1, round(image.height * (area / np.exp(log_ratio)) ** 0.5)))
    left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def build_examples(
    labelled: LabelledData,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    num_tokens: int,
    task: str,
    data: DataOptions,
    model: ModelOptions,
    loop: LoopOptions,
) -> tuple[dict[str, torch.utils.data.Dataset | DocumentStream], TextCollator | ImageCollator]:
    """Return the examples of each split, "unlabelled" among them where there are such, and the collator of batches.

    Args:
        labelled: the data, as `load_data` gives it.
        processor: the tokenizer for text, the image processor for images.
        num_tokens: for text the longest document in tokens, for images the (most) patches of one.
        task: "text-classification" or "image-classification".
        data, model, loop: the run's options, resolved.

    Raises:
        DataError: with `model.strict_length`, a document is longer than `num_tokens`.
    """
    if task == "text-classification":
        return _build_text_examples(labelled, processor, num_tokens, data, model, loop)
    augment: dict[str, Any] = {"random_crop": data.random_crop, "random_flip": data.random_flip, "seed": loop.seed}
    examples: dict[str, torch.utils.data.Dataset | DocumentStream] = {
        split: ImageExamples(part, processor, num_tokens, **(augment if split == "train" else {}))
        for split, part in _parts_of(labelled).items()
    }
    return examples, ImageCollator(labelled)


def _parts_of(labelled: LabelledData) -> dict[str, datasets.Dataset]:
    unlabelled = {} if labelled.unlabelled is None else {"unlabelled": labelled.unlabelled}
    return {str(split): part for split, part in labelled.dataset.items()} | unlabelled


def _build_text_examples(
    labelled: LabelledData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    data: DataOptions,
    model: ModelOptions,
    loop: LoopOptions,
) -> tuple[dict[str, torch.utils.data.Dataset | DocumentStream], TextCollator]:
    splits = {split: part for split, part in _parts_of(labelled).items() if split != "train" or labelled.stream is None}
    tokenized = tokenize_documents(
        datasets.DatasetDict(splits),
        tokenizer,
        max_length,
        strict_length=model.strict_length,
        num_proc=data.preprocessing_num_workers,
        overwrite_cache=data.overwrite_cache,
    )
    short = {"short_epochs": loop.short_epochs, "short_length": loop.short_length}
    examples: dict[str, torch.utils.data.Dataset | DocumentStream] = {
        split: TextExamples(part, **(short if split == "train" else {})) for split, part in tokenized.items()
    }
    if labelled.stream is not None:
        examples["train"] = DocumentStream(labelled.stream, tokenizer, max_length, model.strict_length)
    return examples, TextCollator(tokenizer, labelled, loop.packing)
