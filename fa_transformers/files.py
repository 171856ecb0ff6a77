"""Files that appear whole or not at all, and their checksums."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .redaction import redact


@contextmanager
def written_by_rename(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path beside `path` for the block to write a file to; it becomes `path` when the block ends.

    The file is flushed to disk before it is renamed, so that after a crash too `path` is the old file or the new one.
    When the block raises, the old file stays and nothing is left beside it. Each writer has a name of its own: of
    several writers of one path the last one wins. Parent folders are created.

    Raises:
        OSError: a folder or the file can't be written, or the block wrote none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path` by rename, as `written_by_rename` says."""
    with written_by_rename(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` in UTF-8 to `path` by rename, as `written_by_rename` says; tokens of the Hub are hidden in it."""
    with written_by_rename(path) as temporary:
        temporary.write_text(redact(text), encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as JSON, indented by two spaces, to `path` by rename, as `written_by_rename` says.

    Raises:
        TypeError: JSON has no form for a value of `content`.
        OSError: the file can't be written.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def flush_folder(folder: str | os.PathLike) -> None:
    """Flush to disk the names that a folder holds, so that what was renamed into it stays there after a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock an open file or folder until its descriptor is closed, in forked processes too, or the process ends.

    Returns:
        False where the system or the file system has no such locks (`flock`).

    Raises:
        BlockingIOError: another descriptor has the lock.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    return True


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits; the file is read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
