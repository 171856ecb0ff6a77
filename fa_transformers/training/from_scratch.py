"""Training of a FABert classifier from fresh weights on examples that are arrays of token ids."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, get_scheduler

from ..data.collators import pad_batch
from .arguments import add_training_arguments, check_training_arguments, command_line
from .checkpointing import TrainingState
from .loop import plan_steps, run_training
from .setup import build_loaders, group_parameters

# What the scripts have in common; each has its own table of what is tuned.
TRAINING_DEFAULTS = dict(
    per_device_eval_batch_size=32, gradient_accumulation_steps=1, num_train_epochs=1.0, max_steps=-1, max_grad_norm=1.0,
    max_tokens_per_batch=0, lr_scheduler_type="cosine", weight_decay=0.01, warmup_ratio=0.05, warmup_steps=0, seed=0,
    short_epochs=0, short_length=256, eval_steps=0, save_steps=0, save_total_limit=1, early_stopping_patience=0,
    load_best_model_at_end=True, group_by_length=True, num_threads=0, report_to="none", logging_steps=10,
    mixed_precision=None,
)  # fmt: skip
# Flags of finetune.py without a use here: these tasks compare models, all of whose weights are new, by accuracy.
LEAVE_OUT = (
    "packing", "sequence_parallel_size", "head_learning_rate", "metric_for_best_model", "push_to_hub", "hub_model_id",
    "hub_token", "hub_private",
)  # fmt: skip


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


@torch.no_grad()
def score_classifier(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Accuracy and mean loss over all examples of a prepared loader, each counted once, equal on every process."""
    was_training = model.training
    model.eval()
    rows: list[tuple[bool, float]] = []
    for batch in loader:
        output = model(**batch)
        losses = torch.nn.functional.cross_entropy(output.logits.float(), batch["labels"], reduction="none")
        right = output.logits.argmax(dim=1) == batch["labels"]
        # Rows as objects: batches differ in size between processes, which tensors could not be gathered in.
        rows += accelerator.gather_for_metrics(
            list(zip(right.tolist(), losses.tolist(), strict=True)), use_gather_object=True
        )
    model.train(was_training)
    accuracy, loss = np.array(rows, dtype=np.float64).mean(axis=0)
    return {"accuracy": float(accuracy), "loss": float(loss)}


def build_optimizer(args: argparse.Namespace, model: PreTrainedModel, max_steps: int) -> tuple[Optimizer, LRScheduler]:
    """AdamW with one rate for all weights, and the schedule that the flags name."""
    groups = group_parameters(model, args.learning_rate, args.learning_rate, args.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    num_warmup_steps = args.warmup_steps or int(args.warmup_ratio * max_steps)
    return optimizer, get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps, max_steps)


def train_classifier(
    args: argparse.Namespace,
    model: PreTrainedModel,
    examples: dict[str, Dataset],
    accelerator: Accelerator,
    output_dir: Path,
    collate: Callable = pad_batch,
) -> tuple[torch.nn.Module, TrainingState, dict[str, DataLoader]]:
    """Train on "train", score "validation" on the way; returns the prepared model, the run's state and the loaders.

    `args` has the flags of `arguments.add_training_arguments`, `use_cpu`, and `resume_command`.
    """
    loaders, sampler = build_loaders(args, examples, collate, accelerator)
    accelerator.print(
        f"{model.num_parameters():,} parameters; {accelerator.num_processes} processes on {accelerator.device}; "
        f"{len(examples['train']):,} examples, {len(loaders['train']):,} batches an epoch"  # type: ignore[arg-type]
    )
    steps = plan_steps(args, sampler, output_dir)
    model, state, _ = run_training(
        args,
        model,
        *build_optimizer(args, model, steps),
        loaders["train"],
        sampler,
        accelerator,
        evaluate=lambda trained: score_classifier(trained, loaders["validation"], accelerator),
        best_metric="accuracy",
        max_steps=steps,
        output_dir=output_dir,
    )
    return model, state, loaders


def parse_flags(
    parser: argparse.ArgumentParser,
    script: str,
    defaults: dict,
    argv: Sequence[str] | None = None,
    leave_out: Collection[str] = (),
) -> argparse.Namespace:
    """The flags of a script that trains from scratch: the parser's own, those of training, and the command."""
    add_training_arguments(parser, leave_out={*LEAVE_OUT, *leave_out})
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU even if there is a GPU")
    parser.set_defaults(**TRAINING_DEFAULTS | defaults)
    flags = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(flags)
    try:
        check_training_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    args.command = command_line(script, flags)
    args.resume_command = args.command.replace(" --overwrite_output_dir", "") + " --resume_from_checkpoint last"
    return args
