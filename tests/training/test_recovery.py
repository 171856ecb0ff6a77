"""Protects the attention transfer before fine-tuning: what it trains, where it has no use, and how it is resumed."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_finetune
import torch
from accelerate import Accelerator
from test_finetune import run, text_flags, weights

from fa_transformers import FABertConfig, FABertModel, FAViTConfig, FAViTModel
from fa_transformers.training import recovery as recovery_module
from fa_transformers.training.checkpointing import list_checkpoints

tiny_bert = test_finetune.tiny_bert


def recovered_flags(tmp_path: Path, bert: Path, *more: object) -> list:
    return [*text_flags(tmp_path, bert), "--local_kernel_size", 3, "--recovery_steps", 30, *more]


def test_the_layers_learn_the_checkpoints_attention_first_and_the_config_says_so(
    tmp_path, tiny_bert, capsys, monkeypatch
):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: logged.append((step, values)))
    results = run(*recovered_flags(tmp_path, tiny_bert, "--max_steps", 2, "--logging_steps", 1))
    figures = results["recovery"]
    assert figures["steps"] == 30 and figures["error_after"] < 0.9 * figures["error_before"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["recovery"] == "transferred"
    printed = capsys.readouterr().out
    before = printed.index("replaced: softmax attention in ")
    assert (
        before < printed.index("cost: first 30 steps of attention transfer") < printed.index("attention transfer: the")
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "30 steps of attention transfer" in card
    steps = [step for step, _ in logged]
    assert steps == sorted(steps) and set(steps) == set(range(1, 33)), "trackers drop steps that go back"
    for step, values in logged:
        assert all(name.startswith("recovery/") == (step <= 30) for name in values)


def test_a_run_that_was_stopped_within_the_transfer_goes_on_there(tmp_path, tiny_bert, monkeypatch):
    flags = recovered_flags(tmp_path, tiny_bert, "--max_steps", 4)
    run(*flags, "--output_dir", tmp_path / "whole", "--save_total_limit", 0)
    assert list_checkpoints(tmp_path / "whole" / "recovery"), "without a limit all stay"
    real = recovery_module.AttentionTransfer.forward
    calls = []

    def stopped(self, **batch):
        calls.append(self.training)
        if sum(calls) == 11:
            signal.raise_signal(signal.SIGTERM)
        return real(self, **batch)

    monkeypatch.setattr(recovery_module.AttentionTransfer, "forward", stopped)
    with pytest.raises(SystemExit):
        run(*flags)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path / "out" / "recovery") and not list_checkpoints(tmp_path / "out")
    results = run(*flags, "--resume_from_checkpoint", "last")
    assert results["recovery"]["steps"] == 30
    assert [path.name for path in (tmp_path / "out" / "recovery").iterdir()] == ["figures.json"]
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    again = run(*flags, "--resume_from_checkpoint", "last")
    assert again["recovery"] == results["recovery"], "read from its figures"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--local_window", 0, "--local_kernel_size", 0], "needs layers with something to train: give --local_window"),
        (["--recovery_steps", -1], "--recovery_steps must"),
    ],
)
def test_a_transfer_that_has_no_use_is_refused_where_it_was_asked_for(more, message, tmp_path, tiny_bert):
    with pytest.raises((ValueError, SystemExit), match=message):
        run(*recovered_flags(tmp_path, tiny_bert, "--max_steps", 2, *more))
    assert not list_checkpoints(tmp_path / "out")


def test_a_model_keeps_what_its_config_says_of_a_transfer_and_has_none_to_learn_from_again(tmp_path, tiny_bert):
    first = recovered_flags(tmp_path, tiny_bert, "--max_steps", 1)
    run(*first)
    flags = [*text_flags(tmp_path, tmp_path / "out")[:-2], "--local_kernel_size", 3, "--max_steps", 1]
    results = run(*flags, "--output_dir", tmp_path / "again")
    assert "recovery" not in results
    assert json.loads((tmp_path / "again" / "config.json").read_text())["recovery"] == "transferred"
    with pytest.raises((ValueError, SystemExit), match="this one has none to learn from"):
        run(*flags, "--output_dir", tmp_path / "third", "--recovery_steps", 3)


@pytest.mark.parametrize(
    ("is_text", "window", "way"),
    [(True, 0, "--local_window 64"), (True, 4, "distillation before"), (False, 0, "distillation before")],
)
def test_the_line_on_the_cost_says_what_makes_the_difference_smaller(is_text, window, way):
    config, model = (FABertConfig, FABertModel) if is_text else (FAViTConfig, FAViTModel)
    small = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    built = SimpleNamespace(model=model(config(**small, local_window=window)), source=SimpleNamespace(name="stock"))
    replaced, cost = recovery_module.describe_exchange(SimpleNamespace(is_text=is_text), built, 0).splitlines()
    assert replaced.startswith("replaced: softmax attention in 1 of 1 layers")
    assert cost.startswith("cost: ") and cost.endswith(f": {way} makes the difference smaller.")
