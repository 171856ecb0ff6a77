"""Training of a FABert classifier from fresh weights on examples that are arrays of token ids, and what it leaves."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..data.collators import pad_batch
from ..evaluation import evaluating
from ..files import write_json
from ..hub.folder_lock import unlock_folder
from ..hub.timing import describe_hardware
from ..options import LoopOptions
from ..training.checkpointing import TrainingState, choose_resume, prepare_output_dir
from ..training.data_digests import digest_examples, digest_once
from ..training.loaders import build_loaders
from ..training.loop import plan_steps, run_training
from ..training.optimizer import build_optimizer, group_parameters
from ..training.report import describe_run
from ..training.setup import describe_processes, make_accelerator, start_trackers

LOOP_GROUPS = ("batches", "epochs", "optimizer", "device", "checkpoints")
"""Groups of `LoopOptions` that a study from scratch is told."""

RECIPE: dict[str, Any] = dict(
    per_device_eval_batch_size=32, gradient_accumulation_steps=1, num_train_epochs=1.0, max_steps=-1, max_grad_norm=1.0,
    max_tokens_per_batch=0, lr_scheduler_type="cosine", weight_decay=0.01, warmup_ratio=0.05, warmup_steps=0, seed=0,
    short_epochs=0, short_length=256, eval_steps=0, save_steps=0, save_total_limit=1, early_stopping_patience=0,
    load_best_model_at_end=True, group_by_length=True, num_threads=0, report_to="none", logging_steps=10,
    mixed_precision=None,
)  # fmt: skip
"""Values of unset options that these studies share; each has its own table of what is tuned."""

Loaded = TypeVar("Loaded")


class ArrayExamples(Dataset):
    """Examples of a split: token ids from 1 on, of any length each, and their classes. `first_token` is put first."""

    def __init__(self, sequences: Sequence[np.ndarray], labels: Sequence[int], first_token: int):
        self._sequences, self._labels, self._first_token = sequences, labels, first_token
        self.lengths = [1 + len(tokens) for tokens in sequences]

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict:
        tokens = np.concatenate(([self._first_token], self._sequences[index]))
        return {"input_ids": tokens, "label": int(self._labels[index])}


def score_classifier(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Return accuracy and mean loss over all examples of a prepared loader, each counted once, on every process."""
    rows: list[tuple[bool, float]] = []
    with evaluating(model):
        for batch in loader:
            output = model(**batch)
            losses = torch.nn.functional.cross_entropy(output.logits.float(), batch["labels"], reduction="none")
            right = output.logits.argmax(dim=1) == batch["labels"]
            # Rows as objects: batches differ in size between processes, which tensors could not be gathered in.
            rows += accelerator.gather_for_metrics(
                list(zip(right.tolist(), losses.tolist(), strict=True)), use_gather_object=True
            )
    accuracy, loss = np.array(rows, dtype=np.float64).mean(axis=0)
    return {"accuracy": float(accuracy), "loss": float(loss)}


def start_study(
    loop: LoopOptions, name: str, load: Callable[[], Loaded], config: dict[str, Any]
) -> tuple[Accelerator, LoopOptions, Loaded]:
    """Make the accelerator, read the data, and prepare the output folder and the trackers.

    Args:
        loop: the run's options, resolved.
        name: the run's name for trackers, which get `config` as well.
        load: reads or makes the data; the main process calls it first.

    Returns:
        The accelerator, the options with the checkpoint that is gone on from, and what `load` returned.
    """
    accelerator = make_accelerator(loop)
    loop = replace(loop, resume_from_checkpoint=choose_resume(loop.resume_from_checkpoint, loop.output_dir))
    set_seed(loop.seed)
    with accelerator.main_process_first():
        data = load()
        if accelerator.is_main_process:
            is_resumed = loop.resume_from_checkpoint is not None
            prepare_output_dir(loop.output_dir, overwrite=loop.overwrite_output_dir, resume=is_resumed)
    start_trackers(accelerator, loop.report_to, name, config)
    return accelerator, loop, data


def train_classifier(
    loop: LoopOptions,
    model: PreTrainedModel,
    examples: dict[str, Dataset],
    accelerator: Accelerator,
    resume_command: str = "",
    collate: Callable = pad_batch,
) -> tuple[torch.nn.Module, TrainingState, dict[str, DataLoader]]:
    """Train on "train" with one rate for all weights, and score "validation" on the way.

    Returns:
        The prepared model, the run's state, and the loaders by split.
    """
    loaders, sampler = build_loaders(loop, examples, collate, accelerator)
    accelerator.print(
        f"{model.num_parameters():,} parameters; {describe_processes(accelerator, loop.num_threads)}; {sampler.extent}"
    )
    steps = plan_steps(loop, sampler, loop.output_dir)
    groups = group_parameters(model, loop.learning_rate, loop.learning_rate, loop.weight_decay)
    trained, state, _ = run_training(
        loop,
        model,
        *build_optimizer(groups, loop, steps),
        loaders["train"],
        sampler,
        accelerator,
        evaluate=lambda trained: score_classifier(trained, loaders["validation"], accelerator),
        best_metric="accuracy",
        max_steps=steps,
        output_dir=loop.output_dir,
        data_digests=digest_once(accelerator, lambda: digest_examples(examples)),
        resume_command=resume_command,
    )
    return trained, state, loaders


def finish_study(
    loop: LoopOptions,
    results: dict[str, Any],
    state: TrainingState,
    accelerator: Accelerator,
    command: str,
) -> dict[str, Any]:
    """Return `results` with the figures of the run, which the main process writes to results.json and prints as JSON.

    This ends the process group: nothing can be gathered afterwards.
    """
    results = results | {
        **describe_run(state),
        "hardware": describe_hardware(accelerator.device),
        "seed": loop.seed,
        "command": command,
    }
    accelerator.end_training()  # and with it the process group: the other processes may end before the main one
    if accelerator.is_main_process:
        write_json(loop.output_dir / "results.json", results)
        print(json.dumps(results))
        unlock_folder(loop.output_dir)
    return results
