"""How well frozen embeddings tell classes apart: what a converted model is worth downstream, beside its teacher."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..data.batching import grouped_batches
from ..data.examples import ImageExamples, TokenizedRows
from ..data.facts import DataFacts
from ..data.readers.files import load_text_files
from ..data.readers.images import find_class_images
from ..data.readers.tables import DataError, ReadingOptions, listing
from ..data.sets import license_documents
from ..data.tokenizing import tokenize_documents
from .objectives import pool
from .pieces import LICENSE_FACTS, as_image_rows

FOLDS = 5
DRAWS = 10


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
        options = ReadingOptions(
            text_column=args.text_column_name,
            label_column=args.label_column_name,
            problem_type="single_label_classification",
        )
        loaded = load_text_files(args.probe_file, options=options)
        rows = datasets.concatenate_datasets(list(loaded.values()))
        facts = _unstated_facts(args.probe_file.name)
        names = np.array(rows.features["label"].names)[rows["label"][:]]
    elif args.train_file or args.dataset_name:
        return None
    else:
        rows, facts = license_documents.load_license_documents()["test"], LICENSE_FACTS
        names, groups = rows["label"][:], np.array(rows["family"][:])
    tokenized = tokenize_documents(datasets.DatasetDict({"probe": rows}), tokenizer, args.max_length)["probe"]
    pieces = TokenizedRows(tokenized.select_columns(["input_ids", "length"]))
    label_names, labels = np.unique(names, return_inverse=True)
    return LabelledPieces(facts, pieces, labels, label_names.tolist(), groups)


def load_labelled_images(
    folder: Path, processor: BaseImageProcessor, num_patches: int, classes: list[str] | None = None
) -> LabelledPieces:
    """The images of a folder of one folder per class, or of those that `classes` names.

    Raises:
        DataError: it has fewer than two such folders, or one of them has no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; a probe needs one with a folder of images for each class")
    found = find_class_images(folder)
    names = sorted(classes or found)
    if unknown := sorted(set(names) - set(found)):
        raise DataError(f"{folder} has no class folder {unknown[0]!r}, only {listing(sorted(found))}")
    if len(names) < 2:
        raise DataError(f"{folder} has {len(names)} class folders; a probe needs two or more")
    paths = [path for name in names for path in found[name]]
    labels = np.repeat(np.arange(len(names)), [len(found[name]) for name in names])
    pieces = ImageExamples(as_image_rows(paths), processor, num_patches)
    return LabelledPieces(_unstated_facts(folder.resolve().name), pieces, labels, names)


def _unstated_facts(name: str) -> DataFacts:
    """The flags on data speak of what is distilled on, not of what is probed with."""
    return DataFacts(name=f"{name} (probe)", license="unknown", attribution="not stated")


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
    order: list[int] = []
    rows: list[Tensor] = []
    with tqdm(total=len(pieces), desc="probe", unit="piece") as bar:
        for indices, batch in grouped_batches(pieces, collate, batch_size, max_tokens, model.device):
            hidden_states = model.base_model(**batch).last_hidden_state
            rows.append(pool(hidden_states, batch.get("attention_mask"), pooling).float().cpu())
            order += indices
            bar.update(len(indices))
    model.train(was_training)
    return torch.cat(rows)[np.argsort(order)]


def probe(embeddings: Tensor, labelled: LabelledPieces, seed: int, draws: int = DRAWS) -> float:
    """Accuracy of logistic regression on normalised, standardised embeddings [pieces, C], mean over draws of the folds.

    Each piece is predicted by the one of five folds that did not see it; `seed` and the numbers after it draw them. One
    draw of 434 documents varies by 0.02.
    """
    make = StratifiedKFold if labelled.groups is None else StratifiedGroupKFold
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    rows = F.normalize(embeddings, dim=1).numpy()
    shares = []
    for number in range(draws):
        folds = make(FOLDS, shuffle=True, random_state=seed + number)
        predictions = cross_val_predict(classifier, rows, labelled.labels, groups=labelled.groups, cv=folds)
        shares.append((predictions == labelled.labels).mean())
    return float(np.mean(shares))
