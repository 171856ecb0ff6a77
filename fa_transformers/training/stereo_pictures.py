"""Pictures of a stereo network's disparities and of their errors, beside the images and the truth."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..charts import chart_style, draw_maps, new_figure, save_figure
from ..data.stereo_examples import Samples
from ..metrics.stereo import score_disparity

logger = logging.getLogger(__name__)

NUM_PICTURES = 3
WORST_ERROR_PX = 5.0
"""Error from which on the picture of errors is at its darkest."""


@torch.no_grad()
def predict_disparity(
    model: PreTrainedModel, processor: BaseImageProcessor, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Return the disparities of a pair of images, bytes [H, W, 3], at the images' own size: float32 [H, W]."""
    inputs = processor((left, right), return_tensors="pt").to(model.device)
    (result,) = processor.post_process_disparity(model(**inputs), [left.shape[:2]])
    return result["disparity"].float().cpu().numpy()


def draw_pictures(model: PreTrainedModel, processor: BaseImageProcessor, samples: Samples, folder: Path) -> None:
    """Draw the first pairs of `samples` into `folder`: left image, true and found disparities, and errors.

    A picture is decoration: a failure is a warning.
    """
    for index in range(min(NUM_PICTURES, len(samples))):
        try:
            sample = samples[index]
            predicted = predict_disparity(model, processor, np.asarray(sample.left), np.asarray(sample.right))
            draw_pair(
                np.asarray(sample.left), np.asarray(sample.disparity), np.asarray(sample.valid), predicted,
                folder / f"{index + 1}.png",
            )  # fmt: skip
        except Exception as error:  # whatever it is: the run is complete without the picture
            logger.warning("picture %d was not drawn: %s: %s", index + 1, type(error).__name__, error)


def draw_pair(left: np.ndarray, true: np.ndarray, valid: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """Write one picture with four panels to `path`; where no disparity is known, truth and error stay white."""
    scores = score_disparity(predicted, true, valid).compute()
    known = np.where(valid, true, np.nan)
    error = np.where(valid, np.abs(predicted - true), np.nan)
    scale: dict[str, Any] = {"vmin": 0.0, "vmax": float(np.nanmax(known)), "cmap": "turbo"}
    panels: tuple[tuple[str, np.ndarray, dict[str, Any]], ...] = (
        ("left image", left, {}),
        ("true disparity", known, scale),
        ("found disparity", predicted, scale),
        (
            f"error: {scores['epe']:.2f} px in the mean, {scores['over_3px']:.1%} over 3 px",
            error,
            {"vmin": 0.0, "vmax": WORST_ERROR_PX, "cmap": "Reds"},
        ),
    )
    height, width = left.shape[:2]
    with chart_style():
        figure, axes = new_figure(2, 2, size=(10, 10 * height / width + 1))
        draw_maps(figure, axes, panels, unit="px")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)
