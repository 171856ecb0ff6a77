"""Local terms of a token mixer, each in O(N): a depthwise convolution over V and softmax attention over a window.

"Neighbour" means along the text, or on the patch grid for images.

Shape letters: B batch, H heads, N tokens, D head width, C = H · D; `grid` is (N,) for text, (rows, columns) for images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fa_context import without_autocast

FEWEST_BFLOAT16_CHANNELS = 32
"""Channels below which a convolution in bfloat16 runs in float32 on CPUs: torch 2.13's own may never end with fewer
than 20 and a wide kernel."""

SMALLEST_TEXT_TILE, SMALLEST_IMAGE_TILE = 16, 8
"""Positions of a window's tile along an axis, at least: smaller ones are mostly surroundings."""


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
        heads, width = value.shape[1], value.shape[-1]
        tokens = value.movedim(1, -2).flatten(-2)  # [B, *grid, C]
        weight: Tensor = self.weight
        if self.spatial_rank == 1:
            tokens, weight = tokens[:, None], weight[:, :, None]
        # Channels come last in memory and stay there: convolving along one axis as conv1d would transpose by copying.
        mixed = _depthwise(tokens.movedim(-1, 1), weight).movedim(1, -1)
        mixed = mixed[:, 0] if self.spatial_rank == 1 else mixed
        return mixed.unflatten(-1, (heads, width)).movedim(-2, 1)


def _depthwise(channels: Tensor, weight: Tensor) -> Tensor:
    """Convolve each channel with its own kernel, reading zeros outside: [B, C, rows, columns], weight [C, 1, *]."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    dtype = channels.dtype
    if channels.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if not (channels.device.type == "cpu" and dtype == torch.bfloat16 and len(weight) < FEWEST_BFLOAT16_CHANNELS):
        return F.conv2d(channels, weight, padding=padding, groups=len(weight))
    # What the products would round to bfloat16 is rounded first, so that only sums are more exact.
    with without_autocast("cpu"):
        channels, weight = (tensor.to(dtype).float() for tensor in (channels, weight))
        return F.conv2d(channels, weight, padding=padding, groups=len(weight)).to(dtype)


def window_attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, window: int) -> Tensor:
    """Attend from each position to the positions of its segment that are at most `window` steps away on every axis.

    The positions are cut into tiles, as long as the window or longer; each tile attends to itself and its surroundings
    under a band mask. Time and memory are O(N · window) for text and O(N · window²) for images.

    Args:
        query, key: [B, H, *grid, D], with one axis for text and two for images.
        value: [B, H, *grid, E].
        segments: [B, *grid], 0 (or False) at padding, another number for each document; None: one segment. A padded
            position attends to itself: the output is its own value, zero as `FactorizedMixer` fills padding.
        window: steps, at least 1. In eager mode, one that reaches beyond a whole axis costs what the axis costs.

    A key or value with a number that isn't finite counts as zero, so that no segment's output depends on another's
    NaN, nor on that of padding. Its own segment learns of it by the factorized term of the mixer, which is NaN there.

    Returns:
        [B, H, *grid, E].
    """
    if segments is None:
        segments = query.new_ones(query.shape[0], *query.shape[2:-1], dtype=torch.int32)
    key, value = _zero_unless_finite(key), _zero_unless_finite(value)
    if query.dim() == 4:
        return _text_window(query, key, value, segments, _clip(window, query.shape[2], SMALLEST_TEXT_TILE))
    windows = [_clip(window, size, SMALLEST_IMAGE_TILE) for size in query.shape[2:-1]]
    return _image_window(query, key, value, segments, windows)


def _zero_unless_finite(tensor: Tensor) -> Tensor:
    """Set what isn't finite to zero, [B, H, *grid, D], and keep the layout in memory.

    With gradients whole vectors become zero: autograd then keeps a mask of the positions, not the tensor.
    """
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor.nan_to_num(0.0, 0.0, 0.0)
    tokens = tensor.movedim(1, -2)  # as they lie in memory: `masked_fill` doesn't keep strides
    # In a fraction of the time of `isfinite` of every number.
    is_finite = tokens.detach().abs().amax(dim=-1, keepdim=True).isfinite()
    return tokens.masked_fill(~is_finite, 0.0).movedim(-2, 1)


def _clip(window: int, size: int, smallest_tile: int) -> int:
    """Return a window as long as an axis of `size` positions needs, or as the smallest tile takes anyway.

    Not in graphs, which may serve other sizes.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return window
    return min(window, max(size, smallest_tile))


def _text_window(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, window: int) -> Tensor:
    """Attend in tiles of one row that holds all samples, told apart by their segments; keys are a view of that row.

    Keys and values must be finite: 0 · NaN would carry a NaN over to a neighbouring segment.
    """
    batch, heads, length, width = query.shape
    tile = max(window, SMALLEST_TEXT_TILE)
    count = (batch * length + tile - 1) // tile
    missing = count * tile - batch * length
    if batch > 1:  # samples become segments of one row
        sample = torch.arange(batch, device=segments.device)[:, None]
        segments = (segments.long() * batch + sample).where(segments != 0, 0)

    def as_row(tensor: Tensor, before: int, after: int) -> Tensor:
        """Join samples: [B, H, N, D] -> [positions, H, D], by a view where nothing is padded and memory allows."""
        row = tensor.transpose(1, 2).flatten(0, 1)
        return F.pad(row, (0, 0, 0, 0, before, after)) if before or after else row

    def surroundings(tensor: Tensor) -> Tensor:
        """Cut tiles with `window` positions on each side: [B, H, N, D] -> [tiles, H, tile + 2 · window, D]."""
        row = as_row(tensor, window, window + missing)
        if not (torch.is_grad_enabled() and tensor.requires_grad) or tile != window:
            return row.unfold(0, tile + 2 * window, tile).transpose(2, 3)
        # The same as copies, since gradients of overlapping views add up slowly.
        tiles = row.unflatten(0, (count + 2, tile))
        return torch.cat((tiles[:-2], tiles[1:-1], tiles[2:]), dim=1).transpose(1, 2)

    near = F.pad(segments.flatten(), (window, window + missing)).unfold(0, tile + 2 * window, tile)[:, None]
    own = near[:, :, window : window + tile].transpose(1, 2)
    offset = (
        torch.arange(-window, tile + window, device=query.device) - torch.arange(tile, device=query.device)[:, None]
    )
    # Every query may see itself, real or not, so that no row is empty; padded values are zero.
    allowed = ((offset.abs() <= window) & (own == near) & (own != 0)) | (offset == 0)
    tiles = as_row(query, 0, missing).unflatten(0, (count, tile)).transpose(1, 2)
    mixed = _masked_attention(tiles, surroundings(key), surroundings(value), allowed[:, None])
    mixed = mixed.transpose(1, 2).flatten(0, 1)[: batch * length]
    return mixed.unflatten(0, (batch, length)).transpose(1, 2)


def _image_window(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, windows: list[int]) -> Tensor:
    """Attend in tiles, each with copies of the positions around it: as many as each axis' window has."""
    batch, heads, *grid, _ = query.shape
    rank, tile = len(grid), [max(window, SMALLEST_IMAGE_TILE) for window in windows]
    # Sizes are written so that symbolic ones stay short: torch.compile takes minutes for remainders of remainders.
    tiles = [(size + length - 1) // length for size, length in zip(grid, tile, strict=True)]
    tiled_shape = [length for pair in zip(tiles, tile, strict=True) for length in pair]

    def cut(tensor: Tensor, first_axis: int) -> Tensor:
        """Cut the grid axes into tiles, padding the last: [..., *grid, ...] -> [..., tiles, tile, tiles, tile, ...]."""
        padding = [amount for axis in reversed(range(rank)) for amount in (0, tiles[axis] * tile[axis] - grid[axis])]
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - first_axis - rank) + padding)
        return tensor.reshape(*tensor.shape[:first_axis], *tiled_shape, *tensor.shape[first_axis + rank :])

    def with_neighbours(tensor: Tensor, first_axis: int) -> Tensor:
        """Extend every tile by its neighbours' nearest positions on each axis: tile -> tile + 2 · window."""
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - first_axis - 2 * rank) + [0, 0, 1, 1] * rank)
        axes = range(first_axis, first_axis + 2 * rank, 2)
        for axis, count, length, window in zip(axes, tiles, tile, windows, strict=True):
            before, itself, after = (tensor.narrow(axis, start, count) for start in range(3))
            parts = before.narrow(axis + 1, length - window, window), itself, after.narrow(axis + 1, 0, window)
            tensor = torch.cat(parts, dim=axis + 1)
        return tensor

    def tiles_first(tensor: Tensor) -> Tensor:
        """Move the tiles to the front: [B, H, tiles, tile, ..., D] -> [B · tiles, H, tile positions, D]."""
        tile_axes, position_axes = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
        tensor = tensor.permute(0, *tile_axes, 1, *position_axes, 2 + 2 * rank)
        return tensor.flatten(0, rank).flatten(2, -2)

    query_segments = tiles_first(cut(segments, 1)[:, None, ..., None])  # [B · tiles, 1, query positions, 1]
    key_segments = tiles_first(with_neighbours(cut(segments, 1), 1)[:, None, ..., None]).transpose(2, 3)
    near, itself = _band(tile, windows, query.device)
    # Every query may see itself, real or not, so that no row is empty; padded values are zero.
    allowed = (near & (query_segments == key_segments) & (key_segments != 0)) | itself
    query, key, value = cut(query, 2), with_neighbours(cut(key, 2), 2), with_neighbours(cut(value, 2), 2)
    mixed = _masked_attention(tiles_first(query), tiles_first(key), tiles_first(value), allowed)
    mixed = mixed.unflatten(2, tile).unflatten(0, [batch, *tiles])
    order = [0, 1 + rank, *(axis for i in range(rank) for axis in (1 + i, 2 + rank + i)), 2 + 2 * rank]
    whole = [count * length for count, length in zip(tiles, tile, strict=True)]
    mixed = mixed.permute(order).reshape(batch, heads, *whole, value.shape[-1])
    for axis, size in enumerate(grid):
        mixed = mixed.narrow(2 + axis, 0, size)
    return mixed


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Compute softmax attention where `allowed` is true, in every row at least once."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.device.type == "cpu" and is_half and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    # Written out, forward and backward take 0.4 × the time: torch 2.13's fused backward is slow in bfloat16 on CPU.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    scores = scores.masked_fill(~allowed, torch.finfo(query.dtype).min)
    return scores.softmax(dim=-1).to(value.dtype) @ value


def _band(tile: list[int], windows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two masks [tile, tile with surroundings]: positions within the window, and the position itself."""
    near = same = torch.ones(1, 1, dtype=torch.uint8, device=device)
    for length, window in zip(tile, windows, strict=True):
        offset = torch.arange(-window, length + window, device=device) - torch.arange(length, device=device)[:, None]
        near, same = torch.kron(near, (offset.abs() <= window).byte()), torch.kron(same, (offset == 0).byte())
    return near.bool(), same.bool()
