"""Protects the files of stereo sets, written here byte by byte: values, places without one, and what can't be used."""

import struct

import numpy as np
import pytest
from stereo_sets import MIDDLEBURY, write_pfm, write_png

from fa_transformers.data.readers.stereo_files import (
    Calibration,
    read_disparity,
    read_disparity_png,
    read_kitti_calibration,
    read_middlebury_calibration,
    read_pfm,
    read_pfm_size,
    read_png_size,
)
from fa_transformers.data.readers.tables import DataError

INF, NAN = float("inf"), float("nan")
# Rows from the top, as they are seen.
ROWS = [[1.5, 2.25, 3.0], [40.0, 0.125, 6.0]]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["Pf", "PF"])
def test_a_pfm_file_gives_the_values_that_were_written_top_row_first(tmp_path, kind, order):
    path = write_pfm(tmp_path / "a.pfm", ROWS, kind, order)
    expected = np.array(ROWS, np.float32)
    found = read_pfm(path)
    assert found.dtype == np.float32 and found.dtype.isnative and found.flags.c_contiguous
    assert np.array_equal(found, expected if kind == "Pf" else np.repeat(expected[:, :, None], 3, axis=2))
    disparity, valid = read_disparity(path)
    assert np.array_equal(disparity, expected) and valid.all()
    assert read_pfm_size(path) == (2, 3)


@pytest.mark.parametrize(
    "header", ["Pf\n3 2\n-0.003922\n", "Pf 3 2 -1\n", "Pf\r\n3 2\r\n-1\r\n", "Pf\n# by\n3 2\n-1\n"]
)
def test_every_way_of_writing_the_header_is_read(tmp_path, header):
    assert np.array_equal(read_pfm(write_pfm(tmp_path / "a.pfm", ROWS, header=header)), np.array(ROWS, np.float32))


def test_a_first_value_that_looks_like_white_space_belongs_to_the_values(tmp_path):
    (value,) = struct.unpack("<f", b"\n\n  ")
    path = write_pfm(tmp_path / "a.pfm", [[value, 2.0]])
    assert read_pfm(path)[0, 0] == np.float32(value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("P6\n3 2\n-1\n", "must begin with Pf"),
        ("Pf\n3 2\n", "cut off|no number"),
        ("Pf\nthree 2\n-1\n", "no number"),
        ("Pf\n-3 2\n-1\n", "-3 x 2"),
        ("Pf\n3 0\n-1\n", "3 x 0"),
        ("Pf\n3 2\n0\n", "can't be 0"),
        ("Pf\n3 2\nnan\n", "can't be nan"),
        ("Pf\n4 2\n-1\n", "truncated"),
        ("Pf\n2 2\n-1\n", "longer than its header says"),
        ("", "must begin with Pf"),
    ],
)
def test_a_pfm_file_that_cannot_be_read_is_named_with_what_is_wrong(tmp_path, header, message):
    path = write_pfm(tmp_path / "a.pfm", ROWS, header=header)
    with pytest.raises(DataError, match=f"a.pfm: .*({message})"):
        read_pfm(path)


def test_truncation_at_any_byte_is_seen(tmp_path):
    whole = write_pfm(tmp_path / "whole.pfm", ROWS).read_bytes()
    path = tmp_path / "cut.pfm"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cut.pfm"):
            read_pfm(path)


def test_places_without_a_disparity_are_zero_and_not_valid(tmp_path, caplog):
    path = write_pfm(tmp_path / "a.pfm", [[1.0, INF, 0.0], [NAN, 2.0, INF]])
    disparity, valid = read_disparity(path)
    assert valid.tolist() == [[True, False, False], [False, True, False]]
    assert disparity.tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    assert "1 of 6 disparities are NaN" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [([[1.0, -2.0]], "1 of 2 disparities are negative"), ([[-INF, 1.0]], "negative"), ([[INF, 0.0]], "no pixel has")],
)
def test_disparities_that_no_left_image_has_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_disparity(write_pfm(tmp_path / "a.pfm", rows))


def test_a_coloured_picture_is_no_disparity(tmp_path):
    path = tmp_path / "a.pfm"
    path.write_bytes(b"PF\n1 1\n-1\n" + struct.pack("<3f", 1.0, 2.0, 3.0))
    with pytest.raises(DataError, match="channels of the PFM file differ"):
        read_disparity(path)


def test_kitti_counts_in_256ths_and_zero_is_unknown(tmp_path):
    path = write_png(tmp_path / "a.png", [[256, 0, 1], [65535, 384, 128]])
    disparity, valid = read_disparity(path)
    assert disparity.dtype == np.float32
    assert disparity.tolist() == [[1.0, 0.0, 1 / 256], [65535 / 256, 1.5, 0.5]]
    assert valid.tolist() == [[True, False, True], [True, True, True]]
    assert read_png_size(path) == (2, 3)


def test_eight_bits_are_refused_unless_their_scale_is_given(tmp_path):
    path = write_png(tmp_path / "a.png", [[4, 0]], bits=8)
    with pytest.raises(DataError, match="8 bits a pixel, but disparities of KITTI have 16"):
        read_disparity(path)
    disparity, valid = read_disparity_png(path, scale=2.0)
    assert disparity.tolist() == [[2.0, 0.0]] and valid.tolist() == [[True, False]]
    for scale in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="`scale` must be"):
            read_disparity_png(path, scale)


def test_other_files_are_no_disparities(tmp_path):
    coloured = write_png(tmp_path / "colour.png", [[1, 2]], bits=8, colour_type=2)
    whole = write_png(tmp_path / "a.png", [[256] * 50] * 50).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) - 30])
    (tmp_path / "text.png").write_text("disparities")
    (tmp_path / "a.jpg").write_bytes(b"x")
    messages = {
        coloured: "has colours",
        tmp_path / "cut.png": "broken|truncated",
        tmp_path / "text.png": "no PNG file",
        tmp_path / "a.jpg": "read from .pfm and .png",
        tmp_path / "gone.pfm": "no such file",
    }
    for path, message in messages.items():
        with pytest.raises(DataError, match=f"{path.name}: .*({message})"):
            read_disparity(path)


def test_a_calibration_of_middlebury_is_in_pixels_and_metres(tmp_path):
    path = tmp_path / "calib.txt"
    path.write_text(MIDDLEBURY)
    expected = Calibration(3979.911, 0.193001, 124.343, 270, (1988, 2964))
    assert read_middlebury_calibration(path) == expected
    for broken, message in [
        (MIDDLEBURY.replace("baseline", "base"), "lacks baseline"),
        (MIDDLEBURY.replace("193.001", "-193"), "baseline must be positive"),
        (MIDDLEBURY.replace("[3979.911 0 1244.772; 0", "[3979.911;"), "cam0 of the calibration can't be read"),
        (MIDDLEBURY.replace("124.343", "nan"), "doffs of the calibration can't be read"),
    ]:
        path.write_text(broken)
        with pytest.raises(DataError, match=message):
            read_middlebury_calibration(path)


def test_a_calibration_of_kitti_gives_the_baseline_of_the_colour_cameras(tmp_path):
    path = tmp_path / "000000.txt"
    left = "P_rect_02: 700 0 600 35 0 700 170 0 0 0 1 0\n"
    right = "P_rect_03: 700 0 600 -343 0 700 170 0 0 0 1 0\n"
    path.write_text("calib_time: 09-Jan-2012\n" + left + right)
    found = read_kitti_calibration(path)
    assert found.focal_length == 700 and found.baseline == pytest.approx(0.54) and found.doffs == 0
    for broken, message in [(left, "needs P_rect_02 and P_rect_03"), (left.replace("02", "03") + right, "needs")]:
        path.write_text(broken)
        with pytest.raises(DataError, match=message):
            read_kitti_calibration(path)
    path.write_text(left.replace("35", "-343") + right.replace("-343", "35"))
    with pytest.raises(DataError, match="no positive focal length and baseline"):
        read_kitti_calibration(path)
