"""Started by test_metrics.py under torchrun: `evaluate` on fixed logits, one JSON file each, and the answers."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.data.collators import label_tensor
from fa_transformers.metrics import PROBLEM_METRICS
from fa_transformers.training.predictions import Predictions
from fa_transformers.training.scoring import evaluate

NUM_EXAMPLES, NUM_LABELS = 11, 3


class Echo(torch.nn.Module):
    """Gives back the logits that the batch holds."""

    def forward(self, logits, labels):
        return SequenceClassifierOutput(loss=logits.mean(), logits=logits)


class Data:
    def __init__(self, problem_type):
        self.problem_type = problem_type
        self.num_labels = 1 if problem_type == "regression" else NUM_LABELS
        self.label_names = None if problem_type == "regression" else ["ant", "bee", "cat"]


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    reports = {problem_type: report(problem_type, accelerator, Path(folder)) for problem_type in PROBLEM_METRICS}
    Path(folder, f"{accelerator.process_index}.json").write_text(json.dumps(reports))


def report(problem_type: str, accelerator: Accelerator, folder: Path) -> dict:
    random = np.random.default_rng(5)
    data = Data(problem_type)
    logits = random.normal(size=(NUM_EXAMPLES, data.num_labels))
    if problem_type == "single_label_classification":
        labels = random.integers(0, NUM_LABELS, NUM_EXAMPLES).tolist()
        references = labels
    elif problem_type == "regression":
        labels = references = random.normal(size=NUM_EXAMPLES).tolist()
    else:
        labels = [[0, 2] if index % 3 else [1] for index in range(NUM_EXAMPLES)]
        references = label_tensor(labels, problem_type, NUM_LABELS).int().tolist()

    def collate(indices):
        chosen = [labels[index] for index in indices]
        return {
            "logits": torch.tensor(logits[indices], dtype=torch.float32),
            "labels": label_tensor(chosen, problem_type, data.num_labels),
        }

    # Lengths that give batches of unequal size, a short last one among them.
    lengths = [1 + index % 4 for index in range(NUM_EXAMPLES)]
    sampler = LengthGroupedBatchSampler(
        lengths, 4, max_tokens=8, shuffle=False, num_processes=accelerator.num_processes
    )
    loader = accelerator.prepare(DataLoader(range(NUM_EXAMPLES), batch_sampler=sampler, collate_fn=collate))
    predictions = Predictions(data, loader, labels=labels)
    scores = evaluate(Echo(), loader, accelerator, data, predictions)
    if accelerator.is_main_process:
        predictions.write(folder / f"{problem_type}.csv")
    return {
        "scores": scores,
        "num_processes": accelerator.num_processes,
        "batches": len(loader),
        "logits": logits.tolist(),
        "references": references,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
