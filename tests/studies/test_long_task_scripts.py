"""Protects needle.py and long_range_arena.py of scripts/studies as users run them: one command, figures in a folder."""

import json

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from repository import load_script

from fa_transformers.data.collators import pad_batch
from fa_transformers.data.sets import license_documents
from fa_transformers.models.fa_mixer import FactorizedMixer, SoftmaxMixer
from fa_transformers.options import LoopOptions, unset_fields
from fa_transformers.studies.from_scratch import ArrayExamples
from fa_transformers.studies.long_range_arena import ArenaOptions, build_model
from fa_transformers.training.optimizer import build_optimizer, group_parameters

arena, needle_script = load_script("long_range_arena"), load_script("needle")


@pytest.fixture(autouse=True)
def fresh_state(tmp_path, monkeypatch):
    """Accelerate keeps its settings for the whole process, and drawn pictures are kept by `datasets`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tmp_path, capsys):
    """Run a script with its output in `tmp_path`, and return what it wrote after checking that it printed the same."""

    def run_script(script, *flags: object) -> dict:
        common = ("--use_cpu", "--output_dir", tmp_path / "out")
        script.main([str(flag) for flag in (*flags, *common)])
        written = json.loads((tmp_path / "out" / "results.json").read_text())
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written
        return written

    return run_script


@pytest.mark.parametrize("model", ["fa", "fa-local", "softmax"])
@pytest.mark.parametrize("task", ["listops", "pathfinder32"])
def test_a_model_of_each_kind_trains_on_each_task_beside_the_majority_class(run, task, model):
    flags = ("--task", task, "--model", model, "--sizes", 6, 2, 4, "--max_steps", 2)
    results = run(arena, *flags, "--per_device_train_batch_size", 2)
    assert results["steps"] == 2 and results["sizes"] == {"train": 6, "validation": 2, "test": 4}
    assert 0 <= results["majority_class"]["test"] <= 1 and 0 <= results["test"]["accuracy"] <= 1
    assert results["hardware"] and results["setting"] == "small"


def optimizer_of(options: ArenaOptions, loop: LoopOptions, max_steps: int):
    groups = group_parameters(build_model(options), loop.learning_rate, loop.learning_rate, loop.weight_decay)
    return build_optimizer(groups, loop, max_steps)


def test_the_official_settings_are_those_of_the_benchmark():
    listops, listops_loop, _ = arena.parse(["--setting", "official"])
    pictures, pictures_loop, _ = arena.parse(["--setting", "official", "--task", "pathfinder32"])
    assert listops.sizes_by_split == {"train": 96_000, "validation": 2_000, "test": 2_000}
    assert listops_loop.max_steps == 5000
    assert pictures.sizes_by_split == {"train": 160_000, "validation": 20_000, "test": 20_000}
    assert pictures.drawn_difficulty == "hard" and pictures_loop.num_train_epochs == 200
    config = build_model(listops).config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (4, 512, 8)
    config = build_model(pictures).config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (1, 128, 4)
    assert config.classifier_pooling == "mean" and config.hidden_dropout_prob == 0.2
    assert pictures_loop.weight_decay == 0.0
    optimizer, scheduler = optimizer_of(pictures, pictures_loop, 62_400)
    rates = []
    for _ in range(313):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates[155] == pytest.approx(0.5e-3) and rates[311] == pytest.approx(1e-3) and rates[312] < 1e-3


def test_the_rate_of_listops_is_the_benchmarks_formula():
    options, loop, _ = arena.parse(["--setting", "official"])
    optimizer, scheduler = optimizer_of(options, loop, loop.max_steps)
    for step in range(1, 3000):
        optimizer.step()
        scheduler.step()
        expected = 0.05 * min(1.0, step / 1000) / max(step, 1000) ** 0.5
        assert scheduler.get_last_lr()[0] == pytest.approx(expected, rel=1e-9)


def test_models_mix_tokens_as_named():
    mixers = {}
    for name in ("fa", "fa-local", "softmax"):
        model = build_model(arena.parse(["--model", name])[0])
        mixers[name] = [layer.attention["self"].mixer for layer in model.bert.encoder.layer]
    assert all(isinstance(mixer, FactorizedMixer) and mixer.reach is None for mixer in mixers["fa"])
    assert all(isinstance(mixer, FactorizedMixer) and mixer.reach == 16 for mixer in mixers["fa-local"])
    assert all(isinstance(mixer, SoftmaxMixer) for mixer in mixers["softmax"])


def test_the_defaults_follow_from_the_task_the_model_and_the_setting():
    _, loop, command = arena.parse(["--task", "pathfinder32", "--model", "softmax"])
    assert str(loop.output_dir) == "outputs/pathfinder32-softmax" and loop.learning_rate == 1e-3
    assert command == "accelerate launch scripts/studies/long_range_arena.py --task pathfinder32 --model softmax"
    for script in (arena, needle_script):
        assert not unset_fields(script.parse([])[1])


def test_an_interrupted_run_goes_on_from_its_checkpoint(run, tmp_path):
    flags = ("--sizes", 6, 2, 2, "--per_device_train_batch_size", 2, "--save_steps", 1, "--eval_steps", 1)
    whole = run(arena, *flags, "--max_steps", 3)
    (tmp_path / "out").rename(tmp_path / "whole")
    run(arena, *flags, "--max_steps", 3, "--save_total_limit", 0)
    for name in ("checkpoint-2", "checkpoint-3"):
        (tmp_path / "out" / name).rename(tmp_path / name)
    resumed = run(arena, *flags, "--max_steps", 3, "--resume_from_checkpoint", "last")
    assert resumed["test"] == whole["test"] and resumed["steps"] == 3


def test_a_picture_of_examples_is_written_and_nothing_is_trained(tmp_path):
    arena.main(["--picture", str(tmp_path / "examples.png"), "--difficulty", "easy"])
    pixels = np.asarray(Image.open(tmp_path / "examples.png"))
    assert pixels.shape == (4 * 34 * 4, 8 * 34 * 4) and pixels.max() == 255
    assert [path.name for path in tmp_path.iterdir()] == ["examples.png"]


def test_batches_are_padded_with_0_behind_and_start_with_the_first_token():
    examples = ArrayExamples([np.array([3, 4], dtype=np.uint8), np.array([5])], [1, 0], first_token=9)
    assert examples.lengths == [3, 2]
    batch = pad_batch([examples[0], examples[1]])
    assert batch["input_ids"].tolist() == [[9, 3, 4], [9, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0] and batch["input_ids"].dtype == torch.long
    assert "attention_mask" not in pad_batch([examples[0], examples[0]])


def test_needle_scores_every_length_whole_and_cut_and_draws_the_curve(run, tmp_path, monkeypatch):
    words = {"text": ["this licence permits copying , sale and use of the work . " * 50] * 4}
    splits = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(words) for split in ("train", "validation", "test")}
    )
    monkeypatch.setattr(license_documents, "load_license_documents", lambda: splits)
    flags = ("--num_documents", 8, "--longest", 256, "--lengths", 256, 1024, "--num_test", 4, "--max_steps", 2)
    results = run(needle_script, *flags, "--per_device_train_batch_size", 4)
    assert list(results["accuracy"]) == list(results["accuracy_cut_to_512"]) == ["256", "1024"]
    assert results["trained_up_to"] == 256 and results["steps"] == 2
    assert Image.open(tmp_path / "out" / "accuracy.png").size[0] > 100


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (arena, ["--learning_rate", "0"], "--learning_rate must be above 0"),
        (arena, ["--warmup_steps", "-1"], "--warmup_steps must not be negative"),
        (arena, ["--sizes", "6", "2"], "--sizes must be three numbers"),
        (arena, ["--short_epochs", "1"], "unknown flag --short_epochs"),
        (needle_script, ["--lengths", "1024", "8"], "--lengths must be at least 20 tokens each, got 8"),
        (needle_script, ["--longest", "32"], "--longest must be at least 64"),
        (needle_script, ["--num_test", "0"], "--num_test must be above 0"),
    ],
)
def test_flags_that_no_run_can_use_are_refused_before_it_starts(script, flags, message, capsys):
    with pytest.raises(SystemExit):
        script.parse(flags)
    assert message in capsys.readouterr().err
