"""Measured peak memory beside `estimate_memory`, one fresh process per point, and the longest text that trains.

`python -m fa_transformers.studies.peak_memory POINT` measures one point, [model, tokens, options, device] as JSON, and
prints its bytes.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModel

from ..memory import estimate_memory, return_freed_memory
from ..models import FABertConfig, FAViTConfig
from ..models.configuration_fa import FactorizedConfig
from ..options import OptionGroup, option
from .benchmark import MemoryMeter

MODELS: dict[str, tuple[type[FactorizedConfig], dict[str, Any]]] = {
    "MiniLM": (
        FABertConfig,
        dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    ),
    "BERT-base": (FABertConfig, {}),
    "ViT-S/16": (FAViTConfig, dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536)),
}
POINTS: list[tuple[str, int, dict[str, Any]]] = [
    ("MiniLM", 8192, {}),
    ("MiniLM", 65536, {}),
    ("MiniLM", 65536, {"chunk_size_feed_forward": 1024}),
    ("MiniLM", 2048, {"training": True}),
    ("MiniLM", 16384, {"training": True}),
    ("MiniLM", 16384, {"training": True, "gradient_checkpointing": True}),
    ("MiniLM", 8192, {"training": True, "mixed_precision": "bf16"}),
    ("MiniLM", 8192, {"training": True, "local_window": 64}),
    ("MiniLM", 8192, {"training": True, "local_kernel_size": 15}),
    ("MiniLM", 8192, {"training": True, "key_feature_size": 64}),
    ("BERT-base", 4096, {}),
    ("BERT-base", 4096, {"training": True}),
    ("BERT-base", 4096, {"training": True, "gradient_checkpointing": True}),
    ("ViT-S/16", 16384, {}),
    ("ViT-S/16", 4096, {"training": True}),
]
"""Model, tokens, and what else differs from a float32 forward pass: arguments of the run or config fields."""

RUN_ARGUMENTS = ("training", "gradient_checkpointing", "mixed_precision")
GRANULE = 512
"""Tokens that the longest text is told to."""

TRAINING_OPTIONS: tuple[dict[str, Any], ...] = ({"training": True}, {"training": True, "gradient_checkpointing": True})


@dataclass(frozen=True)
class MemoryOptions(OptionGroup):
    """The points to measure, and the budgets to find the longest text for."""

    device: Literal["cpu", "cuda"] = option("cpu", "where to measure", group="memory", common=True)
    models: tuple[str, ...] = option(tuple(MODELS), "sizes to measure, by name", group="memory", common=True)
    budgets: tuple[float, ...] = option((), "GiB to find the longest text for", group="memory", common=True)
    verify_up_to: int | None = option(
        None, "tokens above which a length is told by the slope alone; unset = measure all", group="memory", common=True
    )
    skip_points: bool = option(False, "measure the budgets alone", group="memory", common=True)

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what can't be measured."""
        if unknown := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"--models {unknown[0]} is unknown; choose from {', '.join(MODELS)}.")
        if self.budgets and min(self.budgets) <= 0:
            raise ValueError(f"--budgets must be above 0 GiB each, got {min(self.budgets):g}.")


def make_config(name: str, options: dict[str, Any]) -> tuple[FactorizedConfig, dict[str, Any]]:
    """Return the config of a named size, and the arguments of the run, which `options` mixes with config fields."""
    config_class, fields = MODELS[name]
    run = {key: value for key, value in options.items() if key in RUN_ARGUMENTS}
    fields = fields | {key: value for key, value in options.items() if key not in RUN_ARGUMENTS}
    return config_class(position_embedding_type="periodic", **fields), run


def make_inputs(config: FactorizedConfig, num_tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Make one text of `num_tokens`, or one image of about as many patches."""
    if isinstance(config, FABertConfig):
        return {"input_ids": torch.randint(config.vocab_size, (1, num_tokens), device=device)}
    assert isinstance(config, FAViTConfig)
    rows = int(num_tokens**0.5)
    sides = [count * side for count, side in zip((rows, num_tokens // rows), config.patch_shape, strict=True)]
    return {"pixel_values": torch.rand(1, config.num_channels, *sides, device=device)}


def run_model(config: FactorizedConfig, num_tokens: int, device: str, run: dict[str, Any]) -> None:
    """Run a forward pass, or a training step after a short one, which leaves the optimiser's state beside it."""
    model = AutoModel.from_config(config).to(device)
    if not run.get("training"):
        with torch.inference_mode():
            model.eval()(**make_inputs(config, num_tokens, device))
        return
    model.train()
    if run.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    for length in (16, num_tokens):
        inputs = make_inputs(config, length, device)
        is_mixed = run.get("mixed_precision") == "bf16"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=is_mixed):
            loss = model(**inputs).pooler_output.float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure_here(name: str, num_tokens: int, options: dict[str, Any], device: str) -> int:
    """Return by how many bytes this process grows at most from before the model is made.

    Freed memory is returned to the system, as fine-tuning does with gradient checkpointing.
    """
    return_freed_memory()
    tiny = FABertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=8)
    run_model(tiny, 16, device, {"training": True})  # loads the libraries
    config, run = make_config(name, options)
    meter = MemoryMeter(device)
    run_model(config, num_tokens, device, run)
    return meter.peak_bytes()


def measure(name: str, num_tokens: int, options: dict[str, Any], device: str) -> int | None:
    """Return the bytes of `measure_here` in a fresh process; None where that ran out of memory.

    Raises:
        RuntimeError: the process failed in another way.
    """
    point = json.dumps([name, num_tokens, options, device])
    command = [sys.executable, "-m", __name__, point]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode == -9 or "OutOfMemoryError" in ran.stderr:
        return None
    if ran.returncode:
        raise RuntimeError(f"{point}: {ran.stderr}")
    return int(ran.stdout.splitlines()[-1])


def compare(name: str, num_tokens: int, options: dict[str, Any], device: str) -> dict[str, Any]:
    """Return a row of the table: a point's measured and estimated memory in GiB, and their ratio."""
    config, run = make_config(name, options)
    estimated = estimate_memory(config, num_tokens, device_type=device, **run).total
    measured = measure(name, num_tokens, options, device)
    return {
        "model": name,
        "tokens": num_tokens,
        "options": ", ".join(key if value is True else f"{key}={value}" for key, value in options.items()) or "forward",
        "measured_gib": None if measured is None else measured / 2**30,
        "estimated_gib": estimated / 2**30,
        "ratio": None if measured is None else estimated / measured,
    }


def fit_line(name: str, budget: int, options: dict[str, Any], device: str) -> tuple[float, float]:
    """Return the bytes of a training step without tokens, and the bytes per token.

    They are measured at two lengths that take about 1/4 and 1/2 of `budget` bytes. Short texts would not do: the peak
    of their training is the optimiser's step, whatever their length. With 1/8 of 8 GiB the line of BERT-base's size was
    too flat by a quarter.

    Raises:
        ValueError: the budget is too small for two lengths.
        RuntimeError: half of the budget is more than this machine has.
    """
    config, run = make_config(name, options)
    estimate = estimate_memory(config, 2**20, device_type=device, **run)  # of so many that activations are the peak
    most = (budget - estimate.weights - estimate.optimizer) / (estimate.activations / 2**20)
    lengths = [int(most * share) // GRANULE * GRANULE for share in (1 / 4, 1 / 2)]
    if lengths[0] < GRANULE:
        raise ValueError(f"--budgets {budget / 2**30:g} GiB is too little for {name}: give more.")
    low, high = (measure(name, tokens, options, device) for tokens in lengths)
    if low is None or high is None:
        raise RuntimeError(f"{name}, {options}: {lengths} tokens, up to half of the budget, ran out of memory.")
    slope = (high - low) / (lengths[1] - lengths[0])
    return high - slope * lengths[1], slope


def longest_training(
    name: str,
    budget: int,
    options: dict[str, Any],
    device: str,
    line: tuple[float, float],
    verify_up_to: int | None,
) -> dict[str, Any]:
    """Find the largest number of tokens that trains in `budget` bytes: by the line of `fit_line`, then verified.

    Above `verify_up_to` tokens it is as the line says, and `verified_gib` is None.

    Raises:
        ValueError: not even `GRANULE` tokens train in it.
    """
    fixed, slope = line
    tokens = int((budget - fixed) / slope) // GRANULE * GRANULE
    is_short = verify_up_to is None or tokens <= verify_up_to
    verified = measure(name, tokens, options, device) if is_short else None
    while is_short and (verified is None or verified > budget):  # None: more than this machine has
        excess = budget / 20 if verified is None else verified - budget
        tokens -= max(GRANULE, int(excess / slope) // GRANULE * GRANULE)
        if tokens < GRANULE:
            raise ValueError(f"--budgets {budget / 2**30:g} GiB: not even {GRANULE} tokens of {name} train in it here.")
        verified = measure(name, tokens, options, device)
    return {
        "model": name,
        "options": ", ".join(options),
        "budget_gib": budget / 2**30,
        "tokens": tokens,
        "verified_gib": None if verified is None else verified / 2**30,
        "kib_per_token": slope / 2**10,
    }


if __name__ == "__main__":
    print(measure_here(*json.loads(sys.argv[1])))
