"""The global context of factorized attention over blocks of positions, for documents given whole or in pieces.

The column softmax over positions streams: with M the largest logit of a feature so far, Z the sum of exp(K - M) and
S = exp(K - M)ᵀ · V, a further block of positions gives

    M' = max(M, max K)    decay = exp(M - M')    Z' = decay · Z + Σ exp(K - M')    S' = decay · S + exp(K - M')ᵀ · V

and the context is S / Z. The order of blocks does not matter. Blocks are short enough for a processor's cache, and no
temporary grows with the number of positions.

Shape letters: B batch, H heads, Dk key width of a head, Dv value width of a head, n positions of a block or a piece.
Blocks are [n, H, width], as models lay out their tokens in memory.
Source: Shen et al. 2021, arXiv:1812.01243, section 3.2; the streaming softmax is that of Milakov and Gimelshein 2018,
arXiv:1805.02867, taken over positions.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CACHED_ELEMENTS = 2**18
"""Numbers of a block that one thread works on: 1 MiB in float32, about what a core's second-level cache holds."""

SMALLEST_BLOCK, LARGEST_BLOCK = 256, 1024
"""Bounds of a block in positions: of less, calls take longer than their work; of more, float32 sums lose digits."""


class Workspace:
    """The buffers that all blocks of a pass share, in the accumulator's type: float64 for float64, else float32.

    `like` has the inputs' type and device, and `num_positions` is their length.
    """

    def __init__(self, like: Tensor, num_positions: int):
        self.dtype, self.device = accumulator_dtype(like), like.device
        self.num_positions = num_positions
        self._buffers: dict[tuple, Tensor] = {}

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Cut tensors [positions, H, width] alike into blocks that fit the cache.

        One has a sixth of all positions at most, as buffers are extra memory, but `SMALLEST_BLOCK` at least.
        """
        widest = max(1, *(math.prod(tensor.shape[1:]) for tensor in tensors))
        cached = CACHED_ELEMENTS * torch.get_num_threads() // widest
        size = max(SMALLEST_BLOCK, min(cached, LARGEST_BLOCK, self.num_positions // 6))
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def buffer(self, name: str, *shape: int) -> Tensor:
        held = self._buffers.get((name, *shape[1:]))
        if held is None or held.shape[0] < shape[0]:
            held = self._buffers[name, *shape[1:]] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return held[: shape[0]]

    def cast(self, name: str, block: Tensor) -> Tensor:
        return block if block.dtype == self.dtype else self.buffer(name, *block.shape).copy_(block)

    def query_factor(self, block: Tensor, is_softmax: bool) -> Tensor:
        """Return softmax(Q) of a block of Q; for "scaling" Q itself."""
        block = self.cast("factor", block)
        return torch.softmax(block, -1, out=self.buffer("factor", *block.shape)) if is_softmax else block

    def key_factor(self, block: Tensor, maximum: Tensor | None) -> Tensor:
        """Return exp(K - M) of a block of K; for "scaling" K itself."""
        if maximum is None:
            return self.cast("factor", block)
        return torch.sub(block, maximum, out=self.buffer("factor", *block.shape)).exp_()

    def multiply(self, left: Tensor, right: Tensor, target: Tensor) -> Tensor:
        """Write `left` [n, H, i] times `right` [H, i, j] into `target` [n, H, j], which may have another type."""
        is_direct = target.dtype == self.dtype
        result = target if is_direct else self.buffer("product", *target.shape)
        torch.bmm(left.transpose(0, 1), right, out=result.transpose(0, 1))
        return target if is_direct else target.copy_(result)


def add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to `total` [H, i, j], for `left` [n, H, i] and `right` [n, H, j].

    `baddbmm_` would add each product to the long sum where heads are narrow, and lose digits.
    """
    total += torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1))


def accumulate(
    key: Tensor, value: Tensor, sums: Tensor, maximum: Tensor, total: Tensor, is_softmax: bool, work: Workspace
) -> None:
    """Add K and V [positions, H, width] to S [H, Dk, Dv], M and Z [H, Dk]; for "scaling" S is Kᵀ V, the rest unused."""
    for key_block, value_block in work.blocks(key, value):
        if is_softmax:
            higher = torch.maximum(maximum, key_block.amax(dim=0).to(maximum.dtype))
            # Where nothing came before, exp(-inf - higher) is zero, as it should be.
            decay = (maximum - higher).exp_()
            maximum.copy_(higher)
            sums.mul_(decay[:, :, None])
        weights = work.key_factor(key_block, maximum if is_softmax else None)
        if is_softmax:
            total.mul_(decay).add_(weights.sum(dim=0))
        add_outer(sums, weights, work.cast("value", value_block))


def real_positions(mask: Tensor) -> slice | Tensor:
    """Return the real positions of a sample's mask [positions]: a slice, or indices if padding lies in between."""
    first, count = int(mask.view(torch.uint8).argmax()) if len(mask) else 0, int(mask.sum())
    return slice(first, first + count) if mask[first : first + count].all() else mask.nonzero()[:, 0]


class ContextAccumulator:
    """Sum up keys and values of a document, given in pieces, to its context.

    "softmax" gives softmax_positions(K)ᵀ · V, "scaling" gives scale · Kᵀ · V. Sums are float32, or float64 for float64
    inputs, whatever autocast says. The memory is that of the context and of one block. Without gradients: sums are
    kept in place.
    """

    def __init__(self, normalization: str = "softmax"):
        self.normalization = normalization
        self._sums: Tensor | None = None  # S, or Kᵀ · V: [B, H, Dk, Dv]

    def add(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        """Take in the next positions, in any order. Token-major memory seen through a transposed view is not copied.

        Args:
            key: [B, H, n, Dk].
            value: [B, H, n, Dv].
            mask: bool [B, n], True where a position is real; others change nothing, whatever they hold, NaN included.
        """
        if self._sums is None:
            batch, heads, _, key_width = key.shape
            self._sums = key.new_zeros(batch, heads, key_width, value.shape[3], dtype=accumulator_dtype(key))
            self._total = self._sums.new_zeros(batch, heads, key_width)
            self._maximum = torch.full_like(self._total, -torch.inf)
            self._counts = [0] * batch
        work = Workspace(key, key.shape[2])
        with without_autocast(key.device.type):
            for sample in range(len(key)):
                place = slice(None) if mask is None else real_positions(mask[sample])
                keys, values = key[sample].transpose(0, 1)[place], value[sample].transpose(0, 1)[place]
                if not len(keys):
                    continue
                sums = (self._sums[sample], self._maximum[sample], self._total[sample])
                accumulate(keys, values, *sums, self.normalization == "softmax", work)
                self._counts[sample] += len(keys)

    def merge(self, group: Any) -> None:
        """Add the sums of the other ranks of a process group; each rank has called `add`, with any positions."""
        assert self._sums is not None
        is_softmax = self.normalization == "softmax"
        counts = self._total.new_tensor(self._counts)[:, None, None].expand_as(self._total)
        total = self._total if is_softmax else counts
        highest = self._maximum if is_softmax else None
        highest, self._total, self._sums = merge_contexts(highest, total, self._sums, group)
        if highest is None:
            self._counts = [int(count) for count in self._total[:, 0, 0]]
        else:
            self._maximum = highest

    def context(self, scale: float | None = None) -> Tensor:
        """Return the context of all positions so far: [B, H, Dk, Dv], zeros for a sample without a real one.

        `scale` is the factor of "scaling"; None means 1 / (number of real positions of the sample).

        Raises:
            ValueError: nothing was added, or `scale` comes with "softmax".
        """
        if self._sums is None:
            raise ValueError("There is no context yet: call `add` first.")
        if self.normalization == "softmax":
            if scale is not None:
                raise ValueError('`scale` applies to normalization="scaling" only; the softmaxes have no scale.')
            return self._sums / self._total.clamp(min=torch.finfo(self._sums.dtype).tiny)[..., None]
        factors = [1.0 / max(count, 1) if scale is None else scale for count in self._counts]
        return self._sums * self._sums.new_tensor(factors)[:, None, None, None]


def apply_context(query: Tensor, context: Tensor, normalization: str) -> Tensor:
    """Read the context with each query: softmax_features(Q) · context, or Q · context for "scaling".

    Args:
        query: [B, H, n, Dk].
        context: [B, H, Dk, Dv], as `ContextAccumulator.context` gives it.
        normalization: "softmax" or "scaling".

    Returns:
        [B, H, n, Dv] in the dtype of `query`, token-major in memory.
    """
    batch, heads, num_positions, _ = query.shape
    output = query.new_empty(batch, num_positions, heads, context.shape[3])
    work = Workspace(query, num_positions)
    with without_autocast(query.device.type):
        for sample in range(batch):
            for block, target in work.blocks(query[sample].transpose(0, 1), output[sample]):
                work.multiply(work.query_factor(block, normalization == "softmax"), context[sample], target)
    return output.transpose(1, 2)


def merge_contexts(
    maximum: Tensor | None, total: Tensor, sums: Tensor, group: Any
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Merge each rank's M, Z [B, H, Dk] and S [B, H, Dk, Dv] into those of all ranks, by one maximum and one sum.

    A rank without tokens passes M = -inf; where all ranks do, M becomes the lowest number. `maximum` None ("scaling")
    adds Z and S only.
    """
    packed = torch.cat((total[..., None], sums), dim=-1)
    if maximum is not None:
        highest = maximum.clamp(min=torch.finfo(maximum.dtype).min)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        packed *= (maximum - highest).exp()[..., None]
        maximum = highest
    dist.all_reduce(packed, group=group)
    return maximum, packed[..., 0], packed[..., 1:]


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums over positions are kept in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager:
    """Switch autocast off; devices without any, such as "meta", refuse the context that would."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
