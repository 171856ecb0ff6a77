"""The request of a fine-tuning run, and its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..conversion.source import CheckpointSource
from ..options import CardOptions, DataOptions, LoopOptions, ModelOptions
from .checkpointing import TrainingState
from .plan import RunPlan
from .predictions import Predictions
from .recipes import Task


@dataclass(frozen=True)
class FinetuneJob:
    """A fine-tuning run as it was asked for, every option resolved.

    `command` repeats it, for the card; `resume_command` goes on with it after a stop.
    """

    task: Task
    data: DataOptions
    model: ModelOptions
    loop: LoopOptions
    card: CardOptions
    command: str
    resume_command: str

    @property
    def is_text(self) -> bool:
        return self.task == "text-classification"


@dataclass(frozen=True)
class Built:
    """A model to train, its processor, and what follows from the two.

    `num_tokens`: the longest document in tokens, or the patches of a square image; `source`: the checkpoint, None where
    all weights are new; `mixers_are_new`: the checkpoint is a stock one, which has no weights for them.
    """

    model: PreTrainedModel
    processor: Any
    num_tokens: int
    image_size: int | None
    source: CheckpointSource | None = None
    mixers_are_new: bool = False


@dataclass(frozen=True)
class Fitted:
    """One trained model, the checkpoint that it started from (None: fresh weights), and what was measured on it.

    `scored` and `unlabelled` are its answers to the examples of the scored split, and to those without labels; `state`
    is how training ended, with its course.
    """

    model: PreTrainedModel
    processor: Any
    image_size: int | None
    source: CheckpointSource | None
    scores: dict[str, Any]
    run: dict[str, Any]
    state: TrainingState
    scored: Predictions
    unlabelled: Predictions | None = None


@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuned model, its scores, and where it was written.

    Args:
        scores: the model's scores on the test split, or the validation split where there is none, by metric.
        baselines: scores of what needs no training of ours, on the same split, by name.
        summary: what `all_results.json` holds: scores, figures of the run, the command; empty on other processes than
            the main one.
        output_dir: the published folder, which `pipeline(task, output_dir)` loads.
        model: the model, in float32 on the device that it was trained on.
        processor: its tokenizer or image processor.
        pushed: what `push` returned; None where nothing was uploaded.
        plan: what a dry run found, which has no scores; None of any other.
    """

    scores: dict[str, Any]
    baselines: dict[str, dict]
    summary: dict[str, Any]
    output_dir: Path
    model: PreTrainedModel
    processor: Any
    pushed: dict[str, Any] | None = None
    plan: RunPlan | None = None
