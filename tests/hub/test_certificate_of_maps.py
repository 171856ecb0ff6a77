"""Protects the certificate of networks that answer for every place of an image: detectors and stereo networks."""

import pytest
import torch
from test_certificate import PROPERTIES, failing, outcomes

from fa_transformers.hub.publish import certify
from fa_transformers.models import (
    FADenseConfig,
    FADenseForInstanceSegmentation,
    FADenseForObjectDetection,
    FADenseImageProcessor,
    FAStereoConfig,
    FAStereoForDepthEstimation,
    FAStereoImageProcessor,
    modeling_fa_dense,
)

pytestmark = pytest.mark.certified
SMALL_DENSE = {
    "backbone_config": {
        "model_type": "fa_resnet",
        "hidden_sizes": [8, 16, 16, 24],
        "embedding_size": 8,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "pyramid_channels": 16,
    "mask_channels": 8,
    "num_queries": 10,
}
MAPS = {
    FADenseForObjectDetection: (FADenseConfig(**SMALL_DENSE), FADenseImageProcessor()),
    FADenseForInstanceSegmentation: (FADenseConfig(attention_places="five", **SMALL_DENSE), FADenseImageProcessor()),
    FAStereoForDepthEstimation: (
        FAStereoConfig(max_disparity=16, feature_channels=8, volume_channels=8, num_hourglasses=1),
        FAStereoImageProcessor(),
    ),
}


@pytest.mark.parametrize("model_class", MAPS, ids=lambda model_class: model_class.__name__)
def test_networks_without_patches_pass_the_checks_that_apply_to_them(model_class):
    torch.manual_seed(0)
    config, processor = MAPS[model_class]
    found = outcomes(certify(model_class(config).eval(), processor))
    assert {name for name, outcome in found.items() if outcome == "not applicable"} == {"chunks", "packed"}
    assert {found[name] for name in PROPERTIES[:4]} == {"passed"} and found["float32 beside float64"] == "passed"


def test_a_detector_that_sees_its_padding_fails(monkeypatch):
    torch.manual_seed(0)
    config, processor = MAPS[FADenseForObjectDetection]
    model = FADenseForObjectDetection(config).eval()
    whole = modeling_fa_dense.image_sizes
    monkeypatch.setattr(modeling_fa_dense, "image_sizes", lambda pixels, mask: whole(pixels, None))
    assert failing(certify(model, processor)) == {"padding"}
