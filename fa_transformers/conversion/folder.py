"""The folder of a converted model: what `publish` writes, with a card that says what it is worth untrained."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..data.facts import DataFacts
from ..evaluation import evaluating
from ..hub.card import CONVERTED, UNTRAINED, ModelFacts, ScoreFacts, describe_replacement
from ..hub.publish import cuts_texts, find_auto_class_of, publish
from ..hub.timing import describe_hardware, time_by_length, time_image
from ..models import FABertConfig, FABertModel
from ..models.configuration_fa import FactorizedConfig
from ..redaction import without_local_paths
from .packaged import HUB_IDS, HUB_LICENSE
from .sentence_transformers import sentence_transformers_files
from .source import CheckpointSource, describe_source

PIPELINE_TAGS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedImageModeling": "image-feature-extraction",
    "AutoModelForObjectDetection": "object-detection",
}
LONG_INPUTS = {"input_ids": "long texts", "pixel_values": "large images"}
MEASURED_TOKENS = 512
DETECTOR_SIDES = (256, 384)
"""Height and width in pixels of the image that a detector is measured on, which has no size of its own."""


def write_converted_folder(
    model: PreTrainedModel,
    processor: Any,
    source: CheckpointSource,
    folder: str | os.PathLike,
    options: dict[str, Any],
    facts: dict[str, Any],
    *,
    overwrite: bool,
) -> Path:
    """Publish a converted model, with a card that `describe_conversion` fills.

    Args:
        model, processor: what was converted, and its tokenizer or image processor.
        source: the checkpoint that it came from.
        folder: where to, as in `publish`.
        options: of the conversion, for the command on the card.
        facts: fields of `ModelFacts` that replace what is found here.

    Raises:
        ValueError: there is no tokenizer or image processor; or as in `publish`.
    """
    if processor is None:
        raise ValueError(
            f"{source.name!r} has no tokenizer or image processor, without which a model folder is of no use; "
            "pass `processor`."
        )
    extra_files = sentence_transformers_files(source, options.get("max_length"))
    described = describe_conversion(model, processor, source, options, is_sentence_model=bool(extra_files))
    described["repo_id"] = Path(folder).resolve().name
    base_model = facts.get("base_model", described["base_model"])
    described["summary"] = f"{base_model} with factorized attention, for {LONG_INPUTS[model.main_input_name]}."
    card = ModelFacts(**{**described, **facts})
    return publish(model, processor, card, folder, overwrite=overwrite, extra_files=extra_files)


def describe_conversion(
    model: PreTrainedModel,
    processor: Any,
    source: CheckpointSource,
    options: dict[str, Any],
    *,
    is_sentence_model: bool,
) -> dict[str, Any]:
    """Return the card's facts but its name and summary, measured where they are figures."""
    auto_class = find_auto_class_of(model)
    base_model, revision = describe_source(source)
    is_text = isinstance(processor, PreTrainedTokenizerBase)
    inputs, data = sample_inputs(model, processor)
    tag = "feature-extraction" if is_text else "image-feature-extraction"
    if is_sentence_model:
        tag = "sentence-similarity"
    arguments = ", ".join([repr(source.name), *(f"{name}={value!r}" for name, value in options.items())])
    is_pending = model.config.recovery == "pending"
    limits = ["What it is good for was not measured: the score only compares hidden states on one small input."]
    limits += describe_cut(model, processor)
    if is_sentence_model:
        limits.append("sentence-transformers loads it by SentenceTransformer(folder, trust_remote_code=True) only.")
    return {
        "pipeline_tag": PIPELINE_TAGS.get(auto_class, tag),
        "auto_class": auto_class,
        "language": None,
        "license": HUB_LICENSE if source.name in HUB_IDS else "unknown",
        "base_model": base_model,
        "base_model_revision": revision,
        "replaced": describe_replacement(model),
        "trained_after": UNTRAINED if is_pending else CONVERTED,
        "data": [data],
        "command": without_local_paths(
            f"python -c \"import fa_transformers as fa; fa.convert_checkpoint({arguments}, output_dir='...')\""
        ),
        "hardware": describe_hardware(model.device),
        "scores": [
            ScoreFacts(
                dataset=data.name,
                split="all of it",
                metric="cosine_similarity",
                value=round(similarity_to_softmax(model, inputs), 4),
                baselines={"the same weights with softmax attention": 1.0},
            )
        ],
        "speed": time_by_length(model, [MEASURED_TOKENS]) if is_text else [time_image(model, native_sides(model))],
        "limits": limits,
    }


def describe_cut(model: PreTrainedModel, processor: Any) -> list[str]:
    """Return the sentence that says where the saved tokenizer cuts texts; none where it doesn't."""
    if not cuts_texts(model, processor):
        return []
    return [f"Texts are cut to the first {processor.model_max_length:,} tokens, as many as it has positions."]


def sample_inputs(model: PreTrainedModel, processor: Any) -> tuple[dict[str, Tensor], DataFacts]:
    """Return a small input of the encoder, and what the card says of it."""
    if isinstance(processor, PreTrainedTokenizerBase):
        text = " ".join(str(part.__doc__) for part in (FactorizedConfig, FABertConfig, FABertModel.forward))
        longest = min(processor.model_max_length, model.config.max_position_embeddings, MEASURED_TOKENS)
        batch = processor(text, truncation=True, max_length=longest, return_tensors="pt")
        name = f"the first {longest} tokens of the documentation of FactorizedConfig, FABertConfig and FABertModel"
        data = DataFacts(name=name, license="apache-2.0", attribution="fa_transformers.")
        return {name: batch[name] for name in ("input_ids", "attention_mask")}, data
    height, width = native_sides(model)
    ramp = torch.linspace(-2.0, 2.0, height)[:, None] * torch.linspace(0.2, 1.0, width).cos()
    pixel_values = torch.stack([ramp.roll(37 * channel, dims=1) for channel in range(model.config.num_channels)])
    data = DataFacts(
        name="one image of colour ramps", license="apache-2.0", attribution="Generated by fa_transformers."
    )
    return {"pixel_values": pixel_values[None].to(model.dtype)}, data


def native_sides(model: PreTrainedModel) -> tuple[int, int]:
    """Return height and width, in pixels, of the images that a model's position table is made for, in whole patches."""
    config = model.config
    if not isinstance(config, FactorizedConfig):
        return DETECTOR_SIDES
    return config.native_grid[0] * config.patch_shape[0], config.native_grid[1] * config.patch_shape[1]


def encoder_states(output: ModelOutput) -> Tensor:
    """Return the encoder's last hidden states [B, N, C], also of a model whose own last ones are a decoder's."""
    states = output.get("encoder_last_hidden_state")
    return output["last_hidden_state"] if states is None else states


def similarity_to_softmax(model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    """Return the mean cosine, over real tokens, between the encoder's last hidden states and those that the same
    weights give with softmax attention in every layer."""
    config = copy.deepcopy(model.config)
    config.softmax_layers = list(range(config.num_hidden_layers))
    softmax = type(model)(config).to(model.device, model.dtype).eval()
    softmax.load_state_dict(model.state_dict(), strict=False)
    with evaluating(model):
        ours, theirs = (encoder_states(one.base_model(**inputs)).float() for one in (model, softmax))
    cosines = F.cosine_similarity(ours, theirs, dim=-1)
    mask = inputs.get("attention_mask", torch.ones_like(cosines)).bool()
    return cosines[mask].mean().item()
