"""Factorized attention by Triton kernels: when they can run, how they are launched, and their gradients.

The kernels and their formulas stand in `fa_triton_kernels.py`. For the backward pass context, maximum and sum of each
segment are saved besides the inputs.

Shape letters: B batch, H heads, N query positions, M key positions, Dk key width, Dv value width, D documents.
"""

import torch
from torch import Tensor

from .fa_attention_blocked import operator_namespace
from .fa_triton_kernels import triton

try:
    from .fa_triton_kernels import (
        IS_INTERPRETED,
        context_fwd_kernel,
        key_bwd_kernel,
        merge_kernel,
        output_fwd_kernel,
        query_bwd_kernel,
    )
except ImportError:  # defined where Triton is installed
    assert triton is None

MIN_WIDTH, MAX_WIDTH = 16, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = 64  # the blocks of wider heads need more shared memory than only data-center GPUs have
# Chunks are as long as leaves this many programs for each multiprocessor, which holds 2, 3 or 4 at once (by kernel) at
# head width 64: whole waves, and few partial contexts to write and read.
PROGRAMS_PER_PROCESSOR = 6

_NAMESPACE = operator_namespace(__name__)


def why_unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalization: str = "softmax",
) -> str | None:
    """Return the reason why `triton_attention` cannot run on these tensors, or None if it can."""
    if triton is None:
        return "triton is not installed"
    if normalization != "softmax":
        return f'the kernels compute normalization="softmax" only, not {normalization!r}'
    if query.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {query.dtype}"
    for name, tensor in (("query", query), ("value", value)):
        width = tensor.shape[-1]
        if not MIN_WIDTH <= width <= MAX_WIDTH:
            return f"heads must be {MIN_WIDTH} to {MAX_WIDTH} wide, `{name}` has width {width}"
    if cu_seqlens is not None and mask is not None:
        return "the kernels take `mask` or `cu_seqlens`, not both"
    if IS_INTERPRETED.value:
        return None if query.device.type == "cpu" else "interpreted kernels (TRITON_INTERPRET) run on CPU tensors only"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, the tensors are on {query.device}"
    properties = torch.cuda.get_device_properties(query.device)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 or later, {properties.name} has {capability}"
    if max(query.shape[-1], value.shape[-1]) > WIDE and capability not in ((8, 0), (9, 0), (10, 0)):
        return f"heads wider than {WIDE} need the shared memory of an A100, H100 or B200, not {properties.name}"
    return None


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Compute softmax_features(Q) · (softmax_positions(K)ᵀ · V) with the Triton kernels.

    The contents of padded keys and values, NaN included, change neither output nor gradients. Differentiable once.

    Args:
        query: [B, H, N, Dk], any strides; a last stride other than 1 costs a copy.
        key: [B, H, M, Dk].
        value: [B, H, M, Dv].
        mask: bool [B, M], True where a key position is real. A sample without any gives zeros, with zero gradients.
        cu_seqlens: int32 or int64 [D + 1], rising from 0 to N: document d is the positions from cu_seqlens[d] up to
            cu_seqlens[d + 1] of a packed row (B = 1, N = M) and attends to itself only. Its values are not checked,
            which would make the GPU wait.

    Returns:
        [B, H, N, Dv] in the dtype of `query`, a transposed view of [B, N, H, Dv] memory.

    Raises:
        RuntimeError: the kernels cannot run on these tensors; the message is that of `why_unsupported`.

    Source: arXiv:1812.01243, section 3.2.
    """
    reason = why_unsupported(query, key, value, mask, cu_seqlens)
    if reason is not None:
        raise RuntimeError(f"The Triton kernels of factorized attention cannot run: {reason}.")
    return _forward(query, key, value, mask, cu_seqlens)[0]


def _launch_options(query: Tensor, value: Tensor, is_backward: bool) -> dict[str, int]:
    """Choose block sizes, warps and stages of the kernels that work on rows.

    They follow what ptxas reports for sm_90: blocks that fit the shared memory and, in half precision, the registers.
    Float32 products without TF32 run outside tensor cores and keep whole operands in registers, hence the small blocks.
    """
    block_k, block_v = (triton.next_power_of_2(tensor.shape[-1]) for tensor in (query, value))
    is_half = query.element_size() == 2
    area = 16384 if not is_backward else 8192 if is_half else 4096
    block_v = min(block_v, 128, max(16, area // block_k))
    widest = max(block_k, block_v)
    block_n = 8192 // widest if is_half else 16 if is_backward else 2048 // widest
    return {
        "DK": query.shape[-1],
        "DV": value.shape[-1],
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK_N": max(16, min(64, block_n)),
        "num_warps": 4 if is_half and block_k * block_v <= 4096 else 8,
        "num_stages": 3 if is_half and widest <= 64 else 2,
    }


def _plan(rows: Tensor, cu_seqlens: Tensor | None, options: dict[str, int]) -> tuple[int, int, tuple[int, ...]]:
    """Cut the positions of `rows` [B, H, N, D] into chunks.

    Returns the number of slots for partial results, the number of programs, and the integers that kernels take:
    heads, segments, chunks per sample, positions, positions per chunk.
    """
    batch, heads, length, _ = rows.shape
    num_blocks = triton.cdiv(options["DV"], options["BLOCK_V"])
    processors = torch.cuda.get_device_properties(rows.device).multi_processor_count if rows.is_cuda else 2
    chunks = max(1, PROGRAMS_PER_PROCESSOR * processors // max(1, batch * heads * num_blocks))
    chunk = options["BLOCK_N"] * max(1, triton.cdiv(length, chunks * options["BLOCK_N"]))
    num_chunks = max(1, triton.cdiv(length, chunk))
    segments, slots = batch, batch * num_chunks
    if cu_seqlens is not None:
        segments = cu_seqlens.shape[0] - 1
        slots = length // chunk + segments
    return slots, slots * heads * num_blocks, (heads, segments, num_chunks, length, chunk)


def _merge(parts, maxima, sums, cu_seqlens: Tensor | None, results, plan: tuple[int, ...], options: dict[str, int]):
    """Launch `merge_kernel`; parts, maxima, sums hold a row per slot, results a row per segment."""
    heads, segments, num_chunks, _, chunk = plan
    slots_at_once = min(16, triton.next_power_of_2(triton.cdiv(parts.shape[0], max(1, segments))))
    entries = 4096 // slots_at_once
    grid = (segments * heads * triton.cdiv(options["DK"] * options["DV"], entries),)
    merge_kernel[grid](
        parts, maxima, sums, cu_seqlens, *results, heads, num_chunks, chunk,
        DK=options["DK"], DV=options["DV"], BLOCK_S=slots_at_once, BLOCK_E=entries,
    )  # fmt: skip


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_rows(query: Tensor, length: int, width: int) -> Tensor:
    """Allocate [B, H, length, width] token by token, which the layer's output projection reads without a copy."""
    batch, heads = query.shape[:2]
    return query.new_empty(batch, length, heads, width).transpose(1, 2)


def _empty_state(query: Tensor, num: int, key_width: int, value_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate context, maximum and sum of `num` slots or segments."""
    sizes = (num, query.shape[1], key_width)
    return tuple(query.new_empty(shape, dtype=torch.float32) for shape in ((*sizes, value_width), sizes, sizes))  # type: ignore[return-value]


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if mask is None else (mask.view(torch.uint8), mask.stride(0), mask.stride(1))


@torch.library.custom_op(
    f"{_NAMESPACE}::factorized_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? cu_seqlens)"
    " -> (Tensor output, Tensor context, Tensor maximum, Tensor total)",
)
def _forward(query, key, value, mask, cu_seqlens):
    query, key, value = (_with_unit_stride(tensor) for tensor in (query, key, value))
    options = _launch_options(query, value, is_backward=False)
    widths = (options["DK"], options["DV"])
    output = _empty_rows(query, query.shape[2], options["DV"])
    mask, *mask_strides = _mask_arguments(mask)
    with torch.cuda.device_of(query):
        slots, programs, plan = _plan(key, cu_seqlens, options)
        state = parts = _empty_state(query, plan[1], *widths)
        is_whole = cu_seqlens is None and plan[2] == 1
        if not is_whole:
            parts = _empty_state(query, slots, *widths)
        context_fwd_kernel[(programs,)](
            key, value, mask, cu_seqlens, *parts,
            *key.stride()[:3], *value.stride()[:3], *mask_strides, *plan, IS_WHOLE=is_whole, **options,
        )  # fmt: skip
        if not is_whole:
            _merge(*parts, cu_seqlens, state, plan, options)
        _, programs, plan = _plan(query, cu_seqlens, options)
        output_fwd_kernel[(programs,)](
            query, cu_seqlens, state[0], output, *query.stride()[:3], *output.stride()[:3], *plan, **options
        )
    return output, *state


@_forward.register_fake
def _(query, key, value, mask, cu_seqlens):
    segments = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    output = _empty_rows(query, query.shape[2], value.shape[3])
    return output, *_empty_state(query, segments, query.shape[3], value.shape[3])


@torch.library.custom_op(
    f"{_NAMESPACE}::factorized_attention_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? cu_seqlens,"
    " Tensor context, Tensor maximum, Tensor total) -> (Tensor, Tensor, Tensor)",
)
def _backward(gradient, query, key, value, mask, cu_seqlens, context, maximum, total):
    gradient, query, key, value = (_with_unit_stride(tensor) for tensor in (gradient, query, key, value))
    options = _launch_options(query, value, is_backward=True)
    d_query, d_key, d_value = (_empty_rows(query, *tensor.shape[2:]) for tensor in (query, key, value))
    mask, *mask_strides = _mask_arguments(mask)
    with torch.cuda.device_of(query):
        slots, programs, plan = _plan(query, cu_seqlens, options)
        d_context = query.new_empty((slots, *context.shape[1:]), dtype=torch.float32)
        query_bwd_kernel[(programs,)](
            query, gradient, cu_seqlens, context, d_query, d_context,
            *query.stride()[:3], *gradient.stride()[:3], *d_query.stride()[:3], *plan, **options,
        )  # fmt: skip
        if cu_seqlens is not None or plan[2] > 1:
            parts, d_context = d_context, torch.empty_like(context)
            _merge(parts, None, None, cu_seqlens, (d_context, None, None), plan, options)
        _, programs, plan = _plan(key, cu_seqlens, options)
        key_bwd_kernel[(programs,)](
            key, value, mask, cu_seqlens, context, maximum, total, d_context, d_key, d_value,
            *key.stride()[:3], *value.stride()[:3], *mask_strides, *d_key.stride()[:3], *d_value.stride()[:3],
            *plan, **options,
        )  # fmt: skip
    return d_query, d_key, d_value


@_backward.register_fake
def _(gradient, query, key, value, mask, cu_seqlens, context, maximum, total):
    return tuple(_empty_rows(query, *tensor.shape[2:]) for tensor in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradient, *_):
    if gradient is None:
        return None, None, None, None, None
    return *_backward(gradient, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
