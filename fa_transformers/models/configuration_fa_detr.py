"""Configurations of DETR and Conditional DETR with a factorized encoder: stock fields and a factorized layer's."""

from transformers import ConditionalDetrConfig, DetrConfig, ResNetConfig

from .configuration_fa import FACTORIZED_FIELDS, FactorizedFields, check_content, warn_of_misspelt
from .configuration_fa_resnet import FAResNetConfig
from .configuration_fa_vit import FAViTConfig

# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. The import
# can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .fa_checkpoint_names import translate_config  # noqa: F401

OWN_BACKBONES = {FAResNetConfig.model_type: FAResNetConfig, FAViTConfig.model_type: FAViTConfig}
BACKBONE_FIELDS = ("backbone_config", "backbone", "use_timm_backbone")
"""Fields of stock configurations that choose the backbone; the last two are of those that transformers 4 wrote."""


class FADetrFields(FactorizedFields):
    """A base of the two configurations. The factorized fields' layers, heads and width are the encoder's."""

    # Names that the factorized layers and transformers read -> DETR's own.
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "attention_probs_dropout_prob": "attention_dropout",
    }

    def __init__(self, **kwargs):
        check_content(kwargs)
        warn_of_misspelt(kwargs)
        backbone = kwargs.get("backbone_config")
        if not any(kwargs.get(name) for name in BACKBONE_FIELDS):
            kwargs["backbone_config"] = ResNetConfig(out_features=["stage4"])
        elif isinstance(backbone, dict) and backbone.get("model_type") in OWN_BACKBONES:
            # In a process without the package, transformers knows no type of ours.
            fields = {name: value for name, value in backbone.items() if name != "model_type"}
            kwargs["backbone_config"] = OWN_BACKBONES[backbone["model_type"]](**fields)
        factorized = {name: kwargs.pop(name) for name in FACTORIZED_FIELDS if name in kwargs}
        kwargs.setdefault("auto_map", dict(self.AUTO_MAP))
        super().__init__(**kwargs)
        self.set_factorized_fields(**factorized)
        self.check_fields()

    def check_fields(self):
        """Raise ValueError, naming the field, if a value cannot be used."""
        for name in ("d_model", "encoder_layers", "encoder_attention_heads", "num_queries", "num_labels"):
            self.check_integer(name, minimum=1)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`d_model` ({self.hidden_size}) must divide by `encoder_attention_heads` ({self.num_attention_heads})."
            )
        self.check_factorized_fields()


class FADetrConfig(FADetrFields, DetrConfig):
    """Configuration of DETR whose encoder is factorized; reads stock DETR configurations too.

    Without arguments it has the size of transformers' own, some 40 M parameters. A small one has a small backbone:

        backbone = FAResNetConfig(out_features=["stage3"])  # its last map, at a stride of 16 pixels
        config = FADetrConfig(backbone_config=backbone, d_model=64, encoder_layers=2, decoder_layers=2,
                      encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
                      num_queries=20)

    Args:
        backbone_config: of a backbone of transformers, or "fa_resnet" or "fa_vit". None is transformers' ResNet-50,
            without the package timm that stock DETR's own default needs.
        kwargs: the fields of `FactorizedFields`, whose layers and heads are the encoder's, and of transformers'
            `DetrConfig`.

    Raises:
        ValueError: a field has a value that cannot be used; the message names it.
    """

    model_type = "fa_detr"
    STOCK_MODEL_TYPES = ("detr",)
    AUTO_MAP = {
        "AutoConfig": "configuration_fa_detr.FADetrConfig",
        "AutoModel": "modeling_fa_detr.FADetrModel",
        "AutoModelForObjectDetection": "modeling_fa_detr.FADetrForObjectDetection",
    }

    def __init__(self, **kwargs):
        # Written out: of a class without its own, transformers makes a dataclass, whose __init__ passes the mixin by.
        super().__init__(**kwargs)


class FAConditionalDetrConfig(FADetrFields, ConditionalDetrConfig):
    """Configuration of Conditional DETR whose encoder is factorized; reads stock configurations too.

    Without arguments it has the size of transformers' own, some 40 M parameters. A small one has a small backbone:

        backbone = FAResNetConfig(out_features=["stage3"])  # its last map, at a stride of 16 pixels
        config = FAConditionalDetrConfig(backbone_config=backbone, d_model=64, encoder_layers=2, decoder_layers=2,
                      encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
                      num_queries=20)

    Args:
        backbone_config: of a backbone of transformers, or "fa_resnet" or "fa_vit". None is transformers' ResNet-50,
            without the package timm that stock DETR's own default needs.
        kwargs: the fields of `FactorizedFields`, whose layers and heads are the encoder's, and of transformers'
            `ConditionalDetrConfig`.

    Raises:
        ValueError: a field has a value that cannot be used; the message names it.
    """

    model_type = "fa_conditional_detr"
    STOCK_MODEL_TYPES = ("conditional_detr",)
    AUTO_MAP = {
        "AutoConfig": "configuration_fa_detr.FAConditionalDetrConfig",
        "AutoModel": "modeling_fa_detr.FAConditionalDetrModel",
        "AutoModelForObjectDetection": "modeling_fa_detr.FAConditionalDetrForObjectDetection",
    }

    def __init__(self, **kwargs):
        # Written out: of a class without its own, transformers makes a dataclass, whose __init__ passes the mixin by.
        super().__init__(**kwargs)
