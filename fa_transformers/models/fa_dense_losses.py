"""Losses of FADense: what the heat map, the boxes and the masks of one image should be, and how far they are from it.

Labels of an image are DETR's: `class_labels` int64 [K], `boxes` [K, 4] as (centre x, centre y, width, height) in
fractions of the image, and for masks `masks` bool [K, H, W]. `ignore` bool [H, W], if given, marks pixels where the
heat map may say anything, as under crowds.

Shape letters: K objects, L labels, H and W image height and width, h and w those of the heat map.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_fa_dense import HEAD_STRIDE, MASK_STRIDE
from .fa_dense_layers import to_pixels

FOCAL_POWER, PENALTY_POWER = 2, 4
"""CenterNet's powers of the error and of the distance from a centre."""
SPREAD = 0.54
"""Share of a box's sides that is the width of the bump around its centre in the heat map's target."""
EPSILON = 1e-6


def check_labels(labels: Any, sizes: list[tuple[int, int]], num_labels: int, with_masks: bool) -> None:
    """Raise ValueError, naming the entry, unless there are labels of this file's kind for each image of the batch."""
    if len(labels) != len(sizes):
        raise ValueError(f"`labels` must have one entry for each of {len(sizes)} images, got {len(labels)}.")
    for index, (entry, size) in enumerate(zip(labels, sizes, strict=True)):
        where = f"`labels[{index}]"
        needed = ("class_labels", "boxes", *(("masks",) if with_masks else ()))
        for name in needed:
            if name not in entry:
                raise ValueError(f"{where}` must have `{name}`; it has {sorted(entry)}.")
        classes, boxes = entry["class_labels"], entry["boxes"]
        if classes.dim() != 1 or boxes.shape != (len(classes), 4):
            raise ValueError(
                f"{where}` must have `class_labels` [objects] and `boxes` [objects, 4], got {tuple(classes.shape)} and "
                f"{tuple(boxes.shape)}."
            )
        if len(classes) and (classes.is_floating_point() or not 0 <= classes.min() <= classes.max() < num_labels):
            raise ValueError(f"{where}['class_labels']` must be integers from 0 to {num_labels - 1}, got {classes}.")
        if not (boxes.isfinite().all() and (boxes[:, 2:] > 0).all() and (boxes >= 0).all() and (boxes <= 1).all()):
            raise ValueError(
                f"{where}['boxes']` must be (centre x, centre y, width, height) in fractions of the image, with sides "
                f"above 0, got {boxes}."
            )
        for name, shape in (("masks", (len(classes), *size)), ("ignore", size)):
            if name in entry and (name == "ignore" or with_masks) and tuple(entry[name].shape) != shape:
                raise ValueError(f"{where}['{name}']` must be {shape}, got {tuple(entry[name].shape)}.")


def centres(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the places (row, column) int [K, 2] of h × w with the centres of boxes [K, 4] in pixels."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / (2 * HEAD_STRIDE)
    limit = torch.tensor([width - 1, height - 1], device=boxes.device)
    return torch.minimum(middle.floor().long().clamp(min=0), limit).flip(1)


def heatmap_target(boxes: Tensor, classes: Tensor, num_labels: int, height: int, width: int) -> Tensor:
    """Return the heat map [L, h, w] of boxes [K, 4] in pixels: 1 at centres, bumps as wide as the boxes around them.

    A bump is exp(-Δy² / 2σ_y² - Δx² / 2σ_x²) with σ = (0.54 · side + 1) / 6, sides and distances in places.

    Source: Liu et al. 2020, arXiv:1909.00700 (TTFNet), with real in place of rounded radii.
    """
    target = boxes.new_zeros(num_labels, height, width)
    sides = (boxes[:, 2:] - boxes[:, :2]) / HEAD_STRIDE
    spread = (SPREAD * sides.flip(1) + 1) / 6  # of rows and columns
    places = centres(boxes, height, width)
    for place, (row_spread, column_spread), label in zip(places, spread, classes.tolist(), strict=True):
        rows = torch.arange(height, device=boxes.device) - place[0]
        columns = torch.arange(width, device=boxes.device) - place[1]
        bump = torch.outer((-((rows / row_spread) ** 2) / 2).exp(), (-((columns / column_spread) ** 2) / 2).exp())
        target[label] = torch.maximum(target[label], bump)
    return target


def heatmap_loss(logits: Tensor, target: Tensor, ignore: Tensor | None) -> Tensor:
    """Return CenterNet's focal loss, summed over places: logits and target [L, h, w], ignore bool [H, W] -> a number.

    -(1 - p)² log p at centres and -(1 - target)⁴ p² log(1 - p) elsewhere, p = sigmoid(logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probability, is_centre = logits.sigmoid(), target == 1.0
    at_centres = (1 - probability) ** FOCAL_POWER * F.logsigmoid(logits)
    elsewhere = (1 - target) ** PENALTY_POWER * probability**FOCAL_POWER * F.logsigmoid(-logits)
    losses = -torch.where(is_centre, at_centres, elsewhere)
    if ignore is not None:
        middle = HEAD_STRIDE // 2
        padded = F.pad(ignore, (0, HEAD_STRIDE, 0, HEAD_STRIDE))
        places = padded[middle::HEAD_STRIDE, middle::HEAD_STRIDE][: logits.shape[1], : logits.shape[2]]
        losses = losses.masked_fill(places & ~is_centre, 0.0)
    return losses.sum()


def box_places(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which places learn which box: places int [P, 2], box indices int [P] and weights [P] that sum to K.

    These are each centre and those of its neighbours that lie in the box, unless two boxes claim them.
    """
    centre = centres(boxes, height, width)
    steps = torch.tensor([[row, column] for row in (0, -1, 1) for column in (0, -1, 1)], device=boxes.device)
    places = centre[:, None] + steps  # [K, 9, 2], the centre first
    middle = (places.flip(2) + 0.5) * HEAD_STRIDE
    is_inside = ((middle > boxes[:, None, :2]) & (middle < boxes[:, None, 2:])).all(2)
    is_inside &= ((places >= 0) & (places < torch.tensor([height, width], device=boxes.device))).all(2)
    is_inside[:, 0] = True
    flat = (places[..., 0] * width + places[..., 1]).clamp(0, height * width - 1)
    claims = torch.zeros(height * width, dtype=torch.long, device=boxes.device)
    claims.index_add_(0, flat[is_inside], torch.ones_like(flat[is_inside]))
    keeps = is_inside & (claims[flat] == 1)
    keeps[:, 0] = True
    weights = keeps.to(boxes.dtype) / keeps.sum(1, keepdim=True)
    return places[keeps], keeps.nonzero()[:, 0], weights[keeps]


def generalized_iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - GIoU of boxes and targets (left, top, right, bottom) [P, 4], pair by pair: [P].

    Source: Rezatofighi et al. 2019, arXiv:1902.09630.
    """
    shared = (torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])).clamp(min=0)
    around = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    overlap, hull = shared.prod(1), around.prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (targets[:, 2:] - targets[:, :2]).prod(1) - overlap
    return 1 - overlap / union.clamp(min=EPSILON) + (hull - union) / hull.clamp(min=EPSILON)


def mask_loss(
    head: Callable[..., tuple[tuple[slice, slice], Tensor]],
    features: Tensor,
    filters: Tensor,
    boxes: Tensor,
    masks: Tensor,
) -> Tensor:
    """Return the sum over objects of cross-entropy plus Dice loss in each object's window.

    Args:
        head: `MaskHead.forward`.
        features: mask features [M, H/4, W/4] of the image.
        filters: of each object, [K, F].
        boxes: true boxes in pixels [K, 4].
        masks: bool [K, H, W].
    """
    # An image without objects still gives every weight a gradient, of zero, which distributed training waits for.
    total = 0.0 * (features.sum() + filters.sum()).to(torch.promote_types(features.dtype, torch.float32))
    for own_filters, box, mask in zip(filters, boxes, masks, strict=True):
        (rows, columns), logits = head(features, own_filters, box)
        pixels = mask[rows.start * MASK_STRIDE : rows.stop * MASK_STRIDE, columns.start * MASK_STRIDE :]
        pixels = pixels[:, : (columns.stop - columns.start) * MASK_STRIDE].to(total.dtype)
        target = F.avg_pool2d(pixels[None], MASK_STRIDE, ceil_mode=True)[0]
        logits = logits.to(total.dtype)
        probability = logits.sigmoid()
        dice = 1 - (2 * (probability * target).sum() + 1) / (probability.square().sum() + target.square().sum() + 1)
        total = total + F.binary_cross_entropy_with_logits(logits, target) + dice
    return total


def image_losses(
    labels: dict[str, Tensor],
    size: tuple[int, int],
    heatmap: Tensor,
    features: Tensor,
    box_head: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return one image's losses, summed over its objects, by name.

    Args:
        labels: of the image.
        size: its (height, width).
        heatmap: logits [L, h, w].
        features: [C, h, w] that boxes are read from.
        box_head: `Heads.boxes`.
    """
    height, width = heatmap.shape[1:]
    dtype = torch.promote_types(heatmap.dtype, torch.float32)
    boxes = to_pixels(labels["boxes"].to(heatmap.device, dtype), *size)
    classes = labels["class_labels"].to(heatmap.device)
    target = heatmap_target(boxes, classes, len(heatmap), height, width)
    ignore = labels.get("ignore")
    losses = {"loss_heatmap": heatmap_loss(heatmap, target, None if ignore is None else ignore.to(heatmap.device))}
    places, owners, weights = box_places(boxes, height, width)
    predicted = box_head(features[:, places[:, 0], places[:, 1]].T, places)
    losses["loss_giou"] = (generalized_iou_loss(predicted, boxes[owners]) * weights).sum()
    return losses
