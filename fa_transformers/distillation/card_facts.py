"""The facts of a distilled model's card, all from the run's options and its receipt."""

from typing import Any

from transformers import PreTrainedModel

from ..conversion.folder import DETECTOR_SIDES, PIPELINE_TAGS
from ..conversion.source import CheckpointSource, describe_source
from ..data.facts import DataFacts
from ..hub.card import ModelFacts, ScoreFacts, SpeedFacts, describe_replacement
from ..hub.publish import find_auto_class_of
from ..hub.timing import time_by_length, time_image
from ..redaction import without_local_paths
from ..tables import counted
from .job import DistillationJob

VECTORS = {"mean": "the mean of the last hidden states", "cls": "the last hidden state of the first token"}
DOWNSTREAM_NAMES = {"teacher": "teacher", "before recovery": "before", "majority class": "majority"}
LENGTHS_TIMED = (512, 4096)


def build_facts(
    job: DistillationJob,
    model: PreTrainedModel,
    teacher: CheckpointSource,
    receipt: dict[str, Any],
    data: list[DataFacts],
) -> ModelFacts:
    """Return the facts of the card.

    Args:
        model: the student.
        teacher: the checkpoint that is named as the base model: a converted folder has no weights of its own.
        receipt: of `receipt.build_receipt`.
        data: one for each kind of held-out data, in the receipt's order; the first is also the one trained on.
    """
    name, revision = describe_source(teacher)
    base_model = job.card.base_model or name
    auto_class = find_auto_class_of(model)
    family = {"text": "FA-BERT", "images": "FA-ViT", "object-detection": "FA-DETR"}[job.task]
    return ModelFacts(
        repo_id=job.card.hub_model_id or job.loop.output_dir.resolve().name,
        title=f"{family} ({base_model.rsplit('/', 1)[-1]}) distilled from its softmax model",
        summary=f"{base_model} with factorized attention, distilled from the softmax model.",
        pipeline_tag=PIPELINE_TAGS.get(auto_class, "feature-extraction" if job.is_text else "image-feature-extraction"),
        auto_class=auto_class,
        language=job.card.language,
        license=job.card.license,
        base_model=base_model,
        base_model_revision=revision,
        replaced=describe_replacement(model),
        trained_after=describe_training(receipt, "images" if job.is_detection else "tokens"),
        data=data,
        command=without_local_paths(job.command),
        hardware=f"{receipt['hardware']}; distilled for {receipt['seconds'] / 60:.1f} minutes",
        scores=describe_similarity(receipt["similarity"], data) + describe_downstream(receipt["downstream"]),
        speed=time_student(job, model),
        limits=[
            f"It was compared with its teacher on {describe_compared(job, receipt)}, by {VECTORS[receipt['pooling']]}.",
            "Its outputs are near the teacher's, not equal: check thresholds that were tuned on it.",
        ],
    )


def describe_training(receipt: dict[str, Any], unit: str = "tokens") -> str:
    """Return a sentence on the steps of the stages, and one on the errors of the layers."""
    stages = ", ".join(
        f"{counted(stage['steps'], 'step')} of {stage['stage'].replace('_', ' ')}" for stage in receipt["stages"]
    )
    errors = describe_errors(receipt["stages"])
    return f"{stages}; {receipt['tokens']:,} {unit}, seed {receipt['seed']}. {errors}"


def describe_errors(stages: list[dict[str, Any]]) -> str:
    """Return the `objectives.relative_error` of every layer before and after each stage; a dash where it is softmax."""

    def row(figures: dict) -> str:
        return " ".join("-" if error is None else f"{error:.3f}" for error in figures["layer_errors"])

    rows = (f"{stage['stage'].replace('_', ' ')} {row(stage['before'])} → {row(stage['after'])}" for stage in stages)
    return f"Squared error of every layer relative to the variance of what it learns: {'; '.join(rows)}."


def describe_compared(job: DistillationJob, receipt: dict[str, Any]) -> str:
    """Return the sizes of the texts or images that student and teacher were compared on."""
    if job.is_detection:
        return "images of the size that its processor gives them"
    if not job.is_text:
        kept = "" if job.model.square else ", in their own shape"
        return f"images of {job.model.image_size} x {job.model.image_size} pixels{kept}"
    is_long = any("," in kind for kind in receipt["similarity"])
    return f"texts of up to {job.distillation.long_length if is_long else job.model.max_length:,} tokens"


def describe_similarity(similarity: dict[str, dict[str, dict[str, float]]], data: list[DataFacts]) -> list[ScoreFacts]:
    """Return the card's scores of every kind of held-out data; long texts have the name of their kind and a comma."""
    kinds = list(dict.fromkeys(kind.partition(",")[0] for kind in similarity))
    return [
        ScoreFacts(
            dataset=data[min(kinds.index(kind.partition(",")[0]), len(data) - 1)].name,
            split=f"held out, {kind}",
            metric=f"{name} with the teacher",
            value=both["after"][name],
            baselines={"before recovery": both["before"][name]},
        )
        for kind, both in similarity.items()
        for name in ("cosine", "correlation")
    ]


def describe_downstream(downstream: dict[str, Any] | None) -> list[ScoreFacts]:
    """Return the card's score of logistic regression on the embeddings; none where nothing was measured."""
    if downstream is None:
        return []
    others = {name: downstream[key] for name, key in DOWNSTREAM_NAMES.items()}
    return [
        ScoreFacts(
            dataset=downstream["data"],
            split="five folds, drawn ten times, embeddings and logistic regression",
            metric="accuracy",
            value=downstream["after"],
            baselines=others,
        )
    ]


def time_student(job: DistillationJob, model: PreTrainedModel) -> list[SpeedFacts]:
    """Time a short and a long text, or one image, beside softmax attention."""
    if job.is_text:
        return time_by_length(model, LENGTHS_TIMED)
    return [time_image(model, job.model.image_size or DETECTOR_SIDES)]
