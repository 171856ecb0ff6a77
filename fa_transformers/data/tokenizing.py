"""Tokens of documents: made in parallel, a megabyte of text at a time, and kept in a cache beside the documents."""

import logging
import os
from collections.abc import Callable

import datasets
import numpy as np
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..cores import count_cores
from .readers.tables import DataError
from .text_prefixes import CHARACTERS_PER_TOKEN, LEAST_CHARACTERS, find_prefix, has_safe_cuts

logger = logging.getLogger(__name__)

TOKENIZED_BATCH_BYTES = 2**20
"""About the text that is tokenized at a time: tokens as Python integers take some ten times its memory."""
BYTES_PER_WORKER = 2**23
"""Text that is worth another process, which takes about half a second to start: a few seconds of tokenization."""


def load_tokenizer(
    folder: str | os.PathLike | None, config: PretrainedConfig, packing: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint's folder for a model with this configuration; see `check_tokenizer`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, config, str(folder), packing)
    return tokenizer


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, source: str, packing: bool = False
) -> None:
    """Raise ValueError unless a tokenizer's ids are rows of the model's table, and, without `packing`, it can pad.

    A tokenizer that names no padding token gets the one of `config.pad_token_id` where that is called so ("[PAD]",
    "<pad>"), and a warning tells it: another token would be cut out of the texts.

    Args:
        source: the folder or name of the tokenizer, for messages.
        packing: nothing is padded.
    """
    num_tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if num_tokens > config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {num_tokens} tokens, the checkpoint's table {config.vocab_size}: they don't "
            "belong together, or the table was to be resized first, by model.resize_token_embeddings(len(tokenizer))."
        )
    if packing or tokenizer.pad_token is not None:
        return
    number = config.pad_token_id
    token = None if number is None else tokenizer.convert_ids_to_tokens(number)
    if token is None or "pad" not in token.lower():
        raise ValueError(
            f"{source}: the tokenizer has no padding token, which batches of documents need: name one in its "
            'tokenizer_config.json, such as "pad_token": "[PAD]", or, in fine-tuning, '
            "train with --packing, which pads nothing."
        )
    logger.warning("%s: the tokenizer names no padding token: %r, the model's, is taken", source, token)
    tokenizer.pad_token = token


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
        least_length = np.abs(full_length)
        too_long = least_length > max_length
        if too_long.any():
            if strict_length:
                row = int(too_long.argmax())
                raise DataError(
                    f"split {split!r}, row {row + 1}: the document has {count_tokens(tokenizer, part[row]['text'])} "
                    f"tokens, the limit is {max_length}: raise --max_length, shorten the document, or "
                    "leave --strict_length off to truncate"
                )
            logger.warning(
                "split %r: %d of %d documents are longer than %d tokens and were truncated; the longest has %s%d",
                split,
                too_long.sum(),
                len(result),
                max_length,
                "at least " if full_length.min() < 0 else "",
                least_length.max(),
            )
        tokenized[split] = result.remove_columns("full_length")
    return datasets.DatasetDict(tokenized)


def tokenize_texts(tokenizer: Callable, texts: list[str], max_length: int) -> dict[str, list]:
    """Return the tokenizer's columns, "length" (tokens kept, `max_length` at most) and "full_length".

    Of a text that is much longer than `max_length` tokens only a beginning is tokenized where that gives the same
    tokens. "full_length" is then below 0: the text has at least so many tokens, the sign taken away, and more than
    `max_length`. Else it counts all tokens.
    """
    beginnings = _find_beginnings(tokenizer, texts, max_length)
    encoded = tokenizer(beginnings, truncation=False, padding=False, verbose=False)
    full_length = [len(token_ids) for token_ids in encoded["input_ids"]]
    if max(full_length) > max_length:
        encoded = tokenizer(beginnings, truncation=True, max_length=max_length, padding=False, verbose=False)
    length = [len(token_ids) for token_ids in encoded["input_ids"]]
    full_length = [
        count if len(beginning) == len(text) else -count
        for count, beginning, text in zip(full_length, beginnings, texts, strict=True)
    ]
    return {**encoded, "length": length, "full_length": full_length}


def _find_beginnings(tokenizer: Callable, texts: list[str], max_length: int) -> list[str]:
    """Return for each text a beginning that has the same first tokens, and more than `max_length`, or the whole."""
    num_characters = max(LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * max_length)
    if max(map(len, texts)) <= 2 * num_characters or not has_safe_cuts(tokenizer):
        return texts
    beginnings = list(texts)
    for index, text in enumerate(texts):
        size = num_characters
        beginnings[index] = find_prefix(text, size)
        while len(beginnings[index]) < len(text) and count_tokens(tokenizer, beginnings[index]) <= max_length:
            size *= 4
            beginnings[index] = find_prefix(text, size)
    return beginnings


def count_tokens(tokenizer: Callable, text: str) -> int:
    """Return the number of tokens of a whole text, special tokens included."""
    return len(tokenizer([text], truncation=False, padding=False, verbose=False)["input_ids"][0])


def choose_num_proc(num_bytes: int) -> int | None:
    """Return the number of processes to tokenize `num_bytes` of text with; None is the present one alone."""
    num_workers = min(count_cores(), num_bytes // BYTES_PER_WORKER)
    return num_workers if num_workers > 1 else None
