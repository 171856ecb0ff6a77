"""Factorized attention for Hugging Face Transformers: BERT- and ViT-class models linear in document and image size.

Importing the package registers its models with transformers' Auto classes. What else it offers is loaded when it is
first asked for, so that an import is quick and needs none of the optional packages.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .attention_interface import FactorizedAttentionError, supports, why_unsupported
    from .conversion.convert import (
        Conversion,
        TensorChange,
        convert_checkpoint,
        extend_positions,
        load_factorized,
    )
    from .conversion.source import CheckpointSource
    from .data.collators import PackingCollator
    from .data.facts import DataFacts
    from .data.readers.tables import DataError
    from .distillation.distill import DistillationResult, distill
    from .distillation.job import DistillationPlan
    from .explain.attention import attention_received, attention_rows, context_maps, effective_support, rollout
    from .explain.attribution import attribute
    from .explain.deletion import Faithfulness, faithfulness
    from .explain.units import passage_units, patch_units, sentence_units
    from .hub.card import ModelFacts, ScoreFacts, SpeedFacts
    from .hub.certificate import Certificate, CheckFacts
    from .hub.facts import FactError
    from .hub.login import PushError
    from .hub.publish import PublishError, certify, check_folder, publish
    from .hub.push import push
    from .hub.self_check import SelfTestError
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
        FAConditionalDetrConfig,
        FAConditionalDetrForObjectDetection,
        FAConditionalDetrModel,
        FADenseConfig,
        FADenseForInstanceSegmentation,
        FADenseForObjectDetection,
        FADenseImageProcessor,
        FADetrConfig,
        FADetrForObjectDetection,
        FADetrModel,
        FAResNetBackbone,
        FAResNetConfig,
        FAStereoConfig,
        FAStereoForDepthEstimation,
        FAStereoImageProcessor,
        FAStereoPipeline,
        FAViTBackbone,
        FAViTConfig,
        FAViTForImageClassification,
        FAViTForMaskedImageModeling,
        FAViTImageProcessor,
        FAViTModel,
        factorized_attention,
        sequence_parallel,
    )
    from .models.configuration_fa import FactorizedConfig
    from .models.fa_block import FactorizedAttentionBlock
    from .models.fa_packed import PackedDocuments
    from .options import CardOptions, DataOptions, DistillationOptions, LoopOptions, ModelOptions
    from .prediction.answers import Prediction
    from .prediction.explaining import explain_document, explain_image
    from .prediction.explanation import Deletion, DocumentExplanation, Explanation, ImageExplanation, Passage, Scores
    from .prediction.explanation_page import write_explanation
    from .prediction.lengths import score_at_lengths
    from .prediction.predictor import Predictor
    from .training.checkpointing import CheckpointError
    from .training.dense import finetune_dense
    from .training.dense_recipe import DenseDataOptions, DenseModelOptions
    from .training.finetune import finetune
    from .training.job import FinetuneResult
    from .training.plan import RunPlan
    from .training.stereo import finetune_stereo
    from .training.stereo_recipe import StereoDataOptions, StereoModelOptions

__all__ = [
    # Train: data in, a scored model in a folder out.
    "finetune",
    "FinetuneResult",
    "RunPlan",
    "finetune_dense",
    "DenseDataOptions",
    "DenseModelOptions",
    "finetune_stereo",
    "StereoDataOptions",
    "StereoModelOptions",
    "distill",
    "DistillationResult",
    "DistillationPlan",
    "DataOptions",
    "ModelOptions",
    "LoopOptions",
    "DistillationOptions",
    "CardOptions",
    "PackingCollator",
    "fa_lora_config",
    "DataError",
    "CheckpointError",
    # Predict: a trained model in, its answers to any number of texts or images out.
    "Predictor",
    "Prediction",
    "score_at_lengths",
    # Explain: what an answer and each layer's attention rest on.
    "attribute",
    "faithfulness",
    "Faithfulness",
    "sentence_units",
    "passage_units",
    "patch_units",
    "rollout",
    "attention_rows",
    "attention_received",
    "context_maps",
    "effective_support",
    "explain_document",
    "explain_image",
    "write_explanation",
    "Explanation",
    "DocumentExplanation",
    "ImageExplanation",
    "Scores",
    "Deletion",
    "Passage",
    # Convert: a stock checkpoint in, an FA model out.
    "convert_checkpoint",
    "Conversion",
    "TensorChange",
    "CheckpointSource",
    "load_factorized",
    "extend_positions",
    # Publish: a folder that loads anywhere, and its way to the Hub.
    "publish",
    "check_folder",
    "push",
    "certify",
    "Certificate",
    "CheckFacts",
    "ModelFacts",
    "DataFacts",
    "ScoreFacts",
    "SpeedFacts",
    "FactError",
    "PublishError",
    "PushError",
    "SelfTestError",
    # Models.
    "FactorizedConfig",
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
    "FAViTBackbone",
    "FAViTImageProcessor",
    "FAResNetConfig",
    "FAResNetBackbone",
    "FADenseConfig",
    "FADenseForObjectDetection",
    "FADenseForInstanceSegmentation",
    "FADenseImageProcessor",
    "FAStereoConfig",
    "FAStereoForDepthEstimation",
    "FAStereoImageProcessor",
    "FAStereoPipeline",
    "FADetrConfig",
    "FADetrForObjectDetection",
    "FADetrModel",
    "FAConditionalDetrConfig",
    "FAConditionalDetrForObjectDetection",
    "FAConditionalDetrModel",
    # The operator, alone and in stock models.
    "factorized_attention",
    "FactorizedAttentionBlock",
    "FactorizedAttentionError",
    "PackedDocuments",
    "sequence_parallel",
    "supports",
    "why_unsupported",
    # Plan.
    "estimate_memory",
    "MemoryEstimate",
    "__version__",
]
# Where each name is, below this package.
_HOMES = {
    ".attention_interface": ("FactorizedAttentionError", "supports", "why_unsupported"),
    ".conversion.convert": (
        "Conversion", "TensorChange", "convert_checkpoint", "extend_positions", "load_factorized",
    ),
    ".conversion.source": ("CheckpointSource",),
    ".data.collators": ("PackingCollator",),
    ".data.facts": ("DataFacts",),
    ".data.readers.tables": ("DataError",),
    ".distillation.distill": ("DistillationResult", "distill"),
    ".distillation.job": ("DistillationPlan",),
    ".explain.attention": (
        "attention_received", "attention_rows", "context_maps", "effective_support", "rollout",
    ),
    ".explain.attribution": ("attribute",),
    ".explain.deletion": ("Faithfulness", "faithfulness"),
    ".explain.units": ("passage_units", "patch_units", "sentence_units"),
    ".hub.card": ("ModelFacts", "ScoreFacts", "SpeedFacts"),
    ".hub.certificate": ("Certificate", "CheckFacts"),
    ".hub.facts": ("FactError",),
    ".hub.login": ("PushError",),
    ".hub.publish": ("PublishError", "certify", "check_folder", "publish"),
    ".hub.push": ("push",),
    ".hub.self_check": ("SelfTestError",),
    ".lora": ("fa_lora_config",),
    ".memory": ("MemoryEstimate", "estimate_memory"),
    ".models": (
        "FABertConfig", "FABertForMaskedLM", "FABertForMultipleChoice", "FABertForQuestionAnswering",
        "FABertForSequenceClassification", "FABertForTokenClassification", "FABertModel", "FAConditionalDetrConfig",
        "FAConditionalDetrForObjectDetection", "FAConditionalDetrModel", "FADenseConfig",
        "FADenseForInstanceSegmentation", "FADenseForObjectDetection", "FADenseImageProcessor", "FADetrConfig",
        "FADetrForObjectDetection", "FADetrModel", "FAResNetBackbone", "FAResNetConfig", "FAStereoConfig",
        "FAStereoForDepthEstimation", "FAStereoImageProcessor", "FAStereoPipeline", "FAViTBackbone", "FAViTConfig",
        "FAViTForImageClassification", "FAViTForMaskedImageModeling", "FAViTImageProcessor", "FAViTModel",
        "factorized_attention", "sequence_parallel",
    ),
    ".models.configuration_fa": ("FactorizedConfig",),
    ".models.fa_block": ("FactorizedAttentionBlock",),
    ".models.fa_packed": ("PackedDocuments",),
    ".options": ("CardOptions", "DataOptions", "DistillationOptions", "LoopOptions", "ModelOptions"),
    ".prediction.answers": ("Prediction",),
    ".prediction.explaining": ("explain_document", "explain_image"),
    ".prediction.explanation": (
        "Deletion", "DocumentExplanation", "Explanation", "ImageExplanation", "Passage", "Scores",
    ),
    ".prediction.explanation_page": ("write_explanation",),
    ".prediction.lengths": ("score_at_lengths",),
    ".prediction.predictor": ("Predictor",),
    ".training.checkpointing": ("CheckpointError",),
    ".training.dense": ("finetune_dense",),
    ".training.dense_recipe": ("DenseDataOptions", "DenseModelOptions"),
    ".training.finetune": ("finetune",),
    ".training.job": ("FinetuneResult",),
    ".training.plan": ("RunPlan",),
    ".training.stereo": ("finetune_stereo",),
    ".training.stereo_recipe": ("StereoDataOptions", "StereoModelOptions"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_own_command() -> bool:
    """True in a process that one of our commands started: it parses its flags before it loads torch and the models."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    is_module = program.name == "-m" and any(word.startswith(f"{__name__}.commands") for word in sys.orig_argv)
    is_script = (
        program.suffix == ".py" and program.absolute().parent == Path(__file__).absolute().parents[1] / "scripts"
    )
    return is_module or is_script or program.name == "fa-transformers"


if not _is_own_command():
    importlib.import_module(".models", __name__)  # registers the models with transformers' Auto classes
    importlib.import_module(".attention_interface", __name__)  # registers attn_implementation="factorized"
