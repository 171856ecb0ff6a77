"""The encoding of a text file: UTF-8, UTF-16 and UTF-32, found by mark or zero bytes; advice for all others."""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .tables import DataError

READ_BYTES = 2**20
SAMPLE_BYTES = 2**12
# A mark is left out by its codec. UTF-32's begins as UTF-16's does and is looked for first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UNMARKED = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
# Converting such a file as a whole would spoil the part that is right.
MIXED = "The part before it is UTF-8, so that the file is damaged, cut off or put together from several encodings"
OTHER_FILES = {
    b"PK\x03\x04": "an Excel file or another zip archive: give it the ending .xlsx, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Excel file: save it as .xlsx or as csv",
    b"PAR1": "a parquet file: give it the ending .parquet",
    b"\x1f\x8b": "compressed by gzip: unpack it with gunzip",
    b"BZh": "compressed by bzip2: unpack it with bunzip2",
    b"\xfd7zXZ": "compressed by xz: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard: unpack it with unzstd",
    b"%PDF": "a PDF: export its text first",
}


def encoding_of(path: Path) -> str:
    """Return Python's name of the encoding that the first bytes of a text file show, "utf-8" where they show none.

    Without a mark, UTF-16 and UTF-32 are known by their zero bytes: they are read where they give more separators of
    words and fields, less control characters, than UTF-8.

    Raises:
        DataError: the bytes are those of an archive, of a table of another type, or of no text.
    """
    with path.open("rb") as file:
        sample = file.read(SAMPLE_BYTES)
    for start, content in OTHER_FILES.items():
        if sample.startswith(start):
            raise DataError(f"{path}: by its ending the file is {path.suffix[1:]}, by its content it is {content}")
    for mark, encoding in MARKS.items():
        if sample.startswith(mark):
            return encoding
    if 0 not in sample:
        return "utf-8"
    scores = {encoding: _likelihood(sample, encoding) for encoding in UNMARKED}
    best = max(scores, key=lambda encoding: scores[encoding])
    if scores[best] <= 0:
        raise DataError(
            f"{path}: byte {sample.index(0) + 1} is zero and the file is not text in UTF-8, UTF-16 or UTF-32: it is "
            "damaged or of another type"
        )
    return best


def _likelihood(sample: bytes, encoding: str) -> int:
    """Return the number of separators less that of control characters; -1 where the bytes aren't valid."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return -1
    controls = sum(character < " " and character not in "\t\r\n" for character in text)
    return sum(text.count(separator) for separator in " \n\r\t,;|:") - controls


@contextmanager
def open_text(path: Path, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file, with line ends as in `open`; where it isn't in `encoding`, the error names line and byte.

    Raises:
        DataError: a byte that is read isn't valid in the encoding.
    """
    with path.open(encoding=encoding, newline=newline) as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, {_first_bad_byte(path, encoding)}") from error


def _first_bad_byte(path: Path, encoding: str) -> str:
    """Read the file again up to its first byte that isn't valid; return where it is and what to do."""
    decoder = codecs.getincrementaldecoder(encoding.removesuffix("-sig"))()
    line, line_start, position, ascii_only = 1, 0, 0, True
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            held = len(decoder.getstate()[0])
            valid, byte = len(chunk), 0
            try:
                ascii_only &= decoder.decode(chunk, final=position + len(chunk) == path.stat().st_size).isascii()
            except UnicodeDecodeError as error:
                valid = error.start - held  # below 0 where the character began in the piece before
                ascii_only &= error.object[: error.start].isascii()
                byte = error.object[error.start]
            line += chunk.count(b"\n", 0, max(valid, 0))
            if b"\n" in chunk[: max(valid, 0)]:
                line_start = position + chunk.rindex(b"\n", 0, valid) + 1
            position += valid
            if valid < len(chunk):
                file.seek(max(0, position - SAMPLE_BYTES // 2))
                where = f"byte {position + 1} of the file"
                if not encoding.startswith("utf-8"):
                    return f"{where} is not valid {encoding.upper()}: the file is damaged or cut off"
                around = file.read(SAMPLE_BYTES)
                return (
                    f"line {line}: byte {position - line_start + 1} of the line ({where}, 0x{byte:02x}) is not "
                    f"valid UTF-8. {_advice(around) if ascii_only else MIXED}"
                )
    return "the file was changed while it was read: run again"


def _advice(found: bytes) -> str:
    """Return how to convert a file, given bytes of it from around the first one beyond ASCII."""
    others = sum(value >= 0x80 for value in found)
    if others > 0.3 * sum(value >= 0x80 or chr(value).isalpha() for value in found):
        command = "iconv -f GB18030 -t UTF-8, with the name of its encoding, such as WINDOWS-1251, SHIFT_JIS or EUC-KR"
    else:
        # LATIN1 has control characters where Windows' encoding has quotation marks, dashes and the euro sign.
        latin = "WINDOWS-1252" if any(0x80 <= value < 0xA0 for value in found) else "LATIN1"
        command = f"iconv -f {latin} -t UTF-8"
    return f"Convert the file first, for example: {command}"
