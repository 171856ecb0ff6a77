"""Decisions on rows that have a true label, as records of a file, so that a run that goes on can score all of them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

RECORDS_AT_ONCE = 2**14


class DecisionRecords:
    """Records of one length each: all tokens of a document, its true label, and the decision at each of some lengths.

    Classes take 4 bytes, numbers 8, of several labels each a bit.

    Args:
        problem_type: one of transformers' names.
        num_labels: the model's classes.
        num_decisions: decisions of a row.
    """

    def __init__(self, problem_type: str, num_labels: int, num_decisions: int):
        self._is_several, self._num_labels = problem_type == "multi_label_classification", num_labels
        shape: tuple[int, ...] = (-(-num_labels // 8),) if self._is_several else ()
        kind = "u1" if self._is_several else "<f8" if problem_type == "regression" else "<i4"
        fields = [("full_length", "<i8", ()), ("reference", kind, shape), ("decided", kind, (num_decisions, *shape))]
        self._record = np.dtype(fields)

    def encode(self, decided: np.ndarray, references: np.ndarray, full_lengths: np.ndarray) -> bytes:
        """Return the bytes of decisions [rows, decisions, ...], true labels [rows, ...] and tokens [rows]."""
        records = np.zeros(len(decided), self._record)
        if self._is_several:
            decided = np.packbits(decided.astype(bool), axis=-1)
            references = np.packbits(references.astype(bool), axis=-1)
        records["full_length"], records["reference"], records["decided"] = full_lengths, references, decided
        return records.tobytes()

    def read(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield what `encode` was given, some thousand rows at a time."""
        with open(path, "rb") as file:
            while content := file.read(self._record.itemsize * RECORDS_AT_ONCE):
                records = np.frombuffer(content, self._record)
                decided, references = records["decided"], records["reference"]
                if self._is_several:
                    decided = np.unpackbits(decided, axis=-1, count=self._num_labels)
                    references = np.unpackbits(references, axis=-1, count=self._num_labels)
                yield decided, references, records["full_length"]
