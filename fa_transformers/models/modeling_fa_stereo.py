"""FAStereo: disparities of rectified stereo pairs by a cost volume, with factorized attention blocks.

The network is of the class of PSMNet, which the paper gave one such block: features that both images share, a volume of
matching costs over all disparities, 3-D convolutions in hourglasses, a soft-argmin, and a loss on every disparity map
on the way. Costs are group-wise correlations beside a few channels of either image; the last map is brought to the
image's size by learned convex combinations of neighbours. Norms are group norms: batch norms of one or two pairs differ
between training and evaluation by more than the disparities.

Papers: Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243; Chang and Chen
2018, "Pyramid Stereo Matching Network", arXiv:1803.08669; Guo et al. 2019, "Group-wise Correlation Stereo Network",
arXiv:1903.04025; Teed and Deng 2020, "RAFT", arXiv:2003.12039, section 3.3 (convex upsampling).

Shape letters: B pairs, C channels, H and W sides of the image, h and w those of the features, a quarter of them rounded
up, D levels of disparity, a quarter of `max_disparity`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import DepthEstimatorOutput

from .configuration_fa_stereo import NORM_CHANNELS, STRIDE, FAStereoConfig
from .fa_block import BlockProjection, insert_block
from .fa_validation import as_bool_mask

# isort: split
# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. A test keeps
# the list whole; it can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
# The pipeline is named in the configuration, and goes where this file goes.
from .configuration_fa import CheckedConfig  # noqa: F401
from .fa_attention import factorized_attention  # noqa: F401
from .fa_attention_blocked import blocked_attention  # noqa: F401
from .fa_attention_triton import why_unsupported  # noqa: F401
from .fa_checkpoint_names import translate_vit_name  # noqa: F401
from .fa_context import Workspace  # noqa: F401
from .fa_packed import PackedDocuments  # noqa: F401
from .fa_triton_kernels import triton  # noqa: F401
from .pipeline_fa_stereo import FAStereoPipeline  # noqa: F401

SHARPNESS = 10.0
"""Factor of the plain correlation in the first costs, before it is learned: a cosine of 1 beside 0 is e^10 : 1."""


class FAStereoConvolution(nn.Sequential):
    """A 3×3 or 3×3×3 convolution and its group norm, and a ReLU unless a sum comes first."""

    def __init__(self, rank: int, in_channels: int, out_channels: int, *, stride=1, dilation=1, activate=True):
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[rank]
        layers = [
            convolution(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False),
            nn.GroupNorm(out_channels // NORM_CHANNELS, out_channels),
        ]
        super().__init__(*layers, *([nn.ReLU()] if activate else []))


class FAStereoOutput(nn.Conv3d):
    """Costs from the volume, or weights from the features (as a volume of one level); starts near zero."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)


class FAStereoResidual(nn.Module):
    """Two convolutions around a residual connection: [B, C, h, w] -> the same."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.first = FAStereoConvolution(2, channels, channels, dilation=dilation)
        self.second = FAStereoConvolution(2, channels, channels, dilation=dilation, activate=False)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(features + self.second(self.first(features)))


class FAStereoFeatures(nn.Module):
    """Features of single images at a quarter of their size: [n, channels, H, W] -> [n, C, h, w]."""

    def __init__(self, config: FAStereoConfig):
        super().__init__()
        width = config.feature_channels
        half = max(NORM_CHANNELS, width // 2 // NORM_CHANNELS * NORM_CHANNELS)
        self.stem = nn.Sequential(
            FAStereoConvolution(2, config.num_channels, half, stride=2),
            FAStereoConvolution(2, half, half),
            FAStereoConvolution(2, half, width, stride=2),
        )
        self.layers = nn.Sequential(*(FAStereoResidual(width, dilation) for dilation in config.dilations))
        self.attention = make_block(config, "features", width)

    def forward(self, images: Tensor) -> Tensor:
        return self.attention(self.layers(self.stem(images)))


class FAStereoHourglass(nn.Module):
    """Halve the volume twice along all axes and bring it back: [B, C, D, h, w] -> the same, each place with context."""

    def __init__(self, config: FAStereoConfig):
        super().__init__()
        width, double = config.volume_channels, 2 * config.volume_channels
        self.down = nn.Sequential(
            FAStereoConvolution(3, width, double, stride=2), FAStereoConvolution(3, double, double)
        )
        self.bottom = nn.Sequential(
            FAStereoConvolution(3, double, double, stride=2), FAStereoConvolution(3, double, double)
        )
        self.attention = make_block(config, "hourglasses", double)
        self.up_from_bottom = FAStereoConvolution(3, double, double, activate=False)
        self.up = FAStereoConvolution(3, double, width, activate=False)

    def forward(self, volume: Tensor) -> Tensor:
        half = self.down(volume)
        quarter = self.attention(self.bottom(half))
        half = F.relu(half + _resize(self.up_from_bottom(quarter), half))
        return F.relu(volume + _resize(self.up(half), volume))


def _resize(volume: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(volume, size=like.shape[2:], mode="trilinear", align_corners=False)


def make_block(config: FAStereoConfig, place: str, channels: int) -> nn.Module:
    """Build the attention block of a place, or the identity where the configuration wants none there."""
    if place not in config.attention_blocks:
        return nn.Identity()
    return insert_block(config.attention_kind, channels, config.key_channels, config.attention_heads)


class FAStereoForDepthEstimation(PreTrainedModel):
    """Estimate the disparities of the left image of rectified pairs: [B, 2, channels, H, W] -> [B, H, W], in pixels.

    Pairs may have any size. They are padded inside to multiples of 4 by repeating the last row and column, and each is
    computed from itself alone, whatever else the batch holds.
    """

    config_class = FAStereoConfig
    base_model_prefix = "stereo"
    main_input_name = "pixel_values"
    IMAGES_TOGETHER = 2
    """Images of one example, along the second dimension of `pixel_values`."""
    input_modalities = ("image",)
    accepts_loss_kwargs = False

    def __init__(self, config: FAStereoConfig):
        config.check_fields()
        super().__init__(config)
        width, volume_width = config.feature_channels, config.volume_channels
        self.features = FAStereoFeatures(config)
        self.matched = nn.Conv2d(width, width, 1)
        self.concatenated = nn.Conv2d(width, config.concat_channels, 1)
        self.sharpness = nn.Parameter(torch.empty(()))
        self.volume = nn.Sequential(
            FAStereoConvolution(3, config.correlation_groups + 2 * config.concat_channels, volume_width),
            FAStereoConvolution(3, volume_width, volume_width),
            make_block(config, "volume", volume_width),
        )
        self.hourglasses = nn.ModuleList(FAStereoHourglass(config) for _ in range(config.num_hourglasses))
        self.costs = nn.ModuleList(FAStereoOutput(volume_width, 1) for _ in range(1 + config.num_hourglasses))
        self.upsampling = FAStereoConvolution(2, width, width)
        self.upsampling_weights = FAStereoOutput(width, 9 * STRIDE**2)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        # Only functions of torch.nn.init are called: while loading, transformers makes them skip loaded tensors.
        if isinstance(module, BlockProjection):
            module.reset_parameters()
        elif isinstance(module, FAStereoOutput):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.01)
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif module is self:
            nn.init.constant_(module.sharpness, SHARPNESS)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        labels_mask: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> DepthEstimatorOutput | tuple[Tensor, ...]:
        """Estimate disparities.

        Args:
            pixel_values: [B, 2, channels, H, W], the left image and the right one of rectified pairs.
            pixel_mask: int or bool [B, H, W], true on the pair, which fills a rectangle at the top left; elsewhere is
                padding, which changes nothing and has the disparity 0. None: there is no padding.
            labels: [B, H, W], true disparities of the left images in pixels. The loss is the smooth absolute error
                (quadratic below 1 px), the mean over each pair's pixels and then over the pairs, summed over the
                disparity maps with the weights of `loss_decay`.
            labels_mask: bool [B, H, W], True where a label is known; None: where it is finite and above 0. Labels from
                `max_disparity` on, which the network cannot tell, are left out either way.
            return_dict: False returns a tuple.

        Returns:
            `predicted_depth`: [B, H, W], disparities in pixels, and `loss` where there are labels.

        Raises:
            ValueError: an argument has another shape; the message names it.
        """
        if pixel_values.dim() != 5 or tuple(pixel_values.shape[1:3]) != (2, self.config.num_channels):
            raise ValueError(
                f"`pixel_values` must be [pairs, 2, {self.config.num_channels} channels, height, width], got "
                f"{tuple(pixel_values.shape)}."
            )
        with_earlier = labels is not None
        sizes = real_sizes(pixel_values, pixel_mask)
        if sizes is None:
            maps = self.estimate(pixel_values, with_earlier)
        else:
            maps = self.estimate_by_size(pixel_values, sizes, with_earlier)
        loss = None
        if labels is not None:
            loss = self.compute_loss(maps, labels, labels_mask, pixel_mask)
        output = DepthEstimatorOutput(loss=loss, predicted_depth=maps[-1])
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def estimate(self, pixel_values: Tensor, with_earlier: bool = False) -> list[Tensor]:
        """Return the disparity maps [B, H, W] of pairs of one size: the last one, or all, `with_earlier`, in order.

        Earlier maps only steer the training: they are brought to the image's size linearly.
        """
        size = (pixel_values.shape[3], pixel_values.shape[4])
        features, costs = self.compute_costs(pixel_values)
        earlier = [_enlarge(self.regress(cost), size) for cost in costs[:-1]] if with_earlier else []
        return [*earlier, self.upsample(self.regress(costs[-1]), features[:, 0], size)]

    def estimate_by_size(self, pixel_values: Tensor, sizes: list[tuple[int, int]], with_earlier: bool) -> list[Tensor]:
        """Return the maps of `estimate` for pairs of several sizes, each without its padding, 0 on the padding."""
        maps: list[Tensor] = []
        for size in dict.fromkeys(sizes):
            chosen = [index for index, other in enumerate(sizes) if other == size]
            height, width = size
            parts = self.estimate(pixel_values[chosen][:, :, :, :height, :width], with_earlier)
            maps = maps or [part.new_zeros((len(sizes), *pixel_values.shape[3:])) for part in parts]
            for whole, part in zip(maps, parts, strict=True):
                whole[chosen, :height, :width] = part
        return maps

    def compute_costs(self, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return features [B, 2, C, h, w] and the costs [B, D, h, w] of every map, those of the last one last.

        The first costs are the plain correlations, and each later one adds to them what the volume says.
        """
        images = pixel_values.flatten(0, 1).to(self.matched.weight.dtype)
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        features = self.features(images)
        volume = self.match(self.matched(features), self.concatenated(features))
        correlation = self.sharpness * volume[:, : self.config.correlation_groups].mean(dim=1)
        volume = self.volume(volume)
        costs, update = [correlation], self.costs[0](volume)[:, 0]
        costs.append(correlation + update)
        for hourglass, cost in zip(self.hourglasses, self.costs[1:], strict=True):
            volume = hourglass(volume)
            update = update + cost(volume)[:, 0]
            costs.append(correlation + update)
        return features.unflatten(0, (-1, 2)), costs

    def match(self, matched: Tensor, concatenated: Tensor) -> Tensor:
        """Return the cost volume of features [2B, C, h, w] and [2B, C', h, w]: [B, groups + 2 C', D, h, w].

        Level d compares the left place x with the right place x - d: by the cosine of each group of the matched
        channels, and with the concatenated channels of both. It is zero where x - d lies outside.
        """
        groups, levels = self.config.correlation_groups, self.config.max_disparity // STRIDE
        units = F.normalize(matched.unflatten(1, (groups, -1)), dim=2).unflatten(0, (-1, 2))
        left, right = units[:, 0], units[:, 1]  # [B, groups, C / groups, h, w]
        left_own, right_own = concatenated.unflatten(0, (-1, 2)).unbind(1)
        width = left.shape[-1]
        slices: list[Tensor] = []
        for shift in range(levels):
            if shift >= width:
                slices.append(torch.zeros_like(slices[0]))
                continue
            correlation = (left[..., shift:] * right[..., : width - shift]).sum(dim=2)
            parts = torch.cat([correlation, left_own[..., shift:], right_own[..., : width - shift]], dim=1)
            slices.append(F.pad(parts, (shift, 0)))
        return torch.stack(slices, dim=2)

    def regress(self, costs: Tensor) -> Tensor:
        """Return the mean disparity under the softmax of costs [B, D, h, w] over levels, in pixels: [B, h, w].

        Sums are float32, or float64 for float64 costs: disparities of half precision would be whole pixels.
        """
        dtype = torch.promote_types(costs.dtype, torch.float32)
        levels = STRIDE * torch.arange(costs.shape[1], dtype=dtype, device=costs.device)
        # Not a matrix product, which autocast would take in half precision.
        return (costs.softmax(dim=1, dtype=dtype) * levels[:, None, None]).sum(dim=1)

    def upsample(self, disparity: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Bring disparities [B, h, w] to the image's size: each pixel is a convex combination of 9 places around it.

        The weights come from the left features [B, C, h, w].
        """
        weights = self.upsampling_weights(self.upsampling(features)[:, :, None])[:, :, 0]
        weights = weights.unflatten(1, (9, STRIDE**2)).softmax(dim=1, dtype=disparity.dtype)
        around = F.unfold(F.pad(disparity[:, None], (1, 1, 1, 1), mode="replicate"), 3)
        around = around.unflatten(2, disparity.shape[1:])[:, :, None]  # [B, 9, 1, h, w]
        return F.pixel_shuffle((weights * around).sum(dim=1), STRIDE)[:, 0, : size[0], : size[1]]

    def compute_loss(
        self, maps: list[Tensor], labels: Tensor, labels_mask: Tensor | None, pixel_mask: Tensor | None
    ) -> Tensor:
        """Return the loss of disparity maps [B, H, W] that `forward` describes; 0 for a pair without a usable label."""
        for name, given in (("labels", labels), ("labels_mask", labels_mask)):
            if given is not None and given.shape != maps[-1].shape:
                raise ValueError(
                    f"`{name}` must be [pairs, height, width] = {tuple(maps[-1].shape)}, got {tuple(given.shape)}."
                )
        known = labels.isfinite() & (labels > 0) if labels_mask is None else as_bool_mask("labels_mask", labels_mask)
        known = known & (labels < self.config.max_disparity)
        if pixel_mask is not None:
            known = known & pixel_mask.bool()
        # Unknown labels may be inf or NaN, whose product with 0 is NaN.
        labels = labels.to(maps[-1].dtype).masked_fill(~known, 0.0)
        count = known.sum(dim=(1, 2)).clamp(min=1)
        total = maps[-1].new_zeros(())
        for index, disparity in enumerate(maps):
            error = F.smooth_l1_loss(disparity, labels, reduction="none").masked_fill(~known, 0.0)
            weight = self.config.loss_decay ** (len(maps) - 1 - index)
            total = total + weight * (error.sum(dim=(1, 2)) / count).mean()
        return total


def real_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> list[tuple[int, int]] | None:
    """Return (height, width) of each pair without its padding; None where no pair has any.

    Raises:
        ValueError: the mask has another shape, or is anything but a rectangle at the top left of at least one pixel.
    """
    if pixel_mask is None:
        return None
    batch, height, width = (pixel_values.shape[axis] for axis in (0, 3, 4))
    if tuple(pixel_mask.shape) != (batch, height, width):
        raise ValueError(
            f"`pixel_mask` must be [pairs, height, width] = {(batch, height, width)}, got {tuple(pixel_mask.shape)}."
        )
    real = as_bool_mask("pixel_mask", pixel_mask)
    if real.view(torch.uint8).all():  # of bytes 20 times as fast as of truth values, on CPUs
        return None
    heights, widths = real[:, :, 0].sum(dim=1), real[:, 0].sum(dim=1)
    rows, columns = (torch.arange(size, device=real.device) for size in (height, width))
    expected = (rows < heights[:, None])[:, :, None] & (columns < widths[:, None])[:, None]
    if not torch.equal(real, expected) or not real[:, 0, 0].all():
        raise ValueError("`pixel_mask` must be true on a rectangle at the top left of each pair and nowhere else.")
    return list(zip(heights.tolist(), widths.tolist(), strict=True))


def _enlarge(disparity: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring disparities [B, h, w] to the image's size linearly: [B, H, W]."""
    whole = F.interpolate(disparity[:, None], scale_factor=STRIDE, mode="bilinear", align_corners=False)
    return whole[:, 0, : size[0], : size[1]]
