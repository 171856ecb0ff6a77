"""Protects random views: boxes are the tight boxes of the masks after any chain of steps, and nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fa_transformers.data.augment import (
    AugmentOptions,
    Example,
    augment,
    change_colours,
    crop,
    flip,
    labels_of,
    resize,
    view,
)
from fa_transformers.data.boxes_and_masks import box_areas
from fa_transformers.data.readers.objects import DenseImage
from fa_transformers.models.fa_rle import encode_mask, tight_boxes

HEIGHT, WIDTH = 96, 128


def draw_image(seed: int = 0, num_objects: int = 8, size: tuple[int, int] = (HEIGHT, WIDTH), masks: bool = True):
    """A noisy picture with random ellipses, holes in some, as a DenseImage and the decoded picture."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    shapes = np.zeros((num_objects, *size), dtype=bool)
    for shape in shapes:
        (cx, cy), (rx, ry) = random.uniform((0, 0), size[::-1]), random.uniform(3, 20, size=2)
        distance = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2
        shape |= (distance <= 1) & (distance > random.choice([0, 0.3]))
    shapes = shapes[shapes.any(axis=(1, 2))]
    boxes = tight_boxes(shapes)
    image = DenseImage(
        image_id=seed,
        picture=None,
        size=size,
        is_turned=True,
        labels=random.integers(0, 3, size=len(shapes)),
        boxes=boxes,
        areas=shapes.sum(axis=(1, 2)).astype(float),
        is_crowd=np.zeros(len(shapes), dtype=bool),
        rles=tuple(map(encode_mask, shapes)) if masks else None,
        mask_boxes=boxes,
    )
    return image, Image.fromarray(random.integers(0, 256, size=(*size, 3), dtype=np.uint8))


def whole(image: DenseImage, picture: Image.Image) -> Example:
    return view(image, (0, 0, *picture.size), image.size, picture=picture)


def random_step(example: Example, random: np.random.Generator) -> Example:
    height, width = example.pixels.shape[:2]
    kind = random.integers(4)
    if kind == 0:
        left, top = random.integers(width), random.integers(height)
        right, bottom = random.integers(left + 1, width + 1), random.integers(top + 1, height + 1)
        return crop(example, (left, top, right, bottom), random.choice([0, 0.5]))
    if kind == 1:
        return resize(example, *(int(side) for side in random.integers(1, 150, size=2)))
    if kind == 2:
        return flip(example)
    return change_colours(example, random, 0.3, bool(random.integers(2)))


def copy_of(example: Example) -> list[np.ndarray]:
    return [part.copy() for part in vars(example).values() if part is not None]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_after_any_chain_boxes_are_those_of_the_masks_and_no_input_has_changed(seed, masks):
    random = np.random.default_rng(seed)
    example = whole(*draw_image(seed, masks=masks))
    for _ in range(6):
        before = copy_of(example)
        after = random_step(example, random)
        assert all(np.array_equal(old, new) for old, new in zip(before, copy_of(example), strict=True))
        example = after
        height, width = example.pixels.shape[:2]
        assert example.pixels.dtype == np.uint8 and example.pixels.shape == (height, width, 3)
        assert len(example.labels) == len(example.boxes) == len(example.visible)
        assert (example.boxes >= 0).all() and (example.boxes <= [width, height, width, height]).all()
        assert (box_areas(example.boxes) > 0).all() and ((example.visible > 0) & (example.visible <= 1)).all()
        if masks:
            assert example.masks.shape == (len(example.labels), height, width) and example.masks.dtype == bool
            assert np.array_equal(example.boxes, tight_boxes(example.masks))


@pytest.mark.parametrize("seed", range(8))
def test_a_view_is_what_cropping_and_resizing_make_of_the_whole(seed):
    image, picture = draw_image(seed)
    image.is_crowd[:2] = seed % 2
    random = np.random.default_rng(seed)
    left, top = (int(n) for n in random.integers(0, (WIDTH - 20, HEIGHT - 20)))
    window = (left, top, int(random.integers(left + 8, WIDTH + 1)), int(random.integers(top + 8, HEIGHT + 1)))
    size = tuple(int(side) for side in random.integers(10, 150, size=2))
    for min_visible in (0, 0.6):
        seen = view(image, window, size, min_visible, picture)
        expected = resize(crop(whole(image, picture), window, min_visible), *size)
        for name in ("pixels", "labels", "boxes", "masks", "visible", "ignore"):
            assert np.array_equal(getattr(seen, name), getattr(expected, name)), name


def test_a_smaller_mask_takes_the_pixels_in_the_middle():
    masks = np.zeros((1, 9, 12), dtype=bool)
    masks[0, 1::3, 1::3] = True
    example = Example(np.zeros((9, 12, 3), np.uint8), np.array([0]), tight_boxes(masks), masks, np.ones(1, np.float32))
    assert np.array_equal(resize(example, 3, 4).masks, np.ones((1, 3, 4), dtype=bool))


def test_boxes_without_masks_follow_those_with_masks():
    """A box that has no mask is flipped, cropped and scaled as the full rectangle is."""
    image, picture = draw_image(3)
    boxes = whole(*draw_image(3, masks=False))
    rectangles = np.zeros((len(boxes.boxes), HEIGHT, WIDTH), dtype=bool)
    for rectangle, (left, top, right, bottom) in zip(rectangles, boxes.boxes.astype(int), strict=True):
        rectangle[top:bottom, left:right] = True
    filled = Example(boxes.pixels, boxes.labels, boxes.boxes, rectangles, boxes.visible)
    for step in (flip, lambda e: crop(e, (11, 7, 100, 80), 0.4), lambda e: resize(e, 2 * 73, 2 * 89)):
        boxes, filled = step(boxes), step(filled)
        assert np.array_equal(boxes.boxes, filled.boxes) and np.allclose(boxes.visible, filled.visible)
        assert np.array_equal(boxes.labels, filled.labels)


def test_the_seed_and_the_options_decide_all():
    image, picture = draw_image(1)
    options = AugmentOptions(crop_size=48, swap_colours=True)
    first, again = (augment(image, options, (0, 3, 5), picture) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(copy_of(first), copy_of(again), strict=True))
    others = [augment(image, options, seed, picture).pixels for seed in ((1, 3, 5), (0, 4, 5), (0, 3, 6))]
    assert not any(np.array_equal(first.pixels, other) for other in others)
    assert first.pixels.shape == (48, 48, 3)


def test_objects_of_which_little_is_left_are_dropped_whatever_the_steps():
    image, picture = draw_image(2)
    example = whole(image, picture)
    left, top, right, bottom = (int(edge) for edge in example.boxes[0])
    middle = (left + right) // 2
    halves = [crop(example, window) for window in ((0, 0, middle, HEIGHT), (middle, 0, WIDTH, HEIGHT))]
    shares = [half.visible[0] for half in halves]
    assert sum(shares) == pytest.approx(1, abs=1e-6) and min(shares) > 0.2
    quarter = crop(halves[0], (0, 0, middle, (top + bottom) // 2))
    area = example.masks[0].sum()
    assert quarter.visible[0] == pytest.approx(quarter.masks[0].sum() / area, abs=1e-6) and quarter.visible[0] < 0.4
    assert len(crop(halves[0], (0, 0, middle, (top + bottom) // 2), 0.5).labels) < len(quarter.labels)
    for seed in range(20):
        seen = augment(image, AugmentOptions(crop_size=30, min_visible=0.7), (seed,), picture)
        assert (seen.visible >= 0.7).all()


def test_crowds_are_not_learnt_and_small_pictures_are_shown_whole():
    image, picture = draw_image(4)
    image.is_crowd[:3] = True
    example = whole(image, picture)
    assert len(example.labels) == len(image.labels) - 3
    assert np.array_equal(example.ignore, image.masks()[:3].any(axis=0))
    assert np.array_equal(flip(example).ignore[:, ::-1], example.ignore)
    assert np.array_equal(labels_of(example)["ignore"], example.ignore)
    boxed = whole(replace(image, rles=None), picture)
    left, top, right, bottom = image.boxes[0].astype(int)
    assert boxed.ignore[top:bottom, left:right].all() and not (example.ignore & ~boxed.ignore).any()
    assert whole(*draw_image(4)).ignore is None
    seen = augment(image, AugmentOptions(crop_size=500, scale=(1, 1)), (0,), picture)
    assert seen.pixels.shape == (HEIGHT, WIDTH, 3)


def test_views_of_a_picture_that_is_large_enough_have_exactly_the_crops_size():
    image, picture = draw_image(size=(200, 200))
    options = AugmentOptions(crop_size=101, scale=(0.75, 4 / 3))
    sizes = {augment(image, options, [seed], picture).pixels.shape[:2] for seed in range(40)}
    assert sizes == {(101, 101)}


def test_colours_change_by_no_more_than_they_are_asked_to():
    example = whole(*draw_image(5))
    same = change_colours(example, np.random.default_rng(0), 0.0)
    assert np.array_equal(same.pixels, example.pixels)
    other = change_colours(example, np.random.default_rng(0), 0.1)
    # 10 % of brightness, contrast and saturation and 5 % of a channel, of 255 and of what lies beside grey.
    assert 1 < np.abs(other.pixels.astype(int) - example.pixels).max() < 255 * (1.1 * 1.1 * 1.1 * 1.05 - 1)


def test_labels_are_fractions_of_the_view():
    labels = labels_of(whole(*draw_image(6)))
    assert set(labels) == {"class_labels", "boxes", "masks"}
    assert (labels["boxes"] > 0).all() and (labels["boxes"] < 1).all()
    assert "masks" not in labels_of(whole(*draw_image(6, masks=False)))


@pytest.mark.parametrize(
    "options", [{"crop_size": 0}, {"scale": (0, 1)}, {"scale": (2, 1)}, {"flip": 1.5}, {"min_visible": -1}]
)
def test_options_that_mean_nothing_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AugmentOptions(**options)


def test_a_window_outside_is_named():
    with pytest.raises(ValueError, match="not inside an example of 128 x 96"):
        crop(whole(*draw_image(0)), (0, 0, WIDTH + 1, 5))
