"""Protects the geometry of boxes and masks: conversions invert, areas and overlaps are those of pixels."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fa_transformers.data.boxes_and_masks import (
    box_areas,
    box_ious,
    boxes_from_coco,
    boxes_from_fractions,
    boxes_to_coco,
    boxes_to_fractions,
    clip_boxes,
    decode_window,
    mask_ious,
)
from fa_transformers.models.fa_rle import encode_mask, rle_box

HEIGHT, WIDTH = 37, 53


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    """Boxes [count, 4] on whole pixels of the image, none empty."""
    random = np.random.default_rng(seed)
    low = random.integers(0, (WIDTH - 1, HEIGHT - 1), size=(count, 2))
    high = random.integers(low + 1, (WIDTH + 1, HEIGHT + 1))
    return np.concatenate([low, high], axis=1).astype(np.float32)


def filled(boxes: np.ndarray) -> np.ndarray:
    """The boxes as masks [n, H, W]."""
    x, y = np.arange(WIDTH)[None, None, :], np.arange(HEIGHT)[None, :, None]
    left, top, right, bottom = boxes.T[:, :, None, None]
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)


def test_conversions_invert_each_other():
    boxes = random_boxes(50)
    assert np.array_equal(boxes_from_coco(boxes_to_coco(boxes)), boxes)
    # Five float32 roundings at coordinates below 64.
    assert np.abs(boxes_from_fractions(boxes_to_fractions(boxes, HEIGHT, WIDTH), HEIGHT, WIDTH) - boxes).max() < 2e-5
    assert np.allclose(boxes_to_fractions(np.float32([[0, 0, WIDTH, HEIGHT]]), HEIGHT, WIDTH), [[0.5, 0.5, 1, 1]])
    for convert in (boxes_from_coco, boxes_to_coco):
        assert convert(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_areas_and_overlaps_are_those_of_the_pixels():
    boxes, others = random_boxes(20), random_boxes(30, seed=1)
    assert np.array_equal(box_areas(boxes), filled(boxes).sum(axis=(1, 2)))
    assert np.array_equal(box_ious(boxes, others), mask_ious(filled(boxes), filled(others)))
    expected = coco_mask.iou(boxes_to_coco(boxes).astype(float), boxes_to_coco(others).astype(float), [0] * 30)
    assert np.abs(box_ious(boxes, others) - expected).max() < 1e-6


def test_nothing_overlaps_nothing():
    empty = np.float32([[5, 5, 5, 9], [7, 7, 3, 9]])
    assert not box_areas(empty).any() and not box_ious(empty, empty).any()
    assert not mask_ious(np.zeros((2, 4, 4), bool), np.zeros((1, 4, 4), bool)).any()


def test_clipping_keeps_what_is_inside():
    boxes = np.float32([[-5, -5, 10, 10], [50, 30, 90, 90], [60, 0, 70, 9]])
    assert clip_boxes(boxes, HEIGHT, WIDTH).tolist() == [[0, 0, 10, 10], [50, 30, 53, 37], [53, 0, 53, 9]]


def test_a_window_shows_the_mask_cut_to_its_box():
    random = np.random.default_rng(3)
    for box in random_boxes(40, seed=4):
        mask = filled(box[None])[0] & (random.random((HEIGHT, WIDTH)) < 0.7)
        left, top, right, bottom = window = tuple(int(edge) for edge in random_boxes(1, seed=int(box.sum()))[0])
        rle = encode_mask(mask)
        part, (part_top, part_left) = decode_window(rle, rle_box(rle), window)
        shown = np.zeros((bottom - top, right - left), dtype=bool)
        shown[part_top : part_top + part.shape[0], part_left : part_left + part.shape[1]] = part
        assert np.array_equal(shown, mask[top:bottom, left:right])


def test_a_window_outside_the_image_is_an_error():
    rle = encode_mask(np.ones((HEIGHT, WIDTH)))
    for window in ((0, 0, WIDTH + 1, 5), (3, 3, 3, 9), (-1, 0, 5, 5)):
        with pytest.raises(ValueError, match="not inside an image of 53 x 37"):
            decode_window(rle, rle_box(rle), window)
