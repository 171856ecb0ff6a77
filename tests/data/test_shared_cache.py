"""Protects a cache that containers share: equal process numbers mix no rows, and a poisoned file is not trusted."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pytest
from repository import HELPERS, ROOT

from fa_transformers.data.readers.files import _store, encode_columns
from fa_transformers.data.readers.formats import Row
from fa_transformers.data.readers.problems import BadRows
from fa_transformers.data.readers.tables import ReadingOptions
from fa_transformers.files import sha256_of

NUM_ROWS = 3000


def columns_of(name: str) -> dict[str, list]:
    return {"text": [f"{name} {index} " * 20 for index in range(NUM_ROWS)], "label": ["a", "b"] * (NUM_ROWS // 2)}


def read(name: str, cache: Path) -> list[str]:
    options = ReadingOptions(cache_dir=cache, problem_type="single_label_classification")
    dataset = encode_columns(columns_of(name), options)
    return [text for part in dataset.values() for text in part["text"]]


AS_PROCESS_ONE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_shared_cache import read
name, cache = sys.argv[2], Path(sys.argv[3])
os.getpid = lambda: 1
(cache / name).touch()
while not ((cache / "sea").exists() and (cache / "law").exists()):
    time.sleep(0.001)
for round in range(4):
    texts = read(f"{name}{round}", cache)
    print(len(texts), sum(not text.startswith(f"{name}{round} ") for text in texts))
"""


def test_a_run_that_writes_while_another_of_its_number_does_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    found = {}

    def stored(name: str, found: Iterator[Row]) -> datasets.Dataset:
        return _store(found, {"text": "text", "label": "label"}, BadRows(name), tmp_path).contents

    def rows(name: str, then: str | None = None) -> Iterator[Row]:
        for number, text in enumerate(columns_of(name)["text"], start=1):
            if then and number == NUM_ROWS // 2:
                found[then] = stored(then, rows(then))["text"][:]
            yield Row(number, None, (text, "a"))

    found["sea"] = stored("sea", rows("sea", then="law"))["text"][:]
    assert found == {name: columns_of(name)["text"] for name in ("sea", "law")}


@pytest.mark.slow
def test_two_processes_of_one_number_keep_their_own_rows(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AS_PROCESS_ONE, Path(__file__).parent, name, tmp_path],
            env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("sea", "law")
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and output.splitlines() == [f"{NUM_ROWS} 0"] * 4
    assert all(len(path.name) == 32 for path in (tmp_path / "files").iterdir()), "nothing half-written is left"


def poison_rows(path: Path) -> None:
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pyarrow.record_batch([pyarrow.array(["foreign"] * NUM_ROWS)], schema))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def drop_rows(path: Path) -> None:
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pyarrow.record_batch([pyarrow.array(columns_of("sea")["text"][:-1])], schema))


@pytest.mark.parametrize("damage", [poison_rows, cut, drop_rows, lambda path: path.write_bytes(b"")])
def test_a_file_that_holds_other_rows_is_replaced(damage, tmp_path):
    expected = sorted(read("sea", tmp_path))
    (stored,) = tmp_path.glob("files/*/documents.arrow")
    checksum = sha256_of(stored)
    damage(stored)
    assert sorted(read("sea", tmp_path)) == expected == sorted(columns_of("sea")["text"])
    assert sha256_of(stored) == checksum


def test_a_sound_file_is_kept_so_that_what_was_made_of_it_is_found_again(tmp_path):
    read("sea", tmp_path)
    (stored,) = tmp_path.glob("files/*/documents.arrow")
    before = (stored.stat().st_ino, stored.stat().st_mtime_ns)
    read("sea", tmp_path)
    assert (stored.stat().st_ino, stored.stat().st_mtime_ns) == before
    assert stored.stat().st_mode & 0o444 == 0o444
