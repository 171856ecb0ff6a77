"""Files that take their places in a folder one by one, a last one of which says that all are there.

The folder itself is never renamed: it may be a mount point, the working directory, or lie where nothing else can be
written. The new files are written to a folder inside it, `.publishing-…`, and moved from there.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..files import flush_folder, lock
from .folder_lock import LOCK_FILE, locked

PREFIX = ".publishing-"
NEW, PREVIOUS = "new", "previous.json"


@contextmanager
def placed_in(folder: Path, last: str, own: set[str]) -> Iterator[Path]:
    """Yield a new folder to write files to; when the block ends they replace those that were placed in `folder` before.

    A block that fails leaves `folder` as it was. A process that is killed leaves either the old files, or some of the
    new ones without `last`, or all. The next call removes what it left. Other files of `folder` stay.

    Args:
        folder: is created where it is missing.
        last: path of the file that is moved last, JSON whose "files" has the names of the others as keys.
        own: names of the files that `last` doesn't name.

    Raises:
        FileExistsError: a folder stands where a file belongs or the other way round; or another process trains or
            places files there.
        OSError: the folder cannot be written.
    """
    is_new = not folder.exists()
    if is_new:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder), _lock(folder):
            leftovers = sorted(folder.glob(f"{PREFIX}*"))
            scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
            try:
                new = scratch / NEW
                new.mkdir()
                yield new
                obsolete = _find_obsolete(folder, new, leftovers, last, own)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
            # What stops it leaves the lists of files there for the next call.
            _move_all(folder, scratch, obsolete, last)
            for path in (*leftovers, scratch):
                shutil.rmtree(path, ignore_errors=True)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def probe_placing(folder: Path) -> None:
    """Do in `folder` all that `placed_in` needs: make a folder there, and move a file out of it over another.

    Raises:
        OSError: it can't be done.
    """
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    probe = folder / f"{scratch.name}.probe"
    try:
        for _ in range(2):
            (scratch / "probe").write_bytes(b"x")
            _move(scratch / "probe", probe)
    finally:
        probe.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)


def holds_only_leftovers(folder: Path) -> bool:
    """Return True where `folder` has no entries but those of a process that was killed before it had moved any."""
    return all(entry.name.startswith((PREFIX, LOCK_FILE)) for entry in folder.iterdir())


def check_name(name: str) -> None:
    """Check that a name is a path inside a folder, with "/" between its parts.

    Raises:
        ValueError: it isn't.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file inside the folder")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep another thread of the process that has the folder locked from placing files there at the same time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(descriptor)
        except BlockingIOError as error:
            raise FileExistsError(f"another process is writing a model to {folder}; wait for it to end") from error
        yield
    finally:
        os.close(descriptor)


def _list_files(new: Path) -> list[str]:
    return [path.relative_to(new).as_posix() for path in sorted(new.rglob("*")) if path.is_file()]


def _find_obsolete(folder: Path, new: Path, leftovers: list[Path], last: str, own: set[str]) -> list[Path]:
    """Files that were placed in `folder` before, wholly or in part, and have no successor."""
    names = _list_files(new)
    for name in names:
        with open(new / name, "rb") as file:
            os.fsync(file.fileno())
    lists = [folder / last, *(path / PREVIOUS for path in leftovers), *(path / NEW / last for path in leftovers)]
    before = set().union(*map(_names_in, lists)) | own
    paths = [folder / name for name in sorted(before - {*names, last})]
    # A missing one too: it may have left an empty folder.
    obsolete = [path for path in paths if path.parent.resolve().is_relative_to(folder.resolve())]
    _check_free(folder, names, {*obsolete})
    return obsolete


def _move_all(folder: Path, scratch: Path, obsolete: list[Path], last: str) -> None:
    new = scratch / NEW
    if (folder / last).is_file():
        _move(folder / last, scratch / PREVIOUS)
    for path in obsolete:
        if path.is_file() or path.is_symlink():
            path.unlink()
        _remove_empty(path.parent, folder)
    for name in [name for name in _list_files(new) if name != last]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _move(new / name, folder / name)
    flush_folder(folder)
    _move(new / last, folder / last)
    flush_folder(folder)


def _move(source: Path, target: Path) -> None:
    """Move one file; the only way in which anything appears in the folder."""
    source.replace(target)


def _names_in(path: Path) -> set[str]:
    """The safe names that a list of files has; none where it is missing or damaged."""
    try:
        names = list(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return set()
    safe = set()
    for name in names:
        try:
            check_name(name)
        except (ValueError, TypeError):
            continue
        safe.add(name)
    return safe


def _check_free(folder: Path, names: list[str], removed: set[Path]) -> None:
    for name in names:
        target = folder / name
        if target.is_dir() and not target.is_symlink():
            standing_files = {path for path in target.rglob("*") if not path.is_dir()}
            if not standing_files <= removed or not any(path.is_relative_to(target) for path in removed):
                raise FileExistsError(f"{target} is a folder, where a file is to be; move it away")
        for parent in list(target.relative_to(folder).parents)[:-1]:
            standing = folder / parent
            is_foreign = standing.exists() and not standing.is_dir() and standing not in removed
            if is_foreign or not standing.resolve().is_relative_to(folder.resolve()):
                raise FileExistsError(f"{standing} stands where a folder of the model is to be; move it away")


def _remove_empty(path: Path, stop: Path) -> None:
    while path != stop and not path.is_symlink():
        if path.is_dir():
            if any(path.iterdir()):
                return
            path.rmdir()
        path = path.parent
