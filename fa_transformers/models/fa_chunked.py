"""Encoding in chunks, for documents and images whose activations would not fit into memory: exact, not a window.

A layer passes over its tokens twice. The first pass gathers the global context from the keys and values of every chunk
(`fa_context.py`); the second takes queries chunk by chunk, reads the context, adds the local terms and writes the
layer's output over its input. Local terms see across the seams: a chunk is extended by a halo of the neighbours that
they reach, which are projected once more. Text is cut into runs of tokens; images, where there are local terms, into
whole rows of patches, with the prefix tokens (CLS, registers) as a piece of their own.

Memory is that of one [B, N, C] tensor and of the activations of one chunk; layers named in `softmax_layers` also hold
their keys and values whole, and take time O(N²).

Shape letters: B batch, N tokens, C hidden width, H heads, D head width.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .fa_context import ContextAccumulator, apply_context
from .fa_sequence_parallel import Shard


def check_chunk_size(chunk_size: int | None, cu_seqlens: object = None) -> None:
    """Raise ValueError unless `chunk_size` is None, or a number of tokens, gradients are off and nothing is packed."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"`chunk_size` must be a number of tokens of at least 1, or None, got {chunk_size!r}.")
    if torch.is_grad_enabled():
        raise ValueError(
            "`chunk_size` works without gradients only: call the model under torch.inference_mode() or "
            "torch.no_grad(). To train at length use gradient checkpointing and the configuration's "
            "`chunk_size_feed_forward`."
        )
    if cu_seqlens is not None:
        raise ValueError(
            "`chunk_size` is for whole documents: leave out `cu_seqlens`, or encode the packed batch at once."
        )


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Cut positions from `start` to `stop` into runs of `size`, the last one shorter: one at least, if empty."""
    return [slice(first, min(first + size, stop)) for first in range(start, max(stop, start + 1), size)]


def join(pieces: Iterable[Tensor], num_tokens: int) -> Tensor:
    """Put pieces [B, n, ...] of `num_tokens` in all one after the other, holding one at a time: [B, N, ...]."""
    joined: Tensor | None = None
    start = 0
    for piece in pieces:
        if joined is None:
            joined = piece.new_empty(piece.shape[0], num_tokens, *piece.shape[2:])
        joined[:, start : start + piece.shape[1]] = piece
        start += piece.shape[1]
    assert joined is not None and start == num_tokens
    return joined


def embed_text_in_chunks(
    embeddings: Any,
    chunk_size: int,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """What `embeddings` (a `FABertEmbeddings`) gives for these inputs, `chunk_size` tokens at a time: [B, N, C]."""
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    assert tokens is not None
    num_tokens = tokens.shape[1]
    if position_ids is None and embeddings.position_embeddings is not None:
        position_ids = embeddings.positions(tokens, mask, None)
    for name, tensor in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if tensor is not None and tensor.shape[1:] != (num_tokens,):
            raise ValueError(f"`{name}` must be [batch, tokens] with {num_tokens} tokens, got {tuple(tensor.shape)}.")
    inputs = (input_ids, inputs_embeds, token_type_ids, position_ids)
    return join(
        (
            embeddings(*(None if tensor is None else tensor[:, chunk] for tensor in inputs), None)
            for chunk in slices(0, num_tokens, chunk_size)
        ),
        num_tokens,
    )


def run_layer_in_chunks(
    hidden_states: Tensor,
    mask: Tensor | None,
    chunk_size: int,
    attention: Any,
    normalize: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor, Tensor], Tensor],
    grid: tuple[int, int] | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """One encoder layer, chunk by chunk: overwrites `hidden_states` [B, N, C] with the layer's output and returns it.

    Args:
        mask: bool [B, N], True = real.
        chunk_size: tokens per chunk and sample; with local terms on an image rounded down to whole rows of patches,
            one at least.
        attention: the layer's self-attention, with `project`, `query`, `key`, `value` and `mixer`.
        normalize: from the layer's input to the attention's, each token on its own.
        finish: from the mixed tokens and the layer's input to its output, each token on its own.
        grid: (rows, columns) of the patches, which come last; None: text.
        shard: how the tokens are split over ranks, where tokens, mask and grid are those of this one.
    """
    mixer, num_tokens = attention.mixer, hidden_states.shape[1]
    columns = 1 if grid is None else grid[1]
    num_prefix = 0 if grid is None else num_tokens - math.prod(grid)
    halo = mixer.reach * columns
    if halo:
        pieces = [(slice(0, num_prefix), 0)] if num_prefix else []
        pieces += [(rows, halo) for rows in slices(num_prefix, num_tokens, max(1, chunk_size // columns) * columns)]
    else:
        pieces = [(chunk, 0) for chunk in slices(0, num_tokens, chunk_size)]
    attend = _gather(hidden_states, mask, chunk_size, attention, normalize, shard)
    before = following = hidden_states[:, :0]  # neighbours of a chunk that the layer's output has overwritten
    first = 0  # position that the mask starts at
    if shard is not None and halo:
        near, num_before, num_after = shard.with_halo(hidden_states[:, num_prefix:], 1, halo)
        before, following = near[:, :num_before], near[:, near.shape[1] - num_after :]
        first = -num_before
        mask = None if shard.mask is None else shard.mask[:, shard.start - num_before : shard.stop + num_after]
    for chunk, reach in pieces:
        own, after = hidden_states[:, chunk], hidden_states[:, chunk.stop : chunk.stop + reach]
        if reach:
            after = torch.cat((after, following), dim=1)[:, :reach]
        extended = torch.cat((before, own, after), dim=1) if reach else own
        inside = slice(before.shape[1], before.shape[1] + own.shape[1])
        inputs = normalize(extended)
        query = attention.project(attention.query, inputs)
        mixed = attend(query)
        if reach and own.shape[1]:
            span = slice(chunk.start - inside.start - first, chunk.stop + after.shape[1] - first)
            seen = None if mask is None else mask[:, span]
            mixed = _add_local_terms(mixed, query, inputs, seen, attention, None if grid is None else columns)
        hidden_states[:, chunk] = finish(mixed[:, :, inside].transpose(1, 2).flatten(2), own)
        before = extended[:, max(0, inside.stop - reach) : inside.stop]
    return hidden_states


def _gather(
    hidden_states: Tensor,
    mask: Tensor | None,
    chunk_size: int,
    attention: Any,
    normalize: Callable[[Tensor], Tensor],
    shard: Shard | None,
) -> Callable[[Tensor], Tensor]:
    """Pass over all keys and values; what comes back attends to them: queries [B, H, n, D] -> [B, H, n, D]."""
    mixer, num_tokens = attention.mixer, hidden_states.shape[1]
    chunks = slices(0, num_tokens, chunk_size)
    if not hasattr(mixer, "key_features"):  # its type may be that of a wrapper, such as peft's
        key, value = (
            join(
                (attention.project(part, normalize(hidden_states[:, chunk])).transpose(1, 2) for chunk in chunks),
                num_tokens,
            ).transpose(1, 2)
            for part in (attention.key, attention.value)
        )
        if shard is None:
            return lambda query: mixer(query, key, value, mask)
        key, value = (shard.gather(part, dim=2) for part in (key, value))
        return lambda query: mixer(query, key, value, shard.mask)
    accumulator = ContextAccumulator(mixer.normalization)
    for chunk in chunks:
        inputs = normalize(hidden_states[:, chunk])
        key, value = (attention.project(part, inputs) for part in (attention.key, attention.value))
        accumulator.add(mixer.key_features(key), value, None if mask is None else mask[:, chunk])
    if shard is not None:
        accumulator.merge(shard.group)
    context = accumulator.context()
    return lambda query: apply_context(mixer.query_features(query), context, mixer.normalization)


def _add_local_terms(
    mixed: Tensor, query: Tensor, inputs: Tensor, mask: Tensor | None, attention: Any, columns: int | None
) -> Tensor:
    """Add window and convolution over a chunk with its halo, [B, H, n, D]; its outermost rows miss neighbours."""
    key, value = (attention.project(part, inputs) for part in (attention.key, attention.value))
    grid = None if columns is None else (inputs.shape[1] // columns, columns)
    return attention.mixer.add_local_terms(mixed, query, key, value, mask, grid)
