"""Protects the operator's values: against a float64 oracle, the kind of matrix that it applies, its padding rules.

Every tolerance is `oracles.error_budget`, a multiple of a rounding unit derived next to it, or exact.
"""

import pytest
import torch
from operator_inputs import EPS64, assert_within_budget, both_normalizations, make_inputs, make_mask
from oracles import attention, attention_matrix, error_budget
from torch import Tensor

from fa_transformers import factorized_attention

# Values


@both_normalizations
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_positions", [1, 2, 63, 65, 1000])
def test_output_equals_the_explicit_matrix_times_the_values(attend, num_positions, dtype, masked, normalization):
    query, key, value = make_inputs(num_queries=num_positions, num_keys=num_positions, dtype=dtype)
    mask = make_mask([num_positions, (num_positions + 1) // 2], num_positions) if masked else None
    output = attend(query, key, value, mask, normalization=normalization)
    assert output.dtype == dtype
    assert output.shape == (2, 3, num_positions, 7)
    assert_within_budget(output, query, key, value, mask, normalization=normalization)


@both_normalizations
@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 50), (50, 3), (1, 40), (40, 1)])
def test_cross_attention_equals_the_explicit_matrix(attend, num_queries, num_keys, normalization):
    query, key, value = make_inputs(num_queries=num_queries, num_keys=num_keys)
    mask = make_mask([num_keys, max(1, num_keys // 2)], num_keys)
    output = attend(query, key, value, mask, normalization=normalization)
    assert_within_budget(output, query, key, value, mask, normalization=normalization)


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_positions", [1, 1_000, 65_536, 1_048_576])
def test_error_stays_in_budget_up_to_a_million_positions(attend, num_positions, dtype, normalization, capsys):
    # Values with mean one keep the outputs near one, so that a relative error in the long sums stays visible.
    query, key, value = make_inputs(1, 1, num_positions, num_positions, key_width=4, value_width=3, dtype=dtype)
    value = value + 1
    output = attend(query, key, value, normalization=normalization)
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
    output = factorized_attention(query, key, torch.ones(1, 1, num_positions, 2))
    # Numerator and normaliser are each summed in blocks; 64 roundings is what blocks of 256 leave of a million.
    assert (output - 1).abs().max() <= 64 * torch.finfo(torch.float32).eps
    # All values are equal, so the output does not depend on the keys; what is left of their gradient is rounding.
    (gradient,) = torch.autograd.grad(output.sum(), key)
    assert gradient.sum(dim=-2).abs().max() <= 64 * torch.finfo(torch.float32).eps * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_logits_of_ten_thousand_give_finite_exact_results_and_gradients(attend, magnitude, dtype):
    query, key, value = make_inputs(dtype=dtype)
    query, key = (query.sign() * magnitude).requires_grad_(), (key.sign() * magnitude).requires_grad_()
    value.requires_grad_()
    mask = make_mask([23, 11], 23)
    output = attend(query, key, value, mask)
    # Logits differ by 0 or 2e4, so every weight is one over a count or zero and the spread adds no rounding.
    expected = attention(query, key, value, mask)
    bound = (3 * 23**0.5 * 2 + 16) * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (output.double() - expected).abs().max() <= bound * value.abs().max()
    for gradient in torch.autograd.grad(output.float().pow(2).sum(), (query, key, value)):
        assert torch.isfinite(gradient).all()


@both_normalizations
def test_non_contiguous_inputs_give_the_same_output_and_gradients(attend, normalization):
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
        output = attend(*leaves, mask, normalization=normalization)
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


def test_expanded_inputs_that_share_memory_between_heads_work(attend):
    query, key, value = make_inputs(heads=1)
    query, key, value = (tensor.expand(-1, 4, -1, -1) for tensor in (query, key, value))
    assert_within_budget(attend(query, key, value), query, key, value)


@both_normalizations
@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 4), (4, 0), (0, 0)])
def test_no_positions_at_all_give_an_empty_or_zero_output(attend, num_queries, num_keys, normalization):
    query, key, value = make_inputs(num_queries=num_queries, num_keys=num_keys)
    output = attend(query, key, value, normalization=normalization)
    assert output.shape == (2, 3, num_queries, 7)
    if num_keys == 0:
        assert (output == 0).all()


# What kind of matrix it is


def implied_matrix(attend, query: Tensor, key: Tensor, mask: Tensor | None = None, **options):
    """Return the N×M matrix that `attend` applies, read off by feeding it the identity as values."""
    identity = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    return attend(query, key, identity, mask, **options)


def swapped_axes_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The classic bug: softmax over positions of Q and over features of K."""
    return query.softmax(dim=-2) @ (key.softmax(dim=-1).transpose(-2, -1) @ value)


def is_row_stochastic(matrix: Tensor) -> bool:
    # 23 columns of a product over 5 features: each row sum carries under 40 roundings of numbers that sum to one.
    return bool((matrix >= 0).all()) and bool(((matrix.sum(dim=-1) - 1).abs() <= 40 * EPS64).all())


@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_the_implied_matrix_are_distributions_over_real_positions(attend, masked):
    query, key, _ = make_inputs()
    mask = make_mask([23, 8], 23) if masked else None
    matrix = implied_matrix(attend, query, key, mask)
    assert is_row_stochastic(matrix)
    if masked:
        assert (matrix[1, :, :, 8:] == 0).all()


def test_a_mutant_with_swapped_softmax_axes_is_told_apart():
    query, key, value = make_inputs(num_queries=23)
    assert is_row_stochastic(torch.from_numpy(attention_matrix(query, key)))
    assert not is_row_stochastic(implied_matrix(swapped_axes_attention, query, key))
    with pytest.raises(AssertionError, match="times its budget"):
        assert_within_budget(swapped_axes_attention(query, key, value), query, key, value)


@both_normalizations
@pytest.mark.parametrize("key_width", [1, 3, 8])
def test_the_implied_matrix_has_rank_of_the_key_width(attend, key_width, normalization):
    query, key, _ = make_inputs(num_queries=31, num_keys=29, key_width=key_width)
    matrix = implied_matrix(attend, query, key, normalization=normalization)
    assert (torch.linalg.matrix_rank(matrix) == key_width).all()


def test_outputs_stay_inside_the_range_of_the_real_values(attend):
    query, key, value = make_inputs()
    mask = make_mask([23, 6], 23)
    output = attend(query * 5, key * 5, value, mask)
    for sample, length in enumerate((23, 6)):
        real = value[sample, :, :length]
        slack = 40 * EPS64 * real.abs().max()
        assert (output[sample] <= real.amax(dim=1, keepdim=True) + slack).all()
        assert (output[sample] >= real.amin(dim=1, keepdim=True) - slack).all()


@both_normalizations
def test_output_rows_permute_with_queries_and_ignore_the_order_of_keys(attend, normalization):
    query, key, value = make_inputs()
    mask = torch.rand(2, 23) < 0.7
    output = attend(query, key, value, mask, normalization=normalization)
    budget = error_budget(query, key, value, mask, normalization=normalization)
    of_queries, of_keys = torch.randperm(17), torch.randperm(23)
    permuted = attend(
        query[:, :, of_queries], key[:, :, of_keys], value[:, :, of_keys], mask[:, of_keys], normalization=normalization
    )
    assert ((permuted - output[:, :, of_queries]).abs() <= 2 * budget[:, :, of_queries]).all()


def test_adding_a_constant_to_a_key_column_or_a_query_row_changes_nothing(attend):
    query, key, value = make_inputs()
    mask = make_mask([23, 12], 23)
    output = attend(query, key, value, mask)
    shifted_key = key + 10 * torch.randn(2, 3, 1, 5, dtype=torch.float64)
    shifted_query = query + 10 * torch.randn(2, 3, 17, 1, dtype=torch.float64)
    # Adding the shift rounds each logit to half a unit of at most |logit| + |shift|, which moves its weight by as much.
    shift_rounding = EPS64 * max(shifted_key.abs().max().item(), shifted_query.abs().max().item())
    allowed = 2 * error_budget(query, key, value, mask) + 4 * shift_rounding * value.abs().max()
    assert ((attend(query, shifted_key, value, mask) - output).abs() <= allowed).all()
    assert ((attend(shifted_query, key, value, mask) - output).abs() <= allowed).all()


def test_a_constant_added_to_every_key_gets_zero_gradient(attend):
    query, key, value = make_inputs()
    bias = torch.zeros(1, 3, 1, 5, dtype=torch.float64, requires_grad=True)
    attend(query, key + bias, value, make_mask([23, 12], 23)).pow(2).sum().backward()
    reference = key.clone().requires_grad_()
    attend(query, reference, value, make_mask([23, 12], 23)).pow(2).sum().backward()
    # The sum over 2·23 positions of gradients that cancel: as many roundings of the largest one.
    assert bias.grad.abs().max() <= 46 * 8 * EPS64 * reference.grad.abs().max()


def test_scaling_is_exactly_scale_times_the_product_of_the_three_matrices(attend):
    query, key, value = make_inputs()
    for scale in (0.5, -2.0, 1.0):
        output = attend(query, key, value, normalization="scaling", scale=scale)
        expected = scale * (query @ key.transpose(-2, -1)) @ value
        budget = error_budget(query, key, value, normalization="scaling", scale=scale)
        assert ((output - expected).abs() <= 2 * budget).all()
    assert (attend(query, key, value, normalization="scaling", scale=0.0) == 0).all()


def test_scaling_divides_by_the_number_of_real_positions_by_default(attend):
    query, key, value = make_inputs()
    mask = make_mask([20, 5], 23)
    output = attend(query, key, value, mask, normalization="scaling")
    for sample, count in enumerate((20, 5)):
        one = [tensor[sample : sample + 1] for tensor in (query, key, value)]
        expected = attend(*one, mask[sample : sample + 1], normalization="scaling", scale=1 / count)
        # 1/count as a Python number and as a tensor are the same double; only the products' order could differ.
        torch.testing.assert_close(output[sample : sample + 1], expected, rtol=4 * EPS64, atol=4 * EPS64)


# Padding


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("junk", [0.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")])
def test_what_padded_positions_hold_changes_no_bit_of_output_or_gradient(attend, junk, dtype, normalization):
    query, key, value = make_inputs(dtype=dtype)
    mask = make_mask([23, 9], 23)
    padding = ~mask[:, None, :, None]

    def run(key, value):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
        output = attend(*leaves, mask, normalization=normalization)
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
def test_amount_and_side_of_padding_change_nothing(attend, amount, side, normalization):
    query, key, value = make_inputs(batch=1)
    alone = attend(query, key, value, normalization=normalization)
    mask = make_mask([23], 23 + amount, side)
    padded_key = torch.full((1, 3, 23 + amount, 5), float("nan"), dtype=torch.float64)
    padded_value = torch.full((1, 3, 23 + amount, 7), float("nan"), dtype=torch.float64)
    padded_key[:, :, mask[0]], padded_value[:, :, mask[0]] = key, value
    padded = attend(query, padded_key, padded_value, mask, normalization=normalization)
    assert ((padded - alone).abs() <= 2 * error_budget(query, key, value, normalization=normalization)).all()


@both_normalizations
def test_a_batch_of_one_equals_the_same_sample_inside_a_padded_batch(attend, normalization):
    lengths = [23, 4, 1, 16]
    query, key, value = make_inputs(batch=4)
    mask = make_mask(lengths, 23)
    together = attend(query, key, value, mask, normalization=normalization)
    for i, length in enumerate(lengths):
        sample = query[i : i + 1], key[i : i + 1, :, :length], value[i : i + 1, :, :length]
        alone = attend(*sample, normalization=normalization)
        budget = error_budget(*sample, normalization=normalization)
        assert ((together[i : i + 1] - alone).abs() <= 2 * budget).all()


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_sample_without_a_real_position_gives_zeros_in_output_and_gradients(attend, scale, dtype, normalization):
    if normalization == "softmax" and scale is not None:
        scale = None
    query, key, value = make_inputs(dtype=dtype)
    key[1], value[1] = float("nan"), float("inf")
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = attend(*leaves, make_mask([23, 0], 23), normalization=normalization, scale=scale)
    assert (output[1] == 0).all()
    assert (output[0] != 0).all()
    # The gradient of a plain sum is not zero by chance where the output is zero, unlike that of its square.
    for gradient in torch.autograd.grad(output.double().sum() + output.double().pow(2).sum(), leaves):
        assert (gradient[1] == 0).all()
        assert torch.isfinite(gradient).all()


def test_a_mask_of_one_real_position_returns_that_value_everywhere(attend):
    query, key, value = make_inputs()
    mask = torch.zeros(2, 23, dtype=torch.bool)
    mask[0, 22] = mask[1, 5] = True
    output = attend(query, key, value, mask)
    expected = torch.stack([value[0, :, 22], value[1, :, 5]])[:, :, None].expand_as(output)
    assert ((output - expected).abs() <= 16 * EPS64 * expected.abs()).all()
