"""The global context of factorized attention, gathered piece by piece, for documents that are never whole in memory.

The column softmax over positions streams: with M the largest logit of a feature so far, Z the sum of exp(K - M) and
S = exp(K - M)ᵀ · V, a further block of positions gives

    M' = max(M, max K)    decay = exp(M - M')    Z' = decay · Z + Σ exp(K - M')    S' = decay · S + exp(K - M')ᵀ · V

and the context is S / Z. The order of blocks does not matter. Blocks are short enough for a processor's cache, and what
is made for one is forgotten with it.

Shape letters: B batch, H heads, n positions of a piece, Dk key width of a head, Dv value width of a head.
Source: Shen et al. 2021, arXiv:1812.01243, section 3.2; the streaming softmax is that of Milakov and Gimelshein 2018,
arXiv:1805.02867, taken over positions.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

BLOCK_SIZE = 512
"""Positions at once: 512 of 768 channels in float32 are 1.5 MiB, which the second-level cache of a core holds."""


class ContextAccumulator:
    """Sum up keys and values of a document, given in pieces, to its context.

    "softmax" gives softmax_positions(K)ᵀ · V, "scaling" gives scale · Kᵀ · V. Sums are float32, or float64 for float64
    inputs, whatever autocast says. The memory is that of the context and of one block of `BLOCK_SIZE` positions.
    Without gradients: sums are kept in place.
    """

    def __init__(self, normalization: str = "softmax"):
        self.normalization = normalization
        self._sums: Tensor | None = None  # S, or Kᵀ · V: [B, H, Dk, Dv]

    def add(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        """Take in the next positions, in any order. Token-major memory seen through a transposed view is not copied.

        Args:
            key: [B, H, n, Dk].
            value: [B, H, n, Dv].
            mask: bool [B, n], True where a position is real; what the others hold, NaN included, changes nothing.
        """
        if self._sums is None:
            self._start(key, value)
        with without_autocast(key.device.type):
            for sample in range(key.shape[0]):  # heads of one sample are one batched product without a copy
                for start in range(0, key.shape[2], BLOCK_SIZE):
                    block = slice(start, start + BLOCK_SIZE)
                    padding = None if mask is None else ~mask[sample, block, None]
                    self._add_block(sample, key[sample, :, block], value[sample, :, block], padding)
        self._count += key.shape[2] if mask is None else mask.sum(dim=1)[:, None, None, None]

    def context(self, scale: float | None = None) -> Tensor:
        """The context of all positions so far: [B, H, Dk, Dv], zeros for a sample without a real one.

        `scale` is the factor of "scaling"; None means 1 / (number of real positions of the sample).

        Raises:
            ValueError: nothing was added, or `scale` comes with "softmax".
        """
        if self._sums is None:
            raise ValueError("There is no context yet: call `add` first.")
        if self.normalization == "softmax":
            if scale is not None:
                raise ValueError('`scale` applies to normalization="scaling" only; the softmaxes have no scale.')
            return self._sums / self._total.clamp(min=torch.finfo(self._sums.dtype).tiny).transpose(2, 3)
        return self._sums * (1.0 / self._count.clamp(min=1).to(self._sums.dtype) if scale is None else scale)

    def _start(self, key: Tensor, value: Tensor) -> None:
        batch, heads, _, key_width = key.shape
        dtype = accumulator_dtype(key)
        self._sums = key.new_zeros(batch, heads, key_width, value.shape[3], dtype=dtype)
        self._total = key.new_zeros(batch, heads, 1, key_width, dtype=dtype)
        # finfo.min instead of -inf: as long as all is padding the weights are finite, and zeroed through V.
        self._maximum = key.new_full((batch, heads, 1, key_width), torch.finfo(dtype).min, dtype=dtype)
        self._count = torch.zeros(batch, 1, 1, 1, dtype=torch.long, device=key.device)

    def _add_block(self, sample: int, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        """Add [H, n, Dk] and [H, n, Dv] of one sample; `padding` is [n, 1]."""
        assert self._sums is not None
        sums = self._sums[sample]
        key, value = key.to(sums.dtype), value.to(sums.dtype)
        if padding is not None:
            lowest = torch.finfo(sums.dtype).min if self.normalization == "softmax" else 0.0
            key, value = key.masked_fill(padding, lowest), value.masked_fill(padding, 0.0)
        if self.normalization == "softmax":
            maximum, total = self._maximum[sample], self._total[sample]
            largest = torch.maximum(maximum, key.amax(dim=1, keepdim=True))
            decay = (maximum - largest).exp()  # [H, 1, Dk]
            key = (key - largest).exp_()
            total.mul_(decay).add_(key.sum(dim=1, keepdim=True))
            sums.mul_(decay.transpose(1, 2))
            maximum.copy_(largest)
        sums.baddbmm_(key.transpose(1, 2), value)


def apply_context(query: Tensor, context: Tensor, normalization: str) -> Tensor:
    """What each query reads from the context: softmax_features(Q) · context, or Q · context for "scaling".

    Args:
        query: [B, H, n, Dk].
        context: [B, H, Dk, Dv], as `ContextAccumulator.context` gives it.
        normalization: "softmax" or "scaling".

    Returns:
        [B, H, n, Dv] in the dtype of `query`, token-major in memory.
    """
    batch, heads, num_positions, _ = query.shape
    output = query.new_empty(batch, num_positions, heads, context.shape[3])
    with without_autocast(query.device.type):
        for sample in range(batch):
            for start in range(0, num_positions, BLOCK_SIZE):
                block = slice(start, start + BLOCK_SIZE)
                weights = query[sample, :, block].to(context.dtype)
                if normalization == "softmax":
                    weights = weights.transpose(0, 1).softmax(dim=-1).transpose(0, 1)  # torch wants it contiguous
                output[sample, block] = (weights @ context[sample]).transpose(0, 1)
    return output.transpose(1, 2)


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over positions are kept in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager:
    """Switch autocast off; devices without any, such as "meta", refuse the context that would."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
