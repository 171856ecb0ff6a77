"""Stereo pairs on their way to the network: read, cropped and changed for training, and made into batches."""

from collections.abc import Callable, Sequence

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor

from .readers.stereo_folders import StereoPair, StereoSample, read_image_size, read_stereo_pair
from .readers.tables import DataError

PLACE_PX = 16
"""Pixels that count as one token in figures of speed: one place of the feature map."""


class FolderSamples:
    """The pairs of a folder as samples, each read when it is asked for; `sizes` are (height, width)."""

    def __init__(self, pairs: Sequence[StereoPair], png_scale: float | None = None) -> None:
        self.pairs, self.png_scale = list(pairs), png_scale
        self.sizes = [read_image_size(pair.left) for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> StereoSample:
        return read_stereo_pair(self.pairs[index], self.png_scale)


class SceneSamples:
    """Generated scenes, a split of `load_stereo_scenes`, as samples; `sizes` are (height, width)."""

    def __init__(self, scenes: datasets.Dataset) -> None:
        self.scenes = scenes.with_format("numpy")
        self.sizes = [tuple(scenes.features["disparity"].shape)] * len(scenes)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> StereoSample:
        row = self.scenes[index]
        return StereoSample(row["left"], row["right"], row["disparity"], np.ones(row["disparity"].shape, bool))


Samples = FolderSamples | SceneSamples


class StereoExamples(torch.utils.data.Dataset):
    """Samples with disparities; with `crop` (height, width) a random crop of each, with `augment` changed too.

    What is drawn depends on seed, epoch and index alone, so that a resumed run sees the same. A sample without a known
    disparity in its crop is cropped again, a few times.
    """

    TRIES = 10

    def __init__(
        self, samples: Samples, crop: tuple[int, int] | None = None, augment: bool = False, seed: int = 0
    ) -> None:
        self.samples, self.crop, self.augment, self.seed = samples, crop, augment, seed
        sides = [size if crop is None else np.minimum(size, crop) for size in samples.sizes]
        self.lengths = [max(1, int(height) * int(width) // PLACE_PX) for height, width in sides]
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the crops of `epoch`."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> StereoSample:
        sample = self.samples[index]
        if sample.disparity is None or sample.valid is None:
            raise DataError(f"pair {index + 1} has no disparities, from which a network could learn or be scored")
        random = np.random.default_rng([self.seed, self._epoch, index])
        if self.crop is not None:
            whole = sample
            for _ in range(self.TRIES):
                sample = crop_sample(whole, self.crop, random)
                if sample.valid is not None and sample.valid.any():
                    break
        return change_colours(flip(sample, random), random) if self.augment else sample


def crop_sample(sample: StereoSample, size: tuple[int, int], random: np.random.Generator) -> StereoSample:
    """Cut the same random rectangle of `size` (height, width), or of the whole side where it is less, out of both."""
    height, width = (min(side, wanted) for side, wanted in zip(sample.left.shape[:2], size, strict=True))
    top, left = (
        random.integers(side - cut + 1) for side, cut in zip(sample.left.shape[:2], (height, width), strict=True)
    )
    return _each(sample, lambda part: part[top : top + height, left : left + width])


def flip(sample: StereoSample, random: np.random.Generator) -> StereoSample:
    """Turn half of the pairs upside down, which keeps them rectified; left to right would swap the cameras."""
    return _each(sample, lambda part: part[::-1]) if random.random() < 0.5 else sample


def _each(sample: StereoSample, change: Callable[[np.ndarray], np.ndarray]) -> StereoSample:
    def changed(part: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(change(part))

    disparity, valid = (None if part is None else changed(part) for part in (sample.disparity, sample.valid))
    return StereoSample(changed(sample.left), changed(sample.right), disparity, valid)


def change_colours(sample: StereoSample, random: np.random.Generator) -> StereoSample:
    """Exchange the channels of both images alike, and give each image a gain and an offset of its own."""
    order = random.permutation(3)
    gains, offsets = random.uniform(0.9, 1.1, 2), random.uniform(-10, 10, 2)
    left, right = (
        np.clip(image[:, :, order] * gain + offset, 0, 255).astype(np.uint8)
        for image, gain, offset in zip((sample.left, sample.right), gains, offsets, strict=True)
    )
    return StereoSample(left, right, sample.disparity, sample.valid)


class StereoCollator:
    """Makes batches of samples: what the image processor gives, and `labels` and `labels_mask` padded likewise."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: list[StereoSample]) -> dict[str, Tensor]:
        # Crops and scores are at the images' own size, whatever the processor does at inference.
        pairs = [(sample.left, sample.right) for sample in samples]
        batch = dict(self.processor(pairs, scale_factor=1.0, return_tensors="pt"))
        labels = torch.zeros(batch["pixel_mask"].shape)
        known = torch.zeros(batch["pixel_mask"].shape, dtype=torch.bool)
        for index, sample in enumerate(samples):
            height, width = sample.left.shape[:2]
            labels[index, :height, :width] = torch.from_numpy(np.asarray(sample.disparity))
            known[index, :height, :width] = torch.from_numpy(np.asarray(sample.valid))
        return batch | {"labels": labels, "labels_mask": known}
