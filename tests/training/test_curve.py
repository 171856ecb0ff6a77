"""Protects the course of a run: short whatever its length, the same after a resume, and drawn with its best step."""

import dataclasses
import json
import math

import pytest

from fa_transformers.pages.panels import nice_ticks
from fa_transformers.training.checkpointing import TrainingState
from fa_transformers.training.curve import MOST_POINTS, Curve, Series, draw_curve, panels_of


@pytest.mark.parametrize("number", [1, MOST_POINTS, MOST_POINTS + 1, 20_000])
def test_points_are_few_and_evenly_spread_from_the_first_on(number):
    series = Series()
    for step in range(1, number + 1):
        series.add(step, 1 / step)
    steps = [row[0] for row in series.rows]
    assert len(steps) <= MOST_POINTS and steps[0] == 1 and series.count == number
    assert {b - a for a, b in zip(steps, steps[1:], strict=False)} <= {series.every}
    assert number - steps[-1] < series.every and len(steps) > min(number, MOST_POINTS) // 2 - 1


def test_a_resumed_curve_keeps_the_points_of_an_uninterrupted_one():
    whole, resumed = Curve(), Curve()
    for step in range(1, 3000):
        for curve in (whole, resumed):
            curve.steps.add(step, math.sin(step), 1e-4)
        if step % 700 == 0:
            resumed = Curve.load(json.loads(json.dumps(dataclasses.asdict(resumed))))
    assert whole == resumed


def test_a_state_without_a_curve_is_read(tmp_path):
    (tmp_path / "training_state.json").write_text('{"settings": {}, "step": 3}')
    assert TrainingState.load(tmp_path) == TrainingState({}, step=3)


def test_evaluations_are_kept_and_those_of_another_metric_dropped():
    state = TrainingState({}, step=4)
    state.curve.follow("accuracy")
    state.record_score({"accuracy": 0.5, "loss": 1.0}, "accuracy")
    state.curve.follow("accuracy")
    assert state.curve.scores.rows == [[4, 0.5, 1.0]]
    state.curve.follow("loss")
    assert state.curve.scores.rows == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (0, 1e-4), (120, 139), (0, 250_000), (5, 5), (-1, 0)])
def test_ticks_are_round_few_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 6 and low <= ticks[0] and ticks[-1] <= high
    gaps = {round(b - a, 12) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert len(gaps) <= 1 and all(f"{gap:e}"[0] in "125" and "000000e" in f"{gap:e}" for gap in gaps)


def test_panels_hold_what_was_measured_and_the_best_step():
    state = TrainingState({}, step=10)
    assert panels_of(state.curve, None, None) == []
    state.curve.follow("accuracy")
    for step in range(1, 11):
        state.curve.steps.add(step, 2 / step, 1e-3)
    state.record_score({"accuracy": 0.5, "loss": 1.0}, "accuracy")
    loss, score, rate = panels_of(state.curve, state.best_step, state.best_score)
    assert [line.name for line in loss.lines] == ["training", "validation"]
    assert score.best == (10, 0.5) and loss.limits == ((1, 10), (0.2, 2))
    assert [line.y for line in rate.lines] == [[1e-3] * 10]
    state.curve.follow("loss")
    state.record_score({"loss": 1.0}, "loss")
    assert [panel.title for panel in panels_of(state.curve, 10, 1.0)] == ["loss", "learning rate"]


def test_the_picture_marks_the_best_step(tmp_path):
    curve = Curve("accuracy")
    for step in range(1, 11):
        curve.steps.add(step, 2 / step, 1e-3)
        curve.scores.add(step, step / 10, 1.0)
    pictures = []
    for best in (5, 5, 6):
        draw_curve(curve, best, best / 10, tmp_path / "curve.png")
        pictures.append((tmp_path / "curve.png").read_bytes())
    assert pictures[0].startswith(b"\x89PNG") and pictures[0] == pictures[1] != pictures[2]
