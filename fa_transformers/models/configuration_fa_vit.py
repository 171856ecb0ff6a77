"""Configuration of FAViT: stock ViT's fields, layer scale and register tokens, and those of factorized attention."""

from .configuration_fa import FactorizedConfig, StagesConfig

# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. The import
# can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .fa_checkpoint_names import translate_config  # noqa: F401


class FAViTConfig(StagesConfig, FactorizedConfig):
    """Configuration of the FAViT models; reads stock ViT and DINOv2 (with and without registers) configurations too.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: widths and counts as in ViT.
        hidden_act: activation of the feed-forward part, a key of transformers' ACT2FN.
        hidden_dropout_prob: dropout on embeddings and sub-layer outputs.
        attention_probs_dropout_prob: kept for checkpoints' sake. It acts in `softmax_layers`; factorized layers have no
            attention probabilities to drop.
        initializer_range: standard deviation of fresh weights.
        layer_norm_eps: epsilon of the layer norms.
        image_size: native size in pixels, one integer or (height, width). Images of any other size run too.
        patch_size: patch side in pixels, one integer or (height, width).
        num_channels: channels of an image.
        qkv_bias: whether the Q, K and V projections have a bias.
        encoder_stride: pixels per patch side that masked image modelling reconstructs; equals `patch_size` there.
        pooler_output_size: width of the pooler; None means `hidden_size`.
        pooler_act: activation of the pooler.
        layerscale_value: start of the per-channel factors on both sub-layers, as in DINOv2; None is without.
        position_embedding_antialias: whether positions are smoothed where they are interpolated to a smaller grid, as
            DINOv2 with registers does. ViT and DINOv2 do not.
        num_register_tokens: extra tokens between CLS and the patches, as in DINOv2 with registers.
        out_features, out_indices: layers whose outputs `FAViTBackbone` returns, by name or index in `stage_names`; the
            last one by default. No other model reads these and the next two.
        apply_layernorm: whether the backbone normalises its maps by the encoder's last norm.
        reshape_hidden_states: whether the backbone returns maps [B, C, rows, columns] of the patches, or all tokens
            [B, N, C].
        kwargs: the fields of `FactorizedConfig` and of transformers' `PretrainedConfig`.

    Raises:
        ValueError: a field has a value that cannot be used; the message names it.
    """

    model_type = "fa_vit"
    STOCK_MODEL_TYPES = ("vit", "dinov2", "dinov2_with_registers")
    AUTO_MAP = {
        "AutoConfig": "configuration_fa_vit.FAViTConfig",
        "AutoModel": "modeling_fa_vit.FAViTModel",
        "AutoBackbone": "modeling_fa_vit.FAViTBackbone",
        "AutoModelForImageClassification": "modeling_fa_vit.FAViTForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_fa_vit.FAViTForMaskedImageModeling",
    }

    def __init__(
        self,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
        image_size=224,
        patch_size=16,
        num_channels=3,
        qkv_bias=True,
        encoder_stride=16,
        pooler_output_size=None,
        pooler_act="tanh",
        layerscale_value=None,
        num_register_tokens=0,
        position_embedding_antialias=False,
        out_features=None,
        out_indices=None,
        apply_layernorm=True,
        reshape_hidden_states=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.qkv_bias = qkv_bias
        self.encoder_stride = encoder_stride
        self.pooler_output_size = hidden_size if pooler_output_size is None else pooler_output_size
        self.pooler_act = pooler_act
        self.layerscale_value = layerscale_value
        self.num_register_tokens = num_register_tokens
        self.position_embedding_antialias = position_embedding_antialias
        self.apply_layernorm = apply_layernorm
        self.reshape_hidden_states = reshape_hidden_states
        self.check_integer("num_hidden_layers", minimum=1)
        self.choose_stages(out_features, out_indices)
        self.check_fields()

    @property
    def stage_names(self):
        """Names of what a backbone can return: "stem" (the embeddings), then "stage1" and so on, one a layer."""
        # The library prints overridden configurations before they can be checked.
        count = self.num_hidden_layers if isinstance(self.num_hidden_layers, int) else 0
        return ["stem", *(f"stage{number}" for number in range(1, count + 1))]

    @property
    def patch_shape(self):
        """(height, width) of a patch in pixels."""
        return _pair(self.patch_size)

    @property
    def native_grid(self):
        """(rows, columns) of patches at the native image size."""
        return tuple(size // patch for size, patch in zip(_pair(self.image_size), self.patch_shape, strict=True))

    def check_fields(self):
        super().check_fields()
        for name in ("num_channels", "encoder_stride", "pooler_output_size"):
            self.check_integer(name, minimum=1)
        self.check_integer("num_register_tokens", minimum=0)
        for name in ("qkv_bias", "position_embedding_antialias", "apply_layernorm", "reshape_hidden_states"):
            self.check_boolean(name)
        self.verify_out_features_out_indices()
        self.check_activation("pooler_act")
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            sizes = _pair(value)
            if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
                raise ValueError(f"`{name}` must be a positive integer or (height, width) in pixels, got {value!r}.")
        if min(self.native_grid) < 1:
            raise ValueError(f"`patch_size` ({self.patch_size}) must not exceed `image_size` ({self.image_size}).")
        if self.layerscale_value is not None:
            self.check_number("layerscale_value")


def _pair(size):
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
