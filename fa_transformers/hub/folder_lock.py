"""One run at a time in an output folder: a lock that ends with the process, however that ends, on any file system.

The folder's file `.in-use` is locked and names its owner. Locks of a machine hold in all its containers; whether they
reach other machines that share the folder, or exist at all, is up to its file system. So the owner also touches the
file every half minute, and where a lock says nothing, the age of that sign of life decides.
"""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import lock

LOCK_FILE = ".in-use"
BEAT_S = 30.0
SILENT_S = 300.0
"""Seconds without a sign of life after which an owner that can't be asked counts as dead."""

CLAIM_S = 5.0
"""Seconds that removing a dead owner's file may take at most."""


@dataclass(frozen=True)
class _Held:
    descriptor: int
    ended: threading.Event


_held: dict[Path, _Held] = {}


def lock_folder(folder: Path, named: str | None = None) -> None:
    """Lock a folder until `unlock_folder`, or until the process ends, however that ends.

    Forked workers don't keep it. A folder that this process has locked already stays locked. What a dead owner left is
    taken over: one of this machine at once, one of another machine when it has been silent for `SILENT_S`, or at once
    where torchrun restarted the same run there.

    Args:
        named: what an error calls the folder, such as the flag that was typed for it; None is its path.

    Raises:
        FileExistsError: another process has it locked; the message names its host, its number and its age.
    """
    named, folder = named or str(folder), folder.resolve()
    if folder in _held:
        return
    while (descriptor := _take(folder / LOCK_FILE, named)) is None:
        pass
    ended = threading.Event()
    threading.Thread(target=_beat, args=(descriptor, ended), daemon=True, name=f"lock of {folder}").start()
    _held[folder] = _Held(descriptor, ended)


def unlock_folder(folder: Path) -> None:
    """Give up the lock of `folder`, if this process has it."""
    held = _held.pop(folder.resolve(), None)
    if held is None:
        return
    held.ended.set()
    path = folder / LOCK_FILE
    if _is_same(held.descriptor, path):
        path.unlink(missing_ok=True)
    os.close(held.descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for the block, and beyond it where this process had it locked before.

    Raises:
        FileExistsError: as in `lock_folder`.
    """
    was_locked = folder.resolve() in _held
    lock_folder(folder)
    try:
        yield
    finally:
        if not was_locked:
            unlock_folder(folder)


@contextmanager
def released(folder: Path) -> Iterator[None]:
    """Give up the lock of `folder` when the block ends, however it ends."""
    try:
        yield
    finally:
        unlock_folder(folder)


def _take(path: Path, named: str) -> int | None:
    """The descriptor of the file, which is this process's now; None where it changed meanwhile."""
    try:
        descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        try:
            descriptor, is_new = os.open(path, os.O_RDWR), False
        except FileNotFoundError:
            return None
    is_ours = False
    try:
        try:
            has_locks = lock(descriptor)
        except BlockingIOError as error:
            raise _in_use(path, named) from error
        if not _is_same(descriptor, path):
            return None  # who had it before has removed the file
        if not is_new:
            if not _is_dead(path, has_locks):
                raise _in_use(path, named, f"; if you know that it is dead, remove {path}")
            if not has_locks:
                _remove_dead(descriptor, path)
                return None
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(_describe_self()).encode())
        is_ours = True
        return descriptor
    finally:
        if not is_ours:
            os.close(descriptor)


def _remove_dead(descriptor: int, path: Path) -> None:
    """Remove a dead owner's file, which several may find at once: not the one that the first of them makes anew."""
    claim = path.with_name(f"{LOCK_FILE}-{os.fstat(descriptor).st_ino}")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(CLAIM_S / 100)
        if _silence_s(claim) > CLAIM_S:  # whoever made it was killed
            claim.unlink(missing_ok=True)
        return
    try:
        if _is_same(descriptor, path):
            path.unlink()
    finally:
        claim.unlink(missing_ok=True)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _describe_self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time(),
        # Containers of a machine have hosts and numbers of their own, and share this.
        "machine": _first_line("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "numbers": os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else "",
        "job": os.environ.get("TORCHELASTIC_RUN_ID", "none"),
    }


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _read_owner(path: Path) -> dict[str, Any]:
    """Whose the file is; empty where its maker has not come to write it."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(path: Path, has_locks: bool) -> bool:
    """Whether the owner of a file that isn't locked has ended; `has_locks` where this machine could have seen one."""
    owner, here = _read_owner(path), _describe_self()
    if here["job"] != "none" and owner.get("job") == here["job"]:
        return True  # torchrun ends all processes of a run before it starts them anew, elsewhere perhaps
    if has_locks and owner.get("machine", here["machine"]) == here["machine"]:
        return True
    number = owner.get("pid")
    if isinstance(number, int) and all(owner.get(name) == here[name] for name in ("machine", "numbers")):
        return number == here["pid"] or not _is_running(number)
    return _silence_s(path) > SILENT_S


def _is_running(number: int) -> bool:
    if os.name != "posix":
        return True  # there a signal of 0 is no question
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _silence_s(path: Path) -> float:
    """Seconds since the file was touched, by the clock that stamps files there."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        try:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0


def _in_use(path: Path, named: str, remedy: str = "") -> FileExistsError:
    owner = _read_owner(path)
    who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
    started = owner.get("started")
    age = f", started {(time.time() - started) / 60:.0f} minutes ago" if isinstance(started, int | float) else ""
    silence = f", last heard of {max(0.0, _silence_s(path)):.0f} s ago"
    return FileExistsError(
        f"{named} is in use by another run ({who}{age}{silence}). Wait for it to end, or choose another one{remedy}."
    )


def _close_in_child() -> None:
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    # A worker that outlives its run must not keep the next one out.
    os.register_at_fork(after_in_child=_close_in_child)
