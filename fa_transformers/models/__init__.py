"""The FA models. This file is not shipped with a model folder; the others here are.

`ARCHITECTURES` is the one table of what exists: it registers the Auto classes and drives the tests. A configuration's
`AUTO_MAP` names the same classes for remote loading.
"""

from typing import Any

import transformers

from .configuration_fa_bert import FABertConfig
from .configuration_fa_vit import FAViTConfig
from .fa_attention import factorized_attention
from .fa_sequence_parallel import sequence_parallel
from .modeling_fa_bert import (
    FABertForMaskedLM,
    FABertForMultipleChoice,
    FABertForQuestionAnswering,
    FABertForSequenceClassification,
    FABertForTokenClassification,
    FABertModel,
)
from .modeling_fa_vit import FAViTForImageClassification, FAViTForMaskedImageModeling, FAViTModel

ARCHITECTURES: dict[type[FABertConfig] | type[FAViTConfig], dict[str, Any]] = {
    FABertConfig: {
        "AutoModel": FABertModel,
        "AutoModelForMaskedLM": FABertForMaskedLM,
        "AutoModelForSequenceClassification": FABertForSequenceClassification,
        "AutoModelForTokenClassification": FABertForTokenClassification,
        "AutoModelForQuestionAnswering": FABertForQuestionAnswering,
        "AutoModelForMultipleChoice": FABertForMultipleChoice,
    },
    FAViTConfig: {
        "AutoModel": FAViTModel,
        "AutoModelForImageClassification": FAViTForImageClassification,
        "AutoModelForMaskedImageModeling": FAViTForMaskedImageModeling,
    },
}

for config_class, heads in ARCHITECTURES.items():
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class("AutoConfig")
    for auto_class, model_class in heads.items():
        getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class)

__all__ = [
    "ARCHITECTURES",
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
    "factorized_attention",
    "sequence_parallel",
]
