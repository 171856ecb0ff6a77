"""Tokens of documents: made in parallel, a megabyte of text at a time, and kept in a cache beside the documents."""

import logging
from collections.abc import Callable

import datasets
from transformers import PreTrainedTokenizerFast

from ..files import count_cores
from .readers.tables import DataError

logger = logging.getLogger(__name__)

TOKENIZED_BATCH_BYTES = 2**20
"""About the text that is tokenized at a time: tokens as Python integers take some ten times its memory."""
BYTES_PER_WORKER = 2**23
"""Text that is worth another process, which takes about half a second to start: a few seconds of tokenization."""


def tokenize_documents(
    dataset: datasets.DatasetDict,
    tokenizer: Callable,
    max_length: int,
    strict_length: bool = False,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> datasets.DatasetDict:
    """Tokenize the column "text"; the result has the tokenizer's columns, "label" and "length" (tokens kept).

    A document of more than `max_length` tokens, special tokens included, is truncated, and one warning counts them;
    with `strict_length` the first of them is a DataError that names its row. Nothing is padded.

    `num_proc` processes share the work; None is one per usable core, as far as there is text that is worth them. The
    tokens are memory-mapped from a file beside the documents, which is used again unless `overwrite_cache`.

    Raises:
        DataError: with `strict_length`, a document is too long.
        ValueError: `max_length` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be a positive number of tokens, got {max_length}")
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # Calls leave their truncation and padding in the tokenizer, and the cache goes by a hash of all of it.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return tokenize_texts(tokenizer, batch["text"], max_length)

    tokenized = {}
    for split, part in dataset.items():
        removed = [name for name in part.column_names if name != "label"]
        document_bytes = part.data.nbytes / max(1, part.data.num_rows)
        arguments = dict(
            batched=True,
            batch_size=min(128, max(1, int(TOKENIZED_BATCH_BYTES / document_bytes))),
            remove_columns=removed,
            num_proc=num_proc or choose_num_proc(int(document_bytes * len(part))),
            desc=f"tokenizing {split}",
        )
        result = part.map(tokenize, load_from_cache_file=not overwrite_cache, **arguments)
        if len(result) != len(part):  # a file that was cut off
            result = part.map(tokenize, load_from_cache_file=False, **arguments)
        full_length = result.with_format("numpy")["full_length"][:]
        if full_length.max() > max_length:
            too_long = full_length > max_length
            if strict_length:
                row = int(too_long.argmax())
                raise DataError(
                    f"split {split!r}, row {row + 1}: the document has {full_length[row]} tokens, the limit is "
                    f"{max_length}: raise max_length, shorten the document, or leave strict_length off to truncate"
                )
            logger.warning(
                "split %r: %d of %d documents are longer than %d tokens and were truncated; the longest has %d",
                split,
                too_long.sum(),
                len(result),
                max_length,
                full_length.max(),
            )
        tokenized[split] = result.remove_columns("full_length")
    return datasets.DatasetDict(tokenized)


def tokenize_texts(tokenizer: Callable, texts: list[str], max_length: int) -> dict[str, list]:
    """Return the tokenizer's columns, "length" (tokens kept, `max_length` at most) and "full_length" (all)."""
    encoded = tokenizer(texts, truncation=False, padding=False, verbose=False)
    full_length = [len(token_ids) for token_ids in encoded["input_ids"]]
    if max(full_length) > max_length:
        encoded = tokenizer(texts, truncation=True, max_length=max_length, padding=False, verbose=False)
    length = [len(token_ids) for token_ids in encoded["input_ids"]]
    return {**encoded, "length": length, "full_length": full_length}


def choose_num_proc(num_bytes: int) -> int | None:
    """Return the number of processes to tokenize `num_bytes` of text with; None is the present one alone."""
    num_workers = min(count_cores(), num_bytes // BYTES_PER_WORKER)
    return num_workers if num_workers > 1 else None
