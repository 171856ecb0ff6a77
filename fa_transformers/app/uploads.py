"""Texts and files of visitors, read within bounds, and messages for them where something can't be used."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..data.readers.encodings import encoding_of, open_text
from ..data.readers.pdf import read_pdf
from ..data.readers.tables import DataError
from ..mistakes import Mistake
from ..redaction import redact
from ..tables import one_line

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 20 * 2**20
MAX_STORED_FILES, MAX_STORED_BYTES = 200, 2**30
"""Uploads that are kept at a time, and their bytes; each is deleted after `STORED_SECONDS`."""
STORED_SECONDS, SWEEP_SECONDS = 1800, 60
"""Age at which an upload is deleted, and the time between two looks after it."""
MAX_CHARACTERS = 2_000_000
"""Characters of a text, some half a million tokens; how many of these are read, `models.MAX_TOKENS` says."""
LONGEST_MESSAGE = 400
MAX_PDF_PAGES = 2_000
TEXT_ENDINGS = (".txt", ".text", ".md", ".pdf")


class Document(NamedTuple):
    """A text with its name for people, and the character at which each page begins, of a PDF."""

    name: str
    text: str
    page_starts: tuple[int, ...] = ()


def read_document(path: Path) -> Document:
    """Read an uploaded text or PDF.

    Raises:
        DataError: it is too large, of another type, damaged, or has no text.
    """
    _check_file(path)
    ending = path.suffix.lower()
    if ending not in TEXT_ENDINGS:
        raise DataError(f"{path}: give a text (.txt) or a PDF; of other documents, export the text first")
    if ending == ".pdf":
        text, page_starts = read_pdf(path, most_characters=MAX_CHARACTERS, most_pages=MAX_PDF_PAGES)
        return Document(path.name, check_length(text), tuple(page_starts))
    with open_text(path, encoding_of(path)) as opened:
        return Document(path.name, check_length(opened.read(MAX_CHARACTERS + 1)))


def check_length(text: str) -> str:
    """Return a text that isn't too long.

    Raises:
        DataError: it is.
    """
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"the document has more than {MAX_CHARACTERS:,} characters: give a part of it")
    return text


def read_image(path: Path) -> bytes:
    """Return the bytes of an uploaded image; whether they are one, its reader finds out.

    Raises:
        DataError: there is no such file any more, or it is too large.
    """
    _check_file(path)
    return path.read_bytes()


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: uploads are kept for {STORED_SECONDS // 60} minutes, and this one is gone: give it "
                        "again")  # fmt: skip
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path}: a file may have {MAX_FILE_BYTES >> 20} MiB")


def message_of(error: Exception, path: Path | None = None) -> str:
    """Return what a visitor is told of an error: a mistake in its own words, of anything else that it is in the log.

    The message names an uploaded file as its visitor does, and has one line.
    """
    text = str(error)
    if isinstance(error, Mistake):
        told = text
    elif "memory" in text.lower() or isinstance(error, MemoryError):
        told = "this takes more memory than the server has: give a shorter text or a smaller image"
    else:
        logger.error("a request failed", exc_info=error)
        told = f"the server failed ({type(error).__name__}); its log says why"
    if path is not None:
        told = told.replace(str(path), path.name)
    return redact(one_line(told, LONGEST_MESSAGE))


def pick(*sources: tuple[str, Callable[[], Document] | None]) -> Document:
    """Return the one document that a visitor gave, of several ways to give one.

    Args:
        sources: what each is called, and what reads it, None where nothing was given.

    Raises:
        DataError: there is none, or more than one.
    """
    given = [(name, read) for name, read in sources if read is not None]
    if not given:
        raise DataError(f"give {' or '.join(name for name, _ in sources)}")
    if len(given) > 1:
        raise DataError(f"there are {' and '.join(name for name, _ in given)}: clear all but one")
    return given[0][1]()
