"""The pretrained backbone of a new detector: a ResNet, or a ViT whose attention is factorized on the way."""

import logging
from typing import Any

import torch

from ..conversion.convert import load_factorized
from ..conversion.json_file import read_json
from ..conversion.source import CheckpointSource, read_source
from ..conversion.stock_checkpoints import FAMILIES
from ..conversion.student_fields import student_fields
from ..models import FADenseConfig, FADenseForObjectDetection, FAResNetConfig, FAViTBackbone, FAViTConfig
from ..models.configuration_fa_dense import STAGE_PLACES
from .dense_recipe import DenseModelOptions

logger = logging.getLogger(__name__)

BLOCK_FIELDS = ("attention_stages", "attention_kind", "key_channels", "attention_heads")
"""Fields of a ResNet that follow from those of the whole network."""
RESNETS = (*FAResNetConfig.STOCK_MODEL_TYPES, FAResNetConfig.model_type)
VITS = tuple(name for name, family in FAMILIES.items() if family.config_class is FAViTConfig)
INPUT_FIELDS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""Fields of an image processor that decide what a backbone is fed with, beside the size."""


def build_around_backbone(
    model_class: type[FADenseForObjectDetection], options: DenseModelOptions, labels: dict[str, Any]
) -> tuple[FADenseForObjectDetection, dict[str, Any]]:
    """Build a new network on the weights that `options.backbone_name_or_path` names.

    A ResNet keeps its weights as they are. A stock ViT's layers are converted with the learned parts that `distill`
    gives its students; a FAViT keeps its own. Maps are those of `options.backbone_layers`, or else of the last layer or
    of those that the configuration of a backbone names; the layers above them are left out.

    Args:
        model_class: of the network.
        options: what was asked for.
        labels: fields of the configuration with the names of the classes.

    Returns:
        The network, and those fields of the backbone's own image processor that the network's one must have.

    Raises:
        ValueError: the checkpoint is of another type, or an option is not for a backbone of its type.
        OSError: there is no such folder or repository, or it has no configuration or weights.
    """
    source = read_source(str(options.backbone_name_or_path))
    if source.config.model_type in RESNETS:
        model = _around_resnet(model_class, source, options, labels)
    elif source.config.model_type in VITS:
        model = _around_vit(model_class, source, options, labels)
    else:
        raise ValueError(
            f"--backbone_name_or_path {source.name}: it is of type {source.config.model_type!r}; types that can be a "
            f"backbone here: {', '.join((*RESNETS, *VITS))}."
        )
    return model, _read_input_fields(source)


def make_config(options: DenseModelOptions, labels: dict[str, Any], source: str | None = None) -> FADenseConfig:
    """Return the configuration of a new network with a ResNet of the sizes that were given.

    Args:
        options: what was asked for.
        labels: fields with the names of the classes.
        source: folder with the configuration of a ResNet, whose sizes hold where none was given.
    """
    config = FADenseConfig(**options.config_fields, **labels)
    if source is None and not options.backbone_fields:
        return config
    blocks = {name: getattr(config.backbone_config, name) for name in BLOCK_FIELDS}
    fields = {"out_features": list(STAGE_PLACES.values()), **blocks, **options.backbone_fields}
    backbone = FAResNetConfig(**fields) if source is None else FAResNetConfig.from_pretrained(source, **fields)
    return FADenseConfig(backbone, **options.config_fields, **labels)


def freeze_backbone(model: FADenseForObjectDetection, name: str, *, pyramid: bool = False) -> None:
    """Freeze a network's backbone; warn where its layers were not trained since their conversion.

    Args:
        model: the network.
        name: what its weights, or those of its backbone, were loaded from.
        pyramid: freeze the pyramid too, but for its attention blocks.

    Raises:
        ValueError: the backbone has a block that was never trained and would stay the identity.
    """
    blocks = getattr(model.backbone, "attention_blocks", {})
    places = {stage: place for place, stage in STAGE_PLACES.items()}
    new = [places[stage] for stage, block in blocks.items() if not block.reprojection.weight.any()]
    if new:
        raise ValueError(
            f"--freeze_backbone would keep the blocks that --attention_places has at {' '.join(new)} the identity, as "
            f"{name} has no trained ones there; take places in the pyramid alone (fp3 fp4 fp5), or let the backbone "
            "train."
        )
    if getattr(model.config.backbone_config, "recovery", None) == "pending":
        logger.warning(
            "The backbone of %s was not trained since its attention was factorized, and a frozen one never will be: "
            "its maps are not those that the checkpoint gave. Recover it first (fa-transformers distill --task "
            "images), or train it too, at a low --learning_rate.",
            name,
        )
    model.freeze_backbone(pyramid=pyramid)


def note_trained(model: FADenseForObjectDetection) -> None:
    """Say in a trained network's configuration that the layers of its backbone were trained since their conversion."""
    config = model.config.backbone_config
    if getattr(config, "recovery", None) == "pending" and not model.backbone_is_frozen:
        config.recovery = "fine_tuned"


def _around_resnet(
    model_class: type[FADenseForObjectDetection],
    source: CheckpointSource,
    options: DenseModelOptions,
    labels: dict[str, Any],
) -> FADenseForObjectDetection:
    if options.backbone_layers is not None:
        raise ValueError(
            f"--backbone_layers is of a ViT; of --backbone_name_or_path {source.name}, a ResNet, all stages are used."
        )
    folder = str(source.model_folder)
    # Float32 whatever the checkpoint's type: in half precision an optimizer's small steps are rounded away.
    return model_class.from_backbone(folder, make_config(options, labels, folder), dtype=torch.float32)


def _around_vit(
    model_class: type[FADenseForObjectDetection],
    source: CheckpointSource,
    options: DenseModelOptions,
    labels: dict[str, Any],
) -> FADenseForObjectDetection:
    if options.backbone_fields:
        raise ValueError(
            f"--{next(iter(options.backbone_fields))} is of a ResNet; --backbone_name_or_path {source.name} is of type "
            f"{source.config.model_type!r} and brings its own sizes."
        )
    is_stock = source.config.model_type != FAViTConfig.model_type
    fields = student_fields(source.config, "images") if is_stock else {}
    if options.backbone_layers is not None:
        fields["out_indices"] = _check_layers(options.backbone_layers, source)
    backbone = load_factorized(source, "AutoBackbone", **fields)
    _cut_layers(backbone)
    model = model_class(FADenseConfig(backbone.config, **options.config_fields, **labels))
    model.backbone = backbone
    return model


def _cut_layers(backbone: FAViTBackbone) -> None:
    """Take the layers above the last map out of a backbone: nothing reads them, so that no gradient reaches them."""
    config, maps = backbone.config, backbone.out_features
    count = max(config.stage_names.index(maps[-1]), 1)
    backbone.encoder.layer = backbone.encoder.layer[:count]
    config.softmax_layers = [index for index in config.softmax_layers if index < count]
    config.num_hidden_layers = count
    config.out_features = maps
    if not config.factorized_layers:
        config.recovery = None
    backbone.stage_names, backbone.num_features = config.stage_names, backbone.num_features[: count + 1]


def _check_layers(layers: tuple[int, ...], source: CheckpointSource) -> list[int]:
    """Return the layers as a list; ValueError unless they are there, in order, and as many as a pyramid takes."""
    count = source.config.num_hidden_layers
    if len(layers) not in (1, 3) or list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= count:
        raise ValueError(
            f"--backbone_layers must be one or three rising numbers from 1 to {count}, layers of {source.name}, got "
            f"{' '.join(map(str, layers))}."
        )
    return list(layers)


def _read_input_fields(source: CheckpointSource) -> dict[str, Any]:
    """Return what the image processor beside a checkpoint does to values; {} where there is none."""
    path = None if source.model_folder is None else source.model_folder / "preprocessor_config.json"
    if path is None or not path.is_file():
        return {}
    fields = read_json(path, dict)
    return {name: fields[name] for name in INPUT_FIELDS if fields.get(name) is not None}
