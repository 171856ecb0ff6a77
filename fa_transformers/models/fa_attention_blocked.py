"""Factorized attention over blocks of positions that fit the processor's cache: the implementation for CPUs.

One pass over K and V accumulates, block by block, the running maximum M, the sum Z = Σ exp(K - M) and the context
C = (Σ exp(K - M)ᵀ V) / Z; a second pass over Q writes softmax(Q) C. No temporary grows with the number of positions.
The backward pass recomputes the softmaxes from Q, K, M and Z, again block by block. With P and R the two softmaxes and
G the gradient of the output:

    dC = Pᵀ G        dQ = P ∘ (G Cᵀ - rowsum(P ∘ G Cᵀ))
    dV = R dC        dK = R ∘ (V dCᵀ - s),  s_j = C_j · dC_j

For "scaling", P = Q, R = scale · K and the subtracted terms are absent.

Shape letters: B batch, H heads, N query positions, M key positions, Dk key width, Dv value width, n positions of a
block, S separate sequences: the samples, or the documents of a packed row. Blocks are [n, H, width], as models lay them
out.
"""

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

CACHED_ELEMENTS = 2**18
"""Numbers of a block that one thread works on: 1 MiB in float32, about what a core's second-level cache holds."""

SMALLEST_BLOCK, LARGEST_BLOCK = 256, 1024
"""In positions: below, calls would take longer than their work; above, float32 sums inside a block lose digits."""

# A copy of this file that came with a checkpoint may be loaded beside the package's: each registers its own operators.
NAMESPACE = re.sub(r"\W", "_", __name__)


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalization: str = "softmax",
    scale: float | None = None,
) -> Tensor:
    """What `factorized_attention` computes, with its arguments, which are not checked here: [B, H, N, Dv].

    Works under autocast, torch.compile(fullgraph=True) and once through autograd; not for second derivatives.
    """
    output, *_ = _forward(query, key, value, mask, cu_seqlens, normalization == "softmax", scale)
    return output.transpose(1, 2)


class _Workspace:
    """The buffers that all blocks of a pass share, in the accumulator's type; `dtype` is that of the inputs."""

    def __init__(self, dtype: torch.dtype, num_positions: int):
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.num_positions = num_positions
        self._buffers: dict[tuple, Tensor] = {}

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Cut tensors [positions, H, width] alike. A block fits the cache and is a sixth of all positions at most."""
        cached = CACHED_ELEMENTS * torch.get_num_threads() // max(math.prod(tensor.shape[1:]) for tensor in tensors)
        size = max(SMALLEST_BLOCK, min(cached, LARGEST_BLOCK, self.num_positions // 6))
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def buffer(self, name: str, *shape: int) -> Tensor:
        held = self._buffers.get((name, *shape[1:]))
        if held is None or held.shape[0] < shape[0]:
            held = self._buffers[name, *shape[1:]] = torch.empty(shape, dtype=self.dtype)
        return held[: shape[0]]

    def cast(self, name: str, block: Tensor) -> Tensor:
        return block if block.dtype == self.dtype else self.buffer(name, *block.shape).copy_(block)

    def query_factor(self, block: Tensor, is_softmax: bool) -> Tensor:
        """P of a block of Q."""
        block = self.cast("factor", block)
        return torch.softmax(block, -1, out=self.buffer("factor", *block.shape)) if is_softmax else block

    def key_factor(self, block: Tensor, maximum: Tensor | None) -> Tensor:
        """exp(K - M) of a block of K; K itself for "scaling"."""
        if maximum is None:
            return self.cast("factor", block)
        return torch.sub(block, maximum, out=self.buffer("factor", *block.shape)).exp_()

    def multiply(self, left: Tensor, right: Tensor, target: Tensor) -> Tensor:
        """Write `left` [n, H, i] times `right` [H, i, j] into `target` [n, H, j], which may have another type."""
        is_direct = target.dtype == self.dtype
        result = target if is_direct else self.buffer("product", *target.shape)
        torch.bmm(left.transpose(0, 1), right, out=result.transpose(0, 1))
        return target if is_direct else target.copy_(result)


def _add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right, for `left` [n, H, i], `right` [n, H, j] and `total` [H, i, j].

    Not by `baddbmm_`: for narrow heads that adds each product to the long sum, and digits are lost.
    """
    total += torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1))


def _sequences(
    batch_size: int, num_keys: int, num_queries: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Iterator[tuple[int, slice | Tensor, slice]]:
    """The sample that each sequence lies in, its key positions (indices where padding lies between), its queries."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        yield from ((0, slice(*ends), slice(*ends)) for ends in zip(bounds[:-1], bounds[1:], strict=True))
        return
    for sample in range(batch_size):
        positions: slice | Tensor = slice(0, num_keys)
        if mask is not None:
            real = mask[sample].nonzero()[:, 0]
            first, stop = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
            positions = slice(first, stop) if stop - first == len(real) else real
        yield sample, positions, slice(0, num_queries)


def _accumulate(
    key: Tensor, value: Tensor, context: Tensor, maximum: Tensor, total: Tensor, is_softmax: bool, work: _Workspace
) -> None:
    """Fill the context [H, Dk, Dv], not yet divided by `total`, from K and V [positions, H, width]."""
    for key_block, value_block in work.blocks(key, value):
        if is_softmax:
            higher = torch.maximum(maximum, key_block.amax(dim=0).to(maximum.dtype))
            # Where nothing came before, exp(-inf - higher) is zero, as it should be.
            shrink = (maximum - higher).exp_()
            maximum.copy_(higher)
            context.mul_(shrink[:, :, None])
        weights = work.key_factor(key_block, maximum if is_softmax else None)
        if is_softmax:
            total.mul_(shrink).add_(weights.sum(dim=0))
        _add_outer(context, weights, work.cast("value", value_block))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_softmax: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, N, H, Dv]; context [S, H, Dk, Dv], M and Z [S, H, Dk] for the backward pass."""
    output, context, maximum, total = _empty_results(query, value, cu_seqlens)
    context.zero_(), total.zero_(), maximum.fill_(-torch.inf)
    work = _Workspace(query.dtype, min(query.shape[2], key.shape[2]))
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (query, key, value))
    places = _sequences(len(query), key.shape[2], query.shape[2], mask, cu_seqlens)
    with torch.autocast("cpu", enabled=False):
        for index, (sample, positions, rows) in enumerate(places):
            real_keys, real_values = keys[sample, positions], values[sample, positions]
            if len(real_keys):
                _accumulate(real_keys, real_values, context[index], maximum[index], total[index], is_softmax, work)
                if is_softmax:
                    context[index] /= total[index, :, :, None]
                else:
                    context[index] *= 1.0 / len(real_keys) if scale is None else scale
            for query_block, output_block in work.blocks(queries[sample, rows], output[sample, rows]):
                work.multiply(work.query_factor(query_block, is_softmax), context[index], output_block)
    return output, context, maximum, total


def _empty_results(query: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, num_queries, key_width = query.shape
    num_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    maximum = query.new_empty(num_sequences, heads, key_width, dtype=accumulator)
    return (
        query.new_empty(batch, num_queries, heads, value.shape[3]),
        query.new_empty(num_sequences, heads, key_width, value.shape[3], dtype=accumulator),
        maximum,
        torch.empty_like(maximum),
    )


_forward = torch.library.custom_op(f"{NAMESPACE}::forward", _attend, mutates_args=())


@_forward.register_fake
def _(query, key, value, mask, cu_seqlens, is_softmax, scale):
    return _empty_results(query, value, cu_seqlens)


@torch.library.custom_op(f"{NAMESPACE}::backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    maximum: Tensor,
    total: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_softmax: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Q, K and V [B, positions, H, width] from that of the output [B, N, H, Dv]."""
    results = _empty_gradients(query, key, value)
    query_gradient, key_gradient, value_gradient = results
    if mask is not None:
        key_gradient.zero_(), value_gradient.zero_()
    work = _Workspace(query.dtype, min(query.shape[2], key.shape[2]))
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (query, key, value))
    places = _sequences(len(query), key.shape[2], query.shape[2], mask, cu_seqlens)
    with torch.autocast("cpu", enabled=False):
        for index, (sample, positions, rows) in enumerate(places):
            context_gradient = torch.zeros_like(context[index])
            for blocks in work.blocks(queries[sample, rows], gradient[sample, rows], query_gradient[sample, rows]):
                _backward_queries(*blocks, context[index], context_gradient, is_softmax, work)
            real_keys, real_values = keys[sample, positions], values[sample, positions]
            if not len(real_keys):
                continue
            if is_softmax:
                context_gradient /= total[index, :, :, None]  # R = exp(K - M) / Z: the division goes here once
            else:
                context_gradient *= 1.0 / len(real_keys) if scale is None else scale
            shift = (context[index] * context_gradient).sum(dim=-1) if is_softmax else None
            is_whole = isinstance(positions, slice)
            key_target = key_gradient[sample, positions] if is_whole else torch.empty_like(real_keys)
            value_target = value_gradient[sample, positions] if is_whole else torch.empty_like(real_values)
            for blocks in work.blocks(real_keys, real_values, key_target, value_target):
                _backward_keys(*blocks, context_gradient, maximum[index] if is_softmax else None, shift, work)
            if not is_whole:
                key_gradient[sample, positions], value_gradient[sample, positions] = key_target, value_target
    return results


def _backward_queries(
    query: Tensor,
    gradient: Tensor,
    query_gradient: Tensor,
    context: Tensor,
    context_gradient: Tensor,
    is_softmax: bool,
    work: _Workspace,
) -> None:
    """dQ of a block, and its share of dC."""
    factor, gradient = work.query_factor(query, is_softmax), work.cast("gradient", gradient)
    _add_outer(context_gradient, factor, gradient)
    if not is_softmax:
        work.multiply(gradient, context.transpose(1, 2), query_gradient)
        return
    product = work.multiply(gradient, context.transpose(1, 2), work.buffer("gradient of factor", *factor.shape))
    product.mul_(factor)
    product.addcmul_(factor, product.sum(dim=-1, keepdim=True), value=-1)
    query_gradient.copy_(product)


def _backward_keys(
    key: Tensor,
    value: Tensor,
    key_gradient: Tensor,
    value_gradient: Tensor,
    context_gradient: Tensor,
    maximum: Tensor | None,
    shift: Tensor | None,
    work: _Workspace,
) -> None:
    """dK and dV of a block, from dC / Z (or scale · dC)."""
    weights = work.key_factor(key, maximum)
    work.multiply(weights, context_gradient, value_gradient)
    value, context_gradient = work.cast("value", value), context_gradient.transpose(1, 2)
    if shift is None:
        work.multiply(value, context_gradient, key_gradient)
        return
    product = work.multiply(value, context_gradient, work.buffer("gradient of factor", *key.shape))
    key_gradient.copy_(product.sub_(shift).mul_(weights))


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous [B, positions, H, width], as models lay out their tokens."""
    query, key, value = (
        tensor.new_empty(tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3])
        for tensor in (query, key, value)
    )
    return query, key, value


@_backward.register_fake
def _(gradient, query, key, value, context, maximum, total, mask, cu_seqlens, is_softmax, scale):
    return _empty_gradients(query, key, value)


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, mask, cu_seqlens, ctx.is_softmax, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output[1:], mask, cu_seqlens)


def _differentiate(ctx, gradient, *_) -> tuple[Tensor | None, ...]:
    gradients = _backward(gradient, *ctx.saved_tensors, ctx.is_softmax, ctx.scale)
    return *(tensor.transpose(1, 2) for tensor in gradients), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
