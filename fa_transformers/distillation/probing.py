"""Accuracy of logistic regression on frozen embeddings: a converted model's worth downstream, beside its teacher's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from ..data.labelled import reading_options
from ..data.readers.files import read_files
from ..data.readers.images import find_class_images
from ..data.readers.tables import DataError, listing
from ..data.sets import license_documents
from ..data.tokenizing import tokenize_documents
from ..evaluation import evaluating
from ..options import DataOptions
from .embeddings import pool
from .unlabelled import LICENSE_FACTS, as_image_rows

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
        """Share of the most frequent class."""
        return float(np.bincount(self.labels).max() / len(self.labels))


def load_labelled_text(
    path: Path, data: DataOptions, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> LabelledPieces:
    """Read a table of texts and labels, its columns named as `data` says: the first `max_length` tokens of each text.

    Raises:
        DataError: the file can't be used, or its labels are no classes.
    """
    options = replace(reading_options(data), problem_type="single_label_classification", group_column=None)
    rows = read_files({"train": [path]}, options)["train"]
    names = np.array(rows.features["label"].names)[rows["label"][:]]
    return _label_pieces(_unstated_facts(path.name), rows, names, tokenizer, max_length)


def load_labelled_licenses(tokenizer: PreTrainedTokenizerBase, max_length: int) -> LabelledPieces:
    """Read the test split of the licence documents, whose families stay together in a fold."""
    rows = license_documents.load_license_documents()["test"]
    groups = np.array(rows["family"][:])
    return _label_pieces(LICENSE_FACTS, rows, rows["label"][:], tokenizer, max_length, groups)


def _label_pieces(
    facts: DataFacts,
    rows: datasets.Dataset,
    names: Sequence[str] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    groups: np.ndarray | None = None,
) -> LabelledPieces:
    """The rows' texts as pieces, and their classes by `names`, one for each row."""
    tokenized = tokenize_documents(datasets.DatasetDict({"probe": rows}), tokenizer, max_length)["probe"]
    pieces = TokenizedRows(tokenized.select_columns(["input_ids", "length"]))
    label_names, labels = np.unique(names, return_inverse=True)
    return LabelledPieces(facts, pieces, labels, label_names.tolist(), groups)


def load_labelled_images(
    folder: Path, processor: BaseImageProcessor, num_patches: int, classes: list[str] | None = None
) -> LabelledPieces:
    """Read the images of a folder of one folder per class, or of the classes that `classes` names.

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
    """Facts without licence and attribution: the flags on those describe the data that is distilled on."""
    return DataFacts(name=f"{name} (probe)", license="unknown", attribution="not stated")


def embed_pieces(
    model: PreTrainedModel,
    pieces: TokenizedRows | ImageExamples,
    collate: Callable,
    batch_size: int,
    pooling: str,
    max_tokens: int | None = None,
) -> Tensor:
    """Return the embedding of each piece, in their order; every process computes all: float32 [pieces, C].

    `batch_size` pieces at a time, of at most `max_tokens` tokens or patches together, padding included.
    """
    order: list[int] = []
    rows: list[Tensor] = []
    with evaluating(model), tqdm(total=len(pieces), desc="probe", unit="piece") as bar:
        for indices, batch in grouped_batches(pieces, collate, batch_size, max_tokens, model.device):
            hidden_states = model.base_model(**batch).last_hidden_state
            rows.append(pool(hidden_states, batch.get("attention_mask"), pooling).float().cpu())
            order += indices
            bar.update(len(indices))
    return torch.cat(rows)[np.argsort(order)]


def probe(embeddings: Tensor, labelled: LabelledPieces, seed: int, draws: int = DRAWS) -> float:
    """Return the accuracy of logistic regression on normalised, standardised embeddings, mean over draws of the folds.

    `embeddings` are [pieces, C]. Each piece is predicted by the classifier that was fitted on the other four of five
    folds; `seed` and the numbers after it draw the folds. One draw of 434 documents varies by 0.02.
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
