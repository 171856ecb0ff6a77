"""Started by test_finetune_stereo.py under torchrun or in its process: scores of pairs that the processes share."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from stereo_sets import SMALL

from fa_transformers.data.readers.stereo_folders import find_stereo_pairs
from fa_transformers.data.stereo_examples import FolderSamples, StereoCollator, StereoExamples
from fa_transformers.models import FAStereoConfig, FAStereoForDepthEstimation, FAStereoImageProcessor
from fa_transformers.options import LoopOptions, resolve
from fa_transformers.training.loaders import build_loaders
from fa_transformers.training.stereo import evaluate_stereo
from fa_transformers.training.stereo_recipe import recipe_of


def score(folder: Path, batch_size: int = 2) -> tuple[dict, int]:
    """The scores of a network with drawn weights on the pairs of a folder, and the process's rank."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    recipe = recipe_of(is_demo=False, is_pretrained=False)
    model = FAStereoForDepthEstimation(FAStereoConfig(**SMALL))
    samples = FolderSamples(find_stereo_pairs(folder))
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of an earlier call
    accelerator = Accelerator(cpu=True)
    parts = {"train": StereoExamples(samples), "test": StereoExamples(samples)}
    loop = resolve(LoopOptions(packing=False, per_device_eval_batch_size=batch_size), recipe)
    loaders, _ = build_loaders(loop, parts, StereoCollator(FAStereoImageProcessor()), accelerator)
    scores = evaluate_stereo(accelerator.prepare(model), loaders["test"], accelerator)
    return scores, accelerator.process_index


if __name__ == "__main__":
    scores, rank = score(Path(sys.argv[1]))
    Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(scores))
