"""Rows to predict: of a table, read as they are asked for, or the files of a folder; a bad one is a row too."""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..data.readers.encodings import encoding_of, open_text
from ..data.readers.formats import FILE_TYPES, open_rows
from ..data.readers.images import image_endings
from ..data.readers.labels import LabelError, LabelScheme, as_whole, indicator_of
from ..data.readers.problems import BadRows, Place
from ..data.readers.tables import DataError, cut, listing
from .predictor import Predictor

logger = logging.getLogger(__name__)

TEXT_ENDINGS = (".txt", ".text")
DEFAULT_LABELS = "label"
"""Column of true labels that is read where a table has it."""


class SourceRow(NamedTuple):
    """A row to predict.

    `number` counts from 1, as in the source; `name` is the file of a folder, or the value of the column of ids; `item`
    the text or the path of an image, None where `error` says why it can't be read; `label` is raw; `content` stands for
    what the row holds, so that another input is told from this one.
    """

    number: int
    name: str | None
    item: Any
    label: Any = None
    error: str | None = None
    content: bytes = b""


@dataclass(frozen=True)
class Source:
    """A file or folder to predict for.

    `path` is what was named; `num_rows` is None where nobody has counted; `name_column` heads the names, None: there
    are none; `has_labels`: rows may have a label; `open` starts reading from the first row.
    """

    path: Path
    open: Callable[[], Iterator[SourceRow]]
    num_rows: int | None = None
    name_column: str | None = None
    has_labels: bool = False


def open_source(
    path: Path,
    predictor: Predictor,
    *,
    text_column: str = "text",
    label_column: str | None = None,
    id_column: str | None = None,
    delimiter: str | None = None,
) -> Source:
    """Find out what to predict for: a table of texts, a document (.txt), an image, or a folder of either.

    Args:
        path: file or folder.
        predictor: whose model takes texts or images.
        text_column, id_column: columns of a table; the ids are carried over to the output.
        label_column: column with true labels, which must be there; None takes "label" where it is there.
        delimiter: character between the fields of csv files; None finds it.

    Raises:
        DataError: there is no such file or folder, it can't be read, or holds what the model doesn't take.
    """
    takes_text = predictor.inputs.noun == "text"
    if path.is_dir():
        return _open_folder(path, takes_text)
    ending = path.suffix.lower()
    is_document, is_image = ending in TEXT_ENDINGS, ending in image_endings()
    if path.is_file() and (is_document or is_image):
        if is_document != takes_text:
            raise DataError(f"{path}: the model reads {predictor.inputs.noun}s, and this is {_noun_of(is_document)}")
        return Source(path, lambda: _read_files([path], path.parent, takes_text), 1, "file")
    if not takes_text and (ending in FILE_TYPES or is_document):
        raise DataError(f"{path}: the model reads images: name an image or a folder of them, and no table of texts")
    columns = {"text": text_column} | ({"id": id_column} if id_column else {})
    has_labels = label_column is not None or _has_labels(path, columns, delimiter)
    if has_labels:
        columns["label"] = label_column or DEFAULT_LABELS
    if next(_read_table(path, columns, delimiter), None) is None:  # finds what is wrong with a file as a whole, too
        raise DataError(f"{path}: there are no rows")
    return Source(path, lambda: _read_table(path, columns, delimiter), None, id_column, has_labels)


def _has_labels(path: Path, columns: Mapping[str, str], delimiter: str | None) -> bool:
    """True where a table has the column of labels that nobody named: one without it is no mistake."""
    try:
        next(open_rows(path, {**columns, "label": DEFAULT_LABELS}, _Errors(str(path)), delimiter=delimiter), None)
    except DataError:  # for another reason, perhaps, which is told by who reads without it
        return False
    return True


def _noun_of(is_document: bool) -> str:
    return "a text" if is_document else "an image"


def _open_folder(path: Path, takes_text: bool) -> Source:
    endings = set(TEXT_ENDINGS) if takes_text else image_endings()
    others = image_endings() if takes_text else set(TEXT_ENDINGS)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    found = [file for file in files if file.suffix.lower() in endings]
    if not found:
        noun, other = ("texts (.txt)", "images") if takes_text else ("images", "texts")
        tables = [file.name for file in files if file.suffix.lower() in FILE_TYPES]
        num_others = sum(file.suffix.lower() in others for file in files)
        hint = f", but {num_others:,} {other}" if num_others else ""
        hint = hint or (f", but tables: name one of {listing(tables)}" if tables else "")
        raise DataError(f"{path}: the model reads {noun}, and the folder holds none{hint}")
    return Source(path, lambda: _read_files(found, path, takes_text), len(found), "file")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_files(files: list[Path], root: Path, takes_text: bool) -> Iterator[SourceRow]:
    for number, file in enumerate(files, start=1):
        name = file.relative_to(root).as_posix()
        try:
            if takes_text:
                with open_text(file, encoding_of(file)) as opened:
                    text = opened.read()
                yield SourceRow(number, name, text, content=text.encode("utf-8", "surrogatepass"))
            else:
                yield SourceRow(number, name, file, content=f"{file.stat().st_size}".encode())
        except (DataError, OSError) as error:
            reason = str(error).removeprefix(f"{file}, ").removeprefix(f"{file}: ")
            yield SourceRow(number, name, None, error=reason)


class _Errors(BadRows):
    """Bad rows that wait to be yielded among the others."""

    def __init__(self, source: str):
        super().__init__(source, drop=True)
        self.waiting: deque[tuple[int, str]] = deque()

    def add(self, place: Place | str, message: str, advice: str = "") -> None:
        """Keep one bad row."""
        assert isinstance(place, Place)
        self.waiting.append((place.row, message + (f". {advice}" if advice else "")))


def _read_table(path: Path, columns: Mapping[str, str], delimiter: str | None) -> Iterator[SourceRow]:
    errors = _Errors(str(path))

    def take() -> Iterator[SourceRow]:
        while errors.waiting:
            number, message = errors.waiting.popleft()
            yield SourceRow(number, None, None, error=message)

    for row in open_rows(path, columns, errors, delimiter=delimiter):
        yield from take()
        values = dict(zip(columns, row.values, strict=True))
        name = None if values.get("id") is None else str(values["id"])
        content = repr(row.values).encode("utf-8", "surrogatepass")
        yield SourceRow(row.number, name, values["text"], values.get("label"), content=content)
    yield from take()


def chained(digest: str, row: SourceRow) -> str:
    """Return the digest of a row and of all rows before it, whose digest is given."""
    parts = [digest, str(row.number), row.name or "", row.error or "", hashlib.sha256(row.content).hexdigest()]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


class LabelReader:
    """True labels of rows in the model's numbers; `num_unknown` counts labels that the model doesn't know.

    The first labels say what all are: names of the classes; whole numbers from 0 on, the places of the classes in the
    model's list, where none of them is the name of a class, and where no class is called by a whole number or all are
    such places; of several labels lists of either, or rows with a zero or a one for each class.

    Args:
        predictor: whose model's classes the labels name.
        separator: string between the labels of one row.
        first: labels of the first rows, raw.
    """

    def __init__(self, predictor: Predictor, separator: str | None, first: Sequence[Any] = ()):
        names = predictor.label_names
        scheme = LabelScheme(
            predictor.problem_type,
            None if names is None else tuple(names),
            separator,
            is_whole=names is not None and all(as_whole(name) is not None for name in names),
            takes_decimals=True,
            number_needed="which the model gives",
            way_out="",
            origin=("the model's classes, which are", "mend the row"),
        )
        labels = [label for label in map(scheme.clean, first) if not scheme.is_missing(label)]
        self._scheme = scheme if scheme.names is None else _meaning_of(labels, scheme)
        self.num_unknown = 0
        self.first_unknown = ""

    def read(self, value: Any) -> Any:
        """Return the number of a label, or a list of them, or None where it is missing or not one of the model's."""
        label = self._scheme.clean(value)
        if self._scheme.is_missing(label):
            return None
        try:
            return self._scheme.encode(label)
        except LabelError as error:
            self.num_unknown += 1
            self.first_unknown = self.first_unknown or str(error)
            return None


def _meaning_of(labels: Sequence[Any], scheme: LabelScheme) -> LabelScheme:
    """Return the scheme by what the labels of a table look like, as training decides with `--label_names`.

    A whole number may be the name of a class and a place in the list of names. It is a name where any of the labels is
    one, and a place where none is; unknown labels are told which of the two was decided.
    """
    names = scheme.names or ()
    if scheme.is_multi_label:
        length, has_twice = indicator_of(labels)
        if length == len(names) and (has_twice or set(names) != {"0", "1"}):
            return replace(scheme, is_indicator=True)
    values = [value for label in labels for value in (label if isinstance(label, list) else [label])]
    wholes = [as_whole(value) for value in values]
    if not values or None in wholes:
        return scheme
    source, advice = scheme.origin
    called = [name for name in names if as_whole(name) is not None]
    by_name = [str(whole) for whole in wholes if str(whole) in names]
    if by_name or (called and not all(0 <= whole < len(names) for whole in wholes if whole is not None)):
        reason = f"as {cut(by_name[0])} is one" if by_name else "as there are classes that are called by numbers"
        return replace(scheme, origin=(source, f"the labels were read as names of classes, {reason}, not as places"))
    logger.warning("the labels are whole numbers, none of them the name of a class: as places, 0 is %s", cut(names[0]))
    return replace(
        scheme, is_position=True, origin=(source, f"the labels were read as places, none is a name; {advice}")
    )
