"""Protects files on disk: whole or absent whatever interrupts the writer; and charts and tables."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from fa_transformers.files import sha256_of, write_bytes, write_json, write_text, written_by_rename

OLD, NEW = b"old " * 1000, b"new " * 100_000


class Interrupted(BaseException):
    """Like KeyboardInterrupt, no Exception: what ends the writer may be anything."""


def interrupt(path: Path, error: type[BaseException]) -> None:
    with written_by_rename(path) as temporary:
        temporary.write_bytes(NEW[:1000])
        raise error


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_an_interrupted_write_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "results.bin"
    write_bytes(path, OLD)
    with pytest.raises(error):
        interrupt(path, error)
    assert path.read_bytes() == OLD
    assert names(tmp_path) == {"results.bin"}


def write_and_die(path: Path) -> None:
    with written_by_rename(path) as temporary:
        temporary.write_bytes(NEW[:1000])
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_the_old_file_whole_and_the_next_one_is_not_hindered(tmp_path):
    path = tmp_path / "results.bin"
    write_bytes(path, OLD)
    child = multiprocessing.get_context("fork").Process(target=write_and_die, args=(path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert path.read_bytes() == OLD
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """A file that another process may not grow beyond, as on a full disk."""

    def write() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            write_bytes(path, NEW)
        except OSError:
            os._exit(7)
        os._exit(0)

    path = tmp_path / "results.bin"
    write_bytes(path, OLD)
    child = multiprocessing.get_context("fork").Process(target=write)
    child.start()
    child.join()
    assert child.exitcode == 7
    assert path.read_bytes() == OLD
    assert names(tmp_path) == {"results.bin"}


def test_of_concurrent_writers_one_wins_and_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "results.bin"
    contents = [bytes([65 + number]) * 200_000 for number in range(4)]
    write_bytes(path, contents[0])
    seen: list[bytes] = []
    errors: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(10):
                write_bytes(path, content)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seen.append(path.read_bytes())
    assert not errors
    assert seen and set(seen) <= set(contents)
    assert path.read_bytes() in contents
    assert names(tmp_path) == {"results.bin"}


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError), written_by_rename(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_text_is_utf_8_json_is_readable_and_folders_are_made(tmp_path):
    write_text(tmp_path / "deep" / "er" / "a.txt", "Sätze\n")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "Sätze\n".encode()
    write_json(tmp_path / "b.json", {"ä": [1, 2.5, None]})
    text = (tmp_path / "b.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"ä": [1, 2.5, None]}
    assert "ä" in text and text.endswith("\n")
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"a": object()})
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == text


def test_a_new_file_may_be_read_by_whom_the_user_lets_read_files(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "renamed", "x")
    assert (tmp_path / "renamed").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_sha256_is_that_of_the_whole_content(tmp_path):
    write_bytes(tmp_path / "a", NEW)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(NEW).hexdigest()
