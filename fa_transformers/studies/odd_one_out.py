"""Detectors of what is there once and what more often, with factorized blocks, softmax blocks, and none.

All start from one detector of digits that has no blocks: blocks are put into it, which start as the identity, so that
before training the kinds are one and the same function. Blocks and heads alone train: backbone and pyramid know the
digits, and nothing would keep them so, as a digit's kind says nothing about its class before the blocks work.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checks import check_positive
from ..data.sets.digit_scenes import ODD_DIGIT_PX, draw_digit_scene
from ..files import write_json
from ..models import FADenseConfig, FADenseForObjectDetection, FADenseImageProcessor
from ..models.fa_block import FactorizedAttentionBlock
from ..options import OptionGroup, option
from ..training.dense_backbone import BLOCK_FIELDS

KINDS = ("none", "factorized", "softmax")
SCORES = ("box_ap", "box_ap50")
SETTINGS = "settings.json"
NUM_DRAWN, CANVAS_PX = 32, 512
"""Canvases by which the values of new blocks are scaled, and their side."""
TRAINING = (
    "--freeze_backbone", "--freeze_pyramid", "--per_device_train_batch_size", 4, "--warmup_ratio", 0.3,
    "--no-swap_colours", "--colour", 0,
)  # fmt: skip
"""Flags of every run. Colours stay: all digits have random ones."""
RECEIPT = "receipt.json"
"""File that is written into a run's folder last: its CPU seconds and the highest resident memory of its process."""


@dataclass(frozen=True)
class OddOneOutOptions(OptionGroup):
    """The detector to start from, the kinds of blocks, and the training of each."""

    kinds: tuple[str, ...] = option(KINDS, "none, factorized, softmax, or several", group="study", common=True)
    seeds: tuple[int, ...] = option((0, 1), "seeds of weights and order, one run each", group="study", common=True)
    attention_places: tuple[str, ...] = option(
        ("fp3",), "where blocks are put, see FADenseConfig", group="study", common=True
    )
    attention_heads: int = option(4, "heads of a factorized block", group="study", common=True)
    softmax_heads: int = option(
        1, "heads of a softmax block: one, as a non-local block has, as its time grows with them", group="study",
        common=True,
    )  # fmt: skip
    key_channels: int | None = option(64, "see FADenseConfig", group="study", common=True)
    key_gain: float = option(3.0, "factor on the first weights of the blocks' keys", group="study", common=True)
    query_gain: float = option(
        6.0, "factor on those of their queries, which start as the keys", group="study", common=True
    )
    num_canvases: int = option(3000, "canvases to train on", group="study", common=True)
    num_eval_canvases: int = option(100, "canvases of validation and of test each", group="study", common=True)
    num_train_epochs: float = option(2.5, "passes over them", group="study", common=True)
    learning_rate: float = option(2e-3, "peak rate", group="study", common=True)
    extra: str = option("", "further flags of finetune_dense, in quotes", group="study")
    output_dir: Path = option(
        Path("outputs/odd_one_out"), "folder for the runs; those that are finished there are taken", group="study",
        common=True,
    )  # fmt: skip
    results: Path | None = option(
        None, "JSON file of a results page, into which the table is put", group="study", common=True
    )

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what can't be run."""
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"--kinds {unknown[0]} is unknown; choose from {', '.join(KINDS)}.")
        if backbone := [place for place in self.attention_places if place.startswith("res")]:
            raise ValueError(
                f"--attention_places {backbone[0]} is in the backbone, which is frozen; take fp3, fp4, fp5."
            )
        check_positive(
            self, "num_canvases", "num_eval_canvases", "num_train_epochs", "learning_rate", "attention_heads",
            "softmax_heads", "key_channels", "key_gain", "query_gain",
        )  # fmt: skip


def put_blocks(source: Path, kind: str, options: OddOneOutOptions, folder: Path) -> None:
    """Write the detector of a folder with blocks of a kind put in, which change nothing until they are trained.

    Raises:
        FileNotFoundError: there is no such detector.
        ValueError: it has blocks already.
    """
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: there is no model folder of that name")
    trained = FADenseForObjectDetection.from_pretrained(source)
    if trained.config.places:
        raise ValueError(f"{source} has attention blocks already: train one with finetune_dense --attention none.")
    fields = trained.config.to_dict()
    backbone = {name: value for name, value in fields.pop("backbone_config").items() if name not in BLOCK_FIELDS}
    if kind != "none":
        fields |= {"attention_kind": kind, "attention_places": list(options.attention_places)}
        heads = options.softmax_heads if kind == "softmax" else options.attention_heads
        fields |= {"attention_heads": heads, "key_channels": options.key_channels}
    torch.manual_seed(0)
    model = FADenseForObjectDetection(FADenseConfig(backbone, **fields))
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected and all("attention_blocks" in name for name in missing)
    processor = FADenseImageProcessor.from_pretrained(source)
    if kind != "none":
        prepare_blocks(model, processor, options.key_gain, options.query_gain)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def prepare_blocks(
    model: FADenseForObjectDetection, processor: FADenseImageProcessor, key_gain: float, query_gain: float
) -> None:
    """Let what new blocks attend to differ between places and pictures from the first step on.

    As they are drawn, queries and keys are so even that each place gets about the mean of all values, which is nearly
    the same in all pictures. Here queries start as the keys, so that a place reads from those that look like it, and
    both get larger; values are shifted and scaled so that over `NUM_DRAWN` training canvases what is attended to has
    mean 0 and deviation 1 in every channel, which holds for both kinds of attention, as their weights sum to 1. The
    blocks stay the identity.
    """
    blocks = [module for module in model.modules() if isinstance(module, FactorizedAttentionBlock)]
    for block in blocks:  # the identity, so that none changes what another one reads
        block.queries.weight.copy_(query_gain * block.keys.weight)
        block.keys.weight *= key_gain
        values = collect_attended(model, processor, block)
        mean, deviation = values.mean(dim=(0, 2)), values.std(dim=(0, 2))
        block.values.weight /= deviation[:, None, None]
        assert block.values.bias is not None
        block.values.bias.copy_((block.values.bias - mean) / deviation)


@torch.no_grad()
def collect_attended(
    model: FADenseForObjectDetection, processor: FADenseImageProcessor, block: FactorizedAttentionBlock
) -> torch.Tensor:
    """Return what a block attends to on `NUM_DRAWN` training canvases, before its reprojection: [canvases, C, N]."""
    model.eval()
    attended: list[torch.Tensor] = []
    hook = block.reprojection.register_forward_pre_hook(lambda module, inputs: attended.append(inputs[0]))
    for row in range(NUM_DRAWN):
        canvas = draw_digit_scene("train", row, CANVAS_PX, 0, None, ODD_DIGIT_PX).image
        model(**processor(canvas, return_tensors="pt"))
    hook.remove()
    return torch.cat(attended)


def train(start: Path, seed: int, options: OddOneOutOptions, folder: Path) -> dict[str, Any]:
    """Train a detector in a process of its own, unless an earlier run finished it; a run that was stopped goes on.

    Returns:
        The run's summary, with "cpu_seconds" and "peak_bytes" of its process, evaluation included.

    Raises:
        RuntimeError: the process failed.
    """
    receipt = folder / RECEIPT
    if not receipt.is_file():
        flags: Sequence[object] = (
            "--task", "object-detection", "--set", "odd_one_out", "--model_name_or_path", start, "--seed", seed,
            "--num_canvases", options.num_canvases, "--num_eval_canvases", options.num_eval_canvases,
            "--num_train_epochs", options.num_train_epochs, "--learning_rate", options.learning_rate,
            "--num_threads", 1, "--report_to", "none", "--output_dir", folder, *TRAINING, *shlex.split(options.extra),
        )  # fmt: skip
        command = [sys.executable, "-m", "fa_transformers.commands.finetune_dense", *map(str, flags)]
        if any(folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "last"]
        else:
            command.append("--overwrite_output_dir")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with status {process.returncode}")
        # Of a run that went on, the CPU seconds of the last process alone: `resumed` says so.
        used = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}
        write_json(receipt, used | {"resumed": "--resume_from_checkpoint" in command})
    summary = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return summary | json.loads(receipt.read_text(encoding="utf-8"))


def keep_settings(source: Path, options: OddOneOutOptions) -> None:
    """Note what the runs of `options.output_dir` are made with.

    Raises:
        ValueError: those that are there were made with other settings, and can't stand in one table with these.
    """
    others = ("kinds", "seeds", "output_dir", "results")
    settings = {name: value for name, value in asdict(options).items() if name not in others} | {"source": str(source)}
    settings = json.loads(json.dumps(settings))
    path = options.output_dir / SETTINGS
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    if different := [name for name in settings if found.get(name) != settings[name]]:
        name = different[0]
        raise ValueError(
            f"--output_dir {options.output_dir} holds runs with {name} {found.get(name)!r}, not {settings[name]!r}: "
            "give another folder."
        )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def run_study(source: Path, options: OddOneOutOptions) -> list[dict[str, Any]]:
    """Train each kind with each seed, one after the other, and return a row for each kind, as `summarise` does."""
    keep_settings(source, options)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in options.kinds}
    with tqdm(total=len(options.kinds) * len(options.seeds), unit="run") as progress:
        for seed in options.seeds:
            for kind in options.kinds:
                progress.set_description(f"{kind}, seed {seed}")
                start = options.output_dir / f"start-{kind}"
                if not (start / "config.json").is_file():
                    put_blocks(source, kind, options, start)
                runs[kind].append(train(start, seed, options, options.output_dir / f"{kind}-{seed}"))
                progress.update()
    return [summarise(kind, dict(zip(options.seeds, found, strict=True))) for kind, found in runs.items()]


def summarise(kind: str, by_seed: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a kind from the summaries of its runs.

    Returns:
        "blocks", `SCORES` of each seed as "box_ap_0", "mean_ap", "cpu_seconds" (their mean), "peak_gb" (the largest).
    """
    runs = list(by_seed.values())
    scores = {f"{name}_{seed}": run["model"][name] for name in SCORES for seed, run in by_seed.items()}
    return {
        "blocks": kind,
        **scores,
        "mean_ap": statistics.mean(run["model"]["box_ap"] for run in runs),
        "cpu_seconds": statistics.mean(run["cpu_seconds"] for run in runs),
        "peak_gb": max(run["peak_bytes"] for run in runs) / 1e9,
    }
