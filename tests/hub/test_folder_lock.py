"""Protects an output folder from a second run: it is refused in one line, and a dead run locks nobody out."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fa_transformers.hub import folder_lock
from fa_transformers.hub.folder_lock import LOCK_FILE, SILENT_S, lock_folder, locked, released, unlock_folder
from fa_transformers.hub.placing import placed_in
from fa_transformers.training.checkpointing import LAUNCH_FILE, prepare_output_dir


class OtherRun:
    """A process that has a folder locked, with a worker that outlives it."""

    def __init__(self, folder: Path):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()  # so that the worker ends too
                lock_folder(folder)
                if os.fork():
                    os.write(writer, b"locked")
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(writer)
        assert os.read(reader, 6) == b"locked"
        os.close(reader)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def end(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


@pytest.fixture
def other_run(tmp_path):
    run = OtherRun(tmp_path)
    yield run
    run.end()


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    unlock_folder(tmp_path)


def start_child(action: Callable[[], object]) -> int:
    """Start a process that ends with 0, or with 1 where the folder is in use."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except FileExistsError:
            os._exit(1)
        finally:
            os._exit(2)
    return pid


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_a_child(action: Callable[[], object]) -> int:
    return wait_for(start_child(action))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave(folder: Path, silence_s: float = 0.0, **owner: object) -> None:
    """Leave the file of a run that is not known to this process."""
    content = folder_lock._describe_self() | {"pid": 2**22 + 1} | owner
    (folder / LOCK_FILE).write_text(json.dumps(content))
    then = time.time() - silence_s
    os.utime(folder / LOCK_FILE, (then, then))


ELSEWHERE = {"host": "node-7", "machine": "another", "pid": 17}


def without_locks(monkeypatch) -> None:
    monkeypatch.setattr(folder_lock, "lock", lambda _: False)


@pytest.mark.parametrize(("overwrite", "resume"), [(False, False), (True, False), (False, True)])
def test_a_second_run_is_refused_in_one_line_and_changes_nothing(overwrite, resume, tmp_path, other_run):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / ".checkpoint-4.tmp").mkdir()
    with pytest.raises(FileExistsError) as error:
        prepare_output_dir(tmp_path, overwrite=overwrite, resume=resume)
    message = str(error.value)
    assert message.startswith(f"--output_dir {tmp_path} is in use by another run (process {other_run.pid} on ")
    assert "started 0 minutes ago, last heard of" in message and "\n" not in message
    assert entries(tmp_path) == [".checkpoint-4.tmp", LOCK_FILE, "checkpoint-3"]
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == other_run.pid


def test_nothing_is_published_into_the_folder_of_a_run_of_another_process(tmp_path, other_run):
    with (
        pytest.raises(FileExistsError, match=f"in use by another run .process {other_run.pid}"),
        placed_in(tmp_path, "last", set()),
    ):
        raise AssertionError("the block must not begin")
    assert entries(tmp_path) == [LOCK_FILE]


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_run_that_was_killed_locks_nobody_out_though_its_workers_live(has_locks, folder, other_run, monkeypatch):
    other_run.kill()
    if not has_locks:
        without_locks(monkeypatch)
    start = time.monotonic()
    lock_folder(folder)
    assert time.monotonic() - start < 5
    assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    unlock_folder(folder)
    assert entries(folder) == []


def test_the_lock_ends_with_the_run_and_a_refusal_leaves_no_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        prepare_output_dir(tmp_path, overwrite=False, resume=False)
    assert entries(tmp_path) == ["notes.txt"]
    with released(tmp_path):
        prepare_output_dir(tmp_path, overwrite=True, resume=False)
        prepare_output_dir(tmp_path, overwrite=False, resume=True)  # as in a notebook, or of a stage
        with locked(tmp_path):
            pass
        assert in_a_child(lambda: lock_folder(tmp_path)) == 1
    assert entries(tmp_path) == [LAUNCH_FILE, "notes.txt"]
    assert in_a_child(lambda: lock_folder(tmp_path)) == 0


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_run_of_another_machine_is_refused_until_it_has_been_silent(has_locks, folder, monkeypatch):
    """A lock that was got says nothing of it, as locks needn't reach other machines."""
    if not has_locks:
        without_locks(monkeypatch)
    leave(folder, **ELSEWHERE, started=time.time() - 180, silence_s=SILENT_S - 20)
    with pytest.raises(FileExistsError) as error:
        lock_folder(folder)
    message = str(error.value)
    assert f"process 17 on node-7, started 3 minutes ago, last heard of {SILENT_S - 20:.0f} s ago" in message
    assert message.endswith(f"or choose another one; if you know that it is dead, remove {folder / LOCK_FILE}.")
    assert entries(folder) == [LOCK_FILE], "nothing of a refused run is left"
    leave(folder, **ELSEWHERE, silence_s=SILENT_S + 20)
    lock_folder(folder)
    assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("owner", "is_refused"),
    [
        ({}, False),  # a dead process
        ({"pid": os.getppid()}, True),
        ({"pid": os.getpid()}, False),  # that one had this process's number
        ({"numbers": "pid:[1]"}, True),  # numbers of another container mean nothing here
        (ELSEWHERE, True),
        ({**ELSEWHERE, "job": "restarted"}, False),
        ({"pid": "x"}, True),
    ],
    # Not by their values: both processes of pytest-xdist must collect the same names.
    ids=["dead", "parent", "own number", "container", "elsewhere", "restarted", "no number"],
)
def test_without_locks_the_owner_is_asked_for(owner, is_refused, folder, monkeypatch):
    without_locks(monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "restarted")
    leave(folder, **{"job": "none"} | owner)
    if is_refused:
        with pytest.raises(FileExistsError, match="in use by another run"):
            lock_folder(folder)
    else:
        lock_folder(folder)


def test_on_one_machine_the_lock_decides_for_all_its_containers(folder):
    leave(folder, host="container", numbers="pid:[1]", pid=1)
    lock_folder(folder)


@pytest.mark.parametrize("content", ["", "[[", "[1]", "{}"])
def test_a_file_without_an_owner_is_one_that_was_being_made(content, folder, monkeypatch):
    (folder / LOCK_FILE).write_text(content)
    lock_folder(folder)  # its maker has no lock, and is dead
    unlock_folder(folder)
    (folder / LOCK_FILE).write_text(content)
    without_locks(monkeypatch)
    with pytest.raises(FileExistsError, match="process unknown on an unknown host"):
        lock_folder(folder)


def test_the_owner_gives_signs_of_life_and_none_after_the_end(folder, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.005)
    lock_folder(folder)
    os.utime(folder / LOCK_FILE, (0, 0))
    deadline = time.monotonic() + 5
    while (folder / LOCK_FILE).stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert time.time() - (folder / LOCK_FILE).stat().st_mtime < 60
    unlock_folder(folder)
    assert not (folder / LOCK_FILE).exists()


@pytest.mark.parametrize("has_locks", [True, False])
def test_of_many_that_find_a_dead_run_at_once_one_gets_the_folder(has_locks, tmp_path, monkeypatch):
    if not has_locks:
        without_locks(monkeypatch)
    for round in range(1):
        folder = tmp_path / str(round)
        folder.mkdir()
        leave(folder)
        reader, writer = os.pipe()
        children = []
        for _ in range(6):
            children.append(os.fork())
            if children[-1] == 0:
                outcome = b"?"
                try:
                    lock_folder(folder)
                    outcome = b"0"
                except FileExistsError:
                    outcome = b"1"
                finally:
                    os.write(writer, outcome)
                    time.sleep(60)  # the lock must be held until all have tried
                    os._exit(1)
        outcomes = b"".join(os.read(reader, 1) for _ in children)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert sorted(outcomes) == list(b"011111")
        assert entries(folder) == [LOCK_FILE]


def test_a_claim_of_a_killed_process_stops_nobody_for_long(folder, monkeypatch):
    without_locks(monkeypatch)
    monkeypatch.setattr(folder_lock, "CLAIM_S", 0.02)
    leave(folder)
    (folder / f"{LOCK_FILE}-{(folder / LOCK_FILE).stat().st_ino}").touch()
    lock_folder(folder)
    assert entries(folder) == [LOCK_FILE]


def test_a_file_that_another_made_meanwhile_is_not_removed(folder):
    leave(folder)
    dead = os.open(folder / LOCK_FILE, os.O_RDONLY)
    (folder / LOCK_FILE).unlink()
    leave(folder, pid=3)
    folder_lock._remove_dead(dead, folder / LOCK_FILE)
    os.close(dead)
    assert entries(folder) == [LOCK_FILE]
