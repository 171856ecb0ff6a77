"""Factorized attention for Hugging Face Transformers: BERT- and ViT-class models linear in document and image size."""

from .attention_interface import supports
from .conversion.convert import Conversion, convert_checkpoint, extend_positions, load_factorized
from .data.collators import PackingCollator
from .hub.card import ModelFacts
from .hub.publish import publish
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
from .models.fa_block import FactorizedAttentionBlock
from .version import __version__

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
    "__version__",
]
