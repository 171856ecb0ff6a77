"""Protects a cache that containers share: equal process numbers mix no rows, and a poisoned file is not trusted."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pytest
from repository import HELPERS, ROOT
from tiny_models import make_tokenizer

from fa_transformers.data.readers.files import _store, encode_columns
from fa_transformers.data.readers.formats import Row
from fa_transformers.data.readers.problems import BadRows
from fa_transformers.data.readers.tables import ReadingOptions
from fa_transformers.data.tokenizing import tokenize_documents
from fa_transformers.files import sha256_of

NUM_ROWS = 3000
ROUNDS, ROWS_OF_A_ROUND = 20, 300


def columns_of(name: str, num_rows: int = NUM_ROWS) -> dict[str, list]:
    return {"text": [f"{name} {index} " * 20 for index in range(num_rows)], "label": ["a", "b"] * (num_rows // 2)}


def read(name: str, cache: Path) -> list[str]:
    options = ReadingOptions(cache_dir=cache, problem_type="single_label_classification")
    dataset = encode_columns(columns_of(name), options)
    return [text for part in dataset.values() for text in part["text"]]


def read_rounds(name: str, cache: Path) -> None:
    """Read and tokenize in step with another process; prints of each read the rows, and those that are foreign."""
    if os.getpid() != 1:
        os.getpid = lambda: 1
    tokenizer = make_tokenizer(["sea", "law", "both", *map(str, range(ROWS_OF_A_ROUND))], 999)
    options = ReadingOptions(cache_dir=cache, problem_type="single_label_classification")
    for round in range(ROUNDS):
        (cache / f"{name}-{round}").touch()
        while not all((cache / f"{other}-{round}").exists() for other in ("sea", "law")):
            time.sleep(0.001)
        for source in (name, "both"):  # a file of its own, and one that both read
            parts = encode_columns(columns_of(f"{source} {round}", ROWS_OF_A_ROUND), options)
            tokens = tokenize_documents(parts, tokenizer, 9)
            texts = [text for part in parts.values() for text in part["text"]]
            rows = [row for part in tokens.values() for row in part["input_ids"]]
            wanted = [tokenizer(text, truncation=True, max_length=9)["input_ids"] for text in texts]
            foreign = sum(not text.startswith(f"{source} {round} ") for text in texts)
            print(len(set(texts)), len(rows), foreign + sum(map(list.__ne__, rows, wanted)))


def in_a_container() -> list[str]:
    """The words before a command that make it process 1 of a name space of its own; none where that is refused."""
    words = ["unshare", "--pid", "--fork", "--mount-proc"]
    is_allowed = shutil.which(words[0]) and subprocess.run([*words, "true"], check=False, capture_output=True)
    return words if is_allowed and is_allowed.returncode == 0 else []


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
def test_twenty_rounds_of_two_containers_at_once_keep_their_own_rows(tmp_path):
    code = "import sys, test_shared_cache as test; test.read_rounds(sys.argv[1], test.Path(sys.argv[2]))"
    paths = [str(ROOT), str(HELPERS), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*in_a_container(), sys.executable, "-c", code, name, tmp_path],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("sea", "law")
    ]
    for process in processes:
        output, _ = process.communicate(timeout=280)
        assert (
            process.returncode == 0 and output.splitlines() == [f"{ROWS_OF_A_ROUND} {ROWS_OF_A_ROUND} 0"] * 2 * ROUNDS
        )
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
