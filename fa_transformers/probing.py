"""How well frozen embeddings tell classes apart: what a converted model is worth downstream, beside its teacher."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .batching import LengthGroupedBatchSampler
from .card import DataFacts
from .data import license_documents
from .data.files import load_text_files
from .data.tables import DataError
from .distillation import pool
from .tasks import ImageExamples, TokenizedRows
from .unlabelled import LICENSE_FACTS, as_image_rows, find_images

FOLDS = 5


@dataclass(frozen=True)
class LabelledPieces:
    """A data set with one piece of each text or image, its class (int [pieces]) and the names of the classes.

    Where `groups` is given, pieces of one group are never divided between folds.

    Raises:
        DataError: there are fewer than two classes, or a class has fewer pieces than there are folds.
    """

    facts: DataFacts
    pieces: TokenizedRows | ImageExamples
    labels: np.ndarray
    label_names: list[str]
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.label_names) < 2:
            raise DataError(f"{self.facts.name} has one class, {self.label_names[0]!r}; a probe needs two or more")
        counts = np.bincount(self.labels, minlength=len(self.label_names))
        smallest = self.label_names[counts.argmin()]
        if counts.min() < FOLDS:
            raise DataError(
                f"{self.facts.name}: the class {smallest!r} has {counts.min()} pieces; a probe needs {FOLDS}, one for "
                "each fold"
            )

    @property
    def majority(self) -> float:
        """The share of the most frequent class."""
        return float(np.bincount(self.labels).max() / len(self.labels))


def load_labelled_text(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> LabelledPieces | None:
    """The first `--max_length` tokens of the documents of `--probe_file`, a table of texts and labels.

    Without one, and where the text to distil on is the packaged one, those of the licence documents' test split, whose
    families stay together; None where there is text of one's own.

    Raises:
        DataError: the file can't be used, or its labels are no classes.
    """
    groups = None
    if args.probe_file:
        columns = {"text_column": args.text_column_name, "label_column": args.label_column_name}
        loaded = load_text_files(args.probe_file, problem_type="single_label_classification", **columns)
        rows = datasets.concatenate_datasets(list(loaded.values()))
        facts = DataFacts(name=f"{args.probe_file.name} (probe)", license="unknown", attribution="not stated")
        classes = rows.features["label"].names
        names = [classes[label] for label in rows["label"][:]]
    elif args.train_file or args.dataset_name:
        return None
    else:
        rows, facts = license_documents.load_license_documents()["test"], LICENSE_FACTS
        names, groups = rows["label"][:], np.array(rows["family"][:])

    def cut(batch: dict[str, list]) -> dict[str, list]:
        tokens = tokenizer(batch["text"], truncation=True, max_length=args.max_length, verbose=False)["input_ids"]
        return {"input_ids": tokens, "length": [len(row) for row in tokens]}

    pieces = rows.select_columns("text").map(cut, batched=True, batch_size=64, remove_columns="text", desc="cutting")
    label_names, labels = np.unique(names, return_inverse=True)
    return LabelledPieces(facts, TokenizedRows(pieces), labels, label_names.tolist(), groups)


def load_labelled_images(
    folder: Path,
    processor: BaseImageProcessor,
    num_patches: int,
    classes: list[str] | None = None,
) -> LabelledPieces:
    """The images of a folder of one folder per class, or of those that `classes` names.

    Raises:
        DataError: it has fewer than two such folders, or one of them has no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; a probe needs one with a folder of images for each class")
    names = sorted(classes or [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."])
    if len(names) < 2:
        raise DataError(f"{folder} has {len(names)} class folders; a probe needs two or more")
    found = [(path, index) for index, name in enumerate(names) for path in find_images(folder / name)]
    pieces = ImageExamples(as_image_rows([path for path, _ in found]), processor, num_patches)
    facts = DataFacts(name=f"{folder.resolve().name} (probe)", license="unknown", attribution="not stated")
    return LabelledPieces(facts, pieces, np.array([index for _, index in found]), names)


@torch.inference_mode()
def embed_pieces(
    model: PreTrainedModel,
    pieces: TokenizedRows | ImageExamples,
    collate: Callable,
    batch_size: int,
    pooling: str,
    max_tokens: int | None = None,
) -> Tensor:
    """The embedding of each piece, in their order; every process computes all: float32 [pieces, C].

    `batch_size` pieces at a time, of at most `max_tokens` tokens or patches together, padding included.
    """
    was_training = model.training
    model.eval()
    sampler = LengthGroupedBatchSampler(pieces.lengths, batch_size, max_tokens=max_tokens, shuffle=False)
    order: list[int] = []
    rows: list[Tensor] = []
    for indices in tqdm(sampler.batches(0), desc="probe", unit="batch"):
        batch = send_to_device(collate([pieces[index] for index in indices]), model.device)
        hidden_states = model.base_model(**batch).last_hidden_state
        rows.append(pool(hidden_states, batch.get("attention_mask"), pooling).float().cpu())
        order += indices
    model.train(was_training)
    return torch.cat(rows)[np.argsort(order)]


def probe(embeddings: Tensor, labelled: LabelledPieces, seed: int) -> float:
    """Accuracy of logistic regression on normalised, standardised embeddings [pieces, C].

    Each piece is predicted by the one of five folds that did not see it; `seed` draws the folds.
    """
    make = StratifiedKFold if labelled.groups is None else StratifiedGroupKFold
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    predictions = cross_val_predict(
        classifier,
        F.normalize(embeddings, dim=1).numpy(),
        labelled.labels,
        groups=labelled.groups,
        cv=make(FOLDS, shuffle=True, random_state=seed),
    )
    return float((predictions == labelled.labels).mean())
