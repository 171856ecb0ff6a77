"""The course of a run: loss, rate and validation score by step, kept short, and its picture."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..charts import HIGHLIGHT, MUTED, SUBTLE, chart_style, clear_frame, new_figure, save_figure
from ..pages.panels import Line, Panel

MOST_POINTS = 512
"""Points of a line that are kept, more than a picture of it has columns of pixels."""
CURVE_FILE = "training_curve.png"


@dataclass
class Series:
    """Rows of numbers that come one by one, of which at most `MOST_POINTS` are kept, evenly spread from the first on.

    When there are too many, every second one is dropped, and of those that follow `every`-th alone is kept. What is
    kept follows from the rows that came, so that a resumed run keeps what an uninterrupted one does.
    """

    rows: list[list[float]] = field(default_factory=list)
    every: int = 1
    count: int = 0

    def add(self, *row: float) -> None:
        """Note the next row."""
        if self.count % self.every == 0:
            self.rows.append([float(f"{value:.6g}") for value in row])
        self.count += 1
        if len(self.rows) > MOST_POINTS:
            self.rows, self.every = self.rows[::2], 2 * self.every


@dataclass
class Curve:
    """The course of a run, which its checkpoints carry.

    Args:
        metric: the score that names the best checkpoint; "" before training.
        steps: rows of step, running mean of the loss, and the learning rate.
        scores: rows of step, `metric` and loss on the validation split.
    """

    metric: str = ""
    steps: Series = field(default_factory=Series)
    scores: Series = field(default_factory=Series)

    @classmethod
    def load(cls, content: dict[str, Any]) -> "Curve":
        """Make one of what `dataclasses.asdict` gives."""
        return cls(content["metric"], Series(**content["steps"]), Series(**content["scores"]))

    def follow(self, metric: str) -> None:
        """Let the scores be those of `metric` from now on; those of another one are dropped."""
        if metric != self.metric:
            self.metric, self.scores = metric, Series()


def panels_of(curve: Curve, best_step: int | None, best_score: float | None) -> list[Panel]:
    """Return the panels of a run's course: losses, validation score, learning rate; none of what was not measured."""
    steps, losses, rates = _columns(curve.steps, 3)
    scored, scores, validation = _columns(curve.scores, 3)
    best = None if best_step is None or best_score is None else (float(best_step), best_score)
    training = Line("training", steps, losses, False)
    panels = [
        Panel("loss", tuple(line for line in (training, Line("validation", scored, validation, True)) if line.x)),
        Panel(f"validation {curve.metric}", (Line(curve.metric, scored, scores, True),) if scored else (), best),
        Panel("learning rate", (Line("learning rate", steps, rates, True),) if steps else ()),
    ]
    is_loss = curve.metric == "loss"  # which the first panel has
    return [panel for number, panel in enumerate(panels) if panel.lines and not (is_loss and number == 1)]


def _columns(series: Series, number: int) -> list[list[float]]:
    """The columns of those rows whose numbers are all finite."""
    rows = [row for row in series.rows if all(map(math.isfinite, row))]
    return [[row[column] for row in rows] for column in range(number)]


def draw_curve(curve: Curve, best_step: int | None, best_score: float | None, path: Path) -> None:
    """Write the PNG of a run's course: its panels one below the other, the best checkpoint marked."""
    panels = panels_of(curve, best_step, best_score)
    with chart_style():
        height = 0.6 + 2.1 * len(panels)
        # Places are given: to find them takes as long as all the rest.
        figure, rows = new_figure(len(panels), size=(7, height), layout=None, squeeze=False, sharex=True)
        figure.subplots_adjust(0.1, 0.5 / height, 0.98, 1 - 0.3 / height, hspace=0.25)
        for axes, panel in zip(rows[:, 0], panels, strict=True):
            _draw_panel(axes, panel)
        rows[-1, 0].set_xlabel("step")
        save_figure(figure, path)


def _draw_panel(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        colour = HIGHLIGHT if line.is_main else MUTED["BERT"]
        marker = "o" if line.has_marks else ""
        axes.plot(line.x, line.y, color=colour, marker=marker, markersize=3, linewidth=1.3, label=line.name)
    if panel.best is not None:
        axes.plot(*panel.best, "o", color="none", markeredgecolor=HIGHLIGHT, markersize=9, label="best checkpoint")
    axes.set_title(panel.title, loc="left", fontsize=9, color=SUBTLE)
    clear_frame(axes)
    if len(panel.lines) > 1 or panel.best is not None:
        axes.legend(frameon=False, fontsize=8)
