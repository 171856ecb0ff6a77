"""Factorized attention: softmax over features of Q, softmax over positions of K, one small context in between.

    out = softmax_features(Q) · (softmax_positions(K)ᵀ · V)

Linear in the number of tokens in time and memory: the [Dk, Dv] context is the only thing that all positions share.

Shape letters: B batch, H heads, N query positions, M key positions, Dk key width of a head, Dv value width of a head.
Source: Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243; their two
normalisation functions rho_q and rho_k are the two softmaxes ("softmax") or one division ("scaling").
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .fa_attention_blocked import blocked_attention
from .fa_attention_triton import triton_attention
from .fa_attention_triton import why_unsupported as why_triton_unsupported
from .fa_packed import PackedDocuments, hide_masked, pack, packed_attention
from .fa_validation import Implementation, check_attention_arguments


def factorized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    normalization: str = "softmax",
    scale: float | None = None,
    cu_seqlens: Tensor | PackedDocuments | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Attend to all positions in time and memory linear in their number.

    "softmax" computes softmax_Dk(Q) · (softmax_M(K)ᵀ · V), where softmax_M runs over the real positions only. Each
    output row is a convex combination of the values: rows of the implied N×M matrix are non-negative and sum to one.
    "scaling" computes exactly scale · Q · (Kᵀ · V), the same as scale · (Q · Kᵀ) · V.

    Sums accumulate in float32 (float64 for float64 inputs) whatever autocast says; the result has the dtype of `query`.
    No N×M tensor is made. The contents of padded positions, NaN included, change nothing.

    Args:
        query: [B, H, N, Dk].
        key: [B, H, M, Dk]. M may differ from N (cross-attention).
        value: [B, H, M, Dv]. Dv may differ from Dk.
        mask: bool [B, M], True where a key position is real; None means that all are. A sample or packed document
            without any real position gives zeros.
        normalization: "softmax" or "scaling".
        scale: factor for "scaling"; None means 1 / (number of real positions of the sample or packed document).
        cu_seqlens: int [documents + 1], the running total of document lengths from 0 to N, for a packed batch: B is 1,
            M is N, and each document attends to itself alone, as if it were a sample of its own. None: not packed.
        impl: "reference" (plain PyTorch), "blocked" (for CPUs: over blocks that fit the cache, without temporaries of
            the length of the input), "triton" (fused kernels for NVIDIA GPUs, "softmax" only) or "auto" (the fastest
            one that can run; the reference in exported graphs and under torch.func's transforms). Only the reference
            has second and forward-mode derivatives.

    Returns:
        [B, H, N, Dv].

    Raises:
        ValueError: shapes, dtypes or devices disagree, `scale` comes with "softmax", a name is unknown, or `cu_seqlens`
            comes with B > 1 or M != N, or is no such total (see `check_cu_seqlens`).
        RuntimeError: the implementation that was asked for cannot run here; the message says why.

    Source: arXiv:1812.01243, section 3.2 (efficient attention) and its two normalisation functions.
    """
    check_attention_arguments(query, key, value, mask, normalization, scale, impl)
    documents = pack(cu_seqlens, (query.shape[0], query.shape[2]), query.device)
    if documents is not None and key.shape[2] != query.shape[2]:
        raise ValueError(
            f"With `cu_seqlens`, `key` must have the {query.shape[2]} positions of `query`, got {key.shape[2]}."
        )
    return unchecked_attention(query, key, value, mask, documents, normalization=normalization, scale=scale, impl=impl)


def unchecked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    documents: PackedDocuments | None,
    *,
    normalization: str,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute `factorized_attention` without checking its arguments: [B, H, N, Dv].

    Layers call it, as their model checks mask and packed documents once per forward pass.
    """
    bounds = None if documents is None else documents.cu_seqlens
    if documents is not None and mask is not None:
        key, value = hide_masked(key, value, mask, documents, normalization, scale)
        mask = None
    match _choose(impl, query, key, value, mask, bounds, normalization):
        case "triton":
            return triton_attention(query, key, value, mask, bounds)
        case "blocked":
            return blocked_attention(query, key, value, mask, bounds, normalization, scale)
    if documents is not None:
        return packed_attention(query, key, value, documents, normalization, scale)
    return _reference(query, key, value, mask, normalization, scale)


def _choose(
    impl: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalization: str,
) -> str:
    """Return the implementation to run; RuntimeError if it was asked for by name and cannot run."""
    is_on_cpu = query.device.type == "cpu"
    if impl == "auto":
        # Exported graphs hold plain operators only, which any runtime knows. Not `torch.compiler.is_exporting()`: torch
        # 2.6 lacks it, and in some later versions it is true while compiling, too.
        if getattr(torch.compiler, "_is_exporting_flag", False) or torch.jit.is_tracing():
            return "reference"
        if _is_transformed(query, key, value):
            return "reference"
        if is_on_cpu:
            return "blocked"
        is_supported = why_triton_unsupported(query, key, value, mask, cu_seqlens, normalization) is None
        return "triton" if is_supported else "reference"
    reason = None
    if impl != "reference" and _is_transformed(query, key, value):
        reason = "it has no forward-mode derivatives and no rules for torch.func's transforms"
    elif impl == "blocked" and not is_on_cpu:
        reason = f"it is for CPU tensors, got {query.device}"
    elif impl == "triton":
        reason = why_triton_unsupported(query, key, value, mask, cu_seqlens, normalization)
    if reason is not None:
        raise RuntimeError(f'impl="{impl}" cannot run: {reason}. Use "auto" or "reference".')
    return impl


def _is_transformed(*tensors: Tensor) -> bool:
    """Return True while torch.func's transforms or forward-mode derivatives are at work: custom operators skip them."""
    if torch.compiler.is_compiling():
        return False
    # There is no public way to ask for transforms.
    if getattr(torch._C, "_are_functorch_transforms_active", lambda: False)():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, normalization: str, scale: float | None
) -> Tensor:
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    device = query.device.type
    # Devices without autocast, such as "meta", refuse the context that would switch it off.
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        q, k, v = query.to(accumulate), key.to(accumulate), value.to(accumulate)
        if mask is not None:
            padding = ~mask[:, None, :, None]  # [B, 1, M, 1]
            v = v.masked_fill(padding, 0.0)
        if normalization == "softmax":
            # finfo.min instead of -inf: a sample without a real position then stays finite and is zeroed through V.
            k = k if mask is None else k.masked_fill(padding, torch.finfo(accumulate).min)
            if key.shape[-2] > 0:  # the maximum of nothing is an error; the context of nothing is zero
                k = k - k.amax(dim=-2, keepdim=True).detach()
            # Not `softmax(dim=-2)`: that adds positions one by one, in float32 off by 3e-5 at a million of them; `sum`
            # adds in blocks, and dividing the context instead of the weights costs less.
            weights = k.exp()
            total = weights.sum(dim=-2).clamp(min=torch.finfo(accumulate).tiny)[..., None]
            context = (weights.transpose(-2, -1) @ v) / total  # [B, H, Dk, Dv]
            output = q.softmax(dim=-1) @ context
        else:
            k = k if mask is None else k.masked_fill(padding, 0.0)
            output = q @ (_position_scale(k, mask, scale) * (k.transpose(-2, -1) @ v))
    return output.to(query.dtype)


def _position_scale(key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor | float:
    """Return `scale`, or one over the number of real positions: a number, or with a mask a tensor [B, 1, 1, 1]."""
    if scale is not None:
        return scale
    if mask is None:
        return 1.0 / max(key.shape[-2], 1)
    return 1.0 / mask.sum(dim=-1).clamp(min=1).to(key.dtype)[:, None, None, None]
