"""Token mixers of the FA models: what stands between the Q, K, V projections and the output projection of a layer.

    output = (1 - g) · factorized(φq(Q), φk(K), V) + g · window(Q, K, V) + convolution(V)

φq, φk     learned maps to `key_feature_size` features, absent when that equals the head width
window     softmax attention over the ±`local_window` neighbours, absent at 0; g is a learned gate per head
convolution depthwise, `local_kernel_size` wide, zero-initialised, absent at 0

"Neighbour" means along the text, or on the patch grid for images; prefix tokens (CLS, registers) take part in the
factorized term only. Every term costs O(N). Layers named in `softmax_layers` use `SoftmaxMixer` instead.

Shape letters: B batch, H heads, N tokens, D head width, F key feature size, C = H · D.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fa_attention import factorized_attention

FEATURE_NOISE = 0.01
"""Standard deviation of the noise on fresh feature maps: copies of a feature start this far apart, not equal."""

INITIAL_GATE = 0.8
"""Share of the window in a fresh mix. Of pretrained MiniLM with a window of 64, untrained otherwise, the mean-pooled
embeddings keep a cosine of 0.92 with the softmax model's at 0.8, 0.88 at 0.5 and 0.91 at 1 (24 licence texts)."""


class FeatureMap(nn.Module):
    """Map queries and keys of each head from D to a larger number F of features: [B, H, N, D] -> [B, H, N, F].

    Feature j starts as a copy of feature j mod D plus noise of standard deviation `FEATURE_NOISE` per weight, with the
    copies weighted so that, without the noise, factorized attention of the mapped tensors equals that of the plain
    ones for any F: a query bias of -log(copies) under the softmax, a factor 1/sqrt(copies) in "scaling". The parameters
    hold the departure from these copies, so weight decay pulls towards the plain operator. Keys need no bias: the
    softmax over positions removes it.
    """

    def __init__(self, num_heads: int, head_size: int, num_features: int, normalization: str):
        super().__init__()
        self.head_size, self.num_features, self.normalization = head_size, num_features, normalization
        self.query_weight = nn.Parameter(torch.empty(num_heads, head_size, num_features))
        self.query_bias = nn.Parameter(torch.empty(num_heads, num_features))
        self.key_weight = nn.Parameter(torch.empty(num_heads, head_size, num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query_weight, std=FEATURE_NOISE)
        nn.init.zeros_(self.query_bias)
        nn.init.normal_(self.key_weight, std=FEATURE_NOISE)

    def _copies(self) -> tuple[Tensor, Tensor]:
        """The copying matrix [D, F] and the number of copies that share each feature [F]."""
        source = torch.arange(self.num_features, device=self.query_weight.device) % self.head_size
        copying = F.one_hot(source, self.head_size).T.to(self.query_weight.dtype)
        counts = copying.sum(dim=1)[source]
        return copying, counts

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        copying, counts = self._copies()
        bias: Tensor = self.query_bias
        if self.normalization == "scaling":
            copying = copying / counts.sqrt()
        else:
            bias = bias - counts.log()
        mapped_query = query @ (copying + self.query_weight) + bias[:, None]
        return mapped_query, key @ (copying + self.key_weight)


class LocalConvolution(nn.Module):
    """Depthwise convolution over neighbouring values, zero-initialised: [B, H, *grid, D] -> [B, H, *grid, D]."""

    def __init__(self, num_channels: int, kernel_size: int, spatial_rank: int):
        super().__init__()
        self.spatial_rank = spatial_rank
        self.weight = nn.Parameter(torch.empty(num_channels, 1, *[kernel_size] * spatial_rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, value: Tensor) -> Tensor:
        batch, heads, *grid, width = value.shape
        channels_first = value.movedim(-1, 2).reshape(batch, heads * width, *grid)
        convolve = F.conv1d if self.spatial_rank == 1 else F.conv2d
        mixed = convolve(channels_first, self.weight, padding=self.weight.shape[-1] // 2, groups=self.weight.shape[0])
        return mixed.reshape(batch, heads, width, *grid).movedim(2, -1)


class FactorizedMixer(nn.Module):
    """Mix tokens by factorized attention and its optional local terms: Q, K, V [B, H, N, D] -> [B, H, N, D].

    `spatial_rank` is 1 for text and 2 for images. The gate starts at g = `INITIAL_GATE`.
    """

    def __init__(self, config, spatial_rank: int):
        super().__init__()
        num_heads = config.num_attention_heads
        head_size = config.hidden_size // num_heads
        num_features = config.key_feature_size or head_size
        self.normalization, self.window = config.attention_normalization, config.local_window
        self.feature_map = (
            FeatureMap(num_heads, head_size, num_features, self.normalization) if num_features > head_size else None
        )
        self.local_convolution = (
            LocalConvolution(config.hidden_size, config.local_kernel_size, spatial_rank)
            if config.local_kernel_size
            else None
        )
        self.window_gate = nn.Parameter(torch.empty(num_heads)) if self.window else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.window_gate is not None:
            nn.init.constant_(self.window_gate, math.log(INITIAL_GATE / (1.0 - INITIAL_GATE)))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, grid: tuple[int, ...] | None = None
    ) -> Tensor:
        """`mask` is bool [B, N], True = real. `grid` is (rows, columns) of the patches, which come last; None: text."""
        if mask is not None:
            value = value.masked_fill(~mask[:, None, :, None], 0.0)
        query_features, key_features = (query, key) if self.feature_map is None else self.feature_map(query, key)
        # Autocast may have split the dtypes.
        query_features, key_features = query_features.to(value.dtype), key_features.to(value.dtype)
        mixed = factorized_attention(query_features, key_features, value, mask, normalization=self.normalization)
        if self.window_gate is None and self.local_convolution is None:
            return mixed

        grid = grid or (query.shape[2],)
        num_prefix = query.shape[2] - math.prod(grid)
        grid_query, grid_key, grid_value = (t[:, :, num_prefix:].unflatten(2, grid) for t in (query, key, value))
        local = mixed[:, :, num_prefix:]
        if self.window_gate is not None:
            grid_mask = None if mask is None else mask[:, num_prefix:].unflatten(1, grid)
            gate = self.window_gate.sigmoid().to(mixed.dtype)[:, None, None]
            window = window_attention(grid_query, grid_key, grid_value, grid_mask, self.window).flatten(2, -2)
            local = local + gate * (window.to(mixed.dtype) - local)
        if self.local_convolution is not None:
            local = local + self.local_convolution(grid_value).flatten(2, -2).to(mixed.dtype)
        return torch.cat((mixed[:, :, :num_prefix], local), dim=2) if num_prefix else local


class SoftmaxMixer(nn.Module):
    """Ordinary softmax attention, for the layers named in `softmax_layers`: Q, K, V [B, H, N, D] -> [B, H, N, D].

    Runs torch's scaled dot-product attention, or written out (N×N memory) with attn_implementation="eager".
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dropout = config.attention_probs_dropout_prob

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, grid: tuple[int, ...] | None = None
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if mask is not None:
            mask = mask | ~mask.any(dim=1, keepdim=True)  # a sample of padding alone attends to itself instead of NaN
            mask = mask[:, None, None, :]
        if self.config._attn_implementation != "eager":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        probabilities = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        return F.dropout(probabilities, dropout) @ value


def build_mixer(config, layer_index: int, spatial_rank: int) -> nn.Module:
    """The mixer of one layer, as `config.softmax_layers` says."""
    return SoftmaxMixer(config) if layer_index in config.softmax_layers else FactorizedMixer(config, spatial_rank)


def window_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """Softmax attention of each position over its real neighbours at most `window` steps away on every axis.

    The positions are cut into tiles at least `window` long; each tile attends to itself and its neighbour tiles under a
    band mask. Time and memory are O(N · window) for text and O(N · window²) for images.

    Args:
        query, key, value: [B, H, *grid, D], with one axis for text and two for images.
        mask: bool [B, *grid], True = real, or None. A position without a real neighbour gives zeros if `value` is zero
            at padding, as it is in `FactorizedMixer`.
        window: steps, at least 1.

    Returns:
        [B, H, *grid, D].
    """
    batch, heads, *grid, width = query.shape
    rank = len(grid)
    tile = max(window, 16 if rank == 1 else 3)
    # Sizes are written so that symbolic ones stay short: torch.compile takes minutes for remainders of remainders.
    tiles = [(size + tile - 1) // tile for size in grid]
    tiled_shape = [length for count in tiles for length in (count, tile)]

    def cut(tensor: Tensor, first_axis: int) -> Tensor:
        """Cut the grid axes into tiles, padding the last: [..., *grid, ...] -> [..., tiles, tile, tiles, tile, ...]."""
        padding = [amount for axis in reversed(range(rank)) for amount in (0, tiles[axis] * tile - grid[axis])]
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - first_axis - rank) + padding)
        return tensor.reshape(*tensor.shape[:first_axis], *tiled_shape, *tensor.shape[first_axis + rank :])

    def with_neighbours(tensor: Tensor, first_axis: int) -> Tensor:
        """Extend every tile by the one before and the one after it on each axis: tile -> 3 · tile."""
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - first_axis - 2 * rank) + [0, 0, 1, 1] * rank)
        for axis, count in zip(range(first_axis, first_axis + 2 * rank, 2), tiles, strict=True):
            tensor = torch.cat([tensor.narrow(axis, start, count) for start in range(3)], dim=axis + 1)
        return tensor

    def tiles_first(tensor: Tensor) -> Tensor:
        """[B, H, tiles, tile, ..., D] -> [B · tiles, H, tile positions, D]."""
        tile_axes, position_axes = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
        tensor = tensor.permute(0, *tile_axes, 1, *position_axes, 2 + 2 * rank)
        return tensor.flatten(0, rank).flatten(2, -2)

    real = query.new_ones(batch, *grid, dtype=torch.bool) if mask is None else mask
    real = tiles_first(with_neighbours(cut(real, 1), 1)[:, None, ..., None])  # [B · tiles, 1, key positions, 1]
    near, itself = _band(tile, window, rank, query.device)
    # Every query may see itself, real or not, so that no row is empty; padded values are zero.
    allowed = (near & real.transpose(2, 3)) | itself
    query, key, value = cut(query, 2), with_neighbours(cut(key, 2), 2), with_neighbours(cut(value, 2), 2)
    mixed = _masked_attention(tiles_first(query), tiles_first(key), tiles_first(value), allowed)
    mixed = mixed.unflatten(2, [tile] * rank).unflatten(0, [batch, *tiles])
    order = [0, 1 + rank, *(axis for i in range(rank) for axis in (1 + i, 2 + rank + i)), 2 + 2 * rank]
    mixed = mixed.permute(order).reshape(batch, heads, *(count * tile for count in tiles), width)
    for axis, size in enumerate(grid):
        mixed = mixed.narrow(2 + axis, 0, size)
    return mixed


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention where `allowed` is true; some position must be, in every row."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.device.type == "cpu" and is_half and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    # Written out, forward and backward take 0.4 × the time: torch 2.13's fused backward is slow in bfloat16 on CPU.
    bias = torch.where(allowed, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
    return scores.softmax(dim=-1).to(value.dtype) @ value


def _band(tile: int, window: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of three tiles' positions each position of the middle one may see, and which one is itself."""
    offset = torch.arange(3 * tile, device=device) - tile - torch.arange(tile, device=device)[:, None]
    near, same = offset.abs() <= window, offset == 0
    if rank == 2:
        near, same = (torch.kron(axis.byte(), axis.byte()).bool() for axis in (near, same))
    return near, same
