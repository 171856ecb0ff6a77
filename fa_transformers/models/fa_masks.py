"""Masks of objects between COCO's formats and tensors: run lengths, compressed or not, and polygons.

COCO counts a mask's pixels down the columns, in runs of zeros and ones that start with zeros. Polygons have their
corners at pixel edges, so that (0, 0, W, 0, W, H, 0, H) is the whole image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BITS, MORE, SIGN = 5, 0x20, 0x10
"""Of a compressed count: bits per character, the flag that more follow, and the sign bit of the last."""
FIRST_CHARACTER = 48


def encode_rle(mask: Tensor, offset: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return COCO's compressed run lengths of a mask: {"size": [height, width], "counts": text}.

    Args:
        mask: bool [h, w]; a window of the whole, outside which there is nothing.
        offset: (row, column) of the window in the whole.
        size: (height, width) of the whole; None: the window is the whole.
    """
    height, width = size or (int(mask.shape[0]), int(mask.shape[1]))
    columns = torch.zeros(mask.shape[1], height, dtype=torch.int8)
    columns[:, offset[0] : offset[0] + mask.shape[0]] = mask.T.cpu()
    pixels = columns.flatten()
    changes = (pixels.diff(prepend=pixels.new_zeros(1)) != 0).nonzero()[:, 0] + offset[1] * height
    ends = torch.cat([changes, torch.tensor([height * width])])
    return {"size": [height, width], "counts": compress(ends.diff(prepend=ends.new_zeros(1)).tolist())}


def decode_rle(rle: dict[str, Any]) -> Tensor:
    """Return the mask bool [height, width] of COCO's run lengths, whose `counts` are a list, text or bytes.

    Raises ValueError where they don't decode, or don't add up to the pixels of `size`.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        raise ValueError(f"Run lengths must have `size` [height, width], got {size!r}.")
    if isinstance(counts, (str, bytes)):
        counts = decompress(counts)
    if not isinstance(counts, list) or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("`counts` of run lengths must be text, bytes or a list of integers of at least 0.")
    height, width = size
    if sum(counts) != height * width:
        raise ValueError(f"Run lengths must add up to {height} x {width} = {height * width} pixels, got {sum(counts)}.")
    values = torch.arange(len(counts)) % 2 == 1
    return values.repeat_interleave(torch.tensor(counts, dtype=torch.long)).view(width, height).T


def compress(counts: Sequence[int]) -> str:
    """Write run lengths as COCO's text: each from the fourth on less the one before the last, 5 bits a character."""
    characters = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            bits = value & (MORE - 1)
            value >>= BITS
            ends = value == (-1 if bits & SIGN else 0)
            characters.append(chr(FIRST_CHARACTER + (bits if ends else bits | MORE)))
            if ends:
                break
    return "".join(characters)


def decompress(text: str | bytes) -> list[int]:
    """Read run lengths from COCO's text; ValueError where it isn't such a text."""
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    counts: list[int] = []
    value = shift = 0
    for byte in data:
        bits = byte - FIRST_CHARACTER
        if not 0 <= bits < 2 * MORE:
            raise ValueError(f"Compressed run lengths must be characters from '0' to 'o', got byte {byte}.")
        value |= (bits & (MORE - 1)) << shift
        shift += BITS
        if not bits & MORE:
            if bits & SIGN:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("Compressed run lengths end within a number.")
    return counts


def fill_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Tensor:
    """Return the mask bool [height, width] of pixels whose middle lies in any of some polygons.

    A polygon is a list x1, y1, x2, y2 ... of three corners or more; where it crosses itself, what lies inside twice
    lies outside.

    Raises ValueError for a polygon with fewer numbers, an odd count of them, or numbers that aren't finite.
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    for polygon in polygons:
        if not isinstance(polygon, (list, tuple)) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"A polygon must be a list of x and y of three corners or more, got {polygon!r:.80}; a list of four "
                "numbers is a box, which belongs in `bbox`."
            )
        corners = torch.tensor(polygon, dtype=torch.float64).view(-1, 2)
        if not corners.isfinite().all():
            raise ValueError(f"A polygon must have finite numbers, got {polygon!r:.80}.")
        mask |= _fill(corners, height, width)
    return mask


def _fill(corners: Tensor, height: int, width: int) -> Tensor:
    """Count, for each pixel's middle, the edges left of it: an odd count is inside."""
    (x1, y1), (x2, y2) = corners.T, corners.roll(-1, 0).T
    middle = torch.arange(height, dtype=corners.dtype)[:, None] + 0.5  # [height, 1]
    crosses = (y1 <= middle) != (y2 <= middle)  # [height, edges]
    x = x1 + (middle - y1) / torch.where(y1 == y2, 1.0, y2 - y1) * (x2 - x1)
    first = (x - 0.5).ceil().clamp(0, width).long()  # column of the first middle to the right
    edges = torch.zeros(height, width + 1, dtype=torch.long)
    edges.scatter_add_(1, first, crosses.long())
    return edges[:, :width].cumsum(1) % 2 == 1


def tight_boxes(masks: Tensor) -> Tensor:
    """Return boxes (left, top, right, bottom) at pixel edges around masks: bool [K, H, W] -> [K, 4]; zeros if empty."""
    parts = []
    for dim in (1, 2):
        seen = masks.any(dim)  # columns, then rows
        first = seen.int().argmax(1)
        parts.append((first, seen.shape[1] - seen.flip(1).int().argmax(1)))
    (left, right), (top, bottom) = parts
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    return boxes * masks.flatten(1).any(1)[:, None]
