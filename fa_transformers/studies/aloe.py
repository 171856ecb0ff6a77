"""A real stereo pair that no network here was trained on, Aloe: errors of ours beside OpenCV's semi-global matching.

The pair and its dense disparities lie in Debian's package opencv-doc: `apt-get install opencv-doc`. Its disparities
reach 211 px, more than a small network looks for, so that this one reads the pair at a smaller size; its answer is
brought back, and all errors are in pixels of the whole image.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..charts import chart_style, draw_maps, new_figure, save_figure
from ..data.readers.stereo_folders import StereoPair, StereoSample, read_stereo_pair
from ..data.readers.tables import DataError
from ..metrics.stereo import score_disparity
from ..models import FAStereoConfig, FAStereoForDepthEstimation, FAStereoImageProcessor
from ..models.configuration_fa_stereo import STRIDE
from ..training.stereo_pictures import predict_disparity

FILES = {"left": "aloeL.jpg", "right": "aloeR.jpg", "disparity": "aloeGT.png"}
PACKAGE = "Debian's package opencv-doc (apt-get install opencv-doc: /usr/share/doc/opencv-doc/examples/data)"
SGBM_LEVELS, SGBM_BLOCK = 224, 3
"""Disparities and side of the blocks of OpenCV's matching: the first multiple of 16 above 211, and its best block."""
SGBM = "OpenCV SGBM"
RECORDED = {
    "method": f"{SGBM} (recorded)", "max_disparity": SGBM_LEVELS, "scale": 1.0, "answered": 0.723, "epe_answered": 1.22,
    "epe": 3.03, "over_3px": 0.125,
}  # fmt: skip
"""Row of opencv-python-headless 5.0.0.93, as `score_aloe` measured it: shown where OpenCV is not installed."""
AGREEMENT_PX = 2.0
"""Difference of the disparities from either view, in pixels of what the network reads, up to which they agree."""
NO_BLOCKS = "no blocks"
WORST_ERROR_PX = 20.0
"""Error from which on the picture of errors is at its darkest."""


@dataclass(frozen=True)
class AloeResult:
    """Rows of the table, and the disparities [H, W] that the picture shows, by method, a network's last ones."""

    rows: list[dict[str, Any]]
    maps: dict[str, np.ndarray]


def read_aloe(folder: Path) -> StereoSample:
    """Read the pair and its true disparities; raises DataError, naming the package, where a file is missing."""
    if missing := [name for name in FILES.values() if not (folder / name).is_file()]:
        raise DataError(f"{folder}: {', '.join(missing)} not found; the files come with {PACKAGE}")
    return read_stereo_pair(StereoPair("Aloe", **{role: folder / name for role, name in FILES.items()}), png_scale=1.0)


def fitting_scale(sample: StereoSample, max_disparity: int) -> float:
    """Return the largest factor at which the largest true disparity is one that the network can tell.

    Its levels lie `STRIDE` px apart, and a mean of them is at most the last one, `max_disparity` - `STRIDE`.
    """
    assert sample.disparity is not None
    return min(1.0, (max_disparity - STRIDE) / float(sample.disparity.max()))


def match_blocks(sample: StereoSample) -> tuple[np.ndarray, np.ndarray] | None:
    """Return disparities of OpenCV's matching (all 8 directions) and where it tells one; None without OpenCV."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)
    area = 3 * SGBM_BLOCK**2
    matcher = cv2.StereoSGBM_create(
        minDisparity=0, numDisparities=SGBM_LEVELS, blockSize=SGBM_BLOCK, P1=8 * area, P2=32 * area, disp12MaxDiff=1,
        uniquenessRatio=10, speckleWindowSize=100, speckleRange=2, mode=cv2.STEREO_SGBM_MODE_HH,
    )  # fmt: skip
    # In sixteenths of a pixel; what is below zero has no match.
    disparity = matcher.compute(sample.left, sample.right).astype(np.float32) / 16
    return disparity, disparity > 0


def fill_holes(disparity: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Give each unknown place the lesser one of the nearest known disparities of its row, as KITTI's evaluation does.

    The lesser one is of what lies farther away, and what has no match is mostly hidden behind something. A row without
    any takes those of the nearest row that has some.
    """
    filled = np.where(known, disparity, np.inf)
    rows = np.flatnonzero(known.any(axis=1))
    if not len(rows):
        raise ValueError("no disparity is known: there is nothing to fill holes with")
    columns = np.arange(disparity.shape[1])
    for row in rows:
        there = np.flatnonzero(known[row])
        after = np.searchsorted(there, columns).clip(max=len(there) - 1)
        before = (np.searchsorted(there, columns, side="right") - 1).clip(min=0)
        nearest = np.minimum(disparity[row, there[before]], disparity[row, there[after]])
        filled[row] = np.where(known[row], disparity[row], nearest)
    closest = rows[np.abs(rows[:, None] - np.arange(len(disparity))).argmin(axis=0)]
    return filled[closest].astype(np.float32)


def find_agreeing(from_left: np.ndarray, from_right: np.ndarray, limit: float) -> np.ndarray:
    """Return bool [H, W], True where a left pixel's disparity is that of the right pixel that it points at.

    Elsewhere it points outside, is hidden in the right view, or is wrong: both views seldom err alike.

    Args:
        from_left, from_right: disparities [H, W] of the left and of the right image.
        limit: pixels that the two may differ by.
    """
    width = from_left.shape[1]
    there = np.rint(np.arange(width) - from_left).astype(int)
    from_there = np.take_along_axis(from_right, there.clip(0, width - 1), axis=1)
    return (np.abs(from_there - from_left) <= limit) & (there >= 0) & (there < width)


def predict_both(
    model: FAStereoForDepthEstimation, processor: FAStereoImageProcessor, sample: StereoSample
) -> tuple[np.ndarray, np.ndarray]:
    """Return the left image's disparities [H, W] and where the right image's `find_agreeing`.

    Seen in a mirror, the right camera is the left one.
    """
    left, right = (np.ascontiguousarray(image[:, ::-1]) for image in (sample.left, sample.right))
    from_left = predict_disparity(model, processor, sample.left, sample.right)
    from_right = predict_disparity(model, processor, right, left)[:, ::-1]
    return from_left, find_agreeing(from_left, from_right, AGREEMENT_PX / processor.scale_factor)


def score_aloe(folders: Sequence[Path], sample: StereoSample, max_disparities: Sequence[int] = ()) -> AloeResult:
    """Score networks and OpenCV's matching on the pair.

    Each network reads the pair at its `fitting_scale`. No weight depends on `max_disparity`, so that a network can look
    for more than it was trained for, on larger images: `max_disparities` are tried besides its own. A network has two
    rows: as it answers, and with what the right view contradicts filled as holes, as OpenCV's matching is.

    Returns:
        `rows` with the method, its `max_disparity`, the `scale` of the images, the share of the valid pixels that are
        `answered` and the end-point error there, `epe` and `over_3px` over all valid pixels, and CPU seconds.
    """
    assert sample.disparity is not None and sample.valid is not None
    true, valid = sample.disparity, sample.valid
    rows: list[dict[str, Any]] = []
    maps: dict[str, np.ndarray] = {}

    def add(method: str, disparity: np.ndarray, answered: np.ndarray, started: float, **more: Any) -> None:
        seconds = time.process_time() - started
        there = score_disparity(disparity, true, valid & answered).compute()["epe"]
        filled = fill_holes(disparity, answered)
        scores = score_disparity(filled, true, valid).compute()
        share = float(answered[valid].mean())
        rows.append({"method": method} | more | {"answered": share, "epe_answered": there, "epe": scores["epe"]})
        rows[-1] |= {"over_3px": scores["over_3px"], "cpu_seconds": seconds}
        maps[method] = filled

    for folder in folders:
        model = FAStereoForDepthEstimation.from_pretrained(folder).eval()
        for limit in dict.fromkeys([model.config.max_disparity, *max_disparities]):
            model.config.max_disparity = limit
            model.config.check_fields()
            scale = fitting_scale(sample, limit)
            processor = FAStereoImageProcessor.from_pretrained(folder)
            processor.scale_factor = scale
            name = describe_network(folder, model.config)
            started = time.process_time()
            disparity = predict_disparity(model, processor, sample.left, sample.right)
            add(name, disparity, np.ones_like(valid), started, max_disparity=limit, scale=scale)
            started = time.process_time()
            checked = predict_both(model, processor, sample)
            add(f"{name}, both views", *checked, started, max_disparity=limit, scale=scale)
    started = time.process_time()
    matched = match_blocks(sample)
    if matched is None:
        rows.append(dict(RECORDED))
    else:
        add(SGBM, *matched, started, max_disparity=SGBM_LEVELS, scale=1.0)
    return AloeResult(rows, maps)


def describe_network(folder: Path, config: FAStereoConfig) -> str:
    """Return where a network's attention blocks stand, and its folder's name, as tables and pictures say it."""
    places = f"blocks on {', '.join(config.attention_blocks)}" if config.attention_blocks else NO_BLOCKS
    return f"{places} ({folder.name})"


def draw_aloe(sample: StereoSample, maps: dict[str, np.ndarray], path: Path) -> None:
    """Write one picture to `path`: the left image and the truth, and below them each method's map and its errors."""
    assert sample.disparity is not None and sample.valid is not None
    known = np.where(sample.valid, sample.disparity, np.nan)
    scale: dict[str, Any] = {"vmin": 0.0, "vmax": float(np.nanmax(known)), "cmap": "turbo"}
    height, width = known.shape
    with chart_style():
        figure, axes = new_figure(1 + len(maps), 2, size=(10, (1 + len(maps)) * (4.3 * height / width + 0.3)))
        panels: list[tuple[str, np.ndarray, dict[str, Any]]] = [
            ("left image", sample.left, {}),
            ("true disparity", known, scale),
        ]
        for name, disparity in maps.items():
            error = np.where(sample.valid, np.abs(disparity - sample.disparity), np.nan)
            errors = {"vmin": 0.0, "vmax": WORST_ERROR_PX, "cmap": "Reds"}
            panels += [(name, disparity, scale), (f"its errors: {np.nanmean(error):.2f} px in the mean", error, errors)]
        draw_maps(figure, axes, panels, unit="px")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)
