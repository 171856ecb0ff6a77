"""Distillation of a converted model from its softmax teacher: data in, a recovered model in a folder out."""

import json
from dataclasses import fields, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from ..conversion.folder import sentence_transformers_files
from ..conversion.source import CheckpointSource, read_pooling, read_source
from ..data.examples import count_patches
from ..data.facts import DataFacts
from ..hub.publish import publish
from ..options import CardOptions, DataOptions, DistillationOptions, LoopOptions, ModelOptions, flat, resolve
from ..training.checkpointing import choose_resume, prepare_output_dir
from ..training.setup import make_accelerator, start_trackers
from .card_facts import build_facts
from .checks import check_lengths, check_options, check_resumed, check_rows, check_unused
from .comparison import Comparison
from .job import DistillationJob, DistillationResult
from .pieces import UnlabelledData, build_image_pieces, build_text_pieces
from .probing import LabelledPieces, load_labelled_images, load_labelled_licenses, load_labelled_text
from .receipt import RECEIPT_FILE, build_receipt
from .recipes import Recipe, Task, recipe_of
from .stages import run_stages
from .student import build_student, load_teacher
from .unlabelled import Rows, read_images, read_text


def distill(
    rows: Rows | None = None,
    *,
    task: Task = "text",
    recipe: Recipe = "quick",
    data: DataOptions | None = None,
    model: ModelOptions | None = None,
    loop: LoopOptions | None = None,
    distillation: DistillationOptions | None = None,
    card: CardOptions | None = None,
    command: str | None = None,
    resume_command: str | None = None,
) -> DistillationResult:
    """Let a converted model learn from the softmax model that its weights came from, and write a folder to publish.

    Options that are left out take the recipe's values (`distillation.recipes`). Under a launcher every process calls
    this with the same arguments.

    Args:
        rows: data given in Python: a list of texts, a mapping of columns such as {"text": [...]}, a Dataset, or a
            DatasetDict with the split "train"; for the task "images" images likewise. None reads what `data` names, or
            else prose of installed Python packages. Two per cent are held out where there is no split "validation".
        task: what the model reads, "text" or "images".
        recipe: how long to train, "quick" or "full".
        data: files or data sets to read, and the columns in them.
        model: the student's checkpoint, stock or converted; lengths and sizes; fields of its config.
        loop: batches, optimiser, evaluation, checkpoints and `output_dir`.
        distillation: the teacher, the steps of the stages, and what to compare.
        card: licence and names.
        command: how the run is repeated, for the card; None describes this call.
        resume_command: what is printed after a stop by signal; None describes this call.

    Raises:
        ValueError: an option can't be used, has no use here, or contradicts another one or the checkpoint.
        DataError: a row, file or column can't be used, or there is too little data.
        CheckpointError: there is nothing to resume, or a checkpoint is damaged.
        FileExistsError: `output_dir` holds an earlier run and neither overwriting nor resuming was asked for.
    """
    job = _resolve(
        task,
        recipe,
        (
            data or DataOptions(),
            model or ModelOptions(),
            loop or LoopOptions(),
            distillation or DistillationOptions(),
            card or CardOptions(),
        ),
    )
    return DistillationResult()


