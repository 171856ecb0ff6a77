"""Explanations as files: of one document or image, or of every row of a prediction in a folder with an index."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..data.readers.encodings import encoding_of, open_text
from ..data.readers.formats import FILE_TYPES
from ..data.readers.images import image_endings
from ..data.readers.pdf import read_pdf
from ..data.readers.tables import DataError
from ..files import write_text
from ..redaction import redact
from ..tables import one_line
from .answers import Prediction
from .explaining import explain_document, explain_image
from .explanation import Explanation
from .explanation_page import INDEX_FILE, Entry, write_explanation, write_index
from .predictor import Predictor
from .sources import TEXT_ENDINGS, SourceRow

ENTRIES_FILE = "pages.jsonl"


def explain_file(
    predictor: Predictor, path: Path, *, passage: Literal["sentence"] | int | None = None, **options: Any
) -> Explanation:
    """Explain the answer to a document (.txt or .pdf) or an image.

    Args:
        predictor: whose model takes texts or images.
        path: the file.
        passage: of texts as in `explain_document`, None for sentences; of images the patches along a square's side.
        options: the other arguments of `explain_document` and `explain_image`.

    Raises:
        DataError: there is no such file, or the model can't read it.
    """
    if not path.is_file():
        what = "is a folder: name a file in it" if path.is_dir() else "there is no such file"
        raise DataError(f"{path}: {what}")
    ending, takes_text = path.suffix.lower(), predictor.inputs.noun == "text"
    if ending in FILE_TYPES:
        raise DataError(f"{path}: a table: fa-transformers predict MODEL {path} --explain FOLDER explains its rows")
    if takes_text is (ending in image_endings()):
        noun, other = ("texts", "an image") if takes_text else ("images", "no image that Pillow reads")
        raise DataError(f"{path}: the model reads {noun}, and this is {other}")
    try:
        if not takes_text:
            if passage == "sentence":
                raise ValueError("`passage=sentence` is for texts: for an image give the patches of a square's side.")
            return explain_image(predictor, path, name=path.name, square=passage, **options)
        if ending == ".pdf":
            text, page_starts = read_pdf(path)
        elif ending in TEXT_ENDINGS:
            with open_text(path, encoding_of(path)) as opened:
                text, page_starts = opened.read(), []
        else:
            raise DataError(f"the ending {ending!r} is not one of {', '.join((*TEXT_ENDINGS, '.pdf'))}")
        passage = "sentence" if passage is None else passage
        return explain_document(predictor, text, name=path.name, passage=passage, page_starts=page_starts, **options)
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from error


def check_page_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise FileExistsError where a folder has other files than pages, or pages that nobody asked to replace."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--explain {folder} is a file: name a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / ENTRIES_FILE).is_file():
        raise FileExistsError(f"--explain {folder} has files that are no pages of an earlier run: name another folder.")
    if not overwrite and not resume:
        raise FileExistsError(f"--explain {folder} has files: --overwrite replaces its pages, or name another folder.")


class PageFolder:
    """The pages of a prediction's rows, which a resumed run goes on with, and their index.

    Args:
        folder: where they lie; it is made.
        predictor: that answers.
        num_done: rows whose pages an earlier start wrote.
    """

    def __init__(self, folder: Path, predictor: Predictor, num_done: int):
        self.folder, self.predictor = folder, predictor
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / ENTRIES_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        before: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.entries = [entry for entry in before if entry["place"] <= num_done]
        if before:
            (folder / INDEX_FILE).unlink(missing_ok=True)  # of an earlier run, until this one has its own
        for entry in before:
            if entry["place"] > num_done and re.fullmatch(r"\d{6,}\.html", entry["page"]):
                (folder / entry["page"]).unlink(missing_ok=True)

    def add(self, rows: Sequence[SourceRow], answers: Sequence[Prediction], first: int) -> None:
        """Write the pages of rows, of which the first has the place `first`, counted from 1, in the source."""
        for place, (row, answer) in enumerate(zip(rows, answers, strict=True), start=first):
            name = f"row {row.number}" if row.name is None else row.name
            error, page = answer.error, f"{place:06}.html"
            if error is None:
                try:
                    write_explanation(self._explain(row.item, name), self.folder / page)
                except DataError as reason:
                    error = str(reason)
            label = ", ".join(answer.label) if isinstance(answer.label, list) else str(answer.label)
            facts = {"label": label, "score": answer.score, "num_tokens": answer.num_tokens}
            self.entries.append({"place": place, "name": one_line(name, 200), "page": page, "error": error, **facts})
        lines = [json.dumps(redact(entry), ensure_ascii=False) + "\n" for entry in self.entries]
        write_text(self.folder / ENTRIES_FILE, "".join(lines))

    def _explain(self, item: Any, name: str) -> Explanation:
        if self.predictor.inputs.noun == "text":
            return explain_document(self.predictor, item, name=name)
        return explain_image(self.predictor, item, name=name)

    def finish(self, title: str) -> Path:
        """Write the index and return its path."""
        sound = [one for one in self.entries if one["error"] is None]
        entries = [Entry(*(one[name] for name in Entry._fields)) for one in sound]
        left_out = [(one["name"], one["error"]) for one in self.entries if one["error"] is not None]
        write_index(self.folder, title, entries, left_out)
        return self.folder / INDEX_FILE
