"""Packed batches: documents of different lengths one after the other in a single row, without padding between them.

`cu_seqlens` [documents + 1] holds the running total of lengths, 0 first: document i has the tokens from cu_seqlens[i]
up to cu_seqlens[i + 1]. Every result is that of the document alone, computed without a loop over documents: tokens are
laid out in tiles of `TILE` rows, each of one document, and the sums of tiles are added by document.

Shape letters: T tokens of all documents, H heads, Dk and Dv widths of a head, R rows with gaps, S rows of a tile.
"""

from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fa_validation import check_cu_seqlens

TILE = 64
"""Rows of a tile: a document's context then takes no more memory than its tokens, and products are large enough."""


class PackedDocuments:
    """Tables of a packed batch: the document and the place of each token; made once per forward pass.

    Args:
        cu_seqlens: int [documents + 1], from 0 to `num_tokens`, never falling; documents may be empty.
        num_tokens: T.

    Attributes:
        document_ids: [T], from 0.
        positions: [T], from 0 in each document.
        lengths: [documents], in tokens.
        tiles: rows in tiles of one document each, the last tile of a document with gaps.
        tile_documents: [tiles], the document of each tile; tiles that are not needed have the number of documents.

    Raises:
        ValueError: `cu_seqlens` has another shape or dtype or, as far as its values can be read, other values.
    """

    def __init__(self, cu_seqlens: Tensor, num_tokens: int):
        check_cu_seqlens(cu_seqlens, num_tokens)
        self.cu_seqlens, self.num_tokens, self.num_documents = cu_seqlens, num_tokens, cu_seqlens.shape[0] - 1
        ends = cu_seqlens[1:].long()
        self.starts = cu_seqlens[:-1].long()
        self.lengths = ends - self.starts
        tokens = torch.arange(num_tokens, device=cu_seqlens.device)
        self.document_ids = torch.searchsorted(ends, tokens, right=True)
        self.positions = tokens - self.starts[self.document_ids]
        # As many as lengths could need: the number that they do need is known to the device alone.
        self.num_tiles = num_tokens // TILE + self.num_documents
        last_tiles = ((self.lengths + TILE - 1) // TILE).cumsum(dim=0)
        first_tiles = last_tiles - (self.lengths + TILE - 1) // TILE
        self.tile_documents = torch.searchsorted(
            last_tiles, torch.arange(self.num_tiles, device=cu_seqlens.device), right=True
        )
        self.tiles = SpacedRows(first_tiles[self.document_ids] * TILE + self.positions, self.num_tiles * TILE)

    def to(self, device: Any) -> "PackedDocuments":
        """Return the documents with their tables on another device."""
        return PackedDocuments(self.cu_seqlens.to(device), self.num_tokens)

    @cached_property
    def longest(self) -> int:
        """The number of tokens of the longest document; graphs can't read it."""
        return int(self.lengths.max())

    def clip(self, window: int) -> int:
        """Return a window as long as the longest document needs, or as a tile; as it is in graphs."""
        is_readable = not torch.compiler.is_compiling() and not torch.jit.is_tracing() and not self.lengths.is_meta
        # Some document has the mean length or more: a window as short needs no look, which GPUs would wait for.
        if not is_readable or window * self.num_documents <= self.num_tokens:
            return window
        return min(window, max(self.longest, TILE))

    def spaced(self, gap: int) -> "SpacedRows":
        """Return rows with `gap` empty ones between documents."""
        tokens = torch.arange(self.num_tokens, device=self.document_ids.device)
        return SpacedRows(tokens + gap * self.document_ids, self.num_tokens + gap * self.num_documents)

    def to_tiles(self, tokens: Tensor, fill: float = 0.0) -> Tensor:
        """Cut into tiles, with `fill` in gaps: [..., T, D] -> [..., tiles, S, D]."""
        return self.tiles.place(tokens, fill).unflatten(-2, (self.num_tiles, TILE))

    def add_up(self, tiles: Tensor, dim: int) -> Tensor:
        """Add up the tiles of each document along `dim`: tiles -> documents + 1, the last one a remainder."""
        shape = list(tiles.shape)
        shape[dim] = self.num_documents + 1
        return tiles.new_zeros(shape).index_add(dim, self.tile_documents, tiles)

    def maximum(self, tiles: Tensor) -> Tensor:
        """Return the largest of each document's tiles: [H, tiles, D] -> [H, documents + 1, D]; no gradient."""
        lowest = torch.finfo(tiles.dtype).min
        largest = tiles.new_full((tiles.shape[0], self.num_documents + 1, tiles.shape[2]), lowest)
        index = self.tile_documents[:, None].expand_as(tiles)
        return largest.scatter_reduce(1, index, tiles.detach(), "amax")

    def count(self, marks: Tensor) -> tuple[Tensor, Tensor]:
        """Count marks up to each token in its document, and in each document: bool [T] -> int [T], int [documents]."""
        before = F.pad(marks.cumsum(dim=0), (1, 0))  # each token, of all documents
        at_starts = before[self.starts]
        return before[1:] - at_starts[self.document_ids], before[self.starts + self.lengths] - at_starts

    def first_tokens(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return each document's first real hidden state: [1, T, C], mask bool [1, T] or None -> [documents, C].

        That of a document without a real token is zeros.
        """
        # Tokens before the first real one.
        skipped = torch.zeros_like(self.lengths) if mask is None else self.count(self.count(mask[0])[0] == 0)[1]
        first = hidden_states[0].index_select(0, (self.starts + skipped).clamp(max=self.num_tokens - 1))
        return first.masked_fill((skipped == self.lengths)[:, None], 0.0)

    def mean(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return each document's mean over real tokens: [1, T, C], mask bool [1, T] or None -> [documents, C].

        That of a document without a real token is zeros. Sums are float32, or float64 for float64 inputs.
        """
        tokens = hidden_states[0].to(torch.promote_types(hidden_states.dtype, torch.float32))
        counts = self.lengths
        if mask is not None:
            tokens, counts = tokens.masked_fill(~mask[0][:, None], 0.0), self.count(mask[0])[1]
        total = self.add_up(self.to_tiles(tokens).sum(dim=1), dim=0)[:-1]
        return (total / counts.clamp(min=1)[:, None]).to(hidden_states.dtype)

    def logsumexp(self, logits: Tensor) -> Tensor:
        """Return log Σ exp over each document's tokens: [T] -> [documents]; very low for an empty document."""
        tiles = self.to_tiles(logits[:, None], torch.finfo(logits.dtype).min)  # [tiles, S, 1]
        largest = self.maximum(tiles.amax(dim=1)[None])[0]  # [documents + 1, 1]
        total = self.add_up((tiles - largest[self.tile_documents, None]).exp().sum(dim=1), dim=0)
        return (total.clamp(min=torch.finfo(total.dtype).tiny).log() + largest)[:-1, 0]


class SpacedRows:
    """The places of tokens in rows with gaps between them.

    `rows` [T] is the row of each token, no two alike; `num_rows` is R. Both directions copy whole rows in their
    gradient as well, which is many times as fast as the sums that torch would make of them.
    """

    def __init__(self, rows: Tensor, num_rows: int):
        num_tokens = rows.shape[0]
        tokens = torch.arange(num_tokens, device=rows.device)
        self.rows = rows
        self.tokens = rows.new_full((num_rows,), num_tokens).scatter(0, rows, tokens)  # T stands for a gap

    def place(self, tokens: Tensor, fill: float = 0.0) -> Tensor:
        """Move tokens to their rows: [..., T, D] -> [..., R, D], with `fill` in gaps."""
        return _Place.apply(tokens, self.rows, self.tokens, fill)

    def take(self, placed: Tensor) -> Tensor:
        """Take tokens from their rows, the inverse of `place`: [..., R, D] -> [..., T, D]."""
        return _Take.apply(placed, self.rows, self.tokens)


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, rows: Tensor, sources: Tensor, fill: float) -> Tensor:
        ctx.save_for_backward(rows, sources)
        gap = tokens.new_full((*tokens.shape[:-2], 1, tokens.shape[-1]), fill)
        return torch.cat((tokens, gap), dim=-2).index_select(-2, sources)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Take.apply(gradient, *ctx.saved_tensors), None, None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, placed: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(rows, sources)
        return placed.index_select(-2, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Place.apply(gradient, *ctx.saved_tensors, 0.0), None, None


def pack(
    cu_seqlens: Tensor | PackedDocuments | None, shape: tuple[int, ...], device: torch.device
) -> PackedDocuments | None:
    """Return the documents of a batch of `shape` [rows, tokens]; None where nothing is packed.

    Raises:
        ValueError: the batch has more than one row or another device, or see `PackedDocuments`.
    """
    if cu_seqlens is None:
        return None
    if shape[0] != 1:
        raise ValueError(
            f"With `cu_seqlens` a batch has one row that holds all documents, got {shape[0]}; join the rows to one."
        )
    documents = cu_seqlens if isinstance(cu_seqlens, PackedDocuments) else PackedDocuments(cu_seqlens, shape[1])
    if documents.starts.device != device:
        raise ValueError(f"`cu_seqlens` is on {documents.starts.device} but the tokens are on {device}.")
    if documents.num_tokens != shape[1]:
        raise ValueError(f"`cu_seqlens` is of {documents.num_tokens} tokens, the batch has {shape[1]}.")
    return documents


def hide_masked(
    key: Tensor, value: Tensor, mask: Tensor, documents: PackedDocuments, normalization: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return K and V of a packed batch in which tokens that aren't real count for nothing: mask bool [1, T].

    Their keys become so low that no weight is left, or zero for "scaling", and their values zero, whatever they hold.
    In "scaling" without a `scale` values also turn the division by the length into one by the number of real tokens.
    """
    hidden = ~mask[:, None, :, None]
    if normalization == "softmax":
        # Not float32's lowest number: a kernel that computes powers of two multiplies it by 1.44.
        lowest = max(torch.finfo(key.dtype).min, -(2.0**125))
        return key.masked_fill(hidden, lowest), value.masked_fill(hidden, 0.0)
    if scale is None:
        lengths = documents.lengths.to(torch.promote_types(value.dtype, torch.float32))
        factor = lengths / documents.count(mask[0])[1].clamp(min=1)
        value = (value * factor[documents.document_ids][:, None]).to(value.dtype)
    return key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: PackedDocuments,
    normalization: str = "softmax",
    scale: float | None = None,
) -> Tensor:
    """Compute `factorized_attention` within each document of a packed batch.

    For document i: softmax_Dk(Q_i) · (softmax_Ti(K_i)ᵀ · V_i), or scale · Q_i · (K_iᵀ · V_i) with "scaling", where
    `scale` None means 1 / (its number of tokens). Sums accumulate in float32 (float64 for float64 inputs).

    Args:
        query, key: [1, H, T, Dk].
        value: [1, H, T, Dv].

    Returns:
        [1, H, T, Dv] in the dtype of `query`.
    """
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    device = query.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        q, k, v = (tensor[0].to(accumulate) for tensor in (query, key, value))
        v = documents.to_tiles(v)  # [H, tiles, S, Dv]
        if normalization == "softmax":
            k = documents.to_tiles(k, fill=torch.finfo(accumulate).min)
            largest = documents.maximum(k.amax(dim=2))  # [H, documents + 1, Dk]
            weights = (k - largest[:, documents.tile_documents, None]).exp()
            total = documents.add_up(weights.sum(dim=2), dim=1).clamp(min=torch.finfo(accumulate).tiny)
            context = documents.add_up(weights.transpose(2, 3) @ v, dim=1) / total[..., None]
            q = q.softmax(dim=-1)
        else:
            counts = F.pad(documents.lengths.clamp(min=1), (0, 1), value=1).to(accumulate)[:, None, None]
            factor = 1.0 / counts if scale is None else scale
            context = factor * documents.add_up(documents.to_tiles(k).transpose(2, 3) @ v, dim=1)
        output = documents.to_tiles(q) @ context.index_select(1, documents.tile_documents)
        output = documents.tiles.take(output.flatten(1, 2))
    return output[None].to(query.dtype)
