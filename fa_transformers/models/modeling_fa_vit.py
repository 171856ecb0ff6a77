"""FAViT: ViT whose self-attention is factorized, so that time and memory grow linearly with the number of pixels.

Paper: Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243.
Parameter names are those of stock ViT checkpoints on disk; DINOv2's are translated while loading
(`fa_checkpoint_names.py`). A layer's token mixing stands in `fa_mixer.py`, the operator in `fa_attention.py`.

Images of any size run. A side that does not divide by the patch is padded with zeros, the mean colour of a normalised
image, on the right and bottom: nothing of the image is dropped, which stock ViT does without a word.

Shape letters: B batch, N tokens (CLS, registers, patches), C hidden width, H heads, L labels, P patches.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GradientCheckpointingLayer
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)

# `noqa` marks what is not used here: from a local folder, transformers 5.3 copies only the files that this one itself
# imports.
from .configuration_fa import FactorizedConfig  # noqa: F401
from .configuration_fa_vit import FAViTConfig
from .fa_attention import factorized_attention  # noqa: F401
from .fa_attention_blocked import blocked_attention  # noqa: F401
from .fa_attention_triton import triton_attention  # noqa: F401
from .fa_checkpoint_names import VIT_NAME_PATTERNS
from .fa_chunked import check_chunk_size, join, run_layer_in_chunks, slices
from .fa_context import apply_context  # noqa: F401
from .fa_local import window_attention  # noqa: F401
from .fa_mixer import build_mixer
from .fa_packed import PackedDocuments  # noqa: F401
from .fa_sequence_parallel import Shard, current_shard, split_tokens
from .modeling_fa import (
    FAPreTrainedModel,
    apply_in_pieces,
    check_mask,
    classification_loss,
    first_real_token,
    mean_over_real,
)


class FAViTPatchEmbeddings(nn.Module):
    """Cut an image into patches and project them: [B, channels, height, width] -> [B, C, rows, columns]."""

    def __init__(self, config):
        super().__init__()
        self.num_channels, self.patch_shape = config.num_channels, config.patch_shape
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_shape, stride=self.patch_shape
        )

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches that an image is cut into; ValueError if it cannot be."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` must be [batch, {self.num_channels} channels, height, width], "
                f"got {tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[2:]
        if height == 0 or width == 0:
            raise ValueError(f"`pixel_values` must not be empty, got {height} x {width} pixels.")
        rows, columns = (
            (size + patch - 1) // patch for size, patch in zip((height, width), self.patch_shape, strict=True)
        )
        return rows, columns

    def rows_of(self, pixel_values: Tensor, rows: slice) -> Tensor:
        """The pixels of some rows of patches."""
        return pixel_values[:, :, rows.start * self.patch_shape[0] : rows.stop * self.patch_shape[0]]

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[2:]
        bottom, right = -height % self.patch_shape[0], -width % self.patch_shape[1]
        if height == 0:  # the part of a rank that has none: convolutions need a row
            return self.projection(F.pad(pixel_values, (0, right, 0, self.patch_shape[0])))[:, :, :0]
        return self.projection(F.pad(pixel_values, (0, right, 0, bottom)))


class FAViTEmbeddings(nn.Module):
    """CLS, register and patch embeddings with positions.

    Image [B, channels, height, width] -> tokens [B, N, C] and the patch grid (rows, columns).
    """

    def __init__(self, config, use_mask_token: bool = False):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
            if config.num_register_tokens
            else None
        )
        self.patch_embeddings = FAViTPatchEmbeddings(config)
        rows, columns = config.native_grid
        self.position_embeddings = (
            None
            if config.position_embedding_type == "none"
            else nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None,
        interpolate_pos_encoding: bool | None,
        chunk_size: int | None = None,
        shard: Shard | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """With `shard`, the tokens and the grid are this rank's part."""
        grid = self.patch_embeddings.grid_of(pixel_values)
        batch, num_patches = pixel_values.shape[0], grid[0] * grid[1]
        masked = None if bool_masked_pos is None else self.check_masked(bool_masked_pos, (batch, num_patches))
        cls_token: Tensor = self.cls_token
        positions = None
        if self.position_embeddings is not None:
            cls_token = cls_token + self.position_embeddings[:, :1]
            positions = self.patch_positions(grid, interpolate_pos_encoding)
        registers = [] if self.register_tokens is None else [self.register_tokens]
        prefix = torch.cat([cls_token, *registers], dim=1).expand(batch, -1, -1)
        if shard is not None:
            own = slice(shard.rows.start * grid[1], shard.rows.stop * grid[1])
            masked, positions = (None if whole is None else whole[:, own] for whole in (masked, positions))
            pixel_values = self.patch_embeddings.rows_of(shard.enter(pixel_values), shard.rows)
            prefix, grid = prefix[:, : shard.own_prefix], (shard.rows.stop - shard.rows.start, grid[1])
            num_patches = grid[0] * grid[1]
        if chunk_size is None:
            patches = self.embed_patches(pixel_values, masked, positions)
            return self.dropout(torch.cat([prefix, patches], dim=1)), grid

        rows_at_once = max(1, chunk_size // grid[1])

        def pieces() -> Iterator[Tensor]:
            yield prefix
            for rows in slices(0, grid[0], rows_at_once):
                patches = slice(rows.start * grid[1], rows.stop * grid[1])
                yield self.embed_patches(
                    self.patch_embeddings.rows_of(pixel_values, rows),
                    *(None if whole is None else whole[:, patches] for whole in (masked, positions)),
                )

        return join(map(self.dropout, pieces()), prefix.shape[1] + num_patches), grid

    def embed_patches(self, pixel_values: Tensor, masked: Tensor | None, positions: Tensor | None) -> Tensor:
        """Project whole rows of patches: pixels [B, channels, height, width], masked [B, P], positions [1, P, C]."""
        pixel_values = pixel_values.to(self.patch_embeddings.projection.weight.dtype)
        patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)  # [B, P, C]
        if masked is not None:
            patches = torch.where(masked[:, :, None], self.mask_token.to(patches.dtype), patches)
        return patches if positions is None else patches + positions

    def check_masked(self, bool_masked_pos: Tensor, shape: tuple[int, int]) -> Tensor:
        """`bool_masked_pos` as bool [B, P]."""
        if self.mask_token is None:
            raise ValueError("`bool_masked_pos` needs a model with `use_mask_token=True`.")
        masked = bool_masked_pos.flatten(1).bool()
        if masked.shape != shape:
            raise ValueError(f"`bool_masked_pos` must be [batch, patches] = {shape}, got {tuple(masked.shape)}.")
        return masked

    def patch_positions(self, grid: tuple[int, int], interpolate_pos_encoding: bool | None) -> Tensor:
        """The position embeddings of a grid of patches: [1, P, C]; the table itself at the native size."""
        native = self.config.native_grid
        assert self.position_embeddings is not None
        table = self.position_embeddings[:, 1:]
        if grid == native:
            return table
        if interpolate_pos_encoding is False:
            raise ValueError(
                f"The image has {grid[0]} x {grid[1]} patches, the model's native size {native[0]} x {native[1]}; "
                "leave `interpolate_pos_encoding` unset or pass True."
            )
        table = table.unflatten(1, native)
        if self.config.position_embedding_type == "periodic":
            rows, columns = (
                torch.arange(size, device=table.device) % period for size, period in zip(grid, native, strict=True)
            )
            return table[:, rows[:, None], columns].flatten(1, 2)
        resized = F.interpolate(
            table.permute(0, 3, 1, 2).to(torch.promote_types(table.dtype, torch.float32)),
            size=grid,
            mode="bicubic",
            align_corners=False,
            antialias=self.config.position_embedding_antialias,
        )
        return resized.to(table.dtype).flatten(2).transpose(1, 2)


class FAViTSelfAttention(nn.Module):
    """Project to Q, K, V and mix tokens per head: [B, N, C] -> [B, N, C]."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.mixer = build_mixer(config, layer_index, spatial_rank=2)

    def project(self, projection: nn.Module, hidden_states: Tensor) -> Tensor:
        """Apply one of the three projections and cut it into heads: [B, N, C] -> [B, H, N, C / H]."""
        return projection(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None, grid: tuple[int, int], shard: Shard | None = None
    ) -> Tensor:
        query, key, value = (self.project(part, hidden_states) for part in (self.query, self.key, self.value))
        return self.mixer(query, key, value, mask, grid, shard=shard).transpose(1, 2).flatten(2)


class FAViTDense(nn.Module):
    """A linear map under the name `dense` and dropout: [B, N, input_size] -> [B, N, C]."""

    def __init__(self, config, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class FAViTIntermediate(nn.Module):
    """The first half of the feed-forward part: [B, N, C] -> [B, N, intermediate_size]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states))


class FAViTLayerScale(nn.Module):
    """A learned factor per channel: [B, N, C] -> [B, N, C]."""

    def __init__(self, config):
        super().__init__()
        self.value = config.layerscale_value
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.lambda1, self.value)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.lambda1


class FAViTLayer(GradientCheckpointingLayer):
    """One pre-norm encoder layer: [B, N, C] -> [B, N, C]."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = nn.ModuleDict(
            {"attention": FAViTSelfAttention(config, layer_index), "output": FAViTDense(config, config.hidden_size)}
        )
        self.intermediate = FAViTIntermediate(config)
        self.output = FAViTDense(config, config.intermediate_size)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        has_scale = config.layerscale_value is not None
        self.layer_scale1 = FAViTLayerScale(config) if has_scale else nn.Identity()
        self.layer_scale2 = FAViTLayerScale(config) if has_scale else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        grid: tuple[int, int],
        chunk_size: int | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """With `chunk_size`, overwrites `hidden_states`."""
        if chunk_size is not None:
            attention = self.attention["attention"]
            return run_layer_in_chunks(
                hidden_states, mask, chunk_size, attention, self.layernorm_before, self.finish, grid, shard
            )
        mixed = self.attention["attention"](self.layernorm_before(hidden_states), mask, grid, shard)
        return self.finish(mixed, hidden_states)

    def finish(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        """What follows the token mixing, each token on its own: mixed and the layer's input, [B, N, C] -> [B, N, C]."""
        chunk_size = self.chunk_size_feed_forward
        return apply_in_pieces(self.finish_piece, chunk_size, mixed, hidden_states, training=self.training)

    def finish_piece(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.layer_scale1(self.attention["output"](mixed))
        return hidden_states + self.layer_scale2(self.output(self.intermediate(self.layernorm_after(hidden_states))))


class FAViTEncoder(nn.Module):
    """The stack of layers: [B, N, C] -> [B, N, C], with every layer's input on request."""

    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(FAViTLayer(config, index) for index in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        grid: tuple[int, int],
        output_hidden_states: bool,
        chunk_size: int | None = None,
        shard: Shard | None = None,
    ) -> BaseModelOutput:
        collected = [hidden_states]
        for layer in self.layer:
            if chunk_size is not None and output_hidden_states:
                hidden_states = hidden_states.clone()  # the layer overwrites what it gets
            hidden_states = layer(hidden_states, mask, grid, chunk_size, shard)
            if output_hidden_states:
                collected.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=tuple(collected) if output_hidden_states else None
        )


class FAViTPooler(nn.Module):
    """A dense layer and activation over CLS: [B, N, C] -> [B, pooler_output_size]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(first_real_token(hidden_states, None, current_shard())))


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


class FAViTModel(FAViTPreTrainedModel):
    """The encoder: images [B, channels, height, width] -> hidden states [B, N, C] and pooled CLS."""

    def __init__(self, config: FAViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = FAViTEmbeddings(config, use_mask_token)
        self.encoder = FAViTEncoder(config)
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
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Encode images.

        Args:
            pixel_values: [B, channels, height, width], any height and width; padded with zeros to whole patches.
            bool_masked_pos: bool [B, P], True where a patch is replaced by the mask token.
            interpolate_pos_encoding: None or True: position embeddings are interpolated (or repeated, if "periodic")
                for images of another than the native size. False makes such images an error, as in stock ViT.
            attention_mask: int or bool [B, N], 1 = real, over CLS, registers and patches. None: all are real.
            output_attentions: refused if true, as there are no attention maps.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False returns a tuple.
            chunk_size: patches of each image to work on at a time, where activations of all would not fit into memory;
                rounded down to whole rows of patches, one at least, where a part needs them. The result is the same,
                within rounding; the memory is that of two [B, N, C] tensors and of the activations of one chunk
                (`softmax_layers` add one such tensor). Without gradients only. None: all at once.

        Raises:
            ValueError: an input has the wrong shape, `chunk_size` is below 1 or comes while gradients are on; the
                message names it.
        """
        check_chunk_size(chunk_size)
        output_hidden_states = self.wants_hidden_states(output_attentions, output_hidden_states)
        rows, columns = self.embeddings.patch_embeddings.grid_of(pixel_values)
        num_prefix = 1 + self.config.num_register_tokens
        num_tokens = num_prefix + rows * columns
        mask = check_mask(attention_mask, (len(pixel_values), num_tokens), allow_holes=True)
        shard = split_tokens(pixel_values, num_tokens, mask, num_prefix, columns)
        mask = mask if mask is None or shard is None else shard.own(mask)
        embeddings, grid = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding, chunk_size, shard)
        encoded = self.encoder(embeddings, mask, grid, output_hidden_states, chunk_size, shard)
        hidden_states, num_tokens = encoded.last_hidden_state, embeddings.shape[1]
        if chunk_size is None:
            hidden_states = self.layernorm(hidden_states)
        else:
            chunks = slices(0, num_tokens, chunk_size)
            hidden_states = join((self.layernorm(hidden_states[:, chunk]) for chunk in chunks), num_tokens)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(hidden_states),
            hidden_states=encoded.hidden_states,
        )
        return self.as_requested(output, return_dict)


class FAViTForImageClassification(FAViTPreTrainedModel):
    """Classify images; logits [B, L]. `labels` as in FABertForSequenceClassification, `options` as in FAViTModel."""

    def __init__(self, config: FAViTConfig):
        super().__init__(config)
        self.vit = FAViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.vit.get_input_embeddings()

    def pool(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """CLS, or the mean over the patches: [B, N, C] -> [B, C]."""
        shard = current_shard()
        if self.config.classifier_pooling == "cls":
            return first_real_token(hidden_states, None, shard)
        if shard is not None:
            return mean_over_real(hidden_states, None if attention_mask is None else attention_mask.bool(), shard)
        first_patch = 1 + self.config.num_register_tokens
        mask = None if attention_mask is None else attention_mask[:, first_patch:].bool()
        return mean_over_real(hidden_states[:, first_patch:], mask)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **options,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        encoded = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            return_dict=True,
            **options,
        )
        logits = self.classifier(self.pool(encoded.last_hidden_state, attention_mask))
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self.as_requested(output, return_dict)


class FAViTForMaskedImageModeling(FAViTPreTrainedModel):
    """Reconstruct masked patches, SimMIM style: images [B, channels, height, width] -> the same shape.

    `options` are those of FAViTModel.

    Source: Xie et al. 2022, "SimMIM", arXiv:2111.09886: the loss is the mean absolute error over masked pixels.
    """

    TOKEN_OUTPUTS = {"reconstruction": 2, "hidden_states": 1}

    def __init__(self, config: FAViTConfig):
        super().__init__(config)
        if config.patch_shape != (config.encoder_stride, config.encoder_stride):
            raise ValueError(
                f"`encoder_stride` ({config.encoder_stride}) must equal `patch_size` ({config.patch_size}) for masked "
                "image modelling: the reconstruction has the dimensions of the input."
            )
        self.vit = FAViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.vit.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **options,
    ) -> MaskedImageModelingOutput | tuple[Tensor, ...]:
        encoded = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            return_dict=True,
            **options,
        )
        height, width = pixel_values.shape[2:]
        stride = self.config.encoder_stride
        grid = (-(-height // stride), -(-width // stride))
        shard = current_shard()
        rows = slice(0, grid[0]) if shard is None else shard.rows
        num_prefix = 1 + self.config.num_register_tokens if shard is None else shard.own_prefix
        patches = encoded.last_hidden_state[:, num_prefix:].transpose(1, 2)
        patches = patches.unflatten(2, (rows.stop - rows.start, grid[1]))
        if patches.shape[2] == 0:  # of a rank without tokens: convolutions need a row
            patches = F.pad(patches, (0, 0, 0, 1))
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
