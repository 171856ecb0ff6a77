"""Protects published folders from kills: at every step the run's checkpoints stay, and the next call completes it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fa_transformers.files import sha256_of
from fa_transformers.hub.folder_lock import LOCK_FILE
from fa_transformers.hub.placing import PREFIX, check_name, placed_in, probe_placing

LAST, OWN = "self_test.json", {"README.md"}
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "tempfile.mkdtemp", "shutil.rmtree")
BEFORE = {"config.json": "1", "model.bin": "old", "1_Pooling/config.json": "old", "gone/deep/code.py": "old"}
AFTER = {"config.json": "2", "model.bin": "new", "1_Pooling/config.json": "new", "tokenizer/merges.txt": "new"}
FOREIGN = {"checkpoint-3/state.bin": "state", "notes.txt": "mine"}


def place(folder: Path, files: dict[str, str]) -> None:
    with placed_in(folder, LAST, OWN) as new:
        for name, content in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(content)
        checksums = {name: sha256_of(new / name) for name in files}
        (new / LAST).write_text(json.dumps({"files": checksums}))
        (new / "README.md").write_text("card")


def read(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in paths}
    return {name: content for name, content in files.items() if name not in (LAST, "README.md", LOCK_FILE)}


def is_complete(folder: Path) -> bool:
    if not (folder / LAST).is_file():
        return False
    files = json.loads((folder / LAST).read_text())["files"]
    assert all(sha256_of(folder / name) == checksum for name, checksum in files.items()), "a list that isn't true"
    return True


def in_a_child(action: Callable[[], None], kill_at: int) -> bool:
    """Run `action` in a process of its own, which is killed before its event of files number `kill_at`."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in EVENTS:
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        status = 1
        try:
            sys.addaudithook(watch)
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), "the child failed by itself"
    return status == signal.SIGKILL


def set_up(folder: Path, before: dict[str, str] | None) -> None:
    for name, content in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    if before is not None:
        place(folder, before)


@pytest.mark.parametrize(
    ("before", "stride"),
    [(BEFORE, 6), pytest.param(BEFORE, 1, marks=pytest.mark.slow), pytest.param(None, 1, marks=pytest.mark.slow)],
)
def test_a_kill_at_any_step_leaves_the_run_and_the_next_call_completes_it(before, stride, tmp_path):
    seen = set()
    for step in range(0, 1000, stride):
        folder = tmp_path / str(step)
        set_up(folder, before)
        was_killed = in_a_child(lambda folder=folder: place(folder, AFTER), step)
        files = read(folder)
        assert FOREIGN.items() <= files.items()
        if is_complete(folder):
            visible = {name: content for name, content in files.items() if not name.startswith(PREFIX)}
            seen.add("new" if visible == AFTER | FOREIGN else "old")
            assert visible in (AFTER | FOREIGN, (before or {}) | FOREIGN)
        else:
            seen.add("between")
        if not was_killed:
            break
        if step % 5 == 0:
            in_a_child(lambda folder=folder: place(folder, AFTER), step)  # killed again
        place(folder, AFTER)
        assert read(folder) == AFTER | FOREIGN and is_complete(folder)
        assert not (folder / "gone").exists() and not list(folder.glob(f"{PREFIX}*"))
    assert step > 30 and seen == {"old", "between", "new"} - ({"old"} if before is None else set())


def test_nothing_outside_the_folder_and_not_the_folder_itself_is_touched(tmp_path, monkeypatch):
    """So mount points, working directories and folders in unwritable parents are published to."""
    folder = tmp_path / "out"
    set_up(folder, BEFORE)
    touched, moved = [], []
    is_watching = True

    def watch(event: str, arguments: tuple) -> None:
        if is_watching and event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            touched.extend(value for value in arguments[:2] if isinstance(value, str | Path))

    sys.addaudithook(watch)
    inode = folder.stat().st_ino
    monkeypatch.chdir(folder)
    probe_placing(Path())
    place(Path(), AFTER)
    is_watching = False
    assert folder.stat().st_ino == inode and read(Path.cwd()) == AFTER | FOREIGN
    assert len(touched) > 10
    for path in touched:
        absolute = Path(path).absolute()
        # shutil.rmtree names entries relative to the folder that it has open.
        assert absolute == folder or absolute.is_relative_to(folder)
    assert not {".", str(folder)} & set(moved)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_a_mount_point_is_written_to(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this system mounts nothing")
    try:
        place(tmp_path, BEFORE)
        place(tmp_path, AFTER)
        assert read(tmp_path) == AFTER
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_block_that_fails_changes_nothing(tmp_path):
    set_up(tmp_path / "old", BEFORE)
    for folder in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(IsADirectoryError), placed_in(folder, LAST, OWN) as new:
            new.write_text("2")
    assert read(tmp_path / "old") == BEFORE | FOREIGN and is_complete(tmp_path / "old")
    assert not (tmp_path / "new").exists()


def test_two_processes_do_not_place_files_in_one_folder_at_once(tmp_path):
    with placed_in(tmp_path, LAST, OWN) as new:
        with pytest.raises(FileExistsError, match="another process is writing a model"):
            place(tmp_path, AFTER)
        (new / LAST).write_text('{"files": {}}')
    place(tmp_path, AFTER)


def test_what_stands_in_the_way_is_an_error_before_anything_moves(tmp_path):
    set_up(tmp_path / "a", BEFORE)
    (tmp_path / "a" / "tokenizer").write_text("mine")
    with pytest.raises(FileExistsError, match="tokenizer stands where a folder"):
        place(tmp_path / "a", AFTER)
    set_up(tmp_path / "b", BEFORE)
    (tmp_path / "b" / "added.txt").mkdir()
    with pytest.raises(FileExistsError, match=r"added\.txt is a folder"):
        place(tmp_path / "b", AFTER | {"added.txt": "x"})
    (tmp_path / "elsewhere").mkdir()
    set_up(tmp_path / "c", BEFORE)
    (tmp_path / "c" / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="tokenizer stands where a folder"):
        place(tmp_path / "c", AFTER)
    assert all(is_complete(tmp_path / name) for name in "abc") and not any((tmp_path / "elsewhere").iterdir())


def test_a_forged_list_of_files_removes_nothing_outside_the_folder(tmp_path):
    (tmp_path / "victim").write_text("x")
    folder = tmp_path / "model"
    (folder / "link").parent.mkdir()
    (folder / "link").symlink_to(tmp_path)
    names = ["../victim", str(tmp_path / "victim"), "link/victim", "..", ""]
    (folder / LAST).write_text(json.dumps({"files": dict.fromkeys(names, "0")}))
    place(folder, AFTER)
    assert (tmp_path / "victim").read_text() == "x"
    (folder / LAST).write_text("[[")
    place(folder, AFTER)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../../b", "a\\b", "a\0b"])
def test_a_name_outside_the_folder_is_an_error(name):
    with pytest.raises(ValueError, match="not the name of a file inside"):
        check_name(name)
