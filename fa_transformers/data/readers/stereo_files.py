"""The files of stereo data sets: disparities in PFM and PNG, and calibrations.

A reader of disparities returns (disparity, valid): float32 [H, W] in pixels of the left image, rows from the top, and
bool [H, W], True where the file tells a disparity. A disparity d at column x of the left image says that the same point
stands at column x - d of the right one. Where a file tells none, `disparity` is 0, so no inf or NaN gets into sums.

    Format       Written by                      No disparity there
    PFM          Scene Flow, Middlebury          inf, 0 (NaN too, which is counted in a warning)
    16-bit PNG   KITTI: 256 times the disparity  0
    8-bit PNG    Middlebury 2001 to 2006         0; the scale must be given
"""

import logging
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .images import open_image
from .tables import DataError

logger = logging.getLogger(__name__)

KITTI_SCALE = 256.0
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PFM_CHANNELS = {b"Pf": 1, b"PF": 3}
HEADER_BYTES = 512
"""Bytes of a PFM file within which its header ends; a comment is the only part that may be long."""

Disparity = tuple[np.ndarray, np.ndarray]
"""Disparities, float32 [H, W], and bool [H, W], True where there is one."""


@dataclass(frozen=True)
class Calibration:
    """The geometry of a rectified pair, from which a disparity d becomes a depth: f · B / (d + doffs).

    Args:
        focal_length: f, in pixels.
        baseline: B, the distance between the cameras, in metres.
        doffs: column of the right camera's principal point less the left one's, in pixels.
        max_disparity: bound on the disparities that the file states (`ndisp`), None where it states none.
        size: (height, width) of the images that the file states, None where it states none.
    """

    focal_length: float
    baseline: float
    doffs: float = 0.0
    max_disparity: int | None = None
    size: tuple[int, int] | None = None


def read_pfm(path: str | Path) -> np.ndarray:
    """Read a portable float map: float32 [H, W] of a grey one (`Pf`), [H, W, 3] of a coloured one (`PF`).

    The header is three fields divided by white space: the kind, width and height, and a number whose sign is the byte
    order (negative: little-endian). Rows stand bottom first in the file and top first in the result. Values are
    returned as they stand, whatever the number's size: Middlebury writes 0.003922 for values that are pixels.

    Raises:
        DataError: the file is no PFM, a field can't be read, or there are more or fewer values than the header says.

    Source: https://www.pauldebevec.com/Research/HDR/PFM/
    """
    path = Path(path)
    content = path.read_bytes()
    (height, width, channels), order, start = _read_pfm_header(path, content[:HEADER_BYTES])
    expected, found = 4 * height * width * channels, len(content) - start
    if found != expected:
        state = "truncated" if found < expected else "longer than its header says"
        raise DataError(
            f"{path}: the file is {state}: {width} x {height} x {channels} values take {expected} bytes, but {found} "
            "follow the header; copy it again"
        )
    values = np.frombuffer(content, np.dtype(np.float32).newbyteorder(order), offset=start)
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.ascontiguousarray(values.reshape(shape)[::-1], dtype=np.float32)


def read_pfm_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) from the header of a PFM file; raises DataError as `read_pfm` does."""
    with open(path, "rb") as file:
        (height, width, _), _, _ = _read_pfm_header(Path(path), file.read(HEADER_BYTES))
    return height, width


def _read_pfm_header(path: Path, head: bytes) -> tuple[tuple[int, int, int], Literal["<", ">"], int]:
    """Return (height, width, channels), the byte order and the number of bytes of the header."""
    kind = head[:2]
    if kind not in PFM_CHANNELS or not head[2:3].isspace():
        raise DataError(f"{path}: no PFM file: it must begin with Pf (grey) or PF (colour), got {head[:8]!r}")
    # Exactly one byte of white space ends the header: what follows may be a value that looks like one.
    match = re.match(rb"P[fF]\s+(?:#[^\n]*\s+)*(\S+)\s+(\S+)\s+(\S+)(?:\r\n|\s)", head)
    if match is None:
        raise DataError(f"{path}: the header of the PFM file is cut off: it needs width, height and byte order")
    try:
        width, height, scale = int(match[1]), int(match[2]), float(match[3])
    except ValueError as error:
        raise DataError(f"{path}: the header of the PFM file has a field that is no number: {match[0]!r}") from error
    if width < 1 or height < 1:
        raise DataError(f"{path}: the PFM file must have pixels, but its header says {width} x {height}")
    if scale == 0 or not math.isfinite(scale):
        raise DataError(
            f"{path}: the third field of the PFM header tells the byte order by its sign and can't be {scale:g}"
        )
    return (height, width, PFM_CHANNELS[kind]), "<" if scale < 0 else ">", match.end()


def read_disparity_pfm(path: str | Path) -> Disparity:
    """Read disparities from a PFM file of Scene Flow or Middlebury; inf, NaN and 0 mean that there is none.

    Of a coloured file all channels must be equal.

    Raises:
        DataError: as `read_pfm`; the channels differ; a disparity is negative; or there is none.
    """
    values = read_pfm(path)
    if values.ndim == 3:
        if not np.array_equal(values.min(axis=2), values.max(axis=2), equal_nan=True):
            raise DataError(f"{path}: the channels of the PFM file differ, so it holds no disparities but a picture")
        values = values[:, :, 0]
    return _separate(Path(path), values, values)


def read_disparity_png(path: str | Path, scale: float | None = None) -> Disparity:
    """Read disparities from a grey PNG file: its values divided by `scale`; 0 means that there is none.

    Args:
        scale: None for KITTI's format, 16 bits of 256 times the disparity. A number allows 8 bits too.

    Raises:
        DataError: the file is no grey PNG of that depth, is broken, or tells no disparity.
        ValueError: `scale` is not a positive number.
    """
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"`scale` must be a positive number, got {scale!r}.")
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(26)
    if len(head) < 26 or not head.startswith(PNG_SIGNATURE):
        raise DataError(f"{path}: no PNG file, but disparities are read from .png (or .pfm); got {head[:8]!r}")
    bits, colour_type = head[24], head[25]
    if colour_type != 0:
        raise DataError(f"{path}: disparities are grey PNG files, but this one has colours: is it a picture of them?")
    if bits != 16 and (scale is None or bits != 8):
        raise DataError(
            f"{path}: the PNG file has {bits} bits a pixel, but disparities of KITTI have 16 (256 times the "
            "disparity): if its scale is known, read it with `read_disparity_png(path, scale=...)`"
        )
    stored = np.asarray(open_image(path)).astype(np.float32)
    return _separate(path, stored / np.float32(scale or KITTI_SCALE), stored)


def read_png_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) from the header of a PNG file; raises DataError where it is none."""
    with open(path, "rb") as file:
        head = file.read(24)
    if len(head) < 24 or not head.startswith(PNG_SIGNATURE):
        raise DataError(f"{path}: no PNG file, or one that is cut off; got {head[:8]!r}")
    width, height = struct.unpack(">II", head[16:24])
    return height, width


def read_disparity(path: str | Path, png_scale: float | None = None) -> Disparity:
    """Read disparities from a .pfm or .png file, as `read_disparity_pfm` and `read_disparity_png` do.

    Raises:
        DataError: the file is not there, has another ending, or can't be used.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of disparities")
    if path.suffix.lower() == ".pfm":
        return read_disparity_pfm(path)
    if path.suffix.lower() == ".png":
        return read_disparity_png(path, png_scale)
    raise DataError(f"{path}: disparities are read from .pfm and .png files, not from {path.suffix or 'this one'!r}")


def _separate(path: Path, disparity: np.ndarray, stored: np.ndarray) -> Disparity:
    """Part the values of a file into disparities, 0 where there is none, and the places that have one."""
    negative = int((stored < 0).sum())
    if negative:
        raise DataError(
            f"{path}: {negative} of {stored.size} disparities are negative: those of the left image, of a rectified "
            "pair, are positive; is the file that of the right image?"
        )
    undefined = int(np.isnan(stored).sum())
    if undefined:
        logger.warning("%s: %d of %d disparities are NaN and are left out", path, undefined, stored.size)
    valid = np.isfinite(stored) & (stored > 0)
    if not valid.any():
        raise DataError(f"{path}: no pixel has a disparity (all are 0, inf or NaN): remove the pair")
    return np.where(valid, disparity, np.float32(0)), valid


def read_middlebury_calibration(path: str | Path) -> Calibration:
    """Read Middlebury's calib.txt: lines of name=value with `cam0`, `baseline` (mm) and perhaps `doffs`, `ndisp`, size.

    Raises:
        DataError: a line that is needed is missing or can't be read.

    Source: https://vision.middlebury.edu/stereo/data/scenes2014/
    """
    path = Path(path)
    fields = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, separator, value = line.partition("=")
        if separator:
            fields[name.strip()] = value.strip()
    missing = sorted({"cam0", "baseline"} - set(fields))
    if missing:
        raise DataError(f"{path}: the calibration lacks {', '.join(missing)}: lines of the form name=value are read")
    camera = fields["cam0"].strip("[]").replace(";", " ").split()
    numbers = {"cam0": camera[0] if len(camera) == 9 else "", "baseline": fields["baseline"]}
    numbers |= {name: fields[name] for name in ("doffs", "ndisp", "width", "height") if name in fields}
    values = {name: _number(path, name, text) for name, text in numbers.items()}
    for name in ("cam0", "baseline"):
        if values[name] <= 0:
            raise DataError(f"{path}: {name} must be positive, got {fields[name]!r}")
    size = (int(values["height"]), int(values["width"])) if {"width", "height"} <= set(values) else None
    max_disparity = int(values["ndisp"]) if "ndisp" in values else None
    return Calibration(values["cam0"], values["baseline"] / 1000, values.get("doffs", 0.0), max_disparity, size)


def read_kitti_calibration(path: str | Path) -> Calibration:
    """Read KITTI's calib_cam_to_cam file of a frame: the focal length of the left colour camera, and the baseline.

    The projections `P_rect_02` and `P_rect_03` are 3 x 4 matrices; the fourth number of their first rows is -f times a
    camera's position, so that B = (P_rect_02[0, 3] - P_rect_03[0, 3]) / f.

    Raises:
        DataError: a projection is missing or can't be read.
    """
    path = Path(path)
    projections = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in ("P_rect_02", "P_rect_03"):
            projections[name] = [_number(path, name, text) for text in value.split()]
    if len(projections) < 2 or any(len(numbers) != 12 for numbers in projections.values()):
        raise DataError(f"{path}: the calibration needs P_rect_02 and P_rect_03 with 12 numbers each")
    left, right = projections["P_rect_02"], projections["P_rect_03"]
    if left[0] <= 0 or left[3] <= right[3]:
        raise DataError(f"{path}: P_rect_02 and P_rect_03 give no positive focal length and baseline")
    return Calibration(left[0], (left[3] - right[3]) / left[0], right[2] - left[2])


def _number(path: Path, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}: {name} of the calibration can't be read, got {text!r}")
    return value
