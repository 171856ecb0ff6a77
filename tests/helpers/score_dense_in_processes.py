"""Started by test_dense.py under torchrun or in its process: `evaluate_dense` over pictures shared by the processes."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from coco_sets import NAMES

from fa_transformers.data.dense_examples import DenseCollator, DenseExamples
from fa_transformers.data.readers.coco import load_coco_folder
from fa_transformers.options import LoopOptions, resolve
from fa_transformers.training.dense import build_network
from fa_transformers.training.dense_recipe import DenseModelOptions, recipe_of
from fa_transformers.training.dense_scores import evaluate_dense
from fa_transformers.training.loaders import build_loaders

TINY = dict(hidden_sizes=(8, 16, 16, 24), embedding_size=8, pyramid_channels=16, mask_channels=8, num_queries=10)


def score(folder: Path) -> tuple[dict, int]:
    """The scores of a model with drawn weights on the pictures of a COCO folder, and the process's rank."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    recipe = recipe_of(None, is_pretrained=False)
    model, processor = build_network("instance-segmentation", resolve(DenseModelOptions(**TINY), recipe), list(NAMES))
    images = load_coco_folder(folder).splits["train"]
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of an earlier call
    accelerator = Accelerator(cpu=True)
    parts = {"train": DenseExamples(images), "test": DenseExamples(images)}
    loop = resolve(LoopOptions(packing=False, per_device_eval_batch_size=2), recipe)
    loaders, _ = build_loaders(loop, parts, DenseCollator(processor, with_masks=True), accelerator)
    model = accelerator.prepare(model)
    scores = evaluate_dense(model, processor, loaders["test"], images, NAMES, accelerator)
    return scores, accelerator.process_index


if __name__ == "__main__":
    scores, rank = score(Path(sys.argv[1]))
    Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(scores))
