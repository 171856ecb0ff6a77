"""The picture of an explanation: the highest scores, where they are, and the answer without them."""

import os
from typing import Any

from ..charts import HIGHLIGHT, MUTED, SUBTLE, chart_style, clear_frame, new_figure, save_figure
from ..tables import one_line
from .explanation import DocumentExplanation, Explanation, ImageExplanation
from .explanation_page import METHOD_NAMES, NUM_TOP, colours_of, curves_of, snippet_of

AGAINST_COLOUR = "#b45309"
LABEL_CHARACTERS = 60


def draw_explanation(explanation: Explanation, path: str | os.PathLike) -> None:
    """Write the picture of an explanation's first scores as a PNG.

    Raises:
        OSError: it can't be written.
    """
    with chart_style():
        figure, (left, right) = new_figure(1, 2, size=(11, 4.2), width_ratios=(3, 2))
        if isinstance(explanation, DocumentExplanation):
            draw_passages(left, explanation)
        else:
            assert isinstance(explanation, ImageExplanation)
            draw_squares(left, explanation)
        label, score = next(iter(explanation.probabilities.items()))
        title = f"{one_line(explanation.name, LABEL_CHARACTERS)}: {one_line(label, LABEL_CHARACTERS)} {score:.3f}"
        figure.suptitle(_plain(title), x=0.01, ha="left")
        draw_deletion(right, explanation)
        save_figure(figure, path)


def draw_passages(axes: Any, explanation: DocumentExplanation) -> None:
    """Draw the passages with the highest scores as bars, their beginnings beside them."""
    first = explanation.scores[0]
    top = first.order()[:NUM_TOP]
    values = [float(first.values[number]) for number in top]
    axes.barh(range(len(top)), values, color=[HIGHLIGHT if value >= 0 else AGAINST_COLOUR for value in values])
    axes.set_yticks(
        range(len(top)), [_plain(one_line(snippet_of(explanation, number), LABEL_CHARACTERS)) for number in top]
    )
    axes.invert_yaxis()
    axes.set_title(METHOD_NAMES[first.method], loc="left", fontsize=9, color=SUBTLE)
    clear_frame(axes)


def draw_squares(axes: Any, explanation: ImageExplanation) -> None:
    """Draw an image under its scores."""
    first = explanation.scores[0]
    height, width = explanation.pixels.shape[:2]
    rows, columns = first.values.shape
    (high, wide), edges = explanation.square, (0, width, height, 0)
    axes.imshow(explanation.pixels, extent=edges)
    axes.imshow(colours_of(first.values), extent=(0, columns * wide, rows * high, 0), interpolation="nearest")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_title(METHOD_NAMES[first.method], loc="left", fontsize=9, color=SUBTLE)
    axes.set_axis_off()


def draw_deletion(axes: Any, explanation: Explanation) -> None:
    """Draw the answer as the highest scores are deleted; nothing where nothing was."""
    panel = next((panel for _, _, panel in curves_of(explanation)), None)
    if panel is None:
        axes.set_axis_off()
        return
    for line in panel.lines:
        colour = HIGHLIGHT if line.is_main else MUTED["BERT"]
        axes.plot(line.x, line.y, color=colour, marker="o", markersize=3, linewidth=1.3, label=line.name)
    if panel.ends is not None:
        axes.set_ylim(panel.ends[0] - 0.02, panel.ends[1] + 0.02)
    axes.set_title(_plain(panel.title), loc="left", fontsize=9, color=SUBTLE)
    axes.set_xlabel(panel.axis)
    axes.legend(frameon=False, fontsize=8)
    clear_frame(axes)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # which would begin a formula
