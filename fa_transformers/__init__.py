"""Factorized attention for Hugging Face Transformers: BERT- and ViT-class models linear in document and image size."""

from .attention_interface import supports
from .block import FactorizedAttentionBlock
from .card import ModelFacts
from .convert import Conversion, convert_checkpoint, extend_positions, load_factorized
from .lora import fa_lora_config
from .memory import MemoryEstimate, estimate_memory
from .models import (
    FABertConfig,
    FABertForMaskedLM,
    FABertForMultipleChoice,
    FABertForQuestionAnswering,
    FABertForSequenceClassification,
    FABertForTokenClassification,
    FABertModel,
    FAViTConfig,
    FAViTForImageClassification,
    FAViTForMaskedImageModeling,
    FAViTModel,
    factorized_attention,
    sequence_parallel,
)
from .packing import PackingCollator
from .publish import publish

__version__ = "0.1.0"

__all__ = [
    "Conversion",
    "FABertConfig",
    "FABertForMaskedLM",
    "FABertForMultipleChoice",
    "FABertForQuestionAnswering",
    "FABertForSequenceClassification",
    "FABertForTokenClassification",
    "FABertModel",
    "FAViTConfig",
    "FAViTForImageClassification",
    "FAViTForMaskedImageModeling",
    "FAViTModel",
    "FactorizedAttentionBlock",
    "MemoryEstimate",
    "ModelFacts",
    "PackingCollator",
    "convert_checkpoint",
    "estimate_memory",
    "extend_positions",
    "fa_lora_config",
    "factorized_attention",
    "load_factorized",
    "publish",
    "sequence_parallel",
    "supports",
]
