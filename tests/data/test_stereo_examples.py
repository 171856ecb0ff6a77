"""Protects stereo pairs on their way into training: crops, flips and colours keep a pair a pair, batches keep sizes."""

import numpy as np
import pytest
import torch
from stereo_sets import SHIFT, Given, make_sample, write_set

from fa_transformers.data.readers.stereo_folders import StereoSample, find_stereo_pairs
from fa_transformers.data.readers.tables import DataError
from fa_transformers.data.sets.stereo_scenes import load_stereo_scenes
from fa_transformers.data.stereo_examples import (
    FolderSamples,
    SceneSamples,
    StereoCollator,
    StereoExamples,
    change_colours,
)
from fa_transformers.models import FAStereoImageProcessor


def test_crops_and_flips_keep_a_pair_a_pair(monkeypatch):
    samples = Given([make_sample(), make_sample(9, 80, 3)])
    monkeypatch.setattr("fa_transformers.data.stereo_examples.change_colours", lambda sample, random: sample)
    examples = StereoExamples(samples, crop=(12, 30), augment=True)
    rows = set()
    for epoch in range(8):
        examples.set_epoch(epoch)
        for index, shift in enumerate((7, 3)):
            sample = examples[index]
            assert sample.left.shape == sample.right.shape == ((12, 30, 3), (9, 30, 3))[index]
            assert np.array_equal(sample.left[:, shift:], sample.right[:, : 30 - shift])
            assert (sample.disparity == shift).all() and sample.valid.all()
            rows.add(sample.left.tobytes())
    assert len(rows) > 12
    assert examples.lengths == [12 * 30 // 16, 9 * 30 // 16]


def test_what_is_drawn_depends_on_seed_epoch_and_index_alone():
    samples = Given([make_sample(), make_sample()])
    one, same, other = (StereoExamples(samples, (12, 30), True, seed) for seed in (1, 1, 2))
    expected = one[1].left
    _ = same[0]
    assert np.array_equal(same[1].left, expected) and not np.array_equal(other[1].left, expected)
    same.set_epoch(1)
    assert not np.array_equal(same[1].left, expected)


def test_without_a_crop_samples_come_as_they_are():
    sample = make_sample()
    found = StereoExamples(Given([sample]))[0]
    for name in ("left", "right", "disparity", "valid"):
        assert np.array_equal(getattr(found, name), getattr(sample, name))


def test_a_crop_without_a_known_disparity_is_drawn_again():
    sample = make_sample(40, 100)
    valid = np.zeros((40, 100), bool)
    valid[:, :50] = True
    examples = StereoExamples(Given([StereoSample(sample.left, sample.right, sample.disparity, valid)]), (16, 20))
    for epoch in range(20):
        examples.set_epoch(epoch)
        assert examples[0].valid.any()


def test_both_images_get_one_order_of_channels_and_own_gains():
    grey = np.full((4, 5, 3), [40, 120, 200], np.uint8)
    sample = StereoSample(grey, grey, np.ones((4, 5), np.float32), np.ones((4, 5), bool))
    changed = [change_colours(sample, np.random.default_rng(seed)) for seed in range(20)]
    orders = {tuple(np.argsort(each.left[0, 0])) for each in changed}
    assert len(orders) > 3
    assert all(np.array_equal(np.argsort(each.left[0, 0]), np.argsort(each.right[0, 0])) for each in changed)
    assert any(not np.array_equal(each.left, each.right) for each in changed)
    # A gain of at most 1.1 and an offset of at most 10.
    assert all(abs(np.sort(each.left[0, 0]).astype(int) - [40, 120, 200]).max() <= 31 for each in changed)


def test_pairs_without_disparities_are_refused():
    sample = make_sample()
    with pytest.raises(DataError, match="pair 1 has no disparities"):
        _ = StereoExamples(Given([StereoSample(sample.left, sample.right)]))[0]


def test_a_batch_holds_every_sample_at_its_own_size():
    samples = [make_sample(10, 30), make_sample(14, 22)]
    # A scale is for inference: scores and losses are at the images' own size.
    batch = StereoCollator(FAStereoImageProcessor(scale_factor=0.5))(samples)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixel_values": (2, 2, 3, 14, 30),
        "pixel_mask": (2, 14, 30),
        "labels": (2, 14, 30),
        "labels_mask": (2, 14, 30),
    }
    assert torch.equal(batch["labels_mask"], batch["pixel_mask"].bool())
    assert (batch["labels"][batch["labels_mask"]] == 7).all() and (batch["labels"][~batch["labels_mask"]] == 0).all()


def test_folders_and_scenes_give_samples_of_their_sizes(tmp_path):
    write_set("kitti 2015", tmp_path / "kitti")
    folder = FolderSamples(find_stereo_pairs(tmp_path / "kitti"))
    assert len(folder) == 2 and (folder[1].disparity == SHIFT).all()
    scenes = SceneSamples(load_stereo_scenes(1, 1, 1, (32, 48), 16, cache_dir=tmp_path)["train"])
    for samples in (folder, scenes):
        sample = samples[0]
        assert samples.sizes[0] == sample.left.shape[:2] == sample.disparity.shape
        assert sample.left.dtype == np.uint8 and sample.disparity.dtype == np.float32 and sample.valid.dtype == bool
