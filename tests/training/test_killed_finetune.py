"""Protects whole fine-tuning runs from kills in every phase: the same command then ends as if undisturbed."""

import json
import os
import subprocess
import sys

import pytest
from repository import HELPERS, ROOT


@pytest.mark.slow
def test_a_run_killed_in_any_phase_ends_complete_and_as_an_undisturbed_one():
    """21 kills, each followed by a run to the end whose files, weights among them, are equal bit for bit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HELPERS)])
    command = [sys.executable, HELPERS / "killed_finetune.py", "4"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    print(found)
    assert len(found["kills"]) == 6 and sum(found["kills"].values()) >= 20
