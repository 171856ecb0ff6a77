"""Protects FAViT as a backbone: its maps are the encoder's hidden states, and those of stock DINOv2 backbones."""

import pytest
import torch
from stock_models import IMAGES, INTERPOLATED, TOLERANCE
from tiny_models import OPTION_SETS, as_float64, build, image_inputs, randomize, tiny_config
from transformers import (
    AutoBackbone,
    AutoConfig,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
)

from fa_transformers.models import FAViTBackbone, FAViTConfig, FAViTForImageClassification, FAViTModel

STAGES = {"out_features": ["stem", "stage1", "stage2"]}


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 19), (7, 70)])
@pytest.mark.parametrize("options", ["plain", "all scaling"])
def test_maps_are_the_hidden_states_of_the_patches(height, width, options):
    fields = {**OPTION_SETS[options], **STAGES}
    backbone = build(FAViTConfig, FAViTBackbone, **fields, apply_layernorm=False).double()
    encoder = FAViTModel(backbone.config).double().eval()
    encoder.load_state_dict(backbone.state_dict(), strict=False)
    inputs = as_float64(image_inputs(height, width))
    hidden_states = encoder(**inputs, output_hidden_states=True).hidden_states
    rows, columns = -(-height // 8), -(-width // 8)
    for maps, state in zip(backbone(**inputs).feature_maps, hidden_states, strict=True):
        patches = state[:, 1 + backbone.config.num_register_tokens :]
        assert torch.equal(maps, patches.transpose(1, 2).unflatten(2, (rows, columns)))


@pytest.mark.parametrize(
    ("stock_class", "config_class"),
    [(Dinov2Backbone, Dinov2Config), (Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig)],
)
@pytest.mark.parametrize("fields", [{}, {"apply_layernorm": False}, {"reshape_hidden_states": False}], ids=str)
def test_a_stock_backbone_loads_whole_and_softmax_layers_give_its_maps(stock_class, config_class, fields, tmp_path):
    stock = randomize(stock_class(config_class(**IMAGES, out_indices=[0, 2], **fields)).eval()).double()
    stock.save_pretrained(tmp_path)
    model, report = FAViTBackbone.from_pretrained(
        tmp_path, softmax_layers=[0, 1], dtype=torch.float64, output_loading_info=True
    )
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= {"embeddings.mask_token"}
    assert model.out_features == ["stem", "stage2"] and model.channels == stock.channels
    inputs = as_float64(image_inputs(32, 48))
    for maps, other in zip(model.eval()(**inputs).feature_maps, stock(**inputs).feature_maps, strict=True):
        torch.testing.assert_close(maps, other, **INTERPOLATED)


@pytest.mark.slow
def test_real_dinov2_weights_give_the_encoders_states_at_any_size(dinov2):
    backbone = FAViTBackbone.from_pretrained(dinov2, out_indices=[3, 12]).double().eval()
    encoder = FAViTModel.from_pretrained(dinov2, add_pooling_layer=False).double().eval()
    inputs = as_float64(image_inputs(70, 101, batch=1))
    with torch.no_grad():
        maps, states = backbone(**inputs).feature_maps, encoder(**inputs, output_hidden_states=True).hidden_states
    assert [tuple(one.shape) for one in maps] == [(1, 384, 5, 8), (1, 384, 5, 8)]
    for one, index in zip(maps, (3, 12), strict=True):
        assert torch.equal(one.flatten(2).transpose(1, 2), encoder.layernorm(states[index])[:, 1:])


def test_a_head_gives_its_encoder_to_a_backbone_and_back(tmp_path):
    head = build(FAViTConfig, FAViTForImageClassification)
    head.save_pretrained(tmp_path / "head")
    backbone, report = FAViTBackbone.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"]
    assert all(torch.equal(weight, head.vit.state_dict()[name]) for name, weight in backbone.state_dict().items())
    backbone.save_pretrained(tmp_path / "backbone")
    again, report = FAViTForImageClassification.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"classifier"}
    assert torch.equal(again.vit.layernorm.weight, head.vit.layernorm.weight)


def test_the_default_is_the_last_layer_also_of_a_config_with_other_layers(tmp_path):
    config = tiny_config(FAViTConfig)
    assert (config.out_features, config.out_indices) == (["stage2"], [2])
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, num_hidden_layers=5).out_features == ["stage5"]
    assert AutoConfig.from_pretrained(tmp_path, out_indices=[0, 1]).out_features == ["stem", "stage1"]
    assert AutoConfig.from_pretrained(tmp_path, out_features=["stage1"]).out_indices == [1]
    with pytest.raises(ValueError, match="`out_features`"):
        AutoConfig.from_pretrained(tmp_path, num_hidden_layers=1, out_features=["stage2"])
    assert type(AutoBackbone.from_config(config)) is FAViTBackbone


def test_chunks_give_the_same_maps():
    backbone = build(FAViTConfig, FAViTBackbone, **OPTION_SETS["local"], **STAGES).double()
    inputs = as_float64(image_inputs(40, 64))
    with torch.no_grad():
        whole, chunked = backbone(**inputs), backbone(**inputs, chunk_size=9)
    for one, other in zip(whole.feature_maps, chunked.feature_maps, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
