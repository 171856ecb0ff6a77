"""The plan of a run: what `--dry_run` tells of data, lengths, memory, time and files, without training or writing."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from torch.utils.data import DataLoader

from ..data.batching import BatchSource, LengthGroupedBatchSampler
from ..options import LoopOptions
from .checkpointing import why_refused

QUANTILES = (0.0, 0.5, 0.9, 1.0)
TIMED_BATCHES = 3
LONGEST_TIMING_S = 60.0
"""Seconds after which no other batch is timed."""


@dataclass(frozen=True)
class RunPlan:
    """The course of a run, found out without training; `print` shows it.

    Args:
        data: a table of the splits, with the rows of each class where labels are classes.
        lengths: of the training examples, in tokens, patches or pixels: {quantile: length}; empty for a stream.
        share_at_limit: fraction of them that fill the limit, which what is longer is cut to; None without one.
        num_parameters: of the model, adapters among them.
        num_trained: those of them that train.
        steps: optimiser steps.
        largest_batch: examples in the largest batch, and the length that they are padded to.
        memory: a sentence on the estimated peak; None where no formula is known.
        seconds: estimated for all forward and backward passes; None where they were not timed.
        timed_batches: on how many batches that rests.
        transfer_seconds: estimated for those of an attention transfer before; None without one, or where not timed.
        output_dir: folder that would be written.
        refusal: why the run would refuse this folder; None where it would not.
        written_mib: files of the finished model, and those of its largest number of checkpoints, that of an
            attention transfer among them, in MiB.
    """

    data: str
    lengths: Mapping[float, int]
    share_at_limit: float | None
    num_parameters: int
    num_trained: int
    steps: int
    largest_batch: tuple[int, int]
    memory: str | None
    seconds: float | None
    timed_batches: int
    transfer_seconds: float | None
    output_dir: Path
    refusal: str | None
    written_mib: tuple[float, float]

    def __str__(self) -> str:
        return (
            f"{self.data}\n\n{self.describe_course()}\n{describe_end(self.output_dir, self.written_mib, self.refusal)}"
        )

    def describe_course(self) -> str:
        """Return lines on lengths, model, steps, memory and time."""
        lines = []
        if max(self.lengths.values(), default=0) > 1:
            names = {0.0: "shortest", 0.5: "median", 1.0: "longest"}
            told = ", ".join(f"{names.get(q, f'{q:.0%} up to')} {value:,}" for q, value in self.lengths.items())
            share = self.share_at_limit
            cut = f"; {share:.1%} fill the limit, to which longer ones are cut" if share else ""
            lines.append(f"lengths of training examples: {told}{cut}")
        examples, length = self.largest_batch
        lines.append(f"model: {self.num_parameters:,} parameters, {self.num_trained:,} of them train")
        of_length = f" of length {length:,}" if length > 1 else ""  # of 1 are pictures that keep their own sizes
        lines.append(f"steps: {self.steps:,}; the largest batch has {examples:,} examples{of_length}")
        if self.memory is not None:
            lines.append(self.memory)
        if self.transfer_seconds is not None:
            lines.append(f"time: about {describe_seconds(self.transfer_seconds)} for the attention transfer before")
        if self.seconds is not None:
            lines.append(
                f"time: about {describe_seconds(self.seconds)} for all steps, from forward and backward passes of "
                f"{self.timed_batches} batches; evaluation, checkpoints and the optimiser come on top"
            )
        return "\n".join(lines)


def make_plan(
    loop: LoopOptions,
    model: nn.Module,
    examples: Mapping[str, Any],
    collate: Callable,
    loader: DataLoader,
    sampler: BatchSource,
    accelerator: Accelerator,
    *,
    steps: int,
    data: str,
    memory: str | None = None,
    limit: int | None = None,
    transfer: tuple[float | None, float] = (None, 0.0),
    num_added: int = 0,
) -> RunPlan:
    """Time a few batches of a run that was set up, and tell its plan. The model's weights stay as they are.

    Args:
        examples, collate, loader, sampler: of the training split, as `run_training` takes them.
        steps: optimiser steps of the run.
        data: what the plan says of the splits.
        memory: what the plan says of memory.
        limit: length in tokens that documents are cut to; None where nothing is cut.
        transfer: seconds of the attention transfer before, and MiB of its checkpoint, as `time_transfer` gives them.
        num_added: parameters that are written beside the model and the checkpoints.
    """
    lengths = np.asarray(getattr(examples["train"], "lengths", ()))
    is_cut = limit is not None and len(lengths) > 0
    num_parameters = sum(weight.numel() for weight in model.parameters())
    num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    seconds, timed = estimate_seconds(loop, model, examples["train"], collate, loader, sampler, accelerator, steps)
    transfer_seconds, transfer_mib = transfer
    return RunPlan(
        data=data,
        lengths={q: int(np.quantile(lengths, q, method="higher")) for q in QUANTILES} if len(lengths) else {},
        share_at_limit=float((lengths >= limit).mean()) if is_cut else None,
        num_parameters=num_parameters,
        num_trained=num_trained,
        steps=steps,
        largest_batch=sampler.largest_batch() if hasattr(sampler, "largest_batch") else (0, 0),
        memory=memory,
        seconds=seconds,
        timed_batches=timed,
        transfer_seconds=transfer_seconds,
        output_dir=loop.output_dir,
        refusal=why_refused(
            loop.output_dir, overwrite=loop.overwrite_output_dir, resume=loop.resume_from_checkpoint is not None
        ),
        # The newest, the best and the one that is being written.
        written_mib=(
            4 * (num_parameters + num_added) / 2**20,
            checkpoint_mib(model) * ((2 + loop.save_total_limit) if loop.save_total_limit else math.nan) + transfer_mib,
        ),
    )


def checkpoint_mib(model: nn.Module) -> float:
    """Return the size of a checkpoint in float32, in MiB; AdamW keeps two numbers for each weight that trains."""
    return sum(4 * weight.numel() * (3 if weight.requires_grad else 1) for weight in model.parameters()) / 2**20


def describe_end(output_dir: Path, written_mib: tuple[float, float], refusal: str | None) -> str:
    """Return lines on the files of a run that was planned, and on what stands in its way."""
    model, checkpoints = written_mib
    several = "checkpoints" if math.isnan(checkpoints) else f"up to {checkpoints:,.0f} MiB of checkpoints"
    refused = f", and the run itself would be refused: {refusal}" if refusal else ""
    return (
        f"files: {output_dir} would get {model:,.0f} MiB of model and {several}\n"
        f"dry run: nothing was trained or written{refused}"
    )


def describe_seconds(seconds: float) -> str:
    """Return a duration in the unit that fits it: "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def mean_size(sampler: LengthGroupedBatchSampler, num_batches: int) -> float:
    """Return the mean padded tokens of a process's first `num_batches` batches, the short epochs among them."""
    full = _sizes(sampler, sampler.short_epochs).mean()
    if not sampler.short_epochs:
        return float(full)
    short = _sizes(sampler, 0)
    share = min(1.0, sampler.short_epochs * (len(short) // sampler.num_processes) / num_batches)
    return float(share * short.mean() + (1 - share) * full)


def estimate_seconds(
    loop: LoopOptions,
    model: nn.Module,
    train: Any,
    collate: Callable,
    loader: DataLoader,
    sampler: BatchSource,
    accelerator: Accelerator,
    steps: int,
) -> tuple[float | None, int]:
    """Estimate the seconds of all forward and backward passes of a process, and the number of batches it rests on.

    None and 0 where a model can't run before training begins, under DeepSpeed and with shared sequences.
    """
    # DeepSpeed runs no model without its optimiser, and shared sequences need the context of the training loop.
    if accelerator.distributed_type == DistributedType.DEEPSPEED or loop.sequence_parallel_size > 1:
        return None, 0
    num_batches = steps * loop.gradient_accumulation_steps
    batches: Iterator[tuple[int, Any]]
    if isinstance(sampler, LengthGroupedBatchSampler):
        batches = _batches_to_time(train, collate, sampler, accelerator)
        size = mean_size(sampler, num_batches)
    else:  # whose batches are of one size, near enough
        stream = sampler.epoch_batches(loader, 0)
        batches, size = zip(itertools.repeat(1, 1 + TIMED_BATCHES), stream, strict=False), 1.0
    trained = accelerator.prepare(model).train()
    rates: list[float] = []
    started = begun = time.perf_counter()
    for number, (batch_size, batch) in enumerate(batches):
        accelerator.backward(trained(**batch).loss)
        trained.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        now = time.perf_counter()
        if number:  # the first one warms up
            rates.append((now - begun) / batch_size)
        begun = now
        if rates and now - started > LONGEST_TIMING_S:
            break
    # What was prepared would stay in memory with all that it holds, such as a teacher, and DDP's hooks on the weights
    # would take part in what is trained or timed next.
    accelerator.free_memory()
    return (num_batches * size * float(np.mean(rates)) if rates else None), len(rates)


def _batches_to_time(
    train: Any, collate: Callable, sampler: LengthGroupedBatchSampler, accelerator: Accelerator
) -> Iterator[tuple[int, Any]]:
    """Yield batches of a full epoch with their size in padded tokens, the smallest first, as a warm-up."""
    epoch = sampler.short_epochs
    sizes = _sizes(sampler, epoch)
    order = np.argsort(sizes)
    middle = [order[round(q * (len(order) - 1))] for q in np.linspace(0, 1, TIMED_BATCHES + 2)[1:-1]]
    for index in [order[0], *middle]:
        examples = [train[each] for each in sampler.batches(epoch)[index]]
        yield int(sizes[index]), send_to_device(collate(examples), accelerator.device)


def _sizes(sampler: LengthGroupedBatchSampler, epoch: int) -> np.ndarray:
    """Return the padded tokens of each batch of an epoch."""
    lengths = sampler.lengths_in(epoch)
    sizes = [
        lengths[batch].sum() if sampler.packing else len(batch) * lengths[batch].max()
        for batch in sampler.batches(epoch)
    ]
    return np.asarray(sizes)
