"""Faithfulness equals what every order of the units gives, built by hand, and orders scores as the answer does."""

import itertools
import math
import statistics

import pytest
import torch
from tiny_models import build, randomize, text_inputs

from fa_transformers import attribute, faithfulness
from fa_transformers.explain import deletion
from fa_transformers.explain.deletion import deleted_probabilities, faithfulness_of_each
from fa_transformers.models import FABertConfig, FABertForSequenceClassification

NUM_TEXTS = 12
METHODS = ("gradient_x_input", "rollout", "rows", "occlusion")
LENGTHS = [1, 2, 3, 9]  # tokens of each unit, behind CLS and before SEP


@pytest.fixture(scope="module")
def document():
    model = build(FABertConfig, FABertForSequenceClassification, classifier_pooling="mean", num_hidden_layers=1)
    units = torch.tensor([[-1, *(unit for unit, length in enumerate(LENGTHS) for _ in range(length)), -1]])
    return model.double(), text_inputs("AutoModel", (17,)), units


def falls_of(model, inputs, units) -> dict[frozenset, float]:
    """How far the probability of label 1 falls without each set of units, with the positions that tokens have."""
    probabilities = {}
    for size in range(5):
        for deleted in itertools.combinations(range(4), size):
            mask = torch.tensor([[unit not in deleted for unit in units[0].tolist()]])
            with torch.no_grad():
                logits = model(**{**inputs, "attention_mask": mask, "position_ids": torch.arange(17)[None]}).logits
            probabilities[frozenset(deleted)] = float(logits.softmax(dim=1)[0, 1])
    return {deleted: probabilities[frozenset()] - probability for deleted, probability in probabilities.items()}


def test_every_number_is_that_of_its_orders(document):
    falls = falls_of(*document)
    aopc = {
        order: sum(falls[frozenset(order[:count])] for count in range(1, 5)) / 4
        for order in itertools.permutations(range(4))
    }
    lowest, highest = min(aopc.values()), max(aopc.values())
    scores = torch.tensor([0.3, -0.2, 0.9, 0.1])
    result = faithfulness(*document[:2], scores[None], document[2], 1, num_random=400, beam_size=24)
    first, last = aopc[2, 0, 3, 1], aopc[1, 3, 0, 2]
    assert math.isclose(result.comprehensiveness, first, abs_tol=1e-12)
    assert math.isclose(result.sufficiency, last, abs_tol=1e-12)
    assert math.isclose(result.normalized_comprehensiveness, (first - lowest) / (highest - lowest), abs_tol=1e-9)
    assert math.isclose(result.normalized_sufficiency, (last - lowest) / (highest - lowest), abs_tol=1e-9)
    # Numbers within a range deviate by half of it at most, and the mean of 400 by a twentieth of that: four of these.
    assert abs(result.random - sum(aopc.values()) / 24) < (highest - lowest) / 10


def test_probabilities_without_some_units_are_those_of_a_mask(document):
    falls = falls_of(*document)
    sets = [[], [2], [3, 0]]
    found = deleted_probabilities(*document, sets)
    assert found.shape == (3, 2) and torch.allclose(found.sum(dim=1), torch.ones(3))
    for row, deleted in zip(found, sets, strict=True):
        assert math.isclose(float(found[0, 1] - row[1]), falls[frozenset(deleted)], abs_tol=1e-6)


def test_the_control_of_equal_length_deletes_as_many_tokens(document):
    falls = falls_of(*document)
    result = faithfulness(*document[:2], torch.tensor([0.0, 1.0, 2.0, 3.0]), document[2], 1, num_random=1, seed=3)
    draw = torch.randperm(4, generator=torch.Generator().manual_seed(3)).tolist()
    expected = 0.0
    for tokens in (9, 12, 14, 15):  # of the longest unit, the two longest, and so on
        sizes = [sum(LENGTHS[unit] for unit in draw[:count]) for count in range(5)]
        nearest = min(range(5), key=lambda count: abs(sizes[count] - tokens))
        expected += falls[frozenset(draw[:nearest])] / 4
    assert math.isclose(result.length_matched, expected, abs_tol=1e-12)


def test_scores_that_are_the_answers_falls_are_more_faithful_than_their_opposite(document):
    falls = falls_of(*document)
    scores = torch.tensor([falls[frozenset([unit])] for unit in range(4)])
    good, bad = (faithfulness(*document[:2], sign * scores, document[2], 1) for sign in (1, -1))
    assert good.normalized_comprehensiveness > bad.normalized_comprehensiveness == good.normalized_sufficiency


def test_several_scores_share_one_search_and_are_what_each_is_alone(document, monkeypatch):
    scores = {"up": torch.arange(4.0), "down": -torch.arange(4.0), "other": torch.tensor([0.0, 2.0, 1.0, 3.0])}
    each = faithfulness_of_each(document[0], document[1], scores, document[2], 1, beam_size=24)
    for name, one in scores.items():
        assert each[name] == faithfulness(*document[:2], one, document[2], 1, beam_size=24)
    monkeypatch.setattr(deletion, "extreme", lambda *_: 0.0)  # a search that finds nothing
    each = faithfulness_of_each(document[0], document[1], scores, document[2], 1)
    numbers = [number for one in each.values() for number in (one.comprehensiveness, one.sufficiency)]
    assert {(one.lowest, one.highest) for one in each.values()} == {(min(0.0, *numbers), max(0.0, *numbers))}


def test_scores_of_other_weights_are_no_better_than_random_and_have_another_order():
    sizes = {"classifier_pooling": "mean", "position_embedding_type": "none", "num_hidden_layers": 1}
    model, other = (build(FABertConfig, FABertForSequenceClassification, **sizes) for _ in range(2))
    units = torch.arange(10)[None] // 2
    above: dict[str, list[float]] = {}
    correlations: dict[str, list[float]] = {}
    for seed in range(NUM_TEXTS):
        inputs = text_inputs("AutoModel", (10,), seed=seed)
        randomize(other, seed=1 + seed)  # weights of its own for each text, so that the texts are independent
        scores = {method: attribute(other, inputs, 1, method, units) for method in METHODS}
        for method, theirs in scores.items():
            ranks = [one[0].argsort().argsort() for one in (attribute(model, inputs, 1, method, units), theirs)]
            correlations.setdefault(method, []).append(float(torch.corrcoef(torch.stack(ranks).double())[0, 1]))
        for method, one in faithfulness_of_each(model, inputs, scores, units, 1, beam_size=1).items():
            above.setdefault(method, []).append(one.normalized_comprehensiveness - one.normalize(one.random))
    # A rank correlation of five units has the variance 1 / 4, and an order's place between the extremes at most that.
    for values in (*correlations.values(), *above.values()):
        assert abs(statistics.fmean(values)) < 3 * math.sqrt(1 / 4 / NUM_TEXTS)


ERRORS = {
    "`num_random`": {"num_random": 0},
    "`beam_size`": {"beam_size": 0},
    "`scores` must have one number for each of 4 units": {"scores": torch.zeros(3)},
    r"`scores` must be numbers .* units \[2\]": {"scores": torch.tensor([[0.0, 1.0, torch.nan, 2.0]])},
    "`units` must be integers": {"units": torch.zeros(1, 3, dtype=torch.long)},
    "`target`": {"target": 2},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(document, message):
    model, inputs, units = document
    with pytest.raises(ValueError, match=message):
        faithfulness(model, inputs, **{"scores": torch.zeros(4), "units": units, **ERRORS[message]})


def test_several_documents_are_refused(document):
    with pytest.raises(ValueError, match="`inputs` must be one document"):
        faithfulness(document[0], text_inputs("AutoModel"), torch.zeros(1), torch.zeros(2, 11, dtype=torch.long))
