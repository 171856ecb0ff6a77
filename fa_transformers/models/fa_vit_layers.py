"""The parts of FAViT's encoder: the tokens that an image enters as, and a pre-norm layer.

Parameter names are those of stock ViT checkpoints on disk.

Images of any size run. A side that does not divide by the patch is padded with zeros, the mean colour of a normalised
image, on the right and bottom: nothing of the image is dropped, which stock ViT does without a word.

Shape letters: B batch, N tokens (CLS, registers, patches), C hidden width, H heads, P patches.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GradientCheckpointingLayer
from transformers.activations import ACT2FN

from .fa_chunked import join, run_layer_in_chunks, slices
from .fa_layers import apply_in_pieces
from .fa_layout import Layout
from .fa_mixer import build_mixer
from .fa_validation import as_bool_mask


def patch_grid(config, pixel_values: Tensor) -> tuple[int, int]:
    """Return (rows, columns) of the patches that images are cut into; ValueError if they cannot be."""
    if pixel_values.dim() != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"`pixel_values` must be [batch, {config.num_channels} channels, height, width], "
            f"got {tuple(pixel_values.shape)}."
        )
    height, width = pixel_values.shape[2:]
    if height == 0 or width == 0:
        raise ValueError(f"`pixel_values` must not be empty, got {height} x {width} pixels.")
    patch_height, patch_width = config.patch_shape
    return (height + patch_height - 1) // patch_height, (width + patch_width - 1) // patch_width


class FAViTPatchEmbeddings(nn.Module):
    """Cut an image into patches and project them: [B, channels, height, width] -> [B, C, rows, columns]."""

    def __init__(self, config):
        super().__init__()
        self.patch_shape = config.patch_shape
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_shape, stride=self.patch_shape
        )

    def rows_of(self, pixel_values: Tensor, rows: slice) -> Tensor:
        """Return the pixels of some rows of patches."""
        return pixel_values[:, :, rows.start * self.patch_shape[0] : rows.stop * self.patch_shape[0]]

    def blank(self, pixel_values: Tensor, unread: Tensor) -> Tensor:
        """Set the pixels of patches that nothing is to read to zero, where `unread` is bool [B, rows, columns].

        NaN times a gradient of zero would be NaN in every weight of the projection, and in bfloat16 torch's convolution
        on CPUs carries a patch's NaN into the one before.
        """
        height, width = pixel_values.shape[2:]
        unread = unread[:, None]
        for axis, size in zip((2, 3), self.patch_shape, strict=True):
            unread = unread.repeat_interleave(size, axis)
        return pixel_values.masked_fill(unread[:, :, :height, :width], 0.0)

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[2:]
        bottom, right = -height % self.patch_shape[0], -width % self.patch_shape[1]
        if height == 0:  # the part of a rank that has none: convolutions need a row
            return self.projection(F.pad(pixel_values, (0, right, 0, self.patch_shape[0])))[:, :, :0]
        return self.projection(F.pad(pixel_values, (0, right, 0, bottom)))


class FAViTEmbeddings(nn.Module):
    """CLS, register and patch embeddings with positions.

    Image [B, channels, height, width] -> tokens [B, N, C].
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
        layout: Layout,
    ) -> Tensor:
        """Embed whole images; of images that processes share, the part in the layout."""
        batch, shard = len(pixel_values), layout.shard
        grid = patch_grid(self.config, pixel_values)
        masked = None if bool_masked_pos is None else self.check_masked(bool_masked_pos, (batch, grid[0] * grid[1]))
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
            prefix = prefix[:, : shard.own_prefix]
        unread = masked if layout.mask is None else ~layout.mask[:, prefix.shape[1] :]
        if unread is not None:
            unread = unread if masked is None else unread | masked
            pixel_values = self.patch_embeddings.blank(pixel_values, unread.unflatten(1, layout.grid))
        if layout.chunk_size is not None:
            return self.embed_in_chunks(prefix, pixel_values, masked, positions, layout)
        patches = self.embed_patches(pixel_values, masked, positions)
        return self.dropout(torch.cat([prefix, patches], dim=1))

    def embed_in_chunks(
        self, prefix: Tensor, pixel_values: Tensor, masked: Tensor | None, positions: Tensor | None, layout: Layout
    ) -> Tensor:
        """Embed as many rows of patches at a time as fit `chunk_size`, one at least, after the prefix: [B, N, C]."""
        assert layout.grid is not None and layout.chunk_size is not None
        num_rows, columns = layout.grid
        rows_at_once = max(1, layout.chunk_size // columns)

        def pieces() -> Iterator[Tensor]:
            yield prefix
            for rows in slices(0, num_rows, rows_at_once):
                patches = slice(rows.start * columns, rows.stop * columns)
                yield self.embed_patches(
                    self.patch_embeddings.rows_of(pixel_values, rows),
                    *(None if whole is None else whole[:, patches] for whole in (masked, positions)),
                )

        return join(map(self.dropout, pieces()), prefix.shape[1] + num_rows * columns)

    def embed_patches(self, pixel_values: Tensor, masked: Tensor | None, positions: Tensor | None) -> Tensor:
        """Project whole rows of patches: pixels [B, channels, height, width], masked [B, P], positions [1, P, C]."""
        pixel_values = pixel_values.to(self.patch_embeddings.projection.weight.dtype)
        patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)  # [B, P, C]
        if masked is not None:
            patches = torch.where(masked[:, :, None], self.mask_token.to(patches.dtype), patches)
        return patches if positions is None else patches + positions

    def check_masked(self, bool_masked_pos: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return `bool_masked_pos` as bool [B, P]; ValueError if it doesn't fit."""
        if self.mask_token is None:
            raise ValueError("`bool_masked_pos` needs a model with `use_mask_token=True`.")
        masked = as_bool_mask("bool_masked_pos", bool_masked_pos.flatten(1))
        if masked.shape != shape:
            raise ValueError(f"`bool_masked_pos` must be [batch, patches] = {shape}, got {tuple(masked.shape)}.")
        return masked

    def patch_positions(self, grid: tuple[int, int], interpolate_pos_encoding: bool | None) -> Tensor:
        """Return the position embeddings of a grid of patches: [1, P, C]; the table itself at the native size."""
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

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        query, key, value = (self.project(part, hidden_states) for part in (self.query, self.key, self.value))
        return self.mixer(query, key, value, layout).transpose(1, 2).flatten(2)


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

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        """Mix the tokens, then transform each; with a `chunk_size` in the layout, overwrites `hidden_states`."""
        attention, normalize = self.attention_and_norm
        if layout.chunk_size is not None:
            return run_layer_in_chunks(hidden_states, layout, attention, normalize, self.feed_forward)
        return self.feed_forward(attention(normalize(hidden_states), layout), hidden_states)

    @property
    def attention_and_norm(self) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The self-attention and the function from the layer's input to the attention's, each token on its own."""
        return self.attention["attention"], self.layernorm_before

    def feed_forward(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        """Compute the layer's output from the mixed tokens and its input, each token on its own: [B, N, C] each."""
        piece_size = self.chunk_size_feed_forward
        return apply_in_pieces(self.feed_forward_piece, piece_size, mixed, hidden_states, training=self.training)

    def feed_forward_piece(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.layer_scale1(self.attention["output"](mixed))
        return hidden_states + self.layer_scale2(self.output(self.intermediate(self.layernorm_after(hidden_states))))
