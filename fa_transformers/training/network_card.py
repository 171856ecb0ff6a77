"""The facts of the card of a network for dense answers, and its way into a published folder and to the Hub."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel

from ..conversion.source import describe_folder, describe_source
from ..data.facts import DataFacts
from ..hub.card import FROM_SCRATCH, ModelFacts, ScoreFacts, SpeedFacts, describe_replacement
from ..hub.publish import find_auto_class_of, publish
from ..hub.push import push
from ..hub.timing import describe_hardware, time_maps
from ..models.configuration_fa_dense import HEAD_STRIDE
from ..options import CardOptions
from ..redaction import without_local_paths
from ..tables import counted, one_line

TIMED_PX = 512
"""Side of the image that a detector is timed on beside softmax blocks, which take seconds on larger ones."""
MOST_TIMED_PLACES = 4096
"""Places of a cost volume above which softmax blocks on it would take minutes."""


@dataclass(frozen=True)
class NetworkRun:
    """The part of a finished run that its card tells.

    Args:
        summary: what the model does, in one sentence.
        pipeline_tag: the Hub's task.
        start: name and revision of what the weights began from, as `describe_start` gives them before training.
        data: the set that it learnt from and was scored on.
        split: that was scored.
        metrics: name of a score of `scores` -> the Hub's name of the metric.
        scores, baselines: of the model and of what needs no training, on `split`.
        run: figures of the run, with `steps` and `train_seconds`.
        command: how it is repeated.
        seed: of the run.
        limits: sentences on what it can't do.
        kept: the part that wasn't trained, in words that end a sentence; "" where all was.
    """

    summary: str
    pipeline_tag: str
    start: tuple[str, str]
    data: DataFacts
    split: str
    metrics: Mapping[str, str]
    scores: Mapping[str, Any]
    baselines: Mapping[str, Mapping[str, float]]
    run: Mapping[str, Any]
    command: str
    seed: int
    limits: tuple[str, ...]
    kept: str = ""


def describe_start(model_name_or_path: str, backbone: str | None = None) -> tuple[str, str]:
    """Return the name by which a card calls what a network begins from, and what fixes which weights those are.

    Args:
        model_name_or_path: folder of a network, whose files may be links as `from_pretrained` follows them, or "none".
        backbone: what a new network's backbone is read from, as `read_source` takes it.

    Raises:
        OSError, ValueError: of `describe_source`, for a backbone that can't be read.
    """
    if backbone is not None:
        return describe_source(backbone)
    if model_name_or_path == "none":
        return FROM_SCRATCH, FROM_SCRATCH
    return describe_folder(model_name_or_path, Path(model_name_or_path))


def publish_network(
    model: PreTrainedModel, processor: BaseImageProcessor, finished: NetworkRun, card: CardOptions, folder: Path
) -> dict[str, Any] | None:
    """Write the folder of a trained network, and upload it where `card` asks for it; returns what `push` does."""
    publish(model, processor, network_facts(model, finished, card, folder), folder, overwrite=True)
    if not card.push_to_hub:
        return None
    repo_id = card.hub_model_id or folder.resolve().name
    return push(folder, repo_id, private=card.hub_private, token=card.hub_token)


def network_facts(model: PreTrainedModel, finished: NetworkRun, card: CardOptions, folder: Path) -> ModelFacts:
    """Return the facts of the card."""
    run = finished.run
    scores = [
        ScoreFacts(
            dataset=finished.data.name,
            split=finished.split,
            metric=hub_name,
            value=finished.scores[name],
            baselines={baseline: values[name] for baseline, values in finished.baselines.items() if name in values},
        )
        for name, hub_name in finished.metrics.items()
        if finished.scores.get(name) is not None
    ]
    base_model, revision = finished.start
    count = finished.scores["num_examples"]
    return ModelFacts(
        repo_id=card.hub_model_id or folder.resolve().name,
        summary=finished.summary,
        pipeline_tag=finished.pipeline_tag,
        auto_class=find_auto_class_of(model),
        language=None,
        license=card.license,
        base_model=base_model if base_model == FROM_SCRATCH else card.base_model or base_model,
        base_model_revision=revision,
        replaced=describe_replacement(model),
        trained_after=f"{counted(run['steps'], 'step')} on {one_line(finished.data.name)}, seed {finished.seed}"
        f"{f', {finished.kept}' if finished.kept else ''}.",
        data=[finished.data],
        command=without_local_paths(finished.command),
        hardware=f"{describe_hardware(model.device)}; trained for {run['train_seconds'] / 60:.1f} minutes",
        scores=scores,
        speed=[time_network(model)],
        limits=[
            f"Scores are from one run with one seed on {counted(count, 'example')} of the {finished.split} split.",
            *finished.limits,
            "It was tested neither on other data nor for bias, and it answers unlike input too.",
        ],
    )


def time_network(model: PreTrainedModel) -> SpeedFacts:
    """Measure a network beside the same one with softmax blocks, at a size that these can bear.

    Places are those of a detector's map at stride 8, or of a stereo network's cost volume at stride 4.
    """
    levels = getattr(model.config, "max_disparity", None)
    if levels is None:
        return time_maps(model, (TIMED_PX, TIMED_PX), (TIMED_PX // HEAD_STRIDE) ** 2)
    rows = max(4, int(math.sqrt(MOST_TIMED_PLACES / (levels / 4) / 2)) // 4 * 4)
    return time_maps(model, (4 * rows, 8 * rows), levels // 4 * rows * 2 * rows)


def user_data_facts(card: CardOptions, source: Path | str) -> DataFacts:
    """Return what the card says of a user's data, a folder, a file or a data set of the Hub."""
    hub_id = str(source) if isinstance(source, str) and not Path(source).exists() else None
    name = hub_id or Path(source).resolve().name
    return DataFacts(
        name=card.data_name or name, license=card.data_license, attribution=card.data_attribution, hub_id=hub_id
    )
