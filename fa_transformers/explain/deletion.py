"""Faithfulness of scores: how far a classifier's answer falls when the units that score highest are deleted, or kept.

With p the probability of the label and d(k) the input without the first k units of an order, an order has

    AOPC = mean over k = 1 … S of p(input) - p(d(k))

and of scores, comprehensiveness is that of the order from the highest score to the lowest: high where what is deleted
first mattered. Sufficiency is that of the order from the lowest to the highest: low where the highest are enough.

How far p can fall is the model's and the input's: a number alone says little of the scores. Normalised, 0 is the order
of the smallest AOPC that a beam search finds and 1 that of the largest (Edin et al. 2025). Beside these stand orders at
random, and at random with as many tokens deleted, as long units matter by their length alone.

Deleting is masking, as padding is masked; the tokens that remain keep their positions.

Shape letters: B batch, N tokens, S units.
Source: DeYoung et al. 2020, "ERASER", arXiv:1911.03429; Edin et al. 2025, "Normalized AOPC", arXiv:2408.08137.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attribution import answers, check_units, choose_labels, with_mask
from .encoder import EncoderInput, entered


@dataclass(frozen=True)
class Faithfulness:
    """How faithful scores of one document's units are to a model's answer; all in units of probability but the
    normalised ones.

    Attributes:
        comprehensiveness: of deleting the highest first; higher is better.
        sufficiency: of deleting the lowest first; lower is better.
        random: AOPC of orders at random, the mean of all draws: what scores without any sense would have in both.
        length_matched: AOPC of units at random that have, at each step, as many tokens as the highest k have, or as
            near as they come: what comprehensiveness would be by length alone.
        lowest, highest: the smallest and the largest AOPC that were found.
    """

    comprehensiveness: float
    sufficiency: float
    random: float
    length_matched: float
    lowest: float
    highest: float

    def normalize(self, aopc: float) -> float:
        """Return an AOPC between the smallest found, 0, and the largest, 1; NaN where no order differs from another."""
        return (aopc - self.lowest) / (self.highest - self.lowest) if self.highest > self.lowest else float("nan")

    @property
    def normalized_comprehensiveness(self) -> float:
        """The comprehensiveness, from 0 to 1: 1 where no order was found that lets the answer fall sooner."""
        return self.normalize(self.comprehensiveness)

    @property
    def normalized_sufficiency(self) -> float:
        """The sufficiency, from 0 to 1: 0 where no order was found that lets the answer fall later."""
        return self.normalize(self.sufficiency)


def faithfulness(
    model: nn.Module,
    inputs: Mapping[str, Any],
    scores: Tensor,
    units: Tensor,
    target: int | None = None,
    *,
    num_random: int = 5,
    beam_size: int = 3,
    seed: int = 0,
) -> Faithfulness:
    """Measure how far the answer for one document falls as its units are deleted by their scores.

    Of S units it takes up to beam_size · S² forward passes, less where sets of units come back: use passages, tens of
    them at most.

    Args:
        model, inputs, target: as in `attribute`, of one document or image that isn't packed.
        scores: [1, S] or [S], of the units and without NaN, as `attribute` gives them with `units`.
        units: int [1, N], the unit of each token, -1 for tokens that stay.
        num_random: orders that are drawn at random, at least 1.
        beam_size: orders that the search for the extreme ones goes on with at each step, at least 1.
        seed: of the draws.

    Raises:
        TypeError: `model` has no FABert or FAViT encoder, or is no classifier of texts or images.
        ValueError: an argument is unknown or has another shape, a score is NaN, or the model refuses its inputs.
    """
    options = {"num_random": num_random, "beam_size": beam_size, "seed": seed}
    return faithfulness_of_each(model, inputs, {"scores": scores}, units, target, **options)["scores"]


def faithfulness_of_each(
    model: nn.Module,
    inputs: Mapping[str, Any],
    scores: Mapping[str, Tensor],
    units: Tensor,
    target: int | None = None,
    *,
    num_random: int = 5,
    beam_size: int = 3,
    seed: int = 0,
) -> dict[str, Faithfulness]:
    """Return the `faithfulness` of several scores of the same units, by name.

    No set of units is deleted twice, and the smallest and the largest AOPC are those of the search and of all scores.
    """
    for name, number in (("num_random", num_random), ("beam_size", beam_size)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with entered(model, inputs) as entry:
        if len(entry.embeddings) != 1 or entry.layout.documents is not None:
            raise ValueError("`inputs` must be one document or image that isn't packed; call it for each.")
        check_units(units, entry.is_real)
        orders = {name: order_of(one, units) for name, one in scores.items()}
        num_units = int(units.max()) + 1
        labels = choose_labels(answers(model, inputs), target)
        known: dict[frozenset[int], float] = {}

        def probability(deleted: frozenset[int]) -> float:
            if deleted not in known:
                known[deleted] = float(without(model, inputs, entry, units, sorted(deleted)).gather(1, labels[:, None]))
            return known[deleted]

        def fall(deleted: frozenset[int]) -> float:
            return probability(frozenset()) - probability(deleted)

        lengths = [int((entry.is_real & (units == unit)).sum()) for unit in range(num_units)]
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randperm(num_units, generator=generator).tolist() for _ in range(num_random)]
        random = sum(mean_fall(fall, prefixes(draw)) for draw in draws) / num_random
        falls = {
            name: [mean_fall(fall, prefixes(one)) for one in (order, order[::-1])] for name, order in orders.items()
        }
        extremes = [extreme(fall, num_units, beam_size, sign) for sign in (-1, 1)] + sum(falls.values(), [])
        return {
            name: Faithfulness(
                comprehensiveness=falls[name][0],
                sufficiency=falls[name][1],
                random=random,
                length_matched=sum(mean_fall(fall, of_lengths(draw, order, lengths)) for draw in draws) / num_random,
                lowest=min(extremes),
                highest=max(extremes),
            )
            for name, order in orders.items()
        }


def order_of(scores: Tensor, units: Tensor) -> list[int]:
    """Return the units from the highest score to the lowest.

    Raises:
        ValueError: there is not one score for each unit, or one is NaN.
    """
    num_units = int(units.max()) + 1 if units.numel() else 0
    if num_units < 1 or scores.numel() != num_units:
        raise ValueError(
            f"`scores` must have one number for each of {num_units} units, at least one; got {tuple(scores.shape)}."
        )
    if unknown := scores.flatten().isnan().nonzero().flatten().tolist():
        raise ValueError(f"`scores` must be numbers that can be ordered, got NaN for the units {unknown}.")
    return scores.flatten().argsort(descending=True, stable=True).tolist()


def deleted_probabilities(
    model: nn.Module, inputs: Mapping[str, Any], units: Tensor, deletions: Sequence[Sequence[int]]
) -> Tensor:
    """Return the probability of every label without each of some sets of units: [sets, labels], on the CPU.

    A forward pass for each set.

    Args:
        model, inputs, units: as in `faithfulness`.
        deletions: the units of each set.

    Raises:
        TypeError, ValueError: as in `faithfulness`.
    """
    with entered(model, inputs) as entry:
        check_units(units, entry.is_real)
        return torch.cat([without(model, inputs, entry, units, deleted).float().cpu() for deleted in deletions])


def without(
    model: nn.Module, inputs: Mapping[str, Any], entry: EncoderInput, units: Tensor, deleted: Sequence[int]
) -> Tensor:
    """Return the probabilities [1, labels] of one document without some units."""
    gone = torch.isin(units, torch.tensor(deleted, device=units.device, dtype=units.dtype))
    return probabilities(model, answers(model, with_mask(inputs, entry, entry.is_real & ~gone)))


def probabilities(model: nn.Module, logits: Tensor) -> Tensor:
    """Turn a classifier's logits to probabilities, as its problem type says; a regressor's number stays as it is."""
    config: Any = model.config
    if config.problem_type == "multi_label_classification":
        return logits.sigmoid()
    if config.problem_type == "regression" or logits.shape[1] == 1:
        return logits
    return logits.softmax(dim=1)


def prefixes(order: Sequence[int]) -> list[frozenset[int]]:
    """Return the first unit of an order, the first two, and so on to all."""
    return [frozenset(order[:count]) for count in range(1, len(order) + 1)]


def of_lengths(draw: Sequence[int], order: Sequence[int], lengths: Sequence[int]) -> list[frozenset[int]]:
    """Return, for each first k units of an order, the first ones of a draw that have the nearest number of tokens."""

    def size(deleted: frozenset[int]) -> int:
        return sum(lengths[unit] for unit in deleted)

    candidates = [frozenset[int](), *prefixes(draw)]
    return [min(candidates, key=lambda one: abs(size(one) - size(wanted))) for wanted in prefixes(order)]


def mean_fall(fall: Callable[[frozenset[int]], float], steps: Sequence[frozenset[int]]) -> float:
    return sum(map(fall, steps)) / len(steps)


def extreme(fall: Callable[[frozenset[int]], float], num_units: int, beam_size: int, sign: int) -> float:
    """Return the largest AOPC of any order (`sign` 1) or the smallest (-1), as far as a beam search finds it."""
    beam = {frozenset[int](): 0.0}
    for _ in range(num_units):
        grown: dict[frozenset[int], float] = {}
        for deleted, total in beam.items():
            for unit in range(num_units):
                if unit not in deleted:
                    larger = deleted | {unit}
                    grown[larger] = max(grown.get(larger, -torch.inf), total + sign * fall(larger))
        beam = dict(sorted(grown.items(), key=lambda item: -item[1])[:beam_size])
    return sign * max(beam.values()) / num_units
