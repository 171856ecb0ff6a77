"""Pieces of text and images that a teacher can read at once: to train on, held out, and how they become a batch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..data.batching import LengthGroupedBatchSampler, make_loader
from ..data.collators import DetectorCollator, ImageCollator, TextCollator
from ..data.examples import ImageExamples
from ..data.pieces import TextPieces, cut_into_pieces
from ..data.readers.tables import DataError
from ..options import DataOptions, LoopOptions
from .unlabelled import UnlabelledRows

logger = logging.getLogger(__name__)

MAX_VALIDATION_PIECES = 64
FEWEST_HELDOUT = 3
"""Fewest pieces of a kind to compare by: two have a single pair, and no correlation is defined over one number."""

Pieces = TextPieces | ImageExamples


@dataclass(frozen=True)
class UnlabelledData:
    """Pieces to distil a student on.

    `train(length)` gives pieces of at most so many tokens (images: all of one size, `length` is ignored); `heldout` has
    pieces that are never trained on, by the name of their kind; `validation` are some of the first kind, for the errors
    of the layers. `rows` is what all of them were made of.
    """

    train: Callable[[int], Pieces]
    validation: Pieces
    heldout: dict[str, Pieces]
    collate: Callable[[list[dict]], dict[str, Tensor]]
    rows: UnlabelledRows

    def __post_init__(self) -> None:
        for kind, pieces in self.heldout.items():
            if len(pieces) < FEWEST_HELDOUT:
                raise DataError(
                    f"{len(pieces)} held-out pieces of {kind!r} are too few to compare by, at least {FEWEST_HELDOUT} "
                    "are needed: there is not enough data, or --max_eval_samples is too small"
                )

    def heldout_loaders(self, loop: LoopOptions, accelerator: Accelerator) -> dict[str, DataLoader]:
        """Return a prepared loader of each kind of held-out pieces, which gives every piece once."""
        loaders = {}
        for kind, pieces in self.heldout.items():
            sampler = LengthGroupedBatchSampler(
                pieces.lengths,
                loop.per_device_eval_batch_size,
                max_tokens=loop.max_tokens_per_batch or None,
                shuffle=False,
                num_processes=accelerator.num_processes,
                kinds=getattr(pieces, "kinds", None),
            )
            loaders[kind] = accelerator.prepare(make_loader(pieces, sampler, self.collate, num_workers=0))
        return loaders


def build_text_pieces(
    rows: UnlabelledRows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    max_eval_samples: int | None = None,
    seed: int = 0,
    long_length: int | None = None,
) -> UnlabelledData:
    """Cut documents into pieces of at most `max_length` tokens.

    Args:
        rows: documents, as `unlabelled.read_text` gives them.
        tokenizer: the teacher's and the student's.
        max_length: tokens of a piece, special ones included.
        max_eval_samples: keep only this many held-out pieces of each kind, drawn by `seed`; None keeps all.
        long_length: hold out pieces of more than `max_length` tokens, and at most this many, as kinds of their own.

    Raises:
        DataError: a row holds no text, or there is too little of it.
    """
    limit = MAX_VALIDATION_PIECES if max_eval_samples is None else min(max_eval_samples, MAX_VALIDATION_PIECES)
    cut = {kind: cut_into_pieces(part, tokenizer, max_length) for kind, part in rows.heldout.items()}
    pieces: dict[str, Pieces] = {kind: TextPieces(part, max_eval_samples, seed) for kind, part in cut.items()}
    if long_length is not None:
        shortest = max_length + 1
        for kind, part in rows.heldout.items():
            long_rows = cut_into_pieces(part, tokenizer, long_length, shortest)
            if len(long_rows) < FEWEST_HELDOUT:
                logger.warning(
                    "%s: %d held-out texts have %d tokens or more, too few to compare", kind, len(long_rows), shortest
                )
            else:
                name = f"{kind}, {shortest:,} to {long_length:,} tokens"
                pieces[name] = TextPieces(long_rows, limit, seed)
    return UnlabelledData(
        train=lambda length: TextPieces(cut_into_pieces(rows.train, tokenizer, length)),
        validation=TextPieces(next(iter(cut.values())), limit, seed),
        heldout=pieces,
        collate=TextCollator(tokenizer),
        rows=rows,
    )


def build_image_pieces(
    rows: UnlabelledRows, processor: BaseImageProcessor, num_patches: int | None, data: DataOptions, seed: int = 0
) -> UnlabelledData:
    """Prepare images, as `unlabelled.read_images` gives them; each of them is one piece.

    Args:
        num_patches: patches of each image, the most of one where images keep their shapes; None for a detector, which
            reads padded batches.
        data: how many held-out ones to keep, and whether the train images are cropped and mirrored, by `seed`.
    """
    collate = ImageCollator() if num_patches else DetectorCollator()
    length = num_patches or 1
    ((kind, heldout),) = rows.heldout.items()
    kept, validation = (
        ImageExamples(heldout.select(range(min(limit or len(heldout), len(heldout)))), processor, length)
        for limit in (data.max_eval_samples, MAX_VALIDATION_PIECES)
    )
    pieces = ImageExamples(
        rows.train, processor, length, random_crop=data.random_crop, random_flip=data.random_flip, seed=seed
    )
    return UnlabelledData(lambda length: pieces, validation, {kind: kept}, collate, rows)
