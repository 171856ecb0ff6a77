"""The options of a distillation, all resolved, its plan and its result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..options import CardOptions, DataOptions, DistillationOptions, LoopOptions, ModelOptions
from ..training.plan import RunPlan, describe_end, describe_seconds
from .recipes import STAGES, Task


@dataclass(frozen=True)
class DistillationJob:
    """A distillation as it was asked for, every option resolved.

    `command` repeats it, for the receipt and the card; `resume_command` goes on with it after a stop.
    """

    task: Task
    data: DataOptions
    model: ModelOptions
    loop: LoopOptions
    distillation: DistillationOptions
    card: CardOptions
    command: str
    resume_command: str

    @property
    def is_text(self) -> bool:
        return self.task == "text"

    @property
    def is_detection(self) -> bool:
        """True for detectors, whose encoder alone is distilled, on images of any size."""
        return self.task == "object-detection"

    @property
    def teacher(self) -> str:
        """Name of the teacher's checkpoint: the student's own, unless another one was named."""
        return self.distillation.teacher_name_or_path or self.model.model_name_or_path

    @property
    def steps(self) -> dict[str, int]:
        """Optimiser steps of every stage by its name, 0 where it is left out."""
        return {name: getattr(self.distillation, f"{name}_steps") for name in STAGES}


@dataclass(frozen=True)
class DistillationPlan:
    """The course of a distillation, found out without training; `print` shows it.

    Args:
        data: a table of the rows and pieces to train on and of the held-out pieces, and what is probed with.
        stages: name of each stage that has steps -> its plan.
    """

    data: str
    stages: Mapping[str, RunPlan]

    @property
    def seconds(self) -> float | None:
        """Seconds of all forward and backward passes together; None where they were not timed."""
        each = [plan.seconds for plan in self.stages.values()]
        known = [seconds for seconds in each if seconds is not None]
        return sum(known) if len(known) == len(each) else None

    def __str__(self) -> str:
        parts = [self.data, *(f"{name}:\n{plan.describe_course()}" for name, plan in self.stages.items())]
        first, *_ = self.stages.values()
        checkpoints = sum(plan.written_mib[1] for plan in self.stages.values())
        end = describe_end(first.output_dir, (first.written_mib[0], checkpoints), first.refusal)
        total = f"time of all stages: about {describe_seconds(self.seconds)}\n" if self.seconds is not None else ""
        return "\n\n".join([*parts, total + end])


@dataclass(frozen=True)
class DistillationResult:
    """A distilled model, how near it came to its teacher, and where it was written.

    Args:
        similarity: {kind of held-out data: {"before": figures, "after": figures}}, the figures as
            `embeddings.similarity` gives them: cosines of student and teacher, and the correlation of their pairs.
        downstream: accuracy of logistic regression on the embeddings of "teacher" and student, "before" and "after",
            beside the "majority" class; None where there was nothing labelled to probe with.
        stages: one dictionary for each stage that had steps: its name, figures of the run, learning rates, and the loss
            and the error of every layer "before" and "after".
        receipt: the content of `recovery.json`: all of these, the hardware and the command; empty on other processes
            than the main one.
        output_dir: the published folder, which `AutoModel.from_pretrained` loads.
        model: the student, in float32 on the device that it was trained on.
        processor: its tokenizer or image processor.
        plan: what a dry run found, which has none of these figures; None of any other.
    """

    similarity: dict[str, dict[str, dict[str, float]]]
    downstream: dict[str, Any] | None
    stages: list[dict[str, Any]]
    receipt: dict[str, Any]
    output_dir: Path
    model: PreTrainedModel
    processor: Any
    plan: DistillationPlan | None = None
