"""FADense: detection and instance segmentation at any resolution, with factorized attention in backbone and pyramid.

An image's backbone maps are merged to one map of stride 8, on which a heat map says where objects of each label have
their centres. Its peaks are the objects: no anchors, no suppression of doubles, no matching. A peak's features give the
box and the filters that its mask is computed with. All parts are convolutions and attention blocks linear in pixels.

Images of a batch may differ in size: those of one size run together, unpadded, so that each gives what it gives alone.

Paper of the blocks: Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243.
`fa_dense_layers.py` names those of the other parts, `fa_dense_losses.py` has the losses.

Shape letters: B batch, H and W height and width of the padded batch, Q objects returned, L labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_fa_dense import MASK_STRIDE, FADenseConfig
from .configuration_fa_resnet import FAResNetConfig
from .configuration_fa_vit import FAViTConfig
from .fa_block import BlockProjection
from .fa_dense_layers import (
    FLOOR,
    FilterOutput,
    Heads,
    HeatmapOutput,
    MaskHead,
    Pyramid,
    begun,
    find_peaks,
    to_fractions,
)
from .fa_dense_losses import centres, check_labels, image_losses, mask_loss, to_pixels
from .fa_validation import as_bool_mask
from .modeling_fa_resnet import FAResNetBackbone
from .modeling_fa_vit import FAViTBackbone

# isort: split
# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. A test keeps
# the list whole; it can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .configuration_fa import CheckedConfig  # noqa: F401
from .fa_attention import factorized_attention  # noqa: F401
from .fa_attention_blocked import blocked_attention  # noqa: F401
from .fa_attention_triton import why_unsupported  # noqa: F401
from .fa_checkpoint_names import translate_vit_name  # noqa: F401
from .fa_chunked import slices  # noqa: F401
from .fa_context import Workspace  # noqa: F401
from .fa_layers import FAEncoder  # noqa: F401
from .fa_layout import Layout  # noqa: F401
from .fa_local import LocalConvolution  # noqa: F401
from .fa_mixer import FeatureMap  # noqa: F401
from .fa_packed import PackedDocuments  # noqa: F401
from .fa_sequence_parallel import sequence_parallel  # noqa: F401
from .fa_triton_kernels import triton  # noqa: F401
from .fa_vit_layers import patch_grid  # noqa: F401
from .modeling_fa import FAPreTrainedModel  # noqa: F401

OWN_BACKBONES = {FAResNetConfig.model_type: FAResNetBackbone, FAViTConfig.model_type: FAViTBackbone}


@dataclass
class FADenseOutput(ModelOutput):
    """Objects of each image, surest first, in the shapes of DETR.

    Attributes:
        loss: weighted sum of the losses, if labels were given.
        loss_dict: the losses before weighting: "loss_heatmap", "loss_giou" and, for masks, "loss_mask".
        logits: [B, Q, L]; sigmoid gives the probability of each label. All but an object's own are -20, as are all of
            the objects that an image has fewer than Q.
        pred_boxes: [B, Q, 4] as (centre x, centre y, width, height) in fractions of the image's own size.
        pred_masks: logits [B, Q, H/4, W/4] (begun places of 4 pixels) of instance segmentation, except in training. Of
            an image's own size; -20 outside, and far from the object's box.
        image_sizes: int64 [B, 2], height and width of each image without padding.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None
    image_sizes: Tensor | None = None


class FADensePreTrainedModel(PreTrainedModel):
    """Base of the FADense models: loading, and how fresh weights are drawn."""

    config_class = FADenseConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Pyramid", "Heads", "MaskHead"]
    COMPARED_MODULES = ("heads.heatmap", "heads.object_tower", "mask_head.smooth")
    """Modules whose maps say how far rounding moves the answer; objects are chosen from them by comparison, so that a
    rounding may give another object, however small it is."""

    @classmethod
    def from_backbone(cls, path: str, config: FADenseConfig, **options):
        """Build a model of `config` around the pretrained weights of a backbone; its heads are drawn.

        Args:
            path: a folder, or an id of the Hub, with weights for the backbone that `config.backbone_config` describes.
            config: of the whole model.
            options: passed to the backbone's `from_pretrained`.
        """
        model = cls(config)
        model.backbone = type(model.backbone).from_pretrained(path, config=config.backbone_config, **options)
        return model

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (BlockProjection, HeatmapOutput, FilterOutput)):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class FADenseForObjectDetection(FADensePreTrainedModel):
    """Find objects: images -> labels and boxes of up to Q objects each."""

    has_masks = False
    backbone_is_frozen = False

    def __init__(self, config: FADenseConfig):
        config.check_fields()
        super().__init__(config)
        build = OWN_BACKBONES.get(config.backbone_config.model_type, AutoBackbone.from_config)
        self.backbone = build(config.backbone_config)
        channels = self.backbone.channels
        self.pyramid = Pyramid(config, channels)
        self.heads = Heads(config)
        self.mask_head = MaskHead(config, channels) if self.has_masks else None
        self.post_init()

    def freeze_backbone(self, *, pyramid: bool = False) -> None:
        """Keep the backbone as it is while the rest trains: no gradients, no dropout, no new statistics of batches.

        Args:
            pyramid: keep the layers of the pyramid too, so that only its attention blocks and the heads train.
        """
        self.backbone_is_frozen = True
        frozen = [self.backbone, *((self.pyramid.laterals, self.pyramid.smooth) if pyramid else ())]
        for module in frozen:
            module.requires_grad_(False)
        self.backbone.eval()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.backbone_is_frozen:
            self.backbone.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        return_dict: bool | None = None,
    ) -> FADenseOutput | tuple:
        """Find the objects of each image, and with labels compute the loss.

        Args:
            pixel_values: [B, channels, H, W]; each image in the top left corner, padded on the right and bottom.
            pixel_mask: int or bool [B, H, W], 1 = real. None: all are.
            labels: for each image DETR's {"class_labels": int64 [K], "boxes": [K, 4]} and for instance segmentation
                "masks": bool [K, height, width] of the image's own size. "ignore", if there, is bool [height, width]:
                pixels where found objects are no mistake. An image may have no objects.
            return_dict: False returns a tuple.

        Raises:
            ValueError: an argument has another shape, real pixels are no rectangle in the top left corner, or a label
                is unknown or a box without extent; the message names it.
        """
        sizes = image_sizes(pixel_values, pixel_mask)
        if labels is not None:
            check_labels(labels, sizes, self.config.num_labels, self.has_masks)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        found: list = [None] * len(sizes)
        losses = []
        # CPUs compute convolutions fastest where a pixel's channels lie side by side. Not where gradients are recorded:
        # their backward pass has ended processes there, with damaged memory.
        is_fastest = pixel_values.device.type == "cpu" and not torch.is_grad_enabled()
        memory_format = torch.channels_last if is_fastest else torch.contiguous_format
        for (height, width), indices in groups.items():
            # In one memory format, so that a batch of one size runs as each of its images does.
            images = pixel_values if len(groups) == 1 else pixel_values[indices]
            images = images[:, :, :height, :width].to(self.dtype).contiguous(memory_format=memory_format)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_is_frozen):
                maps = self.backbone(images, return_dict=True).feature_maps
            merged = self.pyramid(maps, height, width)
            heatmaps = self.heads.heatmap(self.heads.heatmap_tower(merged))
            features = self.heads.object_tower(merged)
            masked = None if self.mask_head is None else self.mask_head.prepare(merged, maps, height, width)
            for place, index in enumerate(indices):
                own = heatmaps[place], features[place], None if masked is None else masked[place]
                found[index] = self.find(*own, (height, width))
                if labels is not None:
                    losses.append(self.image_losses(labels[index], *own, (height, width)))
        output = self.gather(found, *pixel_values.shape[2:])
        output.image_sizes = torch.tensor(sizes, device=pixel_values.device)
        if labels is not None:
            output.loss, output.loss_dict = self.weigh(losses, sum(len(entry["class_labels"]) for entry in labels))
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def find(self, heatmap: Tensor, features: Tensor, masked: Tensor | None, size: tuple[int, int]) -> tuple:
        """Return one image's objects: logits [Q, L], boxes in fractions [Q, 4], windows and logits of their masks."""
        values, classes, places = find_peaks(heatmap, self.config.num_queries)
        chosen = features[:, places[:, 0], places[:, 1]].T
        boxes = self.heads.boxes(chosen, places)
        fractions = to_fractions(boxes, *size)
        logits = values.new_full((self.config.num_queries, self.config.num_labels), FLOOR)
        logits[torch.arange(len(values), device=values.device), classes] = values.clamp(min=FLOOR)
        padding = fractions.new_tensor([0.5, 0.5, 1.0, 1.0]).expand(self.config.num_queries - len(fractions), 4)
        masks = []
        if self.mask_head is not None and masked is not None and not self.training:
            for filters, box in zip(self.mask_head.filters(chosen), to_pixels(fractions, *size), strict=True):
                masks.append(self.mask_head(masked, filters, box))
        return logits, torch.cat([fractions, padding]), masks

    def gather(self, found: list, height: int, width: int) -> FADenseOutput:
        """Put the objects of all images into one output of the padded batch's size."""
        logits, boxes = (torch.stack([image[part] for image in found]) for part in (0, 1))
        output = FADenseOutput(logits=logits, pred_boxes=boxes)
        if self.mask_head is not None and not self.training:
            shape = (len(found), self.config.num_queries, begun(height, MASK_STRIDE), begun(width, MASK_STRIDE))
            output.pred_masks = self.mask_head.coarse.weight.new_full(shape, FLOOR)
            for index, (*_, masks) in enumerate(found):
                for query, ((rows, columns), inside) in enumerate(masks):
                    output.pred_masks[index, query, rows, columns] = inside
        return output

    def image_losses(
        self,
        labels: dict[str, Tensor],
        heatmap: Tensor,
        features: Tensor,
        masked: Tensor | None,
        size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Return one image's losses, summed over its objects."""
        losses = image_losses(labels, size, heatmap, features, self.heads.boxes)
        if self.mask_head is not None and masked is not None:
            boxes = to_pixels(labels["boxes"].to(losses["loss_giou"]), *size)
            places = centres(boxes, *heatmap.shape[1:])
            filters = self.mask_head.filters(features[:, places[:, 0], places[:, 1]].T)
            masks = labels["masks"].to(features.device)
            losses["loss_mask"] = mask_loss(self.mask_head, masked, filters, boxes, masks)
        return losses

    def weigh(self, losses: list[dict[str, Tensor]], num_objects: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch's loss and its parts: sums over all images divided by the number of all objects."""
        weights = {"loss_giou": self.config.box_loss_weight, "loss_mask": self.config.mask_loss_weight}
        parts = {name: torch.stack([one[name] for one in losses]).sum() / max(num_objects, 1) for name in losses[0]}
        return torch.stack([value * weights.get(name, 1.0) for name, value in parts.items()]).sum(), parts


class FADenseForInstanceSegmentation(FADenseForObjectDetection):
    """Find objects and their masks: images -> labels, boxes and masks of up to Q objects each."""

    has_masks = True


def image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> list[tuple[int, int]]:
    """Return each image's own (height, width) in a padded batch [B, channels, H, W] with mask [B, H, W].

    Raises ValueError unless the real pixels of each are a rectangle in the top left corner.
    """
    if pixel_values.dim() != 4 or 0 in pixel_values.shape:
        raise ValueError(
            f"`pixel_values` must be [batch, channels, height, width], none 0, got {tuple(pixel_values.shape)}."
        )
    batch, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return [(height, width)] * batch
    if pixel_mask.shape != (batch, height, width):
        raise ValueError(f"`pixel_mask` must be {(batch, height, width)}, got {tuple(pixel_mask.shape)}.")
    real = as_bool_mask("pixel_mask", pixel_mask)
    if real.view(torch.uint8).all():  # of bytes 20 times as fast as of truth values, on CPUs
        return [(height, width)] * batch
    sizes = torch.stack([real.any(2).sum(1), real.any(1).sum(1)], dim=1).tolist()
    for index, (rows, columns) in enumerate(sizes):
        if not rows or not real[index, :rows, :columns].all() or int(real[index].sum()) != rows * columns:
            raise ValueError(
                f"`pixel_mask[{index}]` must be 1 in a rectangle in the top left corner and 0 elsewhere: pad images on "
                "the right and bottom."
            )
    return [(rows, columns) for rows, columns in sizes]
