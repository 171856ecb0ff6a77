"""Protects streamed training data: every document once over all processes, exact resume, bounded memory, errors."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fa_transformers import PackingCollator
from fa_transformers.data import streaming
from fa_transformers.data.readers.labels import LabelScheme
from fa_transformers.data.readers.streams import DocumentStream, LabelledStream, open_files, open_named
from fa_transformers.data.readers.tables import DataError, ReadingOptions
from fa_transformers.data.streaming import StreamedBatches, StreamedExamples, make_stream_loader

BATCHING = {"batch_size": 4, "max_tokens": 40, "group_by_length": True, "packing": False, "seed": 5}
NUM_ROWS = 53


def split_words(texts: list[str], truncation: bool, max_length: int | None = None, **_) -> dict[str, list]:
    """A tokenizer of numbers that are separated by blanks."""
    return {"input_ids": [[int(word) for word in text.split()][: max_length if truncation else None] for text in texts]}


def rows(num: int = NUM_ROWS) -> list[dict]:
    """Documents whose first token is their number."""
    random = np.random.default_rng(1)
    return [
        {"text": " ".join(map(str, [index, *random.integers(0, 9, random.integers(0, 20))])), "label": "ab"[index % 2]}
        for index in range(num)
    ]


def write_shards(folder: Path, ending: str, num_shards: int, num: int = NUM_ROWS) -> str:
    for shard in range(num_shards):
        part, path = rows(num)[shard::num_shards], folder / f"shard-{shard}{ending}"
        if ending == ".parquet":
            datasets.Dataset.from_list(part).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(folder / f"shard-*{ending}")


def documents(stream: datasets.IterableDataset, **fields) -> DocumentStream:
    """The stream with labels "a" and "b", one a row, unless `fields` say otherwise."""
    settings = {"max_length": 32, "problem_type": "single_label_classification", "names": ("a", "b")} | fields
    scheme = LabelScheme(
        settings["problem_type"], settings["names"], fields.get("separator"), origin=("the validation data:", "mend it")
    )
    labelled = LabelledStream(stream, scheme, "shards", drop_bad_rows=fields.get("drop_bad_rows", False))
    return DocumentStream(labelled, split_words, settings["max_length"], fields.get("strict_length", False))


def open_shards(pattern: str, **options) -> datasets.IterableDataset:
    return open_files(pattern, ReadingOptions(**options))


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return PackingCollator()(examples)


def batches_of(stream: datasets.IterableDataset, rank: int = 0, num_processes: int = 1) -> StreamedExamples:
    return StreamedExamples(documents(stream), collate, BATCHING, process_index=rank, num_processes=num_processes)


def numbers(batch: streaming.StreamedBatch) -> list[int]:
    """The numbers of the batch's documents."""
    return batch.inputs["input_ids"][0][batch.inputs["cu_seqlens"][:-1].long()].tolist()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_EXAMPLES", 10)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_each_document_is_in_one_batch_of_one_process_in_each_epoch(num_shards, ending, tmp_path):
    pattern = write_shards(tmp_path, ending, num_shards)
    for epoch in (0, 1):
        shares = []
        for rank in (0, 1):
            examples = batches_of(open_shards(pattern), rank, 2)
            seen: list[int] = []
            for batch in itertools.islice(examples, 60):
                if batch.next_place.epoch == epoch:
                    seen += numbers(batch)
            shares.append(seen)
        assert sorted(shares[0] + shares[1]) == list(range(NUM_ROWS))
        assert min(map(len, shares)) > NUM_ROWS // 4


def test_epochs_and_blocks_differ_in_order_and_batches_keep_their_budget(tmp_path):
    examples = batches_of(open_shards(write_shards(tmp_path, ".jsonl", 2)))
    batches = list(itertools.islice(examples, 60))
    for batch in batches:
        lengths = batch.inputs["cu_seqlens"].diff()
        assert batch.num_examples == len(lengths) <= 4 and batch.num_tokens == int(lengths.sum())
        assert len(lengths) == 1 or len(lengths) * int(lengths.max()) <= 40
    first = [numbers(batch) for batch in batches if batch.next_place.epoch == 0]
    second = [numbers(batch) for batch in batches if batch.next_place.epoch == 1]
    assert first != second[: len(first)]
    again = batches_of(open_shards(str(tmp_path / "shard-*.jsonl")))
    assert [numbers(batch) for batch in itertools.islice(again, 60)] == [numbers(batch) for batch in batches]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_stream_goes_on_at_any_batch_without_reading_what_was_done(num_shards, ending, tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, ending, num_shards)
    whole = list(itertools.islice(batches_of(open_shards(pattern), 1, 2), 30))
    assert whole[-1].next_place.epoch >= 1
    encoded: list[dict] = []
    encode = DocumentStream.encode
    monkeypatch.setattr(DocumentStream, "encode", lambda self, rows: encoded.extend(rows) or encode(self, rows))
    for start in range(0, 27, 3):
        place = whole[start].next_place
        for middle in (start, start + 2):  # stopped once, and twice
            encoded.clear()
            resumed = batches_of(open_shards(pattern), 1, 2)
            resumed.place = place
            rest = list(itertools.islice(resumed, 29 - middle))
            for got, expected in zip(rest, whole[middle + 1 :], strict=True):
                assert torch.equal(got.inputs["input_ids"], expected.inputs["input_ids"])
                assert got.next_place[:3] == expected.next_place[:3]
            # No more is read than the rest, the block in hand from its start, and the last block to its end.
            assert len(encoded) <= sum(batch.num_examples for batch in rest) + 2 * (streaming.BLOCK_EXAMPLES - 1)
            place = rest[1].next_place


@pytest.mark.slow
def test_a_worker_that_reads_ahead_changes_nothing(tmp_path):
    pattern = write_shards(tmp_path, ".parquet", 4)
    expected = list(itertools.islice(batches_of(open_shards(pattern)), 12))
    examples = batches_of(open_shards(pattern))
    examples.place = expected[3].next_place
    loaded = list(itertools.islice(make_stream_loader(examples, 3), 8))
    for got, batch in zip(loaded, expected[4:], strict=True):
        assert torch.equal(got.inputs["input_ids"], batch.inputs["input_ids"]) and got.next_place == batch.next_place


def test_the_loss_weights_of_a_step_follow_its_batches_and_its_state_resumes(tmp_path):
    pattern = write_shards(tmp_path, ".jsonl", 2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    examples = batches_of(open_shards(pattern))
    source = StreamedBatches(examples, accelerator)
    expected = list(itertools.islice(batches_of(open_shards(pattern)), 9))
    states = []
    for index, batch in enumerate(itertools.islice(source.epoch_batches(make_stream_loader(examples, 0), 0), 6)):
        step = expected[index - index % 3 :][:3]
        assert torch.equal(batch["input_ids"], expected[index].inputs["input_ids"])
        assert source.count_tokens(0, index) == expected[index].num_tokens
        total = sum(each.num_examples for each in step)
        assert source.loss_weight(0, index, 0, 3) == pytest.approx(expected[index].num_examples * 3 / total)
        source.gather_places()
        states.append(source.state_dict())
    resumed = batches_of(open_shards(pattern))
    source = StreamedBatches(resumed, accelerator)
    source.load_state_dict(states[2])
    rest = itertools.islice(source.epoch_batches(make_stream_loader(resumed, 0), 0, 3), 3)
    for batch, wanted in zip(rest, expected[3:6], strict=True):
        assert torch.equal(batch["input_ids"], wanted.inputs["input_ids"])


def test_a_stored_data_set_streams_and_class_labels_keep_their_numbers(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    part = datasets.Dataset.from_list([row | {"label": index % 2} for index, row in enumerate(rows(6))], features)
    datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "stored")
    stream, others = open_named(str(tmp_path / "stored"), None, ReadingOptions())
    assert list(others) == ["validation"]
    encoded = documents(stream, names=("a", "b")).encode(list(stream))
    assert [example["label"] for example in encoded] == [1, 0] * 3


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"text": "1 2", "label": "c"}, {}, "begins '1 2': the label 'c' doesn't occur in the validation data"),
        ({"text": "1 2", "label": None}, {}, "the label is missing"),
        ({"text": " ", "label": "a"}, {}, "the document is empty"),
        ({"text": "1 2 3", "label": "a"}, {"max_length": 2, "strict_length": True}, "has 3 tokens, the limit is 2"),
        ({"body": "1 2", "label": "a"}, {}, "there is no text column 'text'"),
        ({"text": "1", "label": "x"}, {"names": None, "problem_type": "regression"}, "'x' is not a finite float32"),
        ({"text": "1", "label": ["a"]}, {}, r"expected one label, got \['a'\]"),
        ({"text": "1", "label": "a"}, {"problem_type": "multi_label_classification"}, "expected a list of labels"),
    ],
)
def test_rows_that_cannot_be_used_are_errors_that_show_them(row, fields, message):
    stream = datasets.Dataset.from_list([row]).to_iterable_dataset()
    with pytest.raises(DataError, match=message):
        documents(stream, **fields).encode([row])


def test_labels_of_several_classes_and_numbers_are_read():
    stream = datasets.Dataset.from_list(rows(2)).to_iterable_dataset()
    several = documents(stream, separator="|", problem_type="multi_label_classification")
    assert several.encode([{"text": "1", "label": "b|a"}, {"text": "2", "label": ""}])[0]["label"] == [1, 0]
    numbers_ = documents(stream, problem_type="regression", names=None)
    assert numbers_.encode([{"text": "1", "label": "2.5"}])[0]["label"] == 2.5


def test_streams_that_cannot_be_opened_are_errors(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        open_shards(str(tmp_path / "*.jsonl"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="must have one of the endings"):
        open_shards(str(tmp_path / "*"))
    part = datasets.Dataset.from_list(rows(3))
    datasets.DatasetDict(train=part).save_to_disk(tmp_path / "stored")
    with pytest.raises(DataError, match="a stream needs 'train' and 'validation'"):
        open_named(str(tmp_path / "stored"), None, ReadingOptions())
    with pytest.raises(DataError, match="has no documents for process 1 of 2"):
        next(iter(batches_of(open_shards(write_shards(tmp_path, ".jsonl", 1, num=1)), 1, 2)))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    # Peaks of fresh processes that stream 20 MB and 300 MB: 15 times the data, at most 64 MiB more.
    code = """
import itertools, resource, sys
import test_streaming as tests
examples = tests.batches_of(tests.open_shards(sys.argv[1]))
for batch in examples:
    if batch.next_place.epoch:
        break
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for megabytes in (20, 300):
        path = tmp_path / f"{megabytes}.jsonl"
        line = json.dumps({"text": "1 2 3 4 5 6 7 " + " " * 4000, "label": "a"}) + "\n"
        with path.open("w") as file:
            for _ in range(megabytes * 10**6 // len(line)):
                file.write(line)
        command = [sys.executable, "-c", code, str(path)]
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        peaks.append(int(ran.stdout) / 1024)
    print(f"peak of 20 MB {peaks[0]:.0f} MiB, of 300 MB {peaks[1]:.0f} MiB")
    assert peaks[1] - peaks[0] < 64
