"""Protects detectors on pretrained backbones: the weights and inputs are the checkpoint's, whatever its type, a frozen
backbone stays as it is bit for bit, and what can't be a backbone is refused by name.
"""

import json

import pytest
import torch
from coco_sets import NAMES, write_coco
from stock_models import IMAGES, TOLERANCE, VIT, make_stock
from tiny_models import image_inputs, object_labels, randomize
from transformers import (
    BertConfig,
    Dinov2Backbone,
    Dinov2Config,
    ResNetBackbone,
    ResNetConfig,
    ViTImageProcessor,
)

from fa_transformers import CardOptions, load_factorized
from fa_transformers.models import FADenseForObjectDetection, FAViTBackbone
from fa_transformers.models.fa_checkpoint_names import translate_vit_name
from fa_transformers.options import LoopOptions, resolve
from fa_transformers.training import dense, network_card
from fa_transformers.training.dense import build_network, finetune_dense
from fa_transformers.training.dense_backbone import note_trained
from fa_transformers.training.dense_recipe import DenseDataOptions, DenseModelOptions, recipe_of
from fa_transformers.training.optimizer import group_by_rates

TINY = dict(pyramid_channels=16, mask_channels=8, num_queries=10)
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.fixture
def dinov2_folder(tmp_path):
    """A folder with a tiny stock DINOv2 in float32 and its image processor."""
    folder = tmp_path / "dinov2"
    make_stock("Dinov2Model", IMAGES).float().save_pretrained(folder)
    ViTImageProcessor(image_mean=MEAN, image_std=STD, size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def resnet_folder(tmp_path):
    """A folder with a tiny stock ResNet."""
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1] * 4, layer_type="basic")
    randomize(ResNetBackbone(resnet)).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def tiny(folder, **options):
    torch.manual_seed(0)
    given = DenseModelOptions(backbone_name_or_path=str(folder), **TINY | options)
    return build_network("object-detection", resolve(given, recipe_of(None, is_pretrained=False)), list(NAMES))


def again(folder, **options):
    given = DenseModelOptions(model_name_or_path=str(folder), **options)
    return build_network("object-detection", resolve(given, recipe_of(None, is_pretrained=True)), list(NAMES))


def loss_of(model):
    inputs = image_inputs(40, 48)
    return model(inputs["pixel_values"], labels=object_labels(40, 48)).loss


def test_a_stock_dinov2_becomes_a_backbone_with_its_weights_its_inputs_and_the_parts_of_a_student(dinov2_folder):
    model, processor = tiny(dinov2_folder)
    config = model.config.backbone_config
    assert type(model.backbone) is FAViTBackbone and model.backbone.config.to_dict() == config.to_dict()
    assert (config.key_feature_size, config.local_kernel_size, config.recovery) == (2 * 16, 5, "pending")
    assert (processor.image_mean, processor.image_std) == (MEAN, STD) and processor.size is None
    ours = model.backbone.state_dict()
    stock = make_stock("Dinov2Model", IMAGES).float().state_dict()
    carried = {translate_vit_name(name): value for name, value in stock.items() if "mask_token" not in name}
    assert {name for name in ours if ".mixer." not in name} == carried.keys()
    assert all(torch.equal(ours[name], value) for name, value in carried.items())
    assert loss_of(model.train()).isfinite() and "dinov2" not in json.dumps(model.config.to_dict())


def test_a_saved_favit_keeps_its_layers_and_its_choice_of_maps(tmp_path):
    stock = randomize(Dinov2Backbone(Dinov2Config(**IMAGES, out_features=["stem", "stage1", "stage2"]))).eval()
    stock.save_pretrained(tmp_path / "stock")
    load_factorized(tmp_path / "stock", "AutoBackbone", softmax_layers=[0, 1]).save_pretrained(tmp_path / "ours")
    chosen, _ = tiny(tmp_path / "ours", backbone_layers=(1,))
    assert chosen.config.backbone_config.out_features == ["stage1"] and len(set(chosen.pyramid.laterals)) == 3
    model, _ = tiny(tmp_path / "ours", freeze_backbone=True)
    assert model.config.backbone_config.key_feature_size is None and len(model.pyramid.laterals) == 3
    inputs = {"pixel_values": image_inputs(32, 32)["pixel_values"].double()}
    with torch.no_grad():
        maps, wanted = (network.double()(**inputs).feature_maps for network in (model.backbone, stock))
    for one, other in zip(maps, wanted, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_other_image_checkpoints_carry_a_detector_too(tmp_path):
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1] * 4, layer_type="basic")
    folders = {"resnet": randomize(ResNetBackbone(resnet)).eval(), "vit": make_stock("ViTModel", VIT.to_dict()).float()}
    for name, stock in folders.items():
        stock.save_pretrained(tmp_path / name)
        model, _ = tiny(tmp_path / name)
        assert model.config.backbone_config.model_type == f"fa_{name}" and loss_of(model.train()).isfinite()
    inputs = image_inputs(40, 40)
    model, _ = tiny(tmp_path / "resnet")
    with pytest.raises(ValueError, match="--backbone_layers is of a ViT; of --backbone_name_or_path .*resnet"):
        tiny(tmp_path / "resnet", backbone_layers=(1,))
    with torch.no_grad():
        last = model.eval().backbone(**inputs).feature_maps[-1]
        assert torch.equal(last, folders["resnet"](**inputs).feature_maps[-1])


def test_a_frozen_backbone_has_no_gradient_no_dropout_and_no_new_statistics(tmp_path):
    make_stock("ViTModel", {**VIT.to_dict(), "hidden_dropout_prob": 0.5}).float().save_pretrained(tmp_path / "vit")
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1] * 4, layer_type="basic")
    randomize(ResNetBackbone(resnet)).save_pretrained(tmp_path / "resnet")
    for name in ("vit", "resnet"):
        model, _ = tiny(tmp_path / name, freeze_backbone=True)
        before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
        seen = []
        model.backbone.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.feature_maps))
        model.eval().train()
        assert model.heads.training and not any(part.training for part in model.backbone.modules())
        pixels = image_inputs(40, 48)["pixel_values"].requires_grad_()
        for _ in range(2):
            model(pixels, labels=object_labels(40, 48)).loss.backward()
        assert pixels.grad is None and all(weight.grad is None for weight in model.backbone.parameters())
        assert all(weight.grad is not None for weight in model.pyramid.parameters())
        assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
        assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
        (group,) = group_by_rates(model, lambda *_: (1.0, 0.0))
        trained = model.num_parameters(only_trainable=True)
        assert sum(weight.numel() for weight in group["params"]) == trained
        assert model.num_parameters() - trained == model.backbone.num_parameters()


def test_in_a_frozen_pyramid_only_the_attention_blocks_train(resnet_folder, tmp_path):
    model, processor = tiny(resnet_folder, attention_places=("fp3", "fp5"))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "trained")
    model, _ = again(tmp_path / "trained", freeze_backbone=True, freeze_pyramid=True)
    loss_of(model.train()).backward()
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert with_gradient == {name for name, weight in model.named_parameters() if weight.requires_grad}
    expected = {
        name for name, _ in model.named_parameters() if name.startswith(("heads.", "pyramid.attention_blocks."))
    }
    assert with_gradient == expected


def test_a_frozen_backbone_that_was_not_recovered_is_a_warning_and_a_trained_one_says_so(
    dinov2_folder, tmp_path, caplog
):
    model, processor = tiny(dinov2_folder)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "pending")
    for freeze in (True, False):
        for build, folder in ((tiny, dinov2_folder), (again, tmp_path / "pending")):
            model, _ = build(folder, freeze_backbone=freeze)
            assert caplog.text.count("Recover it first (fa-transformers distill --task images)") == freeze
            assert model.backbone_is_frozen == freeze
            caplog.clear()
            note_trained(model)
            assert model.config.backbone_config.recovery == ("pending" if freeze else "fine_tuned")


def test_a_frozen_backbone_has_no_new_blocks(resnet_folder, tmp_path):
    model, processor = tiny(resnet_folder, attention_places=("res3", "fp3"))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "new")
    torch.nn.init.ones_(model.backbone.attention_blocks["stage3"].reprojection.weight)
    model.backbone.save_pretrained(tmp_path / "trained")
    assert tiny(tmp_path / "trained", attention_places=("res3", "fp3"), freeze_backbone=True)[0].backbone_is_frozen
    refusal = "--freeze_backbone would keep the blocks that --attention_places has at {} the identity, as .*{} has"
    with pytest.raises(ValueError, match=refusal.format("res3 res4", "resnet")):
        tiny(resnet_folder, attention_places=("five",), freeze_backbone=True)
    with pytest.raises(ValueError, match=refusal.format("res4", "trained")):
        tiny(tmp_path / "trained", attention_places=("five",), freeze_backbone=True)
    with pytest.raises(ValueError, match=refusal.format("res3", "new")):
        again(tmp_path / "new", freeze_backbone=True)


def test_layers_above_the_last_map_are_left_out(tmp_path):
    stock = make_stock("Dinov2Model", {**IMAGES, "num_hidden_layers": 4}).float()
    whole = randomize(load_factorized(stock, "AutoBackbone", softmax_layers=[0, 3], out_indices=[1, 2, -2])).eval()
    whole.save_pretrained(tmp_path / "whole")
    for given, count in ((None, 3), ((1,), 1)):
        model, _ = tiny(tmp_path / "whole", backbone_layers=given)
        config = model.config.backbone_config
        assert (config.num_hidden_layers, len(model.backbone.encoder.layer)) == (count, count)
        assert (config.softmax_layers, config.recovery) == ([0], "pending" if count > 1 else None)
        loss_of(model.train()).backward()
        assert all(weight.grad is not None for weight in model.parameters())
        model.save_pretrained(tmp_path / "saved")
        saved, info = FADenseForObjectDetection.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values())
        pixels = image_inputs(40, 48)["pixel_values"].double()
        with torch.no_grad():
            wanted = whole.double()(pixels).feature_maps[:count]
            for network in (model.eval(), saved):
                maps = network.double().backbone(pixels).feature_maps
                assert len(maps) == len(wanted) and all(map(torch.equal, maps, wanted))


@pytest.mark.parametrize("has_norm", [True, False])
def test_a_norm_that_no_map_passes_waits_for_no_gradient(has_norm, tmp_path):
    fields = {"out_features": ["stem", "stage1", "stage2"], "apply_layernorm": has_norm}
    randomize(Dinov2Backbone(Dinov2Config(**IMAGES, **fields))).save_pretrained(tmp_path / "stock")
    for part in (built := tiny(tmp_path / "stock")):
        part.save_pretrained(tmp_path / "saved")
    for network in (built[0], again(tmp_path / "saved")[0]):
        loss_of(network.train()).backward()
        for name, weight in network.named_parameters():
            is_read = has_norm or "backbone.layernorm" not in name
            assert (weight.grad is not None) == weight.requires_grad == is_read, name


def test_the_weights_of_a_resnet_in_half_precision_train_in_float32(resnet_folder, tmp_path):
    ResNetBackbone.from_pretrained(resnet_folder).bfloat16().save_pretrained(tmp_path / "half")
    model, _ = tiny(tmp_path / "half")
    model.save_pretrained(tmp_path / "saved")
    for network in (model, FADenseForObjectDetection.from_pretrained(tmp_path / "saved")):
        assert {weight.dtype for weight in network.parameters()} == {torch.float32}


def test_a_model_gathered_from_shards_is_frozen_again(dinov2_folder, tmp_path, monkeypatch):
    write_coco(tmp_path / "set")
    model, processor = tiny(dinov2_folder, freeze_backbone=True)
    gathered = FADenseForObjectDetection(model.config)
    monkeypatch.setattr(dense, "fit_network", lambda *args, **options: (gathered, {}, {}, None))
    given = DenseDataOptions(coco_folder=tmp_path / "set"), DenseModelOptions(freeze_backbone=True), LoopOptions()
    recipe = recipe_of(None, is_pretrained=False)
    job = dense.DenseJob("object-detection", *(resolve(part, recipe) for part in (*given, CardOptions())), "", "")
    trained, *_ = dense._fit(job, model, processor, dense.read_data(job.task, job.data, 0), None)
    note_trained(trained)
    assert trained.num_parameters(True) == model.num_parameters(True) < model.num_parameters()
    assert trained.config.backbone_config.recovery == "pending"


def test_the_plan_of_a_run_counts_what_is_frozen(dinov2_folder, tmp_path):
    write_coco(tmp_path / "set")
    result = run(tmp_path, dinov2_folder, dry_run=True)
    plan, model = result.plan, result.model
    assert plan.num_parameters == model.num_parameters()
    assert plan.num_trained == model.num_parameters() - model.backbone.num_parameters()
    assert f"model: {plan.num_parameters:,} parameters, {plan.num_trained:,} of them train" in str(plan)
    mib, checkpoints = plan.written_mib
    assert checkpoints == 4 * (mib + 8 * plan.num_trained / 2**20)  # with two numbers of AdamW for each that trains


@pytest.mark.slow
def test_a_run_on_a_frozen_backbone_leaves_it_as_it_was_and_says_so(dinov2_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(network_card, "TIMED_PX", 64)
    write_coco(tmp_path / "set")
    result = run(tmp_path, dinov2_folder)
    first, _ = tiny(dinov2_folder)
    saved = FADenseForObjectDetection.from_pretrained(tmp_path / "out")
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(saved.backbone.state_dict()[name], value), name
    frozen, count = saved.backbone.num_parameters(), saved.num_parameters()
    assert (result.summary["parameters"], result.summary["frozen_parameters"]) == (count, frozen)
    assert f"{count:,} parameters, {count - frozen:,} of them train; " in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 steps on set, seed 0, its backbone kept as it was." in card
    assert "base_model: local/dinov2" in card and "softmax attention in 2 of 2 layers by factorized attention" in card


def run(folder, backbone, **loop):
    options = dict(max_steps=2, save_steps=2, eval_steps=2, num_threads=1, report_to="none", use_cpu=True)
    return finetune_dense(
        task="object-detection",
        data=DenseDataOptions(coco_folder=folder / "set", crop_size=32),
        model=DenseModelOptions(backbone_name_or_path=str(backbone), freeze_backbone=True, **TINY),
        loop=LoopOptions(**options | {"output_dir": folder / "out"} | loop),
        card=CardOptions(data_license="cc0-1.0"),
    )


def test_what_cannot_be_a_backbone_is_refused_by_name(dinov2_folder, tmp_path):
    BertConfig(**{"hidden_size": 32, "num_attention_heads": 2}).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match="--backbone_name_or_path .*bert: it is of type 'bert'; types that can .*dinov2"
    ):
        tiny(tmp_path / "bert")
    with pytest.raises(ValueError, match="--depths is of a ResNet; --backbone_name_or_path .* is of type 'dinov2'"):
        tiny(dinov2_folder, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="Only fa_resnet can have any"):
        tiny(dinov2_folder, attention_places=("five",))
    for layers in ((3,), (1, 2), (0, 1, 2), (2, 1, 1)):
        with pytest.raises(ValueError, match="--backbone_layers must be one or three rising numbers from 1 to 2, lay"):
            tiny(dinov2_folder, backbone_layers=layers)
    with pytest.raises(ValueError, match="`backbone_layers` goes with `backbone_name_or_path`, which is missing"):
        finetune_dense(model=DenseModelOptions(backbone_layers=(1,)))
    with pytest.raises(FileNotFoundError, match="is no folder here"):
        tiny(tmp_path / "no where")
    with pytest.raises(ValueError, match="`freeze_backbone=True` would keep weights that were never trained"):
        finetune_dense(model=DenseModelOptions(freeze_backbone=True))
    for given in ({"freeze_backbone": True, "backbone_name_or_path": str(dinov2_folder)}, {}):
        with pytest.raises(
            ValueError, match="`freeze_pyramid=True` goes with `freeze_backbone=True` and a trained network"
        ):
            finetune_dense(model=DenseModelOptions(freeze_pyramid=True, **given))
