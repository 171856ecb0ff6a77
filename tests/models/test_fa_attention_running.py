"""Protects how the operator runs: gradients, autocast, compilation and export, memory, and the choice of what runs.

Every tolerance is `oracles.error_budget`, a multiple of a rounding unit derived next to it, or exact.
"""

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from operator_inputs import EPS64, NORMALIZATIONS, assert_within_budget, both_normalizations, make_inputs, make_mask
from oracles import MemoryMeter
from torch.autograd import forward_ad

from fa_transformers import factorized_attention
from fa_transformers.models import fa_attention_blocked

# Gradients


@both_normalizations
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_queries", [5, 3])
def test_gradients_equal_finite_differences(attend, num_queries, masked, normalization):
    inputs = make_inputs(2, 1, num_queries, 5, key_width=2, value_width=3)
    for tensor in inputs:
        tensor.requires_grad_()
    mask = make_mask([5, 2], 5, "left") if masked else None
    assert torch.autograd.gradcheck(
        lambda query, key, value: attend(query, key, value, mask, normalization=normalization), inputs
    )


def test_gradients_of_a_masked_sample_with_a_given_scale_equal_finite_differences(attend):
    inputs = make_inputs(2, 1, 3, 5, key_width=2, value_width=3)
    for tensor in inputs:
        tensor.requires_grad_()
    mask = make_mask([5, 0], 5)
    assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, mask, normalization="scaling", scale=0.7), inputs)


@both_normalizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_positions", [65, 16_384])
def test_gradients_in_short_dtypes_follow_float64(attend, num_positions, dtype, normalization):
    inputs = make_inputs(2, 1, num_positions, num_positions, dtype=dtype)
    mask = make_mask([num_positions, num_positions // 2], num_positions)
    weights = torch.randn(2, 1, num_positions, 7, dtype=torch.float64).to(dtype)

    def gradients(dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        output = attend(*leaves, mask, normalization=normalization)
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
def test_autocast_does_not_change_the_accumulation(attend, dtype, normalization):
    query, key, value = make_inputs(dtype=dtype)
    mask = make_mask([23, 9], 23)

    def run(enabled):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = attend(*leaves, mask, normalization=normalization)
        return [output, *torch.autograd.grad(output.double().pow(2).sum(), leaves)]

    for left, right in zip(run(enabled=False), run(enabled=True), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@both_normalizations
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_without_graph_breaks_and_with_dynamic_length_it_is_equal(attend, masked, normalization):
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_positions, stance in ((33, "default"), (70, "fail_on_recompile"), (129, "fail_on_recompile")):
        inputs = make_inputs(num_queries=num_positions + 3, num_keys=num_positions)
        mask = make_mask([num_positions, 9], num_positions) if masked else None

        def run(attend, inputs=inputs, mask=mask):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            output = attend(*leaves, mask, normalization=normalization)
            return [output, *torch.autograd.grad(output.pow(2).sum(), leaves)]

        expected = run(attend)
        with torch.compiler.set_stance(stance):
            results = run(compiled)
        for result, reference in zip(results, expected, strict=True):
            bound = 8 * num_positions**0.5 * EPS64 * reference.abs().max().item()
            torch.testing.assert_close(result, reference, rtol=0, atol=bound)


@both_normalizations
def test_shapes_are_inferred_on_the_meta_device(normalization):
    query, key, value = (tensor.to("meta") for tensor in make_inputs())
    mask = torch.ones(2, 23, dtype=torch.bool, device="meta")
    output = factorized_attention(query, key, value, mask, normalization=normalization)
    assert output.shape == (2, 3, 17, 7)
    assert output.device.type == "meta"


@both_normalizations
def test_no_memory_is_read_before_it_is_written(attend, normalization, poisoned_memory):
    assert torch.empty(1).isnan().all()
    query, key, value = make_inputs(dtype=torch.float32)
    mask = make_mask([23, 9], 23)
    output = attend(query, key, value, mask, normalization=normalization)
    assert_within_budget(output, query, key, value, mask, normalization=normalization)


def test_inputs_and_mask_are_left_unchanged(attend):
    tensors = (*make_inputs(), make_mask([23, 9], 23))
    copies = [tensor.clone() for tensor in tensors]
    for normalization in NORMALIZATIONS:
        attend(*tensors, normalization=normalization)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@both_normalizations
@pytest.mark.parametrize("query_factor", [1, 2])
def test_memory_of_forward_and_backward_grows_linearly_and_no_tensor_is_quadratic(attend, query_factor, normalization):
    peaks = []
    for num_keys in (2048, 8192):
        num_queries = query_factor * num_keys
        inputs = make_inputs(1, 2, num_queries, num_keys, 8, 16, dtype=torch.float32)
        for tensor in inputs:
            tensor.requires_grad_()
        with MemoryMeter() as meter:
            attend(*inputs, make_mask([num_keys - 5], num_keys), normalization=normalization).sum().backward()
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
        factorized_attention(*inputs, impl="blocked")
    others = [tensor for tensor in kept if all(tensor.data_ptr() != own.data_ptr() for own in inputs)]
    assert sorted(tensor.shape for tensor in others) == [(1, 2, 16), (1, 2, 16), (1, 2, 16, 16)]


def test_auto_knows_forward_mode_derivatives_and_transforms():
    query, key, value = make_inputs(1, 1, 6, 6, 3, 3)
    tangent = torch.randn_like(query)

    def attend(tensor, impl="auto"):
        return factorized_attention(tensor, key, value, impl=impl)

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


def test_no_heads_give_an_empty_output(attend):
    assert attend(*torch.randn(3, 1, 0, 8, 4)).shape == (1, 0, 8, 4)


def test_exported_graphs_hold_plain_operators_only():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return factorized_attention(query, key, value)

    inputs = make_inputs(dtype=torch.float32)
    program = torch.export.export(Attention(), inputs)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    operators = [
        node.target for graph in graphs for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    ]
    assert len(operators) > 3 and {operator.namespace for operator in operators} == {"aten"}
    assert_within_budget(program.module()(*inputs), *inputs)


def test_copies_of_the_code_in_the_process_register_operators_of_their_own_whatever_their_folders_are_called():
    """transformers names them after a checkpoint's folder: torch takes ASCII, which leaves some names the same."""
    path = Path(fa_attention_blocked.__file__)
    copies = [fa_attention_blocked]
    for name in ("another-copy", "modèle", "modéle", "mode\u0301le", "模型", "모델"):
        spec = importlib.util.spec_from_file_location(f"{fa_attention_blocked.__package__}.{name}", path)
        copies.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(copies[-1])
    inputs = make_inputs()
    outputs = [copy.blocked_attention(*inputs).numpy() for copy in copies]
    assert len({copy.NAMESPACE for copy in copies}) == len(copies)
    assert all(np.array_equal(output, outputs[0]) for output in outputs)


def test_the_memory_meter_sees_an_explicit_attention_matrix():
    query, key, value = make_inputs(1, 1, 300, 200)
    with MemoryMeter() as meter:
        (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    assert meter.largest_numel == 300 * 200
    assert meter.peak_bytes >= 2 * 300 * 200 * 8


def test_auto_is_the_blocked_implementation_on_a_cpu():
    query, key, value = make_inputs(dtype=torch.float32)
    outputs = [factorized_attention(query, key, value, impl=impl).numpy() for impl in ("auto", "blocked")]
    assert np.array_equal(*outputs)
