"""Protects the training of stereo networks: folders in, scores that count every pixel once, a folder that loads, resume
without a difference, and mistakes named by their flag.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from repository import HELPERS, ROOT
from resumed_runs import check_resume
from score_stereo_in_processes import score
from stereo_sets import Given, make_sample, write_png, write_set
from torch.utils.data import DataLoader
from transformers import pipeline

from fa_transformers import check_folder
from fa_transformers.commands.finetune_stereo import parse
from fa_transformers.data.readers.tables import DataError
from fa_transformers.data.stereo_examples import StereoCollator, StereoExamples
from fa_transformers.metrics.stereo import score_disparity, total_scores
from fa_transformers.models import FAStereoConfig, FAStereoForDepthEstimation, FAStereoImageProcessor
from fa_transformers.options import LoopOptions, resolve
from fa_transformers.training import network_card
from fa_transformers.training.stereo import (
    build_network,
    evaluate_stereo,
    finetune_stereo,
    read_samples,
    score_constant,
)
from fa_transformers.training.stereo_recipe import StereoDataOptions, StereoModelOptions, recipe_of

TINY = dict(max_disparity=8, feature_channels=8, volume_channels=8, num_hourglasses=1)
LOOP = dict(max_steps=4, save_steps=2, eval_steps=2, num_threads=1, report_to="none", use_cpu=True)


def train(folder, output_dir, **loop):
    return finetune_stereo(
        data=StereoDataOptions(train_folder=folder, crop_height=16, crop_width=32),
        model=StereoModelOptions(**TINY),
        loop=LoopOptions(**LOOP | {"output_dir": output_dir} | loop),
    )


@pytest.fixture(autouse=True)
def quick_card(monkeypatch):
    """Time the network and its softmax twin on a small pair alone."""
    monkeypatch.setattr(network_card, "MOST_TIMED_PLACES", 64)


def two_steps(layout: str, tmp_path):
    files = write_set(layout, tmp_path / "set", count=4)
    result = train(tmp_path / "set", tmp_path / "out", max_steps=2)
    assert result.scores["num_examples"] == 1 and 0 <= result.scores["over_3px"] <= result.scores["over_1px"] <= 1
    # All pairs have the same disparity everywhere.
    assert result.baselines == {"constant": {"epe": 0.0, "over_1px": 0.0, "over_3px": 0.0, "d1": 0.0}}
    written = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert written["model"]["epe"] == result.scores["epe"] and written["steps"] == 2
    assert (tmp_path / "out" / "pictures" / "1.png").stat().st_size > 0
    pipe = pipeline("stereo-depth-estimation", model=str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    found = pipe((str(files[0][0]), str(files[0][1])))["disparity"]
    assert found.shape == (12, 40) and found.isfinite().all()


def test_a_folder_is_trained_on_scored_and_written(tmp_path):
    two_steps("kitti 2015", tmp_path)


@pytest.mark.slow
@pytest.mark.certified
def test_a_trained_folder_passes_the_check_of_push(tmp_path):
    write_set("kitti 2015", tmp_path / "set", count=4)
    train(tmp_path / "set", tmp_path / "out", max_steps=2)
    found = check_folder(tmp_path / "out")
    assert found["model_class"] == "FAStereoForDepthEstimation" and found["max_difference"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: depth-estimation" in card and "# FA-Stereo" in card and "AutoImageProcessor" in card


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["scene flow", "middlebury"])
def test_folders_of_the_other_layouts_are_trained_on(layout, tmp_path):
    two_steps(layout, tmp_path)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    write_set("kitti 2015", tmp_path / "set", count=6)
    check_resume(partial(train, tmp_path / "set"), tmp_path)


def test_a_folder_in_half_precision_trains_in_float32(tmp_path):
    FAStereoForDepthEstimation(FAStereoConfig(**TINY)).bfloat16().save_pretrained(tmp_path)
    FAStereoImageProcessor().save_pretrained(tmp_path)
    network, _ = build_network(StereoModelOptions(model_name_or_path=str(tmp_path)))
    assert {weight.dtype for weight in network.parameters()} == {torch.float32} == {network.config.dtype}


def test_scores_count_every_pair_once_at_its_own_size():
    torch.manual_seed(0)
    model = FAStereoForDepthEstimation(FAStereoConfig(**TINY))
    samples = Given([make_sample(20, 50), make_sample(17, 33), make_sample(20, 50, 3)])
    processor = FAStereoImageProcessor()
    found = {}
    for batch_size in (1, 3):
        loader = DataLoader(StereoExamples(samples), batch_size, collate_fn=StereoCollator(processor))
        found[batch_size] = evaluate_stereo(model, loader, Accelerator(cpu=True))
    parts = []
    for sample in samples:
        inputs = processor((sample.left, sample.right), return_tensors="pt")
        with torch.no_grad():
            predicted = model.eval()(**inputs).predicted_depth[0].numpy()
        parts.append(score_disparity(predicted, sample.disparity, sample.valid))
    expected = total_scores(parts).compute()
    for scores in found.values():
        assert scores["num_examples"] == 3
        # Batches of another shape may sum otherwise: some float32 roundings of disparities up to 8.
        assert scores["epe"] == pytest.approx(expected["epe"], rel=1e-5)
        assert scores["loss"] > 0
    assert not any(module.training for module in model.modules())


@pytest.mark.slow
def test_two_processes_score_each_pair_once(tmp_path):
    # Seven pairs in four batches of up to two: two for each process, of which the last is half copies.
    write_set("kitti 2015", tmp_path / "set", count=7)
    alone, _ = score(tmp_path / "set")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [str(HELPERS / "score_stereo_in_processes.py"), str(tmp_path / "set"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, *worker], check=True, env=environment, timeout=240)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["num_examples"] == alone["num_examples"] == 7
    for name in ("epe", "over_1px", "over_3px", "d1"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5), name


def test_the_constant_guess_is_the_median_of_the_training_pairs():
    train_pairs = Given([make_sample(shift=2), make_sample(shift=4), make_sample(shift=4)])
    scores = score_constant(train_pairs, Given([make_sample(shift=4), make_sample(shift=9)]))
    assert scores == {"epe": 2.5, "over_1px": 0.5, "over_3px": 0.5, "d1": 0.5}


def resolved(**options) -> StereoDataOptions:
    return resolve(StereoDataOptions(**options), recipe_of(is_demo=False, is_pretrained=False))


def test_validation_is_drawn_from_train_where_it_is_missing(tmp_path):
    write_set("kitti 2015", tmp_path / "set", count=10)
    samples = read_samples(resolved(train_folder=tmp_path / "set"), 64, seed=0)
    names = {split: {pair.name for pair in part.pairs} for split, part in samples.items()}
    assert {split: len(part) for split, part in names.items()} == {"train": 9, "validation": 1}
    assert not names["train"] & names["validation"]
    folders = {"train_folder": tmp_path / "set", "test_folder": tmp_path / "set"}
    limited = read_samples(resolved(**folders, max_train_pairs=3, max_eval_pairs=2), 64, seed=0)
    assert {split: len(part) for split, part in limited.items()} == {"train": 3, "validation": 1, "test": 2}


def test_what_cannot_be_trained_on_is_named_before_training(tmp_path):
    ((left, right, disparity),) = write_set("kitti 2015", tmp_path / "set", count=1)
    with pytest.raises(DataError, match="one pair is too few"):
        read_samples(resolved(train_folder=tmp_path / "set"), 64, seed=0)
    for path in (left, right, disparity):
        shutil.copy(path, path.with_name("000001_10.png"))
    write_png(disparity, [[256] * 7] * 12)
    with pytest.raises(DataError, match="7 x 12 pixels, but .* has 40 x 12"):
        read_samples(resolved(train_folder=tmp_path / "set"), 64, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": StereoDataOptions(crop_height=8)}, "`crop_height` must be at least 16"),
        ({"data": StereoDataOptions(num_scenes=0)}, "`num_scenes` must be at least 1"),
        ({"data": StereoDataOptions(max_train_pairs=0)}, "`max_train_pairs` must be at least 1"),
        ({"data": StereoDataOptions(test_folder="pairs")}, "`test_folder` needs a `train_folder`"),
        (
            {"model": StereoModelOptions(model_name_or_path="folder", max_disparity=8)},
            "`max_disparity` is of a new network",
        ),
        ({"loop": LoopOptions(sequence_parallel_size=2)}, "`sequence_parallel_size` is for texts"),
        ({"loop": LoopOptions(max_steps=0)}, "`max_steps` must be at least 1"),
        ({"loop": LoopOptions(learning_rate=-1.0)}, "`learning_rate` must be above 0"),
        ({"model": StereoModelOptions(attention_kind="linear")}, "`attention_kind` must be one of"),
    ],
)
def test_options_that_cannot_be_used_are_named_by_their_flag(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        finetune_stereo(**options)


def test_flags_make_the_options_of_the_run():
    run = parse(["--attention_blocks", "--max_disparity", "32", "--max_steps", "7"])
    assert run.model.config_fields == {"attention_blocks": (), "max_disparity": 32}
    assert (run.data.crop_height, run.data.crop_width, run.loop.max_steps) == (128, 256, 7)
    mine = parse(["--train_folder", "SceneFlow", "--attention_blocks", "volume", "features"])
    assert mine.model.attention_blocks == ("volume", "features") and mine.data.crop_width == 512
    assert "--train_folder SceneFlow" in mine.command and mine.resume_command.endswith("--resume_from_checkpoint last")
    assert parse(["--model_name_or_path", "folder"]).loop.learning_rate < run.loop.learning_rate
