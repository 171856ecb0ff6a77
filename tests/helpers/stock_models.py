"""Tiny stock models of every type that converts, and how nearly softmax layers of ours reproduce them."""

from typing import Any

import transformers
from tiny_models import randomize
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2WithRegistersConfig, ViTConfig

# Twelve layers with sums of 1,536 float64 terms and values up to 100 keep 2^-53 · 2^7 · √1536 · 12 ≈ 2^-37.
TOLERANCE = {"rtol": 0.0, "atol": 2.0**-34}
# Stock DINOv2 interpolates positions in float32 whatever its dtype; we do so in the model's own, here float64. The
# rounding of a weighted sum of 16 values of order one, 16 · 2^-24, passes the layers, whose gain is below eight.
INTERPOLATED = {"rtol": 0.0, "atol": 2.0**-17}

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "intermediate_size": 48, "vocab_size": 60, "pad_token_id": 1}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
BERT = BertConfig(**SIZES, intermediate_size=48, vocab_size=60, max_position_embeddings=64)
VIT = ViTConfig(**IMAGES, intermediate_size=48, encoder_stride=8)
STOCK = {
    "bert": (BERT, "BertModel", "AutoModel"),
    "bert masked": (BERT, "BertForMaskedLM", "AutoModelForMaskedLM"),
    "bert pretraining": (BERT, "BertForPreTraining", "AutoModelForMaskedLM"),
    "bert sequence": (BERT, "BertForSequenceClassification", "AutoModelForSequenceClassification"),
    "bert tokens": (BERT, "BertForTokenClassification", "AutoModelForTokenClassification"),
    "bert answers": (BERT, "BertForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "bert choice": (BERT, "BertForMultipleChoice", "AutoModelForMultipleChoice"),
    "vit": (VIT, "ViTModel", "AutoModel"),
    "vit classes": (VIT, "ViTForImageClassification", "AutoModelForImageClassification"),
    "vit masked": (VIT, "ViTForMaskedImageModeling", "AutoModelForMaskedImageModeling"),
    "vit without bias": (ViTConfig(**IMAGES, intermediate_size=48, qkv_bias=False), "ViTModel", "AutoModel"),
    "dinov2": (Dinov2Config(**IMAGES), "Dinov2Model", "AutoModel"),
    "dinov2 registers": (Dinov2WithRegistersConfig(**IMAGES), "Dinov2WithRegistersModel", "AutoModel"),
}


def make_stock(class_name: str, fields: dict[str, Any]) -> Any:
    """Return a model of a class of transformers with random weights, in float64 and evaluation mode."""
    model_class = getattr(transformers, class_name)
    return randomize(model_class(model_class.config_class(**fields)).eval()).double()


def stock_bert(**fields: Any) -> BertModel:
    """Return a BERT encoder of `TEXT`'s sizes with random weights, in float64."""
    return make_stock("BertModel", {**TEXT, "max_position_embeddings": 16, **fields})
