"""Units of an input that scores are added up over: the sentences or passages of texts, the patches of images.

Units are int [B, N], the number of the unit that each token belongs to, from 0 in each row, and -1 where it belongs to
none, as padding.

Shape letters: B batch, N tokens, S units.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fa_layout import lay_out_text
from .encoder import entered

SENTENCE_END = re.compile(r"[.!?…。！？]+[\"')\]»”’]*(?=\s)|[。！？]+|\n\s*\n")
"""A run of full stops, question and exclamation marks, with closing quotes and brackets, before white space; the marks
of Chinese and Japanese anywhere; an empty line."""


def sentence_units(texts: Sequence[str], offsets: Tensor) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    """Return the sentence that each token belongs to, and where the sentences are in the text.

    A sentence ends behind full stops, question and exclamation marks before white space, and at an empty line:
    abbreviations end one as well.

    Args:
        texts: B texts.
        offsets: int [B, N, 2], each token's first character and the one behind its last, as a fast tokenizer gives with
            `return_offsets_mapping=True`; special tokens and padding have no characters.

    Returns:
        int [B, N], and for each text the first character of each sentence and the one behind its last.

    Raises:
        ValueError: the offsets have another shape.
    """
    if offsets.dim() != 3 or offsets.shape[::2] != (len(texts), 2):
        raise ValueError(f"`offsets` must be [{len(texts)} texts, tokens, 2], got {tuple(offsets.shape)}.")
    units = torch.full(offsets.shape[:2], -1)
    sentences = [split_sentences(text) for text in texts]
    for row, spans in enumerate(sentences):
        first, last = offsets[row].cpu().unbind(dim=1)
        starts = torch.tensor([start for start, _ in spans], dtype=torch.long)
        # By its last character: a tokenizer may count the white space before a word to the word's token.
        found = torch.searchsorted(starts, last.long() - 1, right=True) - 1
        units[row] = found.where(first < last, -1)
    return units.to(offsets.device), sentences


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Return the first character of each sentence and the one behind its last, without white space around it."""
    bounds = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    spans = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        sentence = text[start:stop]
        if sentence.strip():
            spans.append((stop - len(sentence.lstrip()), start + len(sentence.rstrip())))
    return spans


def passage_units(inputs: Mapping[str, Any], size: int, special: Tensor | None = None) -> Tensor:
    """Return the passage of `size` tokens that each token belongs to; the last one of a document may be shorter.

    Args:
        inputs: the arguments of a text model's forward pass, by name.
        size: real tokens of a passage, at least 1.
        special: bool or int [B, N], true at tokens that belong to no passage, such as a tokenizer's
            `special_tokens_mask`. None: all real ones belong to one.

    Returns:
        int [B, N]. Passages of a packed row are numbered through its documents.

    Raises:
        ValueError: `size` is below 1, the inputs are no texts, or an argument has another shape.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1 token, got {size}.")
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if tokens is None:
        raise ValueError("`inputs` have no `input_ids` or `inputs_embeds`, as texts have; of images use `patch_units`.")
    layout = lay_out_text(tokens, inputs.get("attention_mask"), inputs.get("cu_seqlens"))
    counted = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    counted = counted if layout.mask is None else layout.mask.clone()
    if special is not None:
        if special.shape != counted.shape:
            raise ValueError(f"`special` must be [batch, tokens] = {tuple(counted.shape)}, got {tuple(special.shape)}.")
        counted &= ~special.bool()
    if layout.documents is None:
        return ((counted.cumsum(dim=1) - 1) // size).masked_fill(~counted, -1)
    places, totals = layout.documents.count(counted[0])
    passages = (totals + size - 1) // size
    before = (passages.cumsum(dim=0) - passages)[layout.documents.document_ids]
    return (before + (places - 1) // size)[None].masked_fill(~counted, -1)


def patch_units(model: nn.Module, inputs: Mapping[str, Any], size: int = 1) -> tuple[Tensor, tuple[int, int]]:
    """Return the square of `size` × `size` patches that each patch belongs to, and how many squares there are.

    Args:
        model: an FAViT with any head.
        inputs: the arguments of its forward pass, by name.
        size: patches along each side of a square, at least 1; squares at the right and bottom may be smaller.

    Returns:
        int [B, N] with -1 at CLS, registers and masked patches, and (rows, columns) of squares: scores [B, S] of these
        units unflatten to [B, rows, columns].

    Raises:
        TypeError: `model` has no FABert or FAViT encoder.
        ValueError: `size` is below 1, or the inputs are no images.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1 patch, got {size}.")
    with entered(model, inputs) as entry:
        grid, is_real = entry.layout.grid, entry.is_real
    if grid is None:
        raise ValueError("`inputs` are texts, which have no patches; use `passage_units`.")
    rows, columns = (-(-length // size) for length in grid)
    across = (torch.arange(length, device=is_real.device) // size for length in grid)
    squares = (next(across)[:, None] * columns + next(across)).flatten()
    units = torch.full(is_real.shape, -1, device=is_real.device)
    units[:, is_real.shape[1] - len(squares) :] = squares
    return units.masked_fill(~is_real, -1), (rows, columns)


def sum_units(scores: Tensor, units: Tensor) -> Tensor:
    """Add up the scores of each unit's tokens: [B, N] and int [B, N] -> [B, S], with S the largest unit + 1."""
    num_units = max(0, int(units.max()) + 1) if units.numel() else 0
    sums = scores.new_zeros(len(scores), num_units + 1)  # the last one takes what belongs to none
    return sums.scatter_add(1, units.where(units >= 0, num_units).long(), scores)[:, :num_units]
