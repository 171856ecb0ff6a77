"""Protects folders of stereo pairs: the layouts of Scene Flow, KITTI and Middlebury, and pairs that can't be used."""

import numpy as np
import pytest
from PIL import Image
from stereo_sets import HEIGHT, LAYOUTS, MIDDLEBURY, SHIFT, WIDTH, write_pair, write_png, write_set

from fa_transformers.data.readers.stereo_folders import check_sizes, find_stereo_pairs, read_stereo_pair
from fa_transformers.data.readers.tables import DataError

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
def test_every_layout_is_found_and_read(layout, tmp_path):
    files = write_set(layout, tmp_path)
    pairs = find_stereo_pairs(tmp_path)
    assert [(pair.left, pair.right, pair.disparity) for pair in pairs] == files
    assert len({pair.name for pair in pairs}) == 2
    check_sizes(pairs)
    sample = read_stereo_pair(pairs[1])
    assert sample.left.shape == sample.right.shape == (HEIGHT, WIDTH, 3) and sample.left.dtype == np.uint8
    if files[1][0].suffix != ".webp":
        assert np.array_equal(sample.left[:, SHIFT:], sample.right[:, :-SHIFT])
    assert sample.valid.all() and (sample.disparity == SHIFT).all()


@every_layout
def test_a_missing_file_is_named_and_disparities_are_needed_only_for_training(layout, tmp_path):
    files = write_set(layout, tmp_path)
    files[1][2].unlink()
    with pytest.raises(DataError, match="1 of 2 left images have no disparities"):
        find_stereo_pairs(tmp_path)
    pairs = find_stereo_pairs(tmp_path, needs_disparity=False)
    assert pairs[1].disparity is None and read_stereo_pair(pairs[1]).disparity is None
    files[0][1].unlink()
    with pytest.raises(DataError, match="1 of 2 left images have no right image"):
        find_stereo_pairs(tmp_path, needs_disparity=False)
    with pytest.raises(DataError, match="no such image"):
        read_stereo_pair(pairs[0])


def test_the_later_frames_of_kitti_have_no_disparities_and_are_left_out(tmp_path):
    (left, right, _), *_ = write_set("kitti 2015", tmp_path)
    for path in (left, right):
        path.with_name("000000_11.png").write_bytes(path.read_bytes())
    assert len(find_stereo_pairs(tmp_path)) == 2


def test_calibrations_are_found_beside_the_pairs(tmp_path):
    (left, *_), _ = write_set("middlebury", tmp_path / "middlebury")
    (left.parent / "calib.txt").write_text(MIDDLEBURY)
    pairs = find_stereo_pairs(tmp_path / "middlebury")
    assert pairs[0].read_calibration().max_disparity == 270 and pairs[1].read_calibration() is None
    write_set("kitti 2015", tmp_path / "kitti")
    calibration = tmp_path / "kitti/training/calib_cam_to_cam/000001.txt"
    calibration.parent.mkdir()
    row = "700 0 600 {} 0 700 170 0 0 0 1 0\n"
    calibration.write_text("P_rect_02: " + row.format(35) + "P_rect_03: " + row.format(-343))
    assert find_stereo_pairs(tmp_path / "kitti")[1].read_calibration().baseline == pytest.approx(0.54)


def test_other_folders_are_refused_with_what_they_hold(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find_stereo_pairs(tmp_path / "gone")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="it holds 'pictures'"):
        find_stereo_pairs(tmp_path)


@pytest.mark.parametrize("which", ["right", "disparity"])
def test_files_of_another_size_are_named(which, tmp_path):
    ((left, right, disparity),) = write_set("kitti 2015", tmp_path, count=1)
    if which == "right":
        Image.new("RGB", (WIDTH - 1, HEIGHT)).save(right)
    else:
        write_png(disparity, [[256] * (WIDTH - 1)] * HEIGHT)
    (pair,) = find_stereo_pairs(tmp_path)
    for read in (read_stereo_pair, lambda pair: check_sizes([pair])):
        with pytest.raises(DataError, match=f"{WIDTH - 1} x {HEIGHT} pixels, but .* has {WIDTH} x {HEIGHT}"):
            read(pair)


def test_left_and_right_that_are_swapped_are_seen(tmp_path):
    ((left, right, disparity),) = write_set("middlebury", tmp_path, count=1)
    kept = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(kept)
    (pair,) = find_stereo_pairs(tmp_path)
    with pytest.raises(DataError, match="left and right are swapped"):
        read_stereo_pair(pair)


def test_unrelated_images_are_not_called_swapped(tmp_path):
    ((left, right, disparity),) = write_set("middlebury", tmp_path, count=1)
    write_pair(left, tmp_path / "unused.png", seed=7)
    assert read_stereo_pair(find_stereo_pairs(tmp_path)[0]).valid.all()


def test_a_broken_image_is_named_once(tmp_path):
    ((left, right, disparity),) = write_set("kitti 2015", tmp_path, count=1)
    right.write_bytes(right.read_bytes()[:-60])
    with pytest.raises(DataError, match="image_3") as raised:
        read_stereo_pair(find_stereo_pairs(tmp_path)[0])
    assert str(raised.value).count(str(right)) == 1
