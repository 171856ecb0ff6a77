"""Options of detection's training and their defaults, in nothing but the standard library: --help has them at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..options import UNSET, OptionGroup, option

DenseTask = Literal["object-detection", "instance-segmentation"]
DATA_SOURCES = ("coco_folder", "train_annotations", "dataset_name")
"""Fields of `DenseDataOptions` that name data; without any of them a packaged set is drawn."""


@dataclass(frozen=True)
class DenseDataOptions(OptionGroup):
    """The pictures with objects to learn from: in COCO's format, a loaded data set, or else a packaged set."""

    coco_folder: Path | None = option(
        None, "folder in COCO's or Roboflow's layout: pictures, and a JSON file a split", group="objects", common=True
    )
    train_annotations: Path | None = option(
        None, "COCO file of the training pictures, instead of --coco_folder", group="objects", common=True
    )
    validation_annotations: Path | None = option(
        None, "likewise, for scores on the way; unset = a tenth of the training pictures", group="objects"
    )
    test_annotations: Path | None = option(
        None, "likewise, for the scores of the report; unset = another tenth", group="objects"
    )
    image_folder: Path | None = option(
        None, "folder in which the pictures of --train_annotations lie; unset = beside it", group="objects", common=True
    )
    dataset_name: str | None = option(
        None,
        "data set with pictures and objects: on the Hub, owner/name, or a saved one's folder",
        group="objects",
        common=True,
    )
    dataset_config_name: str | None = option(None, "configuration of --dataset_name", group="objects")
    image_column_name: str = option("image", "column with the pictures of --dataset_name", group="objects")
    objects_column_name: str = option("objects", "column with their objects", group="objects")
    drop_bad_objects: bool = option(
        False, "leave out objects and pictures that can't be used, counted in a warning", group="objects"
    )
    max_train_images: int | None = option(None, "use only this many training pictures; unset = all", group="objects")
    max_eval_images: int | None = option(
        None, "use only this many validation and test pictures each; unset = all", group="objects"
    )
    set: Literal["digits", "odd_one_out"] = option(
        "digits", "packaged set: small digits on cluttered photographs", group="packaged", common=True
    )
    num_canvases: int = option(UNSET, "canvases of --set to train on", group="packaged", common=True)
    num_eval_canvases: int = option(UNSET, "canvases of validation and of test each", group="packaged")
    canvas_size: int = option(UNSET, "side of a canvas in pixels", group="packaged", common=True)
    crop_size: int | None = option(
        UNSET, "side in pixels of the crops to train on; 0 = whole pictures", group="views", common=True
    )
    scale: tuple[float, ...] = option(
        UNSET, "lowest and highest factor on the size of a training picture", group="views"
    )
    flip: float = option(UNSET, "share of training views mirrored left to right", group="views")
    min_visible: float = option(UNSET, "share of an object below which a crop drops it", group="views")
    colour: float = option(UNSET, "largest relative change of brightness, contrast and saturation", group="views")
    swap_colours: bool = option(UNSET, "permute the channels and invert pictures too", group="views")

    @property
    def source(self) -> str | None:
        """Name of the field that names the data; None for a packaged set."""
        return next((name for name in DATA_SOURCES if getattr(self, name) is not None), None)


@dataclass(frozen=True)
class DenseModelOptions(OptionGroup):
    """The network: a folder that was trained before, or a new one of these sizes."""

    model_name_or_path: str = option(
        "none", "folder of an FADense model to start from, 'none' = new weights", group="checkpoint", common=True
    )
    attention: Literal["factorized", "softmax", "none"] | None = option(
        UNSET, "kind of the attention blocks; softmax is quadratic in the pixels", group="network", common=True
    )
    attention_places: tuple[str, ...] | None = option(
        UNSET,
        "where they stand: five, seven, or names of res1 to res4 and fp3 to fp5; unset = fp3 fp4 fp5",
        group="network",
        common=True,
    )
    key_channels: int | None = option(UNSET, "see FADenseConfig", group="network")
    attention_heads: int | None = option(UNSET, "see FADenseConfig", group="network")
    pyramid_channels: int | None = option(UNSET, "see FADenseConfig", group="network")
    mask_channels: int | None = option(UNSET, "see FADenseConfig", group="network")
    num_queries: int | None = option(UNSET, "objects that are looked for in a picture", group="network")
    hidden_sizes: tuple[int, ...] | None = option(UNSET, "see FAResNetConfig", group="network")
    depths: tuple[int, ...] | None = option(UNSET, "see FAResNetConfig", group="network")
    embedding_size: int | None = option(UNSET, "see FAResNetConfig", group="network")
    layer_type: Literal["basic", "bottleneck"] | None = option(UNSET, "see FAResNetConfig", group="network")
    backbone_name_or_path: str | None = option(
        None,
        "weights of a new network's backbone: folder, Hub id or dinov2-small, of a ResNet, ViT, DeiT, DINOv2 or FA-ViT",
        group="network",
    )
    backbone_layers: tuple[int, ...] | None = option(
        None, "layers of a ViT whose maps are used, three or one; unset = the last one", group="network"
    )
    freeze_backbone: bool = option(
        False, "keep the backbone's weights as they are; only pyramid and heads train", group="network"
    )
    freeze_pyramid: bool = option(
        False, "with --freeze_backbone, keep the pyramid's too, but for its attention blocks", group="network"
    )
    shortest_edge: int | None = option(
        None, "shorter side in pixels that pictures are scaled to; unset = as they are", group="processor"
    )
    longest_edge: int | None = option(None, "longer side in pixels that they are shrunk to", group="processor")

    @property
    def size(self) -> dict[str, int] | None:
        """The processor's `size`."""
        edges = {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}
        return {name: edge for name, edge in edges.items() if edge is not None} or None

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of `FADenseConfig` that were given."""
        names = ("key_channels", "attention_heads", "pyramid_channels", "mask_channels", "num_queries")
        fields: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.attention_places is not None:
            names_set = self.attention_places
            fields["attention_places"] = names_set[0] if len(names_set) == 1 and names_set[0] in SETS else names_set
        if self.attention == "none":  # wins over places, which a file of flags may hold
            fields["attention_places"] = []
        elif self.attention is not None:
            fields["attention_kind"] = self.attention
        return fields

    @property
    def backbone_fields(self) -> dict[str, Any]:
        """Fields of `FAResNetConfig` that were given."""
        names = ("hidden_sizes", "depths", "embedding_size", "layer_type")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


SETS = ("none", "five", "seven")
COMMON: dict[str, Any] = dict(
    per_device_train_batch_size=4, per_device_eval_batch_size=1, max_tokens_per_batch=0, group_by_length=False,
    gradient_accumulation_steps=1, max_steps=-1, weight_decay=1e-4, max_grad_norm=5.0, lr_scheduler_type="cosine",
    warmup_ratio=0.05, warmup_steps=0, seed=0, short_epochs=0, short_length=0, eval_steps=0, save_steps=0,
    save_total_limit=2, early_stopping_patience=0, load_best_model_at_end=True, num_threads=0, report_to="tensorboard",
    logging_steps=10, output_dir=Path("outputs/dense"), mixed_precision=None, learning_rate=1e-3,
    num_train_epochs=12.0, crop_size=640, scale=(0.75, 4 / 3), flip=0.5, min_visible=0.3, colour=0.2,
    swap_colours=False, num_canvases=400, num_eval_canvases=40, canvas_size=1024, attention=None,
    attention_places=None, key_channels=None, attention_heads=None, pyramid_channels=None, mask_channels=None,
    num_queries=None, hidden_sizes=None, depths=None, embedding_size=None, layer_type=None, license="unknown",
    language=None,
)  # fmt: skip
PACKAGED: dict[str, dict[str, Any]] = {
    # Digits have no mirror image, and no colour of their own. 6,000 steps. Box AP50 (mask AP50) on canvases of 512 px,
    # on one core at a rate of 2e-3: 0.45 (0.41) after 220 s with batches of four, 0.61 (0.57) after 171 s with batches
    # of two. A rate of 4e-3 was stable.
    "digits": dict(
        crop_size=416, flip=0.0, swap_colours=True, num_train_epochs=30.0, learning_rate=3e-3, eval_steps=1000,
        save_steps=1000, num_eval_canvases=30, per_device_train_batch_size=2, license="apache-2.0",
    ),
    # Classes depend on the whole canvas.
    "odd_one_out": dict(
        crop_size=0, scale=(1.0, 1.0), flip=0.0, swap_colours=True, canvas_size=512, num_canvases=800,
        num_train_epochs=14.0, learning_rate=3e-3, eval_steps=1000, save_steps=1000, per_device_train_batch_size=2,
        license="apache-2.0",
    ),
}  # fmt: skip
PRETRAINED: dict[str, Any] = dict(learning_rate=3e-4)


def recipe_of(packaged: str | None, *, is_pretrained: bool) -> dict[str, Any]:
    """Return the value of every option that was not given, by name.

    Args:
        packaged: name of the packaged set; None for a user's data.
        is_pretrained: training starts from a model's weights.

    Raises:
        ValueError: there is no such set.
    """
    if packaged is not None and packaged not in PACKAGED:
        raise ValueError(f"--set must be one of {', '.join(PACKAGED)}, got {packaged!r}.")
    return COMMON | (PACKAGED[packaged] if packaged else {}) | (PRETRAINED if is_pretrained else {})
