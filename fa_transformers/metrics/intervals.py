"""Intervals of scores: how far a score on other examples of the same kind may lie from the one measured."""

import math
from collections.abc import Mapping

from ..tables import counted

FEW_EXAMPLES = 30
"""Examples below which a score is shown with its interval."""
SCORE_NAMES = ("accuracy", "macro_f1", "micro_f1", "mse", "mae", "pearson", "spearman")
"""Scores in the order of tables."""
PROPORTIONS = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("accuracy",),
    "regression": (),
}
"""By problem type the scores that are a share of right examples, whose interval is known for any number of them."""
_NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %


def wilson_interval(share: float, num_examples: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `num_examples` examples by Wilson (1927), which holds for few of them too.

    Its ends are (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n), z = 1.96.

    Raises:
        ValueError: there are no examples, or the share is not between 0 and 1.
    """
    if num_examples < 1 or not 0 <= share <= 1:
        raise ValueError(f"an interval needs a share from 0 to 1 of 1 or more examples, got {share} of {num_examples}.")
    z2 = _NORMAL_QUANTILE**2 / num_examples
    half_width = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (share + z2 / 2 - half_width) / (1 + z2)), min(1.0, (share + z2 / 2 + half_width) / (1 + z2))


def score_intervals(
    scores: Mapping[str, float], num_examples: int, problem_type: str
) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals of those scores that have one, by name."""
    names = [name for name in PROPORTIONS[problem_type] if name in scores]
    return {name: wilson_interval(scores[name], num_examples) for name in names}


def describe_intervals(scores: Mapping[str, float], num_examples: int, problem_type: str) -> list[str]:
    """Return sentences on the 95 % intervals of scores, for terminal and card alike.

    They say of which scores there are too few examples for one.
    """
    intervals = score_intervals(scores, num_examples, problem_type)
    sentences = []
    if "accuracy" in intervals:
        low, high = intervals["accuracy"]
        sentences.append(f"The 95 % interval of its accuracy is {low:.3f} to {high:.3f}.")
    others = [name for name in scores if name not in intervals and name != "loss"]
    if num_examples < FEW_EXAMPLES and others:
        few = counted(num_examples, "example", "is", "are")
        sentences.append(f"{few} too few for an interval of its {', '.join(others)}.")
    return sentences
