"""Protects a run's work: from kills, damaged checkpoints, another number of processes, and a process that is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from repository import HELPERS, ROOT, read_json_line
from torch.utils.data import DataLoader

from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.training.checkpointing import (
    CheckpointError,
    TrainingState,
    choose_resume,
    find_checkpoint,
    list_checkpoints,
    load_best,
    load_checkpoint,
    prepare_output_dir,
    resume_run,
    save_checkpoint,
)
from fa_transformers.training.manifest import MANIFEST_FILE, find_damage, write_manifest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def prepared(seed: int = 0) -> tuple[Accelerator, torch.nn.Module]:
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    accelerator.free_memory()
    model = torch.nn.Linear(3, 2)
    return accelerator, accelerator.prepare(model, torch.optim.AdamW(model.parameters()))[0]


def run_killed(action: str, seed: int, num_points: int) -> dict:
    command = [sys.executable, HELPERS / "killed_training.py", action, str(seed), str(num_points)]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_run_killed_anywhere_ends_as_an_uninterrupted_one():
    counts = run_killed("grouped", seed=5, num_points=7)
    assert counts["resumed from a checkpoint"] + counts.get("started anew", 0) == 7
    assert sum(counts[kind] for kind in ("forward", "backward", "optimizer", "evaluation", "file")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["grouped", "accumulated", "packed", "workers", "two processes"])
def test_fourteen_kills_of_each_variant_change_nothing(variant):
    """70 kill points in all, two of each kind for each variant."""
    counts = run_killed(variant, seed=11, num_points=14)
    print(variant, counts)
    assert sum(counts[kind] for kind in ("forward", "backward", "optimizer", "evaluation", "file")) == 10
    # A kill by the clock may come too late, and no later file may pass the size at which a torn one ends.
    assert counts.get("torn", 0) + counts.get("clock", 0) + counts.get("not reached", 0) == 4
    assert counts["resumed from a checkpoint"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes_in_mid_epoch(before, after):
    found = run_killed("change", before, after)
    state = found["resumed_at"]
    assert (state["step"], state["epoch"], state["batch"], state["num_processes"]) == (8, 2, 4, before)
    assert found["differing"] == []
    # Halving is exact and two summands have one order: the mean over two processes is that over two batches.
    assert found["difference"] == 0.0


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_stops_all_with_the_older_checkpoint_kept():
    found = run_killed("full disk", 0, 0)
    for said in found["said"]:
        assert "CheckpointError: Can't save" in said and "checkpoint-4" in said and "MiB are free there" in said
    assert found["left"] == {"checkpoint-3": None}  # the best so far, saved after the evaluation
    assert found["differing"] == []


def test_a_resumed_epoch_loads_no_example_of_the_batches_before():
    loaded = []

    class Watched(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            loaded.append(index)
            return index

    lengths = np.random.default_rng(0).integers(1, 900, 40).tolist()
    sampler = LengthGroupedBatchSampler(lengths, 4, seed=1)
    loader = Accelerator(cpu=True).prepare(DataLoader(Watched(), batch_sampler=sampler, collate_fn=torch.tensor))
    rest = list(sampler.epoch_batches(loader, 2, num_finished=7))
    assert len(rest) == 3
    assert loaded == [index for batch in sampler.batches(2)[7:] for index in batch]


def truncate(folder: Path) -> str:
    path = folder / "optimizer.bin"
    os.truncate(path, path.stat().st_size - 1)
    return r"optimizer\.bin has .* bytes instead of"


def flip_a_bit(folder: Path) -> str:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return r"model\.safetensors no longer has the checksum"


def remove_random_state(folder: Path) -> str:
    (folder / "random_states_0.pkl").unlink()
    return r"random_states_0\.pkl is missing"


def remove_manifest(folder: Path) -> str:
    (folder / MANIFEST_FILE).unlink()
    return r"manifest\.json is missing"


def cut_manifest(folder: Path) -> str:
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text()[:50])
    return r"manifest\.json can't be read"


def replace_manifest(folder: Path) -> str:
    (folder / MANIFEST_FILE).write_text('{"files": [1]}')
    return r"manifest\.json can't be read"


DAMAGES = [truncate, flip_a_bit, remove_random_state, remove_manifest, cut_manifest, replace_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_sound_one_before_it(damage, tmp_path, capsys):
    accelerator, _ = prepared()
    for step in (2, 4, 6):
        save_checkpoint(accelerator, tmp_path, TrainingState({}, step=step))
    reason = damage(tmp_path / "checkpoint-6")
    with pytest.raises(CheckpointError, match=f"checkpoint-6 is damaged: {reason}.*Use an older checkpoint"):
        find_checkpoint(str(tmp_path / "checkpoint-6"), tmp_path)
    assert resume_run(accelerator, "last", tmp_path, {}).step == 4
    said = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoint-6'} is damaged: " in said and "resuming from checkpoint-4" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "damaged-checkpoint-6"]
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=6))  # its name is free again
    assert resume_run(accelerator, "last", tmp_path, {}).step == 6


def test_where_every_checkpoint_is_damaged_none_is_touched_and_nothing_starts_anew(tmp_path):
    accelerator, _ = prepared()
    for step in (2, 4):
        flip_a_bit(save_checkpoint(accelerator, tmp_path, TrainingState({}, step=step)))
    for resume_from in ("last", "auto"):
        with pytest.raises(CheckpointError, match=r"Every checkpoint .*checkpoint-4: model.*checkpoint-2: model"):
            resume_run(accelerator, resume_from, tmp_path, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_auto_resumes_where_there_is_a_checkpoint_and_else_starts_anew(tmp_path):
    accelerator, _ = prepared()
    assert resume_run(accelerator, "auto", tmp_path, {"seed": 1}) == TrainingState({"seed": 1})
    save_checkpoint(accelerator, tmp_path, TrainingState({"seed": 1}, step=3))
    assert resume_run(accelerator, "auto", tmp_path, {"seed": 1}).step == 3


def test_a_restart_by_torchrun_resumes_by_itself(tmp_path, monkeypatch):
    accelerator, _ = prepared()
    assert choose_resume(None, tmp_path) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert choose_resume(None, tmp_path) is None  # the first start had not come as far as to accept the folder
    prepare_output_dir(tmp_path, overwrite=False, resume=False)
    assert choose_resume(None, tmp_path) == "auto"
    assert choose_resume("elsewhere/checkpoint-2", tmp_path) == "elsewhere/checkpoint-2"
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=3))
    assert choose_resume("elsewhere/checkpoint-2", tmp_path) == "auto"


def test_a_restart_does_not_go_on_with_what_another_launch_left(tmp_path, monkeypatch):
    accelerator, _ = prepared()
    prepare_output_dir(tmp_path, overwrite=False, resume=False)
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=3))
    monkeypatch.setattr(os, "getppid", lambda: -1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert choose_resume(None, tmp_path) is None
    with pytest.raises(FileExistsError, match="not empty"):
        prepare_output_dir(tmp_path, overwrite=False, resume=False)
    prepare_output_dir(tmp_path, overwrite=True, resume=False)
    assert list_checkpoints(tmp_path) == [] and choose_resume(None, tmp_path) == "auto"


def test_no_older_checkpoint_is_deleted_for_one_that_does_not_read_back(tmp_path, monkeypatch):
    accelerator, _ = prepared()
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=1), save_total_limit=1)

    def write_and_tear(folder: Path) -> None:
        write_manifest(folder)
        truncate(folder)

    with monkeypatch.context() as patch:
        patch.setattr("fa_transformers.training.checkpointing.write_manifest", write_and_tear)
        with pytest.raises(CheckpointError, match=r"does not read back: optimizer\.bin has .* bytes instead"):
            save_checkpoint(accelerator, tmp_path, TrainingState({}, step=2), save_total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert find_damage(tmp_path / "checkpoint-1") is None
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=2), save_total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_damaged_best_checkpoint_is_neither_compared_with_nor_loaded(tmp_path, capsys):
    accelerator, _ = prepared()
    for step in (1, 2):
        save_checkpoint(accelerator, tmp_path, TrainingState({}, step=step, best_step=1, best_score=0.5))
    flip_a_bit(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="checkpoint-1, the best of this run, is damaged: model"):
        load_best(accelerator, tmp_path / "checkpoint-1")
    state = resume_run(accelerator, "last", tmp_path, {})
    assert (state.step, state.best_step, state.best_score) == (2, None, None)
    assert "checkpoint-1, the best checkpoint so far, can't be used: model" in capsys.readouterr().out


def test_a_resumed_run_must_keep_the_batches_of_a_step(tmp_path):
    accelerator, _ = prepared()
    before = {"num_processes": 3, "gradient_accumulation_steps": 2}
    checkpoint = save_checkpoint(accelerator, tmp_path, TrainingState(before, num_processes=3, step=2, batch=12))
    with pytest.raises(CheckpointError, match="6 batches in an .* has 4. Resume with --gradient_accumulation_steps 3"):
        load_checkpoint(accelerator, checkpoint, {"num_processes": 2, "gradient_accumulation_steps": 2})
    with pytest.raises(CheckpointError, match="has 8. Resume on a number of processes that divides 6"):
        load_checkpoint(accelerator, checkpoint, {"num_processes": 4, "gradient_accumulation_steps": 2})
    state = load_checkpoint(accelerator, checkpoint, {"num_processes": 1, "gradient_accumulation_steps": 6})
    assert state.settings == before and state.num_processes == 1 and accelerator.step == state.batch == 12


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (3, 2)])
@pytest.mark.parametrize("packing", [False, True])
def test_other_processes_share_the_steps_of_the_first_run(packing, before, after):
    per_step = 12
    lengths = np.random.default_rng(0).integers(1, 900, 203).tolist()
    first, second = (
        LengthGroupedBatchSampler(lengths, 8, max_tokens=2000, packing=packing, seed=2, num_processes=num)
        for num in (before, after)
    )
    second.keep_plan(before, per_step)
    for epoch in range(4):
        planned, shared = first.batches(epoch), second.batches(epoch)
        assert len(shared) % after == 0
        whole = len(planned) // per_step * per_step
        assert shared[:whole] == planned[:whole]
        last = [{index for batch in batches[whole:] for index in batch} for batches in (planned, shared)]
        assert last[0] == last[1] and all(shared)


def test_a_last_step_of_one_example_is_repeated_rather_than_left_out():
    sampler = LengthGroupedBatchSampler([5] * 5, 1, num_processes=2)
    sampler.keep_plan(1, 4)
    batches = sampler.batches(0)
    assert len(batches) == 6 and batches[4] == batches[5] and sorted(sum(batches[:5], [])) == list(range(5))


def start_two_processes(tmp_path: Path, how: str, *more: str) -> subprocess.CompletedProcess:
    random = np.random.default_rng(0)
    for label, colour in (("dark", 20), ("light", 220)):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for index in range(10):
            pixels = np.full((16, 16, 3), colour) + random.integers(-20, 20, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    flags = ["--task", "image-classification", "--image_folder", tmp_path / "images", "--image_size", "32", "--use_cpu"]
    flags += ["--per_device_train_batch_size", "2", "--num_threads", "1", "--max_steps", "8", "--save_steps", "2"]
    flags += ["--output_dir", tmp_path / "out", *more]
    command = [sys.executable, *launcher, HELPERS / "lose_a_process.py", how, *flags]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=280)


@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_checkpoint_after_a_process_died(tmp_path):
    ran = start_two_processes(tmp_path, "die")
    assert ran.returncode == 0, ran.stderr
    results = read_json_line(ran.stdout)
    assert results["steps"] == 8
    assert "ProcessLost: Process 0 stops: another process of this run died" in ran.stderr
    assert ran.stderr.count("| 0/8 [") == 1, "the second attempt did not go on where the first was saved"


@pytest.mark.slow
def test_a_process_that_hangs_stops_the_others_within_the_time_out(tmp_path):
    ran = start_two_processes(tmp_path, "hang", "--ddp_timeout", "20")
    assert "ProcessLost: Process 0 stops" in ran.stderr and "Timed out waiting 20000ms" in ran.stderr
    assert ran.returncode == 0 and read_json_line(ran.stdout)["steps"] == 8


@pytest.mark.slow
def test_a_sharded_checkpoint_of_two_processes_loads_in_one_and_in_two(tmp_path):
    command = [sys.executable, HELPERS / "shard_checkpoints.py", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["weights"] == ["model.safetensors"] and report["final"] == 0.0
    for num_processes in (1, 2):
        saved, after_a_step = report[f"loaded by {num_processes}"]
        # Both processes have the same batch, whose gradients halve and add up exactly: weights, moments and step too.
        assert saved == 0.0 and after_a_step == 0.0
