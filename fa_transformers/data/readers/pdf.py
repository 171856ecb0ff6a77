"""Text of PDF files, page by page, read by pypdf."""

import logging
from pathlib import Path

from .tables import DataError

logger = logging.getLogger(__name__)

INSTALL = "PDF files are read by pypdf: pip install 'fa_transformers[pdf]', or save the document as text"


def read_pdf(path: Path) -> tuple[str, list[int]]:
    """Return the text of a PDF file and the character at which each of its pages begins.

    Pages follow each other with one line end between them. Pictures of pages, as scanners make them, have no text.

    Raises:
        DataError: pypdf isn't installed, the file is damaged, needs a password, or has no text.
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
        pages = [page.extract_text() for page in reader.pages]
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
