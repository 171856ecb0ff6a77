"""The fitting of one network with dense answers, detector or stereo, and the scores of its best weights."""

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..options import LoopOptions
from ..tables import counted, format_table
from .checkpointing import TrainingState
from .data_digests import digest_once
from .loaders import build_loaders
from .loop import plan_steps, run_training
from .optimizer import build_optimizer, group_by_rates
from .plan import RunPlan, make_plan
from .report import describe_run
from .setup import describe_processes, gather_model


def fit_network(
    loop: LoopOptions,
    model: PreTrainedModel,
    examples: Mapping[str, Any],
    collate: Callable,
    accelerator: Accelerator,
    *,
    evaluate: Callable[[nn.Module, DataLoader, str], dict[str, Any]],
    score_split: str,
    best_metric: str,
    description: str,
    resume_command: str,
    digest: Callable[[], dict[str, str]],
) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Any], TrainingState]:
    """Train a network at one rate, without weight decay on vectors; score its best weights.

    Args:
        examples: of "train", "validation" and `score_split`, each with `lengths`.
        collate: makes a batch of examples.
        evaluate: scores of a model on the loader of a split, with their `loss` and `best_metric`.
        description: what the network has, for the line that is printed first.
        digest: of the data, for a resumed run to compare; read by the main process alone.

    Returns:
        The plain model in evaluation mode, its scores on `score_split`, the figures of the run, and how it ended.
    """
    loaders, sampler = build_loaders(loop, dict(examples), collate, accelerator)
    steps = plan_steps(loop, sampler, loop.output_dir)
    accelerator.print(
        f"{type(model).__name__}: {model.num_parameters():,} parameters, {model.num_parameters(True):,} of them train; "
        f"{description}; "
        f"{describe_processes(accelerator, loop.num_threads)}; {sampler.extent}, {counted(steps, 'step')}"
    )
    groups = group_by_rates(
        model, lambda name, weight: (loop.learning_rate, loop.weight_decay if weight.ndim > 1 else 0.0)
    )
    trained, state, figures = run_training(
        loop,
        model,
        *build_optimizer(groups, loop, steps),
        loaders["train"],
        sampler,
        accelerator,
        evaluate=lambda trained: evaluate(trained, loaders["validation"], "validation"),
        best_metric=best_metric,
        max_steps=steps,
        output_dir=loop.output_dir,
        resume_command=resume_command,
        data_digests=digest_once(accelerator, digest),
    )
    scores = evaluate(trained, loaders[score_split], score_split)
    return gather_model(accelerator, trained).eval(), scores, describe_run(state) | figures, state


def plan_network(
    loop: LoopOptions, model: PreTrainedModel, examples: Mapping[str, Any], collate: Callable, accelerator: Accelerator
) -> RunPlan:
    """Return the plan of what `fit_network` would do with the same arguments."""
    loaders, sampler = build_loaders(loop, dict(examples), collate, accelerator)
    return make_plan(
        loop, model, examples, collate, loaders["train"], sampler, accelerator,
        steps=plan_steps(loop, sampler, loop.output_dir),
        data=format_table([{split: f"{len(part):,}" for split, part in examples.items()}], list(examples)),
    )  # fmt: skip
