"""Protects what a long run relies on: every example once per epoch, atomic checkpoints, signals, parameter groups."""

import json
import resource
import signal
import subprocess
import sys
import textwrap
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tiny_models import build
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from fa_transformers import FABertConfig, FABertForSequenceClassification, FABertModel
from fa_transformers.data.batching import LengthGroupedBatchSampler, count_update_steps
from fa_transformers.files import write_json, written_by_rename
from fa_transformers.hub.folder_lock import LOCK_FILE
from fa_transformers.memory import MemoryEstimate
from fa_transformers.options import LoopOptions
from fa_transformers.tables import format_table
from fa_transformers.training import progress
from fa_transformers.training.checkpointing import (
    LAUNCH_FILE,
    STATE_FILE,
    CheckpointError,
    StopRequest,
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prepare_output_dir,
    resume_run,
    save_checkpoint,
)
from fa_transformers.training.loaders import choose_num_workers
from fa_transformers.training.loop import plan_steps
from fa_transformers.training.optimizer import freeze_bottom_layers, group_parameters
from fa_transformers.training.progress import ProgressMeter, TrainingDiverged
from fa_transformers.training.report import describe_run, plot_confusion_matrix
from fa_transformers.training.setup import gather_model, start_trackers


def random_lengths(num: int = 203, longest: int = 900) -> list[int]:
    return np.random.default_rng(0).integers(1, longest, num).tolist()


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_occurs_once_and_batches_keep_their_budget(shuffle, group_by_length, num_processes):
    lengths = random_lengths()
    sampler = LengthGroupedBatchSampler(
        lengths, 16, max_tokens=2000, group_by_length=group_by_length, shuffle=shuffle, num_processes=num_processes
    )
    for epoch in range(3):
        batches = sampler.batches(epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert len(batches) % num_processes == 0
        for batch in batches:
            assert 1 <= len(batch) <= 16
            assert len(batch) * max(lengths[index] for index in batch) <= 2000


def test_an_example_over_the_budget_gets_a_batch_of_its_own():
    sampler = LengthGroupedBatchSampler([5, 50, 5, 5], 4, max_tokens=10)
    assert [1] in sampler.batches(0)


def test_grouping_by_length_saves_padding():
    lengths = random_lengths()

    def padded_tokens(group_by_length: bool) -> int:
        sampler = LengthGroupedBatchSampler(lengths, 8, group_by_length=group_by_length)
        return sum(len(batch) * max(lengths[index] for index in batch) for batch in sampler.batches(0))

    assert padded_tokens(True) < 1.15 * sum(lengths) < padded_tokens(False)


def test_order_depends_on_seed_and_epoch_alone():
    lengths = random_lengths()
    first, second = (LengthGroupedBatchSampler(lengths, 8, seed=3) for _ in range(2))
    second.batches(5)
    assert first.batches(1) == second.batches(1) != first.batches(2)
    assert LengthGroupedBatchSampler(lengths, 8, seed=4).batches(1) != first.batches(1)


def test_shuffled_epochs_bring_other_neighbours_together():
    sampler = LengthGroupedBatchSampler(random_lengths(), 8)
    assert {frozenset(batch) for batch in sampler.batches(0)} != {frozenset(batch) for batch in sampler.batches(1)}


def test_an_epoch_continues_at_any_batch():
    lengths = random_lengths(40)
    accelerator = Accelerator(cpu=True)
    sampler = LengthGroupedBatchSampler(lengths, 4, seed=1)
    loader = accelerator.prepare(DataLoader(range(40), batch_sampler=sampler, collate_fn=torch.tensor))
    whole = [batch.tolist() for batch in sampler.epoch_batches(loader, 2)]
    assert whole == sampler.batches(2)
    rest = [batch.tolist() for batch in sampler.epoch_batches(loader, 2, num_finished=3)]
    assert rest == whole[3:]
    assert list(sampler.epoch_batches(loader, 2, num_finished=len(whole))) == []


def test_update_steps_count_partial_accumulation_and_fractions_of_epochs():
    sampler = LengthGroupedBatchSampler([1] * 10, 2)
    assert count_update_steps(sampler, 1) == 5
    assert count_update_steps(sampler, 2, gradient_accumulation_steps=2) == 6
    assert count_update_steps(sampler, 1.5) == 8
    assert count_update_steps(sampler, 0.01) == 1


@pytest.mark.parametrize("resume_from", ["last", "auto", "path"])
def test_a_run_that_goes_on_with_other_processes_has_as_many_steps_as_it_was_to_have(resume_from, tmp_path):
    lengths = [900] * 5  # four processes join two of the five batches, one would not
    options = {"batch_size": 4, "max_tokens": 900, "shuffle": False}
    first = LengthGroupedBatchSampler(lengths, num_processes=4, **options)
    loop = LoopOptions(max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=1)
    steps = plan_steps(loop, first, tmp_path)
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    write_json(checkpoint / STATE_FILE, {"settings": first.settings})
    loop = replace(loop, gradient_accumulation_steps=4)
    anew = plan_steps(loop, LengthGroupedBatchSampler(lengths, num_processes=1, **options), tmp_path)
    loop = replace(loop, resume_from_checkpoint=str(checkpoint) if resume_from == "path" else resume_from)
    assert plan_steps(loop, LengthGroupedBatchSampler(lengths, num_processes=1, **options), tmp_path) == steps != anew


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ([], {}, "at least one example"),
        ([3], {"num_processes": 2}, "2 processes need at least one example each, got 1"),
        ([3], {"batch_size": 0}, "batch_size must be at least 1"),
        ([3], {"max_tokens": 0}, "max_tokens must be at least 1 or None"),
    ],
)
def test_impossible_batches_are_errors(lengths, settings, message):
    with pytest.raises(ValueError, match=message):
        LengthGroupedBatchSampler(lengths, **({"batch_size": 2} | settings))


def prepared(seed: int = 0) -> tuple[Accelerator, torch.nn.Module]:
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    accelerator.free_memory()
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return accelerator, accelerator.prepare(model, optimizer)[0]


def test_a_checkpoint_brings_back_weights_random_numbers_and_state(tmp_path):
    accelerator, model = prepared()
    state = TrainingState({"seed": 1}, step=7, epoch=2, batch=3, best_score=0.5, best_step=4)
    checkpoint = save_checkpoint(accelerator, tmp_path, state)
    weight, drawn = model.weight.clone(), torch.rand(3)
    torch.nn.init.zeros_(model.weight)
    assert load_checkpoint(accelerator, checkpoint, {"seed": 1}) == state
    assert torch.equal(model.weight, weight)
    assert torch.equal(torch.rand(3), drawn)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_the_limit_deletes_the_oldest_but_never_the_best_nor_the_newest(tmp_path):
    accelerator, _ = prepared()
    for step in (1, 2, 3, 10):
        save_checkpoint(accelerator, tmp_path, TrainingState({}, step=step, best_step=1), save_total_limit=2)
        assert tmp_path / f"checkpoint-{step}" in list_checkpoints(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-10"]


def test_a_resumed_run_with_other_batches_is_refused(tmp_path):
    accelerator, _ = prepared()
    checkpoint = save_checkpoint(accelerator, tmp_path, TrainingState({"seed": 1}, step=2))
    with pytest.raises(CheckpointError, match="made with seed=1, this run has seed=2"):
        load_checkpoint(accelerator, checkpoint, {"seed": 2})


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_a_clear_error(tmp_path):
    accelerator, _ = prepared()
    checkpoint = save_checkpoint(accelerator, tmp_path, TrainingState({}, step=2))
    accelerator.free_memory()
    accelerator.prepare(torch.nn.Linear(5, 5))
    with pytest.raises(CheckpointError, match="does not fit this model or is damaged"):
        load_checkpoint(accelerator, checkpoint, {})
    (checkpoint / STATE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="can't be read"):
        load_checkpoint(accelerator, checkpoint, {})


def test_a_checkpoint_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint("last", tmp_path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this script"):
        find_checkpoint(str(tmp_path / "checkpoint-1"), tmp_path)


def test_resuming_brings_the_best_checkpoint_along_and_refuses_to_mix_with_newer_ones(tmp_path):
    accelerator, _ = prepared()
    for step in (1, 2, 3):
        save_checkpoint(accelerator, tmp_path / "first", TrainingState({}, step=step, best_step=1))
    state = resume_run(accelerator, str(tmp_path / "first/checkpoint-2"), tmp_path / "second", {})
    assert state.step == 2
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["checkpoint-1"]
    with pytest.raises(CheckpointError, match="holds checkpoint-3, which is newer"):
        resume_run(accelerator, str(tmp_path / "first/checkpoint-2"), tmp_path / "first", {})


def test_a_full_disk_leaves_nothing_half_written_and_older_checkpoints_whole(tmp_path):
    # A limit on the size of files makes the real writers fail in the middle of a file, as a full disk does.
    code = f"""
        import resource, torch
        from accelerate import Accelerator
        from pathlib import Path
        from fa_transformers.training.checkpointing import CheckpointError, TrainingState, save_checkpoint
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(torch.nn.Linear(1000, 1000))
        save_checkpoint(accelerator, Path({str(tmp_path)!r}), TrainingState({{}}, step=1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(accelerator, Path({str(tmp_path)!r}), TrainingState({{}}, step=2))
        except CheckpointError as error:
            print(error)
    """
    assert resource.RLIMIT_FSIZE is not None
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "Can't save" in ran.stdout and "Nothing half-written was left" in ran.stdout and "MiB are free" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert json.loads((tmp_path / "checkpoint-1" / STATE_FILE).read_text())["step"] == 1


def test_an_output_folder_with_files_is_refused_unless_asked_for(tmp_path):
    accelerator, _ = prepared()
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=1))
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-2.tmp" / ".training_state.json.17-0123abcd.tmp").write_text("half")
    with written_by_rename(tmp_path / "notes.txt") as leftover:
        leftover.write_text("mine")
    leftover.write_text("half")  # as of a process that was killed
    with pytest.raises(FileExistsError, match="not empty .* --resume_from_checkpoint last.*--overwrite_output_dir"):
        prepare_output_dir(tmp_path, overwrite=False, resume=False)
    assert not (tmp_path / ".checkpoint-2.tmp").exists() and not leftover.exists()
    prepare_output_dir(tmp_path, overwrite=False, resume=True)
    assert len(list_checkpoints(tmp_path)) == 1
    prepare_output_dir(tmp_path, overwrite=True, resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, LAUNCH_FILE, "notes.txt"]


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        prepare_output_dir(tmp_path / "file" / "folder", overwrite=False, resume=False)
    # Not even root can write there.
    with pytest.raises(CheckpointError, match="can't be written"):
        prepare_output_dir(Path("/proc/finetuned"), overwrite=False, resume=False)


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "results.json", {"score": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"score": object()})
    assert json.loads((tmp_path / "results.json").read_text()) == {"score": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_the_second_stops(number):
    accelerator, _ = prepared()
    announced = []
    previous = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)
    try:
        with StopRequest(accelerator, announced.append) as stop:
            assert not stop
            signal.raise_signal(number)
            assert stop and len(announced) == 1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, previous)


def test_scores_are_compared_in_the_right_direction():
    state = TrainingState({}, step=1)
    assert state.record_score({"mse": 2.0, "loss": 2.0}, "mse")
    state.step = 2
    assert not state.record_score({"mse": 3.0, "loss": 3.0}, "mse")
    assert state.evaluations_without_gain == 1 and state.best_step == 1
    assert state.record_score({"mse": 1.0, "loss": 1.0}, "mse")
    assert state.evaluations_without_gain == 0 and state.best_step == 2
    accuracy = TrainingState({})
    assert accuracy.record_score({"accuracy": 0.5, "loss": 1.0}, "accuracy")
    assert not accuracy.record_score({"accuracy": 0.5, "loss": 1.0}, "accuracy")
    assert accuracy.record_score({"accuracy": 0.5, "loss": 0.9}, "accuracy")  # a tie goes to the lower loss
    assert not accuracy.record_score({"accuracy": 0.4, "loss": 0.1}, "accuracy")
    with pytest.raises(ValueError, match=r"--metric_for_best_model pearson has no value .* \['loss', 'mse'\]"):
        state.record_score({"mse": 1.0, "loss": 1.0, "pearson": None}, "pearson")


def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    return BertForSequenceClassification(config)


def test_each_parameter_is_in_one_group_with_its_rate_and_decay():
    model = tiny_bert()
    groups = group_parameters(model, 1e-4, 1e-3, 0.1)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        assert group["lr"] == (1e-3 if name.startswith("classifier") else 1e-4), name
        assert group["weight_decay"] == (0.0 if "LayerNorm" in name or "bias" in name else 0.1), name


def test_fresh_mixers_of_a_stock_checkpoint_train_at_the_rate_of_the_head():
    config = FABertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        local_window=2,
        key_feature_size=8,
    )
    model = FABertForSequenceClassification(config)
    for mixers_are_new in (True, False):
        groups = group_parameters(model, 1e-4, 1e-3, 0.1, mixers_are_new)
        rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            is_fast = name.startswith("classifier") or (mixers_are_new and ("gate" in name or "feature" in name))
            assert rate_of[id(parameter)] == (1e-3 if is_fast else 1e-4), name


def test_frozen_layers_stay_out_of_the_optimiser():
    model = tiny_bert()
    freeze_bottom_layers(model, 2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1")
    assert not any(name.startswith(frozen) for name in trained)
    assert any(name.startswith("bert.encoder.layer.2") for name in trained)
    grouped = sum(len(group["params"]) for group in group_parameters(model, 1.0, 1.0, 0.0))
    assert grouped == len(trained)
    with pytest.raises(ValueError, match="--freeze_layers must be from 0 to 3"):
        freeze_bottom_layers(model, 4)


@pytest.mark.parametrize(("epoch", "batch", "length", "epochs"), [(0, 20, 43, 0.4651), (3, 0, 43, 3), (0, 9, None, 0)])
def test_epochs_count_the_finished_part_of_one(epoch, batch, length, epochs):
    """A stream has one epoch without an end."""
    state = TrainingState({}, epoch=epoch, batch=batch, epoch_batches=length)
    assert describe_run(state)["epochs"] == epochs


def test_the_estimated_peak_is_of_what_the_bar_shows(monkeypatch):
    estimate = MemoryEstimate(weights=2**20, gradients=2**20, optimizer=2**21, activations=50 * 2**20)
    monkeypatch.setattr(progress, "resident_memory", lambda: 2**29)
    monkeypatch.setattr(progress, "peak_memory", lambda device: 2**28)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    ends = {
        returns_freed: progress.describe_peak(estimate, cpu, returns_freed).partition(", of which ")
        for returns_freed in (True, False)
    }
    assert ends[True][0] == "estimated peak memory of each process: 0.55 GiB"
    assert ends[False][0] == "estimated peak memory of each process: 0.55 GiB to 0.60 GiB"
    rest = "optimizer 2.0 MiB, gradients 1.0 MiB or activations 50.0 MiB)"
    assert ends[True][2] == ends[False][2] and ends[True][2].endswith(rest)
    assert progress.describe_peak(estimate, cuda, False) == f"estimated peak memory of tensors: {estimate}"
    monkeypatch.setattr(progress, "peak_memory", lambda device: 2**30)  # of reading the data, long ago
    assert "of each process: 1.00 GiB, of which it takes 0.50 GiB now" in progress.describe_peak(estimate, cpu, False)


def test_a_loss_that_is_not_finite_stops_the_run():
    accelerator, _ = prepared()
    meter = ProgressMeter(accelerator, 10, TrainingState({}, step=3))
    with pytest.raises(TrainingDiverged, match="loss is nan at step 3. Lower --learning_rate"):
        meter.add_batch(float("nan"), 5, 1)
    meter.close()


def test_the_waiting_share_counts_the_time_until_a_batch_is_there_but_no_pause():
    accelerator, _ = prepared()
    meter = ProgressMeter(accelerator, 2, TrainingState({}))

    def slow_batches():
        for _ in range(2):
            time.sleep(0.1)
            yield {}

    for _ in meter.waited_for(slow_batches()):
        time.sleep(0.1)
        meter.add_batch(1.0, 5, 1)
        with meter.paused():
            time.sleep(0.3)
        meter.finish_step()
    meter.close()
    # Slept: 2 × 0.1 s waiting, 2 × 0.1 s training; a busy machine only adds to either, each by far less than a pause.
    assert meter.state.data_wait_seconds == pytest.approx(0.2, abs=0.1)
    assert meter.state.seconds == pytest.approx(0.4, abs=0.2)
    assert meter.values["data_wait_share"] == meter.state.data_wait_seconds / meter.state.seconds


def test_processor_time_is_that_of_the_steps_without_pauses(monkeypatch):
    accelerator, _ = prepared()
    clock = [10.0]
    monkeypatch.setattr(progress.time, "process_time", lambda: clock[0])
    meter = ProgressMeter(accelerator, 2, TrainingState({}))

    def pass_time(seconds):
        clock[0] += seconds

    pass_time(3.0)
    with meter.paused():
        pass_time(7.0)
    pass_time(1.0)
    meter.add_batch(1.0, 5, 1)
    meter.finish_step()
    with meter.paused():
        pass_time(30.0)
    meter.close()
    assert meter.figures()["cpu_seconds"] == 4.0
    pass_time(50.0)
    resumed = ProgressMeter(accelerator, 2, meter.state)
    pass_time(2.5)
    resumed.add_batch(1.0, 5, 1)
    resumed.finish_step()
    resumed.close()
    assert resumed.figures()["cpu_seconds"] == 6.5, "as the seconds, of all starts"


def test_loader_processes_are_chosen_by_device_unless_given():
    accelerator, _ = prepared()
    assert choose_num_workers(None, accelerator) == 0 and choose_num_workers(3, accelerator) == 3


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--report_to comet_ml: that tracker is not installed"):
        start_trackers(Accelerator(cpu=True, log_with="comet_ml", project_dir=tmp_path), "comet_ml", "run", {})


def test_tables_align_and_plots_are_images(tmp_path):
    rows = [{"model": "a", "accuracy": 0.5}, {"model": "longer", "accuracy": None}]
    table = format_table(rows, ["model", "accuracy"])
    assert table.splitlines() == ["model   accuracy", "------  --------", "a       0.500", "longer  -"]
    plot_confusion_matrix([[3, 1], [0, 0]], ["yes", "no"], tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("num_examples", "num_processes"), [(5, 2), (5, 4), (6, 4), (7, 4), (4, 4)])
def test_batches_of_one_are_shared_evenly_without_an_empty_or_repeated_one(num_examples, num_processes):
    lengths = [5000 + index for index in range(num_examples)]
    sampler = LengthGroupedBatchSampler(lengths, 32, max_tokens=2048, num_processes=num_processes)
    batches = sampler.batches(0)
    assert len(batches) % num_processes == 0
    assert all(batches)
    assert sorted(index for batch in batches for index in batch) == list(range(num_examples))


def test_a_sharded_model_is_gathered_whole_on_the_main_process():
    model = build(FABertConfig, FABertModel)
    sharded = type("FSDPFABertModel", (FABertModel,), {})(model.config)  # as fully_shard derives a class
    accelerator = types.SimpleNamespace(
        distributed_type=DistributedType.FSDP, unwrap_model=lambda model, keep_fp32_wrapper: sharded,
        get_state_dict=lambda sharded: model.state_dict(), is_main_process=True,
    )  # fmt: skip
    gathered = gather_model(accelerator, sharded)
    assert type(gathered) is FABertModel and not gathered.training
    for name, weight in model.state_dict().items():
        assert torch.equal(gathered.state_dict()[name], weight), name


def test_trackers_get_neither_tokens_nor_local_paths(monkeypatch):
    got = {}
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: got.update(config))
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = ["a tracker"]
    monkeypatch.setenv("HF_TOKEN", "a-token-of-a-company")
    command = "finetune --train_file /data/private/my.csv --data_name a-token-of-a-company"
    start_trackers(accelerator, "all", "run", {"command": command, "model_name_or_path": "/models/bert", "seed": 1})
    expected = "finetune --train_file my.csv --data_name hidden-token"
    assert got == {"command": expected, "model_name_or_path": "bert", "seed": 1}
