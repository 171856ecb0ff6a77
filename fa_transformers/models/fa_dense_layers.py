"""The parts of FADense between backbone and losses: pyramid, towers, heads, masks, and the choice of objects.

Paper of the blocks: Shen et al. 2021, arXiv:1812.01243. The pyramid is that of Lin et al. 2017, arXiv:1612.03144; the
heat map of centres and its peaks are CenterNet's (Zhou et al. 2019, arXiv:1904.07850), box distances FCOS's (Tian et
al. 2019, arXiv:1904.01355), and masks whose filters a place predicts CondInst's (Tian et al. 2020, arXiv:2003.05664).

Shape letters: B batch, C channels, H and W image height and width, h and w those of the heat map, K objects, L labels,
M channels of mask features.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_fa_dense import HEAD_STRIDE, LEVEL_PLACES, MASK_STRIDE, FADenseConfig
from .fa_block import insert_block
from .modeling_fa_resnet import group_norm

FLOOR = -20.0
"""Logit of what is not there: other labels of an object, places outside its window, objects beyond those found."""
HIDDEN = 8
"""Width of the hidden layer of the two that a mask's filters are."""
MARGIN = 0.25
"""Share of its sides that a box grows by on each side to the window in which its mask is looked for."""
LOG_LIMIT = 8.0
"""Greatest absolute logarithm of a box distance, in units of the stride."""


def begun(size: int, stride: int) -> int:
    """Return how many places of a stride a side begins."""
    return -(-size // stride)


def convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A convolution that keeps the size, a group norm, and a rectifier, which works in place."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        group_norm(out_channels),
        nn.ReLU(inplace=True),
    )


class HeatmapOutput(nn.Conv2d):
    """The 1×1 convolution to heat map logits, which starts near the prior probability everywhere."""

    def __init__(self, in_channels: int, num_labels: int, prior: float) -> None:
        self.start = math.log(prior / (1 - prior))
        super().__init__(in_channels, num_labels, kernel_size=1)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        assert self.bias is not None
        nn.init.constant_(self.bias, self.start)


class FilterOutput(nn.Linear):
    """The linear map to a mask's filters. Its bias, which all masks share, starts as weights of a layer do."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.normal_(self.bias, std=0.3)


class Pyramid(nn.Module):
    """Feature pyramid with a block after chosen levels: the backbone's maps -> one map [B, C, h, w] of stride 8."""

    def __init__(self, config: FADenseConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width, places = config.pyramid_channels, config.places
        levels = list(channels) * len(LEVEL_PLACES) if len(channels) == 1 else list(channels)[-len(LEVEL_PLACES) :]
        self.laterals = nn.ModuleList(nn.Conv2d(channel, width, kernel_size=1) for channel in levels)
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in levels[1:])  # all but the coarsest
        self.attention_blocks = nn.ModuleDict(
            {
                place: insert_block(config.attention_kind, width, config.key_channels, config.attention_heads)
                for place in LEVEL_PLACES
                if place in places
            }
        )

    def forward(self, maps: Sequence[Tensor], height: int, width: int) -> Tensor:
        """Merge maps of strides 8, 16 and 32, or one for all, of images of a size; others are resized to these."""
        maps = list(maps) * len(LEVEL_PLACES) if len(maps) == 1 else list(maps)[-len(LEVEL_PLACES) :]
        merged: Tensor | None = None
        for index in reversed(range(len(LEVEL_PLACES))):
            stride = HEAD_STRIDE << index
            level = resize(self.laterals[index](maps[index]), begun(height, stride), begun(width, stride))
            if merged is not None:
                level = self.smooth[index](level + double(merged, *level.shape[2:]))
            merged = level
            place = LEVEL_PLACES[index]
            if place in self.attention_blocks:
                merged = self.attention_blocks[place](merged)
        assert merged is not None
        return merged


def resize(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize maps [B, C, ...] that have another size, bilinearly."""
    if maps.shape[2:] == (height, width):
        return maps
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False, antialias=False)


def double(maps: Tensor, height: int, width: int) -> Tensor:
    """Double a map's places and cut it to the size of the finer map, whose places 2i and 2i + 1 lie in its place i."""
    return F.interpolate(maps, scale_factor=2.0, mode="nearest")[:, :, :height, :width]


class Heads(nn.Module):
    """Heat map of centres over all places, and boxes of chosen ones, of the map [B, C, h, w]."""

    def __init__(self, config: FADenseConfig) -> None:
        super().__init__()
        width = config.pyramid_channels
        self.heatmap_tower = convolution(width, width, 3)
        self.heatmap = HeatmapOutput(width, config.num_labels, config.heatmap_prior)
        self.object_tower = convolution(width, width, 3)
        self.distances = nn.Linear(width, 4)

    def boxes(self, features: Tensor, places: Tensor) -> Tensor:
        """Return boxes (left, top, right, bottom) in pixels: features [K, C], places (row, column) int [K, 2].

        Distances from the place's middle are stride · exp(output), FCOS's.
        """
        outputs = self.distances(features)
        # Pixel coordinates of large images need more digits than half precision has.
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        distances = HEAD_STRIDE * outputs.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
        middle = (places.flip(1).to(distances.dtype) + 0.5) * HEAD_STRIDE
        return torch.cat([middle - distances[:, :2], middle + distances[:, 2:]], dim=1)


class MaskHead(nn.Module):
    """Masks at stride 4, each by two 1×1 layers whose weights its place predicts, within a window around its box.

    The layers see M features and the place relative to the box, so that the cost is that of the objects' areas.
    """

    def __init__(self, config: FADenseConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width, features = config.pyramid_channels, config.mask_channels
        self.features = features
        self.coarse = nn.Conv2d(width, features, kernel_size=1)
        self.fine = nn.Conv2d(channels[0], features, kernel_size=1) if len(channels) == 4 else None
        self.smooth = nn.Sequential(group_norm(features), nn.ReLU(inplace=True), convolution(features, features, 3))
        self.sizes = ((features + 2) * HIDDEN, HIDDEN, HIDDEN, 1)
        self.filters = FilterOutput(width, sum(self.sizes))

    def prepare(self, merged: Tensor, maps: Sequence[Tensor], height: int, width: int) -> Tensor:
        """Return the mask features [B, M, H/4, W/4] of the pyramid's map and, if there is one, the map of stride 4."""
        size = begun(height, MASK_STRIDE), begun(width, MASK_STRIDE)
        features = double(self.coarse(merged), *size)
        if self.fine is not None:
            features = features + resize(self.fine(maps[0]), *size)
        return self.smooth(features)

    def forward(self, features: Tensor, filters: Tensor, box: Tensor) -> tuple[tuple[slice, slice], Tensor]:
        """Return one object's window (rows, columns) and the logits in it.

        Args:
            features: the image's [M, H/4, W/4].
            filters: of the object, [sum of sizes].
            box: (left, top, right, bottom) in pixels.
        """
        rows, columns = window(box, *features.shape[1:])
        first, first_bias, last, last_bias = filters.split(self.sizes)
        left, top, right, bottom = box.to(features.dtype)
        y, x = (
            (torch.arange(part.start, part.stop, device=box.device, dtype=features.dtype) + 0.5) * MASK_STRIDE
            for part in (rows, columns)
        )
        # At least one place of mask features, as in boxes without extent.
        y = (2 * y - top - bottom) / (bottom - top).clamp(min=MASK_STRIDE)
        x = (2 * x - left - right) / (right - left).clamp(min=MASK_STRIDE)
        inside = features[:, rows, columns]
        places = torch.stack([y[:, None].expand(inside.shape[1:]), x.expand(inside.shape[1:])])
        seen = torch.cat([inside, places]).flatten(1)  # [M + 2, places of the window]
        hidden = torch.relu(torch.addmm(first_bias[:, None], first.view(HIDDEN, -1), seen))
        return (rows, columns), (last @ hidden + last_bias).view(inside.shape[1:])


def window(box: Tensor, height: int, width: int) -> tuple[slice, slice]:
    """Return the (rows, columns) of mask places that a grown box covers, one at least, on a map of some size."""
    left, top, right, bottom = box.tolist()
    parts = []
    for start, stop, size in ((top, bottom, height), (left, right, width)):
        grown = MARGIN * (stop - start) + MASK_STRIDE
        first = min(max(math.floor((start - grown) / MASK_STRIDE), 0), size - 1)
        last = min(max(math.ceil((stop + grown) / MASK_STRIDE), first + 1), size)
        parts.append(slice(first, last))
    return parts[0], parts[1]


def find_peaks(heatmap: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest peaks of all labels of one image's heat map: logits [L, h, w] -> values, labels, places.

    A peak is a place that none of its eight neighbours exceeds. At most `count` come back, highest first; places are
    (row, column) int [K, 2].
    """
    # Pooling by 3×3 would note where each maximum came from as well, which takes CPUs 20 times as long.
    padded = F.pad(heatmap.detach(), (1, 1, 1, 1), value=-math.inf)
    rows = padded[:, :-2].maximum(padded[:, 1:-1]).maximum(padded[:, 2:])
    highest = rows[:, :, :-2].maximum(rows[:, :, 1:-1]).maximum(rows[:, :, 2:])
    peaks = heatmap.masked_fill(heatmap < highest, -math.inf).flatten()
    values, indices = peaks.topk(min(count, len(peaks)))
    indices = indices[values > -math.inf]
    values, (height, width) = values[: len(indices)], heatmap.shape[1:]
    places = torch.stack([indices % (height * width) // width, indices % width], dim=1)
    return values, indices // (height * width), places


def to_fractions(boxes: Tensor, height: int, width: int) -> Tensor:
    """Cut boxes (left, top, right, bottom) [K, 4] to the image, as (centre x, centre y, width, height) in fractions."""
    scale = boxes.new_tensor([width, height, width, height])
    left_top, right_bottom = (boxes / scale).clamp(0.0, 1.0).split(2, dim=1)
    return torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=1)


def to_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return boxes (centre x, centre y, width, height) [K, 4] in fractions as (left, top, right, bottom) in pixels."""
    centre, size = boxes.split(2, dim=1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=1) * boxes.new_tensor([width, height, width, height])
