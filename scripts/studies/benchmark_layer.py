"""Measure what token mixing costs, as a share of the linear maps (Q, K, V, output, feed-forward) of the same layer.

python scripts/studies/benchmark_layer.py                   # 2 CPU cores: about 4 minutes
python scripts/studies/benchmark_layer.py --dtype bfloat16

BERT-base sizes, batch 1, everything in one process, in turn, median of the repeats. "formula" is the operator written
out as softmax, matmul, matmul, its output laid out token by token as the next map reads it; "training" is forward and
backward. Prints a Markdown table and one line of JSON.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fa_transformers import factorized_attention
from fa_transformers.checks import check_positive
from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.cores import choose_threads
from fa_transformers.models.fa_local import LocalConvolution, window_attention
from fa_transformers.options import OptionGroup, option

HEADS, WIDTH, HIDDEN, INTERMEDIATE = 12, 64, 768, 3072
KERNEL_SIZE, WINDOW = 15, 32


@dataclass(frozen=True)
class LayerOptions(OptionGroup):
    """Sizes to measure."""

    lengths: tuple[int, ...] = option((2048, 8192, 32768), "tokens", group="layer", common=True)
    dtype: Literal["float32", "bfloat16"] = option("float32", "type of weights and tokens", group="layer", common=True)
    repeats: int = option(7, "timed calls of each part, after one that is not", group="layer", common=True)
    num_threads: int = option(choose_threads().count, "CPU threads", group="layer", common=True)


def parse(argv: Sequence[str] | None = None) -> LayerOptions:
    """Return the options, checked."""
    parser = script_parser("python scripts/studies/benchmark_layer.py", __doc__)
    parser.add_options(LayerOptions, ("layer",), "measurement")
    parsed = parser.parse(argv)
    try:
        check_positive(parsed[LayerOptions], "repeats", "num_threads")
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[LayerOptions]


class LinearMaps(nn.Module):
    """The six linear maps of a layer, each on tokens of its input width."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.widen, self.narrow = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return *(map(tokens) for map in self.square), self.narrow(self.widen(tokens))


def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute the operator as it is written, laid out token by token."""
    output = query.softmax(dim=-1) @ (key.softmax(dim=-2).transpose(-2, -1) @ value)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def median_seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, the calls taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(length: int, dtype: torch.dtype, repeats: int) -> dict:
    """Return the shares of the linear maps' time at one length, forward and forward + backward."""
    maps = LinearMaps().to(dtype)
    convolution = LocalConvolution(HIDDEN, KERNEL_SIZE, spatial_rank=1).to(dtype)
    compiled = torch.compile(factorized_attention, fullgraph=True, dynamic=True)
    tokens = torch.randn(1, length, HIDDEN, dtype=dtype).requires_grad_()
    parts = [torch.randn(1, length, HEADS, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(4)]
    query, key, value, gradient = parts
    mixers: dict[str, Callable[[], Tensor]] = {
        "formula": lambda: formula(query, key, value),
        "operator": lambda: factorized_attention(query, key, value),
        "compiled": lambda: compiled(query, key, value),
        f"convolution {KERNEL_SIZE}": lambda: convolution(value),
        f"window {WINDOW}": lambda: window_attention(query, key, value, None, WINDOW),
    }

    def train(mixer: Callable[[], Tensor]) -> None:
        leaves = (query, key, value, convolution.weight)
        torch.autograd.grad(mixer(), leaves, gradient.detach(), allow_unused=True)

    def train_maps() -> None:
        outputs = maps(tokens)
        torch.autograd.grad(outputs, [tokens, *maps.parameters()], [torch.ones_like(output) for output in outputs])

    row = {"tokens": length}
    with torch.no_grad():
        seconds = median_seconds({"maps": lambda: maps(tokens), **mixers}, repeats)
    row["maps_ms"] = seconds["maps"] * 1000
    row["forward"] = {name: seconds[name] / seconds["maps"] for name in mixers}
    trained = {name: (lambda mixer=mixer: train(mixer)) for name, mixer in mixers.items()}
    seconds = median_seconds({"maps": train_maps, **trained}, max(3, repeats // 2))
    row["training"] = {name: seconds[name] / seconds["maps"] for name in mixers}
    return row


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(options.num_threads)
    rows = []
    for length in options.lengths:
        rows.append(measure(length, getattr(torch, options.dtype), options.repeats))
        if len(rows) == 1:
            names = list(rows[0]["forward"])
            print("| tokens | pass | maps, ms | " + " | ".join(names) + " |")
            print("| --- " * (len(names) + 3) + "|")
        for phase in ("forward", "training"):
            shares = " | ".join(f"{rows[-1][phase][name]:.1%}" for name in names)
            times = f"{rows[-1]['maps_ms']:.0f}" if phase == "forward" else ""
            print(f"| {length:,} | {phase} | {times} | {shares} |", flush=True)
    facts = {"dtype": options.dtype, "num_threads": options.num_threads, "torch": torch.__version__}
    print(json.dumps(facts | {"rows": rows}))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
