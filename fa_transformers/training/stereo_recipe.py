"""Options of stereo training and their defaults, in nothing but the standard library: --help has them at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..options import UNSET, OptionGroup, option


@dataclass(frozen=True)
class StereoDataOptions(OptionGroup):
    """The pairs to learn from: folders of Scene Flow, KITTI or Middlebury, or else generated scenes."""

    train_folder: Path | None = option(
        None,
        "pairs with disparities in the layout of Scene Flow, KITTI or Middlebury; unset = generated scenes",
        group="pairs",
        common=True,
    )
    validation_folder: Path | None = option(
        None, "likewise, for scores on the way; unset = a tenth of the training pairs", group="pairs", common=True
    )
    test_folder: Path | None = option(
        None, "likewise, for the scores of the report; unset = those of validation", group="pairs", common=True
    )
    png_scale: float | None = option(
        None, "disparities in PNG files are divided by this; unset = 256 and 16 bits, as KITTI's", group="pairs"
    )
    max_train_pairs: int | None = option(None, "use only this many training pairs; unset = all", group="pairs")
    max_eval_pairs: int | None = option(
        None, "use only this many validation and test pairs each; unset = all", group="pairs"
    )
    crop_height: int = option(UNSET, "height in pixels of the crops to train on", group="crops", common=True)
    crop_width: int = option(UNSET, "their width, well above --max_disparity", group="crops", common=True)
    augment: bool = option(True, "turn half of the training pairs upside down, and change their colours", group="crops")
    num_scenes: int = option(UNSET, "generated scenes to train on", group="scenes", common=True)
    num_eval_scenes: int = option(UNSET, "generated scenes of validation and of test each", group="scenes")
    scene_height: int = option(UNSET, "height in pixels of generated scenes", group="scenes")
    scene_width: int = option(UNSET, "their width", group="scenes")


@dataclass(frozen=True)
class StereoModelOptions(OptionGroup):
    """The network: a folder that was trained before, or a new one of these sizes."""

    model_name_or_path: str = option(
        "none", "folder of an FAStereo model to start from, 'none' = new weights", group="checkpoint", common=True
    )
    max_disparity: int | None = option(
        UNSET, "largest disparity to look for, in pixels, a multiple of 4", group="network", common=True
    )
    attention_blocks: tuple[str, ...] | None = option(
        UNSET,
        "where attention blocks stand: features, volume, hourglasses; none of them = no blocks",
        group="network",
        common=True,
    )
    attention_kind: Literal["factorized", "softmax"] | None = option(
        UNSET, "kind of the blocks; softmax is quadratic in the pixels", group="network"
    )
    feature_channels: int | None = option(UNSET, "see FAStereoConfig", group="network")
    volume_channels: int | None = option(UNSET, "see FAStereoConfig", group="network")
    num_hourglasses: int | None = option(UNSET, "see FAStereoConfig", group="network")
    scale_factor: float | None = option(
        None, "for inference: factor on the images' sides, below 1 for larger disparities", group="processor"
    )

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of `FAStereoConfig` that were given."""
        names = (
            "max_disparity", "attention_blocks", "attention_kind", "feature_channels", "volume_channels",
            "num_hourglasses",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


COMMON: dict[str, Any] = dict(
    per_device_train_batch_size=4, per_device_eval_batch_size=1, max_tokens_per_batch=0, group_by_length=False,
    gradient_accumulation_steps=1, max_steps=-1, weight_decay=1e-4, max_grad_norm=1.0, lr_scheduler_type="cosine",
    warmup_ratio=0.05, warmup_steps=0, seed=0, short_epochs=0, short_length=0, eval_steps=0, save_steps=0,
    save_total_limit=2, early_stopping_patience=0, load_best_model_at_end=True, num_threads=0, report_to="tensorboard",
    logging_steps=10, output_dir=Path("outputs/stereo"), mixed_precision=None, learning_rate=2e-3,
    num_train_epochs=20.0, crop_height=256, crop_width=512, num_scenes=400, num_eval_scenes=20, scene_height=256,
    scene_width=512, max_disparity=None, attention_blocks=None, attention_kind=None, feature_channels=None,
    volume_channels=None, num_hourglasses=None, license="unknown", language=None,
)  # fmt: skip
SCENES: dict[str, Any] = dict(crop_height=128, crop_width=256, num_train_epochs=40.0, eval_steps=500, save_steps=500)
PRETRAINED: dict[str, Any] = dict(learning_rate=3e-4)


def recipe_of(*, is_demo: bool, is_pretrained: bool) -> dict[str, Any]:
    """Return the value of every option that was not given, by name.

    Args:
        is_demo: the pairs are generated scenes.
        is_pretrained: training starts from a model's weights.
    """
    return COMMON | (SCENES if is_demo else {}) | (PRETRAINED if is_pretrained else {})
