"""A report page: one HTML file without scripts that asks nobody for anything, from sections of text, tables and charts.

Every text is escaped and shown on one line (`tables.one_line`), whatever stands in it: documents, labels and file names
come from data. The page forbids itself everything but its own style and pictures (a content security policy), so that
a mistake here could not run or fetch anything either.
"""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_text
from ..tables import one_line
from .curve import Panel, nice_ticks

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE_FILE = "report.html"
LONGEST_TEXT = 1000
SHADES = 10
"""Steps of colour of a matrix's cells."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 340, 190, 52, 22, 12, 14
"""Sizes of a chart, which are its pixels where the window is wide enough."""


@dataclass(frozen=True)
class Picture:
    """A picture in the page: its data: address and what it shows."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table; its cells are text, numbers, None or a `Picture`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def numbers(self) -> set[str]:
        """The columns that hold numbers."""
        first = self.rows[0] if self.rows else []
        return {name for name, value in zip(self.columns, first, strict=False) if isinstance(value, int | float)}


@dataclass(frozen=True)
class Matrix:
    """Counts by true class (rows) and predicted class (columns)."""

    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    @property
    def rows(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """Each class with its counts, and beside each count its share of the row in `SHADES` steps."""
        found = []
        for name, row in zip(self.names, self.counts, strict=True):
            total = max(1, sum(row))
            found.append((name, [(count, math.ceil(SHADES * count / total)) for count in row]))
        return found


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; what is empty is left out. Lines of `code` break if `is_wrapped`."""

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    panels: Sequence[Panel] = ()
    matrix: Matrix | None = None
    pictures: Sequence[Picture] = ()
    code: Sequence[str] = ()
    is_wrapped: bool = False


@dataclass(frozen=True)
class Page:
    """A page: its title, a line below it, figures that are seen first, and the sections in their order."""

    title: str
    lead: str
    facts: Sequence[tuple[str, Any]]
    sections: Sequence[Section] = field(default_factory=list)


@dataclass(frozen=True)
class Drawing:
    """The places of a chart's parts in pixels, from its upper left corner."""

    title: str
    description: str
    keys: list[tuple[str, str]]
    lines: list[tuple[str, list[tuple[float, float]], list[tuple[float, float]]]]
    x_ticks: list[tuple[float, float, str]]
    y_ticks: list[tuple[float, float, str]]
    best: list[tuple[float, float]]
    width: int = WIDTH
    height: int = HEIGHT


def layout(panel: Panel) -> Drawing:
    """Return where the parts of a panel stand."""
    (left, right), (low, high) = panel.limits
    left = 0.0 if left > 0 else left
    right = right if right > left else left + 1
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = (0.0 if 0 <= low < margin else low - margin), high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    lines = []
    for line in panel.lines:
        points = [place(*point) for point in zip(line.x, line.y, strict=True)]
        lines.append(("main" if line.is_main else "other", points, points if line.has_marks else []))
    keys = [(line.name, "main" if line.is_main else "other") for line in panel.lines] if len(panel.lines) > 1 else []
    ends = [f"{line.name} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in panel.lines]
    if panel.best is not None:
        keys.append((f"best: step {panel.best[0]:,.0f}", "round"))
        ends.append(f"best {panel.best[1]:.4g} at step {panel.best[0]:,.0f}")
    return Drawing(
        panel.title,
        f"{panel.title} by step: {'; '.join(ends)}",
        keys,
        lines,
        [(place(x, low)[0], HEIGHT - 5, f"{x:,.0f}") for x in nice_ticks(left, right) if x == int(x)],
        [(LEFT, place(left, y)[1], f"{y:g}") for y in nice_ticks(low, high)],
        [] if panel.best is None else [place(*panel.best)],
    )


def show(value: Any) -> str:
    """Return a cell or a figure as text: numbers with three decimals or four digits, counts with commas."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1e5 else f"{value:.4g}"
    return str(value)


def encode_picture(image: "Image", caption: str, side: int) -> Picture:
    """Return an image for the page, of at most `side` pixels a side."""
    from PIL import Image

    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return Picture("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(), caption)


@cache
def _template() -> Any:
    import jinja2
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        return Markup(escape("".join(c for c in text if c.isprintable())))

    def words(text: str) -> Markup:  # lines break between flags alone, and not at the hyphens in them
        return Markup(" ").join(Markup('<span class="word">{}</span>').format(code(word)) for word in text.split(" "))

    def finish(value: Any) -> Any:
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return one_line(value, LONGEST_TEXT) if is_text else value

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=finish)
    environment.tests["picture"] = lambda value: isinstance(value, Picture)
    filters: dict[str, Any] = {
        "show": show,
        "layout": layout,
        "name": one_line,
        "code": code,
        "words": words,
        "drawn": lambda points: Markup(" ".join(f"{x},{y}" for x, y in points)),
        "address": lambda uri: Markup(escape(uri)),  # longer than any text
    }
    environment.filters.update(filters)
    return environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def render(page: Page) -> str:
    """Return the HTML of a page."""
    from markupsafe import Markup

    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _template().render(page=page, style=Markup(style), style_hash=digest)


def write_page(folder: Path, page: Page) -> Path:
    """Write a page as `PAGE_FILE` to `folder`, without tokens of the Hub, and return its path."""
    write_text(folder / PAGE_FILE, render(page))
    return folder / PAGE_FILE
