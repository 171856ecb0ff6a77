"""The facts of a fine-tuned model's card, all from the run's options and figures."""

from transformers import PreTrainedModel

from ..conversion.source import CheckpointSource, describe_source
from ..data.labelled import LabelledData
from ..hub.card import FROM_SCRATCH, ModelFacts, ScoreFacts, describe_replacement
from ..hub.timing import describe_hardware, time_by_length, time_image
from ..metrics import SCORE_NAMES, describe_intervals
from ..redaction import without_local_paths
from ..tables import counted, one_line
from .job import FinetuneJob, Fitted

# Name in our scores -> the Hub's name of the metric, for the model card.
CARD_METRICS = {
    "single_label_classification": {"accuracy": "accuracy", "macro_f1": "f1"},
    "multi_label_classification": {"micro_f1": "f1", "accuracy": "exact_match"},
    "regression": {"mse": "mse", "mae": "mae"},
}


def build_facts(job: FinetuneJob, data: LabelledData, fitted: Fitted, baselines: dict[str, dict]) -> ModelFacts:
    """The facts of the model card of a fine-tuned model."""
    model, run, card = fitted.model, fitted.run, job.card
    base_model, revision = describe_base_model(fitted.source, card.base_model)
    side = fitted.image_size
    about = "" if job.model.square else "about "
    what = (
        f"documents of up to {job.model.max_length:,} tokens" if job.is_text else f"images of {about}{side} px a side"
    )
    names = data.label_names or []
    number = "any" if data.problem_type == "multi_label_classification" else "one"
    answer = (
        f"{number} of {len(names)} labels: {', '.join(map(one_line, names[:20]))}{', …' if len(names) > 20 else ''}"
        if names
        else "one number"
    )
    minutes = run["train_seconds"] / 60
    rank, alpha = job.model.lora_rank, job.model.lora_alpha or 2 * job.model.lora_rank
    how = f", by LoRA of rank {rank} (alpha {alpha}) on the attention's projections, merged since" if rank else ""
    lengths = (min(512, job.model.max_length), job.model.max_length) if job.is_text else ()
    speed = time_by_length(model, lengths) if job.is_text else [time_image(model, side or 0)]
    return ModelFacts(
        repo_id=card.hub_model_id or job.loop.output_dir.resolve().name,
        summary=f"A factorized encoder that gives {what} {answer}.",
        pipeline_tag=job.task,
        auto_class="AutoModelForSequenceClassification" if job.is_text else "AutoModelForImageClassification",
        language=card.language,
        license=card.license,
        base_model=base_model,
        base_model_revision=revision,
        replaced=describe_replacement(model),
        trained_after=f"{_describe_transfer(run)}{counted(run['steps'], 'step')}, {run['train_tokens']:,} tokens of "
        f"{one_line(data.facts.name)}, seed {job.loop.seed}{how}.",
        data=[data.facts],
        command=without_local_paths(job.command),
        hardware=f"{describe_hardware(model.device)}; trained for {minutes:.1f} minutes",
        scores=[
            ScoreFacts(
                dataset=data.facts.name,
                split=data.score_split,
                metric=hub_name,
                value=fitted.scores[name],
                baselines={baseline: scores[name] for baseline, scores in baselines.items()},
            )
            for name, hub_name in CARD_METRICS[data.problem_type].items()
        ],
        speed=speed,
        limits=describe_limits(job, data, fitted),
    )


def _describe_transfer(run: dict) -> str:
    """Return the beginning of a sentence on what came before fine-tuning, from a run's figures."""
    if not (recovery := run.get("recovery")):
        return ""
    return (
        f"{recovery['steps']:,} steps of attention transfer on the documents, which brought the layers' error against "
        f"the checkpoint's from {recovery['error_before']:.3f} to {recovery['error_after']:.3f}; then "
    )


def describe_cut(job: FinetuneJob, model: PreTrainedModel) -> str:
    """Return a sentence on documents that are longer than those of the run, for the saved model's pipeline too."""
    longest, loop = f"{job.model.max_length:,}", job.loop
    is_short = loop.short_epochs and loop.short_length < job.model.max_length
    begun = f"Its training began with {counted(loop.short_epochs, 'epoch')} on the first {loop.short_length:,}."
    if model.config.position_embedding_type == "absolute":
        cut = f"Tokens after the first {longest} of a document are cut off, by the saved tokenizer as well."
    else:
        cut = f"It was trained and scored on the first {longest} tokens of a document; a pipeline reads all of them."
    return f"{cut} {begun}" if is_short else cut


def describe_shape(job: FinetuneJob, side: int | None) -> str:
    """Return what images are resized to, the beginning of a sentence."""
    if job.model.square:
        return f"Images are resized to {side} x {side} px, whatever their shape"
    return f"Images are resized to whole patches in their own shape, at most as many as {side} x {side} px have"


def describe_base_model(source: CheckpointSource | None, base_model: str | None) -> tuple[str, str]:
    """Return Hub name and revision of what a run started from; None is fresh weights.

    `base_model`: the name that the user states, which wins.
    """
    if source is None:
        return FROM_SCRATCH, FROM_SCRATCH
    name, revision = describe_source(source)
    return base_model or name, revision


def describe_limits(job: FinetuneJob, data: LabelledData, fitted: Fitted) -> list[str]:
    """Sentences for the card on what its scores are worth and what the model can't do."""
    num_examples = fitted.scores["num_examples"]
    limits = [
        f"Scores are from one run with one seed on {counted(num_examples, 'example')} of the {data.score_split} split."
    ]
    scored = {name: fitted.scores[name] for name in SCORE_NAMES if name in fitted.scores}
    limits += describe_intervals(scored, num_examples, data.problem_type)
    if job.is_text:
        limits.append(describe_cut(job, fitted.model))
    else:
        limits.append(f"{describe_shape(job, fitted.image_size)}.")
    limits.append("The same model with softmax attention was not trained for comparison.")
    limits.append("It was tested neither on other data nor for bias, and it answers unlike input too.")
    return limits
