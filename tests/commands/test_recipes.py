"""Protects the recipes for the paper's sets: files of flags that the commands take, run on folders in their formats."""

import shutil

import pytest
from coco_sets import write_coco
from repository import ROOT, SCRIPTS
from stereo_sets import write_set
from transformers import ResNetConfig, ResNetModel

from fa_transformers.commands import finetune_dense, finetune_stereo
from fa_transformers.training import network_card

COCO, SCENE_FLOW = (SCRIPTS / "recipes" / name for name in ("coco.txt", "scene_flow.txt"))
TWO_STEPS = ["--max_steps", "2", "--num_threads", "1", "--report_to", "none", "--use_cpu", "--mixed_precision", "no"]


def test_recipes_are_flags_that_their_commands_take_and_that_later_flags_replace():
    coco = finetune_dense.parse([f"@{COCO}", "--attention_places", "five"])
    assert coco.model.attention_places == ("five",) and coco.model.shortest_edge == 800
    assert coco.data.test_annotations == coco.data.validation_annotations and not coco.data.swap_colours
    assert coco.command.endswith("--output_dir outputs/coco --attention_places five")
    none = finetune_dense.parse([f"@{COCO}", "--attention", "none"])
    assert none.model.config_fields["attention_places"] == [], "the row without modules"
    scenes = finetune_stereo.parse([f"@{SCENE_FLOW}"])
    assert scenes.model.max_disparity == 192 and str(scenes.data.test_folder) == "sceneflow/TEST"
    assert {path.name for path in (SCRIPTS / "recipes").iterdir()} == {COCO.name, SCENE_FLOW.name}


def test_the_page_of_the_paper_names_every_recipe():
    page = (ROOT / "docs" / "results" / "paper.md").read_text(encoding="utf-8")
    assert all(f"@scripts/recipes/{path.name}" in page for path in (COCO, SCENE_FLOW))


@pytest.mark.slow
def test_the_recipe_for_coco_trains_two_steps_on_a_folder_in_its_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network_card, "TIMED_PX", 64)
    (tmp_path / "coco2017" / "annotations").mkdir(parents=True)
    for seed, split in enumerate(("train2017", "val2017")):
        file = write_coco(tmp_path / split, seed=seed)
        shutil.move(file, tmp_path / "coco2017" / "annotations" / f"instances_{split}.json")
        shutil.move(tmp_path / split / "train", tmp_path / "coco2017" / split)
    sizes = {"hidden_sizes": [16, 16, 16, 32], "depths": [1, 1, 1, 1], "embedding_size": 16}
    ResNetModel(ResNetConfig(layer_type="bottleneck", **sizes)).save_pretrained("resnet")
    flags = ["--backbone_name_or_path", "resnet", "--depths", "1", "1", "1", "1", "--pyramid_channels", "16"]
    flags += ["--crop_size", "32", "--shortest_edge", "40", "--longest_edge", "64"]
    result = finetune_dense.main([f"@{COCO}", *flags, *TWO_STEPS])
    assert result.summary["steps"] == 2 and result.scores["num_examples"] == 6
    assert result.scores["mask_ap50"] is not None and result.model.config.places[0] == "res1"
    assert len(result.model.backbone.attention_blocks) == 4


@pytest.mark.slow
def test_the_recipe_for_scene_flow_trains_two_steps_on_a_folder_in_its_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network_card, "MOST_TIMED_PLACES", 64)
    write_set("scene flow", tmp_path / "flyingthings3d", count=4)
    for part in ("frames_finalpass", "disparity"):
        whole = tmp_path / "flyingthings3d" / part
        shutil.copytree(whole / "TRAIN", whole / "TEST")
        for split in ("TRAIN", "TEST"):  # as the page of the paper says
            (tmp_path / "sceneflow" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "sceneflow" / split / part).symlink_to(f"../../flyingthings3d/{part}/{split}")
    sizes = ["--max_disparity", "8", "--feature_channels", "8", "--volume_channels", "8", "--num_hourglasses", "1"]
    crops = ["--crop_height", "16", "--crop_width", "32"]
    result = finetune_stereo.main([f"@{SCENE_FLOW}", *sizes, *crops, *TWO_STEPS])
    assert result.summary["steps"] == 2 and result.summary["split"] == "test"
    assert result.scores["num_examples"] == 4 and result.model.config.attention_blocks
