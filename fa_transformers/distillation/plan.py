"""The plan of a distillation: what `--dry_run` tells of data, stages, memory, time and files, without training."""

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..tables import counted, format_table
from ..training.loaders import build_loaders
from ..training.loop import plan_steps
from ..training.plan import RunPlan, make_plan
from ..training.progress import describe_memory
from .job import DistillationJob, DistillationPlan
from .pieces import UnlabelledData
from .probing import LabelledPieces
from .stages import Stage, build_stages


def plan_stages(
    job: DistillationJob,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: UnlabelledData,
    labelled: LabelledPieces | None,
    pooling: str,
    accelerator: Accelerator,
) -> DistillationPlan:
    """Time a few batches of each stage of a distillation that was set up. The student's weights stay as they are."""
    stages = {}
    teacher.to(accelerator.device)
    for stage in build_stages(job, student, teacher, data, pooling):
        stages[stage.name] = _plan_stage(job, stage, student, teacher, data, accelerator)
    return DistillationPlan(_describe_data(job, data, labelled), stages)


def _plan_stage(
    job: DistillationJob,
    stage: Stage,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: UnlabelledData,
    accelerator: Accelerator,
) -> RunPlan:
    loaders, sampler = build_loaders(stage.loop, stage.pieces, data.collate, accelerator)
    memory = None
    if not job.is_detection:  # whose batches have as many places as their pictures happen to have
        memory = describe_memory(
            student.config,
            sampler.largest_batch(),
            accelerator,
            trained=stage.objective,
            beside=sum(weight.numel() * weight.element_size() for weight in teacher.parameters()),
        )
    return make_plan(
        stage.loop, stage.objective, stage.pieces, data.collate, loaders["train"], sampler, accelerator,
        steps=plan_steps(stage.loop, sampler, stage.loop.output_dir / stage.name), data="", memory=memory,
    )  # fmt: skip


def _describe_data(job: DistillationJob, data: UnlabelledData, labelled: LabelledPieces | None) -> str:
    """Return a table of rows and pieces, and a line on what downstream scores are measured on."""
    train = {"data": "to train on", "rows": f"{len(data.rows.train):,}"}
    train["pieces"] = f"{len(data.train(job.model.max_length)):,}"
    heldout = [{"data": f"held out: {kind}", "pieces": f"{len(pieces):,}"} for kind, pieces in data.heldout.items()]
    for row in heldout:
        rows = data.rows.heldout.get(row["data"].removeprefix("held out: "))
        row["rows"] = "" if rows is None else f"{len(rows):,}"
    table = format_table([train, *heldout], ["data", "rows", "pieces"])
    if labelled is None:
        return table
    return f"{table}\nprobed with {counted(len(labelled.labels), 'piece')} of {len(labelled.label_names):,} classes"
