"""Pictures as the image processors take them: of any kind, brought to RGB of 8 bits, resized, and made to tensors."""

from typing import Any

import torch
from torch import Tensor

try:
    from PIL import Image, ImageOps
except ImportError:  # the image processors say so when they are made
    Image = None  # type: ignore[assignment]

DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of pictures with more than 8 bits, which its conversion to RGB cuts at 255."""
ORIENTATION = 0x0112
"""Number of the EXIF tag that says how a picture is turned; 1 is upright."""
STRIP_NUMBERS = 2**17
"""Numbers of a large picture that are made at once: they stay in a core's cache from Pillow's bytes to the last sum,
and these bytes take memory that is used again, not new pages of the system's."""


def to_picture(image: Any) -> Any:
    """Return an image as an upright Pillow picture in RGB; ValueError if it can't be one without loss.

    It is the image itself where that is one already, not to be changed.
    """
    if isinstance(image, Image.Image):
        if image.mode in DEEP_MODES:
            raise ValueError(
                f"An image of mode {image.mode!r} has more than 8 bits a value: scale it to 0 to 255 and convert it "
                "first."
            )
        image.load()  # some files have their tags behind the pixels
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    values = torch.as_tensor(image) if not isinstance(image, (str, bytes)) else None
    if values is None or values.dtype != torch.uint8 or values.dim() not in (2, 3):
        raise ValueError(
            "An image must be a Pillow image or an array uint8 [height, width], [height, width, 3] or [3, height, "
            f"width], got {type(image).__name__}"
            + ("." if values is None else f" {values.dtype} {tuple(values.shape)}.")
        )
    if values.dim() == 2:
        values = values[:, :, None].expand(-1, -1, 3)
    elif values.shape[2] != 3 and values.shape[0] == 3:
        values = values.permute(1, 2, 0)
    height, width, channels = values.shape
    if channels != 3 or not height or not width:
        raise ValueError(f"An image must have 3 channels and pixels, got {tuple(values.shape)}.")
    return Image.frombytes("RGB", (width, height), values.contiguous().cpu().numpy().data.cast("B"))


def to_values(
    picture: Any,
    size: tuple[int, int],
    resample: int,
    scale: float | None,
    mean: Any = None,
    std: Any = None,
    out: Tensor | None = None,
) -> Tensor:
    """Resize a picture to (height, width), and return its values, rescaled and normalised: float32 [3, height, width].

    A pixel's channels lie side by side in memory, as in the picture, so that no value moves.

    Args:
        resample: Pillow's number of the filter.
        scale: factor of the values from 0 to 255; None leaves them.
        mean, std: of each channel or one for all, after the factor; None leaves the values.
        out: float32 [height, width, 3] to write to, without gaps within a row; None makes one. The result is its view.

    Raises:
        ValueError: `mean` or `std` is of another length, or `std` has a 0.
    """
    height, width = size
    if (picture.height, picture.width) != size:
        picture = picture.resize((width, height), resample=Image.Resampling(resample))
    out = torch.empty(height, width, 3) if out is None else out
    # (value · scale - mean) / std as a product and a sum, over rows: three channels alone are too short to be fast. In
    # strips, as reading and writing a large picture whole takes several times as long as the arithmetic.
    middle = per_channel("image_mean", [0.0] if mean is None else mean)
    deviation = per_channel("image_std", [1.0] if std is None else std)
    factor = [(1.0 if scale is None else scale) / one for one in deviation]
    shift = [-one / other for one, other in zip(middle, deviation, strict=True)]
    factors, shifts = torch.tensor(factor).repeat(width), torch.tensor(shift).repeat(width)
    rows = max(STRIP_NUMBERS // (3 * width), 1)
    for top, values in zip(range(0, height, rows), out.view(height, 3 * width).split(rows), strict=True):
        strip = picture.crop((0, top, width, top + len(values))) if rows < height else picture
        pixels = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
        values.copy_(pixels.view_as(values)).mul_(factors).add_(shifts)
    return out.permute(2, 0, 1)


def per_channel(name: str, values: Any) -> list[float]:
    """Return the number of each of the three channels in `image_mean` or `image_std`, where one may hold for all.

    Raises:
        ValueError: there is another number of them, or a deviation is 0; the message has `name`.
    """
    numbers = [float(value) for value in values]
    if len(numbers) not in (1, 3):
        raise ValueError(f"`{name}` must be one number or three, got {numbers}.")
    if name == "image_std" and 0.0 in numbers:
        raise ValueError(f"`{name}` must not have a 0, by which values would be divided, got {numbers}.")
    return numbers * (3 // len(numbers))
