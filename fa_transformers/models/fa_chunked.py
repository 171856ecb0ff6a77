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

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .fa_context import ContextAccumulator, apply_context
from .fa_layout import Layout


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
    layout: Layout,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Compute the `embeddings` (a `FABertEmbeddings`) of these inputs, `chunk_size` tokens at a time: [B, N, C]."""
    assert layout.chunk_size is not None
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    assert tokens is not None
    num_tokens = tokens.shape[1]
    if position_ids is None and embeddings.position_embeddings is not None:
        position_ids = embeddings.positions(tokens, layout)
    for name, tensor in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if tensor is not None and tensor.shape[1:] != (num_tokens,):
            raise ValueError(f"`{name}` must be [batch, tokens] with {num_tokens} tokens, got {tuple(tensor.shape)}.")
    inputs = (input_ids, inputs_embeds, token_type_ids, position_ids)
    return join(
        (
            embeddings(*(None if tensor is None else tensor[:, chunk] for tensor in inputs))
            for chunk in slices(0, num_tokens, layout.chunk_size)
        ),
        num_tokens,
    )


def run_layer_in_chunks(
    hidden_states: Tensor,
    layout: Layout,
    attention: Any,
    normalize: Callable[[Tensor], Tensor],
    feed_forward: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Run one encoder layer chunk by chunk: overwrites `hidden_states` [B, N, C] with the layer's output, returns it.

    Args:
        layout: its `chunk_size` is the number of tokens per chunk and sample; with local terms on an image it is
            rounded down to whole rows of patches, one at least.
        attention: the layer's self-attention, with `project`, `query`, `key`, `value` and `mixer`.
        normalize: from the layer's input to the attention's, each token on its own.
        feed_forward: from the mixed tokens and the layer's input to its output, each token on its own.
    """
    shard, mask = layout.shard, layout.mask
    columns = 1 if layout.grid is None else layout.grid[1]
    num_prefix = layout.num_prefix(hidden_states.shape[1])
    halo = None if attention.mixer.reach is None else attention.mixer.reach * columns
    attend = _gather(hidden_states, layout, attention, normalize)
    before = following = hidden_states[:, :0]  # neighbours of a chunk that the layer's output has overwritten
    first = 0  # position that the mask starts at
    if shard is not None and halo:
        tokens, num_before, num_after = shard.with_halo(hidden_states[:, num_prefix:], 1, halo)
        before, following = tokens[:, :num_before], tokens[:, tokens.shape[1] - num_after :]
        first = -num_before
        mask = None if shard.mask is None else shard.mask[:, shard.start - num_before : shard.stop + num_after]
    for chunk, has_local_terms in _cut(hidden_states.shape[1], num_prefix, columns, halo, layout):
        reach = halo if has_local_terms and halo else 0
        own, after = hidden_states[:, chunk], hidden_states[:, chunk.stop : chunk.stop + reach]
        if reach:
            after = torch.cat((after, following), dim=1)[:, :reach]
        extended = torch.cat((before, own, after), dim=1) if reach else own
        inside = slice(before.shape[1], before.shape[1] + own.shape[1])
        inputs = normalize(extended)
        query = attention.project(attention.query, inputs)
        mixed = attend(query)
        if has_local_terms and own.shape[1]:
            span = slice(chunk.start - inside.start - first, chunk.stop + after.shape[1] - first)
            grid = None if layout.grid is None else (inputs.shape[1] // columns, columns)
            near = Layout(None if mask is None else mask[:, span], grid)
            mixed = _add_local_terms(mixed, query, inputs, near, attention)
        hidden_states[:, chunk] = feed_forward(mixed[:, :, inside].transpose(1, 2).flatten(2), own)
        before = extended[:, max(0, inside.stop - reach) : inside.stop]
    return hidden_states


def _cut(num_tokens: int, num_prefix: int, columns: int, halo: int | None, layout: Layout) -> list[tuple[slice, bool]]:
    """Return the chunks of a layer's tokens, and for each whether local terms add to it; `halo` is None without any."""
    assert layout.chunk_size is not None
    if halo is None:
        return [(chunk, False) for chunk in slices(0, num_tokens, layout.chunk_size)]
    prefix = [(slice(0, num_prefix), False)] if num_prefix else []
    rows_at_once = max(1, layout.chunk_size // columns) * columns
    return prefix + [(rows, True) for rows in slices(num_prefix, num_tokens, rows_at_once)]


def _gather(
    hidden_states: Tensor, layout: Layout, attention: Any, normalize: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Pass over all keys and values; return a function that attends to them: queries [B, H, n, D] -> [B, H, n, D]."""
    assert layout.chunk_size is not None
    mixer, shard, num_tokens = attention.mixer, layout.shard, hidden_states.shape[1]
    chunks = slices(0, num_tokens, layout.chunk_size)
    if not hasattr(mixer, "key_features"):  # its type may be that of a wrapper, such as peft's
        key, value = (
            join(
                (attention.project(part, normalize(hidden_states[:, chunk])).transpose(1, 2) for chunk in chunks),
                num_tokens,
            ).transpose(1, 2)
            for part in (attention.key, attention.value)
        )
        if shard is not None:
            key, value = (shard.gather(part, dim=2) for part in (key, value))
        return lambda query: mixer(query, key, value, Layout(layout.whole_mask))
    accumulator = ContextAccumulator(mixer.normalization)
    for chunk in chunks:
        inputs = normalize(hidden_states[:, chunk])
        key, value = (attention.project(part, inputs) for part in (attention.key, attention.value))
        accumulator.add(mixer.key_features(key), value, None if layout.mask is None else layout.mask[:, chunk])
    if shard is not None:
        accumulator.merge(shard.group)
    context = accumulator.context()
    return lambda query: apply_context(mixer.query_features(query), context, mixer.normalization)


def _add_local_terms(mixed: Tensor, query: Tensor, inputs: Tensor, layout: Layout, attention: Any) -> Tensor:
    """Add window and convolution over a chunk with its halo, [B, H, n, D]; its outermost rows miss neighbours."""
    key, value = (attention.project(part, inputs) for part in (attention.key, attention.value))
    return attention.mixer.add_local_terms(mixed, query, key, value, layout)
