"""Student and teacher compared: their embeddings of held-out data, and what both are worth downstream."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from .embeddings import embed_batches, similarity
from .job import DistillationJob
from .pieces import UnlabelledData
from .probing import LabelledPieces, embed_pieces, probe


class Comparison:
    """The teacher's embeddings and accuracy, measured once, for a student to be compared with.

    Args:
        job: says the batches and the window that the teacher reads long texts in, `max_length` tokens.
        teacher: on the accelerator's device.
        data: its held-out pieces are compared by kind.
        labelled: pieces to probe the embeddings with; None measures nothing downstream.
        pooling: how a vector is made of hidden states, "mean" or "cls".
    """

    def __init__(
        self,
        job: DistillationJob,
        teacher: PreTrainedModel,
        data: UnlabelledData,
        labelled: LabelledPieces | None,
        pooling: str,
        accelerator: Accelerator,
    ):
        self._loop, self._pooling, self._accelerator = job.loop, pooling, accelerator
        self._collate: Callable = data.collate
        self.labelled = labelled
        self._loaders = data.heldout_loaders(job.loop, accelerator)
        window = job.model.max_length if job.is_text else None
        self._expected = {
            kind: embed_batches(teacher, loader, accelerator, pooling, window) for kind, loader in self._loaders.items()
        }
        self.teacher_accuracy = self.accuracy(teacher)

    def similarity(self, student: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Return the figures of `embeddings.similarity` for every kind of held-out data."""
        return {
            kind: similarity(embed_batches(student, loader, self._accelerator, self._pooling), self._expected[kind])
            for kind, loader in self._loaders.items()
        }

    def accuracy(self, model: PreTrainedModel) -> float | None:
        """Return the accuracy of `probing.probe` on a model's embeddings; None without labelled pieces."""
        if self.labelled is None:
            return None
        size, limit = self._loop.per_device_eval_batch_size, self._loop.max_tokens_per_batch or None
        embeddings = embed_pieces(model, self.labelled.pieces, self._collate, size, self._pooling, limit)
        return probe(embeddings, self.labelled, self._loop.seed)

    def downstream(self, before: float | None, after: float | None) -> dict[str, Any] | None:
        """Return what the receipt says of the student's accuracies; None without labelled pieces."""
        if self.labelled is None:
            return None
        return {
            "data": self.labelled.facts.name,
            "num_pieces": len(self.labelled.labels),
            "classes": self.labelled.label_names,
            "after": after,
            "teacher": self.teacher_accuracy,
            "before": before,
            "majority": self.labelled.majority,
        }
