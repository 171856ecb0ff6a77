"""Factorized attention over blocks of positions that fit the processor's cache: the implementation for CPUs.

One pass over K and V accumulates, block by block, the running maximum M, the sum Z = Σ exp(K - M) and the context
C = (Σ exp(K - M)ᵀ V) / Z (`fa_context.py`); a second pass over Q writes softmax(Q) C.
The backward pass recomputes the softmaxes from Q, K, M and Z, again block by block. With P and R the two softmaxes and
G the gradient of the output:

    dC = Pᵀ G        dQ = P ∘ (G Cᵀ - rowsum(P ∘ G Cᵀ))
    dV = R dC        dK = R ∘ (V dCᵀ - s),  s_j = C_j · dC_j

For "scaling", P = Q, R = scale · K and the subtracted terms are absent.

Shape letters: B batch, H heads, N query positions, M key positions, Dk key width, Dv value width, n positions of a
block, S separate sequences: the samples, or the documents of a packed row. Blocks are [n, H, width], as models lay them
out.
"""

import hashlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from .fa_context import Workspace, accumulate, accumulator_dtype, add_outer, real_positions, without_autocast


def operator_namespace(module_name: str) -> str:
    """Return the namespace of a module's operators, which torch wants in ASCII.

    A copy of a file that came with a checkpoint may be loaded beside the package's, under a name that holds its
    folder's, and registers operators of its own. A checksum keeps names apart of which ASCII leaves the same.
    """
    plain = re.sub(r"\W", "_", module_name, flags=re.ASCII)
    return plain if module_name.isascii() else f"{plain}_{hashlib.sha256(module_name.encode()).hexdigest()[:16]}"


NAMESPACE = operator_namespace(__name__)


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalization: str = "softmax",
    scale: float | None = None,
) -> Tensor:
    """Compute `factorized_attention`, without checking the arguments: [B, H, N, Dv].

    Works under autocast, torch.compile(fullgraph=True) and once through autograd; not for second derivatives.
    """
    output, *_ = _forward(query, key, value, mask, cu_seqlens, normalization == "softmax", scale)
    return output.transpose(1, 2)


def _sequences(
    batch_size: int, num_keys: int, num_queries: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Iterator[tuple[int, slice | Tensor, slice]]:
    """Yield each sequence's sample, its key positions (indices where padding lies between) and its query positions."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        yield from ((0, slice(*ends), slice(*ends)) for ends in zip(bounds[:-1], bounds[1:], strict=True))
        return
    for sample in range(batch_size):
        positions = slice(0, num_keys) if mask is None else real_positions(mask[sample])
        yield sample, positions, slice(0, num_queries)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_softmax: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output [B, N, H, Dv], and for the backward pass the context [S, H, Dk, Dv], M and Z [S, H, Dk]."""
    output, context, maximum, total = _empty_results(query, value, cu_seqlens)
    context.zero_(), total.zero_(), maximum.fill_(-torch.inf)
    work = Workspace(query, min(query.shape[2], key.shape[2]))
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (query, key, value))
    places = _sequences(len(query), key.shape[2], query.shape[2], mask, cu_seqlens)
    with without_autocast("cpu"):
        for index, (sample, positions, rows) in enumerate(places):
            real_keys, real_values = keys[sample, positions], values[sample, positions]
            if len(real_keys):
                accumulate(real_keys, real_values, context[index], maximum[index], total[index], is_softmax, work)
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
    accumulator = accumulator_dtype(query)
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
    """Return the gradients of Q, K and V [B, positions, H, width] from the output's gradient [B, N, H, Dv]."""
    results = _empty_gradients(query, key, value)
    query_gradient, key_gradient, value_gradient = results
    if mask is not None:
        key_gradient.zero_(), value_gradient.zero_()
    work = Workspace(query, min(query.shape[2], key.shape[2]))
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (query, key, value))
    places = _sequences(len(query), key.shape[2], query.shape[2], mask, cu_seqlens)
    with without_autocast("cpu"):
        for index, (sample, positions, rows) in enumerate(places):
            context_gradient = torch.zeros_like(context[index])
            for query_block, gradient_block, target in work.blocks(
                queries[sample, rows], gradient[sample, rows], query_gradient[sample, rows]
            ):
                _backward_queries(
                    query_block, gradient_block, target, context[index], context_gradient, is_softmax, work
                )
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
            highest = maximum[index] if is_softmax else None
            for key_block, value_block, key_goal, value_goal in work.blocks(
                real_keys, real_values, key_target, value_target
            ):
                _backward_keys(key_block, value_block, key_goal, value_goal, context_gradient, highest, shift, work)
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
    work: Workspace,
) -> None:
    """Write dQ of a block, and add its share of dC."""
    factor, gradient = work.query_factor(query, is_softmax), work.cast("gradient", gradient)
    add_outer(context_gradient, factor, gradient)
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
    work: Workspace,
) -> None:
    """Write dK and dV of a block, from dC / Z (or scale · dC)."""
    weights = work.key_factor(key, maximum)
    work.multiply(weights, context_gradient, value_gradient)
    value, context_gradient = work.cast("value", value), context_gradient.transpose(1, 2)
    if shift is None:
        work.multiply(value, context_gradient, key_gradient)
        return
    product = work.multiply(value, context_gradient, work.buffer("gradient of factor", *key.shape))
    key_gradient.copy_(product.sub_(shift).mul_(weights))


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the three gradients [B, positions, H, width], contiguous as models lay out their tokens."""
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
