"""The layout of a batch: one object tells every layer of a forward pass where the tokens lie.

A model makes its `Layout` once, from inputs that it checks on the way; encoder, layers, mixers, poolings and heads take
it as one argument and read the parts that concern them.

Shape letters: B batch, N tokens of all processes, n tokens of this one (N unless they are split), P patches.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from .fa_packed import PackedDocuments, pack
from .fa_sequence_parallel import Shard, split_tokens
from .fa_validation import check_chunk_size, check_mask


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of the tokens [B, n] of a forward pass. The default is a text of real tokens, taken all at once.

    Attributes:
        mask: bool [B, n], True = real; None: all are.
        grid: (rows, columns) of the patches, which come last: before them stand the prefix tokens (CLS, registers).
            None: text.
        documents: the documents of a packed batch, where B is 1. None: a sample is one document.
        shard: the split of the N tokens over the processes of a group. `mask` and `grid` then describe the part of this
            process, and `shard.mask` [B, N] all parts. None: all tokens are here.
        chunk_size: tokens of each sample that a layer works on at a time, without gradients. None: all.
    """

    mask: Tensor | None = None
    grid: tuple[int, int] | None = None
    documents: PackedDocuments | None = None
    shard: Shard | None = None
    chunk_size: int | None = None

    @property
    def whole_mask(self) -> Tensor | None:
        """The mask of the tokens of all processes: bool [B, N], or None."""
        return self.mask if self.shard is None else self.shard.mask

    def places(self) -> Tensor:
        """Number the tokens of each document from 0 at its first real one, gaps between real ones included: int [B, n].

        What stands before the first has its number, and what stands behind the last that of the last. Needs a mask.
        """
        assert self.mask is not None
        seen, total = self._count(self.mask)
        from_first_to_last = (seen > 0) & ((seen < total) | self.mask)
        return (self._count(from_first_to_last)[0] - 1).clamp(min=0)

    def _count(self, marks: Tensor) -> tuple[Tensor, Tensor]:
        """Count marks up to each token in its document, and in the whole document: bool [B, n] -> int [B, n] each."""
        if self.documents is not None:
            seen, total = self.documents.count(marks[0])
            return seen[None], total[self.documents.document_ids][None]
        seen = marks.cumsum(dim=1)
        return seen, seen[:, -1:]

    def num_prefix(self, num_tokens: int) -> int:
        """Return how many of `num_tokens` tokens stand before the patches; 0 for text."""
        return 0 if self.grid is None else num_tokens - prod(self.grid)

    def to(self, device: Any, non_blocking: bool = False) -> "Layout":
        """Return the layout with mask and documents on another device; Accelerate's hooks move a layer's inputs so."""
        return Layout(
            None if self.mask is None else self.mask.to(device, non_blocking=non_blocking),
            self.grid,
            None if self.documents is None else self.documents.to(device),
            self.shard,
            self.chunk_size,
        )


PLAIN = Layout()
"""The layout of a text of real tokens."""


def lay_out_text(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | PackedDocuments | None = None,
    chunk_size: int | None = None,
) -> Layout:
    """Check the arguments of a text model and lay its tokens out.

    Args:
        tokens: ids int [B, N] or embeddings [B, N, C].
        attention_mask: [B, N] of zeros and ones, 1 = real; zeros between ones are tokens that nothing attends to.
        cu_seqlens: int [documents + 1], the running total of lengths from 0 to N, for a packed batch.
        chunk_size: tokens of each document to work on at a time.

    Raises:
        ValueError: an argument doesn't fit; the message names it.
    """
    check_chunk_size(chunk_size, cu_seqlens)
    mask = check_mask(attention_mask, tokens.shape[:2])
    documents = pack(cu_seqlens, tokens.shape[:2], tokens.device)
    shard = split_tokens(tokens, tokens.shape[1], mask, packed=documents is not None)
    return Layout(_own(mask, shard), None, documents, shard, chunk_size)


def lay_out_image(
    pixel_values: Tensor,
    grid: tuple[int, int],
    num_prefix: int,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Layout:
    """Check the arguments of an image model and lay its tokens out.

    Args:
        pixel_values: [B, channels, height, width].
        grid: (rows, columns) of the patches that the whole image is cut into.
        num_prefix: CLS and register tokens.
        attention_mask: [B, N] of zeros and ones, 1 = real, over CLS, registers and patches.
        chunk_size: patches of each image to work on at a time.

    Raises:
        ValueError: an argument doesn't fit; the message names it.
    """
    check_chunk_size(chunk_size)
    rows, columns = grid
    num_tokens = num_prefix + rows * columns
    mask = check_mask(attention_mask, (len(pixel_values), num_tokens))
    shard = split_tokens(pixel_values, num_tokens, mask, num_prefix, columns)
    if shard is not None:
        rows = shard.rows.stop - shard.rows.start
    return Layout(_own(mask, shard), (rows, columns), None, shard, chunk_size)


def _own(mask: Tensor | None, shard: Shard | None) -> Tensor | None:
    """Return this process's part of a mask: [B, N] -> [B, n]."""
    return mask if mask is None or shard is None else shard.own(mask)
