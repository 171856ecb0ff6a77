"""A softmax detector, the same with a factorized encoder, and that one recovered without labels: their AP.

The detector is transformers' own Conditional DETR, trained here on drawn shapes (`shapes`): first its backbone, by the
class of every place, then the whole with its own loss. The recovery is `distill(task="object-detection")` on the
pictures alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    PreTrainedModel,
    ResNetBackbone,
    ResNetConfig,
)

from ..evaluation import evaluating
from ..metrics.detection import Detections, detection_scores
from .shapes import CLASS_NAMES, SIDE_PX, ShapePicture, class_map, detr_labels, draw_pictures

STRIDE = 8
BATCH = 16
CLIP_NORM = 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DetectorPlan:
    """Sizes of the training of the softmax detector.

    Args:
        num_train, num_test: pictures, of disjoint seeds.
        backbone_steps, steps: optimiser steps of `BATCH` pictures.
        learning_rate: peak rate; the backbone's is a third of it.
        seed: of pictures, weights and order.
    """

    num_train: int = 3000
    num_test: int = 300
    backbone_steps: int = 200
    steps: int = 2400
    learning_rate: float = 1e-3
    seed: int = 0

    def pictures(self, split: str) -> list[ShapePicture]:
        """Draw the pictures of "train" or "test"."""
        is_test = split == "test"
        return draw_pictures(self.num_test if is_test else self.num_train, 2 * self.seed + is_test)


def as_pixel_values(pictures: Sequence[ShapePicture]) -> Tensor:
    """Return the pictures as `ConditionalDetrImageProcessor` gives them, float32 [B, 3, SIDE_PX, SIDE_PX]."""
    pixels = torch.stack([torch.from_numpy(picture.pixels) for picture in pictures]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def train_detector(plan: DetectorPlan, folder: Path, log: bool = True) -> None:
    """Train the softmax detector and save it with its image processor, as any stock checkpoint."""
    torch.manual_seed(plan.seed)
    pictures = plan.pictures("train")
    pixel_values = as_pixel_values(pictures)
    backbone_config = ResNetConfig(
        embedding_size=16, hidden_sizes=[24, 48], depths=[1, 2], layer_type="basic", out_features=["stage2"]
    )
    backbone = _train_backbone(plan, ResNetBackbone(backbone_config), pixel_values, pictures)
    config = ConditionalDetrConfig(
        backbone_config=backbone_config, d_model=64, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_queries=8, dropout=0.0,
        auxiliary_loss=True, id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: index for index, name in enumerate(CLASS_NAMES)},
    )  # fmt: skip
    model = ConditionalDetrForObjectDetection(config)
    # Its batch norms are frozen copies there; all other weights learn on.
    model.model.backbone.model.load_state_dict(backbone.state_dict(), strict=False)
    model.model.unfreeze_backbone()
    groups = [
        {"params": [weight for name, weight in model.named_parameters() if ("backbone" in name) == is_backbone]}
        | {"lr": plan.learning_rate * (1 / 3 if is_backbone else 1)}
        for is_backbone in (False, True)
    ]
    labels = [detr_labels(picture) for picture in pictures]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    for step, rows in _steps(optimizer, plan.steps, len(pictures), plan.seed + 1):
        loss = model(pixel_values=pixel_values[rows], labels=[labels[row] for row in rows.tolist()]).loss
        _update(optimizer, loss, model)
        if log and step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    ConditionalDetrImageProcessor(do_resize=False, do_pad=False).save_pretrained(folder)


def _train_backbone(
    plan: DetectorPlan, backbone: ResNetBackbone, pixel_values: Tensor, pictures: Sequence[ShapePicture]
) -> ResNetBackbone:
    """Teach a backbone the class of the box over every place, as detectors start from networks that know images."""
    head = nn.Conv2d(backbone.channels[-1], len(CLASS_NAMES) + 1, kernel_size=1)
    maps = torch.stack([class_map(picture, STRIDE) for picture in pictures])
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=2e-3, weight_decay=1e-4)
    for _, rows in _steps(optimizer, plan.backbone_steps, len(pictures), plan.seed):
        loss = F.cross_entropy(head(backbone(pixel_values[rows]).feature_maps[0]), maps[rows])
        _update(optimizer, loss, backbone)
    return backbone


def _steps(optimizer: torch.optim.Optimizer, steps: int, num_rows: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each step's number from 1 on and its rows, after setting the rates: 50 steps up, then a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(1, steps + 1):
        factor = min(1.0, step / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = factor * peak
        yield step, torch.randint(num_rows, (BATCH,), generator=generator)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, module: nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
    optimizer.step()


def score_detector(model: PreTrainedModel, pictures: Sequence[ShapePicture]) -> dict[str, float]:
    """Return COCO's `box_ap`, `box_ap50` and `box_ap75` of a Conditional DETR on pictures, from 0 to 1."""
    found = []
    with evaluating(model):
        for start in range(0, len(pictures), 50):
            batch = pictures[start : start + 50]
            output = model(as_pixel_values(batch))
            scores, labels = output.logits.sigmoid().max(dim=-1)
            centres, sides = output.pred_boxes.split(2, dim=-1)
            boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1) * SIDE_PX
            rows = zip(batch, scores.numpy(), labels.numpy(), boxes.numpy(), strict=True)
            found += [Detections(picture.image_id, *values) for picture, *values in rows]
    scored = detection_scores(found, pictures, CLASS_NAMES)
    return {name: scored[name] for name in ("box_ap", "box_ap50", "box_ap75")}


def write_pictures(pictures: Sequence[ShapePicture], folder: Path) -> None:
    """Write the pictures as PNG files, without labels, for a recovery to read."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.fromarray(picture.pixels).save(folder / f"{picture.image_id:05}.png")
