"""The N×N matrix that a layer's mixer stands for, without forming it: products with the matrix from the left, in O(N).

Of a factorized layer, row i of the matrix of head h is

    A_i = Σ_f softmax_features(Q_i)_f · softmax_positions(K)_f             the factorized term
    A_i = (1 - g) · A_i + g · window_i                                     where there is a window
    A_i = (A_i + Σ_o c_o · e_(i+o)) / (1 + Σ_o c_o)                        where there is a convolution over V

The first two are exact, as the layer's output is A · V then. The convolution adds to each channel a combination of
neighbours of its own, with weights of either sign, and so has no row. By rule it counts for what its weights add in
size: c_o is the mean over the channels of a head of the absolute weight at offset o, over real neighbours, and the row
is divided by its new sum. A convolution of zeros, as a fresh one, changes nothing.

Rows are distributions over the real tokens of a document. Not so with `attention_normalization="scaling"`: they are
scale · Q_i · Kᵀ as the layer has them, of either sign.

A product w · A of weights over tokens, of which one row (w = e_i) and the mean of all (w = 1/N) are cases, is computed
right to left: first the weights of the features Σ_i w_i · softmax(Q_i), then these times softmax(K). The window and
softmax layers are linear in V, so that w · A is the gradient of w · (A · V) with respect to V, over a chunk at a time:
the layer's own code gives it.

Shape letters: B batch, H heads, W sets of weights, N tokens, n tokens of a chunk, F features, D head width.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.fa_chunked import slices
from ..models.fa_context import accumulator_dtype
from ..models.fa_layout import Layout
from .encoder import CHUNK_SIZE

LARGEST_SCORES = 2**24
"""Entries of softmax attention's matrix that are in memory at a time, in layers that keep it."""


class ImpliedAttention:
    """The matrix A [B, H, N, N] of one layer for one batch of documents or images that aren't packed.

    Args:
        layer: of the encoder.
        hidden_states: the layer's input [B, N, C].
        layout: of the tokens, with neither `documents` nor `shard`.
    """

    def __init__(self, layer: Any, hidden_states: Tensor, layout: Layout):
        self.attention, self.normalize = layer.attention_and_norm
        self.mixer = self.attention.mixer
        self.hidden_states, self.layout = hidden_states, layout
        self.num_tokens = hidden_states.shape[1]
        self.num_prefix = layout.num_prefix(self.num_tokens)
        self.dtype = accumulator_dtype(hidden_states)
        self.is_factorized = hasattr(self.mixer, "key_features")  # its type may be that of a wrapper, such as peft's
        self.is_softmax = not self.is_factorized or self.mixer.normalization == "softmax"

    def left_multiply(self, weights: Tensor) -> Tensor:
        """Return w · A: [B, 1 or H, W, N] -> [B, H, W, N], zero at padding; weights of padding count as zero."""
        if self.layout.mask is not None:
            weights = weights * self.layout.mask[:, None, None]
        if not self.is_factorized:
            return self._through_softmax(weights)
        near: Tensor | float = 0.0
        if self.mixer.local_convolution is not None:
            weights, near = self._through_convolution(weights)
        if self.mixer.window_gate is not None:
            share = self.mixer.window_share().to(self.dtype)[:, None, None].expand(-1, 1, self.num_tokens).clone()
            share[..., : self.num_prefix] = 0.0
            near = near + self._through_window((weights * share)[..., self.num_prefix :])
            weights = weights * (1.0 - share)
        product = self._spread(self.feature_weights(weights))
        product[..., self.num_prefix :] += near
        return product

    def context_maps(self) -> Tensor:
        """Return the columns of softmax(K), or the scaled K: [B, H, F, N], zero at padding."""
        return torch.cat([factor.transpose(2, 3) for _, factor in self._key_factors()], dim=3)

    def _project(self, part: str, tokens: slice) -> Tensor:
        """Return Q, K or V of some tokens: [B, H, n, D]."""
        inputs = self.normalize(self.hidden_states[:, tokens])
        return self.attention.project(getattr(self.attention, part), inputs)

    def _chunks(self) -> list[slice]:
        return slices(0, self.num_tokens, CHUNK_SIZE)

    def feature_weights(self, weights: Tensor) -> Tensor:
        """Return the weight of each feature, w · softmax(Q) or w · Q: [B, 1 or H, W, N] -> [B, H, W, F]."""
        total: Tensor | float = 0.0
        for tokens in self._chunks():
            factor = self.mixer.query_features(self._project("query", tokens)).to(self.dtype)
            factor = factor.softmax(dim=-1) if self.is_softmax else factor
            total = total + weights[..., tokens] @ factor
        assert isinstance(total, Tensor)
        return total

    def _spread(self, feature_weights: Tensor) -> Tensor:
        """Return weights of features times softmax(K)ᵀ, or the scaled Kᵀ: [B, H, W, F] -> [B, H, W, N]."""
        product = feature_weights.new_empty(*feature_weights.shape[:3], self.num_tokens)
        for tokens, factor in self._key_factors():
            product[..., tokens] = feature_weights @ factor.transpose(2, 3)
        return product

    def _key_factors(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield softmax(K), or the scaled K, of each chunk of tokens: [B, H, n, F]."""
        mask = self.layout.mask
        chunks = self._chunks()
        if self.is_softmax:
            totals = torch.stack([self._key_logits(tokens).logsumexp(dim=2) for tokens in chunks]).logsumexp(dim=0)
            totals = totals.clamp(min=torch.finfo(self.dtype).min)[:, :, None]  # of a sample without a real token
            yield from ((tokens, (self._key_logits(tokens) - totals).exp()) for tokens in chunks)
            return
        counts = self.num_tokens if mask is None else mask.sum(dim=1).clamp(min=1)[:, None, None, None]
        for tokens in chunks:
            key = self.mixer.key_features(self._project("key", tokens)).to(self.dtype) / counts
            yield tokens, key if mask is None else key.masked_fill(~mask[:, None, tokens, None], 0.0)

    def _key_logits(self, tokens: slice) -> Tensor:
        """Return the logits of the softmax over positions, -inf at padding: [B, H, n, F]."""
        logits = self.mixer.key_features(self._project("key", tokens)).to(self.dtype)
        mask = self.layout.mask
        return logits if mask is None else logits.masked_fill(~mask[:, None, tokens, None], -torch.inf)

    def _through_softmax(self, weights: Tensor) -> Tensor:
        """Return w · A of a layer that keeps softmax attention: [B, 1 or H, W, N] -> [B, H, W, N]."""
        key = self._project("key", slice(0, self.num_tokens)).to(self.dtype)
        value = key.new_zeros(*key.shape[:3], weights.shape[2])
        product, layout = value.transpose(2, 3).clone(), Layout(self.layout.mask)
        for tokens in slices(0, self.num_tokens, max(1, LARGEST_SCORES // math.prod(key.shape[:3]))):
            query = self._project("query", tokens).to(self.dtype)

            def attend(value: Tensor, query: Tensor = query) -> Tensor:
                return self.mixer(query, key, value, layout)

            product += transposed(attend, value, weights[..., tokens])
        return product

    def _through_window(self, weights: Tensor) -> Tensor:
        """Return w times the window's matrix, over the tokens of a text or the patches of an image: [B, H, W, patches].

        A chunk of rows of patches reaches over its neighbours' nearest rows.
        """
        num_rows, columns = self.layout.grid or (self.num_tokens, 1)
        product = torch.zeros_like(weights)
        for rows in slices(0, num_rows, max(1, CHUNK_SIZE // columns)):
            first, last = max(0, rows.start - self.mixer.window), min(num_rows, rows.stop + self.mixer.window)
            own, wide = slice(rows.start * columns, rows.stop * columns), slice(first * columns, last * columns)
            tokens = slice(self.num_prefix + wide.start, self.num_prefix + wide.stop)
            query, key = (self._project(part, tokens).to(self.dtype) for part in ("query", "key"))
            mask = None if self.layout.mask is None else self.layout.mask[:, tokens]
            near = Layout(mask, None if self.layout.grid is None else (last - first, columns))

            def attend(value: Tensor, query: Tensor = query, key: Tensor = key, near: Layout = near) -> Tensor:
                return self.mixer.attend_to_window(query, key, value, near)

            own_weights = F.pad(weights[..., own], (own.start - wide.start, wide.stop - own.stop))
            value = key.new_zeros(*key.shape[:3], weights.shape[2])
            product[..., wide] += transposed(attend, value, own_weights)
        return product

    def _through_convolution(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights that are left for the other terms, and w times the convolution's share by the rule above.

        [B, 1 or H, W, N] -> [B, H, W, N] and [B, H, W, patches].
        """
        kernel = self.mixer.local_convolution.weight.abs().to(self.dtype)
        num_heads, rank = self.attention.num_heads, kernel.dim() - 2
        kernel = kernel.unflatten(0, (num_heads, -1)).mean(dim=1)  # [H, 1, *kernel]
        grid = self.layout.grid or (self.num_tokens,)
        batch, _, num_sets, _ = weights.shape

        def convolve(tokens: Tensor, kernel: Tensor) -> Tensor:
            """Read zeros outside the grid: [B, H, W, patches] -> the same."""
            images = tokens.transpose(1, 2).reshape(-1, num_heads, *grid)
            function = F.conv1d if rank == 1 else F.conv2d
            images = function(images, kernel, padding=kernel.shape[-1] // 2, groups=num_heads)
            return images.flatten(2).unflatten(0, (batch, -1)).transpose(1, 2)

        mask = self.layout.mask
        is_real = weights.new_ones(batch, self.num_tokens) if mask is None else mask.to(self.dtype)
        is_real = is_real[:, None, None, self.num_prefix :].expand(-1, num_heads, -1, -1)
        prefix, patches = weights.expand(-1, num_heads, -1, -1).tensor_split([self.num_prefix], dim=3)
        patches = patches / (1.0 + convolve(is_real, kernel))
        near = convolve(patches, kernel.flip(list(range(2, kernel.dim())))) * is_real
        return torch.cat((prefix, patches), dim=3), near


def transposed(function: Callable[[Tensor], Tensor], value: Tensor, weights: Tensor) -> Tensor:
    """Return weights times the matrix of a function that is linear in its value.

    Args:
        function: [B, H, N, W] -> [B, H, n, W], each of the W columns on its own and all alike.
        value: of the shape that the function takes, with any contents.
        weights: [B, 1 or H, W, n].

    Returns:
        [B, H, W, N].
    """
    with torch.enable_grad():
        output = function(value.requires_grad_())
    (gradient,) = torch.autograd.grad(output, value, weights.transpose(2, 3).expand_as(output))
    return gradient.transpose(2, 3)


def parts_of(layer: Any, hidden_states: Tensor, layout: Layout) -> list[tuple[slice, ImpliedAttention]]:
    """Return the matrices that stand on the diagonal of a layer's matrix, with their tokens: one for each document of a
    packed batch, otherwise one for all tokens."""
    if layout.documents is None:
        return [(slice(0, hidden_states.shape[1]), ImpliedAttention(layer, hidden_states, layout))]
    bounds = layout.documents.cu_seqlens.tolist()
    spans = [slice(*ends) for ends in zip(bounds[:-1], bounds[1:], strict=True) if ends[0] < ends[1]]
    masks = [None if layout.mask is None else layout.mask[:, span] for span in spans]
    return [
        (span, ImpliedAttention(layer, hidden_states[:, span], Layout(mask)))
        for span, mask in zip(spans, masks, strict=True)
    ]


def left_multiply(layer: Any, hidden_states: Tensor, layout: Layout, weights: Tensor) -> Tensor:
    """Return w · A of a layer, packed or not: weights [B, 1 or H, W, N] -> [B, H, W, N]."""
    parts = parts_of(layer, hidden_states, layout)
    return torch.cat([part.left_multiply(weights[..., span]) for span, part in parts], dim=3)
