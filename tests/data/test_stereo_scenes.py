"""Protects generated stereo scenes: the right view is the left one moved by the disparities, occlusions are those of a
z-buffer, splits share no part of a photograph, and a set is drawn once.
"""

import dataclasses

import numpy as np
import pytest

from fa_transformers.data.readers.stereo_folders import check_direction
from fa_transformers.data.readers.tables import DataError
from fa_transformers.data.sets import stereo_scenes
from fa_transformers.data.sets.stereo_scenes import (
    PHOTO_PARTS,
    TEXTURE_PX,
    compose,
    draw_scene,
    find_occluded,
    load_stereo_scenes,
    photo_parts,
    render,
)

HEIGHT, WIDTH, MAX_DISPARITY = 40, 96, 24


def surfaces_of(index: int, split: str = "train") -> list:
    random = np.random.default_rng([7, index])
    return compose(random, photo_parts(split), HEIGHT, WIDTH, MAX_DISPARITY)


def rays(view) -> tuple[np.ndarray, np.ndarray]:
    """Where the points of the left pixels stand in the right image."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    return columns - view.disparity, rows


@pytest.mark.parametrize("index", range(4))
def test_the_right_view_moved_by_the_disparities_is_the_left_one_where_not_occluded(index):
    # Textures that are linear in the place, so that reading between pixels adds no error, too large to be mirrored.
    ramp = np.broadcast_to(np.linspace(0, 255, 4 * TEXTURE_PX)[:, None], (4 * TEXTURE_PX, 4 * TEXTURE_PX))
    texture = np.stack([ramp, ramp.T, (ramp + ramp.T) / 2], axis=2).astype(np.float32)
    origin = (-1.5 * TEXTURE_PX, -1.5 * TEXTURE_PX)
    surfaces = [dataclasses.replace(surface, texture=texture, texture_origin=origin) for surface in surfaces_of(index)]
    left, right = (render(surfaces, HEIGHT, WIDTH, in_right) for in_right in (False, True))
    column, row = rays(left)
    first, row = np.clip(np.floor(column).astype(int), 0, WIDTH - 2), row.astype(int)
    share = (column - first)[:, :, None]
    warped = right.colours[row, first] * (1 - share) + right.colours[row, first + 1] * share
    same = (right.surface[row, first] == left.surface) & (right.surface[row, first + 1] == left.surface)
    compared = same & ~find_occluded(surfaces, left)
    assert compared.mean() > 0.5
    difference = np.abs(warped - left.colours)[compared].max()
    # float32 colours up to 255, each of a few sums of products of such.
    assert difference <= 16 * 255 * np.finfo(np.float32).eps
    assert left.surface.min() >= 0 and right.surface.min() >= 0


@pytest.mark.parametrize("index", range(3))
def test_whole_disparities_take_pixels_to_pixels(index):
    surfaces = [
        dataclasses.replace(surface, disparity=float(round(surface.disparity) + 7 * number % 3), slopes=(0.0, 0.0))
        for number, surface in enumerate(surfaces_of(index))
    ]
    left, right = (render(surfaces, HEIGHT, WIDTH, in_right) for in_right in (False, True))
    occluded = find_occluded(surfaces, left)
    column, row = (values.astype(int) for values in rays(left))
    inside = column >= 0
    seen = right.surface[row, np.maximum(column, 0)] == left.surface
    assert occluded[~inside].all() and 0.02 < occluded.mean() < 0.5
    # Two surfaces of one disparity at one place hide each other in the order in which they were drawn.
    tied = right.disparity[row, np.maximum(column, 0)] == left.disparity
    assert np.array_equal(~occluded & inside & ~(tied & ~seen), seen & inside)
    assert np.array_equal(right.colours[row, column][seen & inside], left.colours[seen & inside])


@pytest.mark.parametrize("index", range(3))
def test_occlusions_are_those_of_a_z_buffer_without_the_inverse(index):
    surfaces = surfaces_of(index)
    left = render(surfaces, HEIGHT, WIDTH, in_right=False)
    column, row = rays(left)
    nearest = np.full(column.shape, -np.inf)
    for surface in surfaces:
        # The x with x - d(x, y) = u, by halving an interval: x - d grows with x.
        low, high = np.full(column.shape, -500.0), np.full(column.shape, 1000.0)
        for _ in range(60):
            middle = (low + high) / 2
            beyond = middle - surface.disparity_at(middle, row) > column
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        there = surface.covers(low, row)
        nearest = np.where(there, np.maximum(nearest, surface.disparity_at(low, row)), nearest)
    outside = (column < 0) | (column > WIDTH - 1)
    # After 60 halvings of 1,500 px the places agree to 1e-12 px and more.
    expected = outside | (nearest > left.disparity + 1e-9)
    assert np.array_equal(find_occluded(surfaces, left), expected)
    assert 0.02 < expected.mean() < 0.6


def test_a_scene_depends_on_its_arguments_alone_and_keeps_its_bounds():
    scenes = [draw_scene("train", index, 3, HEIGHT, WIDTH, MAX_DISPARITY) for index in (0, 1, 0)]
    for name in ("left", "right", "disparity", "occluded"):
        first, other, again = (getattr(scene, name) for scene in scenes)
        assert np.array_equal(first, again) and not np.array_equal(first, other), name
    test = draw_scene("test", 0, 3, HEIGHT, WIDTH, MAX_DISPARITY)
    assert not np.array_equal(test.disparity, scenes[0].disparity)
    for scene in (*scenes, test):
        assert scene.disparity.min() > 0 and scene.disparity.max() <= MAX_DISPARITY
        assert scene.left.shape == scene.right.shape == (HEIGHT, WIDTH, 3) and scene.left.dtype == np.uint8
        check_direction(scene.left, scene.right, scene.disparity, scene.valid, "scene")


def test_a_scene_given_the_wrong_way_round_is_seen():
    scene = draw_scene("train", 1, 0, HEIGHT, WIDTH, MAX_DISPARITY)
    with pytest.raises(DataError, match="swapped"):
        check_direction(scene.right, scene.left, scene.disparity, scene.valid, "scene")


def test_splits_take_textures_from_disjoint_parts_of_the_photographs():
    parts = sorted(PHOTO_PARTS.values())
    assert parts[0][0] == 0 and parts[-1][1] == 1
    assert all(before[1] == after[0] for before, after in zip(parts, parts[1:], strict=False))
    widths = [sum(photo_parts(split)[0].shape[1] for split in PHOTO_PARTS)]
    assert widths == [640]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 0, 0, 40, 96, 24), "split must be"),
        (("train", 0, 0, 8, 96, 24), "sides of 16 px"),
        (("train", 0, 0, 40, 96, 97), "max_disparity from 4 to its width"),
    ],
)
def test_scenes_that_cannot_be_drawn_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(*arguments)


def test_a_set_is_drawn_once_and_holds_its_scenes(tmp_path, monkeypatch):
    options = {"size": (HEIGHT, WIDTH), "max_disparity": MAX_DISPARITY, "seed": 3, "cache_dir": tmp_path}
    loaded = load_stereo_scenes(2, 1, 1, **options)
    assert {split: len(part) for split, part in loaded.items()} == {"train": 2, "validation": 1, "test": 1}

    def draw_again(*arguments):
        raise AssertionError("drawn again")

    expected = draw_scene("train", 1, 3, HEIGHT, WIDTH, MAX_DISPARITY)
    monkeypatch.setattr(stereo_scenes, "draw_scene", draw_again)
    row = load_stereo_scenes(2, 1, 1, **options)["train"].with_format("numpy")[1]
    for name in ("left", "right", "disparity", "occluded"):
        assert np.array_equal(row[name], getattr(expected, name)), name
    with pytest.raises(ValueError, match="num_test must be at least 1"):
        load_stereo_scenes(2, 1, 0, **options)
