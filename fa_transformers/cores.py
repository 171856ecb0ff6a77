"""The CPU cores and threads that this process may use: its affinity, its container's quota, and OMP_NUM_THREADS."""

import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .tables import counted

THREADS_VARIABLE = "OMP_NUM_THREADS"
# Set by `accelerate launch` and torchrun, which also set the number of threads where nobody did.
_LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_ROOT = Path("/")


@dataclass(frozen=True)
class Threads:
    """A number of CPU threads, and what it is from, in words for a message."""

    count: int
    origin: str

    def __str__(self) -> str:
        return f"{counted(self.count, 'thread')} ({self.origin})"


def choose_threads(num_threads: int = 0, num_processes: int = 1, flag: str = "--num_threads") -> Threads:
    """Return the CPU threads that each process computes with.

    The first of: `num_threads`, where it isn't 0; OMP_NUM_THREADS, where the user set it and not a launcher; the usable
    cores (see `count_cores`), shared by `num_processes` processes of this machine.

    Args:
        num_threads: the value of `flag`.
        num_processes: processes of the run on this machine.
    """
    if num_threads:
        return Threads(num_threads, f"from {flag}")
    exported = exported_threads()
    if exported:
        return Threads(exported, f"from {THREADS_VARIABLE}")
    quota, cores = cpu_quota(), _scheduled_cores()
    origin = "the container's CPU quota" if quota is not None and quota < cores else "the usable cores"
    if num_processes > 1:
        origin += f" shared by {num_processes} processes"
    return Threads(max(1, count_cores() // num_processes), origin)


def count_cores() -> int:
    """Return the CPU cores that this process may use: those of its affinity, or of its container's quota, if fewer.

    A quota of 1.5 cores counts as 2, and there is always one.
    """
    quota = cpu_quota()
    return _scheduled_cores() if quota is None else max(1, min(_scheduled_cores(), math.ceil(quota)))


def _scheduled_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path | None = None) -> float | None:
    """Return the cores' worth of time that control groups grant this process, the least of all levels; None: no limit.

    Reads `cpu.max` (version 2) or `cpu.cfs_quota_us` and `cpu.cfs_period_us` (version 1), which are in microseconds.

    Args:
        root: of the file system, for tests.
    """
    root = _ROOT if root is None else root
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    quotas = [quota for line in groups for folder in _levels(root, line) if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


def _levels(root: Path, line: str) -> Iterator[Path]:
    """Yield the folders of a line "number:controllers:/path" of /proc/self/cgroup, from the group's own to the mount's.

    In a container the path may be the host's, while the mount shows the container's own group.
    """
    _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
    mounts = {"": ("", "unified")}.get(controllers, (controllers, "cpu") if "cpu" in controllers.split(",") else ())
    group = PurePosixPath("/" + path.lstrip("/"))
    for mount in mounts:
        for level in (group, *group.parents):
            yield root / "sys/fs/cgroup" / mount / str(level).lstrip("/")


def _read_quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max", as no limit is written, is no number
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for no limit


def exported_threads() -> int | None:
    """Return OMP_NUM_THREADS as the user set it, or None.

    `accelerate launch` and torchrun set it to 1, or to another number, where nobody did, which must not leave a machine
    idle: under them it counts where the launcher itself, this process's parent, was started with it.
    """
    value = _read_threads(os.environ)
    if value is None or not any(name in os.environ for name in _LAUNCHER_VARIABLES):
        return value
    return value if _read_threads(_parent_environment()) is not None else None


def _read_threads(environment: Mapping[str, str]) -> int | None:
    """Return the number, of a list for nested regions the first one; None where it is none."""
    first = environment.get(THREADS_VARIABLE, "").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdecimal() and int(first) > 0 else None


def _parent_environment() -> dict[str, str]:
    """Return what the parent process was started with of that one variable; nothing where it can't be read."""
    if sys.platform != "linux":
        return {}
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    variables = (entry.decode("ascii", "replace").partition("=") for entry in entries)
    return {name: value for name, _, value in variables if name == THREADS_VARIABLE}
