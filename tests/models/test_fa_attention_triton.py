"""Protects the Triton kernels: values and gradients against the float64 oracle at every dtype, width, mask and packing.

Kernels run interpreted on CPU tensors only where TRITON_INTERPRET is set before their file is loaded. Other tests may
have loaded it already, so the interpreted tests start one process that runs this file again with the variable set. The
same tests run compiled where there is a GPU; without one, compiler and ptxas are still asked for sm_90.

Tolerances: the output keeps the budget of `oracles.error_budget` plus what rounded operands lose, `OPERAND_LOSS`. A
gradient may err by twice what plain PyTorch errs in the same dtype plus one rounding of its largest number, plus that
loss: it is relative to the sizes of what is added up, which cancel where a gradient is small.
"""

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from oracles import attention, error_budget
from torch import Tensor

from fa_transformers import factorized_attention
from fa_transformers.models import fa_attention_triton, fa_triton_kernels
from fa_transformers.models.fa_attention_triton import triton_attention, why_unsupported

triton = pytest.importorskip("triton", reason="triton is not installed")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="run by the test that sets the variable")),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
DTYPES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))
# Relative to |x||y|. In bfloat16 (8 bits) the low part of a split operand is rounded by 2^-18, and the product of two
# low parts, up to 2^-18, is left out: 3 · 2^-18 for a product of two split operands, and two products come in a row.
OPERAND_LOSS = {torch.float32: 4 * 2.0**-25, torch.bfloat16: 4 * 2.0**-17, torch.float16: 4 * 2.0**-23}
SHIPPED_FOLDER = Path(fa_attention_triton.__file__).parent


def make_inputs(batch=2, heads=1, num_queries=65, num_keys=65, key_width=16, value_width=24, dtype=torch.float32):
    """Query, key, value in token-major memory, as the model has them, and a gradient of the output."""

    def rows(length: int, width: int) -> Tensor:
        return torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)

    return (
        rows(num_queries, key_width),
        rows(num_keys, key_width),
        rows(num_keys, value_width),
        rows(num_queries, value_width),
    )


def make_mask(lengths: list[int], num_keys: int, side: str) -> Tensor:
    mask = torch.zeros(len(lengths), num_keys, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        start = {"right": 0, "left": num_keys - length, "both": (num_keys - length) // 2}[side]
        row[start : start + length] = True
    return mask


def run(attend, query, key, value, gradient, *arguments, **options) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = attend(*leaves, *arguments, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def run_kernels(device: str, *tensors: Tensor | None, **options) -> list[Tensor]:
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    return [result.cpu() for result in run(triton_attention, *moved, **options)]


def assert_output_in_budget(output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    size = attention(query, key, value.abs(), mask)
    budget = error_budget(query, key, value, mask) + OPERAND_LOSS[query.dtype] * size
    error = (output.double() - attention(query, key, value, mask)).abs()
    assert (error <= budget).all(), f"error is {(error / budget).max():.2f} times its budget"


def gradient_sizes(query, key, value, gradient, mask) -> list[Tensor]:
    """The gradients' formulas with the absolute value of every term, in float64."""
    query, key, value, gradient = (tensor.double() for tensor in (query, key, value, gradient.abs()))
    if mask is not None:
        padding = ~mask[:, None, :, None]
        key, value = key.masked_fill(padding, torch.finfo(torch.float64).min), value.masked_fill(padding, 0.0)
    p, r = query.softmax(dim=-1), key.softmax(dim=-2)
    context, d_context = r.mT @ value.abs(), p.mT @ gradient
    s = (context * d_context).sum(dim=-1)[:, :, None]
    return [2 * p * (gradient @ context.mT), r * (value.abs() @ d_context.mT + s), r @ d_context]


def assert_gradients_close(gradients: list[Tensor], query, key, value, gradient, mask=None) -> None:
    plain = run(factorized_attention, query, key, value, gradient, mask, impl="reference")[1:]
    wide = [tensor.double() for tensor in (query, key, value, gradient)]
    exact = run(factorized_attention, *wide, mask, impl="reference")[1:]
    sizes = gradient_sizes(query, key, value, gradient, mask)
    for name, got, expected, reference, size in zip("qkv", gradients, exact, plain, sizes, strict=True):
        unit = torch.finfo(got.dtype).eps / 2 * expected.abs().max()
        allowed = 2 * ((reference.double() - expected).abs().max() + unit) + OPERAND_LOSS[got.dtype] * size.max()
        error = (got.double() - expected).abs().max()
        assert error <= allowed, f"gradient of {name}: error {error:.2e}, allowed {allowed:.2e}"


def check(device: str, query, key, value, gradient, mask=None) -> list[Tensor]:
    """Run the kernels, compare output and gradients, return them."""
    results = run_kernels(device, query, key, value, gradient, mask)
    assert all(result.dtype == query.dtype for result in results)
    assert [result.shape for result in results[1:]] == [query.shape, key.shape, value.shape]
    assert_output_in_budget(results[0], query, key, value, mask)
    assert_gradients_close(results[1:], query, key, value, gradient, mask)
    return results


# Values and gradients


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_positions", [1, 2, 63, 65])
def test_output_and_gradients_equal_the_oracle_at_odd_lengths(num_positions, dtype, device, poisoned_memory):
    check(device, *make_inputs(num_queries=num_positions, num_keys=num_positions, dtype=dtype))


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_sequence_is_cut_into_chunks_and_joined_again(dtype, device, poisoned_memory):
    check(device, *make_inputs(1, 1, 1000, 1000, dtype=dtype))


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(24, 48), (80, 16), (64, 64)])
def test_widths_need_not_be_powers_of_two_nor_equal(widths, dtype, device, poisoned_memory):
    check(device, *make_inputs(1, 1, 33, 40, *widths, dtype=dtype))


@on_each_device
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(256, 256), (200, 100), (16, 256), (256, 16), (128, 128), (100, 160)])
def test_wide_heads_share_the_value_features_between_programs(widths, dtype, device, poisoned_memory):
    check(device, *make_inputs(1, 1, 70, 90, *widths, dtype=dtype))


@on_each_device
@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 150), (150, 3)])
def test_cross_attention_equals_the_oracle(num_queries, num_keys, device, poisoned_memory):
    check(device, *make_inputs(num_queries=num_queries, num_keys=num_keys))


@on_each_device
@pytest.mark.parametrize(
    ("side", "dtype"), [("left", torch.float32), ("right", torch.bfloat16), ("both", torch.float16)]
)
def test_padding_changes_nothing_whatever_it_holds_and_gets_no_gradient(side, dtype, device, poisoned_memory):
    query, key, value, gradient = make_inputs(4, num_queries=9, num_keys=70, dtype=dtype)
    mask = make_mask([70, 33, 1, 0], 70, side)
    clean = check(device, query, key, value, gradient, mask)
    padding = ~mask[:, None, :, None]
    for junk in (float("nan"), float("inf")):
        dirty = (key.masked_fill(padding, junk), value.masked_fill(padding, junk))
        for result, expected in zip(run_kernels(device, query, *dirty, gradient, mask), clean, strict=True):
            assert torch.equal(result, expected)
    for d_tensor in clean[2:]:
        assert (d_tensor.masked_select(padding) == 0).all()
    # The last sample has no real position at all.
    assert all((result[3] == 0).all() for result in clean)


@on_each_device
@pytest.mark.parametrize("lengths", [[5, 0, 64, 1, 130], [0, 0, 7], [100]])
def test_packed_documents_equal_each_document_alone(lengths, device, poisoned_memory):
    total = sum(lengths)
    inputs = make_inputs(1, 2, total, total)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    for dtype in (torch.int32, torch.int64):
        packed = run_kernels(device, *inputs, None, ends.to(dtype))
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            if start == end:
                continue
            alone = [tensor[:, :, start:end] for tensor in inputs]
            results = [result[:, :, start:end] for result in packed]
            assert_output_in_budget(results[0], *alone[:3], None)
            assert_gradients_close(results[1:], *alone)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_logits_of_ten_thousand_give_finite_exact_results(magnitude, dtype, device):
    query, key, value, gradient = make_inputs(dtype=dtype)
    check(device, query.sign() * magnitude, key.sign() * magnitude, value, gradient)


@on_each_device
def test_large_float16_gradients_do_not_overflow(device):
    # A loss scale of 2^15: their sum over positions is beyond what float16 holds.
    query, key, value, gradient = make_inputs(1, 1, 100, 100, dtype=torch.float16)
    gradient = gradient.abs() * 2.0**13
    check(device, query, key, value * 2.0**-6, gradient)


@on_each_device
def test_strided_inputs_give_the_same_bits(device):
    query, key, value, gradient = make_inputs()
    mask = make_mask([65, 20], 65, "right")
    expected = run_kernels(device, query, key, value, gradient, mask)
    layouts = {
        "heads before positions": lambda t: t.contiguous(),
        "features first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "every second feature": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        "part of a joint projection": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    }
    for name, change in layouts.items():
        inputs = [change(tensor) for tensor in (query, key, value, gradient)]
        strided_mask = mask.repeat_interleave(2, dim=1)[:, ::2]
        for result, reference in zip(run_kernels(device, *inputs, strided_mask), expected, strict=True):
            assert torch.equal(result, reference), name
    shared = [tensor[:, :1].expand(-1, 3, -1, -1) for tensor in (query, key, value, gradient)]
    check(device, *shared, mask)


@on_each_device
@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 4), (4, 0), (0, 0)])
def test_no_positions_at_all_give_an_empty_or_zero_output(num_queries, num_keys, device, poisoned_memory):
    results = run_kernels(device, *make_inputs(num_queries=num_queries, num_keys=num_keys))
    assert results[0].shape == (2, 1, num_queries, 24)
    assert all((result == 0).all() for result in results)


@on_each_device
def test_equal_inputs_give_equal_bits(device):
    inputs = make_inputs(1, 1, 300, 300)
    for first, second in zip(run_kernels(device, *inputs), run_kernels(device, *inputs), strict=True):
        assert torch.equal(first, second)


@on_each_device
def test_output_memory_is_token_major_and_only_small_states_are_saved(device):
    query, key, value, _ = (tensor.to(device).requires_grad_() for tensor in make_inputs())
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        output = triton_attention(query, key, value)
    assert output.transpose(1, 2).is_contiguous()
    contexts = 2 * 1 * 16 * 24
    assert sorted(sizes) == sorted([query.numel(), key.numel(), value.numel(), contexts, 2 * 1 * 16, 2 * 1 * 16])


# Inside other machinery


@on_each_device
def test_one_graph_serves_several_lengths_and_its_gradients_are_the_same(device):
    torch._dynamo.reset()
    compiled = torch.compile(triton_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_positions in (40, 65):
        inputs = [t.to(device) for t in make_inputs(num_queries=num_positions, num_keys=num_positions)]
        mask = make_mask([num_positions, 9], num_positions, "right").to(device)
        for got, expected in zip(run(compiled, *inputs, mask), run(triton_attention, *inputs, mask), strict=True):
            assert torch.equal(got, expected)


@on_each_device
def test_the_operator_passes_the_checks_of_torch_library(device):
    query, key, value, _ = (tensor.to(device).requires_grad_() for tensor in make_inputs(1, 1, 5, 5))
    torch.library.opcheck(fa_attention_triton._forward, (query, key, value, None, None))


@on_each_device
def test_autocast_leaves_the_kernels_alone(device):
    inputs = make_inputs()
    expected = run_kernels(device, *inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = run_kernels(device, *inputs)
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)


@on_each_device
def test_two_copies_of_the_files_work_in_one_process(device, monkeypatch):
    for package in ("hub_copy", "hub_copy.v-1"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        sys.modules[package].__path__ = [str(SHIPPED_FOLDER)]
    copy = importlib.import_module("hub_copy.v-1.fa_attention_triton")
    assert copy.merge_kernel is not fa_attention_triton.merge_kernel
    inputs = [tensor.to(device) for tensor in make_inputs()]
    for result, expected in zip(run(copy.triton_attention, *inputs), run(triton_attention, *inputs), strict=True):
        assert torch.equal(result, expected)
    assert copy._NAMESPACE != fa_attention_triton._NAMESPACE


# What cannot run


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"key_width": 8}, "`query` has width 8"),
        ({"value_width": 300}, "`value` has width 300"),
    ],
)
def test_what_the_kernels_cannot_do_is_named(changes, reason):
    query, key, value, _ = make_inputs(**changes)
    assert reason in why_unsupported(query, key, value)
    with pytest.raises(RuntimeError, match=reason):
        triton_attention(query, key, value)


def test_other_normalizations_devices_and_a_mask_of_packed_rows_are_refused():
    query, key, value, _ = make_inputs(1)
    assert "softmax" in why_unsupported(query, key, value, normalization="scaling")
    mask, ends = torch.ones(1, 65, dtype=torch.bool), torch.tensor([0, 65])
    assert "not both" in why_unsupported(query, key, value, mask, ends)
    if IS_INTERPRETED:
        assert why_unsupported(query, key, value) is None
        assert "CPU tensors only" in why_unsupported(*(tensor.to("meta") for tensor in (query, key, value)))
    else:
        assert "NVIDIA GPUs" in why_unsupported(query, key, value)


# What the compiler says

POINTERS = {"mask_ptr": "*u8", "cu_ptr": "*i64", "context_ptr": "*fp32", "dcontext_ptr": "*fp32"}
POINTERS |= dict.fromkeys(("max_ptr", "sum_ptr", "part_ptr", "part_max_ptr", "part_sum_ptr"), "*fp32")
TRITON_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED_BYTES_OF_H100 = 227 * 1024


def compile_kernel(name: str, dtype: torch.dtype, widths: tuple[int, int], is_packed: bool):
    """Compile one kernel for sm_90 as its launcher would, without a GPU."""
    kernel = getattr(fa_triton_kernels, name)
    query, value = (torch.empty(1, 1, 1, width, dtype=dtype) for width in widths)
    options = fa_attention_triton._launch_options(query, value, is_backward="bwd" in name)
    # Triton makes a constant of None and of an integer that is one: no mask or no packing, one packed document.
    constants = {"IS_WHOLE": False, "BLOCK_S": 16, "BLOCK_E": 256} | options
    constants |= {"mask_ptr": None, "num_segments": 1} if is_packed else {"cu_ptr": None, "mask_stride_n": 1}
    constants = {key: constant for key, constant in constants.items() if key in kernel.arg_names}
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        is_pointer = argument.endswith("_ptr")
        kind = POINTERS.get(argument, TRITON_TYPES[dtype]) if is_pointer else "i32"
        signature[argument] = "constexpr" if argument in constants else kind
        if argument not in constants and (is_pointer or "stride" in argument or argument == "chunk"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(key),): constant for key, constant in constants.items()},
        attrs=attributes,
    )
    launch = {"num_warps": options["num_warps"], "num_stages": options["num_stages"]}
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={} if name == "merge_kernel" else launch)


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "widths"),
    [
        (torch.bfloat16, (64, 64)),
        (torch.bfloat16, (128, 128)),
        (torch.float16, (48, 48)),
        (torch.bfloat16, (256, 256)),
        (torch.float32, (64, 64)),
        (torch.float32, (256, 256)),
    ],
)
@pytest.mark.parametrize("name", ["context_fwd", "merge", "output_fwd", "query_bwd", "key_bwd"])
def test_kernels_compile_for_an_h100_and_fit_its_shared_memory(name, dtype, widths, is_packed):
    compiled = compile_kernel(f"{name}_kernel", dtype, widths, is_packed)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES_OF_H100
    if widths == (64, 64) and dtype == torch.bfloat16 and name != "merge":
        # What the speed rests on: tensor cores fed from shared memory, and rows loaded ahead.
        assert "warp_group_dot" in compiled.asm["ttgir"]
        assert "async_copy_global_to_local" in compiled.asm["ttgir"]


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the process that the test starts")
@pytest.mark.parametrize(
    "expression", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_the_interpreted_kernels_pass_this_file(expression):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", expression, str(Path(__file__))]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 10
