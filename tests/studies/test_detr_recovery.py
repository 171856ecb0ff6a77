"""Protects the study of recovered detectors: its pictures' boxes, its scores, and that a whole run goes through."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from repository import load_script
from torch import nn

from fa_transformers.studies import detr_recovery
from fa_transformers.studies.detr_recovery import (
    DETECTORS,
    DetectorPlan,
    as_pixel_values,
    build_detector,
    score_detector,
)
from fa_transformers.studies.shapes import (
    CLASS_NAMES,
    COLOURS,
    FRAME_KIND,
    NUM_APPEARANCES,
    SIDE_PX,
    appearance_map,
    class_map,
    detr_labels,
    draw_pictures,
)


def test_pictures_depend_on_seed_and_number_and_their_boxes_lie_inside_without_overlap():
    pictures, others = draw_pictures(12, seed=3), draw_pictures(12, seed=4)
    for picture, again, other in zip(pictures, draw_pictures(12, seed=3), others, strict=True):
        assert np.array_equal(picture.pixels, again.pixels) and np.array_equal(picture.boxes, again.boxes)
        assert not np.array_equal(picture.pixels, other.pixels)
        assert picture.boxes.min() >= 0 and picture.boxes.max() <= SIDE_PX
        covered = np.zeros((SIDE_PX, SIDE_PX), dtype=int)
        for left, top, right, bottom in picture.boxes.astype(int):
            covered[top:bottom, left:right] += 1
            # What a frame looks like stands on exactly its box.
            (appearance,) = np.unique(picture.appearances[top:bottom, left:right])
            assert appearance // len(COLOURS) == FRAME_KIND
        assert covered.max() == 1
        assert np.array_equal(covered == 1, picture.appearances // len(COLOURS) == FRAME_KIND)
    assert {label for picture in pictures for label in picture.labels} == set(range(len(CLASS_NAMES)))


def test_a_frame_s_class_is_the_kind_of_the_only_mark_in_its_colour():
    numbers = set()
    for picture in draw_pictures(40, seed=0):
        kinds, colours = np.divmod(np.unique(picture.appearances[picture.appearances < NUM_APPEARANCES]), len(COLOURS))
        marks = {colour: kind for kind, colour in zip(kinds, colours, strict=True) if kind != FRAME_KIND}
        assert len(marks) == (kinds != FRAME_KIND).sum() == len(set(marks.values())), "one mark of a colour and kind"
        numbers.add(len(marks))
        for (left, top, _, _), label in zip(picture.boxes.astype(int), picture.labels, strict=True):
            assert marks[picture.appearances[top, left] % len(COLOURS)] == label
    assert numbers == {1, 2, 3}


def test_objects_have_the_colours_that_their_appearances_say():
    for picture in draw_pictures(8, seed=1):
        for left, top, right, bottom in picture.boxes.astype(int):
            edges = picture.pixels[[top, bottom - 1], left:right].reshape(-1, 3).mean(axis=0)
            distances = np.abs(np.array(COLOURS) - edges).sum(axis=1)
            assert distances.argmin() == picture.appearances[top, left] % len(COLOURS)
            inner = picture.pixels[top + 8 : bottom - 8, left + 8 : right - 8].reshape(-1, 3).mean(axis=0)
            assert np.abs(inner - edges).sum() > 30, "hollow"


def test_labels_and_maps_say_where_the_boxes_are():
    picture = draw_pictures(1, seed=0)[0]
    boxes = detr_labels(picture)["boxes"] * SIDE_PX
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
    torch.testing.assert_close(corners, torch.from_numpy(picture.boxes))
    classes, appearances = class_map(picture, 8), appearance_map(picture, 8)
    for (column, row), label in zip((boxes[:, :2] // 8).int().tolist(), picture.labels, strict=True):
        assert classes[row, column] == label
    assert torch.equal(classes >= 0, appearances // len(COLOURS) == FRAME_KIND)


class Oracle(nn.Module):
    """Finds every frame of the pictures that it is made for, with DETR's class for none or without."""

    config = SimpleNamespace(id2label=dict(enumerate(CLASS_NAMES)))

    def __init__(self, pictures, has_none):
        super().__init__()
        self.has_none = has_none
        self.answers = [(as_pixel_values([picture]), detr_labels(picture)) for picture in pictures]

    def forward(self, pixel_values):
        logits = torch.full((len(pixel_values), 8, len(CLASS_NAMES) + self.has_none), -9.0)
        logits[..., len(CLASS_NAMES) :] = 0.0
        boxes = torch.full((len(pixel_values), 8, 4), 0.5)
        for row, pixels in enumerate(pixel_values):
            labels = next(labels for seen, labels in self.answers if torch.equal(seen[0], pixels))
            for query, (label, box) in enumerate(zip(labels["class_labels"], labels["boxes"], strict=True)):
                logits[row, query, label], boxes[row, query] = 9.0, box
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


@pytest.mark.parametrize("has_none", [True, False])
def test_a_detector_that_finds_every_frame_has_an_ap_of_one(has_none):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed, which scores detections")
    pictures = draw_pictures(8, seed=0)
    oracle = Oracle(pictures, has_none)
    assert score_detector(oracle, pictures) == {"box_ap": 1.0, "box_ap50": 1.0, "box_ap75": 1.0}
    assert score_detector(oracle, pictures[::-1])["box_ap"] == 1.0


@pytest.mark.parametrize("kind", list(DETECTORS))
def test_the_detectors_are_small_and_stock_and_read_pictures(kind):
    model = build_detector(kind)
    assert model.config.model_type == kind and model.num_parameters() < 400_000
    output = model(as_pixel_values(draw_pictures(1, seed=0)))
    assert output.encoder_last_hidden_state.shape == (1, (SIDE_PX // 8) ** 2, 64) and output.pred_boxes.shape[1] == 8


@pytest.mark.slow
def test_a_whole_run_trains_swaps_recovers_and_writes_its_table(tmp_path):
    sizes = ["--num_train", "100", "--num_test", "8", "--backbone_steps", "2", "--steps", "2", "--encoder_steps", "2"]
    steps = ["--transfer_steps", "2", "--end_to_end_steps", "2", "--output_dir", str(tmp_path)]
    script = load_script("detr_recovery")
    result = script.main([*sizes, *steps, "--detectors", "detr", "--seeds", "0"])
    assert [row["detector"] for row in result["rows"]] == ["DETR"] * 4
    errors = [row["encoder_error"] for row in result["rows"]]
    assert errors[0] == 0.0 < errors[1]
    assert (tmp_path / "detr_0" / "distilled" / "recovery.json").is_file()
    table = json.loads((tmp_path / "detr.json").read_text())["tables"]["recovery"]
    assert [row[:3] for row in table["rows"]] == [["DETR", 0, row["state"]] for row in result["rows"]]


def test_a_finished_run_is_taken_where_its_settings_are_the_same(tmp_path, monkeypatch, capsys):
    script = load_script("detr_recovery")
    ran = []

    def run_study(plan):
        ran.append((plan.detector, plan.seed, plan.steps))
        return {"rows": [{"detector": plan.detector, "seed": plan.seed, "box_ap": 0.5}], "plan": plan.settings}

    monkeypatch.setattr(script, "run_study", run_study)
    script.main(["--detectors", "detr", "--seeds", "3", "--output_dir", str(tmp_path)])
    script.main(["--detectors", "detr", "conditional_detr", "--seeds", "3", "--output_dir", str(tmp_path)])
    assert ran == [("detr", 3, 2500), ("conditional_detr", 3, 2500)]
    rows = json.loads((tmp_path / "detr.json").read_text())["tables"]["recovery"]["rows"]
    assert [row[:2] for row in rows] == [["detr", 3], ["conditional_detr", 3]]
    script.main(["--detectors", "detr", "--seeds", "3", "--steps", "7", "--output_dir", str(tmp_path)])
    assert ran[2:] == [("detr", 3, 7)]
    with pytest.raises(SystemExit):
        script.parse(["--detectors", "yolo"])
    assert "--detectors yolo is unknown" in capsys.readouterr().err


def test_a_softmax_detector_is_taken_where_its_training_had_the_same_settings(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(detr_recovery, "train_detector", lambda plan, folder: trained.append(plan.steps))
    plan = DetectorPlan(steps=7, output_dir=tmp_path)
    for one in (plan, replace(plan, end_to_end_steps=9), replace(plan, steps=8), replace(plan, steps=8, seed=1)):
        detr_recovery._train_once(one, tmp_path / "softmax")
    assert trained == [7, 8, 8], "the recovery's steps are no part of it"
