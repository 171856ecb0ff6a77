"""Set `estimate_memory` against the measured peak memory, one fresh process per point, and tell how long a text trains.

python scripts/studies/measure_memory.py                            # estimate and measurement at several lengths
python scripts/studies/measure_memory.py --budgets 8 16 20          # also the longest text that trains in so many GiB
python scripts/studies/measure_memory.py --device cuda --budgets 80
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from fa_transformers import FABertConfig, FABertModel, FAViTConfig, FAViTModel
from fa_transformers.memory import estimate_memory, return_freed_memory
from fa_transformers.tables import format_table

MODELS = {
    "MiniLM": (
        FABertConfig,
        dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    ),
    "BERT-base": (FABertConfig, {}),
    "ViT-S/16": (FAViTConfig, dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536)),
}
# Model, tokens, what else differs from a float32 forward pass.
POINTS = [
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
RUN_FLAGS = ("training", "gradient_checkpointing", "mixed_precision")
GRANULE = 512
TRAINING_OPTIONS = ({"training": True}, {"training": True, "gradient_checkpointing": True})


def make_config(name: str, options: dict):
    """The config of a named size, and the options of the run that are no config fields."""
    config_class, fields = MODELS[name]
    run = {key: value for key, value in options.items() if key in RUN_FLAGS}
    fields = fields | {key: value for key, value in options.items() if key not in RUN_FLAGS}
    return config_class(position_embedding_type="periodic", **fields), run


def resident_bytes(field: str) -> int:
    """Memory of this process now ("VmRSS") or at most so far ("VmHWM"); Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(":") for line in lines)[field].split()[0]) * 1024


def make_inputs(config, num_tokens: int, device: str) -> dict[str, torch.Tensor]:
    if isinstance(config, FABertConfig):
        return {"input_ids": torch.randint(config.vocab_size, (1, num_tokens), device=device)}
    rows = int(num_tokens**0.5)
    sides = [count * side for count, side in zip((rows, num_tokens // rows), config.patch_shape, strict=True)]
    return {"pixel_values": torch.rand(1, config.num_channels, *sides, device=device)}


def run_model(config, num_tokens: int, device: str, run: dict) -> None:
    """One forward pass, or a training step after a short one, which leaves the optimiser's state beside it."""
    model = (FABertModel if isinstance(config, FABertConfig) else FAViTModel)(config).to(device)
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


def measure_here(name: str, num_tokens: int, options: dict, device: str) -> int:
    """Peak growth of this process in bytes since before the model is made; freed memory is returned.

    As finetune.py does with --gradient_checkpointing.
    """
    return_freed_memory()
    tiny = FABertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=8)
    run_model(tiny, 16, device, {"training": True})  # loads the libraries
    config, run = make_config(name, options)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_model(config, num_tokens, device, run)
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes("VmRSS")
    run_model(config, num_tokens, device, run)
    return resident_bytes("VmHWM") - before


def measure(name: str, num_tokens: int, options: dict, device: str) -> int | None:
    """The same in a fresh process; None where that ran out of memory."""
    point = json.dumps([name, num_tokens, options, device])
    command = [sys.executable, __file__, "--point", point]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode == -9 or "OutOfMemoryError" in ran.stderr:
        return None
    if ran.returncode:
        raise RuntimeError(f"{point}: {ran.stderr}")
    return int(ran.stdout.splitlines()[-1])


def compare(name: str, num_tokens: int, options: dict, device: str) -> dict:
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


def fit_line(name: str, budget: int, options: dict, device: str) -> tuple[float, float]:
    """Bytes of a training step without tokens and per token, from two lengths that take about 1/4 and 1/2 of `budget`.

    Short texts would not do: the peak of theirs is the optimiser's step, whatever their length. With 1/8 of 8 GiB the
    line of BERT-base's size was too flat by a quarter.

    Raises:
        ValueError: the budget is too small for two lengths.
    """
    config, run = make_config(name, options)
    estimate = estimate_memory(config, 2**20, device_type=device, **run)  # of so many that activations are the peak
    most = (budget - estimate.weights - estimate.optimizer) / (estimate.activations / 2**20)
    lengths = [int(most * share) // GRANULE * GRANULE for share in (1 / 4, 1 / 2)]
    if lengths[0] < GRANULE:
        raise ValueError(f"--budgets {budget / 2**30:g} GiB is too little for {name}: give more.")
    sizes = [measure(name, tokens, options, device) for tokens in lengths]
    if None in sizes:
        raise RuntimeError(f"{name}, {options}: {lengths} tokens, up to half of the budget, ran out of memory.")
    slope = (sizes[1] - sizes[0]) / (lengths[1] - lengths[0])
    return sizes[1] - slope * lengths[1], slope


def longest_training(
    name: str, budget: int, options: dict, device: str, line: tuple[float, float], verify_up_to: int | None
) -> dict:
    """The largest number of tokens that trains in `budget` bytes: by the line of `fit_line`, then verified.

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="GiB to find the longest text for")
    parser.add_argument("--verify_up_to", type=int, help="tokens above which a length is told by the slope alone")
    parser.add_argument("--skip_points", action="store_true", help="measure the budgets alone")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS), help="sizes to measure")
    parser.add_argument("--point", help="measure this point alone, in this process; for the script's own use")
    args = parser.parse_args()
    if args.point:
        print(measure_here(*json.loads(args.point)))
        return
    points = [] if args.skip_points else [point for point in POINTS if point[0] in args.models]
    rows = [compare(*point, args.device) for point in tqdm(points, desc="points")]
    if rows:
        print(format_table(rows, list(rows[0])))
    texts = [name for name in args.models if MODELS[name][0] is FABertConfig]
    longest = []
    variants = [options for options in TRAINING_OPTIONS if args.budgets]
    for name, options in tqdm(list(itertools.product(texts, variants)), desc="budgets"):
        budgets = [int(budget * 2**30) for budget in args.budgets]
        line = fit_line(name, min(budgets), options, args.device)
        for budget in budgets:
            row = longest_training(name, budget, options, args.device, line, args.verify_up_to)
            tqdm.write(json.dumps(row))  # the next one can take minutes
            longest.append(row)
    if longest:
        print("\n" + format_table(longest, list(longest[0])))
    print(json.dumps({"device": args.device, "torch": torch.__version__, "points": rows, "longest": longest}))


if __name__ == "__main__":
    main()
