"""Protects the scripts' flags: those without a use in a script are unknown to it, and what --help says holds."""

import pytest
from repository import load_script
from transformers import (
    BertConfig,
    BitImageProcessor,
    DistilBertConfig,
    FunnelConfig,
    ViTConfig,
    ViTImageProcessor,
)

from fa_transformers.training import from_scratch

finetune = load_script("finetune")
NAMES = ("distill", "needle", "long_range_arena", "baselines", "ablate_conversion")
LEFT_OUT = [(name, flag) for name in NAMES for flag in getattr(load_script(name), "LEAVE_OUT", from_scratch.LEAVE_OUT)]


@pytest.mark.parametrize(("name", "flag"), [*LEFT_OUT, ("long_range_arena", "short_epochs")])
def test_a_flag_without_a_use_is_unknown(name, flag, capsys):
    assert hasattr(finetune.parse_args([]), flag)  # which a misspelt one isn't
    assert hasattr(load_script(name).parse_args([]), flag)  # for the code that is shared
    with pytest.raises(SystemExit):
        load_script(name).parse_args([f"--{flag}", "1"])
    assert f"unrecognized arguments: --{flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_folder", "photos"], "--image_folder is for images, and --task for text"),
        (["--task", "images", "--train_file", "a.csv"], "--train_file is for text, and --task for images"),
        (["--train_file", "a.csv", "--dataset_name", "b"], "--train_file and --dataset_name are two sources"),
    ],
)
def test_an_ablation_has_one_source_of_data_of_its_kind(flags, message, capsys):
    with pytest.raises(SystemExit):
        load_script("ablate_conversion").parse_args(flags)
    assert message in capsys.readouterr().err


def test_distilling_says_what_it_reads_itself(capsys):
    with pytest.raises(SystemExit):
        load_script("distill").parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "labels aren't read" in text and "longer ones are cut" not in text and "2 % of the train rows" in text


def test_maps_are_twice_the_head_width_of_what_is_converted():
    double_maps = load_script("distill").double_maps
    assert double_maps(BertConfig(hidden_size=384, num_attention_heads=12)) == {"key_feature_size": 64}
    assert double_maps(DistilBertConfig(dim=768, n_heads=12)) == {"key_feature_size": 128}
    assert double_maps(ViTConfig(hidden_size=384, num_attention_heads=6)) == {"key_feature_size": 128}
    with pytest.raises(ValueError, match="type 'funnel', which has no FA model"):
        double_maps(FunnelConfig())


def test_pretrained_image_models_have_settings_of_their_own():
    image = ["--task", "image-classification", "--image_folder", "photos"]
    scratch, pretrained = finetune.parse_args(image), finetune.parse_args([*image, "--model_name_or_path", "vit/"])
    assert scratch.image_size == 1024 and pretrained.image_size is None
    assert pretrained.learning_rate < scratch.learning_rate
    demo = finetune.parse_args([*image[:2], "--model_name_or_path", "vit/"])
    assert demo.image_size == 1024  # at 224 px nothing of it can be read
    assert finetune.native_side(ViTImageProcessor(size={"height": 32, "width": 32})) == 32
    assert finetune.native_side(BitImageProcessor(size={"shortest_edge": 256}, crop_size=224)) == 224  # DINOv2's
    with pytest.raises(ValueError, match="--image_size: the checkpoint's processor says .*48.* no square"):
        finetune.native_side(ViTImageProcessor(size={"height": 32, "width": 48}))
