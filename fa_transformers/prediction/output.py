"""The table of predictions: it grows in a folder beside its place, where a stopped run goes on, and appears whole."""

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from ..files import write_json, written_by_rename
from ..hub.folder_lock import lock_folder, unlock_folder
from ..redaction import redact
from ..tables import harmless_cell

OUTPUT_TYPES = (".csv", ".jsonl", ".parquet")
PROGRESS_FILE, DECISIONS_FILE = "progress.json", "decisions"
ROWS_PER_GROUP = 4096
"""Rows of a group of the parquet file."""
KINDS = {
    "integer": pyarrow.int64(), "text": pyarrow.string(), "texts": pyarrow.list_(pyarrow.string()),
    "number": pyarrow.float64(), "boolean": pyarrow.bool_(),
}  # fmt: skip


class Column(NamedTuple):
    """Column of the table: its name and one of `KINDS`."""

    name: str
    kind: str


@dataclass(frozen=True)
class Progress:
    """Part of a run that is written: rows of the input, bytes of the table and of the decisions, the digest of the
    rows' content, and what was counted in them.
    """

    rows: int = 0
    bytes: int = 0
    decision_bytes: int = 0
    digest: str = ""
    counts: dict[str, Any] = field(default_factory=dict)


def partial_folder(path: Path) -> Path:
    """Return the folder that an unfinished output is kept in."""
    return path.with_name(f"{path.name}.partial")


def check_output(path: Path, source: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise, naming the flag, where a table can't be written to `path` or nobody asked to replace what is there.

    Raises:
        FileExistsError: there is an output, or an unfinished one, and neither flag says what to do with it.
        ValueError: the ending is unknown, there is no such folder, or the flags contradict each other.
    """
    if overwrite and resume:
        raise ValueError("--overwrite and --resume contradict each other; give one.")
    if path.suffix.lower() not in OUTPUT_TYPES:
        raise ValueError(f"--output {path}: the ending {path.suffix!r} is not one of {', '.join(OUTPUT_TYPES)}.")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}; make it, or name another.")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it.")
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"--output {path} is the file to predict for; name another.")
    unfinished = partial_folder(path)
    if path.exists() and unfinished.is_dir() and not any(unfinished.glob("rows.*")):
        shutil.rmtree(unfinished)  # of a run that was stopped when the output was in its place
    if path.exists() and not overwrite and not (resume and unfinished.is_dir()):
        what = "is complete: --overwrite predicts again" if resume else "exists: --overwrite replaces it"
        raise FileExistsError(f"{path} {what}, --output names another.")
    if unfinished.exists() and not overwrite and not resume:
        raise FileExistsError(f"{unfinished} is an unfinished run: --resume goes on, --overwrite begins again.")


class Output:
    """A table of predictions that is written a window of rows at a time.

    Args:
        path: where it is to appear when it is whole, as csv, jsonl or parquet.
        columns: its columns.
        identity: what must be equal to go on with a stopped run, by name; "model" and "input" name theirs in messages.
        resume: go on with what is there, if anything is.

    Raises:
        ValueError: what is there was made with another model, other options or other columns.
        FileExistsError: another process writes it.
    """

    def __init__(self, path: Path, columns: Sequence[Column], identity: Mapping[str, Any], *, resume: bool):
        self.path, self.columns = path, list(columns)
        self.folder = partial_folder(path)
        self._is_csv = path.suffix.lower() == ".csv"
        self._rows_file = self.folder / ("rows.csv" if self._is_csv else "rows.jsonl")
        self._identity = json.loads(json.dumps({**identity, "columns": [column.name for column in columns]}))
        with self.guarded(0):
            self.folder.mkdir(exist_ok=True)
            lock_folder(self.folder, f"--output {path}")
            goes_on = resume and (self.folder / PROGRESS_FILE).exists()
            self.progress = self._read() if goes_on else self._begin()
            self._cut(self._rows_file, self.progress.bytes)
            self._cut(self.decisions, self.progress.decision_bytes)

    @property
    def decisions(self) -> Path:
        """The file with the bytes that `add` was given beside the rows."""
        return self.folder / DECISIONS_FILE

    @property
    def input(self) -> str:
        """The name of the input that the output was begun with."""
        return self._identity["input"]

    @contextmanager
    def guarded(self, rows: int | None = None) -> Iterator[None]:
        """Turn an error of writing, such as a full disk, into a ValueError that says how to go on.

        Raises:
            ValueError: something can't be written.
        """
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            done = self.progress.rows if rows is None else rows
            advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
            kept = f". {done:,} rows are kept in {self.folder.name}: {advice}, then go on with --resume" if done else ""
            raise ValueError(f"--output {self.path}: {error.strerror or error}{kept}") from error

    def _begin(self) -> Progress:
        for file in (self._rows_file, self.decisions):
            file.write_bytes(b"")
        header = self._as_csv([[column.name for column in self.columns]]) if self._is_csv else b""
        self._append(self._rows_file, header)
        progress = Progress(bytes=len(header))
        self._keep(progress)
        return progress

    def _read(self) -> Progress:
        try:
            found = json.loads((self.folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            progress, before = Progress(**found["progress"]), found["identity"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"--resume: {self.folder / PROGRESS_FILE} is damaged; --overwrite begins again."
            ) from error
        for name, value in self._identity.items():
            if name in ("model", "input") or before.get(name) == value:
                continue
            if name == "weights":
                what = f"the model {before['model']}, and {self._identity['model']} is another one or was changed"
            else:
                what = f"{name} {before.get(name)!r:.200}, now it is {value!r:.200}"
            raise ValueError(
                f"--resume: {self.path} was begun with {what}. Give the same, or --overwrite to begin again."
            )
        self._identity["input"] = before["input"]
        return progress

    @staticmethod
    def _cut(file: Path, size: int) -> None:
        """Cut off what a stopped run wrote beyond what it noted."""
        with open(file, "r+b") as opened:
            opened.truncate(size)

    def add(self, rows: Sequence[Sequence[Any]], decisions: bytes, num_rows: int, digest: str, counts: dict) -> None:
        """Write rows, and note that the first `num_rows` of the input, with this digest and these counts, are done.

        Raises:
            ValueError: they can't be written; what was noted before stays.
        """
        written = self._as_csv(rows) if self._is_csv else self._as_lines(rows)
        with self.guarded():
            self._append(self._rows_file, written)
            self._append(self.decisions, decisions)
            sizes = self.progress.bytes + len(written), self.progress.decision_bytes + len(decisions)
            self._keep(Progress(num_rows, *sizes, digest, dict(counts)))

    @staticmethod
    def _append(file: Path, content: bytes) -> None:
        with open(file, "ab") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())

    def _keep(self, progress: Progress) -> None:
        write_json(self.folder / PROGRESS_FILE, {"identity": self._identity, "progress": asdict(progress)})
        self.progress = progress

    def _as_csv(self, rows: Sequence[Sequence[Any]]) -> bytes:
        text = io.StringIO()
        csv.writer(text).writerows([[_csv_cell(value) for value in row] for row in _writable(rows)])
        return text.getvalue().encode("utf-8")

    def _as_lines(self, rows: Sequence[Sequence[Any]]) -> bytes:
        names = [column.name for column in self.columns]
        lines = []
        for row in _writable(rows):
            values = [_rounded(value) if isinstance(value, float) else value for value in row]
            lines.append(json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False) + "\n")
        return "".join(lines).encode("utf-8")

    def finish(self) -> None:
        """Put the whole table in its place, and remove the folder that it grew in.

        Raises:
            ValueError: it can't be written.
        """
        with self.guarded():
            if self.path.suffix.lower() == ".parquet":
                with written_by_rename(self.path) as temporary:
                    self._write_parquet(temporary)
                self._rows_file.unlink()
            else:
                with open(self._rows_file, "rb") as file:
                    os.fsync(file.fileno())
                self._rows_file.replace(self.path)
            unlock_folder(self.folder)
            shutil.rmtree(self.folder)

    def _write_parquet(self, path: Path) -> None:
        schema = pyarrow.schema([(column.name, KINDS[column.kind]) for column in self.columns])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer, open(self._rows_file, "rb") as lines:
            group: list[dict] = []
            for line in lines:
                group.append(json.loads(line))
                if len(group) == ROWS_PER_GROUP:
                    writer.write_table(pyarrow.Table.from_pylist(group, schema))
                    group = []
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _writable(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return rows without tokens of the Hub, and "?" in the place of halves of characters, which UTF-8 can't write."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(part) for part in value]
        return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value

    return [[clean(value) for value in row] for row in redact([list(row) for row in rows])]


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return harmless_cell(value) if isinstance(value, str) else value
