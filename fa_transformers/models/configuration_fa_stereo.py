"""Configuration of FAStereo: widths of features and cost volume, the range of disparities, and the attention blocks."""

import copy

from transformers import PretrainedConfig

from .configuration_fa import CheckedConfig

# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. The import
# can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .fa_checkpoint_names import translate_config  # noqa: F401

STRIDE = 4
"""Pixels of the image along either axis, and of disparity, for one place of the cost volume."""
NORM_CHANNELS = 8
"""Channels of a group of each group norm; they must divide the widths."""
ATTENTION_BLOCKS = ("features", "volume", "hourglasses")
ATTENTION_KINDS = ("factorized", "softmax")
PIPELINE_TASK = "stereo-depth-estimation"
# Where `transformers.pipeline` finds the class for the task, and what loads its model.
CUSTOM_PIPELINES = {
    PIPELINE_TASK: {"impl": "pipeline_fa_stereo.FAStereoPipeline", "pt": ["AutoModelForDepthEstimation"]}
}


class FAStereoConfig(CheckedConfig, PretrainedConfig):
    """Configuration of `FAStereoForDepthEstimation`. The default has 0.4 M parameters.

    Args:
        max_disparity: disparities that are looked for lie from 0 to below this, in pixels; a multiple of 4. Time and
            memory grow in proportion.
        num_channels: channels of an image.
        feature_channels: channels of the feature map of either image, at a stride of 4 pixels.
        dilations: one residual layer of the feature extractor for each, with 3×3 convolutions so dilated.
        correlation_groups: groups of feature channels, each of which gives one channel of the cost volume.
        concat_channels: channels of either image that stand in the cost volume as they are.
        volume_channels: channels of the cost volume after its first convolutions.
        num_hourglasses: hourglasses of 3-D convolutions, one after the other; each has a disparity map and a loss.
        attention_blocks: where attention blocks stand: on the "features", on the cost "volume", and at the bottom of
            the "hourglasses". Blocks start as the identity. () is the network without any.
        attention_kind: "factorized", or "softmax", which is quadratic in the places, to compare with.
        key_channels: channels of queries and keys in each block; None is half the channels of its map.
        attention_heads: heads of each block.
        loss_decay: weight of the loss of each earlier disparity map as a share of the next one's.
        kwargs: the fields of transformers' `PretrainedConfig`.

    Raises:
        ValueError: a field has a value that cannot be used; the message names it.
    """

    model_type = "fa_stereo"
    AUTO_MAP = {
        "AutoConfig": "configuration_fa_stereo.FAStereoConfig",
        "AutoModelForDepthEstimation": "modeling_fa_stereo.FAStereoForDepthEstimation",
    }

    def __init__(
        self,
        max_disparity=64,
        num_channels=3,
        feature_channels=32,
        dilations=(1, 1, 2, 4),
        correlation_groups=8,
        concat_channels=4,
        volume_channels=16,
        num_hourglasses=2,
        attention_blocks=ATTENTION_BLOCKS,
        attention_kind="factorized",
        key_channels=None,
        attention_heads=1,
        loss_decay=0.5,
        **kwargs,
    ):
        kwargs.setdefault("auto_map", dict(self.AUTO_MAP))
        kwargs.setdefault("custom_pipelines", copy.deepcopy(CUSTOM_PIPELINES))
        super().__init__(**kwargs)
        self.max_disparity = max_disparity
        self.num_channels = num_channels
        self.feature_channels = feature_channels
        self.dilations = list(dilations) if isinstance(dilations, tuple) else dilations
        self.correlation_groups = correlation_groups
        self.concat_channels = concat_channels
        self.volume_channels = volume_channels
        self.num_hourglasses = num_hourglasses
        self.attention_blocks = list(attention_blocks) if isinstance(attention_blocks, tuple) else attention_blocks
        self.attention_kind = attention_kind
        self.key_channels = key_channels
        self.attention_heads = attention_heads
        self.loss_decay = loss_decay
        self.check_fields()

    def check_fields(self):
        counts = ("max_disparity", "num_channels", "feature_channels", "correlation_groups", "concat_channels")
        for name in (*counts, "volume_channels", "num_hourglasses", "attention_heads"):
            self.check_integer(name, minimum=1)
        if self.max_disparity % STRIDE or self.max_disparity < 2 * STRIDE:
            raise ValueError(
                f"`max_disparity` must be a multiple of {STRIDE} of at least {2 * STRIDE}, got {self.max_disparity}."
            )
        for name in ("feature_channels", "volume_channels"):
            if getattr(self, name) % NORM_CHANNELS:
                raise ValueError(f"`{name}` must be a multiple of {NORM_CHANNELS}, got {getattr(self, name)}.")
        if self.feature_channels % self.correlation_groups:
            raise ValueError(
                f"`correlation_groups` ({self.correlation_groups}) must divide `feature_channels` "
                f"({self.feature_channels})."
            )
        if not isinstance(self.dilations, list) or any(type(step) is not int or step < 1 for step in self.dilations):
            raise ValueError(f"`dilations` must be a list of positive integers, got {self.dilations!r}.")
        if not isinstance(self.attention_blocks, list) or any(
            name not in ATTENTION_BLOCKS for name in self.attention_blocks
        ):
            raise ValueError(f"`attention_blocks` must be a list from {ATTENTION_BLOCKS}, got {self.attention_blocks}.")
        self.check_choice("attention_kind", ATTENTION_KINDS)
        for name in ("feature_channels", "volume_channels"):
            if getattr(self, name) % self.attention_heads:
                raise ValueError(f"`attention_heads` ({self.attention_heads}) must divide `{name}`.")
        if self.key_channels is not None:
            self.check_integer("key_channels", minimum=1)
            if self.key_channels % self.attention_heads:
                raise ValueError(
                    f"`key_channels` ({self.key_channels}) must be a multiple of `attention_heads` "
                    f"({self.attention_heads})."
                )
        self.check_number("loss_decay", 0.0, 1.0)
