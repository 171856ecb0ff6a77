"""Protects the comparison of whole pictures with tiles: which objects a border cuts, part scores, SAHI's slices."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from repository import load_script

from fa_transformers.data.readers.objects import DenseImage
from fa_transformers.metrics.detection import Detections
from fa_transformers.studies import tiling
from fa_transformers.studies.tiling import TilingOptions, is_cut, score_part, tile_boxes, tiled_method

TILES = np.array([[0, 0, 100, 100], [80, 0, 180, 100]], dtype=float)
pytest.importorskip("faster_coco_eval", reason="faster-coco-eval scores detections")


def picture(boxes) -> DenseImage:
    boxes = np.array(boxes, dtype=np.float32)
    count = len(boxes)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).astype(float)
    return DenseImage(
        image_id=1, picture=Path("a.png"), size=(200, 200), is_turned=False, labels=np.zeros(count, dtype=int),
        boxes=boxes, areas=areas, is_crowd=np.zeros(count, dtype=bool), rles=None, mask_boxes=boxes,
    )  # fmt: skip


def test_an_object_is_cut_where_a_tile_shows_a_part_of_it_and_lost_where_none_shows_it_whole():
    boxes = [[10, 10, 20, 20], [70, 10, 90, 20], [82, 10, 98, 20], [60, 10, 120, 20], [0, 0, 100, 100]]
    cut, lost = is_cut(np.array(boxes, dtype=float), TILES)
    assert cut.tolist() == [False, True, False, True, True]
    assert lost.tolist() == [False, False, False, True, False]


def test_scores_of_a_part_count_the_others_neither_as_missed_nor_as_mistakes():
    image = picture([[10, 10, 50, 50], [100, 100, 140, 150]])
    first = Detections(1, [0.9], [0], [[10, 10, 50, 50]])
    both = Detections(1, [0.9, 0.8], [0, 0], [[100, 100, 140, 150], [10, 10, 50, 50]])
    for found in (first, both):
        assert score_part([found], [image], ["one"], [np.array([True, False])])["box_ap"] == 1.0
    assert score_part([first], [image], ["one"], [np.array([False, True])])["box_ap"] == 0.0
    assert score_part([both], [image], ["one"])["box_ap"] == 1.0 > score_part([first], [image], ["one"])["box_ap"]


def square_detector(*arguments, **options):
    """A `whole_method` that finds the white rectangle of a picture."""

    def detect(pixels):
        rows, columns = (np.flatnonzero(pixels[..., 0].max(axis=axis)) for axis in (1, 0))
        boxes = [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]] if len(rows) else []
        return Detections(0, [0.9] * len(boxes), [0] * len(boxes), np.array(boxes, dtype=float).reshape(-1, 4))

    return detect


def test_slices_find_an_object_once_and_lose_the_extent_of_one_that_is_larger_than_the_overlap(monkeypatch):
    pytest.importorskip("sahi", reason="SAHI is not installed, which makes the slices")
    monkeypatch.setattr(tiling, "whole_method", square_detector)
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "one"}), has_masks=False)
    detect = tiled_method(model, None, 0.5, 100, 0.2)
    for box, whole in (([70, 85, 90, 95], True), ([10, 20, 180, 40], False)):
        pixels = np.zeros((180, 180, 3), dtype=np.uint8)
        pixels[box[1] : box[3], box[0] : box[2]] = 255
        found = detect(pixels)
        assert is_cut(np.array([box]), tile_boxes((180, 180), 100, 0.2))[1].tolist() == [not whole]
        assert (np.asarray(found.boxes).tolist() == [box]) == whole


@pytest.mark.parametrize(("kind", "longest"), [("", 100), ("shrunk", 100), ("standard", None)])
def test_the_whole_picture_is_searched_beside_slices_shrunk_or_as_it_is(kind, longest, monkeypatch):
    pytest.importorskip("sahi", reason="SAHI is not installed, which makes the slices")
    asked, seen = [], []

    def blind_detector(*arguments, longest):
        asked.append(longest)
        return lambda pixels: seen.append(pixels.shape[:2]) or Detections(0, [], [], np.zeros((0, 4)))

    monkeypatch.setattr(tiling, "whole_method", blind_detector)
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "one"}), has_masks=False)
    tiled_method(model, None, 0.5, 100, 0.2, **({kind: True} if kind else {}))(np.zeros((180, 180, 3), dtype=np.uint8))
    assert asked == [longest]
    assert sorted(seen) == [(100, 100)] * 4 + [(180, 180)] * bool(kind)


def test_flags_that_cannot_be_used_are_named(tmp_path):
    for options, message in (
        ({"slices": (16,)}, "--slices 16: a slice must have at least 32"),
        ({"overlap": 1.0}, "--overlap must be at least 0 and below 1"),
        ({"threshold": 0.01}, "--threshold must be at least 0.1"),
        ({"digit_px": (20,)}, "--digit_px must be two numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            TilingOptions(**options).check()
    with pytest.raises(FileNotFoundError, match="there is no model folder of that name"):
        tiling.load_detector(str(tmp_path), masks=False)


def test_tables_have_a_row_for_each_way_and_for_the_objects_at_the_borders():
    scores = {"box_ap": 0.5, "box_ap50": 0.6, "box_ap_small": None, "mask_ap": None}
    speed = {"pictures_per_second": 0.4, "slower_wall": 1.6, "slower_cpu": 1.5}
    methods = [{"method": name} | speed | scores for name in (tiling.WHOLE, tiling.slices_name(512))]
    border = {"slices": 512, "overlap_px": 102, "objects": "cut by a border", "number": 9, "tiled": 0.4, "whole": 0.5}
    found = {"methods": methods, "borders": [border]}
    made = load_script("whole_or_tiles").make_tables(found, TilingOptions(), "python x")
    assert made["tiles"]["rows"][1] == ["slices of 512 px", 0.4, 1.6, 1.5, 0.5, 0.6, None]
    assert made["tiles_borders"]["rows"] == [[512, 102, "cut by a border", 9, 0.4, 0.5]]
    made |= load_script("whole_or_tiles").make_tables(
        {"methods": methods, "borders": [border | {"standard": 0.45}]}, TilingOptions(standard=True, table="t"), "x"
    )
    assert made["t_borders"]["rows"] == [[512, 102, "cut by a border", 9, 0.4, 0.45, 0.5]]
    for table in made.values():
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
