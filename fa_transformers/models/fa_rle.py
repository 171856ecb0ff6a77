"""Masks as COCO stores them, run-length encoded column by column, and the tight boxes of masks; numpy alone.

An RLE is a dict of "size", (height H, width W) of the mask, and "counts", the lengths of the runs of equal pixels,
columns first, beginning with a run of zeros that may be empty. The counts are a list of integers (uncompressed) or
text of COCO's own code (compressed, `str` or `bytes`): each number in groups of five bits, lowest first, as characters
from 48 on, and from the fourth number on as its difference to the last but one.

Boxes are (left, top, right, bottom) in pixel edges: the whole image is (0, 0, W, H), one pixel (x, y, x + 1, y + 1).

Source: the format of Lin et al. 2014, arXiv:1405.0312, as its reference code `maskApi.c` reads and writes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rle = Mapping[str, Any]

FIRST_CHARACTER = 48
GROUP_BITS = 5
MOST_GROUPS = 8
"""Groups of one number at most: 40 bits hold every difference of two run lengths below 2³⁹."""


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return the compressed RLE of `mask` [H, W], of booleans or numbers of which 0 is outside; "counts" is a `str`.

    Raises:
        ValueError: `mask` has not two sizes above 0.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"a mask must have a height and a width above 0, got an array of shape {mask.shape}.")
    pixels = mask.astype(bool).ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = [0, 0] if pixels[0] else [0]
    runs = np.diff(np.concatenate([starts, changes, [pixels.size]]))
    return {"size": [int(side) for side in mask.shape], "counts": compress_runs(runs)}


def encode_part(part: np.ndarray, top: int, left: int, height: int, width: int) -> dict[str, Any]:
    """Return the compressed RLE of a mask [height, width] that is `part` [h, w] at (top, left) and empty elsewhere.

    It costs what the part costs, whatever the size of the mask.

    Raises:
        ValueError: the part is not inside the mask.
    """
    part = np.asarray(part).astype(bool)
    if not (0 <= top <= height - part.shape[0] and 0 <= left <= width - part.shape[1]):
        raise ValueError(f"a part of shape {part.shape} at {(top, left)} is not inside a mask of {(height, width)}.")
    columns, rows = np.nonzero(np.diff(np.pad(part, ((1, 1), (0, 0))), axis=0).T)
    runs = _runs_between((left + columns) * height + top + rows, height * width)
    return {"size": [height, width], "counts": compress_runs(runs)}


def decode_mask(rle: Rle) -> np.ndarray:
    """Return the mask [H, W] of booleans that an RLE, compressed or not, stands for.

    Raises:
        ValueError: `rle` is none, as `run_lengths` says.
    """
    return decode_columns(rle, 0, mask_size(rle)[1])


def decode_columns(rle: Rle, first: int, end: int) -> np.ndarray:
    """Return the columns from `first` to before `end` of a mask, [H, end - first] of booleans; the rest costs little.

    Raises:
        ValueError: `rle` is none, as `run_lengths` says, or the columns are not in it.
    """
    height, width = mask_size(rle)
    if not 0 <= first <= end <= width:
        raise ValueError(f"columns {first} to {end} are not in a mask of {width} columns.")
    ends = np.clip(np.cumsum(run_lengths(rle)), first * height, end * height)
    runs = np.diff(ends, prepend=first * height)
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return pixels.reshape(end - first, height).T


def mask_size(rle: Rle) -> tuple[int, int]:
    """Return (height, width) of an RLE.

    Raises:
        ValueError: there is no "size" of two integers above 0.
    """
    size: Any = rle.get("size") if isinstance(rle, Mapping) else None
    is_pair = isinstance(size, Sequence | np.ndarray) and not isinstance(size, str | bytes) and len(size) == 2
    if not is_pair or not all(isinstance(side, int | np.integer) and side > 0 for side in size):
        raise ValueError(f"an RLE needs a 'size' of [height, width], two integers above 0, got {size!r}.")
    return int(size[0]), int(size[1])


def run_lengths(rle: Rle) -> np.ndarray:
    """Return the run lengths of an RLE, zeros first, as integers [runs] whose sum is H · W.

    Raises:
        ValueError: size or counts are missing or of another type, the text doesn't decode, a length is negative, or
            the lengths don't sum to H · W, for which other readers return pixels that are not in the file.
    """
    height, width = mask_size(rle)
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        runs = decompress_runs(counts)
    elif isinstance(counts, Sequence | np.ndarray) and all(isinstance(run, int | np.integer) for run in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError(
            f"the counts of an RLE must be a list of integers or text, got {type(counts).__name__}: {str(counts)[:40]}"
        )
    if len(runs) and runs.min() < 0:
        raise ValueError(f"the counts of an RLE have a negative run length, {runs.min()}: the text is damaged.")
    if runs.sum() != height * width:
        raise ValueError(
            f"the counts of an RLE sum to {runs.sum()}, and {height} x {width} pixels are {height * width}: size or "
            "counts are wrong."
        )
    return runs


def compress_runs(runs: Sequence[int] | np.ndarray) -> str:
    """Return COCO's text for run lengths [runs]; `decompress_runs` reads it."""
    values = np.array(runs, dtype=np.int64)
    values[3:] -= np.asarray(runs, dtype=np.int64)[1:-2]
    shifts = GROUP_BITS * np.arange(MOST_GROUPS)
    rests = values[:, None] >> shifts
    groups = rests & 31
    # A group is the last one where what is left beyond it is its own sign: all zeros, or all ones below a set bit 4.
    is_last = rests >> GROUP_BITS == np.where(groups & 16, -1, 0)
    length = is_last.argmax(axis=1) + 1
    place = np.arange(MOST_GROUPS)
    codes = groups + 32 * (place < length[:, None] - 1) + FIRST_CHARACTER
    return codes[place < length[:, None]].astype(np.uint8).tobytes().decode("ascii")


def decompress_runs(text: str | bytes) -> np.ndarray:
    """Return the run lengths, integers [runs], that COCO's text stands for; they may be negative where it is damaged.

    Raises:
        ValueError: a character is none of the code's, the text ends inside a number, or a number is too large.
    """
    try:
        codes = np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, dtype=np.uint8).astype(np.int64)
    except UnicodeEncodeError as error:
        raise ValueError(f"the counts of an RLE have the character {text[error.start]!r}: not COCO's code.") from error
    codes -= FIRST_CHARACTER
    wrong = np.flatnonzero((codes < 0) | (codes > 63))
    if len(wrong):
        character = chr(codes[wrong[0]] + FIRST_CHARACTER)
        raise ValueError(f"the counts of an RLE have the character {character!r} at {wrong[0]}: not COCO's code.")
    if not len(codes):
        return codes
    lasts = np.flatnonzero(codes & 32 == 0)
    if not len(lasts) or lasts[-1] != len(codes) - 1:
        raise ValueError("the counts of an RLE end inside a number: the text is cut off.")
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    lengths = lasts - firsts + 1
    if lengths.max() > MOST_GROUPS:
        raise ValueError(f"the counts of an RLE have a number of {lengths.max()} characters: the text is damaged.")
    shifts = GROUP_BITS * (np.arange(len(codes)) - np.repeat(firsts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, firsts)
    runs -= np.where(codes[lasts] & 16, 1, 0) << (GROUP_BITS * lengths)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def rle_area(rle: Rle) -> int:
    """Return the number of pixels inside the mask of an RLE.

    Raises:
        ValueError: `rle` is none, as `run_lengths` says.
    """
    return int(run_lengths(rle)[1::2].sum())


def rle_box(rle: Rle) -> np.ndarray:
    """Return the tight box of an RLE's mask, float32 [4], without decoding it; zeros where the mask is empty.

    Raises:
        ValueError: `rle` is none, as `run_lengths` says.
    """
    height, _ = mask_size(rle)
    runs = run_lengths(rle)
    ends = np.cumsum(runs)[1::2]
    starts = ends - runs[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return np.zeros(4, dtype=np.float32)
    first_columns, last_columns = starts // height, (ends - 1) // height
    crosses = first_columns != last_columns
    tops = np.where(crosses, 0, starts % height)
    bottoms = np.where(crosses, height, (ends - 1) % height + 1)
    return np.array([first_columns[0], tops.min(), last_columns[-1] + 1, bottoms.max()], dtype=np.float32)


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """Return the tight boxes of `masks` [n, H, W], float32 [n, 4]; zeros where a mask is empty.

    A box is (min x, min y, max x + 1, max y + 1) over the pixels inside.
    """
    masks = np.asarray(masks, dtype=bool)
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for low, high, axis in ((0, 2, 1), (1, 3, 2)):
        is_filled = np.asarray(masks.any(axis=axis))
        boxes[:, low] = is_filled.argmax(axis=1)
        boxes[:, high] = is_filled.shape[1] - is_filled[:, ::-1].argmax(axis=1)
    boxes[~masks.any(axis=(1, 2))] = 0
    return boxes


def encode_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    """Return the compressed RLE of the union of `polygons`, each [x0, y0, x1, y1, ...] in pixel edges.

    The pixels are those of COCO's reference code, which walks each edge in steps of a fifth of a pixel. What lies
    outside the image is cut off.

    Raises:
        ValueError: a polygon is no list of six or more finite numbers, an even number of them: four numbers are a box
            to some readers, nothing to others and an error to the rest.
    """
    for polygon in polygons:
        check_polygon(polygon)
    size = [height, width]
    masks = [_runs_between(_trace_polygon(polygon, height, width), height * width) for polygon in polygons]
    runs = masks[0] if len(masks) == 1 else _unite(masks, height * width)
    return {"size": size, "counts": compress_runs(runs)}


def check_polygon(polygon: Any) -> None:
    """Raise ValueError where `polygon` is no list of six or more finite numbers, an even number of them."""
    is_list = isinstance(polygon, Sequence | np.ndarray) and not isinstance(polygon, str | bytes)
    if not is_list or not all(isinstance(x, int | float | np.number) and np.isfinite(x) for x in polygon):
        raise ValueError(f"a polygon must be a list of finite numbers [x0, y0, x1, y1, ...], got {str(polygon)[:60]}.")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(
            f"a polygon needs at least three corners, two numbers for each, got {len(polygon)} numbers: "
            f"{str(polygon)[:60]}. Four numbers are a box: give it as 'bbox'."
        )


POLYGON_STEPS = 5
"""Steps of a pixel's side in which COCO's reference code walks along a polygon."""


def _trace_polygon(polygon: Sequence[float], height: int, width: int) -> np.ndarray:
    """Positions in the columns-first order of pixels at which a polygon begins or ends, unsorted."""
    corners = np.trunc(POLYGON_STEPS * np.asarray(polygon, dtype=np.float64).reshape(-1, 2) + 0.5)
    points = _walk(corners, np.roll(corners, -1, axis=0))
    (before_x, before_y), (x, y) = points[:-1].T, points[1:].T
    columns = (np.where(x < before_x, x, x - 1) + 0.5) / POLYGON_STEPS - 0.5
    is_crossing = (x != before_x) & (columns == np.floor(columns)) & (columns >= 0) & (columns <= width - 1)
    rows = (np.minimum(y, before_y) + 0.5) / POLYGON_STEPS - 0.5
    rows = np.ceil(np.clip(rows, 0, height))
    return (columns * height + rows)[is_crossing].astype(np.int64)


def _walk(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Integer points [points, 2] from `starts` to `ends` [edges, 2], a step for each unit of an edge's longer axis.

    An edge has the same points in both directions, because it is rounded as seen from its lower end.
    """
    spans = np.abs(ends - starts)
    along = np.where(spans[:, 0] >= spans[:, 1], 0, 1)
    edges = np.arange(len(starts))
    is_turned = starts[edges, along] > ends[edges, along]
    low, high = np.where(is_turned[:, None], (ends, starts), (starts, ends))
    num_steps = spans.max(axis=1).astype(np.int64)
    slopes = (high - low) / np.maximum(1, num_steps)[:, None]
    firsts = np.concatenate([[0], np.cumsum(num_steps + 1)[:-1]])
    edge = np.repeat(edges, num_steps + 1)
    step = np.arange(len(edge)) - firsts[edge]
    step = np.where(is_turned[edge], num_steps[edge] - step, step)
    return np.trunc(low[edge] + slopes[edge] * step[:, None] + 0.5)


def _runs_between(changes: np.ndarray, num_pixels: int) -> np.ndarray:
    """Run lengths of the mask that changes at `changes`; two changes at one place cancel."""
    places, counts = np.unique(changes, return_counts=True)
    places = places[(counts % 2 == 1) & (places < num_pixels)]
    return np.diff(np.concatenate([[0], places, [num_pixels]]))


def _unite(masks: Sequence[np.ndarray], num_pixels: int) -> np.ndarray:
    """Run lengths of the union of masks that are given by their run lengths."""
    changes = [np.cumsum(runs)[:-1] for runs in masks]
    steps = [np.where(np.arange(len(places)) % 2, -1, 1) for places in changes]
    places, order = np.unique(np.concatenate([[0], *changes]), return_inverse=True)
    depths = np.cumsum(np.bincount(order, np.concatenate([[0], *steps])))
    return _runs_between(places[np.diff(depths > 0, prepend=False)], num_pixels)
