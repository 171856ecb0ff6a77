"""FAViT: ViT whose self-attention is factorized, so that time and memory grow linearly with the number of pixels.

Paper: Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243.
Parameter names are those of stock ViT checkpoints on disk; DINOv2's are translated while loading
(`fa_checkpoint_names.py`). The parts of the encoder stand in `fa_vit_layers.py`, a layer's token mixing in
`fa_mixer.py`, the operator in `fa_attention.py`.

Shape letters: B batch, N tokens (CLS, registers, patches), C hidden width, L labels, P patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BackboneMixin
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)

from .configuration_fa_vit import FAViTConfig
from .fa_checkpoint_names import VIT_NAME_PATTERNS
from .fa_chunked import join, slices
from .fa_layers import FAEncoder
from .fa_layout import Layout, lay_out_image
from .fa_vit_layers import FAViTEmbeddings, FAViTLayer, FAViTLayerScale, patch_grid
from .modeling_fa import FAPreTrainedModel, classification_loss, pool_first, pool_mean

# isort: split
# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. A test keeps
# the list whole; it can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .configuration_fa import FactorizedConfig  # noqa: F401
from .fa_attention import factorized_attention  # noqa: F401
from .fa_attention_blocked import blocked_attention  # noqa: F401
from .fa_attention_triton import triton_attention  # noqa: F401
from .fa_context import apply_context  # noqa: F401
from .fa_local import window_attention  # noqa: F401
from .fa_mixer import build_mixer  # noqa: F401
from .fa_packed import PackedDocuments  # noqa: F401
from .fa_sequence_parallel import Shard  # noqa: F401
from .fa_triton_kernels import triton  # noqa: F401
from .fa_validation import check_mask  # noqa: F401


class FAViTPooler(nn.Module):
    """A dense layer and activation over CLS: [B, N, C] -> [B, pooler_output_size]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        return self.activation(self.dense(pool_first(hidden_states, layout)))


class FAViTPreTrainedModel(FAPreTrainedModel):
    """Base of the FAViT models."""

    config_class = FAViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    CHECKPOINT_NAME_PATTERNS = VIT_NAME_PATTERNS
    _no_split_modules = ["FAViTEmbeddings", "FAViTLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FAViTEmbeddings):
            for parameter in (module.position_embeddings, module.cls_token, module.register_tokens):
                if parameter is not None:
                    nn.init.trunc_normal_(parameter, std=self.config.initializer_range)
            if module.mask_token is not None:
                nn.init.zeros_(module.mask_token)
        elif isinstance(module, FAViTLayerScale):
            module.reset_parameters()

    def lay_out(
        self, pixel_values: Tensor, attention_mask: Tensor | None = None, chunk_size: int | None = None
    ) -> Layout:
        """Check the arguments of `FAViTModel.forward` that say where the tokens lie, and lay these out."""
        grid, num_prefix = patch_grid(self.config, pixel_values), 1 + self.config.num_register_tokens
        return lay_out_image(pixel_values, grid, num_prefix, attention_mask, chunk_size)


class FAViTModel(FAViTPreTrainedModel):
    """The encoder: images [B, channels, height, width] -> hidden states [B, N, C] and pooled CLS."""

    def __init__(self, config: FAViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = FAViTEmbeddings(config, use_mask_token)
        self.encoder = FAEncoder(config, FAViTLayer)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = FAViTPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.patch_embeddings

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        chunk_size: int | None = None,
        layout: Layout | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Encode images.

        Args:
            pixel_values: [B, channels, height, width], any height and width; padded with zeros to whole patches.
            bool_masked_pos: bool [B, P], True where a patch is replaced by the mask token.
            interpolate_pos_encoding: None or True: position embeddings are interpolated (or repeated, if "periodic")
                for images of another than the native size. False makes such images an error, as in stock ViT.
            attention_mask: [B, N] of zeros and ones, 1 = real, over CLS, registers and patches. None: all are real.
            output_attentions: refused if true, as no layer forms its attention maps.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False returns a tuple.
            chunk_size: patches of each image to work on at a time, where activations of all would not fit into memory;
                rounded down to whole rows of patches, one at least, where a part needs them. The result is the same,
                within rounding; the memory is that of two [B, N, C] tensors and of the activations of one chunk
                (`softmax_layers` add one such tensor). Without gradients only. None: all at once.
            layout: the layout that `lay_out` makes of `attention_mask` and `chunk_size`, which are then ignored. Heads
                give it, as they read it as well. None: it is made here.

        Raises:
            ValueError: an input has the wrong shape, `chunk_size` is below 1 or comes while gradients are on; the
                message names it.
        """
        output_hidden_states = self.wants_hidden_states(output_attentions, output_hidden_states)
        if layout is None:
            layout = self.lay_out(pixel_values, attention_mask, chunk_size)
        embeddings = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding, layout)
        encoded = self.encoder(embeddings, layout, output_hidden_states)
        hidden_states, num_tokens = encoded.last_hidden_state, embeddings.shape[1]
        if layout.chunk_size is None:
            hidden_states = self.layernorm(hidden_states)
        else:
            chunks = slices(0, num_tokens, layout.chunk_size)
            hidden_states = join((self.layernorm(hidden_states[:, chunk]) for chunk in chunks), num_tokens)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(hidden_states, layout),
            hidden_states=encoded.hidden_states,
        )
        return self.as_requested(output, return_dict)


class FAViTBackbone(BackboneMixin, FAViTModel):
    """The encoder as a backbone: images [B, channels, height, width] -> maps [B, C, rows, columns] of chosen layers.

    Maps have a place for each begun patch; CLS and registers are left out. Weights have the names of `FAViTModel`, and
    stock DINOv2 backbones load as well.
    """

    def __init__(self, config: FAViTConfig):
        super().__init__(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self._freeze_unread()

    def _freeze_unread(self) -> None:
        """Freeze the last norm where no map passes it: several processes would wait for a gradient of it."""
        if not self.config.apply_layernorm:
            self.layernorm.requires_grad_(False)

    def train(self, mode: bool = True):
        self._freeze_unread()  # again, as loading made new parameters
        return super().train(mode)

    @property
    def out_features(self):
        return self.config.out_features

    @property
    def out_indices(self):
        return self.config.out_indices

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        chunk_size: int | None = None,
    ) -> BackboneOutput | tuple:
        """Encode images and return the outputs of the layers in `out_features`, lowest first.

        Args:
            pixel_values: as in `FAViTModel`, of any height and width.
            output_hidden_states: also return the embeddings and every layer's output.
            output_attentions: refused if true, as no layer forms its attention maps.
            return_dict: False returns a tuple.
            attention_mask, interpolate_pos_encoding, chunk_size: as in `FAViTModel`.

        Raises:
            ValueError: as in `FAViTModel`, and in `sequence_parallel`, where maps would be parts of maps.
        """
        output_hidden_states = self.wants_hidden_states(output_attentions, output_hidden_states)
        layout = self.lay_out(pixel_values, attention_mask, chunk_size)
        if layout.shard is not None:
            raise ValueError("FAViTBackbone does not run in `sequence_parallel`; use FAViTModel's hidden states there.")
        embeddings = self.embeddings(pixel_values, None, interpolate_pos_encoding, layout)
        encoded = self.encoder(embeddings, layout, output_hidden_states=True)
        hidden_states = dict(zip(self.stage_names, encoded.hidden_states, strict=True))
        maps = []
        for state in (hidden_states[name] for name in self.out_features):
            normalized = self.layernorm(state) if self.config.apply_layernorm else state
            if self.config.reshape_hidden_states:
                patches = normalized[:, layout.num_prefix(normalized.shape[1]) :]
                normalized = patches.transpose(1, 2).unflatten(2, layout.grid).contiguous()
            maps.append(normalized)
        output = BackboneOutput(
            feature_maps=tuple(maps), hidden_states=encoded.hidden_states if output_hidden_states else None
        )
        return self.as_requested(output, return_dict)


class FAViTHead(FAViTPreTrainedModel):
    """Base of the heads. `options` are the keyword arguments of `FAViTModel.forward` that are not named."""

    def __init__(self, config: FAViTConfig, use_mask_token: bool = False):
        super().__init__(config)
        self.vit = FAViTModel(config, add_pooling_layer=False, use_mask_token=use_mask_token)

    def get_input_embeddings(self):
        return self.vit.get_input_embeddings()

    def encode(
        self, pixel_values: Tensor, attention_mask: Tensor | None = None, chunk_size: int | None = None, **options
    ) -> tuple[BaseModelOutputWithPooling, Layout]:
        """Lay the tokens out and run `vit`; return its output and the layout, which the head reads as well."""
        layout = self.lay_out(pixel_values, attention_mask, chunk_size)
        return self.vit(pixel_values, return_dict=True, layout=layout, **options), layout


class FAViTForImageClassification(FAViTHead):
    """Classify images; logits [B, L]. `labels` as in FABertForSequenceClassification."""

    def __init__(self, config: FAViTConfig):
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **options,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        options["interpolate_pos_encoding"] = interpolate_pos_encoding
        encoded, layout = self.encode(pixel_values, attention_mask, **options)
        pool = pool_mean if self.config.classifier_pooling == "mean" else pool_first
        logits = self.classifier(pool(encoded.last_hidden_state, layout))
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self.as_requested(output, return_dict)


class FAViTForMaskedImageModeling(FAViTHead):
    """Reconstruct masked patches, SimMIM style: images [B, channels, height, width] -> the same shape.

    Source: Xie et al. 2022, "SimMIM", arXiv:2111.09886: the loss is the mean absolute error over masked pixels.
    """

    TOKEN_OUTPUTS = {"reconstruction": 2, "hidden_states": 1}

    def __init__(self, config: FAViTConfig):
        super().__init__(config, use_mask_token=True)
        if config.patch_shape != (config.encoder_stride, config.encoder_stride):
            raise ValueError(
                f"`encoder_stride` ({config.encoder_stride}) must equal `patch_size` ({config.patch_size}) for masked "
                "image modelling: the reconstruction has the dimensions of the input."
            )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **options,
    ) -> MaskedImageModelingOutput | tuple[Tensor, ...]:
        options |= {"bool_masked_pos": bool_masked_pos, "interpolate_pos_encoding": interpolate_pos_encoding}
        encoded, layout = self.encode(pixel_values, attention_mask, **options)
        tokens, shard = encoded.last_hidden_state, layout.shard
        patches = tokens[:, layout.num_prefix(tokens.shape[1]) :].transpose(1, 2).unflatten(2, layout.grid)
        if patches.shape[2] == 0:  # of a rank without tokens: convolutions need a row
            patches = F.pad(patches, (0, 0, 0, 1))
        (height, width), stride = pixel_values.shape[2:], self.config.encoder_stride
        grid = patch_grid(self.config, pixel_values)
        rows = slice(0, grid[0]) if shard is None else shard.rows
        pixels = slice(rows.start * stride, min(rows.stop * stride, height))
        reconstruction = self.decoder(patches)[:, :, : pixels.stop - pixels.start, :width]
        loss = None
        if bool_masked_pos is not None:
            masked = bool_masked_pos.view(-1, 1, *grid).to(reconstruction.dtype)
            masked = masked.repeat_interleave(stride, 2).repeat_interleave(stride, 3)[:, :, :height, :width]
            own = pixel_values if shard is None else shard.enter(pixel_values)
            difference = (own[:, :, pixels] - reconstruction).abs() * masked[:, :, pixels]
            difference = difference.sum() if shard is None else shard.sum(difference.sum())
            loss = difference / (masked.sum() + 1e-5) / self.config.num_channels
        output = MaskedImageModelingOutput(
            loss=loss, reconstruction=reconstruction, hidden_states=encoded.hidden_states
        )
        return self.as_requested(output, return_dict)
