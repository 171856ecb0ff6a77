"""Protects DETR with a factorized encoder: equal to stock with softmax layers, right about padding and the grid."""

import math

import pytest
import torch
from tiny_detectors import detections, every_detector, images, sizes
from tiny_models import EXACT, randomize
from transformers import ResNetConfig

from fa_transformers.models.configuration_fa_resnet import FAResNetConfig

LAYER_OPTIONS = dict(local_kernel_size=3, local_window=1, key_feature_size=16, learned_temperatures=True)


@every_detector
@pytest.mark.parametrize("original", [True, False], ids=["names of transformers 4", "names of transformers 5"])
def test_stock_checkpoint_loads_whole_and_equals_stock_with_softmax_layers(
    stock_config, stock_class, config_class, model_class, original, tmp_path
):
    stock = randomize(stock_class(stock_config(**sizes())))
    stock.save_pretrained(tmp_path, save_original_format=original)
    model, report = model_class.from_pretrained(tmp_path, softmax_layers=[0, 1], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = images()
    expected = detections(stock, inputs)
    for name, value in detections(model, inputs).items():
        torch.testing.assert_close(value, expected[name], **EXACT)


@every_detector
def test_stock_checkpoint_lacks_nothing_but_the_mixers_and_these_start_as_they_should(
    stock_config, stock_class, config_class, model_class, tmp_path
):
    stock_class(stock_config(**sizes())).save_pretrained(tmp_path)
    model, report = model_class.from_pretrained(tmp_path, **LAYER_OPTIONS, output_loading_info=True)
    assert report["missing_keys"] and all(".mixer." in name for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    assert model.config.recovery == "pending"
    fresh = dict(model.named_parameters())
    for index in range(2):
        mixer = f"model.encoder.layers.{index}.self_attn.mixer"
        assert fresh[f"{mixer}.local_convolution.weight"].abs().max() == 0
        assert fresh[f"{mixer}.log_sharpness"].abs().max() == 0
        # At 0.01 each, none of 512 weights is six deviations away.
        assert 0 < fresh[f"{mixer}.feature_map.query_weight"].abs().max() < 0.06


@every_detector
def test_content_of_padded_places_does_not_reach_the_detections(stock_config, stock_class, config_class, model_class):
    model = randomize(model_class(config_class(**sizes(), **LAYER_OPTIONS))).double().eval()
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, 15, 32, generator=generator, dtype=torch.float64)
    places = torch.randn(1, 15, 32, generator=generator, dtype=torch.float64)
    mask = torch.arange(15)[None] % 5 < 3  # of 3 rows of 5 the last two columns are padding
    outputs = []
    for content in (0.0, 1e3, math.nan):
        padded = torch.where(mask[:, :, None], features, content)
        with torch.no_grad():
            encoded = model.model.encoder(padded, mask, places).last_hidden_state
        outputs.append(encoded[mask])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@every_detector
def test_local_terms_follow_the_maps_rows_and_columns(stock_config, stock_class, config_class, model_class):
    model = randomize(model_class(config_class(**sizes(), local_kernel_size=3))).double().eval()
    grids = []
    for layer in model.model.encoder.layers:
        layer.self_attn.mixer.register_forward_hook(lambda module, inputs, output: grids.append(inputs[3].grid))
    detections(model, images(96, 160))
    detections(model, images(160, 96))  # as many places, turned
    assert grids == [(3, 5)] * 2 + [(5, 3)] * 2


@every_detector
def test_bad_fields_are_named(stock_config, stock_class, config_class, model_class):
    for field, value in (("d_model", 30), ("softmax_layers", [2]), ("local_kernel_size", 2), ("num_queries", 0)):
        with pytest.raises(ValueError, match=field):
            config_class(**{**sizes(), field: value})


@every_detector
def test_backbones_of_ours_serve_and_those_of_timm_say_what_is_missing(
    stock_config, stock_class, config_class, model_class, tmp_path
):
    assert type(config_class().backbone_config) is ResNetConfig
    fields = {"model_type": "fa_resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    fields["attention_stages"] = ["stage2"]
    model = randomize(model_class(config_class(**sizes() | {"backbone_config": fields})))
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert type(loaded.config.backbone_config) is FAResNetConfig
    expected = detections(model, images())
    for name, value in detections(loaded, images()).items():
        assert torch.equal(value, expected[name])
    with pytest.raises(ImportError, match="'resnet50'.*timm.*no_timm"):
        model_class(config_class(**sizes() | {"backbone_config": None}, backbone="resnet50", use_timm_backbone=True))


@every_detector
def test_labels_give_a_loss_and_every_parameter_a_gradient(stock_config, stock_class, config_class, model_class):
    pytest.importorskip("scipy", reason="stock DETR's loss matches by scipy")
    model = model_class(config_class(**sizes(), **LAYER_OPTIONS)).train()
    model.gradient_checkpointing_enable()
    inputs, box = images(), torch.tensor([[0.5, 0.5, 0.25, 0.5]])
    inputs["pixel_values"] = inputs["pixel_values"].float()  # the stock loss has weights of float32
    loss = model(**inputs, labels=[{"class_labels": torch.tensor([1]), "boxes": box}] * 2).loss
    loss.backward()
    assert loss.isfinite()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("mixer" in name for name in trained)  # stock DETR freezes the backbone's first layers
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
