"""Protects an output folder from a second run: it is refused in one line, and a dead run locks nobody out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import ROOT

from fa_transformers.training.checkpointing import LAUNCH_FILE, CheckpointError, prepare_output_dir
from fa_transformers.training.folder_lock import FolderInUse, lock_folder, released, unlock_folder

HOLD = """
import os, sys, time
from pathlib import Path
from fa_transformers.training.folder_lock import lock_folder
folder = Path(sys.argv[1])
(folder / ".launch").write_text("machine 17")
lock_folder(folder, ".launch")
if os.fork() == 0:  # as a worker that outlives the run
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""

TRY = """
import sys
from pathlib import Path
from fa_transformers.training.folder_lock import lock_folder
lock_folder(Path(sys.argv[1]), ".launch")
"""


@pytest.fixture
def other_run(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOLD, tmp_path]
    # A group of its own, so that the worker ends too.
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert int(run.stdout.readline()) == run.pid
    yield run
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("overwrite", "resume"), [(False, False), (True, False), (False, True)])
def test_a_second_run_is_refused_in_one_line_and_changes_nothing(overwrite, resume, tmp_path, other_run):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / ".checkpoint-4.tmp").mkdir()
    with pytest.raises(CheckpointError) as error:
        prepare_output_dir(tmp_path, overwrite=overwrite, resume=resume)
    message = str(error.value)
    assert message.startswith(f"--output_dir {tmp_path} is in use by another run (started 0 minutes ago on machine")
    assert "process 17" in message and "\n" not in message
    assert entries(tmp_path) == [".checkpoint-4.tmp", LAUNCH_FILE, "checkpoint-3"]
    assert (tmp_path / LAUNCH_FILE).read_text() == "machine 17"


def test_a_run_that_was_killed_locks_nobody_out_though_its_workers_live(tmp_path, other_run):
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    start = time.monotonic()
    lock_folder(tmp_path, LAUNCH_FILE)
    assert time.monotonic() - start < 5
    unlock_folder(tmp_path)


def test_the_lock_ends_with_the_run_and_a_refusal_leaves_no_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        prepare_output_dir(tmp_path, overwrite=False, resume=False)
    assert entries(tmp_path) == ["notes.txt"]
    with released(tmp_path):
        prepare_output_dir(tmp_path, overwrite=True, resume=False)
        prepare_output_dir(tmp_path, overwrite=False, resume=True)  # as in a notebook, or of a stage
        command = [sys.executable, "-c", TRY, tmp_path]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode and ran.stderr.splitlines()[-1].startswith(f"{FolderInUse.__module__}.FolderInUse: --out")
    assert subprocess.run(command, env=environment, check=False).returncode == 0


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fa_transformers.training.folder_lock.lock", lambda _: False)
    lock_folder(tmp_path, LAUNCH_FILE)
    unlock_folder(tmp_path)
    assert "can't be locked on its file system" in caplog.text
