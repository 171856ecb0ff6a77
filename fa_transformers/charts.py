"""Charts: one palette and style, figures drawn without a screen, and PNGs that appear by rename.

Matplotlib is imported when the first figure is made. Figures are drawn by Agg without pyplot, so that the backend that
a notebook has chosen stays as it is and no figure has to be closed.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from .files import written_by_rename

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HIGHLIGHT, HIGHLIGHT_LIGHT = "#0b5cad", "#5b9bd5"
"""Colours of our models' curves."""
# The stock model is the darkest of the muted ones: it is the one that ours replaces.
MUTED = {
    "BERT": "#4d4d4d",
    "ViT": "#4d4d4d",
    "Longformer": "#b08457",
    "BigBird": "#7d9461",
    "Nystromformer": "#9581a8",
    "FNet": "#6fa0a5",
    "ModernBERT": "#b97a7a",
}
"""Name of another model -> colour of its curve."""
GRID, INK, SUBTLE = "#e4e4e4", "#222222", "#6b6b6b"
"""Colours of grid lines, of text, and of text that explains."""


def chart_style() -> AbstractContextManager:
    """Return a `with` context in which figures have the fonts and colours of our charts; draw and save inside it."""
    import matplotlib

    style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": SUBTLE}
    return matplotlib.rc_context(style)


def new_figure(
    num_rows: int = 1,
    num_columns: int = 1,
    *,
    size: tuple[float, float],
    layout: Literal["constrained"] | None = "constrained",
    **options: Any,
) -> tuple["Figure", Any]:
    """Return a figure of `size` (width, height) in inches and its axes.

    Args:
        num_rows, num_columns: axes in the figure.
        layout: "constrained" keeps labels apart; None leaves the places of the axes to the caller.
        options: as `matplotlib.figure.Figure.subplots` takes them, `squeeze`, `sharex`, `sharey`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, **options)


def draw_maps(figure: "Figure", axes: Any, panels: Iterable[tuple[str, Any, dict[str, Any]]], unit: str) -> None:
    """Show images and maps in the axes of a figure, in order, each below its title.

    Args:
        panels: title, what `imshow` draws, and its options; with any of these a bar tells the colours' values.
        unit: what stands beside the bars.
    """
    for place, (title, values, options) in zip(axes.flat, panels, strict=True):
        image = place.imshow(values, **options)
        place.set_title(title, fontsize=9)
        place.set_axis_off()
        if options:
            figure.colorbar(image, ax=place, shrink=0.8, label=unit)


def clear_frame(axes: "Axes") -> None:
    """Leave a light grid behind the curves as all that frames them."""
    axes.tick_params(which="both", length=0, labelcolor=SUBTLE)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def scale_by_size(axes: "Axes", sizes: Sequence[int]) -> None:
    """Make the x axis logarithmic with a tick at each of `sizes` (tokens, pixels), 1,024 of which are "1k"."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size // 1024}k" if size % 1024 == 0 else str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def save_figure(figure: "Figure", path: str | os.PathLike, *, dpi: int = 120, **options: Any) -> None:
    """Write `figure` as a PNG to `path` by rename; `options` are those of `matplotlib.figure.Figure.savefig`."""
    with written_by_rename(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png", **options)
