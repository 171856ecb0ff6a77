"""Texts and images on their way to a model: checked and prepared a window at a time, batched under a token budget."""

import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..data.readers.files import TextError, check_text
from ..data.readers.images import convert_image, open_image
from ..data.readers.tables import DataError
from ..data.tokenizing import tokenize_texts
from ..models import FAViTConfig

WINDOW_ITEMS = 512
"""Most items of a window, in which batches of similar length are found."""
WINDOW_CHARACTERS = 2**21
"""Characters at which a window of texts ends: about half a million tokens, some 50 MiB as Python's integers."""
WINDOW_IMAGE_BYTES = 2**27
"""Bytes of processed images at which a window of them ends."""
DECODING_THREADS = 4
Item = TypeVar("Item")


class Prepared(NamedTuple):
    """An item as the model takes it, or why it can't.

    `features` are the lists of a tokenizer or {"pixel_values": [channels, height, width]}; `num_tokens` what the model
    will read, and `full_length` what there is, at least; `error` is None where there are features.
    """

    features: dict[str, Any]
    num_tokens: int = 0
    full_length: int = 0
    error: str | None = None

    def cut(self, num_tokens: int, closes: bool) -> "Prepared":
        """Return the beginning of a text as the tokenizer makes it of `num_tokens`; `closes`: its last token stays."""
        if self.num_tokens <= num_tokens:
            return self
        kept = num_tokens - closes
        features = {name: ids[:kept] + ids[len(ids) - closes :] for name, ids in self.features.items()}
        return Prepared(features, num_tokens, self.full_length)


class TextInputs:
    """Texts for a model, tokenized many at a time.

    Args:
        tokenizer: makes the tokens.
        limit: tokens that a document is cut to, special ones included; None reads all.
        strict_length: a longer document is an error instead.
        padding_id: token that shorter rows of a batch are filled up with, where the tokenizer has none.
    """

    noun, window_limit = "text", WINDOW_CHARACTERS

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limit: int | None, strict_length: bool, padding_id: int | None
    ):
        self.tokenizer, self.limit, self.strict_length = tokenizer, limit, strict_length
        own = tokenizer.pad_token_id
        self._padding_id = own if own is not None else padding_id or 0

    def weigh(self, item: Any) -> int:
        """Return the characters of a text."""
        return len(item) if isinstance(item, str) else 1

    def prepare(self, items: Sequence[Any]) -> list[Prepared]:
        """Check and tokenize texts."""
        prepared: list[Prepared | None] = []
        for item in items:
            try:
                check_text(item)
                prepared.append(None)
            except TextError as error:
                prepared.append(Prepared({}, error=str(error)))
        sound = [item for item, problem in zip(items, prepared, strict=True) if problem is None]
        tokenized = iter(self._tokenize(sound) if sound else ())
        return [next(tokenized) if problem is None else problem for problem in prepared]

    def _tokenize(self, texts: list[str]) -> Iterator[Prepared]:
        limit = sys.maxsize if self.limit is None else self.limit
        columns = tokenize_texts(self.tokenizer, texts, limit)
        lengths, full_lengths = columns.pop("length"), columns.pop("full_length")
        for index, (length, full_length) in enumerate(zip(lengths, full_lengths, strict=True)):
            if not length:
                yield Prepared({}, error="the tokenizer finds no token in the document; give it a text")
            elif self.strict_length and abs(full_length) > limit:
                least = "at least " if full_length < 0 else ""
                yield Prepared(
                    {},
                    error=f"the document has {least}{abs(full_length)} tokens, the limit is {limit}: raise max_length, "
                    "shorten it, or leave strict_length off to truncate",
                )
            else:
                features = {name: values[index] for name, values in columns.items() if name != "attention_mask"}
                yield Prepared(features, length, abs(full_length))

    def shape_of(self, prepared: Prepared) -> tuple[int, ...]:
        """Return what must be equal in a batch: nothing, as texts are padded."""
        return ()

    def collate(self, examples: Sequence[Prepared]) -> dict[str, Tensor]:
        """Return the tokens of documents, padded on the right to the longest, with a mask if any is padded."""
        longest = max(example.num_tokens for example in examples)
        batch = {}
        for name in examples[0].features:
            rows = np.full((len(examples), longest), self._padding_id if name == "input_ids" else 0, np.int64)
            for row, example in zip(rows, examples, strict=True):
                row[: example.num_tokens] = example.features[name]
            batch[name] = torch.from_numpy(rows)
        lengths = torch.tensor([example.num_tokens for example in examples])
        if int(lengths.min()) < longest:
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch


class ImageInputs:
    """Images for a model, decoded in a few threads and brought to the size that its processor makes.

    An image is Pillow's, an array [height, width, channels] of bytes, the path of a file, or a file's bytes.

    Args:
        processor: the model's image processor.
        config: says patches, channels and the side of an image.
    """

    noun, limit, strict_length = "image", None, False

    def __init__(self, processor: BaseImageProcessor, config: FAViTConfig):
        self.processor, self.config = processor, config
        side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
        self.window_limit = max(1, WINDOW_IMAGE_BYTES // (4 * config.num_channels * side**2))

    def weigh(self, item: Any) -> int:
        """Return 1: a window holds so many images as their pixels allow."""
        return 1

    def prepare(self, items: Sequence[Any]) -> list[Prepared]:
        """Decode and process images."""
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            return list(pool.map(self._prepare_one, items))

    def _prepare_one(self, item: Any) -> Prepared:
        try:
            image = convert_image(_open(item), self.config.num_channels)
        except (OSError, DataError) as error:
            return Prepared({}, error=str(error))
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        sides = zip(pixels.shape[1:], self.config.patch_shape, strict=True)
        num_tokens = 1 + self.config.num_register_tokens + math.prod(-(-side // patch) for side, patch in sides)
        return Prepared({"pixel_values": pixels}, num_tokens, num_tokens)

    def shape_of(self, prepared: Prepared) -> tuple[int, ...]:
        """Return what must be equal in a batch: the size in pixels."""
        return tuple(prepared.features["pixel_values"].shape)

    def collate(self, examples: Sequence[Prepared]) -> dict[str, Tensor]:
        """Return images of one size as a batch."""
        return {"pixel_values": torch.stack([example.features["pixel_values"] for example in examples])}


def _open(item: Any) -> Image.Image:
    if isinstance(item, str | Path):
        if not Path(item).is_file():
            raise DataError(f"{item}: there is no such file")
        return open_image(item)
    if isinstance(item, bytes):
        try:
            image = Image.open(io.BytesIO(item))
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"the bytes are no image that Pillow can read: {error}") from error
        return ImageOps.exif_transpose(image)
    if isinstance(item, np.ndarray):
        try:
            return Image.fromarray(item)
        except (TypeError, ValueError, KeyError) as error:
            raise DataError(f"the array of shape {item.shape} and type {item.dtype} is no image: {error}") from error
    if not isinstance(item, Image.Image):
        raise DataError(f"an image must be Pillow's, an array, a path or a file's bytes, got {type(item).__name__}")
    return ImageOps.exif_transpose(item)


def windows(items: Iterable[Item], weigh: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yield the items in lists, which end where they weigh `limit` or hold `WINDOW_ITEMS`; each item is asked for once.

    Where a list begins depends on the items since the last one alone, so that a later start there gives the same lists.
    """
    window: list[Item] = []
    weight = 0
    for item in items:
        window.append(item)
        weight += weigh(item)
        if weight >= limit or len(window) == WINDOW_ITEMS:
            yield window
            window, weight = [], 0
    if window:
        yield window


def prepared_ahead(
    windows: Iterable[list[Item]], prepare: Callable[[list[Item]], list[Prepared]]
) -> Iterator[tuple[list[Item], list[Prepared]]]:
    """Yield each window and what `prepare` makes of it, the next one being prepared while the caller has this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[Item], Future] | None = None
        for window in windows:
            following = window, pool.submit(prepare, window)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()


def batches(prepared: Sequence[Prepared], inputs: TextInputs | ImageInputs, max_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of batches of equal shape and similar length, the longest first: `max_tokens` with padding.

    A single item may have more. Items with errors are in none.
    """
    sound = [index for index, example in enumerate(prepared) if example.error is None]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(sound, key=lambda index: -prepared[index].num_tokens):
        by_shape.setdefault(inputs.shape_of(prepared[index]), []).append(index)
    for indices in by_shape.values():
        while indices:
            size = max(1, max_tokens // prepared[indices[0]].num_tokens)
            yield indices[:size]
            indices = indices[size:]
