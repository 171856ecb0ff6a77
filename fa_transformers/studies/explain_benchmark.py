"""Time and memory of explanations by length, beside a forward pass and dense rollout, each point in a fresh process.

`python -m fa_transformers.studies.explain_benchmark POINT` measures one point, [method, tokens, repeats, threads] as
JSON, and prints its seconds and bytes. The model is of MiniLM's size; "dense" methods run stock BERT with its weights.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from ..explain.attention import rollout
from ..explain.attribution import attribute
from ..memory import return_freed_memory
from ..models import FABertConfig, FABertForSequenceClassification
from ..options import OptionGroup, option
from .benchmark import MemoryMeter

SIZES: dict[str, Any] = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
METHODS = ("forward", "rollout", "gradient_x_input", "dense_row", "dense_product")
"""Beside ours: "dense_row" multiplies a vector with each N×N matrix of softmax attention, as lean as it can be;
"dense_product" multiplies the matrices, as rollout is usually written."""


@dataclass(frozen=True)
class ExplainOptions(OptionGroup):
    """The methods and lengths to measure."""

    methods: tuple[str, ...] = option(METHODS, "what to measure", group="explain", common=True)
    lengths: tuple[int, ...] = option((4096, 16384, 65536, 131072), "tokens", group="explain", common=True)
    longest_dense: int = option(8192, "tokens above which dense methods are left out", group="explain", common=True)
    repeats: int = option(3, "timed runs of each point; the fastest counts", group="explain", common=True)
    threads: int = option(2, "CPU threads", group="explain", common=True)

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
        maps = [layer.mean(dim=1) for layer in model(**inputs, output_attentions=True).attentions]
        identity = torch.eye(maps[0].shape[1])
        if not is_product:
            row = identity[:1].expand(len(maps[0]), 1, -1)
            for layer in reversed(maps):
                row = 0.5 * row + 0.5 * row @ layer
            return row[:, 0]
        product = identity
        for layer in maps:
            product = (0.5 * identity + 0.5 * layer) @ product
        return product[:, 0]


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
            return attribute(model, inputs, 0)
        return dense_rollout(stock, inputs, method == "dense_product")

    return run


def measure_here(method: str, num_tokens: int, repeats: int, threads: int) -> dict[str, float]:
    """Return the seconds of the fastest of `repeats` runs, and the bytes that the process grows by above the model."""
    return_freed_memory()
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
    if ran.returncode == -9 or "not enough memory" in ran.stderr:
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


if __name__ == "__main__":
    print(json.dumps(measure_here(*json.loads(sys.argv[1]))))
