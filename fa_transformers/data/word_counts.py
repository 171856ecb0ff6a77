"""A baseline of text classification without a network: TF-IDF of words and word pairs, with logistic regression."""

from collections.abc import Iterator

import datasets
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier


def tfidf_baseline(dataset: datasets.DatasetDict, split: str = "test") -> dict[str, float]:
    """Return accuracy and macro-F1 of `tfidf_predictions` on `split`."""
    return _score(list(dataset[split]["label"]), tfidf_predictions(dataset, split).tolist())


def tfidf_predictions(dataset: datasets.DatasetDict, split: str = "test") -> np.ndarray:
    """Labels that a linear classifier of word counts, fitted on train, gives the documents of `split`.

    Columns "text" and "label" (one label per document). Features are TF-IDF of the words and word pairs that two or
    more documents hold (in fewer than 100 documents: any), with logarithmic counts; classes are weighted by the inverse
    of their frequency. Nothing is tuned on the scored split. A few documents at a time are in memory.
    """
    min_df = 2 if len(dataset["train"]) >= 100 else 1
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=min_df, max_features=50_000, dtype=np.float32
    )
    features = vectorizer.fit_transform(_texts_of(dataset["train"]))
    logistic_regression = LogisticRegression(solver="liblinear", C=10.0, class_weight="balanced", max_iter=1000)
    classifier = OneVsRestClassifier(logistic_regression)
    classifier.fit(features, list(dataset["train"]["label"]))
    return classifier.predict(vectorizer.transform(_texts_of(dataset[split])))


def _texts_of(part: datasets.Dataset) -> Iterator[str]:
    for batch in part.select_columns("text").iter(batch_size=16):
        yield from batch["text"]


def _score(references: list, predictions: list) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur among references or predictions."""
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
    }
