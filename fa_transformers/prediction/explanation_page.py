"""Pages that show the ground of an answer: a document with its passages marked, or an image under its scores."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import write_text
from ..pages.page import Link, Page, Picture, Section, Table, data_address, encode_picture, render_template, write_page
from ..pages.panels import Line, Panel
from ..tables import counted, one_line
from .explanation import NUMBER, Deletion, DocumentExplanation, Explanation, ImageExplanation

FOLDER = Path(__file__).parent
INDEX_FILE = "index.html"
NUM_TOP = 10
"""Passages or squares with the highest scores that are listed."""
STEPS = 5
"""Steps of colour of either sign."""
FAINTEST = 0.05
"""Share of the largest score below which a passage has no colour."""
PART_CHARACTERS = 4000
"""Characters after which a part of the document ends at the next line end; browsers lay out the parts in sight."""
LARGEST_PART = 4 * PART_CHARACTERS
PICTURE_PX = 1600
VIEW_SIDE = 1000
"""Units along the longer side of an image on its page, so that marks and numbers on it have one size."""
SNIPPET_CHARACTERS = 160
MOST_PROBABILITIES = 10
METHOD_NAMES = {
    "gradient_x_input": "gradient × input",
    "integrated_gradients": "integrated gradients",
    "rollout": "rollout of attention",
    "rows": "attention by layer",
    "occlusion": "occlusion",
}
FOR, AGAINST = (11, 92, 173), (180, 83, 9)
"""Colours of scores above and below zero."""


class Piece(NamedTuple):
    """Text of the document: a passage with its number, or what stands between passages, whose number is None."""

    text: str
    number: int | None
    page: int | None


class Part(NamedTuple):
    """Pieces that a browser lays out together, and the character that they begin at."""

    start: int
    pieces: list[Piece]


def write_explanation(explanation: Explanation, path: str | os.PathLike) -> None:
    """Write the page of an explanation to `path`: one file of HTML that needs nothing else and asks for nothing.

    Raises:
        OSError: it can't be written.
    """
    write_text(path, render_explanation(explanation))


def render_explanation(explanation: Explanation) -> str:
    """Return the HTML of the page of an explanation."""
    if isinstance(explanation, DocumentExplanation):
        template, shown = FOLDER / "document_page.html", document_values(explanation)
    else:
        assert isinstance(explanation, ImageExplanation)
        template, shown = FOLDER / "image_page.html", image_values(explanation)
    probabilities = explanation.answer.scores or explanation.probabilities
    best = sorted(probabilities.items(), key=lambda item: -item[1])[:MOST_PROBABILITIES]
    values = {
        "explanation": explanation,
        "labels": list(explanation.probabilities),
        "methods": [(name, METHOD_NAMES[name]) for name in dict.fromkeys(one.method for one in explanation.scores)],
        "layers": [one.layer for one in explanation.scores if one.layer is not None],
        "curves": list(curves_of(explanation)),
        "probabilities": Table(["label", "probability"], [list(pair) for pair in best]) if len(best) > 1 else None,
        "has_labels": explanation.probabilities.keys() != {NUMBER},
    }
    style, script = FOLDER / "explanation_page.css", FOLDER / "explanation_page.js"
    return render_template(template, _page(explanation), style, script, **values, **shown)


def _page(explanation: Explanation) -> Page:
    answer = explanation.answer
    label, score = next(iter(explanation.probabilities.items()))
    if isinstance(answer.label, float):
        facts: list[tuple[str, Any]] = [(NUMBER, answer.label)]
    else:
        labels = answer.label if isinstance(answer.label, list) else [answer.label or ""]
        facts = [
            ("answer", ", ".join(labels) or "none of the labels"),
            (f"probability of {one_line(label, 40)}", score),
        ]
    facts += [
        (noun_of(explanation), explanation.num_tokens),
        ("answered in", f"{explanation.seconds:.2f} seconds"),
        ("explained in", f"{explanation.explaining_seconds:.1f} seconds"),
    ]
    return Page(explanation.name, "What the answer rests on", facts)


def noun_of(explanation: Explanation) -> str:
    """Return the name of the parts that a model read."""
    return "tokens" if isinstance(explanation, DocumentExplanation) else "patches"


def step_of(values: np.ndarray) -> np.ndarray:
    """Return the step of colour of scores, from -`STEPS` to `STEPS`, by their share of the largest one's size."""
    largest = np.abs(values).max(initial=0.0)
    shares = values / largest if largest > 0 else np.zeros_like(values)
    return np.where(np.abs(shares) < FAINTEST, 0, np.sign(shares) * np.ceil(np.abs(shares) * STEPS)).astype(int)


def selections(explanation: Explanation) -> list[dict[str, Any]]:
    """Return what the page's script needs of each scores: the steps of colour, and the highest with their scores."""
    labels = list(explanation.probabilities)
    found = []
    for one in explanation.scores:
        flat = one.values.ravel()
        top = [number for number in one.order()[:NUM_TOP] if flat[number] > 0]
        chosen = {
            "method": one.method,
            "label": None if one.label is None else labels.index(one.label),
            "layer": one.layer,
            "top": [[number, f"{flat[number]:.3g}"] for number in top],
        }
        if isinstance(explanation, DocumentExplanation):
            chosen["steps"] = step_of(flat).tolist()
        found.append(chosen)
    return found


def curves_of(explanation: Explanation) -> Iterator[tuple[int, int, Panel]]:
    """Yield the number of the scores and of the label, and the chart of the answer as their highest are deleted."""
    for index, one in enumerate(explanation.scores):
        for place, label in enumerate(explanation.probabilities):
            if one.deletion is None or one.label not in (None, label):
                continue
            lines = [_line("the highest scores first", one.deletion, label, True)]
            if explanation.random is not None:
                lines.append(_line("at random", explanation.random, label, False))
            is_number = explanation.answer.label == explanation.answer.score
            noun = NUMBER if is_number else f"probability of {one_line(label, 40)}"
            ends = None if is_number else (0.0, 1.0)
            yield index, place, Panel(noun, tuple(lines), axis=f"% of the {noun_of(explanation)} deleted", ends=ends)


def _line(name: str, deletion: Deletion, label: str, is_main: bool) -> Line:
    return Line(name, [100 * share for share in deletion.shares], list(deletion.probabilities[label]), is_main)


def document_values(explanation: DocumentExplanation) -> dict[str, Any]:
    """Return what the template of documents shows beside the common values."""
    first = explanation.scores[0]
    steps = step_of(first.values)
    top = [number for number in first.order()[:NUM_TOP] if first.values[number] > 0]
    parts = list(parts_of(explanation))
    data = {
        "scores": selections(explanation),
        "starts": [passage.start for passage in explanation.passages],
        "stops": [passage.stop for passage in explanation.passages],
        "parts": [part.start for part in parts],
        "length": len(explanation.text),
        "pages": [passage.page for passage in explanation.passages] if explanation.passages[0].page else None,
    }
    size = explanation.passage_size
    return {
        "data": data,
        "classes": [class_of(step) for step in steps.tolist()],
        "ranks": {number: rank for rank, number in enumerate(top, start=1)},
        "top": [(number, f"{first.values[number]:.3g}", snippet_of(explanation, number)) for number in top],
        "parts": parts,
        "noun": "sentence" if size == "sentence" else f"passage of {counted(size, 'token')}",
    }


def class_of(step: int) -> str:
    """Return the class of a passage's mark: f1 to f5 for the label, a1 to a5 against it, p for neither."""
    return "p" if not step else f"p {'f' if step > 0 else 'a'}{abs(step)}"


def snippet_of(explanation: DocumentExplanation, number: int) -> str:
    """Return how a passage begins, on one line, with its page."""
    page = explanation.passages[number].page
    text = one_line(explanation.text_of(number), SNIPPET_CHARACTERS)
    return text if page is None else f"page {page}: {text}"


def parts_of(explanation: DocumentExplanation) -> Iterator[Part]:
    """Yield the whole text in parts; each ends at a line end between two passages, or where it grows too large."""
    part = Part(0, [])
    size = 0
    for piece in pieces_of(explanation):
        part.pieces.append(piece)
        size += len(piece.text)
        is_line_end = piece.number is None and "\n" in piece.text
        if size >= LARGEST_PART or (size >= PART_CHARACTERS and is_line_end):
            yield part
            part, size = Part(part.start + size, []), 0
    if part.pieces:
        yield part


def pieces_of(explanation: DocumentExplanation) -> Iterator[Piece]:
    """Yield passages and what stands between them, in order; a page is named where it begins."""
    at, page, text = 0, None, explanation.text
    for number, passage in enumerate(explanation.passages):
        if passage.start > at:
            yield Piece(text[at : passage.start], None, None)
        start = max(at, passage.start)  # tokens of one character may lie in two passages
        yield Piece(text[start : passage.stop], number, None if passage.page == page else passage.page)
        at, page = max(at, passage.stop), passage.page
    for start in range(at, len(text), PART_CHARACTERS):
        yield Piece(text[start : start + PART_CHARACTERS], None, None)


def image_values(explanation: ImageExplanation) -> dict[str, Any]:
    """Return what the template of images shows beside the common values."""
    from PIL import Image

    height, width = explanation.pixels.shape[:2]
    scale = VIEW_SIDE / max(height, width)
    rows, columns = explanation.scores[0].values.shape
    high, wide = explanation.square
    first = explanation.scores[0]
    flat = first.values.ravel()
    top = [(number, f"{flat[number]:.3g}") for number in first.order()[:NUM_TOP] if flat[number] > 0]
    boxes = {}
    for number in sorted({number for one in explanation.scores for number in one.order()[:NUM_TOP]}):
        left, upper, right, lower = explanation.box_of(number)
        boxes[number] = [round(scale * edge, 2) for edge in (left, upper, right - left, lower - upper)]
    places = {number: place_of(explanation, number) for number in boxes}
    return {
        "data": {"scores": selections(explanation), "boxes": boxes, "places": places},
        "picture": encode_picture(Image.fromarray(explanation.pixels), explanation.name, PICTURE_PX),
        "view": (round(scale * width, 2), round(scale * height, 2)),
        "cover": (round(scale * wide * columns, 2), round(scale * high * rows, 2)),
        "overlays": [encode_map(one.values, METHOD_NAMES[one.method]) for one in explanation.scores],
        "boxes": boxes,
        "places": places,
        "top": top,
        "maps": [(layer, list(maps_of(explanation, layer))) for layer in sorted(explanation.context_maps)],
    }


def place_of(explanation: ImageExplanation, number: int) -> str:
    """Return where a square is, in words."""
    left, upper, right, lower = explanation.box_of(number)
    return f"{left:,} to {right:,} across, {upper:,} to {lower:,} down"


def maps_of(explanation: ImageExplanation, layer: int) -> Iterator[Picture]:
    """Yield the context maps of a layer, each scaled to its own largest value, with their heads and shares."""
    maps, shares = explanation.context_maps[layer], explanation.map_shares[layer]
    for head, (own_maps, own_shares) in enumerate(zip(maps, shares, strict=True), start=1):
        for values, share in zip(own_maps, own_shares.tolist(), strict=True):
            yield encode_map(values, f"head {head}, share {share:.2f}")


def encode_map(values: np.ndarray, caption: str) -> Picture:
    """Return scores [rows, columns] as a picture with a pixel for each: the colour is the sign, opacity the size."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(colours_of(values), "RGBA").save(file, "PNG")
    return Picture(data_address(file.getvalue(), "png"), caption)


def colours_of(values: np.ndarray) -> np.ndarray:
    """Return the colours of scores, RGBA in bytes: blue above zero and orange below, opacity by the size."""
    largest = np.abs(values).max(initial=0.0)
    opacity = np.abs(values) / largest if largest > 0 else np.zeros(values.shape)
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.where((values >= 0)[..., None], FOR, AGAINST)
    pixels[..., 3] = np.round(255 * opacity)
    return pixels


class Entry(NamedTuple):
    """A row of an index: the name of the input, its page beside the index, and the answer."""

    name: str
    page: str
    label: str
    score: float | None
    num_tokens: int


def write_index(folder: Path, title: str, entries: Sequence[Entry], left_out: Sequence[tuple[str, str]] = ()) -> None:
    """Write the page that leads to the pages of a folder; `left_out` are names of inputs without one, and why."""
    rows = [[Link(one.page, one.name), one.label, one.score, one.num_tokens] for one in entries]
    sections = [Section("Answers", table=Table(["input", "answer", "score", "tokens or patches"], rows))]
    if left_out:
        sections.append(Section("Without an answer", table=Table(["input", "reason"], left_out)))
    facts = [("answers", len(entries)), ("without an answer", len(left_out))]
    write_page(folder / INDEX_FILE, Page(title, "What the answers rest on", facts, sections))
