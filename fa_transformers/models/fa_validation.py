"""Checks of what a caller hands to the operator or to a model, all of them made before anything is computed.

`factorized_attention` checks the arguments of each call. A model checks its mask, `cu_seqlens` and `chunk_size` once
per forward pass (`fa_layout.py`), and its layers then call the operator without checks. Values are looked at only where
that is possible without breaking a graph: not while compiling, and not on the meta device.

Shape letters: B batch, H heads, N tokens or query positions, M key positions, Dk and Dv widths of a head.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Implementation = Literal["auto", "reference", "blocked", "triton"]
IMPLEMENTATIONS = get_args(Implementation)
NORMALIZATIONS = ("softmax", "scaling")


def check_attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    normalization: str,
    scale: float | None,
    impl: str,
) -> None:
    """Raise ValueError, naming the argument, unless `factorized_attention` can take these arguments."""
    check_heads(query, key, value)
    if mask is not None:
        check_key_mask(mask, key)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"`normalization` must be one of {NORMALIZATIONS}, got {normalization!r}.")
    if scale is not None and normalization != "scaling":
        raise ValueError('`scale` applies to normalization="scaling" only; the softmaxes have no scale.')
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"`scale` must be a finite number, got {scale}.")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"`impl` must be one of {IMPLEMENTATIONS}, got {impl!r}.")


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless Q [B, H, N, Dk], K [B, H, M, Dk] and V [B, H, M, Dv] go together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"`{name}` must be [batch, heads, positions, width], got shape {tuple(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` must be a floating-point tensor, got {tensor.dtype}.")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"`{name}` is {tensor.dtype} on {tensor.device} but `query` is {query.dtype} on {query.device}; "
                "convert one of them."
            )
    if key.shape[:2] != query.shape[:2] or value.shape[:2] != query.shape[:2]:
        raise ValueError(
            "`query`, `key` and `value` must have the same batch and head counts, got "
            f"{tuple(query.shape[:2])}, {tuple(key.shape[:2])} and {tuple(value.shape[:2])}."
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"`key` has width {key.shape[3]} but `query` has {query.shape[3]}; they must be equal.")
    if query.shape[3] == 0:
        raise ValueError("`query` and `key` must have at least one feature, got width 0.")
    if value.shape[2] != key.shape[2]:
        raise ValueError(f"`value` has {value.shape[2]} positions but `key` has {key.shape[2]}; they must be equal.")


def check_key_mask(mask: Tensor, key: Tensor) -> None:
    """Raise ValueError unless `mask` is bool [B, M] on the device of K [B, H, M, Dk]."""
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be bool with True at real positions, got {mask.dtype}; use `mask.bool()`.")
    if mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"`mask` must be [batch, key positions] = {(key.shape[0], key.shape[2])}, got {tuple(mask.shape)}."
        )
    if mask.device != key.device:
        raise ValueError(f"`mask` is on {mask.device} but `key` is on {key.device}.")


def check_mask(attention_mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return a user's attention mask as bool [B, N], True = real; zeros may stand between ones.

    Raises ValueError if it has another shape, or see `as_bool_mask`.
    """
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(
            f"`attention_mask` must be [batch, tokens] = {tuple(shape)}, got {tuple(attention_mask.shape)}; masks that "
            "differ between queries cannot be expressed by factorized attention. Pass 1 at real tokens, 0 elsewhere."
        )
    return as_bool_mask("attention_mask", attention_mask)


def as_bool_mask(name: str, mask: Tensor) -> Tensor:
    """Return a mask of any shape as bool, True where it isn't 0.

    A floating-point mask must hold zeros and ones alone: another number may be a weight, or a score to add, to which 0
    is real. It is looked at once, which a GPU waits for, and not in graphs nor on the meta device; bool and integer
    masks never are.

    Raises:
        ValueError: a floating-point mask holds another number; the message names the argument and what to pass.
    """
    if mask.is_complex():
        raise ValueError(f"`{name}` must be bool, integer or floating-point zeros and ones, got {mask.dtype}.")
    if mask.is_floating_point() and not is_tracing() and not mask.is_meta:
        others = (mask != 0) & (mask != 1)
        if others.any():
            raise ValueError(
                f"`{name}` must hold 1 where something is real and 0 elsewhere, got {mask[others][0].item():g} in "
                f"{mask.dtype}. Weights and additive masks (0 at real tokens, a very low number at padding) are not "
                "supported: pass the tokenizer's or processor's own mask, or `mask == 0` of an additive one."
            )
    return mask.bool()


def is_tracing() -> bool:
    """Return True while a graph is made, for which the values of tensors can't be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` cuts `num_tokens` tokens into documents.

    Its values are not read in compiled graphs and on the meta device.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "`cu_seqlens` must be int32 or int64 [documents + 1] with at least one document, got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    if torch.compiler.is_compiling() or cu_seqlens.is_meta:
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"`cu_seqlens` must rise from 0 to the number of tokens, {num_tokens}, without falling in between, got "
            f"{cu_seqlens.tolist() if len(cu_seqlens) < 20 else 'other values'}: it is the running total of lengths."
        )


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
