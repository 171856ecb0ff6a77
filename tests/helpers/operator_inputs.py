"""Inputs of the operator, and the comparison of its outputs with the oracle: shared by the tests of the operator.

Every tolerance is `oracles.error_budget`, a multiple of a rounding unit derived next to it, or exact.
"""

import pytest
import torch
from oracles import attention, error_budget
from torch import Tensor

NORMALIZATIONS = ("softmax", "scaling")
EPS64 = torch.finfo(torch.float64).eps
both_normalizations = pytest.mark.parametrize("normalization", NORMALIZATIONS)


def make_inputs(
    batch: int = 2,
    heads: int = 3,
    num_queries: int = 17,
    num_keys: int = 23,
    key_width: int = 5,
    value_width: int = 7,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(batch, heads, num_queries, key_width, dtype=torch.float64).to(dtype)
    key = torch.randn(batch, heads, num_keys, key_width, dtype=torch.float64).to(dtype)
    value = torch.randn(batch, heads, num_keys, value_width, dtype=torch.float64).to(dtype)
    return query, key, value


def make_mask(lengths: list[int], num_keys: int, side: str = "right") -> Tensor:
    mask = torch.zeros(len(lengths), num_keys, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        start = {"right": 0, "left": num_keys - length, "both": (num_keys - length) // 2}[side]
        row[start : start + length] = True
    return mask


def assert_within_budget(output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask=None, **options) -> float:
    """Compare with the oracle; return the largest error as a fraction of its budget."""
    expected = attention(query, key, value, mask, **options)
    budget = error_budget(query, key, value, mask, **options)
    rows = options.get("rows")
    error = (output.double() if rows is None else output[:, :, list(rows)].double()) - expected
    assert torch.isfinite(error).all()
    worst = (error.abs() / budget).max().item()
    assert worst <= 1.0, f"error {error.abs().max():.3e} is {worst:.2f} times its budget"
    return worst
