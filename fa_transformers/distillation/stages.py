"""The stages of a distillation, each of them one objective that is trained for steps of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..options import LoopOptions
from ..tables import counted
from ..training.attention_transfer import AttentionTransfer, evaluate_objective
from ..training.checkpointing import list_checkpoints
from ..training.data_digests import digest_contents, digest_once, digest_weights
from ..training.loaders import build_loaders
from ..training.loop import plan_steps, run_training
from ..training.optimizer import build_optimizer, group_by_rates
from ..training.report import describe_run
from ..training.setup import log_after
from .detectors import DetectorDistillation
from .job import DistillationJob
from .objectives import EndToEndDistillation
from .pieces import Pieces, UnlabelledData
from .recipes import STAGES


@dataclass(frozen=True)
class Stage:
    """One stage to train.

    Args:
        name: one of `recipes.STAGES`.
        objective: what is trained, a module of `objectives`.
        pieces: those to train on ("train") and those to measure errors on ("validation").
        loop: the options of the run, with the stage's own `max_steps` and `max_tokens_per_batch`.
        mixer_learning_rate: peak rate of the mixers; the other weights' is `loop.learning_rate`.
    """

    name: str
    objective: nn.Module
    pieces: dict[str, Pieces]
    loop: LoopOptions
    mixer_learning_rate: float


def run_stages(
    job: DistillationJob,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: UnlabelledData,
    pooling: str,
    accelerator: Accelerator,
) -> list[dict[str, Any]]:
    """Train all stages that have steps, in order, and return what the receipt says of each."""
    digests = digest_once(accelerator, lambda: digest_sources(data, teacher))
    return [
        run_stage(job, stage, data.collate, accelerator, digests)
        for stage in build_stages(job, student, teacher, data, pooling)
    ]


def build_stages(
    job: DistillationJob, student: PreTrainedModel, teacher: PreTrainedModel, data: UnlabelledData, pooling: str
) -> Iterator[Stage]:
    """Yield the stages that have steps, in order; the student is set up for each one when that is asked for."""
    options, loop, max_length = job.distillation, job.loop, job.model.max_length
    pieces = {"train": data.train(max_length), "validation": data.validation}

    def build(name: str, objective: nn.Module, pieces: dict[str, Pieces], mixer_rate: float, **changes: Any) -> Stage:
        return Stage(name, objective, pieces, replace(loop, max_steps=job.steps[name], **changes), mixer_rate)

    if options.transfer_steps:
        yield build("transfer", AttentionTransfer(student, teacher), pieces, options.transfer_learning_rate)
    student.requires_grad_(True)
    if options.freeze_embeddings and not job.is_detection:
        student.get_input_embeddings().requires_grad_(False)
    if options.end_to_end_steps:
        objective: nn.Module = (
            DetectorDistillation(student, teacher)
            if job.is_detection
            else EndToEndDistillation(student, teacher, pooling)
        )
        yield build("end_to_end", objective, pieces, options.mixer_learning_rate)
    if options.long_steps:
        pieces = {"train": data.train(options.long_length), "validation": data.validation}
        objective = EndToEndDistillation(student, teacher, pooling, teacher_length=max_length)
        budget = loop.max_tokens_per_batch and max(loop.max_tokens_per_batch, options.long_length)
        yield build("long", objective, pieces, options.mixer_learning_rate, max_tokens_per_batch=budget)


def run_stage(
    job: DistillationJob,
    stage: Stage,
    collate: Callable[[list[dict]], dict],
    accelerator: Accelerator,
    data_digests: dict[str, str],
) -> dict[str, Any]:
    """Train one stage to its end, or go on with it, and return what the receipt says of it."""
    name, folder = stage.name, job.loop.output_dir / stage.name
    folder.mkdir(exist_ok=True)
    steps_before = sum(job.steps[earlier] for earlier in STAGES[: STAGES.index(name)])
    resume = "last" if job.loop.resume_from_checkpoint and list_checkpoints(folder) else None
    loop = replace(stage.loop, resume_from_checkpoint=resume)
    loaders, sampler = build_loaders(loop, stage.pieces, collate, accelerator)
    accelerator.print(f"{name}: {counted(len(stage.pieces['train']), 'piece')}, {counted(loop.max_steps, 'step')}")

    def evaluate(objective: nn.Module) -> dict:
        return evaluate_objective(objective, loaders["validation"], accelerator)

    before = evaluate(stage.objective.to(accelerator.device))
    rates = {"learning_rate": loop.learning_rate, "mixer_learning_rate": stage.mixer_learning_rate}
    groups = group_student_parameters(stage.objective, **rates, weight_decay=loop.weight_decay)
    steps = plan_steps(loop, sampler, folder)
    optimizer, scheduler = build_optimizer(groups, loop, steps)
    trained, state, figures = run_training(
        loop, stage.objective, optimizer, scheduler, loaders["train"], sampler, accelerator,
        evaluate=evaluate, best_metric="loss", max_steps=steps, output_dir=folder, data_digests=data_digests,
        log=log_after(steps_before, accelerator, name), resume_command=job.resume_command,
    )  # fmt: skip
    after = evaluate(trained)  # the best weights, which needn't be the last ones
    accelerator.free_memory()
    return {"stage": name, **describe_run(state), **figures, **rates, "before": before, "after": after}


def digest_sources(data: UnlabelledData, teacher: PreTrainedModel) -> dict[str, str]:
    """Return the digests of all that a student learns from: the rows, and the teacher who says what is right."""
    heldout = {f"held-out data ({kind})": part for kind, part in data.rows.heldout.items()}
    digests = digest_contents({"train": data.rows.train, **heldout})
    return digests | {"the weights of the teacher": digest_weights(teacher)}


def group_student_parameters(
    objective: nn.Module, learning_rate: float, mixer_learning_rate: float, weight_decay: float
) -> list[dict]:
    """AdamW parameter groups of an objective: mixers at a rate of their own, without decay; vectors without decay."""

    def rates_of(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        if ".mixer." in name:  # holds departures from the plain operator: decay would pull it back there
            return mixer_learning_rate, 0.0
        return learning_rate, weight_decay if parameter.ndim > 1 else 0.0

    return group_by_rates(objective, rates_of)
