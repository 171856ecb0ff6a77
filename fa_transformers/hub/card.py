"""Model cards: measured facts poured into `card_template.md`.

A fact that is missing, empty or not a number where a number is needed is an error that names the fact, so that a
published card cannot silently lack one. The template has no logic: what depends on the facts is a string made here.

Make a card from a facts file (`publish` writes one as `model_facts.json` into every model folder):

    python -m fa_transformers.hub.card model_cards/NAME.json model_cards/NAME.md
"""

import argparse
import dataclasses
import json
import os
import re
import string
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..checks import UNKNOWN_LICENSE
from ..data.facts import DataFacts
from ..files import write_json, write_text
from ..redaction import redact
from ..tables import one_line
from .certificate import FAILED, CheckFacts, format_share
from .facts import FactError, check_facts, facts_from_dict

FACTS_FILE = "model_facts.json"
# In characters; longer text from data is cut in the card.
LONGEST_NAME = 120
LONGEST_SENTENCE = 4_000
LONGEST_COMMAND = 10_000
UNPUBLISHED = "unpublished"
FROM_SCRATCH = "none (trained from scratch)"
UNTRAINED = "nothing"
CONVERTED = "nothing that this conversion knows of"
NOT_STATED = "not stated"

NETWORKS = {
    "AutoModelForObjectDetection": "FA-Dense",
    "AutoModelForInstanceSegmentation": "FA-Dense",
    "AutoModelForDepthEstimation": "FA-Stereo",
}
"""Names of the networks that answer for every place of an image, by their Auto class."""

# The Hub's oldest models, such as "bert-base-uncased", have no owner.
_HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class ScoreFacts:
    """One metric on one split, beside what other models reach on the same split.

    Args:
        dataset: `DataFacts.name` of one of the card's data sets.
        split: "test", "validation", ...
        metric: the Hub's metric identifier, "accuracy", "f1", ...
        value: this model's score.
        baselines: {name of the other model: its score}; at least one, the softmax model first where it was measured.
    """

    dataset: str
    split: str
    metric: str
    value: float
    baselines: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SpeedFacts:
    """Time and peak memory of one forward pass at one length, beside the same model with softmax attention.

    Args:
        length: number of tokens (patches for images).
        milliseconds, mebibytes: of this model.
        softmax_milliseconds, softmax_mebibytes: of the softmax model; both None when it ran out of memory.
    """

    length: int
    milliseconds: float
    mebibytes: float
    softmax_milliseconds: float | None
    softmax_mebibytes: float | None


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Everything a model card says. Each fact is required and may not be empty, save those with a default.

    Args:
        repo_id: "owner/name" on the Hub, or a bare name while it is unpublished.
        revision: commit, tag or branch that the loading snippet pins; UNPUBLISHED until `push_to_hub` knows the commit.
        summary: one sentence saying what the model is for.
        pipeline_tag: the Hub's task, "text-classification", "image-classification", ...
        auto_class: the Auto class that loads it, "AutoModelForSequenceClassification", ...
        language: ISO 639-1 code of the text, None for images or where it is not known.
        license: licence of these weights as the Hub spells it, "apache-2.0", ...
        base_model: "owner/name" (or an old bare name) on the Hub of the model this one started from, or FROM_SCRATCH.
        base_model_revision: commit, package version or checksum that fixes exactly which weights those were.
        replaced: what of the base model was replaced, and by what.
        trained_after: what was trained since, for how long; UNTRAINED for a model that was only converted, CONVERTED
            for one whose conversion changed nothing that was trained.
        data: the data sets, with licence and attribution; the first one is what it was trained on, if it was.
        command: the exact command that made it.
        hardware: what it was trained and timed on, with the training time.
        scores: at least one, each with a baseline on the same split.
        speed: at least one length.
        limits: what it cannot do or was not tested for; at least one.
        title: what the model is, in a few words; None says it from base model, training and data (`heading`).
        certificate: what was checked on this model; `publish` writes it. None where nothing was.
    """

    repo_id: str
    summary: str
    pipeline_tag: str
    auto_class: str
    language: str | None
    license: str
    base_model: str
    base_model_revision: str
    replaced: str
    trained_after: str
    data: list[DataFacts]
    command: str
    hardware: str
    scores: list[ScoreFacts]
    speed: list[SpeedFacts]
    limits: list[str]
    revision: str = UNPUBLISHED
    title: str | None = None
    certificate: list[CheckFacts] | None = None

    def __post_init__(self) -> None:
        """Raises FactError, naming the fact, unless every fact is there and the facts agree with one another."""
        check_facts(self)
        if not re.fullmatch(r"[a-z0-9.+-]+", self.license):
            raise FactError(f"fact 'license' is {self.license!r}; give the Hub's identifier, for example 'apache-2.0'")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.repo_id):
            raise FactError(f"fact 'repo_id' is {self.repo_id!r}; give 'owner/name'")
        if self.base_model != FROM_SCRATCH and not _HUB_ID.fullmatch(self.base_model):
            raise FactError(
                f"fact 'base_model' is {self.base_model!r}; give 'owner/name' on the Hub, or {FROM_SCRATCH!r}"
            )
        if self.revision in ("main", "master"):
            raise FactError(
                f"fact 'revision' is {self.revision!r}, which moves; give a commit or tag, or {UNPUBLISHED!r}"
            )
        if self.title is not None and "\n" in self.title:
            raise FactError(f"fact 'title' is {self.title!r}; give one line")
        if not re.fullmatch(r"[\w./-]+", self.revision):
            raise FactError(f"fact 'revision' is {self.revision!r}; give a commit or tag, or {UNPUBLISHED!r}")
        if not (self.auto_class.startswith("AutoModel") and self.auto_class.isidentifier()):
            raise FactError(f"fact 'auto_class' is {self.auto_class!r}; give the name of an Auto class of transformers")
        names = [data.name for data in self.data]
        for index, score in enumerate(self.scores):
            if score.dataset not in names:
                raise FactError(
                    f"fact 'scores[{index}].dataset' is {score.dataset!r}, which 'data' does not name: {names}"
                )
        for index, speed in enumerate(self.speed):
            if (speed.softmax_milliseconds is None) != (speed.softmax_mebibytes is None):
                raise FactError(
                    f"fact 'speed[{index}]' has only one of softmax_milliseconds and softmax_mebibytes; "
                    "give both, or neither when the softmax model ran out of memory"
                )

    @property
    def heading(self) -> str:
        """The card's title, such as "FA-BERT (all-MiniLM-L6-v2) fine-tuned on ScanCode licence documents"."""
        if self.title is not None:
            return self.title
        name = NETWORKS.get(self.auto_class, "FA-ViT" if self.is_image_model else "FA-BERT")
        is_converted = self.trained_after in (UNTRAINED, CONVERTED)
        if is_converted and self.auto_class == "AutoModelForObjectDetection":  # of detectors, DETRs alone are converted
            name = "FA-DETR"
        is_fresh = self.base_model == FROM_SCRATCH
        if not is_fresh:
            name += f" ({self.base_model.rsplit('/', 1)[-1]})"
        if is_converted:
            return f"{name}, converted and not trained" if self.trained_after == UNTRAINED else f"{name}, converted"
        has_head = self.auto_class != "AutoModel"
        return f"{name} {'fine-tuned' if has_head and not is_fresh else 'trained'} on {self.data[0].name}"

    @property
    def is_image_model(self) -> bool:
        """True where the model reads images, by its pipeline tag."""
        return self.pipeline_tag.startswith("image-") or self.auto_class in NETWORKS

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelFacts":
        """Build facts from the dictionary that `to_dict` gives.

        Raises:
            FactError: a fact is missing, unknown, empty or of the wrong type.
        """
        return facts_from_dict(cls, values)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ModelFacts":
        """Read a facts file.

        Raises:
            FactError: the file is not JSON, or as in `from_dict`; the message names the file.
            OSError: the file cannot be read.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise FactError(f"{os.fspath(path)} is not a JSON file: {error}") from error
        try:
            return cls.from_dict(values)
        except FactError as error:
            raise FactError(f"{os.fspath(path)}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as a dictionary that JSON can hold, for `from_dict`; tokens of the Hub are hidden in it."""
        return redact(dataclasses.asdict(self))

    def save(self, path: str | os.PathLike) -> None:
        """Write a facts file that `load` reads back; it appears by rename."""
        write_json(path, self.to_dict())


def render_card(facts: ModelFacts) -> str:
    """Return the model card: YAML metadata the Hub accepts, with `model-index` results, then Markdown.

    Tokens of the Hub are hidden in it. Text is shown as text: what is Markdown or HTML in it is escaped, and what is
    longer than a card can bear is cut.
    """
    facts = ModelFacts.from_dict(facts.to_dict())
    command = facts.command if len(facts.command) <= LONGEST_COMMAND else facts.command[:LONGEST_COMMAND] + " …"
    template = resources.files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        metadata=_metadata(facts),
        title=_plain(facts.heading, LONGEST_NAME),
        first_line=_first_line(facts),
        base_model=_plain(facts.base_model),
        base_model_revision=one_line(facts.base_model_revision, LONGEST_SENTENCE).replace("`", "'"),
        replaced=_plain(facts.replaced),
        trained_after=_plain(facts.trained_after),
        license=facts.license,
        pinning=_pinning(facts),
        snippet=_snippet(facts),
        scores=_score_table(facts.scores),
        wins=_wins(facts.speed),
        speed=_speed_table(facts.speed),
        hardware=_plain(facts.hardware),
        certificate=_certificate(facts.certificate) if facts.certificate else "",
        data="\n".join(_data_line(data) for data in facts.data),
        command=command,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0)),
        limits="\n".join(f"- {_plain(limit)}" for limit in facts.limits),
    )


def describe_replacement(model: Any) -> str:
    """Return a sentence on what an FA model has in the place of softmax attention, from its configuration."""
    config = model.config
    if not hasattr(config, "softmax_layers"):
        places = config.places if hasattr(config, "places") else config.attention_blocks
        blocks = f"{config.attention_kind} attention blocks stand at {', '.join(places) or 'no place'}."
        backbone = getattr(model, "backbone", None)
        if backbone is None or not hasattr(backbone.config, "softmax_layers"):
            return f"nothing: {blocks}"
        return f"in the backbone {describe_replacement(backbone).removesuffix('.')}; {blocks}"
    replaced = config.num_hidden_layers - len(config.softmax_layers)
    parts = [f"softmax attention in {replaced} of {config.num_hidden_layers} layers by factorized attention"]
    if config.key_feature_size:
        parts.append(f"with {config.key_feature_size} learned key features per head")
    if config.learned_temperatures:
        parts.append("with learned temperatures")
    if config.local_window:
        parts.append(f"mixed with a softmax window over {config.local_window} neighbours to each side")
    if config.local_kernel_size:
        parts.append(f"plus a depthwise convolution of width {config.local_kernel_size} over the values")
    return ", ".join(parts) + f"; positions: {config.position_embedding_type}."


def _metadata(facts: ModelFacts) -> str:
    hub_ids = [data.hub_id for data in facts.data if data.hub_id is not None]
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=["factorized-attention", "linear-attention", "long-context", "custom_code"],
        base_model=None if facts.base_model == FROM_SCRATCH else facts.base_model,
        datasets=hub_ids or None,
        model_name=one_line(facts.heading, LONGEST_NAME),
        eval_results=[_eval_result(score, facts) for score in facts.scores],
    ).to_yaml()


def _eval_result(score: ScoreFacts, facts: ModelFacts) -> EvalResult:
    data = next(data for data in facts.data if data.name == score.dataset)
    name = one_line(data.name, LONGEST_NAME) or "dataset"
    return EvalResult(
        task_type=facts.pipeline_tag,
        dataset_type=data.hub_id or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "dataset",
        dataset_name=name,
        dataset_split=one_line(score.split, LONGEST_NAME) or "split",
        metric_type=one_line(score.metric, LONGEST_NAME) or "metric",
        metric_value=score.value,
    )


def _first_line(facts: ModelFacts) -> str:
    if facts.trained_after == UNTRAINED:
        return (
            "**Converted and not trained since: expect it to be worse than its base model until it is fine-tuned.** "
            + _plain(facts.summary)
        )
    return _plain(facts.summary)


def _pinning(facts: ModelFacts) -> str:
    if facts.revision == UNPUBLISHED:
        return "This folder is not on the Hub yet; once it is pushed, this card pins the commit here."
    return "The revision pins weights and code to what was tested."


def _snippet(facts: ModelFacts) -> str:
    processor = "AutoImageProcessor" if facts.is_image_model else "AutoTokenizer"
    if facts.revision == UNPUBLISHED:
        source, arguments = 'folder = "path/to/this/folder"', "folder, trust_remote_code=True"
    else:
        source = f'repo_id, revision = "{facts.repo_id}", "{facts.revision}"'
        arguments = "repo_id, revision=revision, trust_remote_code=True"
    return "\n".join(
        [
            f"from transformers import {facts.auto_class}, {processor}",
            "",
            source,
            f"model = {facts.auto_class}.from_pretrained({arguments})",
            f"processor = {processor}.from_pretrained({arguments})",
        ]
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _plain(text, LONGEST_NAME).replace("|", "\\|")


def _plain(text: str, limit: int | None = None) -> str:
    """Text as one line that Markdown shows as it is: no heading, list, link, code, picture or HTML is made of it."""
    line = one_line(text, limit or LONGEST_SENTENCE)
    line = re.sub(r"([\\`*\[\]])", r"\\\1", line).replace("<", "&lt;")
    return re.sub(r"^(\d{1,9})([.)])|^([#>+=~|_-])", lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", line)


def _score_table(scores: list[ScoreFacts]) -> str:
    baselines = list(dict.fromkeys(name for score in scores for name in score.baselines))
    rows = [
        [*map(_cell, (score.dataset, score.split, score.metric)), f"**{score.value:.4g}**"]
        + [f"{score.baselines[name]:.4g}" if name in score.baselines else "not measured" for name in baselines]
        for score in scores
    ]
    return _table(["data", "split", "metric", "this model", *map(_cell, baselines)], rows)


def _speed_table(speed: list[SpeedFacts]) -> str:
    rows = []
    for row in sorted(speed, key=lambda row: row.length):
        softmax = (
            ["out of memory", "out of memory"]
            if row.softmax_milliseconds is None
            else [f"{row.softmax_milliseconds:,.1f}", f"{row.softmax_mebibytes:,.0f}"]
        )
        rows.append([f"{row.length:,}", f"{row.milliseconds:,.1f}", softmax[0], f"{row.mebibytes:,.0f}", softmax[1]])
    return _table(["tokens", "this model, ms", "softmax, ms", "this model, MiB", "softmax, MiB"], rows)


def _certificate(rows: list[CheckFacts]) -> str:
    """The section on what was checked on these weights."""
    cells = []
    for row in rows:
        result = _cell(row.result)
        if row.outcome == FAILED:
            result = f"**{FAILED.upper()}**{result[len(FAILED) :]}"
        shares = [format_share(share) for share in (row.difference, row.tolerance)]
        cells.append([_cell(row.check), _cell(row.inputs or "-"), *shares, result])
    bases = {format_share(row.tolerance): row.basis for row in rows if row.basis}
    lines = [
        "## Checked on these weights",
        "Outputs that must not change, such as those of one input alone and in a padded batch, were compared in "
        "float64, and those in each precision with float64. Differences are shares of the largest output. "
        "`fa-transformers check FOLDER` repeats it, and every push does.",
        _table(["check", "on", "largest difference", "allowed", "result"], cells),
        "Allowed: " + "; ".join(f"{share} is {_cell(basis)}" for share, basis in bases.items()) + ".",
    ]
    return "\n\n".join(lines[: 4 if bases else 3]) + "\n\n"


def _wins(speed: list[SpeedFacts]) -> str:
    winning = None
    for row in sorted(speed, key=lambda row: row.length, reverse=True):
        if row.softmax_milliseconds is not None and row.milliseconds >= row.softmax_milliseconds:
            break
        winning = row.length
    if winning is None:
        longest = max(row.length for row in speed)
        return f"At {longest:,} tokens, the longest measured, it is not yet faster than softmax attention."
    return f"It is faster than softmax attention from {winning:,} tokens on."


def _data_line(data: DataFacts) -> str:
    where = ""
    if data.hub_id:
        is_id = _HUB_ID.fullmatch(data.hub_id)
        link = f"[{data.hub_id}](https://huggingface.co/datasets/{data.hub_id})"
        where = f" ({link if is_id else _plain(data.hub_id, LONGEST_NAME)})"
    license = NOT_STATED if data.license == UNKNOWN_LICENSE else _plain(data.license, LONGEST_NAME)
    line = f"- **{_plain(data.name, LONGEST_NAME)}**{where}, licence "
    if data.attribution != NOT_STATED:
        return f"{line}{license}. {_plain(data.attribution)}"
    both = f"{license}; whom to credit {NOT_STATED}"
    return f"{line}{f'and whom to credit {NOT_STATED}' if license == NOT_STATED else both}."


def main(arguments: list[str] | None = None) -> None:
    """Write a card from a file of facts; a missing fact ends the program with an error that names it."""
    parser = argparse.ArgumentParser(
        prog="python -m fa_transformers.hub.card", description="Write a model card from a file of measured facts."
    )
    parser.add_argument("facts", type=Path, help="JSON file of ModelFacts")
    parser.add_argument("card", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    try:
        write_text(options.card, render_card(ModelFacts.load(options.facts)))
    except (FactError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
