"""Protects the stages: their parameter groups, their curves, their best weights, and going on after a stop."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_distillation import LOCAL, job_of, make_pair, run_options, run_values
from transformers import AutoModel, AutoTokenizer

from fa_transformers import CheckpointError, FABertConfig, FABertModel, distill
from fa_transformers.distillation.checks import check_resumed
from fa_transformers.distillation.objectives import EndToEndDistillation
from fa_transformers.distillation.stages import group_student_parameters
from fa_transformers.training import loop


def test_old_weights_and_mixers_have_rates_of_their_own_and_mixers_no_decay():
    student, teacher = make_pair(FABertConfig, FABertModel, **LOCAL)
    groups = group_student_parameters(EndToEndDistillation(student, teacher, "mean"), 1e-4, 1e-3, 0.1)
    mixed = {id(p) for name, p in student.named_parameters() if ".mixer." in name}
    for group in groups:
        for parameter in group["params"]:
            assert (group["lr"] == 1e-3) == (id(parameter) in mixed)
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1 and id(parameter) not in mixed)
    # All but the pooler, which the loss does not reach.
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters())) - 2


def record_log(monkeypatch) -> list[tuple[str, int]]:
    """Names and steps of what the trackers get from here on."""
    logged: list[tuple[str, int]] = []
    log = Accelerator.log
    monkeypatch.setattr(
        Accelerator,
        "log",
        lambda self, values, step, **options: logged.extend((name, step) for name in values) or log(self, values, step),
    )
    return logged


def test_a_run_that_was_cut_between_stages_goes_on_and_ends_as_if_it_had_not_been(tmp_path, stock, monkeypatch):
    whole = distill(**run_options(tmp_path, stock, "whole"))

    def cut(accelerator, output_dir, state, *rest, saved=loop.save_checkpoint):
        if output_dir.name == "end_to_end" and state.step == 4:
            raise KeyboardInterrupt
        return saved(accelerator, output_dir, state, *rest)

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(loop, "save_checkpoint", cut)
    with pytest.raises(KeyboardInterrupt):
        distill(**run_options(tmp_path, stock, "cut", save_steps=2))
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    logged = record_log(monkeypatch)
    resumed = distill(**run_options(tmp_path, stock, "cut", save_steps=2, resume_from_checkpoint="last"))
    assert [row for row in logged if row[0].endswith("/loss")] == [
        ("end_to_end/loss", step) for step in (9, 10, 11, 12)
    ]
    assert resumed.similarity == whole.similarity
    assert [stage["after"] for stage in resumed.stages] == [stage["after"] for stage in whole.stages]


def test_the_trackers_get_a_curve_of_each_stage_and_steps_that_never_go_back(tmp_path, stock, monkeypatch):
    logged = record_log(monkeypatch)
    distill(**run_options(tmp_path, stock))
    steps = {stage: [step for name, step in logged if name == f"{stage}/loss"] for stage in ("transfer", "end_to_end")}
    assert steps == {"transfer": list(range(1, 7)), "end_to_end": list(range(7, 13))}
    assert ("end_to_end/eval_loss", 12) in logged


def test_the_receipt_of_a_stage_is_of_the_weights_that_are_kept(tmp_path, stock):
    changes = dict(
        load_best_model_at_end=True, eval_steps=2, transfer_steps=0, end_to_end_steps=8, mixer_learning_rate=1.0,
        learning_rate=0.3, warmup_steps=8,  # so that every step is larger, and worse, than the one before
    )  # fmt: skip
    (stage,) = distill(**run_options(tmp_path, stock, **changes)).stages
    assert stage["best_step"] < 8
    AcceleratorState._reset_state(reset_partial_state=True)
    (again,) = distill(**run_options(tmp_path, stock, **changes, resume_from_checkpoint="last")).stages
    assert again["after"] == stage["after"]


@pytest.mark.parametrize("is_frozen", [True, False])
def test_the_table_of_words_trains_only_if_it_is_not_frozen(tmp_path, stock, is_frozen):
    changes = dict(transfer_steps=0, end_to_end_steps=2, freeze_embeddings=is_frozen, learning_rate=1e-2)
    result = distill(**run_options(tmp_path, stock, **changes))
    table = AutoModel.from_pretrained(stock, dtype=torch.float32).get_input_embeddings().weight
    assert result.model.get_input_embeddings().weight.equal(table) == is_frozen


def test_only_what_was_interrupted_is_gone_on_with(tmp_path, stock):
    resumed = dict(resume_from_checkpoint="last")
    with pytest.raises(CheckpointError, match="no stage in .* has a checkpoint"):
        distill(**run_options(tmp_path, stock, **resumed))
    AcceleratorState._reset_state(reset_partial_state=True)
    distill(**run_options(tmp_path, stock))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="`transfer_steps=9`: .* went on to its next stage after 6"):
        distill(**run_options(tmp_path, stock, **resumed, transfer_steps=9))
    transfer = tmp_path / "out" / "transfer"
    (transfer / "checkpoint-6").rename(transfer / "damaged-checkpoint-6")  # the stage had ended, all the same
    (transfer / "checkpoint-4").mkdir()
    check_resumed(job_of(**run_values(tmp_path, stock, **resumed)))


def test_a_stage_is_not_gone_on_with_on_other_texts_or_by_another_teacher(tmp_path, stock, tmp_path_factory):
    changes = dict(transfer_steps=2, end_to_end_steps=0)
    distill(**run_options(tmp_path, stock, **changes))
    before = run_options(tmp_path, stock, **changes, resume_from_checkpoint="last")
    texts = before["data"].validation_file
    rows = [json.loads(line)["text"].split() for line in texts.read_text().splitlines()]
    texts.write_text("".join(json.dumps({"text": " ".join(words[::-1])}) + "\n" for words in rows))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(CheckpointError, match=r"the documents of held-out data \(same kinds\) changed since"):
        distill(**before)
    before = run_options(tmp_path, stock, **changes, resume_from_checkpoint="last")  # writes the texts again
    teacher = AutoModel.from_pretrained(stock)
    with torch.no_grad():
        teacher.get_input_embeddings().weight[5, 0] += 1.0
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stock).save_pretrained(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(CheckpointError, match="other data: the weights of the teacher changed since"):
        distill(**before | {"distillation": replace(before["distillation"], teacher_name_or_path=str(folder))})
