"""Checks of a distillation's options: by themselves, beside an earlier run, and beside the two models."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from ..checks import check_not_negative, check_positive, check_run
from ..data.pieces import SHORTEST_PIECE
from ..options import DataOptions
from ..training.checkpointing import CheckpointError, list_checkpoints, step_of
from .job import DistillationJob
from .recipes import GROUPS, STAGES


def check_unused(options: Any, recipe: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that was given and that distillation does not read.

    `options` is one of the options objects, and `recipe` may have filled it. The command line knows no flags of these.
    """
    groups = next(groups for options_class, groups, _ in GROUPS if isinstance(options, options_class))
    for part in fields(options):
        allowed = (part.default, recipe.get(part.name, part.default))
        if part.metadata["group"] not in groups and getattr(options, part.name) not in allowed:
            raise ValueError(f"`{part.name}` of {type(options).__name__} has no use in distillation; leave it out.")


def check_options(job: DistillationJob) -> None:
    """Raise ValueError, naming the flag, for values that no distillation can use."""
    model, loop, distillation = job.model, job.loop, job.distillation
    check_run(job.data, model, loop, job.card, is_text=job.is_text)
    if model.model_name_or_path == "none":
        raise ValueError("--model_name_or_path none has no teacher; give a checkpoint.")
    if job.is_detection:
        _check_detection(job)
    size = "max_length" if job.is_text else "image_size"
    if getattr(model, size) is None and not job.is_detection:
        raise ValueError(f"--{size} has no value, and --task {job.task} needs one; leave it out for the recipe's.")
    if loop.resume_from_checkpoint not in (None, "last", "auto"):
        raise ValueError("--resume_from_checkpoint must be 'last' or 'auto': every stage has a folder of its own.")
    check_not_negative(distillation, *(f"{name}_steps" for name in STAGES))
    check_positive(distillation, "transfer_learning_rate", "mixer_learning_rate")
    if not sum(job.steps.values()):
        raise ValueError("--transfer_steps, --end_to_end_steps and --long_steps are all 0: there is nothing to train.")
    if job.is_text and model.max_length < SHORTEST_PIECE:
        raise ValueError(f"--max_length must be at least {SHORTEST_PIECE} tokens, got {model.max_length}.")
    unread = "probe_folder" if job.is_text else "probe_file"
    if getattr(distillation, unread):
        raise ValueError(f"--{unread} is not for --task {job.task}.")
    length = distillation.long_length
    if distillation.long_steps and not length:
        raise ValueError("--long_steps needs a --long_length.")
    if length and (not job.is_text or length <= model.max_length):
        raise ValueError(f"--long_length {length} is for text, and must be above --max_length.")


def _check_detection(job: DistillationJob) -> None:
    if job.model.model_name_or_path is None:
        raise ValueError("--task object-detection needs a --model_name_or_path: no detector comes with the package.")
    if job.model.image_size is not None:
        raise ValueError(
            f"--image_size {job.model.image_size}: images of --task object-detection have the size that the "
            "checkpoint's image processor gives them; leave it out."
        )
    if job.model.square:
        raise ValueError(
            "--square is not for --task object-detection, whose images have their own shape; leave it out."
        )
    if job.distillation.probe_folder:
        raise ValueError("--probe_folder is not for --task object-detection, whose encoder has no embedding.")


def check_rows(rows: Any, data: DataOptions) -> None:
    """Raise ValueError where rows were given in Python and the options name a source of data, too."""
    if rows is not None and data.sources:
        raise ValueError(f"rows and --{data.sources[0]} are two sources of data; give one.")


def check_lengths(job: DistillationJob, teacher: PretrainedConfig, student: PretrainedConfig) -> None:
    """Raise ValueError, naming the flag, for texts longer than the models have positions; takes their configs."""
    if job.is_text and teacher.position_embedding_type == "absolute":
        longest = teacher.max_position_embeddings
        if job.model.max_length > longest:
            raise ValueError(
                f"--max_length {job.model.max_length} is above the teacher's {longest} positions. The student learns "
                "longer documents by --long_steps and --long_length, for which the teacher reads windows."
            )
    length = job.distillation.long_length
    if length and student.position_embedding_type == "absolute":
        longest = student.max_position_embeddings
        if length > longest:
            raise ValueError(
                f"--long_length {length} is above the student's {longest} positions: convert it with more, or with "
                "--position_embedding_type periodic."
            )


def check_resumed(job: DistillationJob) -> None:
    """Check that an interrupted run can go on with these options.

    Raises:
        CheckpointError: "last" was asked for, and no stage has a checkpoint.
        ValueError: a stage has had other steps than it is to have, and later ones have begun from its end.
    """
    loop = job.loop
    found = {name: list_checkpoints(loop.output_dir / name) for name in STAGES}
    if loop.resume_from_checkpoint == "last" and not any(found.values()):
        raise CheckpointError(f"--resume_from_checkpoint last: no stage in {loop.output_dir} has a checkpoint.")
    if loop.resume_from_checkpoint is None or loop.early_stopping_patience:
        return
    for position, (name, planned) in enumerate(job.steps.items()):
        has_later = any(found[later] for later in STAGES[position + 1 :])
        damaged = (loop.output_dir / name).glob("damaged-checkpoint-*")  # set aside, it tells how far the stage went
        done = max(map(step_of, [*found[name], *damaged]), default=planned)
        if has_later and done != planned:
            raise ValueError(
                f"--{name}_steps {planned}: the run in {loop.output_dir} went on to its next stage after {done}. Give "
                "the same number, or another --output_dir."
            )
