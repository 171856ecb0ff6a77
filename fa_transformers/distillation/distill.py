"""Distillation of a converted model from its softmax teacher: data in, a recovered model in a folder out."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedModel

from ..conversion.folder import sentence_transformers_files
from ..conversion.source import CheckpointSource, read_pooling, read_source
from ..conversion.teacher import load_teacher
from ..data.examples import count_patches
from ..hub.card import ModelFacts
from ..hub.folder_lock import released
from ..hub.publish import publish
from ..mistakes import names_arguments
from ..options import CardOptions, DataOptions, DistillationOptions, LoopOptions, ModelOptions, flat, resolve
from ..training.calls import RESUME_CALL, describe_call, fill_options
from ..training.checkpointing import choose_resume, prepare_output_dir
from ..training.setup import make_accelerator, start_trackers
from .card_facts import build_facts
from .checks import check_lengths, check_options, check_resumed, check_rows, check_unused
from .comparison import Comparison
from .job import DistillationJob, DistillationResult
from .pieces import UnlabelledData, build_image_pieces, build_text_pieces
from .plan import plan_stages
from .probing import LabelledPieces, load_labelled_images, load_labelled_licenses, load_labelled_text
from .receipt import RECEIPT_FILE, build_receipt
from .recipes import Recipe, Task, recipe_of
from .stages import run_stages
from .student import build_student
from .unlabelled import Rows, read_images, read_text

OPTIONS = {
    "data": DataOptions,
    "model": ModelOptions,
    "loop": LoopOptions,
    "distillation": DistillationOptions,
    "card": CardOptions,
}
"""Arguments of `distill` that are options objects, with their classes."""


@names_arguments()
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
            DatasetDict with the split "train"; for the other tasks images likewise. None reads what `data` names, or
            else prose of installed Python packages. Two per cent are held out where there is no split "validation".
        task: what the model reads, "text" or "images", or what it finds in them, "object-detection".
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
        TypeError: `rows`, an argument or an option is of the wrong type.
        DataError: a row, file or column can't be used, or there is too little data.
        CheckpointError: there is nothing to resume, or a checkpoint is damaged.
        FileExistsError: `output_dir` holds an earlier run and neither overwriting nor resuming was asked for.
    """
    given = {"data": data, "model": model, "loop": loop, "distillation": distillation, "card": card}
    groups = fill_options(given, OPTIONS)
    call = describe_call("distill", {"task": task, "recipe": recipe}, groups, has_rows=rows is not None)
    job = resolve_job(task, recipe, groups, command or call, resume_command or RESUME_CALL)
    check_options(job)
    check_rows(rows, job.data)
    with released(job.loop.output_dir):
        return _run(job, rows)


def resolve_job(
    task: Task,
    recipe: Recipe,
    groups: Mapping[str, Any],
    command: str = "",
    resume_command: str = "",
) -> DistillationJob:
    """Return the job with the recipe's values where an option was not given.

    Args:
        groups: options objects by the name of `distill`'s argument, all five.

    Raises:
        ValueError: the task or the recipe is unknown, or an option was given that distillation does not read.
    """
    teacher = groups["distillation"].teacher_name_or_path or groups["model"].model_name_or_path or None
    values = recipe_of(task, recipe, teacher)
    for options in groups.values():
        check_unused(options, values)
    return DistillationJob(
        task=task,
        **{name: resolve(options, values) for name, options in groups.items()},
        command=command,
        resume_command=resume_command,
    )


def _run(job: DistillationJob, rows: Rows | None) -> DistillationResult:
    """Read checkpoints and data, train and compare, and on the main process write the folder."""
    teacher_source = read_source(job.teacher)
    pooling = choose_pooling(job, teacher_source)
    accelerator = make_accelerator(job.loop)
    resume = choose_resume(job.loop.resume_from_checkpoint, job.loop.output_dir)
    job = replace(job, loop=replace(job.loop, resume_from_checkpoint=resume))
    check_resumed(job)
    set_seed(job.loop.seed)
    name = job.model.model_name_or_path
    source = teacher_source if name == job.teacher else read_source(name)
    student, auto_class, processor = build_student(
        source, job.task, job.model.config_fields, job.model.image_size, job.model.square
    )
    teacher = load_teacher(teacher_source, auto_class, student)
    check_lengths(job, teacher.config, student.config)
    with accelerator.main_process_first():
        data, labelled = _load_data(job, rows, student, processor)
        if accelerator.is_main_process and not job.loop.dry_run:
            is_resumed = resume is not None
            prepare_output_dir(job.loop.output_dir, overwrite=job.loop.overwrite_output_dir, resume=is_resumed)
    accelerator.wait_for_everyone()
    if job.loop.dry_run:
        plan = plan_stages(job, student.to(accelerator.device), teacher, data, labelled, pooling, accelerator)
        accelerator.end_training()
        plan_shown = plan if accelerator.is_main_process else None
        return DistillationResult({}, None, [], {}, job.loop.output_dir, student, processor, plan_shown)
    config = flat(job.data, job.model, job.loop, job.distillation, job.card) | {"task": job.task, "pooling": pooling}
    start_trackers(accelerator, job.loop.report_to, "distill", config | {"command": job.command})
    comparison = Comparison(job, teacher.to(accelerator.device), data, labelled, pooling, accelerator)
    accuracy, before = comparison.accuracy(student.to(accelerator.device)), comparison.similarity(student)
    stages = run_stages(job, student, teacher, data, pooling, accelerator)
    downstream = comparison.downstream(accuracy, comparison.accuracy(student))
    after = comparison.similarity(student)
    similarity = {kind: {"before": before[kind], "after": after[kind]} for kind in after}
    receipt = build_receipt(job, student, pooling, stages, similarity, downstream)
    student.config.recovery = "distilled"
    accelerator.end_training()  # and with it the process group: the others may end while the main process publishes
    if job.distillation.long_steps:
        processor.model_max_length = job.distillation.long_length
    if accelerator.is_main_process:
        named = data.rows.facts
        if labelled is not None and labelled.facts not in named:
            named = [*named, labelled.facts]
        facts = build_facts(job, student, teacher_source, receipt, named)
        _publish(job, student, processor, source, facts, receipt)
    else:
        receipt = {}
    return DistillationResult(similarity, downstream, stages, receipt, job.loop.output_dir, student, processor)


def choose_pooling(job: DistillationJob, teacher: CheckpointSource) -> str:
    """Return how an embedding is made, "mean" or "cls": the teacher's own way, else --pooling, else the task's usual.

    The teacher's own way is stated by a sentence-transformers folder alone.

    Raises:
        ValueError: --pooling contradicts the folder, or can't teach long texts.
    """
    stated = None if teacher.folder is None else read_pooling(teacher.folder)
    given = job.distillation.pooling
    if stated and given and stated != given:
        raise ValueError(f"--pooling {given}: {teacher.name} makes its embeddings by {stated!r}; leave it out.")
    pooling = stated or given or ("cls" if job.task == "images" else "mean")
    if job.is_detection and pooling == "cls":
        raise ValueError("--pooling cls: the encoder of a detector has no first token; leave it out.")
    if job.distillation.long_length and pooling == "cls":
        raise ValueError(
            "--long_length needs mean pooling: the first token of a long text stands in the first window alone, which "
            "is all that the teacher could say of it."
        )
    return pooling


def _load_data(
    job: DistillationJob, rows: Rows | None, student: PreTrainedModel, processor: Any
) -> tuple[UnlabelledData, LabelledPieces | None]:
    """The pieces to distil on, and those that downstream scores are measured on; None where there are none."""
    options, seed, max_length = job.data, job.loop.seed, job.model.max_length
    probe = job.distillation
    if not job.is_text:
        num_patches = count_patches(job.model.image_size, student.config) if job.model.image_size else None
        images = read_images(options, job.card, seed, rows, job.task)
        data = build_image_pieces(images, processor, num_patches, options, seed)
        if num_patches is None or not probe.probe_folder:
            return data, None
        return data, load_labelled_images(probe.probe_folder, processor, num_patches)
    data = build_text_pieces(
        read_text(options, job.card, seed, rows),
        processor,
        max_length,
        max_eval_samples=options.max_eval_samples,
        seed=seed,
        long_length=probe.long_length or None,
    )
    if probe.probe_file:
        return data, load_labelled_text(probe.probe_file, options, processor, max_length)
    is_packaged = rows is None and options.is_demo
    return data, load_labelled_licenses(processor, max_length) if is_packaged else None


def _publish(
    job: DistillationJob,
    student: PreTrainedModel,
    processor: Any,
    source: CheckpointSource,
    facts: ModelFacts,
    receipt: dict[str, Any],
) -> None:
    """Write the model with its code, card, self-test and receipt to `--output_dir`."""
    max_length = job.distillation.long_length if job.distillation.long_steps else None
    files = sentence_transformers_files(source, max_length)
    files[RECEIPT_FILE] = (json.dumps(receipt, indent=2, ensure_ascii=False) + "\n").encode()
    publish(student.eval(), processor, facts, job.loop.output_dir, overwrite=True, extra_files=files)
