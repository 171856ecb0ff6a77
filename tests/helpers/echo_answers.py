"""Answers of a model that gives back the logits in its batch, so that tests decide what was predicted."""

from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.data.facts import DataFacts
from fa_transformers.data.labelled import LabelledData
from fa_transformers.training.predictions import Predictions
from fa_transformers.training.scoring import evaluate, predict


class Echo(torch.nn.Module):
    """Gives back the logits that the batch holds."""

    def forward(self, logits, labels=None):
        return SequenceClassifierOutput(loss=None if labels is None else logits.mean(), logits=logits)


def make_data(problem_type: str, names: list[str]) -> LabelledData:
    facts = DataFacts(name="d", license="l", attribution="a")
    known = None if problem_type == "regression" else names
    return LabelledData(datasets.DatasetDict(), problem_type, known, facts, is_demo=False)


def make_loader(
    accelerator: Accelerator, logits: np.ndarray, labels: np.ndarray | None = None, lengths: list[int] | None = None
) -> DataLoader:
    """A loader whose batches are of unequal size and not in the order of the examples."""
    lengths = lengths or [1 + (7 * index) % 5 for index in range(len(logits))]
    sampler = LengthGroupedBatchSampler(lengths, 4, max_tokens=2 * max(lengths), shuffle=False)

    def collate(indices: list[int]) -> dict:
        batch = {"logits": torch.tensor(logits[indices], dtype=torch.float32)}
        return batch if labels is None else batch | {"labels": torch.tensor(labels[indices])}

    return accelerator.prepare(DataLoader(range(len(logits)), batch_sampler=sampler, collate_fn=collate))


def answer(
    problem_type: str,
    logits: np.ndarray,
    names: list[str],
    given: np.ndarray | None = None,
    lengths: list[int] | None = None,
    **known,
) -> tuple[Predictions, dict]:
    """The answers to examples with these logits, and their scores where `given` has the labels."""
    accelerator, data = Accelerator(cpu=True), make_data(problem_type, names)
    loader = make_loader(accelerator, logits, given, lengths)
    predictions = Predictions(data, loader, **known)
    if given is None:
        predict(Echo(), loader, accelerator, predictions)
        return predictions, {}
    return predictions, evaluate(Echo(), loader, accelerator, data, predictions)


def write_answers(*arguments, path: Path = Path("answers.csv"), **known) -> Path:
    """Write the table of `answer`."""
    answer(*arguments, **known)[0].write(path)
    return path
