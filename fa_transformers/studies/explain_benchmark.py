"""Time and memory of explanations by length, beside a forward pass and dense rollout, each point in a fresh process.

`python -m fa_transformers.studies.explain_benchmark POINT` measures one point, [method, tokens, repeats, threads] as
JSON, and prints its seconds and bytes. The model is of MiniLM's size; "dense" methods run stock BERT with its weights.
"""

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from ..charts import HIGHLIGHT, MUTED, chart_style, clear_frame, new_figure, save_figure, scale_by_size
from ..explain.attention import rollout
from ..explain.attribution import attribute
from ..memory import return_freed_memory
from ..models import FABertConfig, FABertForSequenceClassification
from ..options import OptionGroup, option
from .benchmark import MemoryMeter

ABOUT = "Explanations: how faithful they are by method, and what they cost."
SIZES: dict[str, Any] = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
METHODS = ("forward", "rollout", "gradient_x_input", "dense_row", "dense_product")
"""Beside ours: "dense_row" multiplies a vector with each layer's N×N matrix of softmax attention, of which it keeps the
mean over heads alone; "dense_product" collects all matrices and multiplies them, as rollout is usually written."""
DENSE = {"dense_row": "dense, one row, lean", "dense_product": "dense, as usually written"}
OUT_OF_MEMORY = re.compile("not enough memory|can't allocate memory|MemoryError|bad_alloc")
FREE_SHARE = 0.9
"""Share of the memory that is free at the start which a point may take; it stops above, and the machine goes on."""


@dataclass(frozen=True)
class ExplainOptions(OptionGroup):
    """The methods and lengths to measure."""

    methods: tuple[str, ...] = option(
        ("forward", "rollout", "dense_row", "dense_product"), f"what to measure, of {', '.join(METHODS)}",
        group="explain", common=True,
    )  # fmt: skip
    lengths: tuple[int, ...] = option((4096, 8192, 16384, 32768, 65536, 131072), "tokens", group="explain", common=True)
    longest_dense: int = option(16384, "tokens above which dense methods are left out", group="explain", common=True)
    repeats: int = option(2, "timed runs of each point; the fastest counts", group="explain", common=True)
    threads: int = option(2, "CPU threads", group="explain", common=True)
    results: Path | None = option(
        None, "JSON file of a results page, into which the tables are put", group="explain", common=True
    )
    chart: Path | None = option(None, "PNG of time and memory by length", group="explain", common=True)

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what can't be measured."""
        for name in ("methods", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"--{name} must have at least one value, got none.")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"--methods {unknown[0]} is unknown; choose from {', '.join(METHODS)}.")
        for name in ("repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if min(self.lengths) < 1:
            raise ValueError(f"--lengths must be at least 1 token each, got {min(self.lengths)}.")


def dense_rollout(model: BertModel, inputs: dict[str, Tensor], is_product: bool) -> Tensor:
    """Return rollout of the first token from the N×N matrices of a stock model: [B, N]."""
    with torch.inference_mode():
        if not is_product:
            return dense_row(model, inputs)
        maps = [layer.mean(dim=1) for layer in model(**inputs, output_attentions=True).attentions]
        identity = torch.eye(maps[0].shape[1])
        product = identity
        for layer in maps:
            product = (0.5 * identity + 0.5 * layer) @ product
        return product[:, 0]


def dense_row(model: BertModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return what `dense_rollout` does by products of a vector with each matrix, the mean over heads: [B, N]."""
    maps: list[Tensor] = []

    def keep_mean(module: torch.nn.Module, arguments: Any, output: tuple) -> tuple:
        maps.append(output[1].mean(dim=1))
        return output[0], None

    hooks = [layer.attention.self.register_forward_hook(keep_mean) for layer in model.encoder.layer]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    row = torch.zeros(len(maps[0]), 1, maps[0].shape[1])
    row[:, :, 0] = 1.0
    while maps:
        row = 0.5 * row + 0.5 * row @ maps.pop()
    return row[:, 0]


def prepare(method: str, num_tokens: int) -> Callable[[int], Any]:
    """Return a function that runs the method on a random text of so many tokens."""
    torch.manual_seed(0)
    model = FABertForSequenceClassification(FABertConfig(**SIZES, max_position_embeddings=num_tokens)).eval()
    if method.startswith("dense"):
        config = BertConfig(**SIZES, max_position_embeddings=num_tokens, attn_implementation="eager")
        stock = BertModel(config).eval()
        stock.load_state_dict(model.bert.state_dict())

    def run(length: int) -> Any:
        inputs = {"input_ids": torch.randint(model.config.vocab_size, (1, length))}
        if method == "forward":
            with torch.inference_mode():
                return model(**inputs)
        if method == "rollout":
            return rollout(model, inputs)
        if method == "gradient_x_input":
            return attribute(model, inputs, 0, "gradient_x_input")
        return dense_rollout(stock, inputs, method == "dense_product")

    return run


def limit_memory() -> None:
    """Let allocations of this process fail where they would take more than `FREE_SHARE` of what is free now."""
    fields = {}
    for name in ("meminfo", "self/status"):
        for line in Path("/proc", name).read_text(encoding="ascii").splitlines():
            fields[line.split(":")[0]] = line.split()[1:2]
    (free,), (taken,) = fields["MemAvailable"], fields["VmSize"]
    limit = int((int(taken) + FREE_SHARE * int(free)) * 1024)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def measure_here(method: str, num_tokens: int, repeats: int, threads: int) -> dict[str, float]:
    """Return the seconds of the fastest of `repeats` runs, and the bytes that the process grows by above the model."""
    return_freed_memory()
    limit_memory()
    torch.set_num_threads(threads)
    run = prepare(method, num_tokens)
    run(min(64, num_tokens))  # loads the libraries
    meter = MemoryMeter("cpu")
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run(num_tokens)
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "peak_bytes": meter.peak_bytes()}


def measure(method: str, num_tokens: int, options: ExplainOptions) -> dict[str, Any]:
    """Return a row of the table, measured in a fresh process; numbers are None where that ran out of memory.

    Raises:
        RuntimeError: the process failed in another way.
    """
    row: dict[str, Any] = {"method": method, "tokens": num_tokens, "seconds": None, "peak_mib": None}
    if method.startswith("dense") and num_tokens > options.longest_dense:
        return row
    point = json.dumps([method, num_tokens, options.repeats, options.threads])
    ran = subprocess.run([sys.executable, "-m", __name__, point], capture_output=True, text=True, check=False)
    if ran.returncode == -9 or OUT_OF_MEMORY.search(ran.stderr):
        return row
    if ran.returncode:
        raise RuntimeError(f"{point}: {ran.stderr}")
    found = json.loads(ran.stdout.splitlines()[-1])
    return row | {"seconds": found["seconds"], "peak_mib": found["peak_bytes"] / 2**20}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row its time and memory relative to a forward pass of as many tokens, where both were measured."""
    forward = {row["tokens"]: row for row in rows if row["method"] == "forward"}

    def ratio(row: dict[str, Any], name: str) -> float | None:
        base = forward.get(row["tokens"], {}).get(name)
        return None if row[name] is None or base is None else row[name] / base

    return [row | {f"{name}_over_forward": ratio(row, name) for name in ("seconds", "peak_mib")} for row in rows]


def by_point(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    return {(row["method"], row["tokens"]): row for row in rows}


def cost_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each length: forward pass and rollout, and how many times the first the second takes."""
    points = by_point(rows)
    lengths = [length for method, length in points if method == "rollout" and ("forward", length) in points]
    return [
        {"tokens": length}
        | {f"{name}_{method}": points[method, length][name] for name in MEASURES for method in ("forward", "rollout")}
        | {f"{name}_ratio": points["rollout", length][f"{name}_over_forward"] for name in MEASURES}
        for length in lengths
    ]


def dense_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each dense method and length: what it takes, and how many times what our rollout takes."""
    points = by_point(rows)
    table = []
    for (method, length), row in points.items():
        ours = points.get(("rollout", length))
        if method in DENSE and ours is not None:
            ratios = {f"{name}_ratio": row[name] and ours[name] and row[name] / ours[name] for name in MEASURES}
            table.append({"tokens": length, "method": DENSE[method]} | {name: row[name] for name in MEASURES} | ratios)
    return table


MEASURES = ("seconds", "peak_mib")
COST_COLUMNS: dict[str, dict[str, Any]] = {
    "tokens": {"name": "tokens"},
    "seconds_forward": {"name": "forward pass, s", "digits": 2},
    "seconds_rollout": {"name": "rollout, s", "digits": 2},
    "seconds_ratio": {"name": "times the pass", "digits": 2},
    "peak_mib_forward": {"name": "forward pass, MiB", "digits": 0},
    "peak_mib_rollout": {"name": "rollout, MiB", "digits": 0},
    "peak_mib_ratio": {"name": "times its memory", "digits": 2},
}
DENSE_COLUMNS: dict[str, dict[str, Any]] = {
    "tokens": {"name": "tokens"},
    "method": {"name": "rollout"},
    "seconds": {"name": "s", "digits": 2},
    "seconds_ratio": {"name": "times ours", "digits": 1},
    "peak_mib": {"name": "MiB", "digits": 0},
    "peak_mib_ratio": {"name": "times ours", "digits": 1},
}


def draw_chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of time and memory by length, each method as far as it was measured."""
    styles = {
        "forward": ("forward pass", "s:", MUTED["BERT"]),
        "rollout": ("rollout", "o-", HIGHLIGHT),
        "dense_row": (DENSE["dense_row"], "^--", MUTED["BERT"]),
        "dense_product": (DENSE["dense_product"], "v--", MUTED["BERT"]),
    }
    lengths = sorted({row["tokens"] for row in rows})
    with chart_style():
        figure, panels = new_figure(1, 2, size=(9, 3.5))
        for axes, name, label in zip(panels, MEASURES, ("seconds", "MiB beside the model"), strict=True):
            for method, (text, style, colour) in styles.items():
                known = [row for row in rows if row["method"] == method and row[name] is not None]
                axes.plot(
                    [row["tokens"] for row in known], [row[name] for row in known], style, color=colour, label=text
                )
            axes.set(yscale="log", xlabel="tokens", ylabel=label)
            scale_by_size(axes, lengths)
            clear_frame(axes)
        panels[0].legend()
        save_figure(figure, path)


if __name__ == "__main__":
    print(json.dumps(measure_here(*json.loads(sys.argv[1]))))
