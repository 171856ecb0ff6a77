"""Protects run-length encoded masks: byte for byte COCO's, and what doesn't decode or add up is an error."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fa_transformers.models.fa_rle import (
    compress_runs,
    decode_columns,
    decode_mask,
    decompress_runs,
    encode_mask,
    encode_part,
    encode_polygons,
    rle_area,
    rle_box,
    run_lengths,
    tight_boxes,
)


def random_masks(count: int = 60) -> list[np.ndarray]:
    """Masks of all sizes from 1 x 1 on, noise and blocks, some empty, some full."""
    random = np.random.default_rng(0)
    masks = []
    for index in range(count):
        height, width = random.integers(1, 90, size=2)
        mask = random.random((height, width)) < random.choice([0.02, 0.5, 0.98])
        if index % 2:
            mask[:] = False
            top, left = random.integers(0, height), random.integers(0, width)
            mask[top : top + random.integers(1, 60), left : left + random.integers(1, 60)] = True
        masks.append(mask)
    return [*masks, np.zeros((7, 3), bool), np.ones((7, 3), bool), np.ones((1, 1), bool), np.eye(300, 2000, 5) > 0]


@pytest.mark.parametrize("mask", random_masks(), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_both_directions_are_cocos_and_boxes_and_areas_need_no_pixels(mask):
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle = encode_mask(mask)
    assert rle == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    for counts in (rle["counts"], expected["counts"], run_lengths(rle), run_lengths(rle).tolist()):
        decoded = decode_mask(rle | {"counts": counts})
        assert decoded.dtype == bool and np.array_equal(decoded, mask)
    assert rle_area(rle) == coco_mask.area(expected) == mask.sum()
    assert np.array_equal(rle_box(rle), tight_boxes(mask[None])[0])
    rows, columns = np.nonzero(mask)
    if len(rows):
        assert rle_box(rle).tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    first, end = sorted(np.random.default_rng(mask.size).integers(0, mask.shape[1] + 1, size=2))
    assert np.array_equal(decode_columns(rle, first, end), mask[:, first:end])


@pytest.mark.parametrize("mask", random_masks(20), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_a_part_is_encoded_as_the_whole_mask_is(mask):
    height, width = mask.shape
    for size, top, left in ((mask.shape, 0, 0), ((height + 9, width + 4), 9, 4), ((height + 9, width + 4), 3, 0)):
        whole = np.zeros(size, dtype=bool)
        whole[top : top + height, left : left + width] = mask
        assert encode_part(mask, top, left, *size) == encode_mask(whole)
    with pytest.raises(ValueError, match="not inside a mask"):
        encode_part(mask, 1, 0, *mask.shape)


def test_long_runs_and_empty_ones_survive():
    runs = np.array([0, 2**31, 5, 0, 2**31 - 7, 1, 0, 0, 90_000])
    assert np.array_equal(decompress_runs(compress_runs(runs)), runs)
    assert len(decompress_runs("")) == len(decompress_runs(compress_runs([]))) == 0


@pytest.mark.parametrize(
    ("size", "counts", "complaint"),
    [
        ([4, 5], [10, 9], "sum to 19, and 4 x 5 pixels are 20"),
        ([4, 5], [10, 11], "sum to 21"),
        ([4, 5], [], "sum to 0"),
        ([4, 5], "", "sum to 0"),
        ([4, 5], [25, -5], "negative run length, -5"),
        ([4, 5], [10.0, 10.0], "list of integers or text, got list"),
        ([4, 5], None, "got NoneType"),
        ([4, 5], "no code!", "character ' ' at 2"),
        ([4, 5], "ä0", "character 'ä'"),
        ([4, 5], "0P", "end inside a number"),
        ([4, 5], "P" * 9 + "0", "number of 10 characters"),
        ([4], [4], "'size' of"),
        ([0, 5], [0], "'size' of"),
        ("45", [20], "'size' of"),
        ([4.0, 5.0], [20], "'size' of"),
    ],
)
def test_what_is_no_mask_is_named(size, counts, complaint):
    with pytest.raises(ValueError, match=complaint):
        decode_mask({"size": size, "counts": counts})


def test_a_mask_needs_two_sizes_and_columns_must_be_inside():
    for shape in ((3,), (0, 4), (1, 3, 4)):
        with pytest.raises(ValueError, match="height and a width"):
            encode_mask(np.zeros(shape))
    with pytest.raises(ValueError, match="columns 2 to 6"):
        decode_columns(encode_mask(np.ones((4, 5))), 2, 6)


def test_the_boxes_of_no_masks_are_none():
    assert tight_boxes(np.zeros((0, 4, 5), bool)).shape == (0, 4)


def random_polygons(random: np.random.Generator, count: int) -> list[list[float]]:
    """Polygons of 3 to 12 corners, partly outside, some on whole pixels, some that cross themselves or repeat."""
    polygons = []
    for _ in range(count):
        corners = random.uniform(-8, 60, size=(random.integers(3, 13), 2))
        if random.random() < 0.4:
            corners = np.round(corners)
        if random.random() < 0.2:
            corners = np.repeat(corners, 2, axis=0)
        polygons.append(corners.ravel().tolist())
    return polygons


def test_polygons_have_the_pixels_of_cocos_code():
    random = np.random.default_rng(1)
    for _ in range(150):
        height, width = (int(side) for side in random.integers(1, 55, size=2))
        polygons = random_polygons(random, random.integers(1, 4))
        expected = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        assert encode_polygons(polygons, height, width)["counts"] == expected["counts"].decode()


def test_a_polygon_on_pixel_edges_is_that_rectangle():
    mask = decode_mask(encode_polygons([[3, 2, 9, 2, 9, 7, 3, 7]], 12, 10))
    assert mask.sum() == 30 and mask[2:7, 3:9].all()


@pytest.mark.parametrize(
    ("polygon", "complaint"),
    [
        ([1, 2, 3, 4], "got 4 numbers"),
        ([1, 2, 3, 4, 5, 6, 7], "got 7 numbers"),
        ([1, 2, 3, 4, 5, float("nan")], "finite numbers"),
        ([[1, 2], [3, 4], [5, 6]], "finite numbers"),
        ("123456", "finite numbers"),
        (7, "finite numbers"),
    ],
)
def test_what_is_no_polygon_is_named(polygon, complaint):
    with pytest.raises(ValueError, match=complaint):
        encode_polygons([[0, 0, 4, 0, 4, 4], polygon], 10, 10)
