"""Texts as vectors, and how alike they are: whole documents of any length, or a question and passages of one."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.readers.files import TextError, check_text
from ..data.readers.tables import DataError
from ..evaluation import evaluating
from ..models.modeling_fa import first_real_token, mean_over_real
from .inputs import Prepared, TextInputs, batches
from .predictor import CHUNK_SIZE, MAX_TOKENS_PER_BATCH, Predictor, read_limit


class RankedPassage(NamedTuple):
    """The characters of a passage, from `start` to before `stop`, and its cosine similarity with the question."""

    start: int
    stop: int
    similarity: float


class TextEncoder:
    """An FABert that makes one vector of a text; a text of more than a batch's tokens is computed in chunks.

    Args:
        model: an FABertModel, or one with a head, which takes no part.
        tokenizer: the model's.
        pooling: the vector is the "mean" of a text's tokens, or its first one, "cls".
        max_length: tokens that are read of a text, special ones included; None: as many as the model can.
        max_tokens_per_batch: most tokens of a batch, padding included.
        chunk_size: tokens that a longer text is computed by at a time.

    Raises:
        ValueError: `max_length` is below 3, or more than the model can read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        max_length: int | None = None,
        max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
        chunk_size: int = CHUNK_SIZE,
    ):
        config = model.config
        self.model: nn.Module = model.base_model
        self.inputs = TextInputs(tokenizer, read_limit(config, max_length), False, config.pad_token_id)
        self.tokenizer, self.pooling = tokenizer, pooling
        self.max_tokens_per_batch, self.chunk_size = max_tokens_per_batch, chunk_size

    @classmethod
    def of_predictor(cls, predictor: Predictor, max_length: int | None = None) -> "TextEncoder":
        """Return the encoder inside a classifier of texts, which pools as the classifier does.

        Raises:
            ValueError: the predictor reads images.
        """
        if not isinstance(predictor.inputs, TextInputs):
            raise ValueError("`predictor` must be of a text model, and this one reads images.")
        pooling: Literal["mean", "cls"] = "mean" if predictor.model.config.classifier_pooling == "mean" else "cls"
        return cls(
            predictor.model, predictor.inputs.tokenizer, pooling=pooling, max_length=max_length,
            max_tokens_per_batch=predictor.max_tokens_per_batch, chunk_size=predictor.chunk_size,
        )  # fmt: skip

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return a vector for each text, in their order: float32 [texts, C].

        Raises:
            DataError: a text can't be used; the message has its number, from 1.
        """
        return self._embed(self.inputs.prepare(texts))

    def similarity(self, first: str, second: str) -> tuple[float, tuple[int, int]]:
        """Return the cosine of two texts' vectors, and the tokens that were read of each.

        Raises:
            DataError: a text can't be used.
        """
        prepared = self.inputs.prepare([first, second])
        vectors = self._embed(prepared)
        read = (prepared[0].num_tokens, prepared[1].num_tokens)
        return float(F.cosine_similarity(vectors[0], vectors[1], dim=0)), read

    def rank(self, question: str, document: str, passage: int = 256) -> list[RankedPassage]:
        """Return the passages of a document, each encoded on its own, the most similar to the question first.

        Args:
            question: the text to compare with.
            document: of any length; all of it is read.
            passage: most tokens of a passage, special ones not counted; it ends at a blank where it has one.

        Raises:
            DataError: a text can't be used.
            ValueError: `passage` is below 1, or the tokenizer can't say where its tokens stand.
        """
        if passage < 1:
            raise ValueError(f"`passage` must be at least 1 token, got {passage}.")
        if not self.tokenizer.is_fast:
            raise ValueError("passages need a fast tokenizer, which says where in the text its tokens stand.")
        (vector,) = self.embed([question])
        try:
            check_text(document)
        except TextError as error:
            raise DataError(str(error)) from error
        offsets: Any = self.tokenizer(
            document, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )["offset_mapping"]
        spans = [span for span in split_at_blanks(document, offsets, passage) if document[slice(*span)].strip()]
        vectors = self.embed([document[start:stop] for start, stop in spans])
        cosines = F.cosine_similarity(vectors, vector, dim=1).tolist()
        ranked = [RankedPassage(*span, cosine) for span, cosine in zip(spans, cosines, strict=True)]
        return sorted(ranked, key=lambda one: -one.similarity)

    def _embed(self, prepared: Sequence[Prepared]) -> Tensor:
        for number, one in enumerate(prepared, start=1):
            if one.error is not None:
                raise DataError(f"text {number}: {one.error}" if len(prepared) > 1 else one.error)
        device = next(self.model.parameters()).device
        vectors: dict[int, Tensor] = {}
        with evaluating(self.model):
            for indices in batches(prepared, self.inputs, self.max_tokens_per_batch):
                collated = self.inputs.collate([prepared[index] for index in indices])
                batch = {name: value.to(device) for name, value in collated.items()}
                is_long = prepared[indices[0]].num_tokens > self.max_tokens_per_batch
                options = {"chunk_size": self.chunk_size} if is_long else {}
                states = self.model(**batch, **options).last_hidden_state
                mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
                pooled = mean_over_real(states, mask) if self.pooling == "mean" else first_real_token(states, mask)
                vectors |= zip(indices, pooled.float().cpu(), strict=True)
        return torch.stack([vectors[index] for index in range(len(prepared))])


def split_at_blanks(text: str, offsets: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return the characters of passages of at most `size` tokens, which begin behind blanks where that is possible.

    Args:
        text: the document.
        offsets: the first character of each token and the one behind its last.
        size: most tokens of a passage.
    """
    spans, start = [], 0
    while start < len(offsets):
        stop = min(start + size, len(offsets))
        ends = range(stop, start, -1) if stop < len(offsets) else ()
        begin = (end for end in ends if text[offsets[end][0] - 1].isspace() or text[offsets[end][0]].isspace())
        stop = next(begin, stop)
        spans.append((offsets[start][0], offsets[stop - 1][1]))
        start = stop
    return spans
