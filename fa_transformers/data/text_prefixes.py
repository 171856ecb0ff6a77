"""Beginnings of long texts whose tokens are those that the whole text begins with.

A text is cut before a blank. That is right where a tokenizer splits text at blanks, and decides each word by itself:
then no token before the cut depends on what follows. Every part of a fast tokenizer is looked at, and one that isn't
known to be so, such as a pattern of its own, has no safe cut: the text is then tokenized whole.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

CHARACTERS_PER_TOKEN = 8
"""Characters of the first beginning for each token that is kept: English has four to five."""
LEAST_CHARACTERS = 2048
# A letter, digit or sign that no normalization removes, turns into a blank or joins to what follows, then a blank.
_SAFE_CUT = re.compile(r"[!-~À-ÖØ-öø-ɏΑ-ΡΣ-ώЀ-ҁҊ-ӿא-תؠ-ؿف-يऄ-हぁ-ゖァ-ヺ一-鿿가-힣] ")
_LOCAL_NORMALIZERS = {
    "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Strip",
    "StripAccents",
}  # fmt: skip
_LOCAL_SPLITTERS = {"Digits", "Punctuation"}
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}


def has_safe_cuts(tokenizer: Callable) -> bool:
    """Return True where the tokens before a cut of `find_prefix` are those of the whole text."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.truncation_side != "right":
        return False
    backend = tokenizer.backend_tokenizer
    return (
        type(backend.model).__name__ in _MODELS
        and not getattr(backend.model, "dropout", None)
        and _normalizes_locally(_describe(backend.normalizer))
        and _splits_at_blanks(_describe(backend.pre_tokenizer))
        and not any(re.search(r"[\s▁]", token.content) for token in tokenizer.added_tokens_decoder.values())
    )


def _describe(part: Any) -> dict[str, Any] | None:
    """The type and settings of a part of a tokenizer, as its file has them."""
    return None if part is None else json.loads(part.__getstate__())


def find_prefix(text: str, num_characters: int) -> str:
    """Return a beginning of `num_characters` or somewhat more up to a safe cut, or the whole text.

    It is the whole text also where no safe cut lies before half of the text: the rest is then hardly worth the search.
    """
    while num_characters < len(text) // 2:
        found = _SAFE_CUT.search(text, num_characters, 2 * num_characters + 1)
        if found:
            return text[: found.start() + 1]
        num_characters *= 2
    return text


def _normalizes_locally(part: dict[str, Any] | None) -> bool:
    """True where text before a blank is normalized alike, whatever follows, and ends in no blank unless it did."""
    if part is None or part["type"] in _LOCAL_NORMALIZERS:
        return True
    if part["type"] == "Sequence":
        return all(map(_normalizes_locally, part["normalizers"]))
    if part["type"] != "Replace":
        return False
    pattern = part["pattern"]
    if pattern.get("Regex") == " {2,}" or pattern.get("String") == " ":
        return part["content"] in (" ", "▁")
    return (
        "String" in pattern and not re.search(r"[\s▁]", pattern["String"] + part["content"]) and part["content"] != ""
    )


def _splits_at_blanks(part: dict[str, Any] | None) -> bool:
    """True where text is split at every blank, and where else it is split depends on the word alone."""
    if part is None:
        return False
    kind = part["type"]
    if kind == "Sequence":
        parts = part["pretokenizers"]
        return any(map(_splits_at_blanks, parts)) and all(
            _splits_at_blanks(each) or each["type"] in _LOCAL_SPLITTERS or _only_maps_bytes(each) for each in parts
        )
    if kind == "ByteLevel":
        return part.get("use_regex", True)
    if kind == "Metaspace":
        return part.get("split", True)
    return kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")


def _only_maps_bytes(part: dict[str, Any]) -> bool:
    return part["type"] == "ByteLevel" and not part.get("use_regex", True)
