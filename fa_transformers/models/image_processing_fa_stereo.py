"""Images of stereo pairs to what FAStereo takes, and its disparities back to the images' own size and to metres."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from .fa_pictures import per_channel

try:
    import numpy as np
    from PIL import Image
except ImportError:  # told by transformers, which wants both for every image processor
    np = Image = None  # type: ignore[assignment]

# Of ImageNet, in units of white: what image networks are commonly given.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class FAStereoImageProcessor(BaseImageProcessor):
    """Prepare rectified pairs: to RGB, perhaps to another size, normalized, and padded to the largest of the batch.

    Padding stands at the right and at the bottom, and `pixel_mask` tells it from the pair, so that a batch of different
    sizes gives what each pair gives alone.

    Args:
        scale_factor: factor on both sides of the images, in (0, 1] for images whose disparities are larger than the
            model looks for: half the size has half the disparities. Post-processing undoes it.
        image_mean, image_std: of each channel or one for all, in units of white.

    Raises:
        ValueError: `scale_factor` is not in (0, 1].
    """

    model_input_names = ["pixel_values", "pixel_mask"]

    def __init__(self, scale_factor=1.0, image_mean=IMAGE_MEAN, image_std=IMAGE_STD, **kwargs):
        super().__init__(**kwargs)
        self.scale_factor = _check_scale(scale_factor)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def __call__(self, images, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def preprocess(self, images, scale_factor: float | None = None, return_tensors: str | None = None) -> BatchFeature:
        """Prepare one pair or several.

        Args:
            images: a pair (left, right), or a list of pairs. An image is Pillow's, or bytes [H, W] or [H, W, 3] in an
                array, or [1, H, W] or [3, H, W] in a tensor.
            scale_factor: in place of the processor's own.
            return_tensors: as in transformers, "pt" for torch.

        Returns:
            `pixel_values` float32 [pairs, 2, 3, H, W] and `pixel_mask` bool [pairs, H, W], true on the pair.

        Raises:
            ValueError: the images are no pairs, the two of a pair differ in size, an image can't be read, or
                `image_std` has a 0.
        """
        scale = self.scale_factor if scale_factor is None else _check_scale(scale_factor)
        pairs = [self._prepare(pair, number, scale) for number, pair in enumerate(_as_pairs(images), start=1)]
        height, width = (max(pair.shape[axis] for pair in pairs) for axis in (2, 3))
        pixel_values = np.zeros((len(pairs), 2, 3, height, width), np.float32)
        pixel_mask = np.zeros((len(pairs), height, width), bool)
        for index, pair in enumerate(pairs):
            pixel_values[index, :, :, : pair.shape[2], : pair.shape[3]] = pair
            pixel_mask[index, : pair.shape[2], : pair.shape[3]] = True
        return BatchFeature({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, tensor_type=return_tensors)

    def _prepare(self, pair, number: int, scale: float):
        """Return one pair as float32 [2, 3, H, W], scaled and normalized."""
        left, right = (_as_bytes(pair[index], f"pair {number}, {('left', 'right')[index]}") for index in (0, 1))
        if left.shape != right.shape:
            raise ValueError(
                f"pair {number}: the left image has {left.shape[1]} x {left.shape[0]} pixels and the right one "
                f"{right.shape[1]} x {right.shape[0]}: a rectified pair has one size"
            )
        height, width = resized(left.shape[:2], scale)
        if (height, width) != left.shape[:2]:
            size = (width, height)
            left, right = (
                np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in (left, right)
            )
        values = np.stack([left, right]).astype(np.float32) / 255
        mean, std = per_channel("image_mean", self.image_mean), per_channel("image_std", self.image_std)
        values = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
        return values.transpose(0, 3, 1, 2)

    def post_process_disparity(
        self,
        outputs,
        target_sizes=None,
        focal_length: float | None = None,
        baseline: float | None = None,
        doffs: float = 0.0,
        scale_factor: float | None = None,
    ) -> list[dict[str, Tensor]]:
        """Bring disparities to the images' own sizes, and to depths where the cameras are known.

        A disparity is measured along the width, so a map that grows by a factor has disparities that grow by it. The
        depth is focal_length · baseline / (disparity + doffs); where disparity + doffs isn't positive it is inf.

        Args:
            outputs: the model's, with `predicted_depth` [pairs, H, W].
            target_sizes: (height, width) of each pair's images before they were prepared; None leaves the maps as they
                are, which is right for one size and a `scale_factor` of 1.
            focal_length: in pixels of the images before they were prepared.
            baseline: distance of the cameras; its unit is the depth's, commonly metres.
            doffs: column of the right principal point less that of the left one, in the same pixels.
            scale_factor: what `preprocess` was given, in place of the processor's own.

        Returns:
            For each pair "disparity" [height, width] in pixels and, with `focal_length` and `baseline`, "depth".

        Raises:
            ValueError: the number of sizes is another than that of maps, one of `focal_length` and `baseline` is
                missing, or one is not positive.
        """
        if (focal_length is None) != (baseline is None):
            raise ValueError("depths need both `focal_length` (pixels) and `baseline` (metres), got one of them.")
        for name, value in (("focal_length", focal_length), ("baseline", baseline)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        maps = outputs.predicted_depth if hasattr(outputs, "predicted_depth") else outputs["predicted_depth"]
        scale = self.scale_factor if scale_factor is None else _check_scale(scale_factor)
        if target_sizes is None:
            target_sizes = [tuple(maps.shape[1:])] * len(maps)
            scale = 1.0
        if len(target_sizes) != len(maps):
            raise ValueError(f"`target_sizes` has {len(target_sizes)} sizes for {len(maps)} disparity maps.")
        results = []
        for disparity, (height, width) in zip(maps, target_sizes, strict=True):
            rows, columns = resized((height, width), scale)
            disparity = disparity[:rows, :columns]
            if (rows, columns) != (height, width):
                disparity = F.interpolate(disparity[None, None], size=(height, width), mode="bilinear")[0, 0]
                disparity = disparity * (width / columns)
            result = {"disparity": disparity}
            if focal_length is not None and baseline is not None:
                shift = disparity + doffs
                result["depth"] = torch.where(shift > 0, focal_length * baseline / shift, torch.inf)
            results.append(result)
        return results


def resized(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return (height, width) times a scale factor, at least one pixel."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _check_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= 1:
        raise ValueError(f"`scale_factor` must be above 0 and at most 1, got {scale!r}.")
    return float(scale)


def _as_pairs(images) -> list:
    """Return the pairs of one pair or a list of pairs."""
    is_pair = isinstance(images, (list, tuple)) and len(images) == 2
    if is_pair and not any(isinstance(image, (list, tuple)) for image in images):
        return [images]
    if not isinstance(images, (list, tuple)) or not images:
        raise ValueError(f"`images` must be a pair (left, right) or a list of pairs, got {type(images).__name__}.")
    for number, pair in enumerate(images, start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"`images` must be a pair (left, right) or a list of pairs, but number {number} is none.")
    return list(images)


def _as_bytes(image, where: str):
    """Return an image as bytes [H, W, 3]."""
    if isinstance(image, Image.Image):
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"{where}: an image of mode {image.mode} has more than 8 bits: scale it to bytes first.")
        return np.asarray(image.convert("RGB"))
    if isinstance(image, Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy() if image.dim() == 3 else image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{where}: an image must be Pillow's, an array or a tensor, got {type(image).__name__}.")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(
            f"{where}: an image must have bytes [height, width] or [height, width, 3], got {image.dtype} "
            f"{list(image.shape)}."
        )
    return np.broadcast_to(image, (*image.shape[:2], 3))
