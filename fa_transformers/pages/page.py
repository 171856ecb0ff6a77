"""Pages of HTML, each one file that asks nobody for anything: sections of text, tables and charts, or a template's own.

Every text is escaped and shown on one line (`tables.one_line`), whatever stands in it: documents, labels and file names
come from data. A page forbids itself everything but its own style, pictures and script, if it has one, by a content
security policy that knows style and script by their hashes, so that a mistake here could not run or fetch anything
either.
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
from ..tables import harmless_text, one_line
from .panels import Panel, nice_ticks

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = Path(__file__).parent
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
class Link:
    """A cell that leads to another file, by an address of ours relative to the page."""

    address: str
    text: str


@dataclass(frozen=True)
class Table:
    """A table; its cells are text, numbers, None, a `Picture` or a `Link`."""

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
    axis: str
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
        keys.append((f"best: {panel.axis} {panel.best[0]:,.0f}", "round"))
        ends.append(f"best {panel.best[1]:.4g} at {panel.axis} {panel.best[0]:,.0f}")
    return Drawing(
        panel.title,
        f"{panel.title} by {panel.axis}: {'; '.join(ends)}",
        keys,
        lines,
        [(place(x, low)[0], HEIGHT - 5, f"{x:,.0f}") for x in nice_ticks(left, right) if x == int(x)],
        [(LEFT, place(left, y)[1], f"{y:g}") for y in nice_ticks(low, high)],
        [] if panel.best is None else [place(*panel.best)],
        panel.axis,
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
    return Picture(data_address(file.getvalue(), "jpeg"), caption)


def data_address(content: bytes, kind: str) -> str:
    """Return the data: address of a picture's file, "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@cache
def _template(path: Path) -> Any:
    import jinja2
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        return Markup(escape("".join(c for c in text if c.isprintable())))

    def words(text: str) -> Markup:  # lines break between flags alone, and not at the hyphens in them
        return Markup(" ").join(Markup('<span class="word">{}</span>').format(code(word)) for word in text.split(" "))

    def finish(value: Any) -> Any:
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return one_line(value, LONGEST_TEXT) if is_text else value

    loader = jinja2.FileSystemLoader([FOLDER, path.parent])
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=finish, loader=loader, auto_reload=False
    )
    environment.tests["picture"] = lambda value: isinstance(value, Picture)
    environment.tests["link"] = lambda value: isinstance(value, Link)
    filters: dict[str, Any] = {
        "show": show,
        "layout": layout,
        "name": one_line,
        "code": code,
        "words": words,
        "prose": lambda text: Markup(escape(harmless_text(text))),  # as long as it is, lines kept
        "drawn": lambda points: Markup(" ".join(f"{x},{y}" for x, y in points)),
        "address": lambda uri: Markup(escape(uri)),  # longer than any text
    }
    environment.filters.update(filters)
    return environment.get_template(path.name)


def render(page: Page) -> str:
    """Return the HTML of a page."""
    return render_template(FOLDER / "sections.html", page)


def render_template(
    path: Path, page: Page, style: Path | None = None, script: Path | None = None, **values: Any
) -> str:
    """Return the HTML of a template that extends `frame.html`.

    Args:
        path: the template.
        page: its title, lead and facts.
        style: CSS that follows the common one.
        script: JavaScript that the page may run.
        values: what else the template shows.
    """
    from markupsafe import Markup

    css = "".join(file.read_text(encoding="utf-8") for file in (FOLDER / "page.css", style) if file is not None)
    code = None if script is None else script.read_text(encoding="utf-8")
    given = {"page": page, "style": Markup(css), "style_hash": _hash(css)}
    given |= {"script": None if code is None else Markup(code), "script_hash": _hash(code or "")}
    return _template(path).render(**given, **values)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_page(path: Path, page: Page) -> None:
    """Write a page to `path`, without tokens of the Hub."""
    write_text(path, render(page))
