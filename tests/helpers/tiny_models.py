"""Tiny FA models of every architecture and head with their inputs: what the model tests iterate over.

An architecture joins by its row in `ARCHITECTURES`: sizes and options are taken where its configuration has a field of
that name, inputs follow from `main_input_name`, labels and the shapes of outputs from the Auto class. `MODELS` are all
rows and `HEADS` those of encoders, whose outputs are of tokens or of the whole sample.
"""

import functools
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from fa_transformers.models import ARCHITECTURES, ENCODERS

NUM_LABELS = 2
VOCAB_SIZE = 60
IMAGE_SIZE = 32
PATCH_SIZE = 8

TINY_BACKBONE = {
    "model_type": "fa_resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 24],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
DETR_SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "encoder_stride": PATCH_SIZE,
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 24],
    "backbone_config": TINY_BACKBONE,
    "pyramid_channels": 16,
    "mask_channels": 8,
    "num_queries": 20,
    "d_model": 32,
    **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in DETR_SIZES.items()},
}
MIXER_OPTIONS = ("scaling", "sign pairs", "local", "all scaling")
# Fields of encoders, of which those of one name mean something else elsewhere.
ENCODER_FIELDS = ("position_embedding_type", "classifier_pooling")
# The head width is 16, so 37 features are two copies of all and a third of some.
ALL_OPTIONS = {
    "learned_temperatures": True,
    "key_feature_size": 37,
    "local_kernel_size": 5,
    "local_window": 2,
    "softmax_layers": [1],
    "position_embedding_type": "periodic",
    "classifier_pooling": "mean",
}
OPTION_SETS = {
    "plain": {},
    "scaling": {"attention_normalization": "scaling", "key_feature_size": 20, "position_embedding_type": "none"},
    # CLS of the last layer reads no local term, so only the mean sees them.
    "sign pairs": {"key_feature_size": 37, "key_features": "sign_pairs", "learned_temperatures": True},
    "local": {"local_kernel_size": 3, "local_window": 1, "classifier_pooling": "mean"},
    "all": ALL_OPTIONS,
    "all scaling": {**ALL_OPTIONS, "attention_normalization": "scaling", "num_register_tokens": 3},
    "every stage": {
        "attention_stages": ["stem", "stage1", "stage2", "stage3", "stage4"],
        "attention_places": "seven",
        "attention_heads": 2,
        "norm_type": "group",
    },
}

DETECTION = ("AutoModelForObjectDetection", "AutoModelForInstanceSegmentation", "AutoModelForImageSegmentation")


def applies(options: str, config_class: type[PretrainedConfig]) -> bool:
    """Whether a configuration has any of a set's fields; the plain set fits each. Of the mixer's, which encoders are
    tested with set by set, one is enough elsewhere."""
    if config_class not in ENCODERS and options in MIXER_OPTIONS:
        return False
    return not OPTION_SETS[options] or any(has_field(config_class, name) for name in OPTION_SETS[options])


@functools.cache
def has_field(config_class: type[PretrainedConfig], name: str) -> bool:
    """Whether a configuration has a field of this name and of the meaning that it has here."""
    return hasattr(config_class(), name) and (config_class in ENCODERS or name not in ENCODER_FIELDS)


MODELS = [  # a class that several Auto classes load, with the first of them
    (config_class, auto_class, model_class)
    for config_class, heads in ARCHITECTURES.items()
    for auto_class, model_class in heads.items()
    if auto_class == next(name for name, head in heads.items() if head is model_class)
]
HEADS = [model for model in MODELS if model[0] in ENCODERS and model[1] != "AutoBackbone"]
ROWS = [(*head, options) for head in HEADS for options in OPTION_SETS if applies(options, head[0])]
MODEL_ROWS = [(*model, options) for model in MODELS for options in OPTION_SETS if applies(options, model[0])]
MODEL_IDS = [model_class.__name__ for *_, model_class in MODELS]
HEAD_IDS = [model_class.__name__ for *_, model_class in HEADS]
ROW_IDS = [f"{model_class.__name__}-{options}" for *_, model_class, options in ROWS]
MODEL_ROW_IDS = [f"{model_class.__name__}-{options}" for *_, model_class, options in MODEL_ROWS]

# Sums of at most 2^11 float64 terms through two layers keep 38 bits or more, while whatever leaks through (padding, a
# neighbour in the batch) shows in the first 12 bits, as every parameter is drawn with standard deviation 0.2.
EXACT = {"rtol": 0.0, "atol": 2.0**-30}


def tiny_config(config_class, **fields):
    """A tiny configuration; of `fields`, those that belong to another architecture are left out."""
    return config_class(**{name: value for name, value in {**SIZES, **fields}.items() if has_field(config_class, name)})


def build(config_class, model_class, **fields) -> PreTrainedModel:
    """A tiny model in evaluation mode, all parameters random: what starts at zero would hide its faults."""
    return randomize(model_class(tiny_config(config_class, **fields)).eval())


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.2 * noise)
    return model


def make_tokenizer(words: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with BERT's special tokens."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **special)


def text_inputs(auto_class: str, lengths=(11, 7), seed: int = 1) -> dict[str, Tensor]:
    """Right-padded random documents with their mask, [B, N]; [B, 3 choices, N] for multiple choice."""
    generator = torch.Generator().manual_seed(seed)
    choices = (3,) if auto_class == "AutoModelForMultipleChoice" else ()
    ids = torch.randint(1, VOCAB_SIZE, (len(lengths), *choices, max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).view(-1, *(1 for _ in choices), 1)
    mask = mask.expand(ids.shape).long()
    segments = torch.randint(0, 2, ids.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": segments * mask}


def image_inputs(height: int = 40, width: int = 19, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Random images whose sides are neither equal nor multiples of the patch."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(batch, 3, height, width, generator=generator)}


def inputs_of(model: PreTrainedModel, auto_class: str) -> dict[str, Tensor]:
    """The inputs of a model, without labels; masked image modelling gets its mask of patches."""
    if model.main_input_name == "input_ids":
        return text_inputs(auto_class)
    inputs = image_inputs()
    if auto_class == "AutoModelForMaskedImageModeling":
        batch, _, height, width = inputs["pixel_values"].shape
        num_patches = -(-height // PATCH_SIZE) * -(-width // PATCH_SIZE)
        inputs["bool_masked_pos"] = torch.arange(batch * num_patches).view(batch, -1) % 3 == 0
    return inputs


def object_labels(height: int, width: int) -> list[dict[str, Tensor]]:
    """Labels of two images: two objects with their masks, a quarter and a half of the image wide, and one object."""
    boxes = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5]])
    y, x = (torch.arange(size) / size for size in (height, width))
    masks = torch.stack(
        [((y - box[1]).abs() < box[3] / 2)[:, None] & ((x - box[0]).abs() < box[2] / 2) for box in boxes]
    )
    labels = {"class_labels": torch.tensor([1, 0]), "boxes": boxes, "masks": masks}
    return [labels, {name: value[:1] for name, value in labels.items()}]


def labels_of(auto_class: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels by the name of the Auto class; none for base models and masked image modelling, which is its own label."""
    if auto_class in ("AutoModel", "AutoBackbone", "AutoModelForMaskedImageModeling"):
        return {}
    if auto_class in ("AutoModelForMaskedLM", "AutoModelForTokenClassification"):
        limit = VOCAB_SIZE if auto_class == "AutoModelForMaskedLM" else NUM_LABELS
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return {"labels": torch.where(mask.bool(), ids % limit, -100)}
    if auto_class == "AutoModelForQuestionAnswering":
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([4, 6])}
    if auto_class in ("AutoModelForSequenceClassification", "AutoModelForImageClassification"):
        return {"labels": torch.tensor([0, 1])}
    if auto_class == "AutoModelForMultipleChoice":
        return {"labels": torch.tensor([2, 0])}
    if auto_class in DETECTION:
        return {"labels": object_labels(*inputs["pixel_values"].shape[2:])}
    raise ValueError(f"State how labels for {auto_class} look.")


def backbone_sizes(config: PretrainedConfig, height: int, width: int) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each stage's map: patches of a ViT, or strides of 4, 4, 8, 16 and 32 pixels."""
    if hasattr(config, "patch_shape"):
        strides = [config.patch_shape] * len(config.stage_names)
    else:
        strides = [(stride, stride) for stride in (4, 4, 8, 16, 32)]
    return {
        name: (-(-height // rows), -(-width // columns))
        for name, (rows, columns) in zip(config.stage_names, strides, strict=True)
    }


def shapes_of(model: PreTrainedModel, auto_class: str, inputs: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The documented shapes of a model's output for two samples, without the loss."""
    if auto_class == "AutoBackbone":
        sizes = backbone_sizes(model.config, *inputs["pixel_values"].shape[2:])
        maps = zip(model.channels, (sizes[name] for name in model.out_features), strict=True)
        return {f"feature_maps {index}": (2, channels, *size) for index, (channels, size) in enumerate(maps)}
    if hasattr(model.config, "encoder_layers"):  # DETR: maps of stride 32, and one more class for "no object" in one
        num_places = math.prod(-(-side // 32) for side in inputs["pixel_values"].shape[2:])
        count, width = model.config.num_queries, model.config.d_model
        shapes = {"last_hidden_state": (2, count, width), "encoder_last_hidden_state": (2, num_places, width)}
        num_classes = NUM_LABELS + (model.config.model_type == "fa_detr")
        detected = {"logits": (2, count, num_classes), "pred_boxes": (2, count, 4)}
        if auto_class in DETECTION:
            return shapes | detected
        return shapes | ({} if model.config.model_type == "fa_detr" else {"reference_points": (count, 2, 2)})
    if auto_class in DETECTION:
        count, (height, width) = model.config.num_queries, inputs["pixel_values"].shape[2:]
        shapes = {"logits": (2, count, NUM_LABELS), "pred_boxes": (2, count, 4), "image_sizes": (2, 2)}
        masks = {"pred_masks": (2, count, -(-height // 4), -(-width // 4))}
        return shapes | (masks if auto_class != "AutoModelForObjectDetection" else {})
    num_tokens = inputs[model.main_input_name].shape[-1]
    if model.main_input_name == "pixel_values":
        num_tokens = 1 + model.config.num_register_tokens + 5 * 3
    width = model.config.hidden_size
    return {
        "AutoModel": {"last_hidden_state": (2, num_tokens, width), "pooler_output": (2, width)},
        "AutoModelForMaskedLM": {"logits": (2, num_tokens, VOCAB_SIZE)},
        "AutoModelForSequenceClassification": {"logits": (2, NUM_LABELS)},
        "AutoModelForTokenClassification": {"logits": (2, num_tokens, NUM_LABELS)},
        "AutoModelForQuestionAnswering": {"start_logits": (2, num_tokens), "end_logits": (2, num_tokens)},
        "AutoModelForMultipleChoice": {"logits": (2, 3)},
        "AutoModelForImageClassification": {"logits": (2, NUM_LABELS)},
        "AutoModelForMaskedImageModeling": {"reconstruction": tuple(inputs[model.main_input_name].shape)},
    }[auto_class]


def loss_of(model: PreTrainedModel, auto_class: str, inputs: dict[str, Tensor]) -> Tensor:
    """The head's loss; for a base model, one that every output feeds."""
    output = model(**inputs, **labels_of(auto_class, inputs))
    if auto_class == "AutoBackbone":
        return torch.stack(
            [(maps * ramp(maps.shape[1], maps)[:, None, None]).pow(2).mean() for maps in output[0]]
        ).sum()
    if auto_class == "AutoModel":
        weights = ramp(output.last_hidden_state.shape[-1], output.last_hidden_state)
        others = [output[name] for name in ("pooler_output",) if name in output]
        return sum(((one * one).mean() for one in others), (output.last_hidden_state * weights).pow(2).mean())
    return output.loss


def ramp(length: int, like: Tensor) -> Tensor:
    """Weights from -1 to 1, so that no feature, as under a norm, has a fixed share of a sum of squares."""
    return torch.linspace(-1.0, 1.0, length, dtype=like.dtype)


def outputs_of(model: PreTrainedModel, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The tensors of a model's output by name, without gradients; of feature maps, "feature_maps 0" and so on.

    Weights that were read from a file lie at any address, and on some processors products of one column round by it:
    they are moved to where torch puts new tensors, so that equal weights give equal bits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        outputs = dict(model(**inputs, **options))
    for index, feature_map in enumerate(outputs.get("feature_maps") or ()):
        outputs[f"feature_maps {index}"] = feature_map
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def assert_equal_outputs(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys() and len(expected) > 0
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0.0, atol=0.0, msg=lambda text, name=name: f"{name}: {text}"
        )


def as_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def rewrite_config(folder: Path, **fields) -> None:
    """Set fields in a saved config.json behind the library's back."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
