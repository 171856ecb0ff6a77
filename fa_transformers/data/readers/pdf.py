"""Text of PDF files, page by page, read by pypdf."""

import logging
from pathlib import Path

from .tables import DataError

logger = logging.getLogger(__name__)

INSTALL = "PDF files are read by pypdf: pip install 'fa_transformers[pdf]', or save the document as text"


def read_pdf(path: Path, *, most_characters: int | None = None, most_pages: int | None = None) -> tuple[str, list[int]]:
    """Return the text of a PDF file and the character at which each of its pages begins.

    Pages follow each other with one line end between them. Pictures of pages, as scanners make them, have no text.

    Args:
        most_characters, most_pages: what a file may have, of one that a stranger gives; reading stops beyond.

    Raises:
        DataError: pypdf isn't installed, the file is damaged, needs a password, has no text, or has too much.
    """
    try:
        import pypdf
    except ImportError as error:
        raise DataError(f"{path}: {INSTALL}") from error
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # a line for each oddity of a file that it gets over
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError(f"{path}: the PDF needs a password: save it without one")
        if most_pages is not None and len(reader.pages) > most_pages:
            raise DataError(f"{path}: the PDF has more than {most_pages:,} pages: give a part of it")
        pages: list[str] = []
        num_characters = 0
        for content in reader.pages:
            pages.append(content.extract_text())
            num_characters += len(pages[-1])
            if most_characters is not None and num_characters > most_characters:
                raise DataError(f"{path}: the PDF has more than {most_characters:,} characters: give a part of it")
    except DataError:
        raise
    except Exception as error:  # of damaged files there is no end of kinds, RecursionError and KeyError among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: not a readable PDF ({reason:.200}): it is damaged, cut off or of another type"
        ) from error
    # Halves of surrogate pairs stand for characters that a font doesn't name.
    pages = [page.encode("utf-8", "replace").decode("utf-8") for page in pages]
    if not any(page.strip() for page in pages):
        raise DataError(f"{path}: the PDF has no text, as one of scanned pages: recognise its text first (OCR)")
    starts = [0]
    for page in pages[:-1]:
        starts.append(starts[-1] + len(page) + 1)
    return "\n".join(pages), starts
