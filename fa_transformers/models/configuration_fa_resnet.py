"""Configuration of FAResNet: stock ResNet's fields, and where attention blocks stand."""

from transformers import PretrainedConfig, ResNetConfig

from .configuration_fa import CheckedConfig, StagesConfig
from .fa_checkpoint_names import translate_config

LAYER_TYPES = ("basic", "bottleneck")
NORM_TYPES = ("batch", "group")
ATTENTION_KINDS = ("factorized", "softmax")
NORM_GROUPS = 8
"""Groups of each norm under `norm_type` "group", which must divide the channels; half the channels if those are 8."""
STOCK_FIELDS = (
    "num_channels",
    "embedding_size",
    "hidden_sizes",
    "depths",
    "layer_type",
    "hidden_act",
    "downsample_in_first_stage",
    "downsample_in_bottleneck",
)


class FAResNetConfig(CheckedConfig, StagesConfig, PretrainedConfig):
    """Configuration of `FAResNetBackbone`; reads stock ResNet configurations too. The default has 0.8 M parameters.

    Args:
        num_channels: channels of an image.
        embedding_size: channels of the stem.
        hidden_sizes: channels of each stage's map, at strides of 4, 8, 16 and 32 pixels and so on.
        depths: residual layers of each stage.
        layer_type: "basic" (two 3×3 convolutions) or "bottleneck" (1×1, 3×3, 1×1).
        hidden_act: activation, a key of transformers' ACT2FN.
        downsample_in_first_stage: whether the first stage halves the map as well.
        downsample_in_bottleneck: whether the first 1×1 convolution of a bottleneck halves the map, not the 3×3 one.
        attention_stages: names of the stages after which an attention block stands, such as ["stage3", "stage4"]. A
            block starts as the identity, so that stock weights compute what they did.
        attention_kind: "factorized", or "softmax", which is quadratic in the pixels, to compare with.
        key_channels: channels of queries and keys in each block; None is half the channels of its map.
        attention_heads: heads of each block.
        norm_type: "batch", as stock checkpoints have it, or "group", in `NORM_GROUPS` groups. Transformers' DETR-family
            heads replace each batch norm of their backbone, so those of this one, by a copy that is never trained and
            keeps its statistics: right for trained weights, while a network that starts from random weights in such a
            head needs "group". DETR freezes all other weights of a backbone with "resnet" in its type as well, blocks
            included, until `model.model.unfreeze_backbone()`. Heads of ours leave batch norms and weights as they are.
        out_features, out_indices: stages whose maps are returned, by name or index in `stage_names`; the last one by
            default.
        kwargs: the fields of transformers' `PretrainedConfig`.

    Raises:
        ValueError: a field has a value that cannot be used; the message names it.
    """

    model_type = "fa_resnet"
    STOCK_MODEL_TYPES = ("resnet",)
    AUTO_MAP = {
        "AutoConfig": "configuration_fa_resnet.FAResNetConfig",
        "AutoBackbone": "modeling_fa_resnet.FAResNetBackbone",
    }

    def __init__(
        self,
        num_channels=3,
        embedding_size=16,
        hidden_sizes=(32, 64, 128, 160),
        depths=(1, 1, 1, 1),
        layer_type="basic",
        hidden_act="relu",
        downsample_in_first_stage=False,
        downsample_in_bottleneck=False,
        attention_stages=("stage3", "stage4"),
        attention_kind="factorized",
        key_channels=None,
        attention_heads=1,
        norm_type="batch",
        out_features=None,
        out_indices=None,
        **kwargs,
    ):
        kwargs.setdefault("auto_map", dict(self.AUTO_MAP))
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.hidden_sizes = as_list(hidden_sizes)
        self.depths = as_list(depths)
        self.layer_type = layer_type
        self.hidden_act = hidden_act
        self.downsample_in_first_stage = downsample_in_first_stage
        self.downsample_in_bottleneck = downsample_in_bottleneck
        self.attention_stages = as_list(attention_stages)
        self.attention_kind = attention_kind
        self.key_channels = key_channels
        self.attention_heads = attention_heads
        self.norm_type = norm_type
        self.check_stages()
        self.choose_stages(out_features, out_indices)
        self.check_fields()

    @property
    def stage_names(self):
        """Names of the stages, finest first: "stem", "stage1" and so on."""
        # The library prints overridden configurations before they can be checked.
        count = len(self.depths) if isinstance(self.depths, list) else 0
        return ["stem", *(f"stage{number}" for number in range(1, count + 1))]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.translate(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(cls.translate(config_dict), **kwargs)

    @classmethod
    def translate(cls, config_dict):
        """Return a stock ResNet's configuration as one of ours, with all of its sizes; ours comes back as it is."""
        translated = translate_config(config_dict, cls.model_type, cls.STOCK_MODEL_TYPES)
        if translated is not config_dict:
            del translated["recovery"]  # nothing to recover: blocks start as the identity
            stock = ResNetConfig()
            translated = {name: getattr(stock, name) for name in STOCK_FIELDS} | translated
        translated.pop("stage_names", None)
        return translated

    def check_fields(self):
        self.check_stages()
        self.verify_out_features_out_indices()
        for name in ("num_channels", "embedding_size", "attention_heads", "num_labels"):
            self.check_integer(name, minimum=1)
        if self.key_channels is not None:
            self.check_integer("key_channels", minimum=1)
            if self.key_channels % self.attention_heads:
                raise ValueError(
                    f"`key_channels` ({self.key_channels}) must be a multiple of `attention_heads` "
                    f"({self.attention_heads})."
                )
        self.check_choice("layer_type", LAYER_TYPES)
        self.check_choice("norm_type", NORM_TYPES)
        self.check_choice("attention_kind", ATTENTION_KINDS)
        self.check_activation("hidden_act")
        for name in ("downsample_in_first_stage", "downsample_in_bottleneck"):
            self.check_boolean(name)
        if not isinstance(self.attention_stages, list) or any(
            name not in self.stage_names for name in self.attention_stages
        ):
            raise ValueError(
                f"`attention_stages` must be a list of names from {self.stage_names}, got {self.attention_stages!r}."
            )
        widths = dict(zip(self.stage_names, [self.embedding_size, *self.hidden_sizes], strict=True))
        for name in self.attention_stages:
            if widths[name] % self.attention_heads:
                raise ValueError(
                    f"`attention_heads` ({self.attention_heads}) must divide the {widths[name]} channels of {name}."
                )
        inner = [size // 4 for size in self.hidden_sizes] if self.layer_type == "bottleneck" else []
        if self.norm_type == "group" and any(
            width % NORM_GROUPS or not width for width in (self.embedding_size, *self.hidden_sizes, *inner)
        ):
            raise ValueError(
                f'`norm_type` "group" needs channels that divide by {NORM_GROUPS} everywhere, also inside bottlenecks.'
            )

    def check_stages(self):
        """Raise ValueError unless `hidden_sizes` and `depths` are counts of as many stages."""
        for name in ("hidden_sizes", "depths"):
            value = getattr(self, name)
            if not isinstance(value, list) or not value or any(type(count) is not int or count < 1 for count in value):
                raise ValueError(f"`{name}` must be a list of positive integers, one a stage, got {value!r}.")
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"`hidden_sizes` ({self.hidden_sizes}) and `depths` ({self.depths}) must have one entry a stage."
            )


def as_list(value):
    """Return a tuple as the list that a file gives back; other values as they are."""
    return list(value) if isinstance(value, tuple) else value
