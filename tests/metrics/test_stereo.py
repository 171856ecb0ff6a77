"""Protects the errors of disparities: definitions, that pixels count alike however they are split, and refusals."""

import numpy as np
import pytest

from fa_transformers.metrics.stereo import StereoScores, score_disparity, total_scores

RANDOM = np.random.default_rng(0)


def make(height: int, width: int, share: float = 0.7):
    true = RANDOM.uniform(1, 120, (height, width)).astype(np.float32)
    predicted = true + RANDOM.normal(0, 4, true.shape).astype(np.float32)
    return predicted, true, RANDOM.random(true.shape) < share


def test_errors_are_those_of_their_definitions():
    # Errors: exactly 1 and 3 are not over them; 4 is over 3 pixels, but not over 5 % of 100.
    true = np.array([[10.0, 10.0, 10.0, 10.0, 100.0, 0.0]])
    predicted = np.array([[10.0, 11.0, 13.0, 6.0, 104.0, np.nan]])
    scores = score_disparity(predicted, true, true > 0).compute()
    assert scores == {"epe": 12 / 5, "over_1px": 3 / 5, "over_3px": 2 / 5, "d1": 1 / 5}


def test_errors_equal_a_loop_over_pixels():
    predicted, true, valid = make(9, 17)
    errors = [abs(float(p) - float(t)) for p, t, v in zip(predicted.flat, true.flat, valid.flat, strict=True) if v]
    truths = [float(t) for t, v in zip(true.flat, valid.flat, strict=True) if v]
    scores = score_disparity(predicted, true, valid).compute()
    assert scores["epe"] == pytest.approx(sum(errors) / len(errors), rel=1e-12)
    assert scores["over_1px"] == sum(error > 1 for error in errors) / len(errors)
    assert scores["over_3px"] == sum(error > 3 for error in errors) / len(errors)
    d1 = sum(error > 3 and error > 0.05 * truth for error, truth in zip(errors, truths, strict=True))
    assert scores["d1"] == d1 / len(errors) < scores["over_3px"]


def test_images_of_all_sizes_add_up_to_one_image_of_all_their_pixels():
    parts = [make(3, 5), make(20, 31, 0.1), make(8, 8, 1.0)]
    whole = [np.concatenate([part[index].reshape(-1) for part in parts]) for index in range(3)]
    together = score_disparity(*whole)
    added = total_scores(score_disparity(*part) for part in parts)
    # The sum of at most 763 terms, in another order.
    assert added.absolute_error == pytest.approx(together.absolute_error, rel=763 * np.finfo(float).eps)
    counts = [(scores.pixels, scores.over_1, scores.over_3, scores.d1) for scores in (added, together)]
    assert counts[0] == counts[1]


def test_what_is_not_valid_changes_nothing():
    predicted, true, valid = make(6, 7)
    expected = score_disparity(predicted, true, valid)
    for values in (predicted, true):
        values[~valid] = np.nan
    assert score_disparity(predicted, true, valid) == expected


def test_what_has_no_score_is_refused():
    predicted, true, valid = make(4, 5)
    with pytest.raises(ValueError, match="no pixel is valid"):
        score_disparity(predicted, true, np.zeros_like(valid))
    with pytest.raises(ValueError, match="no pixel is valid"):
        StereoScores().compute()
    with pytest.raises(ValueError, match="differ in shape"):
        score_disparity(predicted[:, 1:], true, valid)
    with pytest.raises(ValueError, match="must be bool"):
        score_disparity(predicted, true, valid.astype(np.uint8))
    for index, name in enumerate(("predicted", "true")):
        values = [predicted.copy(), true.copy()]
        values[index][valid] = np.inf
        with pytest.raises(ValueError, match=f"{name} holds a disparity that is not finite"):
            score_disparity(*values, valid)
