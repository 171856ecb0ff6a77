"""The paper's own module: factorized attention over a feature map of any spatial rank, to insert into a network.

`SoftmaxAttentionBlock` is the same module with ordinary attention, whose cost is quadratic, to compare with.

B batch, C channels of the map, H heads, N positions of the map (its spatial sizes multiplied).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .fa_attention import factorized_attention
from .fa_validation import NORMALIZATIONS, as_bool_mask


class BlockProjection(nn.Conv1d):
    """Linear map of a block's channels. The model around the block draws it by `reset_parameters` when loading."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, N]; where a place's channels lie side by side, as a linear layer, which copies nothing."""
        places = x.transpose(1, 2)
        if not places.is_contiguous():
            return super().forward(x)
        return F.linear(places, self.weight[:, :, 0], self.bias).transpose(1, 2)


class ZeroProjection(BlockProjection):
    """A projection that starts at zero, also where a checkpoint lacks it.

    A model's `from_pretrained` draws what is missing leaf by leaf and lets nobody touch it afterwards, so that the
    block above is too late to set it to zero: the leaf itself must know.
    """

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


class FactorizedAttentionBlock(nn.Module):
    """Let every position of a feature map attend to all others, and add the result to the map.

        out = x + W_r · attention(W_q x + b_q, W_k x + b_k, W_v x + b_v) + b_r

    attention(Q, K, V) = softmax_features(Q) · (softmax_positions(K)ᵀ · V) for each head on its own slice of the
    channels, the slices in order. The four projections are 1×1 convolutions. In "softmax" the bias of `keys` has no
    effect and gets zero gradient (a constant added to all positions cancels); it exists because checkpoints of the
    paper's module hold it.

    The weights are [out, in, 1] whatever the spatial rank, so one module takes signals, images and volumes. Weights of
    1×1 Conv2d and Conv3d layers ([out, in, 1, 1], [out, in, 1, 1, 1]) load as well.

    Shapes: x [B, C, *spatial] with one or more spatial sizes -> the same.

    Args:
        in_channels: C.
        key_channels: channels of queries and keys, all heads together; the paper mostly uses C / 2.
        value_channels: channels of values, all heads together; the paper mostly uses C.
        num_heads: H; must divide `key_channels` and `value_channels`.
        normalization: "softmax" or "scaling" (Q · Kᵀ · V divided by the number of real positions).
        zero_init: start with `reprojection` at zero, so that the block is the identity until it is trained.

    Raises:
        ValueError: a count is not a positive integer, heads do not divide the channels, or `normalization` is unknown.

    Source: Shen et al. 2021, arXiv:1812.01243, section 3.3 (the efficient attention module).
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        num_heads: int = 1,
        *,
        normalization: str = "softmax",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        counts = {
            "in_channels": in_channels,
            "key_channels": key_channels,
            "value_channels": value_channels,
            "num_heads": num_heads,
        }
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {count!r}.")
        for name in ("key_channels", "value_channels"):
            if counts[name] % num_heads:
                raise ValueError(f"`{name}` ({counts[name]}) must be a multiple of `num_heads` ({num_heads}).")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"`normalization` must be one of {NORMALIZATIONS}, got {normalization!r}.")
        self.in_channels = in_channels
        self.key_channels = key_channels
        self.value_channels = value_channels
        self.num_heads = num_heads
        self.normalization = normalization
        self.zero_init = zero_init
        self.queries = BlockProjection(in_channels, key_channels)
        self.keys = BlockProjection(in_channels, key_channels)
        self.values = BlockProjection(in_channels, value_channels)
        self.reprojection = (ZeroProjection if zero_init else BlockProjection)(value_channels, in_channels)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_drop_trailing_kernel_sizes)

    def reset_parameters(self) -> None:
        """Draw the projections as convolutions usually are; with `zero_init`, set `reprojection` to zero."""
        for projection in (self.queries, self.keys, self.values, self.reprojection):
            projection.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over all real positions of each map.

        Args:
            x: [B, C, *spatial].
            mask: bool [B, *spatial], True where a position is real, or integer or floating-point zeros and ones; None
                means that all are. Other positions change nothing, whatever they hold, and are returned as they came.

        Returns:
            [B, C, *spatial].

        Raises:
            ValueError: `x` or `mask` has another shape, or `mask` another device or other numbers.
        """
        mask = self._validate(x, mask)
        features = x.flatten(2)  # [B, C, N]
        if mask is not None:
            mask = mask.flatten(1)  # [B, N]
            padding = ~mask[:, None]  # [B, 1, N]
            # Before the projections: NaN in padding would reach the weights' gradients as 0 · NaN.
            features = features.masked_fill(padding, 0.0)
        # None of the three has a name here: they are not to stay in memory beside the reprojection.
        attended = self.attend(
            self._split(self.queries(features)), self._split(self.keys(features)), self._split(self.values(features)),
            mask,
        )  # fmt: skip
        mixed = attended.transpose(-2, -1).flatten(1, 2)
        del attended
        update = self.reprojection(mixed)  # [B, C, N]
        if mask is not None:
            update = update.masked_fill(padding, 0.0)
        return x + update.view_as(x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Mix the positions of each head: Q and K [B, H, N, D], V [B, H, N, E], mask bool [B, N] -> [B, H, N, E]."""
        return factorized_attention(query, key, value, mask, normalization=self.normalization)

    def _split(self, features: Tensor) -> Tensor:
        """Cut channels into heads: [B, H·D, N] -> [B, H, N, D]."""
        return features.unflatten(1, (self.num_heads, -1)).transpose(-2, -1)

    def _validate(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the mask as bool [B, *spatial], or None; ValueError unless `x` and `mask` fit."""
        if x.dim() < 3 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"`x` must be [batch, {self.in_channels} channels, one or more spatial sizes], got {tuple(x.shape)}."
            )
        if mask is None:
            return None
        expected = (x.shape[0], *x.shape[2:])
        if mask.shape != expected:
            raise ValueError(f"`mask` must be [batch, *spatial] = {tuple(expected)}, got {tuple(mask.shape)}.")
        if mask.device != x.device:
            raise ValueError(f"`mask` is on {mask.device} but `x` is on {x.device}.")
        return as_bool_mask("mask", mask)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, normalization={self.normalization!r}"


class SoftmaxAttentionBlock(FactorizedAttentionBlock):
    """Non-local block with the parameters of `FactorizedAttentionBlock`: softmax(Q · Kᵀ / √D) · V, D = width of a head.

    Time grows with the square of the number of positions N, and so does memory where queries and values differ in
    width, as torch's fused kernel for CPUs wants them equal. A map without real positions is returned as it came.

    Source: Wang et al. 2018, arXiv:1711.07971 (embedded Gaussian), with the scale of Vaswani et al. 2017.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def insert_block(kind: str, channels: int, key_channels: int | None, num_heads: int) -> FactorizedAttentionBlock:
    """Build the block of a kind that starts as the identity, with as many values as channels.

    Args:
        kind: "factorized" or "softmax".
        channels: channels of the map.
        key_channels: channels of queries and keys; None is half the channels, rounded up to whole heads.
        num_heads: heads of attention.
    """
    if key_channels is None:
        key_channels = -(-channels // (2 * num_heads)) * num_heads
    block_class = {"factorized": FactorizedAttentionBlock, "softmax": SoftmaxAttentionBlock}[kind]
    return block_class(channels, key_channels, channels, num_heads, zero_init=True)


def _drop_trailing_kernel_sizes(
    module: FactorizedAttentionBlock, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """Turn 1×1 kernels of higher rank into those of Conv1d; leave other tensors for PyTorch to accept or refuse."""
    for name in ("queries", "keys", "values", "reprojection"):
        weight = state_dict.get(f"{prefix}{name}.weight")
        if weight is not None and weight.dim() > 3 and all(size == 1 for size in weight.shape[2:]):
            state_dict[f"{prefix}{name}.weight"] = weight.flatten(2)
