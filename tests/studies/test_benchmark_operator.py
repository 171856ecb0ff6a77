"""Protects the operator benchmark: it runs where there is no GPU, says so, and its files hold what it printed last."""

import json
import runpy

import pytest
import torch
from repository import SCRIPTS

SCRIPT = SCRIPTS / "studies" / "benchmark_operator.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this is the measurement itself, minutes long")
def test_the_benchmark_runs_without_a_gpu_and_says_that_no_kernel_was_measured(tmp_path, capsys):
    sizes = ["--lengths", "16", "32", "--model_lengths", "16", "--total", "32", "--layers", "1", "--seconds", "0"]
    runpy.run_path(str(SCRIPT))["main"](["--output_dir", str(tmp_path), *sizes])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "operator.json").read_text()) == printed
    assert "neither the Triton kernels nor flash attention ran" in (tmp_path / "operator.md").read_text()
    assert (tmp_path / "operator.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["implementation"], row["batch"], row["length"]) for row in printed["operator"]] == [
        ("unfused", 2, 16),
        ("factorized", 2, 16),
        ("unfused", 1, 32),
        ("factorized", 1, 32),
    ]
    assert all(row["training_floor_share"] > 0 for row in printed["operator"])
    assert printed["model"][0]["training_tokens_per_second"] > 0
