"""Threads and cores come from the flag, from OMP_NUM_THREADS, from the container's quota or from the affinity."""

import os
from pathlib import Path

import pytest

from fa_transformers import cores
from fa_transformers.cores import choose_threads, count_cores, cpu_quota

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.fixture(autouse=True)
def eight_cores(tmp_path, monkeypatch):
    """Eight cores, no quota, no variable and no launcher, whatever the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_ROOT", tmp_path)
    for name in ("OMP_NUM_THREADS", *cores._LAUNCHER_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def write_group(root: Path, groups: str, files: dict[str, str]) -> None:
    for path, text in {"proc/self/cgroup": groups, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def version_1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


LINES_1 = "12:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/\n"
QUOTAS = {
    "version 2, the container's own group": ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, no limit": ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "version 2, a level above": (
        "0::/user.slice/job\n",
        {"sys/fs/cgroup/user.slice/job/cpu.max": "max 100000", "sys/fs/cgroup/user.slice/cpu.max": "300000 100000"},
        3.0,
    ),
    "version 2, the least of all levels": (
        "0::/a/b\n",
        {"sys/fs/cgroup/a/b/cpu.max": "50000 200000", "sys/fs/cgroup/a/cpu.max": "300000 100000"},
        0.25,
    ),
    "version 1": (LINES_1, version_1("sys/fs/cgroup/cpu,cpuacct/docker/a", 250_000), 2.5),
    "version 1, the host's path": (LINES_1, version_1("sys/fs/cgroup/cpu", 400_000), 4.0),
    "version 1, no limit": (LINES_1, version_1("sys/fs/cgroup/cpu", -1), None),
    "version 1, of memory alone": ("12:memory:/a\n", version_1("sys/fs/cgroup/cpu/a", 100_000), None),
    "what isn't a quota": ("0::/\nrubbish\n", {"sys/fs/cgroup/cpu.max": "many\n"}, None),
    "no period": ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
}


@pytest.mark.parametrize(("groups", "files", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_the_quota_of_either_version_of_control_groups_is_read(groups, files, expected, tmp_path):
    write_group(tmp_path, groups, files)
    assert cpu_quota() == expected
    assert count_cores() == (8 if expected is None else -(-expected // 1))


def test_cores_are_those_of_the_affinity_or_the_machine_where_nothing_limits_them(monkeypatch):
    assert cpu_quota() is None and count_cores() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores() == 1


def test_the_flag_comes_before_the_variable_and_that_before_quota_and_affinity(tmp_path, monkeypatch):
    assert str(choose_threads()) == "8 threads (the usable cores)"
    assert str(choose_threads(num_processes=3)) == "2 threads (the usable cores shared by 3 processes)"
    assert str(choose_threads(num_processes=20)) == "1 thread (the usable cores shared by 20 processes)"
    write_group(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "210000 100000"})
    assert str(choose_threads()) == "3 threads (the container's CPU quota)"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert str(choose_threads(num_processes=2)) == "1 thread (from OMP_NUM_THREADS)"
    assert str(choose_threads(5)) == "5 threads (from --num_threads)"


@pytest.mark.parametrize("value", ["", "0", "-2", "many", "²"])
def test_a_variable_that_is_no_number_of_threads_is_passed_over(value, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert choose_threads().count == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")  # of nested regions, the outer one
    assert choose_threads().count == 3


@pytest.mark.parametrize("launcher", [LAUNCHED, {"TORCHELASTIC_RUN_ID": "none"}], ids=["accelerate", "torchrun"])
def test_what_a_launcher_sets_by_itself_leaves_no_core_idle(launcher, monkeypatch):
    """Both set the variable to 1 where nobody did; a user's own is in the environment of the launcher too."""
    for name, value in {**launcher, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    for parents, expected in (({}, 8), ({"OMP_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": ""}, 8)):
        monkeypatch.setattr(cores, "_parent_environment", lambda parents=parents: parents)
        assert choose_threads().count == expected


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="Linux tells a parent's environment")
def test_of_the_parents_environment_nothing_but_the_variable_is_kept(monkeypatch):
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert cores._parent_environment().keys() <= {"OMP_NUM_THREADS"}
