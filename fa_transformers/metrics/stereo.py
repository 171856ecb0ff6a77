"""Errors of disparities, counted pixel by pixel over any number of images and processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BAD_PIXELS = (1.0, 3.0)
D1_PIXELS, D1_SHARE = 3.0, 0.05


@dataclass(frozen=True)
class StereoScores:
    """Sums over valid pixels, from which the scores follow: those of parts add up to those of the whole.

    Every pixel counts alike, so a larger image counts more. KITTI and Middlebury average so within an image; an average
    of images' scores is another number.

    Args:
        pixels: number of valid pixels.
        absolute_error: sum of |predicted - true|, in pixels.
        over_1, over_3: number of pixels with an error over 1 and over 3.
        d1: number of pixels with an error over 3 and over 5 % of the true disparity (KITTI 2015).
    """

    pixels: int = 0
    absolute_error: float = 0.0
    over_1: int = 0
    over_3: int = 0
    d1: int = 0

    def __add__(self, other: StereoScores) -> StereoScores:
        return StereoScores(
            self.pixels + other.pixels,
            self.absolute_error + other.absolute_error,
            self.over_1 + other.over_1,
            self.over_3 + other.over_3,
            self.d1 + other.d1,
        )

    def compute(self) -> dict[str, float]:
        """Return `epe` (end-point error, the mean of |predicted - true| in pixels) and the shares `over_1px`,
        `over_3px` and `d1`, from 0 to 1.

        Raises:
            ValueError: no pixel was counted.
        """
        if not self.pixels:
            raise ValueError("no pixel is valid: the errors of no pixels are undefined; give images with disparities")
        return {
            "epe": self.absolute_error / self.pixels,
            "over_1px": self.over_1 / self.pixels,
            "over_3px": self.over_3 / self.pixels,
            "d1": self.d1 / self.pixels,
        }


def score_disparity(predicted: np.ndarray, true: np.ndarray, valid: np.ndarray) -> StereoScores:
    """Score predicted disparities, in pixels, where `valid`; other places may hold anything.

    Args:
        predicted, true: numbers [..., H, W].
        valid: bool of the same shape.

    Raises:
        ValueError: the shapes differ, `valid` is not bool or nowhere true, or a number is not finite where it is.
    """
    if not predicted.shape == true.shape == valid.shape:
        raise ValueError(f"predicted, true and valid differ in shape: {predicted.shape}, {true.shape}, {valid.shape}")
    if valid.dtype != bool:
        raise ValueError(f"valid must be bool, got {valid.dtype}")
    if not valid.any():
        raise ValueError("no pixel is valid: leave the image out or give it disparities")
    found, expected = predicted[valid].astype(np.float64), true[valid].astype(np.float64)
    for name, values in (("predicted", found), ("true", expected)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds a disparity that is not finite; lower the learning rate or mend the data")
    error = np.abs(found - expected)
    over_1, over_3 = (int((error > limit).sum()) for limit in BAD_PIXELS)
    d1 = int(((error > D1_PIXELS) & (error > D1_SHARE * np.abs(expected))).sum())
    return StereoScores(len(error), float(error.sum()), over_1, over_3, d1)


def total_scores(scores: Iterable[StereoScores]) -> StereoScores:
    """Add the scores of images or processes up."""
    return sum(scores, StereoScores())
