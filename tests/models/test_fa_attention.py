"""Protects the operator: its values and gradients against a float64 oracle, its padding rules, its memory, its errors.

Every tolerance is `oracles.error_budget`, a multiple of a rounding unit derived next to it, or exact.
"""

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import MemoryMeter, attention, attention_matrix, error_budget
from torch import Tensor
from torch.autograd import forward_ad

import fa_transformers
from fa_transformers import factorized_attention
from fa_transformers.models import fa_attention_blocked

NORMALIZATIONS = ("softmax", "scaling")
EPS64 = torch.finfo(torch.float64).eps
both_normalizations = pytest.mark.parametrize("normalization", NORMALIZATIONS)


@pytest.fixture(autouse=True, params=["blocked", "reference"])
def implementation(request, monkeypatch) -> str:
    """Every test here holds for each implementation: the operator's name means the one that is tested."""
    monkeypatch.setitem(
        globals(), "factorized_attention", partial(fa_transformers.factorized_attention, impl=request.param)
    )
    return request.param


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


def implied_matrix(query: Tensor, key: Tensor, mask: Tensor | None = None, attend=None, **options):
    """Return the N×M matrix that `attend` applies, read off by feeding it the identity as values."""
    identity = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    return (attend or factorized_attention)(query, key, identity, mask, **options)


def swapped_axes_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The classic bug: softmax over positions of Q and over features of K."""
    return query.softmax(dim=-2) @ (key.softmax(dim=-1).transpose(-2, -1) @ value)


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


# Values


@both_normalizations
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_positions", [1, 2, 63, 65, 1000])
def test_output_equals_the_explicit_matrix_times_the_values(num_positions, dtype, masked, normalization):
    query, key, value = make_inputs(num_queries=num_positions, num_keys=num_positions, dtype=dtype)
    mask = make_mask([num_positions, (num_positions + 1) // 2], num_positions) if masked else None
    output = factorized_attention(query, key, value, mask, normalization=normalization)
    assert output.dtype == dtype
    assert output.shape == (2, 3, num_positions, 7)
    assert_within_budget(output, query, key, value, mask, normalization=normalization)


@both_normalizations
@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 50), (50, 3), (1, 40), (40, 1)])
def test_cross_attention_equals_the_explicit_matrix(num_queries, num_keys, normalization):
    query, key, value = make_inputs(num_queries=num_queries, num_keys=num_keys)
    mask = make_mask([num_keys, max(1, num_keys // 2)], num_keys)
    output = factorized_attention(query, key, value, mask, normalization=normalization)
    assert_within_budget(output, query, key, value, mask, normalization=normalization)


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_positions", [1, 1_000, 65_536, 1_048_576])
def test_error_stays_in_budget_up_to_a_million_positions(num_positions, dtype, normalization, capsys):
    # Values with mean one keep the outputs near one, so that a relative error in the long sums stays visible.
    query, key, value = make_inputs(1, 1, num_positions, num_positions, key_width=4, value_width=3, dtype=dtype)
    value = value + 1
    output = factorized_attention(query, key, value, normalization=normalization)
    rows = sorted({0, num_positions // 3, num_positions // 2, num_positions - 1})
    options = {"normalization": normalization, "rows": rows}
    expected = attention(query, key, value, **options)
    error = ((output[:, :, rows].double() - expected).abs().max() / expected.abs().max()).item()
    used = assert_within_budget(output, query, key, value, **options)
    with capsys.disabled():
        name = str(dtype).removeprefix("torch.")
        print(
            f"\n  N={num_positions:>9,} {name:>8} {normalization:>7}: relative error {error:.2e}, {used:.1g} of budget"
        )


@pytest.mark.parametrize("num_positions", [65_536, 1_048_576])
def test_rows_sum_to_one_in_float32_at_any_length(num_positions):
    query, key, _ = make_inputs(1, 1, 64, num_positions, key_width=4, dtype=torch.float32)
    key.requires_grad_()
    output = fa_transformers.factorized_attention(query, key, torch.ones(1, 1, num_positions, 2))
    # Numerator and normaliser are each summed in blocks; 64 roundings is what blocks of 256 leave of a million.
    assert (output - 1).abs().max() <= 64 * torch.finfo(torch.float32).eps
    # All values are equal, so the output does not depend on the keys; what is left of their gradient is rounding.
    (gradient,) = torch.autograd.grad(output.sum(), key)
    assert gradient.sum(dim=-2).abs().max() <= 64 * torch.finfo(torch.float32).eps * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_logits_of_ten_thousand_give_finite_exact_results_and_gradients(magnitude, dtype):
    query, key, value = make_inputs(dtype=dtype)
    query, key = (query.sign() * magnitude).requires_grad_(), (key.sign() * magnitude).requires_grad_()
    value.requires_grad_()
    mask = make_mask([23, 11], 23)
    output = factorized_attention(query, key, value, mask)
    # Logits differ by 0 or 2e4, so every weight is one over a count or zero and the spread adds no rounding.
    expected = attention(query, key, value, mask)
    bound = (3 * 23**0.5 * 2 + 16) * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (output.double() - expected).abs().max() <= bound * value.abs().max()
    for gradient in torch.autograd.grad(output.float().pow(2).sum(), (query, key, value)):
        assert torch.isfinite(gradient).all()


@both_normalizations
def test_non_contiguous_inputs_give_the_same_output_and_gradients(normalization):
    query, key, value = make_inputs()
    layouts = {
        "heads after positions": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "features first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "every second feature": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    }
    mask = make_mask([23, 9], 23)
    strided_mask = mask.repeat_interleave(2, dim=1)[:, ::2]

    def run(tensors, mask):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = factorized_attention(*leaves, mask, normalization=normalization)
        return [output, *torch.autograd.grad(output.pow(2).sum(), leaves)]

    expected = run((query, key, value), mask)
    for name, change in layouts.items():
        inputs = [change(tensor) for tensor in (query, key, value)]
        assert not inputs[0].is_contiguous()
        for result, reference in zip(run(inputs, strided_mask), expected, strict=True):
            # Another memory layout may sum in another order: a handful of roundings over at most 23 terms.
            torch.testing.assert_close(
                result, reference, rtol=0, atol=64 * EPS64 * reference.abs().max().item(), msg=name
            )


def test_expanded_inputs_that_share_memory_between_heads_work():
    query, key, value = make_inputs(heads=1)
    query, key, value = (tensor.expand(-1, 4, -1, -1) for tensor in (query, key, value))
    assert_within_budget(factorized_attention(query, key, value), query, key, value)


@both_normalizations
@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 4), (4, 0), (0, 0)])
def test_no_positions_at_all_give_an_empty_or_zero_output(num_queries, num_keys, normalization):
    query, key, value = make_inputs(num_queries=num_queries, num_keys=num_keys)
    output = factorized_attention(query, key, value, normalization=normalization)
    assert output.shape == (2, 3, num_queries, 7)
    if num_keys == 0:
        assert (output == 0).all()


# What kind of matrix it is


def is_row_stochastic(matrix: Tensor) -> bool:
    # 23 columns of a product over 5 features: each row sum carries under 40 roundings of numbers that sum to one.
    return bool((matrix >= 0).all()) and bool(((matrix.sum(dim=-1) - 1).abs() <= 40 * EPS64).all())


@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_the_implied_matrix_are_distributions_over_real_positions(masked):
    query, key, _ = make_inputs()
    mask = make_mask([23, 8], 23) if masked else None
    matrix = implied_matrix(query, key, mask)
    assert is_row_stochastic(matrix)
    if masked:
        assert (matrix[1, :, :, 8:] == 0).all()


def test_a_mutant_with_swapped_softmax_axes_is_told_apart():
    query, key, value = make_inputs(num_queries=23)
    assert is_row_stochastic(torch.from_numpy(attention_matrix(query, key)))
    assert not is_row_stochastic(implied_matrix(query, key, attend=swapped_axes_attention))
    with pytest.raises(AssertionError, match="times its budget"):
        assert_within_budget(swapped_axes_attention(query, key, value), query, key, value)


@both_normalizations
@pytest.mark.parametrize("key_width", [1, 3, 8])
def test_the_implied_matrix_has_rank_of_the_key_width(key_width, normalization):
    query, key, _ = make_inputs(num_queries=31, num_keys=29, key_width=key_width)
    matrix = implied_matrix(query, key, normalization=normalization)
    assert (torch.linalg.matrix_rank(matrix) == key_width).all()


def test_outputs_stay_inside_the_range_of_the_real_values():
    query, key, value = make_inputs()
    mask = make_mask([23, 6], 23)
    output = factorized_attention(query * 5, key * 5, value, mask)
    for sample, length in enumerate((23, 6)):
        real = value[sample, :, :length]
        slack = 40 * EPS64 * real.abs().max()
        assert (output[sample] <= real.amax(dim=1, keepdim=True) + slack).all()
        assert (output[sample] >= real.amin(dim=1, keepdim=True) - slack).all()


@both_normalizations
def test_output_rows_permute_with_queries_and_ignore_the_order_of_keys(normalization):
    query, key, value = make_inputs()
    mask = torch.rand(2, 23) < 0.7
    output = factorized_attention(query, key, value, mask, normalization=normalization)
    budget = error_budget(query, key, value, mask, normalization=normalization)
    of_queries, of_keys = torch.randperm(17), torch.randperm(23)
    permuted = factorized_attention(
        query[:, :, of_queries], key[:, :, of_keys], value[:, :, of_keys], mask[:, of_keys], normalization=normalization
    )
    assert ((permuted - output[:, :, of_queries]).abs() <= 2 * budget[:, :, of_queries]).all()


def test_adding_a_constant_to_a_key_column_or_a_query_row_changes_nothing():
    query, key, value = make_inputs()
    mask = make_mask([23, 12], 23)
    output = factorized_attention(query, key, value, mask)
    shifted_key = key + 10 * torch.randn(2, 3, 1, 5, dtype=torch.float64)
    shifted_query = query + 10 * torch.randn(2, 3, 17, 1, dtype=torch.float64)
    # Adding the shift rounds each logit to half a unit of at most |logit| + |shift|, which moves its weight by as much.
    shift_rounding = EPS64 * max(shifted_key.abs().max().item(), shifted_query.abs().max().item())
    allowed = 2 * error_budget(query, key, value, mask) + 4 * shift_rounding * value.abs().max()
    assert ((factorized_attention(query, shifted_key, value, mask) - output).abs() <= allowed).all()
    assert ((factorized_attention(shifted_query, key, value, mask) - output).abs() <= allowed).all()


def test_a_constant_added_to_every_key_gets_zero_gradient():
    query, key, value = make_inputs()
    bias = torch.zeros(1, 3, 1, 5, dtype=torch.float64, requires_grad=True)
    factorized_attention(query, key + bias, value, make_mask([23, 12], 23)).pow(2).sum().backward()
    reference = key.clone().requires_grad_()
    factorized_attention(query, reference, value, make_mask([23, 12], 23)).pow(2).sum().backward()
    # The sum over 2·23 positions of gradients that cancel: as many roundings of the largest one.
    assert bias.grad.abs().max() <= 46 * 8 * EPS64 * reference.grad.abs().max()


def test_scaling_is_exactly_scale_times_the_product_of_the_three_matrices():
    query, key, value = make_inputs()
    for scale in (0.5, -2.0, 1.0):
        output = factorized_attention(query, key, value, normalization="scaling", scale=scale)
        expected = scale * (query @ key.transpose(-2, -1)) @ value
        budget = error_budget(query, key, value, normalization="scaling", scale=scale)
        assert ((output - expected).abs() <= 2 * budget).all()
    assert (factorized_attention(query, key, value, normalization="scaling", scale=0.0) == 0).all()


def test_scaling_divides_by_the_number_of_real_positions_by_default():
    query, key, value = make_inputs()
    mask = make_mask([20, 5], 23)
    output = factorized_attention(query, key, value, mask, normalization="scaling")
    for sample, count in enumerate((20, 5)):
        one = [tensor[sample : sample + 1] for tensor in (query, key, value)]
        expected = factorized_attention(*one, mask[sample : sample + 1], normalization="scaling", scale=1 / count)
        # 1/count as a Python number and as a tensor are the same double; only the products' order could differ.
        torch.testing.assert_close(output[sample : sample + 1], expected, rtol=4 * EPS64, atol=4 * EPS64)


# Padding


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("junk", [0.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")])
def test_what_padded_positions_hold_changes_no_bit_of_output_or_gradient(junk, dtype, normalization):
    query, key, value = make_inputs(dtype=dtype)
    mask = make_mask([23, 9], 23)
    padding = ~mask[:, None, :, None]

    def run(key, value):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
        output = factorized_attention(*leaves, mask, normalization=normalization)
        return [output, *torch.autograd.grad(output.double().pow(2).sum(), leaves)]

    expected = run(key, value)
    results = run(key.masked_fill(padding, junk), value.masked_fill(padding, junk))
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)
        assert torch.isfinite(result).all()
    for gradient in results[2:]:
        assert (gradient.masked_select(padding) == 0).all()


@both_normalizations
@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("amount", [1, 7, 200])
def test_amount_and_side_of_padding_change_nothing(amount, side, normalization):
    query, key, value = make_inputs(batch=1)
    alone = factorized_attention(query, key, value, normalization=normalization)
    mask = make_mask([23], 23 + amount, side)
    padded_key = torch.full((1, 3, 23 + amount, 5), float("nan"), dtype=torch.float64)
    padded_value = torch.full((1, 3, 23 + amount, 7), float("nan"), dtype=torch.float64)
    padded_key[:, :, mask[0]], padded_value[:, :, mask[0]] = key, value
    padded = factorized_attention(query, padded_key, padded_value, mask, normalization=normalization)
    assert ((padded - alone).abs() <= 2 * error_budget(query, key, value, normalization=normalization)).all()


@both_normalizations
def test_a_batch_of_one_equals_the_same_sample_inside_a_padded_batch(normalization):
    lengths = [23, 4, 1, 16]
    query, key, value = make_inputs(batch=4)
    mask = make_mask(lengths, 23)
    together = factorized_attention(query, key, value, mask, normalization=normalization)
    for i, length in enumerate(lengths):
        sample = query[i : i + 1], key[i : i + 1, :, :length], value[i : i + 1, :, :length]
        alone = factorized_attention(*sample, normalization=normalization)
        budget = error_budget(*sample, normalization=normalization)
        assert ((together[i : i + 1] - alone).abs() <= 2 * budget).all()


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_sample_without_a_real_position_gives_zeros_in_output_and_gradients(scale, dtype, normalization):
    if normalization == "softmax" and scale is not None:
        scale = None
    query, key, value = make_inputs(dtype=dtype)
    key[1], value[1] = float("nan"), float("inf")
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = factorized_attention(*leaves, make_mask([23, 0], 23), normalization=normalization, scale=scale)
    assert (output[1] == 0).all()
    assert (output[0] != 0).all()
    # The gradient of a plain sum is not zero by chance where the output is zero, unlike that of its square.
    for gradient in torch.autograd.grad(output.double().sum() + output.double().pow(2).sum(), leaves):
        assert (gradient[1] == 0).all()
        assert torch.isfinite(gradient).all()


def test_a_mask_of_one_real_position_returns_that_value_everywhere():
    query, key, value = make_inputs()
    mask = torch.zeros(2, 23, dtype=torch.bool)
    mask[0, 22] = mask[1, 5] = True
    output = factorized_attention(query, key, value, mask)
    expected = torch.stack([value[0, :, 22], value[1, :, 5]])[:, :, None].expand_as(output)
    assert ((output - expected).abs() <= 16 * EPS64 * expected.abs()).all()


# Gradients


@both_normalizations
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_queries", [5, 3])
def test_gradients_equal_finite_differences(num_queries, masked, normalization):
    inputs = make_inputs(2, 1, num_queries, 5, key_width=2, value_width=3)
    for tensor in inputs:
        tensor.requires_grad_()
    mask = make_mask([5, 2], 5, "left") if masked else None
    assert torch.autograd.gradcheck(
        lambda query, key, value: factorized_attention(query, key, value, mask, normalization=normalization), inputs
    )


def test_gradients_of_a_masked_sample_with_a_given_scale_equal_finite_differences():
    inputs = make_inputs(2, 1, 3, 5, key_width=2, value_width=3)
    for tensor in inputs:
        tensor.requires_grad_()
    mask = make_mask([5, 0], 5)
    assert torch.autograd.gradcheck(
        lambda *tensors: factorized_attention(*tensors, mask, normalization="scaling", scale=0.7), inputs
    )


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_positions", [65, 16_384])
def test_gradients_in_short_dtypes_follow_float64(num_positions, dtype, normalization):
    inputs = make_inputs(2, 1, num_positions, num_positions, dtype=dtype)
    mask = make_mask([num_positions, num_positions // 2], num_positions)
    weights = torch.randn(2, 1, num_positions, 7, dtype=torch.float64).to(dtype)

    def gradients(dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        output = factorized_attention(*leaves, mask, normalization=normalization)
        return torch.autograd.grad(output, leaves, weights.to(dtype))

    # Inside, three chained sums over all positions in float32, see `error_budget`; then rounded once to the dtype.
    inside = (8 + (3 * num_positions) ** 0.5) * torch.finfo(torch.float32).eps
    for gradient, reference in zip(gradients(dtype), gradients(torch.float64), strict=True):
        bound = inside + torch.finfo(dtype).eps / 2
        assert gradient.dtype == dtype
        error = (gradient.double() - reference).abs().max()
        assert error <= bound * reference.abs().max() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


# How it computes


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_does_not_change_the_accumulation(dtype, normalization):
    query, key, value = make_inputs(dtype=dtype)
    mask = make_mask([23, 9], 23)

    def run(enabled):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = factorized_attention(*leaves, mask, normalization=normalization)
        return [output, *torch.autograd.grad(output.double().pow(2).sum(), leaves)]

    for left, right in zip(run(enabled=False), run(enabled=True), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@both_normalizations
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_without_graph_breaks_and_with_dynamic_length_it_is_equal(masked, normalization):
    torch.compiler.reset()
    compiled = torch.compile(factorized_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_positions, stance in ((33, "default"), (70, "fail_on_recompile"), (129, "fail_on_recompile")):
        inputs = make_inputs(num_queries=num_positions + 3, num_keys=num_positions)
        mask = make_mask([num_positions, 9], num_positions) if masked else None

        def run(attend, inputs=inputs, mask=mask):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            output = attend(*leaves, mask, normalization=normalization)
            return [output, *torch.autograd.grad(output.pow(2).sum(), leaves)]

        expected = run(factorized_attention)
        with torch.compiler.set_stance(stance):
            results = run(compiled)
        for result, reference in zip(results, expected, strict=True):
            bound = 8 * num_positions**0.5 * EPS64 * reference.abs().max().item()
            torch.testing.assert_close(result, reference, rtol=0, atol=bound)


@both_normalizations
def test_shapes_are_inferred_on_the_meta_device(normalization):
    query, key, value = (tensor.to("meta") for tensor in make_inputs())
    mask = torch.ones(2, 23, dtype=torch.bool, device="meta")
    output = fa_transformers.factorized_attention(query, key, value, mask, normalization=normalization)
    assert output.shape == (2, 3, 17, 7)
    assert output.device.type == "meta"


@both_normalizations
def test_no_memory_is_read_before_it_is_written(normalization, poisoned_memory):
    assert torch.empty(1).isnan().all()
    query, key, value = make_inputs(dtype=torch.float32)
    mask = make_mask([23, 9], 23)
    output = factorized_attention(query, key, value, mask, normalization=normalization)
    assert_within_budget(output, query, key, value, mask, normalization=normalization)


def test_inputs_and_mask_are_left_unchanged():
    tensors = (*make_inputs(), make_mask([23, 9], 23))
    copies = [tensor.clone() for tensor in tensors]
    for normalization in NORMALIZATIONS:
        factorized_attention(*tensors, normalization=normalization)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@both_normalizations
@pytest.mark.parametrize("query_factor", [1, 2])
def test_memory_of_forward_and_backward_grows_linearly_and_no_tensor_is_quadratic(query_factor, normalization):
    peaks = []
    for num_keys in (2048, 8192):
        num_queries = query_factor * num_keys
        inputs = make_inputs(1, 2, num_queries, num_keys, 8, 16, dtype=torch.float32)
        for tensor in inputs:
            tensor.requires_grad_()
        with MemoryMeter() as meter:
            factorized_attention(
                *inputs, make_mask([num_keys - 5], num_keys), normalization=normalization
            ).sum().backward()
        # 16 features of two heads of the longer side are the largest tensor that a linear method needs.
        assert meter.largest_numel <= 2 * 16 * num_queries < num_queries * num_keys
        peaks.append(meter.peak_bytes)
    # Four times the positions; what does not grow with them (the context) can only lower the ratio.
    assert 3.9 <= peaks[1] / peaks[0] <= 4.0


@pytest.mark.parametrize("num_positions", [2048, 8192])
def test_blocks_take_a_quarter_of_the_query_beyond_the_output(num_positions):
    query, key, value = (torch.randn(1, num_positions, 12, 64).transpose(1, 2) for _ in range(3))
    # The function inside the operator, as no meter sees what an operator allocates.
    with MemoryMeter() as meter:
        fa_attention_blocked._attend(query, key, value, None, None, True, None)
    assert meter.peak_bytes <= 1.25 * query.nbytes


def test_only_inputs_and_contexts_are_kept_for_the_backward_pass():
    inputs = [torch.randn(1, 4096, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fa_transformers.factorized_attention(*inputs, impl="blocked")
    others = [tensor for tensor in kept if all(tensor.data_ptr() != own.data_ptr() for own in inputs)]
    assert sorted(tensor.shape for tensor in others) == [(1, 2, 16), (1, 2, 16), (1, 2, 16, 16)]


def test_auto_knows_forward_mode_derivatives_and_transforms():
    query, key, value = make_inputs(1, 1, 6, 6, 3, 3)
    tangent = torch.randn_like(query)

    def attend(tensor, impl="auto"):
        return fa_transformers.factorized_attention(tensor, key, value, impl=impl)

    (expected,) = torch.autograd.functional.jvp(partial(attend, impl="reference"), query, tangent)[1:]
    torch.testing.assert_close(torch.func.jvp(attend, (query,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        output = attend(forward_ad.make_dual(query, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected)
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            attend(forward_ad.make_dual(query, tangent), impl="blocked")
    leaf = query.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attend(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda tensor: attend(tensor).sum())(query), gradient)


def test_no_heads_give_an_empty_output():
    assert factorized_attention(*torch.randn(3, 1, 0, 8, 4)).shape == (1, 0, 8, 4)


def test_exported_graphs_hold_plain_operators_only():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return fa_transformers.factorized_attention(query, key, value)

    inputs = make_inputs(dtype=torch.float32)
    program = torch.export.export(Attention(), inputs)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    operators = [
        node.target for graph in graphs for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    ]
    assert len(operators) > 3 and {operator.namespace for operator in operators} == {"aten"}
    assert_within_budget(program.module()(*inputs), *inputs)


def test_a_second_copy_of_the_code_in_the_process_registers_operators_of_its_own():
    path = Path(fa_attention_blocked.__file__)
    spec = importlib.util.spec_from_file_location(f"{fa_attention_blocked.__package__}.another-copy", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    inputs = make_inputs()
    outputs = [module.blocked_attention(*inputs).numpy() for module in (copy, fa_attention_blocked)]
    assert copy.NAMESPACE != fa_attention_blocked.NAMESPACE
    assert np.array_equal(*outputs)


def test_the_memory_meter_sees_an_explicit_attention_matrix():
    query, key, value = make_inputs(1, 1, 300, 200)
    with MemoryMeter() as meter:
        (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    assert meter.largest_numel == 300 * 200
    assert meter.peak_bytes >= 2 * 300 * 200 * 8


# Errors


def wrong_inputs() -> dict[str, tuple[dict, str]]:
    """Name of the case -> (arguments that replace good ones, what the message must name)."""

    def zeros(*shape, **options):
        return torch.zeros(*shape, **options)

    return {
        "query of rank 3": ({"query": zeros(2, 4, 6)}, "`query` must be"),
        "key of rank 5": ({"key": zeros(2, 3, 5, 6, 1)}, "`key` must be"),
        "value of rank 3": ({"value": zeros(2, 3, 5)}, "`value` must be"),
        "integer query": ({"query": zeros(2, 3, 4, 6, dtype=torch.int64)}, "`query` must be a floating-point"),
        "integer value": ({"value": zeros(2, 3, 5, 7, dtype=torch.int64)}, "`value` must be a floating-point"),
        "key of another dtype": ({"key": zeros(2, 3, 5, 6, dtype=torch.float16)}, "`key` is torch.float16"),
        "value of another dtype": ({"value": zeros(2, 3, 5, 7, dtype=torch.float64)}, "`value` is torch.float64"),
        "key on another device": ({"key": zeros(2, 3, 5, 6, device="meta")}, "`key` is .* on meta"),
        "value on another device": ({"value": zeros(2, 3, 5, 7, device="meta")}, "`value` is .* on meta"),
        "other batch of key": ({"key": zeros(1, 3, 5, 6)}, "same batch and head"),
        "other head count of value": ({"value": zeros(2, 1, 5, 7)}, "same batch and head"),
        "other key width": ({"key": zeros(2, 3, 5, 4)}, "`key` has width 4"),
        "no features": ({"query": zeros(2, 3, 4, 0), "key": zeros(2, 3, 5, 0)}, "`query` and `key` .* width 0"),
        "other number of values": ({"value": zeros(2, 3, 6, 7)}, "`value` has 6 positions"),
        "integer mask": ({"mask": torch.ones(2, 5, dtype=torch.int64)}, "`mask` must be bool"),
        "additive mask": ({"mask": zeros(2, 5)}, "`mask` must be bool"),
        "mask over queries": ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"`mask` must be .* \(2, 5\)"),
        "mask of rank 4": ({"mask": torch.ones(2, 1, 1, 5, dtype=torch.bool)}, "`mask` must be"),
        "mask that would broadcast": ({"mask": torch.ones(1, 5, dtype=torch.bool)}, "`mask` must be"),
        "mask on another device": ({"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "`mask` is on meta"),
        "unknown normalization": ({"normalization": "relu"}, "`normalization` must be one of .*'relu'"),
        "scale with softmax": ({"scale": 0.5}, "`scale` applies to"),
        "unknown implementation": ({"impl": "cuda"}, "`impl` must be one of .*'cuda'"),
    }


@pytest.mark.parametrize("case", wrong_inputs())
def test_wrong_input_raises_a_value_error_that_names_the_argument(case):
    changes, message = wrong_inputs()[case]
    good = {"query": torch.zeros(2, 3, 4, 6), "key": torch.zeros(2, 3, 5, 6), "value": torch.zeros(2, 3, 5, 7)}
    factorized_attention(**good)
    with pytest.raises(ValueError, match=message):
        factorized_attention(**{**good, **changes})


def test_auto_is_the_blocked_implementation_on_a_cpu():
    query, key, value = make_inputs(dtype=torch.float32)
    outputs = [factorized_attention(query, key, value, impl=impl).numpy() for impl in ("auto", "blocked")]
    assert np.array_equal(*outputs)
