"""The options of a distillation, all resolved, and its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..options import CardOptions, DataOptions, DistillationOptions, LoopOptions, ModelOptions
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
    """

    similarity: dict[str, dict[str, dict[str, float]]]
    downstream: dict[str, Any] | None
    stages: list[dict[str, Any]]
    receipt: dict[str, Any]
    output_dir: Path
    model: PreTrainedModel
    processor: Any
