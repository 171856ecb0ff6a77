"""One run at a time in an output folder: a lock that ends with the process, however that ends."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import lock

logger = logging.getLogger(__name__)

_held: dict[Path, int] = {}  # folder -> descriptor of its locked file
_created: dict[Path, bool] = {}  # folder -> whether that file was not there before


class FolderInUse(RuntimeError):
    """Another run writes to the output folder."""


def lock_folder(folder: Path, name: str) -> None:
    """Lock `folder` by its file `name`, which is created where it is missing, until `released` or the process ends.

    Forked workers don't keep it. A folder that this process has locked already stays locked.

    Raises:
        FolderInUse: another process has it locked.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    path = folder / name
    while True:
        is_new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            is_locked = lock(descriptor)
        except BlockingIOError as error:
            os.close(descriptor)
            raise FolderInUse(
                f"--output_dir {folder} is in use by another run{_describe_owner(path)}. Wait for it to end, or choose "
                "another folder."
            ) from error
        if _is_same(descriptor, path):
            break
        os.close(descriptor)  # who had it before has removed the file
    if not is_locked:
        logger.warning("%s can't be locked on its file system: see that no other run writes there", folder)
    _held[folder] = descriptor
    _created[folder] = is_new


def unlock_folder(folder: Path, name: str | None = None) -> None:
    """Give up the lock of `folder`, if this process has it; `name` removes its file where `lock_folder` made it."""
    folder = folder.resolve()
    descriptor = _held.pop(folder, None)
    if descriptor is None:
        return
    if _created.pop(folder, False) and name is not None:
        (folder / name).unlink(missing_ok=True)
    os.close(descriptor)


@contextmanager
def released(folder: Path) -> Iterator[None]:
    """Give up the lock of `folder` when the block ends, however it ends."""
    try:
        yield
    finally:
        unlock_folder(folder)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _describe_owner(path: Path) -> str:
    """The launcher's host and process number, as the folder's file says, and the age of the lock."""
    try:
        host, _, number = path.read_text(encoding="utf-8").partition(" ")
        minutes = (time.time() - path.stat().st_mtime) / 60
    except (OSError, ValueError):
        return ""
    return f" (started {minutes:.0f} minutes ago on {host} by process {number})" if number else ""


def _close_in_child() -> None:
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()
    _created.clear()


if hasattr(os, "register_at_fork"):
    # A worker that outlives its run must not keep the next one out.
    os.register_at_fork(after_in_child=_close_in_child)
