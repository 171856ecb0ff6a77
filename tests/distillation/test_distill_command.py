"""Protects the command line of distillation: it knows the flags that have a use, and runs what they say."""

import json
from dataclasses import fields

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_distillation import OPTIONS, run_flags

from fa_transformers.commands import distill as command
from fa_transformers.conversion.packaged import HUB_IDS, HUB_LICENSE
from fa_transformers.distillation.recipes import GROUPS, PACKAGED_LICENSES, recipe_of
from fa_transformers.options import UNSET

# Flags of fine-tuning that distillation has no use for: its text is cut into pieces without labels, each of its stages
# has steps of its own, and a teacher's softmax attention isn't shared by processes.
LEFT_OUT = (
    "test_file", "streaming", "label_separator", "problem_type", "preprocessing_num_workers", "overwrite_cache",
    "strict_length", "freeze_layers", "gradient_checkpointing", "packing", "sequence_parallel_size", "short_epochs",
    "short_length", "max_steps", "num_train_epochs", "head_learning_rate", "metric_for_best_model",
    "push_to_hub", "hub_token", "hub_private", "label_names", "group_column", "recovery_steps", "report_lengths",
    "lora_rank", "lora_alpha",
)  # fmt: skip


@pytest.mark.parametrize("flag", LEFT_OUT)
def test_a_flag_without_a_use_is_unknown(flag, capsys):
    assert any(flag in {part.name for part in fields(options_class)} for options_class in OPTIONS.values())
    with pytest.raises(SystemExit):
        command.parse([f"--{flag}", "1"])
    assert f"unknown flag --{flag}" in capsys.readouterr().err


def test_every_flag_with_a_use_is_known_and_has_a_value():
    names = set()
    for options_class, groups, _ in GROUPS:
        names |= {part.name for part in fields(options_class) if part.metadata["group"] in groups}
    assert names | set(LEFT_OUT) == {part.name for options_class in OPTIONS.values() for part in fields(options_class)}
    for task in ("text", "images"):
        run = command.parse(["--task", task])
        layer = {part.name for part in fields(OPTIONS["model"]) if part.metadata["group"] in ("layer", "positions")}
        unset = {
            part.name
            for name in OPTIONS
            for part in fields(getattr(run, name))
            if getattr(getattr(run, name), part.name) is UNSET
        }
        assert unset <= layer  # which are the checkpoint's


def test_distilling_says_what_it_reads_itself(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Labels aren't read" in text and "distillation cuts them into several" in text
    with pytest.raises(SystemExit):
        command.parse(["--task", "images", "--recipe", "full", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 1e-05)" in text and "(default: dinov2-small)" in text and "(default: 2500)" in text


def test_recipes_and_tasks_have_values_of_their_own():
    quick, full = recipe_of("text", "quick"), recipe_of("text", "full")
    assert (quick["transfer_steps"], quick["end_to_end_steps"]) == (400, 530)
    assert (full["transfer_steps"], full["end_to_end_steps"]) == (1000, 2500)
    assert quick["learning_rate"] == 5e-5 and recipe_of("images")["learning_rate"] == 1e-5
    run = command.parse(["--recipe", "full", "--transfer_steps", "7"])
    assert (run.distillation.transfer_steps, run.distillation.end_to_end_steps) == (7, 2500)


def test_the_licence_of_packaged_teachers_is_known_and_of_others_is_not():
    assert dict.fromkeys(HUB_IDS, HUB_LICENSE) == PACKAGED_LICENSES
    assert command.parse([]).card.license == HUB_LICENSE
    assert command.parse(["--model_name_or_path", "bert/"]).card.license == "unknown"
    teacher = ["--model_name_or_path", "converted/", "--teacher_name_or_path", "minilm"]
    assert command.parse(teacher).card.license == HUB_LICENSE
    assert command.parse([*teacher, "--license", "mit"]).card.license == "mit"


def test_a_dry_run_tells_the_plan_of_each_stage_and_trains_and_writes_nothing(tmp_path, stock, capsys):
    more = {"long_steps": 3, "long_length": 128, "position_embedding_type": "periodic", "dry_run": True}
    result = command.main(run_flags(tmp_path, stock, **more))
    told, plan = capsys.readouterr().out, result.plan
    assert not (tmp_path / "out").exists() and (result.stages, result.receipt) == ([], {})
    teacher = load_file(stock / "model.safetensors")
    weights = {name: tensor for name, tensor in result.model.state_dict().items() if name in teacher}
    assert weights and all(torch.equal(tensor, teacher[name]) for name, tensor in weights.items())
    assert {name: stage.steps for name, stage in plan.stages.items()} == {"transfer": 6, "end_to_end": 6, "long": 3}
    transfer, end_to_end, long = plan.stages.values()
    mixers = sum(tensor.numel() for name, tensor in result.model.named_parameters() if ".mixer." in name)
    assert transfer.num_trained == mixers < end_to_end.num_trained < end_to_end.num_parameters
    assert (transfer.lengths[1.0], long.lengths[1.0]) == (64, 82) and long.largest_batch[1] == 82
    assert plan.seconds == sum(stage.seconds for stage in plan.stages.values()) > 0
    assert "estimated peak memory of each process" in long.memory
    lines = told.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith(("to train on", "held out: "))] == ["60", "12", "12"]
    assert {"transfer:", "end_to_end:", "long:"} < set(lines)
    assert lines[-1] == "dry run: nothing was trained or written"


def test_the_command_prints_the_receipt_and_names_itself_on_the_card(tmp_path, stock, capsys):
    flags = run_flags(tmp_path, stock, transfer_steps=1, end_to_end_steps=0)
    result = command.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert "Student and teacher, their embeddings compared:" in lines
    assert "transfer: 1 step," in " ".join(lines)
    assert json.loads(lines[-1]) == json.loads(json.dumps(result.receipt))
    assert result.receipt["command"].startswith("accelerate launch scripts/distill.py --model_name_or_path ")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert str(tmp_path) not in result.receipt["command"]
    run = command.parse([*flags, "--overwrite_output_dir"])
    assert run.resume_command == f"{command.parse(flags).command} --resume_from_checkpoint last"
