"""Local terms of a token mixer, each in O(N): a depthwise convolution over V and softmax attention over a window.

"Neighbour" means along the text, or on the patch grid for images.

Shape letters: B batch, H heads, N tokens, D head width, C = H · D; `grid` is (N,) for text, (rows, columns) for images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def window_attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, window: int) -> Tensor:
    """Softmax attention of each position over those of its own segment at most `window` steps away on every axis.

    The positions are cut into tiles at least `window` long; each tile attends to itself and its neighbour tiles under a
    band mask. Time and memory are O(N · window) for text and O(N · window²) for images.

    Args:
        query, key, value: [B, H, *grid, D], with one axis for text and two for images.
        segments: [B, *grid], 0 (or False) at padding, another number for each document; None: all are of one. What a
            padded position gives is its own value: zeros, as `FactorizedMixer` fills padding with zeros.
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

    if segments is None:
        segments = query.new_ones(batch, *grid, dtype=torch.uint8)
    query_segments = tiles_first(cut(segments, 1)[:, None, ..., None])  # [B · tiles, 1, query positions, 1]
    key_segments = tiles_first(with_neighbours(cut(segments, 1), 1)[:, None, ..., None]).transpose(2, 3)
    near, itself = _band(tile, window, rank, query.device)
    # Every query may see itself, real or not, so that no row is empty; padded values are zero.
    allowed = (near & (query_segments == key_segments) & (key_segments != 0)) | itself
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
