"""Protects the training of detectors: COCO folders in, scores of whole pictures that count each once, a folder that
loads anywhere, resume without a difference, and mistakes named by their flag.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from coco_sets import NAMES, write_coco
from repository import HELPERS, ROOT
from resumed_runs import check_resume
from score_dense_in_processes import TINY, score
from torch.utils.data import DataLoader
from transformers import pipeline

from fa_transformers import CardOptions, check_folder
from fa_transformers.commands.finetune_dense import parse
from fa_transformers.conversion.source import describe_folder
from fa_transformers.data.augment import AugmentOptions
from fa_transformers.data.dense_examples import DenseCollator, DenseExamples
from fa_transformers.data.readers.coco import load_coco_folder
from fa_transformers.data.readers.tables import DataError
from fa_transformers.hub.card import FROM_SCRATCH
from fa_transformers.metrics.detection import detection_scores
from fa_transformers.models import FADenseForObjectDetection, FADenseImageProcessor
from fa_transformers.models.fa_dense_layers import HeatmapOutput
from fa_transformers.options import LoopOptions, resolve
from fa_transformers.training import network_card
from fa_transformers.training.data_digests import digest_objects
from fa_transformers.training.dense import build_network, finetune_dense, read_data
from fa_transformers.training.dense_recipe import DenseDataOptions, DenseModelOptions, recipe_of
from fa_transformers.training.dense_scores import (
    SCORE_FLOOR,
    evaluate_dense,
    forward_pictures,
    score_guess,
    without_masks,
)

LOOP = dict(max_steps=4, save_steps=2, eval_steps=2, num_threads=1, report_to="none", use_cpu=True)


def train(folder, output_dir, task="instance-segmentation", **loop):
    return finetune_dense(
        task=task,
        data=DenseDataOptions(coco_folder=folder, crop_size=32),
        model=DenseModelOptions(**TINY),
        loop=LoopOptions(**LOOP | {"output_dir": output_dir} | loop),
        card=CardOptions(data_license="cc0-1.0"),
    )


def tiny(task="instance-segmentation", **options):
    torch.manual_seed(0)
    filled = resolve(DenseModelOptions(**TINY | options), recipe_of(None, is_pretrained=False))
    return build_network(task, filled, list(NAMES))


def data_options(**options) -> DenseDataOptions:
    return resolve(DenseDataOptions(**options), recipe_of(None, is_pretrained=False))


@pytest.mark.parametrize("task", [pytest.param("object-detection", marks=pytest.mark.slow), "instance-segmentation"])
def test_a_coco_folder_is_trained_on_scored_and_published(task, tmp_path, monkeypatch):
    monkeypatch.setattr(network_card, "TIMED_PX", 64)
    write_coco(tmp_path / "set")
    result = train(tmp_path / "set", tmp_path / "out", task, max_steps=2)
    kinds = {name.split("_")[0] for name in result.summary["model"]} - {"loss"}
    assert kinds == ({"box", "mask"} if task == "instance-segmentation" else {"box"})
    assert set(result.baselines) == {"a guess"} and result.scores["num_examples"] == 1
    written = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert written["steps"] == 2 and [row["label"] for row in written["per_class"]] == list(NAMES)
    assert (tmp_path / "out" / "pictures" / "1.png").stat().st_size > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"pipeline_tag: {'image-segmentation' if 'segm' in task else task}" in card and "FA-Dense" in card


@pytest.mark.slow
@pytest.mark.certified
def test_a_trained_folder_passes_the_check_of_push_and_answers_in_a_pipeline(tmp_path):
    write_coco(tmp_path / "set")
    for task in ("object-detection", "instance-segmentation"):
        train(tmp_path / "set", tmp_path / task, task, max_steps=2)
        assert check_folder(tmp_path / task)["max_difference"] == 0
    pipe = pipeline("object-detection", model=str(tmp_path / "object-detection"), trust_remote_code=True, device="cpu")
    found = pipe(str(tmp_path / "set" / "train" / "0.png"), threshold=0.01)
    assert found and {entry["label"] for entry in found} <= set(NAMES)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    write_coco(tmp_path / "set", count=12)
    check_resume(partial(train, tmp_path / "set"), tmp_path)


def test_a_folder_in_half_precision_trains_in_float32(tmp_path):
    model, processor = tiny(shortest_edge=40)
    model.bfloat16().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    options = resolve(DenseModelOptions(model_name_or_path=str(tmp_path)), recipe_of(None, is_pretrained=True))
    network, _ = build_network("instance-segmentation", options, list(NAMES))
    assert {weight.dtype for weight in network.parameters()} == {torch.float32} == {network.config.dtype}
    before = model.state_dict()
    assert all(torch.equal(weight, before[name].float()) for name, weight in network.state_dict().items())


def test_classes_of_other_names_get_a_fresh_output_and_the_same_ones_keep_it(tmp_path, caplog):
    model, processor = tiny(shortest_edge=40)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    options = resolve(DenseModelOptions(model_name_or_path=str(tmp_path)), recipe_of(None, is_pretrained=True))
    names = list(model.config.id2label.values())
    outputs = {}
    for kind, asked in {"same": names, "other": [f"other {name}" for name in names]}.items():
        network, _ = build_network("object-detection", options, asked)
        outputs[kind] = next(part for part in network.modules() if isinstance(part, HeatmapOutput)).weight
        assert caplog.text.count("starts fresh: its labels are") == (kind == "other")
    before = next(part for part in model.modules() if isinstance(part, HeatmapOutput)).weight
    assert torch.equal(outputs["same"], before) and not torch.equal(outputs["other"], before)


def test_a_folder_whose_files_are_links_elsewhere_is_named_as_any_other(tmp_path):
    model, processor = tiny()
    for name in ("plain", "first"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    for path in list((tmp_path / "first").iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    build_network("object-detection", DenseModelOptions(model_name_or_path=str(tmp_path / "first")), list(NAMES))
    name, revision = network_card.describe_start(str(tmp_path / "first"))
    assert name == "local/first" and revision == describe_folder("plain", tmp_path / "plain")[1]
    assert network_card.describe_start("none") == (FROM_SCRATCH, FROM_SCRATCH)


def test_training_goes_on_from_a_folder_of_ours_with_other_classes(tmp_path):
    model, processor = tiny(shortest_edge=40)
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    options = resolve(
        DenseModelOptions(model_name_or_path=str(tmp_path / "first")), recipe_of(None, is_pretrained=True)
    )
    again, processor = build_network("object-detection", options, ["cat", "dog", "bird"])
    assert type(again) is FADenseForObjectDetection and again.config.num_labels == 3
    assert again.config.id2label[2] == "bird" and processor.size == {"shortest_edge": 40}
    assert torch.equal(again.pyramid.laterals[0].weight, model.pyramid.laterals[0].weight)
    with pytest.raises(FileNotFoundError, match="--model_name_or_path .*: there is no model folder of that name"):
        build_network("object-detection", DenseModelOptions(model_name_or_path=str(tmp_path / "none")), ["cat"])


@pytest.mark.parametrize(
    ("options", "kind", "places"),
    [
        ({}, "factorized", ["fp3", "fp4", "fp5"]),
        ({"attention": "softmax"}, "softmax", ["fp3", "fp4", "fp5"]),
        ({"attention": "none"}, "factorized", []),
        ({"attention_places": ("five",)}, "factorized", ["res3", "res4", "fp3", "fp4", "fp5"]),
        ({"attention": "softmax", "attention_places": ("res4", "fp5")}, "softmax", ["res4", "fp5"]),
    ],
)
def test_blocks_of_a_new_network_are_chosen_by_flags(options, kind, places):
    model, _ = tiny(**options)
    backbone = model.config.backbone_config
    assert (model.config.attention_kind, model.config.places) == (kind, places)
    assert backbone.hidden_sizes == [8, 16, 16, 24] and backbone.attention_kind == kind
    assert backbone.attention_stages == [f"stage{place[3:]}" for place in places if place.startswith("res")]


def test_scores_count_every_picture_once_whatever_the_batches(tmp_path):
    write_coco(tmp_path / "set", count=10)
    images = load_coco_folder(tmp_path / "set").splits["train"]
    model, processor = tiny(shortest_edge=40)
    assert {image.size for image in images} == {(48, 64), (64, 48)}
    alone = detection_scores(forward_pictures(model, processor, images, SCORE_FLOOR), images, NAMES)
    examples = DenseExamples(images, processor.size)
    losses = []
    for batch_size in (1, 3):
        loader = DataLoader(examples, batch_size, collate_fn=DenseCollator(processor, with_masks=True))
        scores = evaluate_dense(model, processor, loader, images, NAMES, Accelerator(cpu=True))
        assert scores["num_examples"] == len(images) and model.training
        losses.append(scores["loss"])
        for name, value in alone.items():
            assert scores[name] == value, name
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # a mean of batches, which weigh by their objects
    # Copies that fill up a last batch change nothing.
    loader = DataLoader(examples, sampler=[*range(len(images)), 0, 1], collate_fn=DenseCollator(processor, True))
    assert evaluate_dense(model, processor, loader, images, NAMES, Accelerator(cpu=True))["loss"] == losses[0]


@pytest.mark.slow
def test_two_processes_score_each_picture_once(tmp_path):
    write_coco(tmp_path / "set", count=13)  # 11 in train: six batches of up to two, and the last steps are filled up
    alone, _ = score(tmp_path / "set")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [str(HELPERS / "score_dense_in_processes.py"), str(tmp_path / "set"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, *worker], check=True, env=environment, timeout=240)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["num_examples"] == alone["num_examples"] == 11
    for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap75", "per_class"):
        assert first[name] == alone[name], name


def test_views_depend_on_seed_epoch_and_index_alone_and_batches_are_the_models(tmp_path):
    write_coco(tmp_path / "set", count=10)
    images = load_coco_folder(tmp_path / "set").splits["train"]
    views = AugmentOptions(crop_size=32)
    examples, again = (DenseExamples(images, None, views, seed=3) for _ in range(2))
    assert examples.lengths == [32 * 32 // 64] * len(images)
    again[1]
    assert np.array_equal(examples[0].example.pixels, again[0].example.pixels)
    before = examples[0].example.pixels
    examples.set_epoch(1)
    assert not np.array_equal(examples[0].example.pixels, before)
    batch = DenseCollator(FADenseImageProcessor(), with_masks=True)([again[index] for index in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    for row, labels in enumerate(batch["labels"]):
        assert int(labels["row"]) == row and labels["orig_size"].tolist() == list(images[row].size)
        assert labels["masks"].shape == (len(labels["class_labels"]), 32, 32)
    assert "masks" not in DenseCollator(FADenseImageProcessor(), with_masks=False)([again[0]])["labels"][0]
    model, _ = tiny()
    assert model(**batch).loss.isfinite()


def test_a_view_smaller_than_the_crop_is_filled_up_and_keeps_its_objects(tmp_path):
    write_coco(tmp_path / "set", count=6)
    images = load_coco_folder(tmp_path / "set").splits["train"]
    row = DenseExamples(images, None, AugmentOptions(crop_size=96, scale=(1.0, 1.0), flip=0.0, colour=0.0))[0]
    height, width = images[0].size
    assert row.example.pixels.shape == (96, 96, 3) and (row.example.pixels[height:] == 128).all()
    assert np.array_equal(row.example.pixels[:height, :width], np.asarray(images[0].open()))
    assert row.example.boxes.tolist() == images[0].mask_boxes.tolist()
    (labels,) = DenseCollator(FADenseImageProcessor(), with_masks=True)([row])["labels"]
    assert np.array_equal(labels["masks"][:, :height, :width].numpy(), images[0].masks())
    centre, size = (96 * labels["boxes"]).split(2, dim=1)
    assert torch.allclose(centre + size / 2, torch.from_numpy(images[0].mask_boxes[:, 2:]))


def test_a_guess_is_scored_beside_the_model(tmp_path):
    write_coco(tmp_path / "set")
    images = load_coco_folder(tmp_path / "set").splits["train"]
    scores = score_guess(images, images, NAMES)
    assert 0 <= scores["mask_ap50"] <= scores["box_ap50"] < 0.5 and scores["box_ap50"] > 0
    assert not any(name.startswith("mask") for name in score_guess(images, without_masks(images), NAMES))


def test_a_changed_picture_or_object_changes_the_digests(tmp_path):
    path = write_coco(tmp_path / "set")
    before = digest_objects(load_coco_folder(tmp_path / "set").splits)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["bbox"][2] -= 1
    path.write_text(json.dumps(content))
    after = digest_objects(load_coco_folder(tmp_path / "set").splits)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"the objects of {split}" for split in ("train", "validation", "test")}
    shutil.copy(path.parent / "1.png", path.parent / "3.png")
    last = digest_objects(load_coco_folder(tmp_path / "set").splits)
    assert {name.split(" of ")[0] for name in last if last[name] != after[name]} == {"the pictures"}


def test_masks_are_needed_for_instance_segmentation_alone(tmp_path):
    write_coco(tmp_path / "set", masks=False)
    found = read_data("object-detection", data_options(coco_folder=tmp_path / "set"), seed=0)
    assert not found.has_masks and {len(part) for part in found.splits.values()} == {1, 4}
    with pytest.raises(DataError, match="segmentation"):
        read_data("instance-segmentation", data_options(coco_folder=tmp_path / "set"), seed=0)
    limited = data_options(coco_folder=tmp_path / "set", max_train_images=3)
    assert len(read_data("object-detection", limited, seed=0).splits["train"]) == 3


def test_annotations_may_lie_apart_from_their_pictures(tmp_path):
    path = write_coco(tmp_path / "set")
    moved = shutil.move(path, tmp_path / "mine.json")
    options = data_options(train_annotations=moved, image_folder=tmp_path / "set" / "train")
    assert len(read_data("instance-segmentation", options, seed=0).splits["train"]) == 4
    with pytest.raises(DataError, match="there is no such file"):
        read_data("instance-segmentation", data_options(train_annotations=moved), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "panoptic"}, "`task` must be one of object-detection, instance-segmentation"),
        ({"data": DenseDataOptions(crop_size=8)}, "`crop_size` must be at least 32 pixels, or 0"),
        ({"data": DenseDataOptions(scale=(2.0, 1.0))}, "`scale` must be two factors above 0, the lower first"),
        ({"data": DenseDataOptions(flip=2.0)}, "`flip` must lie between 0 and 1"),
        ({"data": DenseDataOptions(num_canvases=0)}, "`num_canvases` must be above 0"),
        ({"data": DenseDataOptions(coco_folder="a", dataset_name="b")}, "`coco_folder` and `dataset_name` are two"),
        ({"data": DenseDataOptions(test_annotations="a")}, "`test_annotations` goes with `train_annotations`"),
        ({"data": DenseDataOptions(coco_folder="nowhere")}, "nowhere: there is no such folder"),
        (
            {"model": DenseModelOptions(model_name_or_path="folder", attention="none")},
            "`attention_places` is of a new network",
        ),
        ({"model": DenseModelOptions(longest_edge=0)}, "`longest_edge` must be above 0"),
        ({"loop": LoopOptions(sequence_parallel_size=2)}, "`sequence_parallel_size` is for texts"),
        ({"data": DenseDataOptions(set="stamps")}, "`set` must be one of"),
        ({"data": DenseDataOptions(num_canvases=1, canvas_size=96)}, "`canvas_size=96`: .* find no place"),
    ],
)
def test_options_that_cannot_be_used_are_named_by_their_flag(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        finetune_dense(**options)


def test_flags_make_the_options_of_the_run():
    run = parse(["--set", "odd_one_out", "--attention", "none", "--max_steps", "7"])
    assert run.task == "instance-segmentation" and run.model.config_fields == {"attention_places": []}
    assert (run.data.crop_size, run.data.canvas_size, run.data.flip) == (0, 512, 0.0)
    assert "--max_steps 7" in run.command and "--resume_from_checkpoint last" in run.resume_command
    user = parse(["--coco_folder", "coco", "--task", "object-detection"])
    assert user.data.flip == 0.5 and user.task == "object-detection" and user.data.source == "coco_folder"
