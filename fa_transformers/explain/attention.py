"""Rows and columns of the attention that a model's layers stand for, and rollout through all of them.

A factorized layer never forms its N×N matrix, but the matrix is there (`implied.py`): every function here is exact for
it, in time and memory linear in the number of tokens.

Shape letters: B batch, H heads, P positions, N tokens, F features of a head, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.fa_layout import Layout
from .encoder import EncoderInput, entered
from .implied import left_multiply, parts_of


def attention_rows(model: nn.Module, inputs: Mapping[str, Any], positions: Sequence[int] | Tensor) -> list[Tensor]:
    """Return rows of each layer's attention: how much each of some tokens takes from every token.

    Time and memory are O(P · N) for each layer; layers in `softmax_layers` take O(N²) time.

    Args:
        model: an FABert or FAViT with any head.
        inputs: the arguments of its forward pass, by name: padded, packed, or with a `chunk_size`.
        positions: int [P], at least one, places in the N tokens of the batch, padding and CLS included; for images CLS
            is 0, then come the registers, then the patches row by row.

    Returns:
        For each layer [B, H, P, N]: distributions over the real tokens of the position's document, exactly zero at
        padding; where the position itself is padding, zeros. The convolution over V counts by a rule, as it is no
        average: at each offset c_o, the mean absolute weight over a head's channels, is added, and the row is divided
        by 1 + Σ c_o. With `attention_normalization="scaling"` rows are scale · Q · Kᵀ and have numbers of either sign.
        Of multiple choice, B counts the choices of all examples.

    Raises:
        TypeError: `model` has no FABert or FAViT encoder.
        ValueError: there is no position, or one lies outside the tokens, or the model refuses its inputs.
    """
    with entered(model, inputs) as entry:
        num_tokens = entry.embeddings.shape[1]
        places = torch.as_tensor(positions, device=entry.embeddings.device)
        if not places.numel():
            raise ValueError("`positions` must have at least one place, got none.")
        if places.dim() != 1 or places.is_floating_point() or places.dtype == torch.bool:
            raise ValueError(f"`positions` must be a list of integers, got {positions!r}.")
        if int(places.min()) < 0 or int(places.max()) >= num_tokens:
            raise ValueError(f"`positions` must lie between 0 and {num_tokens - 1}, got {places.tolist()}.")
        chosen = torch.nn.functional.one_hot(places.long(), num_tokens).to(entry.dtype)
        weights = chosen.expand(len(entry.embeddings), 1, -1, -1)
        return [left_multiply(*step, entry.layout, weights) for step in entry.forwards()]


def attention_received(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the mean row of each layer's attention: how much the real tokens take from each token, on average.

    Args:
        model, inputs: as in `attention_rows`.

    Returns:
        For each layer [B, H, N], over the tokens of each document; sums and zeros as in `attention_rows`.

    Raises:
        TypeError, ValueError: as in `attention_rows`.
    """
    with entered(model, inputs) as entry:
        weights = mean_weights(entry, entry.is_real)[:, None, None]
        return [left_multiply(*step, entry.layout, weights)[:, :, 0] for step in entry.forwards()]


def context_maps(model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    """Return the global attention maps of each factorized layer: the columns of softmax(K), which no query changes.

    Each token's row is a mixture of the F maps of its head, before local terms. In the paper's words, a map attends to
    one semantic aspect of the whole input.

    Args:
        model, inputs: as in `attention_rows`.

    Returns:
        By the number of the layer, from 0, [B, H, F, N]: distributions over real tokens, or the scaled K for
        `attention_normalization="scaling"`; zero at padding. For images without the prefix tokens, N unflattens to the
        patch grid. Layers in `softmax_layers` have no maps and are left out.

    Raises:
        TypeError, ValueError: as in `attention_rows`.

    Source: Shen et al. 2021, arXiv:1812.01243, section 3.3.
    """
    maps = {}
    with entered(model, inputs) as entry:
        for index, step in enumerate(entry.forwards()):
            parts = parts_of(*step, entry.layout)
            if all(part.is_factorized for _, part in parts):
                maps[index] = torch.cat([part.context_maps() for _, part in parts], dim=3)
    return maps


def leading_context_maps(
    model: nn.Module, inputs: Mapping[str, Any], target: int | Literal["mean"] = 0, number: int = 4
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, of each factorized layer, the context maps of which a token's row of attention takes most.

    Args:
        model, inputs, target: as in `rollout`.
        number: maps of each head, at most; at least 1.

    Returns:
        By the number of the layer, from 0, the share that each map has in the row, [B, H, number], the largest first,
        and the maps, [B, H, number, N], as in `context_maps`. With a window or a convolution the row has other terms,
        too.

    Raises:
        TypeError, ValueError: as in `rollout`, or `number` is below 1, or documents are packed.
    """
    if number < 1:
        raise ValueError(f"`number` must be at least 1, got {number}.")
    with entered(model, inputs) as entry:
        if entry.layout.documents is not None:
            raise ValueError("`inputs` must not be packed: each document has maps of its own.")
        weights = target_weights(entry, target)[:, None, None]
        leading = {}
        for index, step in enumerate(entry.forwards()):
            ((_, part),) = parts_of(*step, entry.layout)
            if not part.is_factorized:
                continue
            shares = part.feature_weights(weights)[:, :, 0]
            chosen = shares.abs().topk(min(number, shares.shape[2]), dim=2).indices
            maps = part.context_maps()
            places = chosen[..., None].expand(-1, -1, -1, maps.shape[3])
            leading[index] = shares.gather(2, chosen), maps.gather(2, places)
        return leading


def effective_support(rows: Tensor) -> Tensor:
    """Return how many tokens a row is spread over, exp(-Σ a · log a): [..., N] -> [...], from 1 to N.

    It is N for a row that is the same everywhere and 1 for one that takes from a single token; 0 for a row of zeros,
    as padding has.

    Args:
        rows: distributions over tokens.

    Raises:
        ValueError: a number is negative, as with `attention_normalization="scaling"`.
    """
    if bool((rows < 0).any()):
        raise ValueError('`rows` must be distributions, got negative numbers, as attention by "scaling" has.')
    support = torch.special.entr(rows).sum(dim=-1).exp()
    return support.where(rows.sum(dim=-1) > 0, 0.0)


def rollout(
    model: nn.Module, inputs: Mapping[str, Any], target: int | Literal["mean"] = 0, residual: float = 0.5
) -> Tensor:
    """Return how much of a token, or of all, comes from each token of the input through all layers' attention.

    Computes e_target · M_L · … · M_1 with M = residual · I + (1 - residual) · mean over heads of A, from left to right:
    one product of a vector with each layer's matrix, in O(L · N) time and at most 1.2 times the memory of a forward
    pass, for which models of more than six layers compute some of them twice (`encoder.py`). Nothing is approximated.
    Values, output projections and feed-forward parts take no part, so a rollout says where attention could carry
    information from, not what the answer makes of it.

    Args:
        model, inputs: as in `attention_rows`.
        target: a token of each document, counted from 0 at its first real one, so that 0 is the one that a classifier
            with "cls" pooling reads; or "mean" of all real ones, for images of all real patches, as in "mean" pooling.
        residual: the share of the residual path, from 0 to 1.

    Returns:
        [B, N], for each document a distribution over its real tokens; exactly zero at padding, and for a document
        without real tokens. With `attention_normalization="scaling"`, numbers of either sign.

    Raises:
        TypeError: `model` has no FABert or FAViT encoder.
        ValueError: a document has no real token `target`, `residual` is outside 0 to 1, or the model refuses its
            inputs.

    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", arXiv:2005.00928.
    """
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"`residual` must be from 0 to 1, got {residual}.")
    with entered(model, inputs) as entry:
        return roll_out(entry, target, residual)


def roll_out(entry: EncoderInput, target: int | Literal["mean"], residual: float = 0.5) -> Tensor:
    """Return `rollout` of a batch that has entered its encoder."""
    weights = target_weights(entry, target)
    for layer, hidden_states in entry.backwards():
        mixed = left_multiply(layer, hidden_states, entry.layout, weights[:, None, None]).mean(dim=1)[:, 0]
        weights = residual * weights + (1.0 - residual) * mixed
        del hidden_states  # which else would be held while the next ones are computed
    return weights


def target_weights(entry: EncoderInput, target: int | Literal["mean"]) -> Tensor:
    """Return the weights of tokens that `rollout` starts from: [B, N], summing to one for each document.

    Raises:
        ValueError: see `rollout`.
    """
    is_real, layout = entry.is_real, entry.layout
    if target == "mean":
        counted = is_real.clone()
        counted[:, : layout.num_prefix(is_real.shape[1])] = False
        return mean_weights(entry, counted)
    if isinstance(target, bool) or not isinstance(target, int):
        raise ValueError(f'`target` must be the number of a token or "mean", got {target!r}.')
    places = torch.arange(is_real.shape[1], device=is_real.device)[None]
    if layout.grid is None:
        places = Layout(is_real, documents=layout.documents).places()
    chosen = is_real & (places == target)
    has_any, has_target = (marks.any(dim=1) for marks in (is_real, chosen))
    if layout.documents is not None:
        has_any, has_target = (layout.documents.count(marks[0])[1] > 0 for marks in (is_real, chosen))
    if bool((has_any & ~has_target).any()):
        raise ValueError(f"`target` {target} is not a real token of every document of the batch.")
    return chosen.to(entry.dtype)


def mean_weights(entry: EncoderInput, counted: Tensor) -> Tensor:
    """Return one over the number of a document's counted tokens at each of them, else zero: bool [B, N] -> [B, N]."""
    documents = entry.layout.documents
    counts = counted.sum(dim=1, keepdim=True)
    if documents is not None:
        counts = documents.count(counted[0])[1][documents.document_ids][None]
    return counted.to(entry.dtype) / counts.clamp(min=1)
