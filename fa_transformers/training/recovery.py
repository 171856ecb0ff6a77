"""Attention transfer before fine-tuning, for a checkpoint whose softmax attention was just replaced."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig

from ..conversion.teacher import load_teacher
from ..data.batching import BatchSource
from ..data.collators import TextCollator
from ..data.labelled import LabelledData
from ..data.pieces import TextPieces, cut_into_pieces
from ..files import write_json
from ..hub.card import describe_replacement
from ..models.fa_mixer import FactorizedMixer
from ..options import LoopOptions
from .attention_transfer import AttentionTransfer, evaluate_objective
from .checkpointing import delete_checkpoint, list_checkpoints
from .data_digests import digest_data, digest_once
from .job import Built, FinetuneJob
from .loaders import build_loaders
from .loop import plan_steps, run_training
from .optimizer import build_optimizer, group_by_rates
from .plan import checkpoint_mib, estimate_seconds
from .setup import log_after

FOLDER, FIGURES_FILE = "recovery", "figures.json"
"""Where in `--output_dir` the checkpoints of the transfer lie, and what it came to."""
MAX_VALIDATION_PIECES = 64
SHORTEST_PIECE, LONGEST_PIECE = 3, 512
"""Tokens of a piece, special ones included; a checkpoint may read fewer than the longest."""
TRANSFER: dict[str, Any] = dict(
    learning_rate=1e-2, weight_decay=0.0, lr_scheduler_type="linear", warmup_ratio=0.05, warmup_steps=0,
    per_device_train_batch_size=64, per_device_eval_batch_size=32, max_tokens_per_batch=2048, short_epochs=0,
    packing=False, sequence_parallel_size=1, early_stopping_patience=0,
    load_best_model_at_end=False, group_by_length=True, profile=False,
)  # fmt: skip
"""Options of the transfer's loop; the others are those of the run."""


@dataclass(frozen=True)
class Recovery:
    """The attention transfer of a run.

    Args:
        steps: how many in all; 0 leaves it out.
        resume: "last" where an earlier start was stopped within it.
        is_done: an earlier start finished it.
    """

    steps: int
    resume: str | None = None
    is_done: bool = False


def plan_recovery(job: FinetuneJob, built: Built, data: LabelledData, folder: Path) -> Recovery:
    """Return the attention transfer that a run begins with.

    Args:
        job: the run.
        built: the model with the replaced layers, and the checkpoint that it was made from.
        data: the data to fine-tune on.
        folder: the run's output folder.

    Raises:
        ValueError: the checkpoint is no softmax one, the layers have nothing of their own to train, or the documents
            are read while training.
    """
    steps = job.loop.recovery_steps
    if not steps:
        return Recovery(0)
    if (reason := _why_useless(job, built, data)) is not None:
        raise ValueError(f"--recovery_steps {steps} {reason}.")
    resume = job.loop.resume_from_checkpoint
    if resume is None:
        return Recovery(steps)
    if resume in ("last", "auto") and not list_checkpoints(folder):
        has_begun = bool(list_checkpoints(folder / FOLDER))
        return Recovery(steps, resume="last" if has_begun else None, is_done=not has_begun and resume == "last")
    return Recovery(steps, is_done=True)


def _why_useless(job: FinetuneJob, built: Built, data: LabelledData) -> str | None:
    """Return why an attention transfer has no use, as the end of a sentence; None where it has one."""
    has_parameters = any(
        True for module in built.model.modules() if isinstance(module, FactorizedMixer) for _ in module.parameters()
    )
    reasons = {
        "is for text; images are fine-tuned at once": not job.is_text,
        "is for checkpoints with softmax attention, and this one has none to learn from": not built.mixers_are_new,
        "needs layers with something to train: give --local_window, --local_kernel_size, --key_feature_size or "
        "--learned_temperatures": not has_parameters,
        "needs documents that are there before training; leave out --streaming": data.stream is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def recover(
    job: FinetuneJob,
    recovery: Recovery,
    built: Built,
    data: LabelledData,
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, Any]:
    """Let the model's mixers learn its checkpoint's attention outputs on the documents, and return what it came to.

    The documents are cut into pieces that the checkpoint can read; those of the validation split say how far the layers
    are from it: `error_before` and `error_after` are means over them of `relative_error`, where 1 is what a constant
    reaches. A transfer that an earlier start finished is read from its figures.

    Raises:
        DataError: no document is long enough.
    """
    path = folder / FOLDER / FIGURES_FILE
    if recovery.is_done:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    transfer = _set_up(job, recovery, built, data, accelerator)
    loop, loaders, sampler, objective = transfer.loop, transfer.loaders, transfer.sampler, transfer.objective

    def evaluate(objective: nn.Module) -> dict:
        return evaluate_objective(objective, loaders["validation"], accelerator)

    before = evaluate(objective)
    (folder / FOLDER).mkdir(exist_ok=True)
    steps = plan_steps(loop, sampler, folder / FOLDER)
    groups = group_by_rates(objective, lambda name, parameter: (loop.learning_rate, 0.0))
    trained, state, _ = run_training(
        loop, objective, *build_optimizer(groups, loop, steps), loaders["train"], sampler, accelerator,
        evaluate=evaluate, best_metric="loss", max_steps=steps, output_dir=folder / FOLDER,
        log=log_after(0, accelerator, FOLDER),
        data_digests=digest_once(accelerator, lambda: digest_data(data)), resume_command=job.resume_command,
    )  # fmt: skip
    after = evaluate(trained)
    accelerator.free_memory()
    built.model.requires_grad_(True)
    figures = {
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "tokens": state.tokens,
        "error_before": before["loss"],
        "error_after": after["loss"],
    }
    if accelerator.is_main_process:
        write_json(path, figures)
    accelerator.print(
        f"attention transfer: the layers' error against the checkpoint's went from {before['loss']:.3f} to "
        f"{after['loss']:.3f} in {state.seconds:.0f} s"
    )
    return figures


def forget_transfer(folder: Path) -> None:
    """Delete the checkpoints of a transfer whose weights stand in those of the fine-tuning after it."""
    for checkpoint in list_checkpoints(folder / FOLDER):
        delete_checkpoint(checkpoint)


def time_transfer(
    job: FinetuneJob, recovery: Recovery, built: Built, data: LabelledData, accelerator: Accelerator
) -> tuple[float | None, float]:
    """Return the estimated seconds of what `recover` would do with the same arguments, from a few of its batches, and
    the MiB of the checkpoint that it leaves until the run ends.

    Seconds are None where an earlier start finished it, which leaves nothing new either, or nothing can be timed.

    Raises:
        DataError: no document is long enough.
    """
    if recovery.is_done:
        return None, 0.0
    transfer = _set_up(job, recovery, built, data, accelerator)
    seconds, _ = estimate_seconds(
        transfer.loop, transfer.objective, transfer.pieces["train"], transfer.collate, transfer.loaders["train"],
        transfer.sampler, accelerator, recovery.steps,
    )  # fmt: skip
    mib = checkpoint_mib(transfer.objective)
    built.model.requires_grad_(True)
    return seconds, mib


@dataclass(frozen=True)
class _Transfer:
    """An attention transfer that was set up: its loop's options, pieces, loaders, and what is minimised."""

    loop: LoopOptions
    pieces: dict[str, TextPieces]
    collate: TextCollator
    loaders: dict[str, DataLoader]
    sampler: BatchSource
    objective: AttentionTransfer


def _set_up(
    job: FinetuneJob, recovery: Recovery, built: Built, data: LabelledData, accelerator: Accelerator
) -> _Transfer:
    assert built.source is not None  # else there is nothing to learn from, which `plan_recovery` refuses
    encoder, tokenizer = built.model.base_model, built.processor
    teacher = load_teacher(built.source, "AutoModel", encoder)
    length = min(LONGEST_PIECE, job.model.max_length, _longest_input(teacher.config))
    with accelerator.main_process_first():
        pieces = {
            split: TextPieces(
                cut_into_pieces(data.dataset[split], tokenizer, length, SHORTEST_PIECE), limit, job.loop.seed
            )
            for split, limit in (("train", None), ("validation", MAX_VALIDATION_PIECES))
        }
    loop = replace(
        job.loop, **TRANSFER, max_steps=recovery.steps, eval_steps=recovery.steps, save_steps=recovery.steps,
        resume_from_checkpoint=recovery.resume,
    )  # fmt: skip
    collate = TextCollator(tokenizer)
    loaders, sampler = build_loaders(loop, pieces, collate, accelerator)
    objective = AttentionTransfer(encoder, teacher.to(accelerator.device)).to(accelerator.device)
    return _Transfer(loop, pieces, collate, loaders, sampler, objective)


def describe_exchange(job: FinetuneJob, built: Built, steps: int) -> str:
    """Return two lines on what stands in the place of a checkpoint's softmax attention, and what that costs."""
    assert built.source is not None  # whose attention it is
    name = built.source.name
    if steps:
        cost = (
            f"first {steps:,} steps of attention transfer on your documents (--recovery_steps), so that the new layers "
            f"come nearer to what {name} was trained with; then the fine-tuning begins"
        )
    else:
        needs_window = job.is_text and not built.model.config.local_window
        way = "--local_window 64" if needs_window else "distillation before"
        cost = (
            f"the new layers give something else than {name} was trained with, and fine-tuning has to make up "
            f"for it: {way} makes the difference smaller"
        )
    return f"replaced: {describe_replacement(built.model)}\ncost: {cost}."


def describe_recovery(config: PretrainedConfig, is_stock: bool, steps: int) -> str | None:
    """Return the field `recovery` of a fine-tuned model, from that of the model before."""
    if not is_stock:
        return "fine_tuned" if config.recovery == "pending" else config.recovery
    return "transferred" if steps else "fine_tuned"


def _longest_input(config: PretrainedConfig) -> int:
    """Tokens that a text model reads at once."""
    return config.max_position_embeddings if config.position_embedding_type == "absolute" else LONGEST_PIECE
