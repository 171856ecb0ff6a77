"""Time of the operator beside the memory floor of the device, torch's flash attention and the unfused formula."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models import FABertConfig, FABertModel
from ..models.fa_attention import factorized_attention
from ..options import UNSET, OptionGroup, option

HEADS, WIDTH = 12, 64
FORWARD_TENSORS, TRAINING_TENSORS = 4, 11


@dataclass(frozen=True)
class OperatorOptions(OptionGroup):
    """Sizes to measure; unset ones follow from the device (`recipe_of`)."""

    output_dir: Path = option(Path("outputs/operator"), "folder for the three files", group="operator", common=True)
    lengths: tuple[int, ...] = option(UNSET, "positions of the operator's inputs", group="operator", common=True)
    model_lengths: tuple[int, ...] = option(UNSET, "tokens of the model's inputs", group="operator", common=True)
    total: int = option(UNSET, "positions of all samples of a batch together", group="operator", common=True)
    layers: int = option(UNSET, "layers of the model, 768 wide", group="operator", common=True)
    seconds: float = option(UNSET, "time to spend on each figure", group="operator", common=True)


def recipe_of(on_gpu: bool) -> dict[str, Any]:
    """Return the values of unset options: what a GPU with 80 GB measures, or a CPU in less than a minute."""
    if on_gpu:
        lengths, model_lengths = tuple(2**n for n in range(9, 18)), tuple(2**n for n in range(11, 18))
        return dict(lengths=lengths, model_lengths=model_lengths, total=65_536, layers=12, seconds=1.0)
    return dict(lengths=(512, 1024), model_lengths=(512, 1024), total=1024, layers=1, seconds=0.1)


def median_ms(run: Callable[[], object], device: torch.device, seconds: float, as_graph: bool = True) -> float:
    """Return the median milliseconds of `run()`, measured for `seconds`; on a GPU, device time in groups of calls.

    On a GPU the calls are replayed from a CUDA graph, so that launching costs nothing, unless `as_graph` is False.
    """
    if device.type != "cuda":
        run()
        times: list[float] = []
        while len(times) < 3 or sum(times) < seconds:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1000
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    if as_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay

    def time_group(calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    calls = max(1, min(20, round(20 / time_group(1))))  # about 20 ms a group
    groups = max(3, round(seconds * 1000 / (calls * time_group(calls))))
    return statistics.median(time_group(calls) for _ in range(groups))


def copy_bytes_per_ms(device: torch.device, seconds: float) -> float:
    """Return the bytes that copying a tensor far larger than any cache reads and writes per millisecond."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device, seconds)


def attend_unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute the operator as it is written: two softmaxes and two products."""
    return query.softmax(dim=-1) @ (key.softmax(dim=-2).transpose(-2, -1) @ value)


def attend_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax attention by torch's flash kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def attend_triton(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute the operator by our Triton kernels."""
    return factorized_attention(query, key, value, impl="triton")


def or_out_of_memory(measure: Callable[..., float], *arguments: Any, **options: Any) -> float | None:
    """Return the figure of `measure` for the arguments, or None where the device has too little memory for it."""
    try:
        return measure(*arguments, **options)
    except torch.OutOfMemoryError:
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_operator(options: OperatorOptions, device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """Return a row per implementation and length: milliseconds and share of the floor, without and with backward.

    `bandwidth` is what `copy_bytes_per_ms` gives. The floor of the forward pass is reading Q, K, V and writing the
    output once: 4 · B · N · H · d · b bytes. That of forward and backward is 11 such tensors: the backward pass reads
    Q, K, V and the output's gradient and writes three gradients.
    """
    attends: dict[str, Callable[..., Tensor]] = {"unfused": attend_unfused, "factorized": factorized_attention}
    if device.type == "cuda":
        attends = {"triton": attend_triton, "unfused": attend_unfused, "flash": attend_flash}
    rows = []
    for length in options.lengths:
        batch = max(1, options.total // length)
        tensors = [torch.randn(batch, length, HEADS, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(4)]
        *inputs, gradient = (tensor.transpose(1, 2) for tensor in tensors)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        copy_ms = tensors[0].numel() * tensors[0].element_size() / bandwidth
        for name, attend in attends.items():

            def forward(attend=attend, inputs=inputs):
                with torch.no_grad():
                    attend(*inputs)

            def train(attend=attend, leaves=leaves, gradient=gradient):
                torch.autograd.grad(attend(*leaves), leaves, gradient)

            row: dict[str, Any] = {"implementation": name, "batch": batch, "length": length}
            for phase, run, count in (("forward", forward, FORWARD_TENSORS), ("training", train, TRAINING_TENSORS)):
                spent = or_out_of_memory(median_ms, run, device, options.seconds)
                row[f"{phase}_ms"] = spent
                row[f"{phase}_floor_share"] = spent and count * copy_ms / spent
            rows.append(row)
            print(row, flush=True)
    return rows


def measure_model(options: OperatorOptions, device: torch.device) -> list[dict[str, Any]]:
    """Return the tokens per second of a bfloat16 FABertModel by length, forward and in training without optimiser."""
    config = FABertConfig(num_hidden_layers=options.layers, max_position_embeddings=max(options.model_lengths))
    model = FABertModel(config).to(device, torch.bfloat16)
    rows = []
    for length in options.model_lengths:
        batch = max(1, options.total // length)
        tokens = torch.randint(1, config.vocab_size, (batch, length), device=device)

        def forward(tokens=tokens):
            with torch.inference_mode():
                model.eval()(tokens)

        def train(tokens=tokens):
            model.train()(tokens).last_hidden_state.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        row: dict[str, Any] = {"batch": batch, "length": length}
        for phase, run in (("forward", forward), ("training", train)):
            spent = or_out_of_memory(median_ms, run, device, options.seconds, as_graph=False)
            row[f"{phase}_tokens_per_second"] = spent and batch * length / spent * 1000
        rows.append(row)
        print(row, flush=True)
    return rows
