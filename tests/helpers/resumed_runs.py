"""Check that a run which goes on from a checkpoint ends as the run that was not stopped."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fa_transformers import FinetuneResult


def check_resume(train: Callable[..., FinetuneResult], folder: Path) -> None:
    """Check that `train(output_dir, **loop)`, of four steps, goes on from its second one with the same weights."""
    whole = train(folder / "whole", load_best_model_at_end=False)
    shutil.copytree(folder / "whole" / "checkpoint-2", folder / "part" / "checkpoint-2")
    part = train(folder / "part", load_best_model_at_end=False, resume_from_checkpoint="last")
    assert part.summary["steps"] == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(part.model.state_dict()[name], value), name
