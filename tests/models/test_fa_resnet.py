"""Protects FAResNet as a backbone: it equals stock ResNet until its blocks are trained, from whichever folder it comes,
and lives in transformers' own heads.
"""

import copy

import pytest
import torch
from tiny_models import EXACT, as_float64, image_inputs, randomize, rewrite_config
from torch import nn
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
)

from fa_transformers.models import FAResNetBackbone, FAResNetConfig, modeling_fa_resnet
from fa_transformers.models.fa_block import FactorizedAttentionBlock, SoftmaxAttentionBlock

STAGES = ["stage1", "stage2", "stage3", "stage4"]
STOCK = {
    "basic": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 1, 1], layer_type="basic", out_features=STAGES
    ),
    "bottleneck": ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 2], out_features=STAGES
    ),
}


def trained(model: nn.Module) -> nn.Module:
    """Weights and statistics as training leaves them: anything."""
    for name, buffer in randomize(model).named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(0.0, 0.2)
    return model.eval()


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("stock_class", [ResNetBackbone, ResNetForImageClassification])
def test_stock_folder_loads_whole_and_gives_the_stock_maps(kind, stock_class, tmp_path):
    stock = trained(stock_class(STOCK[kind]))
    stock.save_pretrained(tmp_path)
    loaded, report = FAResNetBackbone.from_pretrained(
        tmp_path, attention_stages=STAGES, out_features=STAGES, output_loading_info=True
    )
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"attention_blocks"}
    assert {name.split(".")[0] for name in report["unexpected_keys"]} <= {"classifier"}
    assert len(loaded.attention_blocks) == 4
    inputs = image_inputs(70, 45)
    if stock_class is ResNetForImageClassification:
        expected = stock(**inputs, output_hidden_states=True).hidden_states[1:]
    else:
        expected = stock(**inputs).feature_maps
    for maps, other in zip(loaded.eval()(**inputs).feature_maps, expected, strict=True):
        assert torch.equal(maps, other)
    # The blocks are alive: only the reprojection is zero, and it learns.
    for block in loaded.attention_blocks.values():
        assert all(parameter.abs().max() > 0 for parameter in (block.queries.weight, block.keys.weight))
    loaded(**inputs).feature_maps[-1].sum().backward()
    assert all(block.reprojection.weight.grad.abs().max() > 0 for block in loaded.attention_blocks.values())


def test_a_trained_block_survives_saving_and_a_partly_missing_one_starts_as_the_identity(tmp_path):
    model = trained(FAResNetBackbone(FAResNetConfig(attention_stages=STAGES)))
    model.save_pretrained(tmp_path)
    assert torch.equal(
        FAResNetBackbone.from_pretrained(tmp_path).attention_blocks["stage2"].reprojection.weight,
        model.attention_blocks["stage2"].reprojection.weight,
    )
    rewrite_config(tmp_path, attention_stages=["stem", "stage2"])
    loaded, report = FAResNetBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[1] for name in report["missing_keys"]} == {"stem"}
    assert loaded.attention_blocks["stem"].reprojection.weight.abs().max() == 0
    assert loaded.attention_blocks["stage2"].reprojection.weight.abs().max() > 0


def test_fresh_network_is_small_and_its_blocks_are_the_identity():
    model = FAResNetBackbone(FAResNetConfig(out_features=STAGES)).eval()
    assert model.num_parameters() <= 1_000_000
    bare = FAResNetBackbone(FAResNetConfig(out_features=STAGES, attention_stages=[])).eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "attention_blocks" not in k})
    inputs = image_inputs(40, 64)
    for maps, other in zip(model(**inputs).feature_maps, bare(**inputs).feature_maps, strict=True):
        assert torch.equal(maps, other)


def test_every_place_of_a_map_reads_all_others_through_a_block():
    model = trained(FAResNetBackbone(FAResNetConfig(attention_stages=["stage1"], out_features=["stage1"]))).double()
    inputs = as_float64(image_inputs(96, 96))
    changed = {"pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][:, :, :4, :4] += 1.0
    difference = model(**changed).feature_maps[0] - model(**inputs).feature_maps[0]
    assert (difference.abs().amax(1) > 0).all()


SMALL = dict(embedding_size=8, hidden_sizes=[16, 16, 24, 24], depths=[2, 1, 2, 1], attention_stages=["stage1"])


@pytest.fixture
def rows(monkeypatch):
    """Rows of each map that a first convolution sees, which has three channels. Not by hooks: these get whole maps."""
    seen: list[int] = []
    forward = nn.Conv2d.forward

    def spy(self, x):
        if self.in_channels == 3:
            seen.append(x.shape[2])
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", spy)
    return seen


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_type": "basic"},
        {"layer_type": "bottleneck"},
        {"layer_type": "basic", "downsample_in_first_stage": True},
        {"layer_type": "bottleneck", "downsample_in_bottleneck": True},
    ],
)
@pytest.mark.parametrize("height", [256, 301])
def test_strips_of_a_large_map_give_what_it_gives_at_once(fields, height, rows, monkeypatch):
    model = trained(FAResNetBackbone(FAResNetConfig(**SMALL, **fields, out_features=STAGES))).double()
    inputs = as_float64(image_inputs(height, 23))
    with torch.no_grad():
        expected = model(**inputs).feature_maps
        monkeypatch.setattr(modeling_fa_resnet, "STRIP_NUMBERS", 1)
        maps = model(**inputs).feature_maps
    assert rows[0] == height and len(rows[1:]) > 1 and max(rows[1:]) < height
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_strips_follow_the_weights_and_leave_the_network_as_it_is(monkeypatch):
    monkeypatch.setattr(modeling_fa_resnet, "STRIP_NUMBERS", 1)
    model = trained(FAResNetBackbone(FAResNetConfig(**SMALL))).double()
    before, parts = copy.deepcopy(model.state_dict()), [repr(module) for module in model.modules()]
    inputs = as_float64(image_inputs(256, 9))
    with torch.no_grad():
        first = model(**inputs).feature_maps[0]
        assert [repr(module) for module in model.modules()] == parts
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        model.embedder.embedder.normalization.weight.zero_()
        changed = model(**inputs).feature_maps[0]
        monkeypatch.undo()
        torch.testing.assert_close(changed, model(**inputs).feature_maps[0], **EXACT)
    assert not torch.equal(changed, first)


def test_maps_whose_gradients_or_statistics_are_wanted_are_computed_at_once(rows, monkeypatch):
    monkeypatch.setattr(modeling_fa_resnet, "STRIP_NUMBERS", 1)
    inputs = image_inputs(256, 9)
    for norm_type, is_training, needs_gradients, has_hook in (
        ("batch", False, True, False),
        ("batch", True, False, False),
        ("group", False, False, False),
        ("batch", False, False, True),
    ):
        model = FAResNetBackbone(FAResNetConfig(**SMALL, norm_type=norm_type)).train(is_training)
        heights: list[int] = []
        if has_hook:
            model.encoder.stages[0].register_forward_hook(lambda module, x, y, seen=heights: seen.append(y.shape[2]))
        rows.clear()
        with torch.set_grad_enabled(needs_gradients):
            model(**inputs)
        assert rows == [256] and heights == [64] * has_hook
    model = FAResNetBackbone(FAResNetConfig(**SMALL)).eval()
    convolution = model.embedder.embedder.convolution
    convolution.forward = convolution.forward  # as libraries do that move weights in and out
    rows.clear()
    with torch.no_grad():
        model(**inputs)
    assert rows == [256]


def test_attention_kind_chooses_the_block():
    for kind, block_class in (("factorized", FactorizedAttentionBlock), ("softmax", SoftmaxAttentionBlock)):
        model = FAResNetBackbone(FAResNetConfig(attention_kind=kind, attention_heads=2, key_channels=6))
        blocks = list(model.attention_blocks.values())
        assert {type(block) for block in blocks} == {block_class}
        assert {(block.key_channels, block.num_heads) for block in blocks} == {(6, 2)}


@pytest.mark.parametrize(("norm_type", "is_frozen"), [("batch", True), ("group", False)])
def test_stock_heads_freeze_batch_norms_and_leave_group_norms(norm_type, is_frozen):
    backbone_config = FAResNetConfig(norm_type=norm_type, out_features=["stage4"])
    assert isinstance(AutoBackbone.from_config(backbone_config), FAResNetBackbone)
    fields = dict(encoder_layers=1, decoder_layers=1, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2)
    fields |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=3, use_timm_backbone=False)
    model = DetrForObjectDetection(DetrConfig(backbone_config=backbone_config, backbone=None, **fields))
    model.model.unfreeze_backbone()  # DETR freezes all of a backbone with "resnet" in its type
    norms = [module for module in model.model.backbone.modules() if type(module).__name__.endswith(("Norm", "Norm2d"))]
    trains = [any(parameter.requires_grad for parameter in norm.parameters()) for norm in norms]
    assert trains and set(trains) == {not is_frozen}
    assert model(**image_inputs(64, 64)).pred_boxes.shape == (2, 3, 4)


BAD_VALUES = {
    "num_channels": (0, "3", True),
    "embedding_size": (0, None),
    "hidden_sizes": (3, [], [8, "x", 8, 8], [8, 8], [8, 8, 8, 0]),
    "depths": (3, [], [1, 1, 1, 0], [1]),
    "layer_type": ("plain", None),
    "hidden_act": ("nope", None),
    "downsample_in_first_stage": (1, None),
    "downsample_in_bottleneck": ("no",),
    "attention_stages": ("stage1", ["stage5"], [1], None),
    "attention_kind": ("linear", None),
    "key_channels": (0, 1.5, True),
    "attention_heads": (0, 3, None),
    "norm_type": ("layer", None),
    "out_features": (["stage9"], "stage1", ["stage2", "stage1"], 5),
    "out_indices": ([9], 5, [2, 1]),
}


@pytest.mark.parametrize("field", BAD_VALUES)
def test_bad_value_of_a_field_is_an_error_that_names_it(field, tmp_path):
    FAResNetConfig().save_pretrained(tmp_path)
    for value in BAD_VALUES[field]:
        with pytest.raises(ValueError, match=f"`{field}`"):
            FAResNetConfig(**{field: value})
        if value is not None:
            with pytest.raises(ValueError, match=f"`{field}`"):
                FAResNetConfig.from_pretrained(tmp_path, **{field: value})


def test_a_sparse_stock_configuration_has_stock_sizes_and_a_sparse_own_one_ours():
    stock, ours = ResNetConfig(), FAResNetConfig()
    for name in ("embedding_size", "hidden_sizes", "depths", "layer_type"):
        for model_type, expected in (("resnet", getattr(stock, name)), ("fa_resnet", getattr(ours, name))):
            value = getattr(FAResNetConfig.from_dict({"model_type": model_type}), name)
            assert value == (list(expected) if isinstance(expected, tuple) else expected)


def test_group_norms_need_channels_that_divide():
    with pytest.raises(ValueError, match="`norm_type`"):
        FAResNetConfig(hidden_sizes=(8, 8, 8, 12), norm_type="group")


def test_configuration_of_another_type_is_refused(tmp_path):
    DetrConfig(use_timm_backbone=False, backbone_config=ResNetConfig(), backbone=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded as 'fa_resnet'"):
        FAResNetConfig.from_pretrained(tmp_path)
