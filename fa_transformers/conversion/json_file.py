"""JSON files of a checkpoint that somebody else made."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..mistakes import Mistake

Content = TypeVar("Content", dict, list)


class SourceError(Mistake, ValueError):
    """A checkpoint can't be read or converted as it was asked for; the message names the file or the field."""

    is_about_options = False


@contextmanager
def refusing_sources() -> Iterator[None]:
    """Turn any ValueError of the block into `SourceError`, by which commands know a mistake of their user."""
    try:
        yield
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError(str(error)) from error


def read_json(path: Path, kind: type[Content]) -> Content:
    """Read a JSON file that holds a `kind`, dict or list.

    Raises:
        ValueError: it is no JSON, or holds something else; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of bytes that are no UTF-8, too
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, got {content!r:.80}")
    return content
