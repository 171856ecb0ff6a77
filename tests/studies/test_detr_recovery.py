"""Protects the study of recovered detectors: its pictures' boxes, its scores, and that a whole run goes through."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from repository import load_script
from torch import nn

from fa_transformers.studies.detr_recovery import as_pixel_values, score_detector
from fa_transformers.studies.shapes import (
    CLASS_NAMES,
    SIDE_PX,
    class_map,
    detr_labels,
    draw_context_pictures,
    draw_pictures,
)


def test_pictures_depend_on_seed_and_number_and_their_boxes_lie_inside_without_overlap():
    pictures, others = draw_pictures(12, seed=3), draw_pictures(12, seed=4)
    for picture, again, other in zip(pictures, draw_pictures(12, seed=3), others, strict=True):
        assert np.array_equal(picture.pixels, again.pixels) and np.array_equal(picture.boxes, again.boxes)
        assert not np.array_equal(picture.pixels, other.pixels)
        assert 1 <= len(picture.labels) == len(picture.boxes) <= 4
        assert picture.boxes.min() >= 0 and picture.boxes.max() <= SIDE_PX
        covered = np.zeros((SIDE_PX, SIDE_PX), dtype=int)
        for left, top, right, bottom in picture.boxes.astype(int):
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1
    assert {label for picture in pictures for label in picture.labels} == set(range(len(CLASS_NAMES)))


def test_labels_and_class_maps_say_where_the_boxes_are():
    picture = draw_pictures(1, seed=0)[0]
    boxes = detr_labels(picture)["boxes"] * SIDE_PX
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
    torch.testing.assert_close(corners, torch.from_numpy(picture.boxes))
    places = class_map(picture, 8)
    for (column, row), label in zip((boxes[:, :2] // 8).int().tolist(), picture.labels, strict=True):
        assert places[row, column] == label


def test_a_shape_is_repeated_where_another_of_its_picture_is_of_its_kind():
    kinds = {picture.pixels.tobytes(): picture.labels for picture in draw_pictures(40, seed=0)}
    seen = set()
    for picture in draw_context_pictures(20, seed=0):
        own = kinds[picture.pixels.tobytes()]
        assert len(own) >= 2
        for kind, label in zip(own, picture.labels, strict=True):
            assert label == (sum(kind == other for other in own) > 1)
            seen.add(int(label))
    assert seen == {0, 1}


class Oracle(nn.Module):
    """Finds every shape of the pictures that it is made for."""

    config = SimpleNamespace(id2label=dict(enumerate(CLASS_NAMES)))

    def __init__(self, pictures):
        super().__init__()
        self.answers = [(as_pixel_values([picture]), detr_labels(picture)) for picture in pictures]

    def forward(self, pixel_values):
        logits = torch.full((len(pixel_values), 4, len(CLASS_NAMES)), -9.0)
        boxes = torch.full((len(pixel_values), 4, 4), 0.5)
        for row, pixels in enumerate(pixel_values):
            labels = next(labels for seen, labels in self.answers if torch.equal(seen[0], pixels))
            for query, (label, box) in enumerate(zip(labels["class_labels"], labels["boxes"], strict=True)):
                logits[row, query, label], boxes[row, query] = 9.0, box
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


def test_a_detector_that_finds_every_shape_has_an_ap_of_one():
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed, which scores detections")
    pictures = draw_pictures(8, seed=0)
    assert score_detector(Oracle(pictures), pictures) == {"box_ap": 1.0, "box_ap50": 1.0, "box_ap75": 1.0}
    assert score_detector(Oracle(pictures), draw_pictures(8, seed=0)[::-1])["box_ap"] == 1.0


@pytest.mark.slow
def test_a_whole_run_trains_swaps_recovers_and_writes_its_table(tmp_path):
    sizes = ["--num_train", "200", "--num_test", "8", "--backbone_steps", "2", "--steps", "2", "--context_steps", "2"]
    steps = ["--transfer_steps", "2", "--end_to_end_steps", "2", "--context_detector_steps", "2"]
    steps += ["--output_dir", str(tmp_path)]
    result = load_script("detr_recovery").main(sizes + steps)
    assert len(result["rows"]) == 6
    assert (tmp_path / "detr_recovery.txt").is_file() and (tmp_path / "distilled" / "recovery.json").is_file()
