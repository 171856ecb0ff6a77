"""Folders of stereo pairs as Scene Flow, KITTI and Middlebury lay them out, and pairs read from them.

Scene Flow  frames_finalpass/.../left/0006.png, .../right/0006.png, disparity/.../left/0006.pfm
KITTI 2015  training/image_2/000000_10.png, image_3/..., disp_occ_0/... (or disp_noc_0)
KITTI 2012  training/colored_0/000000_10.png, colored_1/..., disp_occ/... (or disp_noc)
Middlebury  Adirondack/im0.png, im1.png, disp0.pfm (or disp0GT.pfm), calib.txt
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .images import convert_image, image_endings, open_image
from .stereo_files import (
    Calibration,
    read_disparity,
    read_kitti_calibration,
    read_middlebury_calibration,
    read_pfm_size,
    read_png_size,
)
from .tables import DataError, listing

logger = logging.getLogger(__name__)

SCENE_FLOW_PASSES = ("frames_finalpass", "frames_cleanpass")
# Folders of the left image, the right image and the disparities, those of occluded pixels too first.
KITTI_FOLDERS = (
    ("image_2", "image_3", ("disp_occ_0", "disp_noc_0")),
    ("colored_0", "colored_1", ("disp_occ", "disp_noc")),
    ("image_0", "image_1", ("disp_occ", "disp_noc")),
)
MIDDLEBURY_DISPARITIES = ("disp0.pfm", "disp0GT.pfm")
COMPARED_ROWS = 64
"""Rows of a pair on which the direction of the shift is told: each is as telling as the next."""
SWAPPED = 0.7
"""Ratio of the errors of the two directions below which the right one is beyond doubt."""


@dataclass(frozen=True)
class StereoPair:
    """The files of one rectified pair; `disparity` belongs to the left image. `calibration` and it may be missing."""

    name: str
    left: Path
    right: Path
    disparity: Path | None = None
    calibration: Path | None = None

    def read_calibration(self) -> Calibration | None:
        """Read the calibration file, None where there is none; raises DataError as the readers do."""
        if self.calibration is None:
            return None
        is_middlebury = self.calibration.name == "calib.txt"
        return (read_middlebury_calibration if is_middlebury else read_kitti_calibration)(self.calibration)


@dataclass(frozen=True)
class StereoSample:
    """One rectified pair: bytes [H, W, 3] of both images and, where known, float32 and bool [H, W] of the left one."""

    left: np.ndarray
    right: np.ndarray
    disparity: np.ndarray | None = None
    valid: np.ndarray | None = None


def find_stereo_pairs(folder: str | Path, needs_disparity: bool = True) -> list[StereoPair]:
    """Return the pairs of a folder in the layout of Scene Flow, KITTI or Middlebury, sorted by name.

    The folder may be the set, or a part of it: of Scene Flow the one that holds frames_finalpass (taken before
    frames_cleanpass) and disparity, of KITTI "training" or the folder around it, of Middlebury one scene or several.

    Raises:
        DataError: the folder has none of these layouts, no pair, a left image without a right one, or, where
            `needs_disparity`, one without disparities.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    for find in (_find_scene_flow, _find_kitti, _find_middlebury):
        pairs = sorted(find(folder), key=lambda pair: pair.name)
        if pairs:
            break
    else:
        raise DataError(
            f"{folder}: no stereo pairs in the layout of Scene Flow (frames_finalpass/.../left), KITTI (image_2, "
            f"image_3, disp_occ_0) or Middlebury (im0.png, im1.png, disp0.pfm); it holds "
            f"{listing(sorted(path.name for path in folder.iterdir())) or 'nothing'}"
        )
    for role in ("right", "disparity") if needs_disparity else ("right",):
        without = [pair for pair in pairs if not (getattr(pair, role) or folder / "none").is_file()]
        if without:
            raise DataError(
                f"{folder}: {len(without)} of {len(pairs)} left images have no "
                f"{'right image' if role == 'right' else 'disparities'}, first {without[0].left}: add the files or "
                "remove the images"
            )
    return pairs


def _find_scene_flow(folder: Path) -> Iterator[StereoPair]:
    frames = next((folder / name for name in SCENE_FLOW_PASSES if (folder / name).is_dir()), None)
    if frames is None:
        return
    for left in _images_below(frames):
        place = left.relative_to(frames)
        if place.parent.name == "left":
            disparity = folder / "disparity" / place.with_suffix(".pfm")
            right = left.parent.parent / "right" / left.name
            yield StereoPair(place.as_posix(), left, right, disparity if disparity.is_file() else None)


def _find_kitti(folder: Path) -> Iterator[StereoPair]:
    for root in (folder, folder / "training"):
        for left_name, right_name, disparity_names in KITTI_FOLDERS:
            if not (root / left_name).is_dir() or not (root / right_name).is_dir():
                continue
            for left in _images_below(root / left_name):
                # Frames _11 are a moment later, and have no disparities.
                if left.stem.endswith("_11"):
                    continue
                files = [root / name / f"{left.stem}.png" for name in disparity_names]
                calibration = root / "calib_cam_to_cam" / f"{left.stem.partition('_')[0]}.txt"
                yield StereoPair(
                    left.stem,
                    left,
                    root / right_name / left.name,
                    next((path for path in files if path.is_file()), None),
                    calibration if calibration.is_file() else None,
                )
            return


def _find_middlebury(folder: Path) -> Iterator[StereoPair]:
    for left in sorted(folder.rglob("im0.png")):
        scene = left.parent
        files = [scene / name for name in MIDDLEBURY_DISPARITIES]
        calibration = scene / "calib.txt"
        yield StereoPair(
            scene.relative_to(folder).as_posix() if scene != folder else folder.name,
            left,
            scene / "im1.png",
            next((path for path in files if path.is_file()), None),
            calibration if calibration.is_file() else None,
        )


def _images_below(folder: Path) -> list[Path]:
    endings = image_endings()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())


def read_stereo_pair(pair: StereoPair, png_scale: float | None = None) -> StereoSample:
    """Read and check one pair; `png_scale` as in `read_disparity_png`.

    Raises:
        DataError: an image or the disparities are missing or broken, the sizes differ, or left and right are swapped,
            which shows in the disparities fitting the right image better when they are taken with the other sign.
    """
    images = []
    for path in (pair.left, pair.right):
        if not path.is_file():
            raise DataError(f"{path}: there is no such image")
        try:
            images.append(np.asarray(convert_image(open_image(path))))
        except DataError as error:
            raise DataError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    left, right = images
    _check_sizes(pair.left, left.shape[:2], pair.right, right.shape[:2])
    if pair.disparity is None:
        return StereoSample(left, right)
    disparity, valid = read_disparity(pair.disparity, png_scale)
    _check_sizes(pair.left, left.shape[:2], pair.disparity, disparity.shape)
    check_direction(left, right, disparity, valid, f"{pair.left} and {pair.right}")
    return StereoSample(left, right, disparity, valid)


def check_sizes(pairs: list[StereoPair]) -> None:
    """Read the headers of all disparities and left images, and compare their sizes: seconds for thousands of pairs.

    Raises:
        DataError: a file can't be read, or two sizes of a pair differ; the message names both files.
    """
    for pair in pairs:
        sizes = {path: read_image_size(path) for path in (pair.left, pair.right, pair.disparity) if path is not None}
        for path, size in sizes.items():
            _check_sizes(pair.left, sizes[pair.left], path, size)


def read_image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of an image or of disparities, of PFM and PNG files from the header."""
    if path.suffix.lower() == ".pfm":
        return read_pfm_size(path)
    if path.suffix.lower() == ".png":
        return read_png_size(path)
    image = open_image(path)
    return image.height, image.width


def _check_sizes(path: Path, size: tuple[int, ...], other: Path, other_size: tuple[int, ...]) -> None:
    if size != other_size:
        raise DataError(
            f"{other}: {other_size[1]} x {other_size[0]} pixels, but {path} has {size[1]} x {size[0]}: the images and "
            "the disparities of a pair must have one size"
        )


def check_direction(left: np.ndarray, right: np.ndarray, disparity: np.ndarray, valid: np.ndarray, where: str) -> None:
    """Check that the disparities lead from the left image to the right one, and not the other way.

    Compared are the median differences between left(x) and right(x - d), and between left(x) and right(x + d), over the
    pixels for which both lie inside. Where neither fits, as between two unrelated images, nothing is said.

    Raises:
        DataError: the second difference is clearly smaller; the message begins with `where`.
    """
    rows = np.linspace(0, len(left) - 1, min(COMPARED_ROWS, len(left))).round().astype(int)
    row, column = np.nonzero(valid[rows])
    shift = disparity[rows][row, column].round().astype(int)
    inside = (column - shift >= 0) & (column + shift < left.shape[1]) & (shift > 0)
    row, column, shift = rows[row[inside]], column[inside], shift[inside]
    if not len(row):
        return
    here = left[row, column].astype(np.float32)
    forward = float(np.median(np.abs(here - right[row, column - shift]).mean(axis=1)))
    backward = float(np.median(np.abs(here - right[row, column + shift]).mean(axis=1)))
    if backward < SWAPPED * forward:
        raise DataError(
            f"{where}: left and right are swapped: at the disparities given the images differ by {forward:.1f} grey "
            f"values, and taken with the other sign by {backward:.1f}; exchange the two images"
        )
