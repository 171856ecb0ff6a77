"""Errors and correlations for regression, as one `evaluate.Metric`."""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error

DESCRIPTION = "Scores of a regressor, computed with scikit-learn and SciPy; needs no network."
INPUTS = """
Args:
    predictions: predicted numbers.
    references: true numbers.
"""


class RegressionMetric(evaluate.Metric):
    """Scores over all examples added so far.

    `compute(predictions, references)` returns `mse` (squared units of the label), `mae` (units of the label), and the
    correlations `pearson` and `spearman`, which are None where undefined: fewer than two examples, or a constant side.

    Raises:
        ValueError: there are no examples, or a number is not finite.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        )
        # Not format="numpy": datasets would round the numbers to float32.
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions: list[float] | np.ndarray, references: list[float] | np.ndarray) -> dict:
        return score_numbers(predictions, references)


def score_numbers(predictions: list[float] | np.ndarray, references: list[float] | np.ndarray) -> dict:
    """Return the scores that `RegressionMetric` describes, of numbers [examples]."""
    if len(references) == 0:
        raise ValueError("references is empty: the scores of no examples are undefined; evaluate at least one.")
    predicted, true = np.asarray(predictions), np.asarray(references)
    for name, values in (("predictions", predicted), ("references", true)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} hold a number that is not finite; lower the learning rate or mend the data.")
    correlated = len(true) > 1 and np.ptp(predicted) > 0 and np.ptp(true) > 0
    return {
        "mse": float(mean_squared_error(true, predicted)),
        "mae": float(mean_absolute_error(true, predicted)),
        "pearson": float(pearsonr(true, predicted).statistic) if correlated else None,
        "spearman": float(spearmanr(true, predicted).statistic) if correlated else None,
    }
