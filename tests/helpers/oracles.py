"""What tests measure against: a float64 NumPy attention that builds the N×M matrix, an error budget, a memory meter.

Nothing here calls the package. The oracle drops padded positions by indexing, the operator by filling, so the two can
only agree where padding is handled right.
"""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64).numpy()


def attention_matrix(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    normalization: str = "softmax",
    scale: float | None = None,
    rows: Sequence[int] | None = None,
    absolute: bool = False,
) -> np.ndarray:
    """Build the matrix A of out = A · V, entry by definition, in float64.

    Args:
        rows: the query positions to build; None builds all of them. One row has M entries.
        absolute: build |Q| · |K|ᵀ for "scaling", the quantity that rounding errors are relative to. "softmax" is
            non-negative already.

    Returns:
        [B, H, rows, M] with zero columns at padded positions; all zero for a sample without a real position.
    """
    q, k = _float64(query), _float64(key)
    if rows is not None:
        q = q[:, :, list(rows)]
    batch, heads, num_rows, _ = q.shape
    matrix = np.zeros((batch, heads, num_rows, k.shape[2]))
    for b in range(batch):
        real = np.arange(k.shape[2]) if mask is None else np.flatnonzero(mask[b].cpu().numpy())
        if len(real) == 0:
            continue
        for h in range(heads):
            if normalization == "softmax":
                matrix[b, h][:, real] = _softmax(q[b, h], axis=1) @ _softmax(k[b, h, real], axis=0).T
                continue
            factor = 1.0 / len(real) if scale is None else scale
            left, right = q[b, h], k[b, h, real]
            if absolute:
                factor, left, right = abs(factor), np.abs(left), np.abs(right)
            matrix[b, h][:, real] = factor * (left @ right.T)
    return matrix


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """Return A · V in float64, A from `attention_matrix`, whose options this takes: [B, H, rows, Dv]."""
    matrix = attention_matrix(query, key, mask, **options)
    return torch.from_numpy(_multiply(matrix, _float64(value), mask))


def _multiply(matrix: np.ndarray, values: np.ndarray, mask: Tensor | None) -> np.ndarray:
    if mask is not None:
        # A zero weight times NaN is NaN, so what pads hold must not take part at all.
        values = np.where(mask.cpu().numpy()[:, None, :, None], values, 0.0)
    return matrix @ values


def error_budget(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, normalization: str = "softmax", **options
) -> Tensor:
    """Bound |operator - oracle| for each output number: [B, H, rows, Dv] in float64.

    With u the unit roundoff of the accumulator and S = |A| · |V|, rounding errors relative to S are
        u · max|logit - its maximum| for each softmax: rounding x by x·u moves exp(x) by as much,
        u · √n for a sum of n numbers: M in the normaliser, M in the context, Dk in the output, added in squares. Each
            rounding is uniform within u of the partial sum, so the deviation is u·√n/3 (random signs: Higham and
            Mary 2019, https://doi.org/10.1137/18M1226312); this allows three,
        u · 8 for the single operations: two exponentials (each within two units), two divisions, two products.
    The result is then rounded once to the dtype of `query`: by half a unit, or half the smallest number it can hold.
    """
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    unit = torch.finfo(accumulator).eps / 2
    options["normalization"] = normalization
    size = torch.from_numpy(
        _multiply(attention_matrix(query, key, mask, absolute=True, **options), np.abs(_float64(value)), mask)
    )
    roundings = 8.0 + (2.0 * key.shape[2] + key.shape[3]) ** 0.5
    if normalization == "softmax":
        roundings += _spread(query, dim=-1)
        roundings += _spread(key if mask is None else key[mask[:, None, :].expand(key.shape[:3])], dim=None)
    inside = roundings * unit * size
    expected = attention(query, key, value, mask, **options)
    out = torch.finfo(query.dtype)
    return inside + out.eps / 2 * (expected.abs() + inside) + out.smallest_normal * out.eps / 2


def _spread(logits: Tensor, dim: int | None) -> float:
    if logits.numel() == 0:
        return 0.0
    logits = logits.detach().double()
    if dim is None:
        return (logits.max() - logits.min()).item()
    return (logits.amax(dim) - logits.amin(dim)).max().item()


class MemoryMeter(TorchDispatchMode):
    """Count the bytes of all tensors that operations inside the `with` block create and that are still alive.

    `peak_bytes` is the largest total, `largest_numel` the size of the largest storage in elements. Backward passes
    started inside the block are counted too. Tensors made before the block are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.largest_numel = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._seen.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.largest_numel = max(self.largest_numel, size // tensor.element_size())
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live_bytes -= size
