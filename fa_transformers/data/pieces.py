"""Documents cut into pieces that a model with a short table of positions can read, to learn from without labels."""

from collections.abc import Sequence

import datasets
from transformers import PreTrainedTokenizerBase

from .examples import TokenizedRows
from .readers.tables import DataError

SHORTEST_PIECE = 32
"""Tokens below which the rest of a document is left out."""


def check_texts(texts: Sequence, first: int = 1) -> None:
    """Raise DataError, naming the row, where something in a column of texts is no text; `first` is the first row's."""
    for number, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise DataError(f"row {number} of the texts has {text!r} instead of text")


def cut_into_pieces(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, shortest: int = SHORTEST_PIECE
) -> datasets.Dataset:
    """Cut documents into pieces of `shortest` to `max_length` tokens, each between the tokenizer's special tokens.

    Raises:
        DataError: a row holds no text.
    """

    def cut(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        check_texts(batch["text"], first=indices[0] + 1)
        pieces = tokenizer(
            batch["text"], truncation=True, max_length=max_length, return_overflowing_tokens=True, verbose=False
        )["input_ids"]
        rows = [piece for piece in pieces if len(piece) >= shortest]
        return {"input_ids": rows, "length": [len(row) for row in rows]}

    # Small batches: a document can be long.
    return documents.select_columns("text").map(
        cut, with_indices=True, batched=True, batch_size=64, remove_columns="text", desc=f"cutting to {max_length:,}"
    )


class TextPieces(TokenizedRows):
    """The rows of `cut_into_pieces`, `lengths` in tokens; `limit` keeps only so many, drawn by `seed`.

    Raises:
        DataError: there are none.
    """

    def __init__(self, rows: datasets.Dataset, limit: int | None = None, seed: int = 0):
        if not len(rows):
            raise DataError(f"no document has {SHORTEST_PIECE} tokens: there is not enough text to distil on")
        if limit is not None and limit < len(rows):
            rows = rows.shuffle(seed=seed).select(range(limit)).flatten_indices()
        super().__init__(rows)
