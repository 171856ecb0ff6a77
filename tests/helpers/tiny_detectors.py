"""Tiny detectors of transformers beside ours, and their inputs and outputs."""

import pytest
import torch
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)

from fa_transformers import (
    FAConditionalDetrConfig,
    FAConditionalDetrForObjectDetection,
    FADetrConfig,
    FADetrForObjectDetection,
)

every_detector = pytest.mark.parametrize(
    ("stock_config", "stock_class", "config_class", "model_class"),
    [
        (DetrConfig, DetrForObjectDetection, FADetrConfig, FADetrForObjectDetection),
        (
            ConditionalDetrConfig,
            ConditionalDetrForObjectDetection,
            FAConditionalDetrConfig,
            FAConditionalDetrForObjectDetection,
        ),
    ],
    ids=["detr", "conditional_detr"],
)


def sizes() -> dict:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    return dict(
        backbone_config=backbone, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=7, num_labels=3, dropout=0.0,
    )  # fmt: skip


def images(height: int = 96, width: int = 160) -> dict[str, torch.Tensor]:
    """Two images, the second of which is padded from 64 rows on."""
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones(2, height, width, dtype=torch.long)
    mask[1, 64:] = 0
    return {"pixel_values": pixels, "pixel_mask": mask}


def detections(model, inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        output = model.double().eval()(**inputs)
    return {"logits": output.logits, "pred_boxes": output.pred_boxes}
