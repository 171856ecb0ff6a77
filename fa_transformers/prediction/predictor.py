"""`Predictor`: answers of a trained model to texts and images, one at a time or millions, in the order they come in."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..data.readers.tables import DataError
from ..evaluation import evaluating
from ..metrics import decide
from ..models import FABertConfig, FAViTConfig
from .answers import AnswerRules, Prediction
from .inputs import ImageInputs, Prepared, TextInputs, batches, prepared_ahead, windows
from .loading import HEADS, load_classifier

logger = logging.getLogger(__name__)

MAX_TOKENS_PER_BATCH, CHUNK_SIZE = 16384, 8192
NOT_FINITE = "the model's answer is not a finite number: its weights are damaged, or overflow in this dtype"


class Answered(NamedTuple):
    """The model's decisions on prepared items, and what is kept of its logits; `decided` is None where all are bad.

    Args:
        decided: what `metrics.decide` makes of the logits, [items, ...]; zeros for items with an error.
        predictions: the answers, in the order of the items.
        rows: scores, classes and number of chosen classes of each item, None with an error.
    """

    decided: np.ndarray | None
    predictions: list[Prediction]
    rows: list[tuple[np.ndarray, np.ndarray, int] | None]


class Predictor:
    """A trained classifier or regressor that answers for any number of texts or images, of any length.

    Items are looked at a window at a time, batched with others of similar length, and answered in their order, so that
    memory doesn't grow with their number. A document of more than `max_tokens_per_batch` tokens is computed in chunks,
    which gives what computing it at once would, within rounding. With a table of "absolute" positions a model reads as
    many tokens as the table has rows, with "periodic" or no positions any number.

    Args:
        model: an FABert or FAViT with a head for classes or a number.
        processor: its tokenizer or image processor. Images are taken in the size that it makes.
        max_tokens_per_batch: most tokens or patches of a batch, padding included.
        chunk_size: tokens or patches that a longer item is computed by at a time.
        max_length: tokens that are read of a document, special ones included; None: as many as the model can.
        strict_length: a longer document is an error; otherwise its end is left out, which is logged once, counted, and
            said in `Prediction.is_truncated`.

    Raises:
        TypeError: the model or processor is of another kind.
        ValueError: a number is below 1, or `max_length` is more than the model can read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | BaseImageProcessor,
        *,
        max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
        chunk_size: int = CHUNK_SIZE,
        max_length: int | None = None,
        strict_length: bool = False,
    ):
        for name, value in (("max_tokens_per_batch", max_tokens_per_batch), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        config = model.config
        # By name: remote code may hold another copy of a class.
        is_known = config.model_type in (FABertConfig.model_type, FAViTConfig.model_type)
        if not is_known or not type(model).__name__.endswith(tuple(HEADS)):
            raise TypeError(f"model must be an FABert or FAViT with a classifier's head, got {type(model).__name__}.")
        self.model, self.processor = model, processor
        self.max_tokens_per_batch, self.chunk_size = max_tokens_per_batch, chunk_size
        self.problem_type = config.problem_type or (
            "regression" if config.num_labels == 1 else "single_label_classification"
        )
        self.label_names = (
            None if self.problem_type == "regression" else [config.id2label[n] for n in range(config.num_labels)]
        )
        self.rules = AnswerRules(self.problem_type, self.label_names)
        self.inputs: TextInputs | ImageInputs
        if config.model_type == FABertConfig.model_type:
            if not isinstance(processor, PreTrainedTokenizerBase):
                raise TypeError(f"processor must be the tokenizer of the model, got {type(processor).__name__}.")
            limit = read_limit(config, max_length)
            self.inputs = TextInputs(processor, limit, strict_length, config.pad_token_id)
        else:
            if max_length is not None:
                raise ValueError("`max_length` is for texts, and the model reads images; leave it out.")
            if isinstance(processor, PreTrainedTokenizerBase):
                raise TypeError("processor must be the image processor of the model, got a tokenizer.")
            self.inputs = ImageInputs(processor, config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> "Predictor":
        """Load a model and its processor, as `finetune` or `publish` wrote them.

        Args:
            name_or_path: a folder, or a repository of the Hub.
            device: None is the GPU, if there is one, or else the CPU.
            dtype: of the weights, such as "bfloat16"; None is as they were saved.
            options: arguments of `Predictor`.

        Raises:
            FileNotFoundError: there is no such folder or repository.
            ValueError: it is a stock model, an adapter, has no classifier's head, or is damaged.
        """
        model, processor = load_classifier(os.fspath(name_or_path), device, dtype)
        return cls(model, processor, **options)

    def __call__(self, items: Any) -> Prediction | list[Prediction] | Iterator[Prediction]:
        """Answer for one text or image, or for each of a list; of any other iterable, lazily, as `predict` does.

        Raises:
            DataError: an item can't be used; the message has its number.
        """
        if isinstance(items, str | bytes | Path | Image.Image | np.ndarray):
            return next(self.predict([items]))
        answers = self.predict(items)
        return list(answers) if isinstance(items, list | tuple) else answers

    def predict(self, items: Iterable[Any], on_error: Literal["raise", "return"] = "raise") -> Iterator[Prediction]:
        """Yield the answer to each item, in their order, with items read as they are needed.

        Two windows of up to `inputs.WINDOW_ITEMS` items are in memory: one is prepared while the other is answered.

        Args:
            items: texts; or images: Pillow's, arrays [height, width, channels] of bytes, paths, or bytes of files.
            on_error: "return" gives, for an item that can't be used, a `Prediction` with the reason in `error`.

        Raises:
            DataError: an item can't be used, and `on_error` is "raise"; the message has its number, from 1.
        """
        num_items = num_truncated = 0
        try:
            cut = windows(items, self.inputs.weigh, self.inputs.window_limit)
            for _, prepared in prepared_ahead(cut, self.inputs.prepare):
                for prediction in self.answer(prepared).predictions:
                    num_items += 1
                    num_truncated += prediction.is_truncated
                    if prediction.error is not None and on_error == "raise":
                        raise DataError(f"item {num_items}: {prediction.error}")
                    yield prediction
        finally:
            if num_truncated:
                logger.warning("%s", self.describe_truncated(num_truncated, num_items))

    def describe_truncated(self, num_truncated: int, num_items: int) -> str:
        """Return a sentence on how many documents were longer than the model reads."""
        documents = "document was" if num_truncated == 1 else "documents were"
        limit = f"{self.inputs.limit:,} tokens"
        return f"{num_truncated:,} of {num_items:,} {documents} longer than {limit}: the rest was not read"

    def answer(self, prepared: Sequence[Prepared]) -> Answered:
        """Return the model's answers to items that `inputs.prepare` returned."""
        decided: np.ndarray | None = None
        rows: list[tuple[np.ndarray, np.ndarray, int] | None] = [None] * len(prepared)
        for indices, logits in self._run(prepared):
            is_finite = np.isfinite(logits).all(axis=1)
            kept, logits = np.asarray(indices)[is_finite], logits[is_finite]
            if not len(kept):
                continue
            chosen = decide(logits, self.problem_type)
            if decided is None:
                decided = np.zeros((len(prepared), *chosen.shape[1:]), chosen.dtype)
            decided[kept] = chosen
            for index, *row in zip(kept.tolist(), *self.rules.shorten(logits), strict=True):
                rows[index] = (row[0], row[1], int(row[2]))
        return Answered(decided, [self._describe(*pair) for pair in zip(prepared, rows, strict=True)], rows)

    def _describe(self, prepared: Prepared, row: tuple[np.ndarray, np.ndarray, int] | None) -> Prediction:
        if row is None:
            return Prediction(None, None, error=prepared.error or NOT_FINITE)
        is_truncated = prepared.full_length > prepared.num_tokens
        return self.rules.prediction(row[0], row[1], num_tokens=prepared.num_tokens, is_truncated=is_truncated)

    def _run(self, prepared: Sequence[Prepared]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the indices of each batch and its logits [B, C] in float32.

        Raises:
            ValueError: a batch doesn't fit into memory.
        """
        with evaluating(self.model):
            for indices in batches(prepared, self.inputs, self.max_tokens_per_batch):
                examples = [prepared[index] for index in indices]
                batch = {name: value.to(self.model.device) for name, value in self.inputs.collate(examples).items()}
                if "pixel_values" in batch:
                    batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
                is_long = examples[0].num_tokens > self.max_tokens_per_batch
                options = {"chunk_size": self.chunk_size} if is_long else {}
                try:
                    logits = self.model(**batch, **options).logits.float().cpu().numpy()
                except RuntimeError as error:
                    if "memory" not in str(error).lower():
                        raise
                    shape = f"{len(indices)} x {examples[0].num_tokens:,} tokens"
                    raise ValueError(
                        f"`max_tokens_per_batch={self.max_tokens_per_batch}`: a batch of {shape} takes more memory "
                        f"than there is; lower it, or `chunk_size={self.chunk_size}` where one item is as long"
                    ) from error
                yield indices, logits


def read_limit(config: Any, max_length: int | None) -> int | None:
    """Return the tokens that a text model reads of a document; None for any number.

    Raises:
        ValueError: `max_length` is below 3, or more than the rows of a table of "absolute" positions.
    """
    rows = config.max_position_embeddings if config.position_embedding_type == "absolute" else None
    if max_length is None:
        return rows
    if max_length < 3:
        raise ValueError(f"`max_length` must be at least 3 tokens, two of which are special, got {max_length}.")
    if rows is not None and max_length > rows:
        raise ValueError(
            f"`max_length={max_length}` is more than the model reads: its position table has {rows} rows. Leave it "
            'out, or train with position_embedding_type="periodic", which reads any length.'
        )
    return max_length
