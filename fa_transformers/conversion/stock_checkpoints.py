"""Names, fields and shapes of each stock architecture's checkpoints, translated into ours: pure functions, no files.

A row of `FAMILIES` says how names, tensors and configuration of one `model_type` become those of an FA model. Names are
first given the base model's prefix (`bert.`, `vit.` or `model.`), which base checkpoints lack; then they are renamed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models import ARCHITECTURES, FABertConfig, FAConditionalDetrConfig, FADetrConfig, FAViTConfig
from ..models.fa_checkpoint_names import translate_config, translate_vit_name
from ..models.modeling_fa_detr import CONDITIONAL_DETR_NAME_PATTERNS, DETR_NAME_PATTERNS

ROBERTA_NAME_PATTERNS = {
    r"^lm_head\.dense\.": r"cls.predictions.transform.dense.",
    r"^lm_head\.layer_norm\.": r"cls.predictions.transform.LayerNorm.",
    r"^lm_head\.": r"cls.predictions.",
    # Its classifier is dense, tanh, projection: what BERT's pooler and classifier are.
    r"^classifier\.dense\.": r"bert.pooler.dense.",
    r"^classifier\.out_proj\.": r"classifier.",
}
ELECTRA_NAME_PATTERNS = {
    r"^generator_predictions\.(dense|LayerNorm)\.": r"cls.predictions.transform.\1.",
    r"^generator_lm_head\.weight$": r"cls.predictions.decoder.weight",
    r"^generator_lm_head\.bias$": r"cls.predictions.bias",
}
DISTILBERT_NAME_PATTERNS = {
    r"^bert\.transformer\.layer\.": r"bert.encoder.layer.",
    r"\.attention\.q_lin\.": r".attention.self.query.",
    r"\.attention\.k_lin\.": r".attention.self.key.",
    r"\.attention\.v_lin\.": r".attention.self.value.",
    r"\.attention\.out_lin\.": r".attention.output.dense.",
    r"\.sa_layer_norm\.": r".attention.output.LayerNorm.",
    r"\.ffn\.lin1\.": r".intermediate.dense.",
    r"\.ffn\.lin2\.": r".output.dense.",
    r"\.output_layer_norm\.": r".output.LayerNorm.",
    r"^vocab_transform\.": r"cls.predictions.transform.dense.",
    r"^vocab_layer_norm\.": r"cls.predictions.transform.LayerNorm.",
    r"^vocab_projector\.weight$": r"cls.predictions.decoder.weight",
    r"^vocab_projector\.bias$": r"cls.predictions.bias",
}

# What a text checkpoint may hold that no encoder here has a place for.
DROPPED_FROM_TEXT = {
    r"embeddings\.(position_ids|token_type_ids)$": "a buffer that counts, not a weight",
    r"\.(query|key|value)_global\.": "Longformer's global tokens, which factorized attention needs none of",
    r"embeddings\.global_embeddings\.": "LSG's global tokens, which factorized attention needs none of",
}
# Parts that an FA model of some task has, or that stock heads have; anything else is unknown and refused.
KNOWN_PARTS = re.compile(
    r"\.pooler\.dense\.|embeddings\.mask_token$|embeddings\.position_embeddings(\.weight)?$|"
    r"^cls\.(predictions|seq_relationship)\.|^qa_outputs\.|^decoder\.0\.|^classifier\.(dense\.|out_proj\.)?(weight|bias)$|"
    r"^(class_labels_classifier|bbox_predictor)\.|"
    r"^(pre_classifier|discriminator_predictions|sequence_summary|cls_classifier|distillation_classifier)\."
)
FRESH_HEAD = "fresh head"
# Parts that may start fresh; every other one must be in the checkpoint.
FRESH_PARTS = {
    r"\.mixer\.": "learned part of factorized attention",
    r"\.pooler\.dense\.": "fresh: the checkpoint has no such pooler",
    r"embeddings\.mask_token$": "fresh: the checkpoint has no mask token",
    r"^(cls\.predictions|classifier|qa_outputs|decoder\.0|class_labels_classifier|bbox_predictor)\.": FRESH_HEAD,
}

# Heads that compute something else than ours do, so that their weights would not mean the same.
INEXACT_HEADS = {
    "ElectraForSequenceClassification": "its head applies GELU where BERT's pooler applies tanh",
    "ElectraForMultipleChoice": "its head applies GELU where BERT's pooler applies tanh",
    "DistilBertForSequenceClassification": "its head applies ReLU where BERT's pooler applies tanh",
    "DistilBertForMultipleChoice": "its head applies ReLU where BERT's pooler applies tanh",
    "DeiTForImageClassificationWithTeacher": "its head averages two classifiers",
    "DeiTForMaskedImageModeling": "its head reads the tokens shifted by one",
    "Dinov2ForImageClassification": "its head reads CLS and the mean over the patches side by side",
    "Dinov2WithRegistersForImageClassification": "its head reads CLS and the mean over the patches side by side",
}
GELU_HEADS = ("roberta", "xlm-roberta", "camembert", "longformer", "electra")
AUTO_CLASSES = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "BertForPreTraining": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForImageClassificationWithTeacher": "AutoModelForImageClassification",
    "ForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "ForObjectDetection": "AutoModelForObjectDetection",
    "ElectraForPreTraining": "AutoModel",
    "ForNextSentencePrediction": "AutoModel",
    "Model": "AutoModel",
    "Backbone": "AutoModel",
}


@dataclass(frozen=True, eq=False)
class StockTensor:
    """A tensor of a checkpoint under the name that it has here; `source` is None where it was made up.

    `action` is "kept", "resized", "new" or "dropped", and `reason` says why if it isn't plain.
    """

    source: str | None
    name: str
    tensor: Tensor
    is_head: bool = False
    action: str = "kept"
    reason: str = ""


@dataclass(frozen=True)
class Family:
    """The rules by which checkpoints of one `model_type` become ours.

    Args:
        config_class: the FA configuration.
        prefix: base model's prefix there, as a regular expression.
        rename: one name with our prefix -> our name.
        fields: configuration fields -> those of a type that `config_class` reads.
        adapt: tensors and configuration fields -> tensors that fit ours.
    """

    config_class: Any
    prefix: str
    rename: Callable[[str], str]
    fields: Callable[[dict], dict]
    adapt: Callable[[list[StockTensor], dict], list[StockTensor]]

    @property
    def our_prefix(self) -> str:
        """The base model's prefix in the names of an FA model, such as "bert."."""
        return f"{ARCHITECTURES[self.config_class]['AutoModel'].base_model_prefix}."


def find_family(model_type: str) -> Family:
    """Return the rules for a type of checkpoint.

    Raises:
        ValueError: there are none; the message lists the types that have some.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"The checkpoint is of type {model_type!r}, which has no FA model; types that have: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def find_auto_class(architecture: str) -> str | None:
    """Return the Auto class with the head of a stock class, such as "BertForMaskedLM"; None where no FA model has it.

    Raises:
        ValueError: the class attends causally.
    """
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"{architecture} attends causally; only encoders, which read both sides, can be converted.")
    return next((auto_class for ending, auto_class in AUTO_CLASSES.items() if architecture.endswith(ending)), None)


def check_encoder(config_fields: Mapping) -> None:
    """Raise ValueError if a configuration is of a decoder, or of positions that are relative."""
    for name in ("is_decoder", "add_cross_attention"):
        if config_fields.get(name):
            raise ValueError(
                f"The checkpoint has `{name}` set: it attends causally or across; only encoders can be converted."
            )
    kind = config_fields.get("position_embedding_type", "absolute")
    if str(kind).startswith("relative"):
        raise ValueError(
            f"The checkpoint has position_embedding_type {kind!r}: relative positions change each pair's attention "
            "score, which factorized attention never forms. Convert a checkpoint with absolute positions."
        )


def translate_fields(config_fields: dict, model_type: str) -> dict:
    """Translate a stock configuration into fields of ours; fields without a meaning here are left out.

    Raises:
        ValueError: it is of a variant that can't be converted.
    """
    family = find_family(model_type)
    config_class = family.config_class
    translated = translate_config(family.fields(config_fields), config_class.model_type, config_class.STOCK_MODEL_TYPES)
    ours = config_class()
    left_out = ("architectures", "auto_map", "transformers_version", "model_type", "is_decoder", "add_cross_attention")
    return {name: value for name, value in translated.items() if hasattr(ours, name) and name not in left_out}


def translate_tensors(tensors: Mapping[str, Tensor], config_fields: dict, model_type: str) -> list[StockTensor]:
    """Give every tensor of a checkpoint our name, with the base model's prefix, and say what was changed or dropped.

    Raises:
        ValueError: a tensor can't be carried over; the message names it.
    """
    family = FAMILIES[model_type]
    has_prefix = any(re.match(family.prefix, name) for name in tensors)
    translated = []
    for source, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", source))
        name = re.sub(family.prefix, family.our_prefix, name) if has_prefix else family.our_prefix + name
        dropped = first_match(DROPPED_FROM_TEXT, name)
        is_head = not name.startswith(family.our_prefix)
        action, reason = ("kept", "") if dropped is None else ("dropped", dropped)
        translated.append(StockTensor(source, family.rename(name), tensor, is_head, action, reason))
    return family.adapt(translated, config_fields)


def first_match(reasons: Mapping[str, str], name: str) -> str | None:
    """Return the reason beside the first pattern that occurs in a name; None where none does."""
    return next((reason for pattern, reason in reasons.items() if re.search(pattern, name)), None)


def head_difference(architecture: str, config_fields: Mapping, model_type: str) -> str | None:
    """Return the reason why the head of a stock class isn't ours; None where equal weights give equal outputs."""
    activation = config_fields.get("hidden_act", "gelu")
    if architecture.endswith("ForMaskedLM") and model_type in GELU_HEADS and activation != "gelu":
        return f"its head always applies GELU, ours the encoder's {activation}"
    return INEXACT_HEADS.get(architecture.removeprefix("LSG"))


def _rename_by(patterns: Mapping[str, str]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for pattern, replacement in patterns.items():
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def _find(tensors: list[StockTensor], name: str) -> StockTensor:
    for entry in tensors:
        if entry.name == name:
            return entry
    raise ValueError(f"The checkpoint lacks the tensor that would be {name}.")


def _unchanged(tensors: list[StockTensor], config_fields: dict) -> list[StockTensor]:
    return tensors


def _position_offset(config_fields: Mapping) -> int:
    """Rows of a RoBERTa position table that no token reads: it counts from the padding token's id + 1."""
    return config_fields["pad_token_id"] + 1


def _roberta_fields(config_fields: dict) -> dict:
    longest = config_fields["max_position_embeddings"] - _position_offset(config_fields)
    return config_fields | {"model_type": "bert", "max_position_embeddings": longest}


def _drop_offset_rows(tensors: list[StockTensor], config_fields: dict) -> list[StockTensor]:
    offset = _position_offset(config_fields)
    reason = f"the first {offset} rows, which no token reads, are dropped"
    return [
        replace(entry, tensor=entry.tensor[offset:], action="resized", reason=reason)
        if entry.name == "bert.embeddings.position_embeddings.weight"
        else entry
        for entry in tensors
    ]


def _electra_fields(config_fields: dict) -> dict:
    width, embedded = config_fields["hidden_size"], config_fields["embedding_size"]
    if width != embedded:
        raise ValueError(
            f"The tensor electra.embeddings_project.weight projects embeddings of width {embedded} to {width} after "
            "their layer norm, which FABert has no place for; only ELECTRA checkpoints of one width can be converted."
        )
    return config_fields | {"model_type": "bert"}


def _distilbert_fields(config_fields: dict) -> dict:
    renamed = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    }
    fields = config_fields | {ours: config_fields[theirs] for ours, theirs in renamed.items()}
    return fields | {"model_type": "bert", "type_vocab_size": 1, "layer_norm_eps": 1e-12}


def _add_token_types(tensors: list[StockTensor], config_fields: dict) -> list[StockTensor]:
    words = _find(tensors, "bert.embeddings.word_embeddings.weight").tensor
    name, reason = "bert.embeddings.token_type_embeddings.weight", "zeros: DistilBERT has no token types"
    return [*tensors, StockTensor(None, name, words.new_zeros(1, words.shape[1]), action="new", reason=reason)]


def _deit_fields(config_fields: dict) -> dict:
    return config_fields | {"model_type": "vit", "num_register_tokens": 1}


def _fold_distillation_token(tensors: list[StockTensor], config_fields: dict) -> list[StockTensor]:
    """Make the distillation token a register: those have no row in the position table, so it is added beforehand."""
    positions = _find(tensors, "vit.embeddings.position_embeddings")
    token = _find(tensors, "vit.embeddings.distillation_token")
    cls_row, token_row, patch_rows = positions.tensor.split([1, 1, positions.tensor.shape[1] - 2], dim=1)
    folded = [
        replace(
            positions,
            tensor=torch.cat([cls_row, patch_rows], dim=1),
            action="resized",
            reason="the distillation token's row moved into the register token",
        ),
        replace(
            token,
            name="vit.embeddings.register_tokens",
            tensor=token.tensor + token_row,
            reason="the distillation token, with its row of the position table added, is a register token",
        ),
    ]
    return [entry for entry in tensors if entry not in (positions, token)] + folded


def _shape_mask_token(tensors: list[StockTensor], config_fields: dict) -> list[StockTensor]:
    return [
        replace(entry, tensor=entry.tensor.reshape(1, 1, -1)) if entry.name == "vit.embeddings.mask_token" else entry
        for entry in tensors
    ]


_ROBERTA = Family(
    FABertConfig,
    r"^(roberta|xlm_roberta|camembert|longformer)\.",
    _rename_by(ROBERTA_NAME_PATTERNS),
    _roberta_fields,
    _drop_offset_rows,
)
_BERT = Family(FABertConfig, r"^bert\.", str, dict, _unchanged)
_VIT = Family(FAViTConfig, r"^vit\.", translate_vit_name, dict, _unchanged)
_DINOV2 = Family(FAViTConfig, r"^(dinov2_with_registers|dinov2)\.", translate_vit_name, dict, _shape_mask_token)
_DETR = Family(FADetrConfig, r"^model\.", _rename_by(DETR_NAME_PATTERNS), dict, _unchanged)
_CONDITIONAL_DETR = Family(
    FAConditionalDetrConfig, r"^model\.", _rename_by(CONDITIONAL_DETR_NAME_PATTERNS), dict, _unchanged
)

FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "longformer": _ROBERTA,
    "electra": replace(_BERT, prefix=r"^electra\.", rename=_rename_by(ELECTRA_NAME_PATTERNS), fields=_electra_fields),
    "distilbert": Family(
        FABertConfig, r"^distilbert\.", _rename_by(DISTILBERT_NAME_PATTERNS), _distilbert_fields, _add_token_types
    ),
    "vit": _VIT,
    "deit": replace(_VIT, prefix=r"^deit\.", fields=_deit_fields, adapt=_fold_distillation_token),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "detr": _DETR,
    "conditional_detr": _CONDITIONAL_DETR,
    "fa_bert": _BERT,
    "fa_vit": _VIT,
    "fa_detr": _DETR,
    "fa_conditional_detr": _CONDITIONAL_DETR,
}
