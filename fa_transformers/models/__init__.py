"""The FA models. This file is not shipped with a model folder; the others here are.

How a forward pass of FABert runs, file by file (FAViT has `vit` for `bert`):

    modeling_fa_bert   A head, or the model, takes the inputs. `modeling_fa` has loading, poolings, losses.
    fa_layout          Checks them (`fa_validation`) and makes the one `Layout` that every later step is handed: mask,
                       patch grid, packed documents (`fa_packed`), process (`fa_sequence_parallel`), chunk size.
    fa_bert_layers     Embeds the tokens; `fa_layers` runs layer after layer, chunk by chunk if asked to (`fa_chunked`).
    fa_mixer           Mixes a layer's tokens: feature maps, factorized term, window and convolution (`fa_local`).
    fa_attention       Computes the factorized term: in plain PyTorch, in blocks that fit a CPU's cache
                       (`fa_attention_blocked`, `fa_context`) or by Triton (`fa_attention_triton`, `fa_triton_kernels`).
    fa_bert_layers     Ends the layer, token by token: output projection, residuals, feed-forward part.
    modeling_fa_bert   Pools, answers and computes the loss.

`fa_rle` reads and writes masks as COCO stores them, with numpy alone; `fa_pictures` has what image processors share.

`configuration_fa_bert` has the sizes and options of it all, `fa_checkpoint_names` reads stock checkpoints, and
`fa_block` is the paper's module for feature maps, which needs the operator alone.

`ARCHITECTURES` is the one table of what exists: it registers the Auto classes and drives the tests. `ENCODERS` are the
rows with a `FactorizedConfig`, which have an "AutoModel" and layers; other rows need not. Adding an architecture takes
three edits: its files, its row in the table, and its configuration's `AUTO_MAP`, which names the same classes for
remote loading. An image processor of its own is named in `IMAGE_PROCESSORS`; saved beside the weights, it brings its
code and its own entry for remote loading.
"""

from typing import Any

import transformers
from transformers import PretrainedConfig

from .configuration_fa import FactorizedConfig
from .configuration_fa_bert import FABertConfig
from .configuration_fa_dense import FADenseConfig
from .configuration_fa_detr import FAConditionalDetrConfig, FADetrConfig
from .configuration_fa_resnet import FAResNetConfig
from .configuration_fa_stereo import FAStereoConfig
from .configuration_fa_vit import FAViTConfig
from .fa_attention import factorized_attention
from .fa_sequence_parallel import sequence_parallel
from .image_processing_fa_dense import FADenseImageProcessor
from .image_processing_fa_stereo import FAStereoImageProcessor
from .image_processing_fa_vit import FAViTImageProcessor
from .modeling_fa_bert import (
    FABertForMaskedLM,
    FABertForMultipleChoice,
    FABertForQuestionAnswering,
    FABertForSequenceClassification,
    FABertForTokenClassification,
    FABertModel,
)
from .modeling_fa_dense import FADenseForInstanceSegmentation, FADenseForObjectDetection
from .modeling_fa_detr import (
    FAConditionalDetrForObjectDetection,
    FAConditionalDetrModel,
    FADetrForObjectDetection,
    FADetrModel,
)
from .modeling_fa_resnet import FAResNetBackbone
from .modeling_fa_stereo import FAStereoForDepthEstimation
from .modeling_fa_vit import FAViTBackbone, FAViTForImageClassification, FAViTForMaskedImageModeling, FAViTModel
from .pipeline_fa_stereo import FAStereoPipeline
from .tokenization_fa_bert import FABertTokenizerFast

ARCHITECTURES: dict[type[PretrainedConfig], dict[str, Any]] = {
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
        "AutoBackbone": FAViTBackbone,
        "AutoModelForImageClassification": FAViTForImageClassification,
        "AutoModelForMaskedImageModeling": FAViTForMaskedImageModeling,
    },
    FAResNetConfig: {"AutoBackbone": FAResNetBackbone},
    FAStereoConfig: {"AutoModelForDepthEstimation": FAStereoForDepthEstimation},
    FADenseConfig: {
        "AutoModelForObjectDetection": FADenseForObjectDetection,
        "AutoModelForInstanceSegmentation": FADenseForInstanceSegmentation,
        "AutoModelForImageSegmentation": FADenseForInstanceSegmentation,
    },
    FADetrConfig: {"AutoModel": FADetrModel, "AutoModelForObjectDetection": FADetrForObjectDetection},
    FAConditionalDetrConfig: {
        "AutoModel": FAConditionalDetrModel,
        "AutoModelForObjectDetection": FAConditionalDetrForObjectDetection,
    },
}

ENCODERS: dict[type[FactorizedConfig], dict[str, Any]] = {
    config_class: heads for config_class, heads in ARCHITECTURES.items() if issubclass(config_class, FactorizedConfig)
}
IMAGE_PROCESSORS: dict[type[PretrainedConfig], Any] = {
    FADenseConfig: FADenseImageProcessor,
    FAStereoConfig: FAStereoImageProcessor,
    FAViTConfig: FAViTImageProcessor,
}

for config_class, heads in ARCHITECTURES.items():
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class("AutoConfig")
    for auto_class, model_class in heads.items():
        getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class)
for config_class, processor_class in IMAGE_PROCESSORS.items():
    transformers.AutoImageProcessor.register(config_class, processor_class, exist_ok=True)
    processor_class.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "ARCHITECTURES",
    "ENCODERS",
    "IMAGE_PROCESSORS",
    "FABertConfig",
    "FABertForMaskedLM",
    "FABertForMultipleChoice",
    "FABertForQuestionAnswering",
    "FABertForSequenceClassification",
    "FABertForTokenClassification",
    "FABertModel",
    "FABertTokenizerFast",
    "FAConditionalDetrConfig",
    "FAConditionalDetrForObjectDetection",
    "FAConditionalDetrModel",
    "FADenseConfig",
    "FADenseForInstanceSegmentation",
    "FADenseForObjectDetection",
    "FADenseImageProcessor",
    "FADetrConfig",
    "FADetrForObjectDetection",
    "FADetrModel",
    "FAResNetBackbone",
    "FAResNetConfig",
    "FAStereoConfig",
    "FAStereoForDepthEstimation",
    "FAStereoImageProcessor",
    "FAStereoPipeline",
    "FAViTBackbone",
    "FAViTConfig",
    "FAViTForImageClassification",
    "FAViTForMaskedImageModeling",
    "FAViTImageProcessor",
    "FAViTModel",
    "factorized_attention",
    "sequence_parallel",
]
