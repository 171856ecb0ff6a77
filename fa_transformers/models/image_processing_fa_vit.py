"""Images of any aspect for FAViT: each is resized to whole patches, about as many as a square has, in its own shape."""

from collections.abc import Sequence
from math import isqrt, log
from typing import Any

import torch
from transformers import BaseImageProcessor, BatchFeature

from .fa_pictures import to_picture, to_values

try:
    from PIL import Image
except ImportError:  # the class says so when it is made
    Image = None  # type: ignore[assignment]


class FAViTImageProcessor(BaseImageProcessor):
    """Prepare images for the FAViT models: aspect kept, sides of whole patches, no padding, pixels of about a square.

    An image of H x W pixels becomes a grid of rows x columns patches, at most as many as the square's. Before rounding
    the grid has the image's aspect and all of the square's patches; of the roundings of both sides up and down that
    stay within, the one whose aspect is nearest to the image's is taken. A square image becomes the square itself. An
    image so thin that it would be less than a patch high or wide is stretched to one patch there.

    Args:
        image_size: side in pixels of the square, or its (height, width).
        patch_size: side of a patch in pixels, or its (height, width), as in the model's configuration.
        resample: Pillow's number of the filter: 2 is bilinear, 3 bicubic.
        do_rescale, rescale_factor: whether values from 0 to 255 are multiplied by the factor.
        do_normalize, image_mean, image_std: whether the mean of each channel is subtracted and the result divided by
            the deviation.
        kwargs: passed to transformers' `BaseImageProcessor`.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: the square is smaller than a patch, or a size is none.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        resample: int = 3,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        if Image is None:
            raise ImportError("FAViTImageProcessor needs Pillow: pip install pillow.")
        super().__init__(**kwargs)
        self.image_size = image_size if isinstance(image_size, int) else list(image_size)
        self.patch_size = patch_size if isinstance(patch_size, int) else list(patch_size)
        self.resample = int(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        sizes = {"image_size": _pair(image_size), "patch_size": _pair(patch_size)}
        for name, sides in sizes.items():
            if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
                raise ValueError(f"`{name}` must be a positive integer or (height, width), got {getattr(self, name)}.")
        if not self.num_patches:
            raise ValueError(f"`image_size` {image_size} is smaller than a patch of {patch_size} pixels.")

    @property
    def num_patches(self) -> int:
        """The most patches that an image becomes: the whole ones of the square."""
        (height, width), (patch_height, patch_width) = _pair(self.image_size), _pair(self.patch_size)
        return (height // patch_height) * (width // patch_width)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the (rows, columns) of patches that an image of these pixels becomes."""
        return choose_grid(height, width, _pair(self.patch_size), self.num_patches)

    def preprocess(
        self,
        images: Any,
        grid: tuple[int, int] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn images into `pixel_values` [B, 3, height, width].

        Args:
            images: one image or a list: Pillow images, turned upright if their EXIF tag says how, or arrays and tensors
                uint8 [H, W], [H, W, 3] or [3, H, W].
            grid: (rows, columns) of patches that all images are resized to; None: each image's own.
            return_tensors: "pt", "np" or None (tensors as well).
            kwargs: not known; a name that the processor has as a field may come with the value it has.

        Raises:
            ValueError: the images of a list come to different sizes, an image has more than 8 bits or another shape,
                or an option is not known.
        """
        for name, value in kwargs.items():
            if not hasattr(self, name) or getattr(self, name) != value:
                raise ValueError(f"`{name}` cannot be set to {value!r} in a call; make a processor that has it.")
        pictures = [to_picture(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
        grids = [self.grid_of(one.height, one.width) if grid is None else tuple(grid) for one in pictures]
        if len(set(grids)) > 1:
            raise ValueError(
                f"Images of a batch come to different grids of patches, {sorted(set(grids))}: process those of one "
                "grid together (`grid_of` says which), or give one `grid` for all."
            )
        patch_height, patch_width = _pair(self.patch_size)
        scale = self.rescale_factor if self.do_rescale else None
        norm = (self.image_mean, self.image_std) if self.do_normalize else ()
        tensors = [
            to_values(picture, (rows * patch_height, columns * patch_width), self.resample, scale, *norm)
            for picture, (rows, columns) in zip(pictures, grids, strict=True)
        ]
        return BatchFeature({"pixel_values": torch.stack(tensors)}, tensor_type=return_tensors)


def choose_grid(height: int, width: int, patch_shape: tuple[int, int], num_patches: int) -> tuple[int, int]:
    """Return the (rows, columns) of patches, at most `num_patches` of them, for an image of height x width pixels.

    rows = sqrt(num_patches · (height / patch height) / (width / patch width)), columns likewise, each rounded up or
    down: of the pairs within `num_patches` the one with the aspect nearest to the image's, then with more patches.
    """
    down, across = height * patch_shape[1], width * patch_shape[0]
    floors = isqrt(num_patches * down // across), isqrt(num_patches * across // down)
    sides = [{min(max(side, 1), num_patches) for side in (floor, floor + 1)} for floor in floors]
    grids = [(rows, columns) for rows in sides[0] for columns in sides[1] if rows * columns <= num_patches]
    return min(grids, key=lambda grid: (abs(log(grid[0] * across / (grid[1] * down))), -grid[0] * grid[1]))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[return-value]
