"""DETR and Conditional DETR with a factorized encoder: time and memory grow linearly with the image's area.

The encoder's self-attention is the only part of stock DETR whose cost is quadratic in the number of places of the
feature map. Here its layers mix by `fa_mixer`, with the stock projections; positions are added to the inputs of queries
and keys, not of values, as in stock. The decoder stays stock: its few queries attend to every place by softmax, which
is linear in the places and lets queries compete.

Parameter names are those of transformers 5; checkpoints that transformers 4 wrote are translated while loading. Stock
DETR replaces every BatchNorm2d of its backbone by a frozen copy, here as there.

Papers: Carion et al. 2020, "End-to-End Object Detection with Transformers", arXiv:2005.12872; Meng et al. 2021,
"Conditional DETR", arXiv:2108.06152; Shen et al. 2021, "Efficient Attention", arXiv:1812.01243.

Shape letters: B batch, N places of the feature map, C hidden width, H heads.
"""

import importlib.util
from contextvars import ContextVar
from math import isqrt, prod

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    ConditionalDetrForObjectDetection,
    ConditionalDetrModel,
    DetrForObjectDetection,
    DetrModel,
)
from transformers.modeling_outputs import BaseModelOutput

from .configuration_fa_detr import FAConditionalDetrConfig, FADetrConfig
from .configuration_fa_resnet import FAResNetConfig
from .configuration_fa_vit import FAViTConfig
from .fa_layout import Layout
from .fa_mixer import build_mixer
from .fa_validation import as_bool_mask
from .modeling_fa import FAWeights
from .modeling_fa_resnet import FAResNetBackbone
from .modeling_fa_vit import FAViTBackbone

# isort: split
# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. A test keeps
# the list whole; it can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .configuration_fa import FactorizedConfig  # noqa: F401
from .fa_attention import factorized_attention  # noqa: F401
from .fa_attention_blocked import blocked_attention  # noqa: F401
from .fa_attention_triton import triton_attention  # noqa: F401
from .fa_block import BlockProjection  # noqa: F401
from .fa_checkpoint_names import translate_config  # noqa: F401
from .fa_chunked import slices  # noqa: F401
from .fa_context import apply_context  # noqa: F401
from .fa_layers import FAEncoder  # noqa: F401
from .fa_local import window_attention  # noqa: F401
from .fa_packed import PackedDocuments  # noqa: F401
from .fa_sequence_parallel import Shard  # noqa: F401
from .fa_triton_kernels import triton  # noqa: F401
from .fa_vit_layers import patch_grid  # noqa: F401

# Names that transformers 4 wrote -> those of transformers 5, which are ours, in the order to apply. Of a pattern,
# transformers fills in the first group only.
DETR_NAME_PATTERNS = {
    r"backbone\.conv_encoder\.": r"backbone.",
    r"\.out_proj\.": r".o_proj.",
    r"(layers\.\d+)\.fc1\.": r"\1.mlp.fc1.",
    r"(layers\.\d+)\.fc2\.": r"\1.mlp.fc2.",
}
CONDITIONAL_DETR_NAME_PATTERNS = DETR_NAME_PATTERNS | {
    rf"(decoder\.layers\.\d+)\.{old}_{part}_proj\.": rf"\1.{new}.{renamed}_proj."
    for old, new in (("sa", "self_attn"), ("ca", "encoder_attn"))
    for part, renamed in (
        ("qcontent", "q_content"),
        ("qpos", "q_pos"),
        ("kcontent", "k_content"),
        ("kpos", "k_pos"),
        ("v", "v"),
        ("qpos_sine", "q_pos_sine"),
    )
}

# Stock DETR hands its encoder a flattened feature map, and the local terms need the map's rows and columns: they are
# noted where the map is projected and taken by the encoder, in the same thread and pass.
_grid: ContextVar[tuple[int, int] | None] = ContextVar("fa_detr_grid", default=None)


class FADetrSelfAttention(nn.Module):
    """Self-attention of an encoder layer, with stock DETR's projections and the mixer of the configuration.

    Shapes: hidden states and position embeddings [B, N, C] -> [B, N, C].
    """

    def __init__(self, config, layer_index: int):
        super().__init__()
        self.num_heads = config.encoder_attention_heads
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.o_proj = nn.Linear(config.d_model, config.d_model)
        self.mixer = build_mixer(config, layer_index, spatial_rank=2)

    def forward(
        self, hidden_states: Tensor, attention_mask: Layout, position_embeddings: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, None]:
        """Mix all real places; the stock layer calls this, and hands the encoder's layout on as its mask."""
        layout = attention_mask
        placed = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        query, key = self._split(self.q_proj(placed)), self._split(self.k_proj(placed))
        value = self._split(self.v_proj(hidden_states))
        mixed = self.mixer(query, key, value, layout)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None

    def _split(self, projected: Tensor) -> Tensor:
        """Cut into heads: [B, N, C] -> [B, H, N, C / H]."""
        return projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class FADetrEncoder(nn.Module):
    """The stock encoder's layers, each with a `FADetrSelfAttention` in the place of its own."""

    def __init__(self, config, layers: nn.ModuleList):
        super().__init__()
        self.config = config
        self.layers = layers
        for index, layer in enumerate(layers):
            layer.self_attn = FADetrSelfAttention(config, index)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode a flattened feature map.

        Args:
            inputs_embeds: the projected map [B, N, C].
            attention_mask: [B, N], 1 or True where a place is real; None: all are.
            spatial_position_embeddings: [B, N, C], added to the inputs of queries and keys.
            output_hidden_states: also return the input and every layer's output. None: as the configuration says.
            kwargs: those of the stock encoder that have no effect on factorized layers.
        """
        grid = _grid.get()
        _grid.set(None)
        num_places = inputs_embeds.shape[1]
        if grid is None or prod(grid) != num_places:  # features given by the caller: stock DETR takes them for a square
            grid = (isqrt(num_places), num_places // max(1, isqrt(num_places)))
        layout = Layout(None if attention_mask is None else as_bool_mask("attention_mask", attention_mask), grid)
        hidden_states = F.dropout(inputs_embeds, p=self.config.dropout, training=self.training)
        all_states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, layout, spatial_position_embeddings=spatial_position_embeddings)
            all_states.append(hidden_states)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=tuple(all_states) if wanted else None)


def _note_grid(module: nn.Module, inputs: tuple, projected: Tensor) -> None:
    _grid.set((projected.shape[2], projected.shape[3]))


OWN_BACKBONES = {FAResNetConfig.model_type: FAResNetBackbone, FAViTConfig.model_type: FAViTBackbone}


class FADetrWeights(FAWeights):
    """Base of the four classes, which build the stock network and then exchange its encoder."""

    accepts_loss_kwargs = False
    # The convolutions of stock DETR's backbone read beyond the border between an image and its padding.
    SEES_PADDING = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config):
        prepare_backbone(config.backbone_config)
        super().__init__(config)


def prepare_backbone(config) -> None:
    """Let the stock network find a backbone of ours; ImportError for one of timm's where that is not installed."""
    model_type = getattr(config, "model_type", None)
    if model_type in OWN_BACKBONES:
        # By the class of this very configuration: of remote code there may be two copies.
        AutoBackbone.register(type(config), OWN_BACKBONES[model_type], exist_ok=True)
    if model_type == "timm_backbone" and importlib.util.find_spec("timm") is None:
        raise ImportError(
            f"The backbone {config.backbone!r} of this checkpoint is the package timm's, which is not installed: pip "
            "install timm, or take weights with a backbone of transformers, as revision 'no_timm' of "
            "facebook/detr-resnet-50 has."
        )


class FADetrModel(FADetrWeights, DetrModel):
    """DETR without heads, its encoder factorized: inputs and outputs are those of transformers' `DetrModel`."""

    config_class = FADetrConfig
    CHECKPOINT_NAME_PATTERNS = DETR_NAME_PATTERNS

    def __init__(self, config: FADetrConfig):
        super().__init__(config)
        self.encoder = FADetrEncoder(config, self.get_submodule("encoder.layers"))
        self.input_projection.register_forward_hook(_note_grid)
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs):
        """Run the network: images [B, channels, height, width] of any dtype, mask [B, height, width] of real pixels."""
        if pixel_mask is not None:
            pixel_mask = as_bool_mask("pixel_mask", pixel_mask)
        return super().forward(pixel_values.to(self.dtype), pixel_mask, **kwargs)


class FADetrForObjectDetection(FADetrWeights, DetrForObjectDetection):
    """DETR with a factorized encoder: inputs, outputs and loss are those of transformers' `DetrForObjectDetection`."""

    config_class = FADetrConfig
    CHECKPOINT_NAME_PATTERNS = DETR_NAME_PATTERNS

    def __init__(self, config: FADetrConfig):
        super().__init__(config)
        self.model = FADetrModel(config)
        self.post_init()


class FAConditionalDetrModel(FADetrWeights, ConditionalDetrModel):
    """Conditional DETR without heads, its encoder factorized: inputs and outputs are transformers' own."""

    config_class = FAConditionalDetrConfig
    CHECKPOINT_NAME_PATTERNS = CONDITIONAL_DETR_NAME_PATTERNS

    def __init__(self, config: FAConditionalDetrConfig):
        super().__init__(config)
        self.encoder = FADetrEncoder(config, self.get_submodule("encoder.layers"))
        self.input_projection.register_forward_hook(_note_grid)
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs):
        """Run the network: images [B, channels, height, width] of any dtype, mask [B, height, width] of real pixels."""
        if pixel_mask is not None:
            pixel_mask = as_bool_mask("pixel_mask", pixel_mask)
        return super().forward(pixel_values.to(self.dtype), pixel_mask, **kwargs)


class FAConditionalDetrForObjectDetection(FADetrWeights, ConditionalDetrForObjectDetection):
    """Conditional DETR with a factorized encoder: inputs, outputs and loss are transformers' own."""

    config_class = FAConditionalDetrConfig
    CHECKPOINT_NAME_PATTERNS = CONDITIONAL_DETR_NAME_PATTERNS

    def __init__(self, config: FAConditionalDetrConfig):
        super().__init__(config)
        self.model = FAConditionalDetrModel(config)
        self.post_init()
