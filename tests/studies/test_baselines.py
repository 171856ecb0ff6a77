"""Protects scripts/studies/baselines.py: contenders are what their names say, folds cut no group, cells are kept."""

import csv
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from repository import SCRIPTS, load_script
from scipy import stats
from tiny_models import make_tokenizer
from transformers import BertConfig, BertModel

from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.data.facts import DataFacts
from fa_transformers.data.labelled import LabelledData
from fa_transformers.data.word_counts import tfidf_predictions
from fa_transformers.options import unset_fields
from fa_transformers.studies import contenders
from fa_transformers.studies.contenders import Contender, ContenderJob
from fa_transformers.studies.contenders_report import paired_difference, summarise
from fa_transformers.studies.folds import digest, split_folds

SCRIPT = SCRIPTS / "studies" / "baselines.py"
WORDS = ["red", "blue", "green", "one", "two", "three", "alpha", "beta", "gamma", "delta"]
CHUNK = 8


script = load_script("baselines")


@pytest.fixture(autouse=True)
def fresh_accelerate(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A stock checkpoint of `CHUNK` positions, with large weights, so that no part of a document goes unseen."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = make_tokenizer(WORDS, CHUNK)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=CHUNK, initializer_range=0.3,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_texts(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, size=3 + index % 29)) for index in range(count)]


def make_data(texts: list[str]) -> LabelledData:
    rows = datasets.Dataset.from_dict({"text": texts, "label": [index % 2 for index in range(len(texts))]})
    rows = rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    third = len(texts) // 3
    cuts = {"train": range(third), "validation": range(third, 2 * third), "test": range(2 * third, len(texts))}
    splits = datasets.DatasetDict({name: rows.select(indices) for name, indices in cuts.items()})
    facts = DataFacts(name="made up", license="unknown", attribution="none")
    return LabelledData(splits, "single_label_classification", ["no", "yes"], facts, False)


def job_of(tiny_bert: Path, *flags: str) -> ContenderJob:
    common = ["--model_name_or_path", str(tiny_bert), "--stock_length", str(CHUNK), "--use_cpu"]
    return script.parse([*common, *flags])[0]


def test_every_option_has_a_value():
    job, _ = script.parse([])
    assert not unset_fields(job.data) and not unset_fields(job.loop) and not unset_fields(job.contenders)
    assert job.command == "python scripts/studies/baselines.py" and job.resume_command == f"{job.command} --resume"


def test_softmax_rows_are_the_stock_encoder(tiny_bert):
    contender = Contender("softmax", "softmax", CHUNK, str(tiny_bert))
    options = job_of(tiny_bert).contenders
    model, tokenizer, mixers_are_new = contenders.build_network(options, contender, make_data(make_texts(6)))
    inputs = tokenizer(["red one two", "blue"], padding=True, return_tensors="pt")
    with torch.no_grad():
        actual = model.eval().double().base_model(**inputs).last_hidden_state
        expected = BertModel.from_pretrained(tiny_bert).eval().double()(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=0.0, atol=2.0**-40)


def test_more_tokens_than_the_stock_checkpoint_has_positions_are_refused(tiny_bert):
    options = job_of(tiny_bert).contenders
    contenders.check_stock_length(options)
    with pytest.raises(ValueError, match=f"--stock_length {CHUNK + 1} is above the {CHUNK} positions"):
        contenders.check_stock_length(replace(options, stock_length=CHUNK + 1))


def test_passage_mean_is_the_classified_mean_of_the_stock_encoders_means(tiny_bert):
    job, data = job_of(tiny_bert), make_data(make_texts(90))
    contender = Contender("passages", "passages", None, str(tiny_bert))
    model, tokenizer, _ = contenders.build_network(job.contenders, contender, data)
    network, examples, collate = contenders.build_inputs(job, contender, data, model.double().eval(), tokenizer)
    rows = [examples["test"][index] for index in (0, 7, 28)]
    stock = BertModel.from_pretrained(tiny_bert).eval().double()
    with torch.no_grad():
        actual = network(**collate(rows)).logits
        for logits, text in zip(actual, [data.dataset["test"]["text"][index] for index in (0, 7, 28)], strict=True):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            pieces = [[2, *tokens[start : start + CHUNK - 2], 3] for start in range(0, len(tokens), CHUNK - 2)]
            means = [stock(torch.tensor([piece])).last_hidden_state[0].mean(dim=0) for piece in pieces]
            expected = model.classifier(torch.stack(means).mean(dim=0))
            torch.testing.assert_close(logits, expected, rtol=0.0, atol=2.0**-40)


def test_passages_cut_training_documents_only(tiny_bert):
    job, data = job_of(tiny_bert, "--passages_per_document", "2"), make_data(make_texts(90))
    contender = Contender("passages", "passages", None, str(tiny_bert))
    model, tokenizer, _ = contenders.build_network(job.contenders, contender, data)
    _, examples, _ = contenders.build_inputs(job, contender, data, model, tokenizer)
    counts = {split: [len(row["passages"]) for row in part] for split, part in examples.items()}
    assert max(counts["train"]) == 2 and max(counts["validation"]) == max(counts["test"]) == 6
    # Each passage costs its two special tokens, and counts in the budget with them.
    words = sum(len(text.split()) for text in data.dataset["test"]["text"])
    assert sum(examples["test"].lengths) == words + 2 * sum(counts["test"])


def test_predictions_keep_the_order_of_the_documents(tiny_bert):
    job, data = job_of(tiny_bert, "--per_device_eval_batch_size", "4"), make_data(make_texts(90))
    contender = Contender("passages", "passages", None, str(tiny_bert))
    model, tokenizer, _ = contenders.build_network(job.contenders, contender, data)
    network, examples, collate = contenders.build_inputs(job, contender, data, model, tokenizer)
    predictions, loss = contenders.predict(network, examples["test"], collate, data, job.loop, torch.device("cpu"))
    with torch.no_grad():
        alone = [network.eval()(**collate([row])) for row in examples["test"]]
    assert len(set(predictions.tolist())) == 2
    assert predictions.tolist() == [int(output.logits.argmax()) for output in alone]
    # A mean of 30 losses, each near log 2 and rounded in float32.
    assert loss == pytest.approx(np.mean([output.loss.item() for output in alone]), abs=1e-5)


def test_budget_is_reached_with_the_last_step_and_not_before():
    sampler = LengthGroupedBatchSampler([5, 9, 30, 2, 17, 17, 8], batch_size=2, seed=3)
    budget = 200
    steps = contenders.steps_for_tokens(sampler, budget)
    per_step = [
        sampler.count_tokens(epoch, batch) for epoch in range(9) for batch in range(len(sampler.batches(epoch)))
    ]
    assert sum(per_step[: steps - 1]) < budget <= sum(per_step[:steps])


def test_folds_test_every_document_once_and_cut_no_group():
    texts = make_texts(90)
    texts[50] = texts[3]  # an equal document in another split
    data = make_data(texts)
    groups = {digest(text): f"group {index // 4}" for index, text in enumerate(texts) if index != 50}
    folds = split_folds(data, groups, 5)
    tested = [text for fold in folds for text in fold.dataset["test"]["text"]]
    assert sorted(tested) == sorted(texts)
    for fold in folds:
        names = [{groups[digest(text)] for text in part["text"]} for part in fold.dataset.values()]
        assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
        assert sum(map(len, fold.dataset.values())) == len(texts)
    with pytest.raises(ValueError, match="--folds"):
        split_folds(data, {digest(text): "one" for text in texts}, 3)


def test_scores_that_some_folds_leave_undefined_are_left_out():
    """One document has no correlation: the fold where it is the only long one gives no "pearson" there."""
    dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": WORDS[:4], "label": [0.0, 1.0, 2.0, 4.0]}))
    data = LabelledData(dataset, "regression", None, DataFacts(name="numbers", license="x", attribution="x"), False)
    contender = Contender("model", "softmax", 8)
    cells = {(contender, 0, fold): {"predictions": [0.0, 1.0, 2.0, 3.0]} for fold in range(3)}
    lengths = [np.array([9, 9, 9, 9]), np.array([9, 1, 1, 1]), np.array([9, 9, 1, 1])]
    row = summarise(cells, [data] * 3, lengths, long_threshold=5)["rows"][0]
    assert "pearson" in row["all"] and "pearson" not in row["long"]
    assert row["long"]["mse"] == pytest.approx((0.25 + 0 + 0) / 3)


def test_paired_difference_is_the_t_interval():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=7), random.normal(size=7)
    found = paired_difference((ours - theirs).tolist())
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert found["mean"] / found["standard_error"] == pytest.approx(expected.statistic, rel=1e-12)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert paired_difference([0.5]) is None


def test_cut_texts_end_with_the_last_token_that_fits(tiny_bert):
    _, tokenizer, _ = contenders.build_network(
        job_of(tiny_bert).contenders,
        Contender("softmax", "softmax", CHUNK, str(tiny_bert)),
        make_data(make_texts(6)),
    )
    texts = ["red one two", "red  one two three alpha beta gamma delta", "red one two three alpha beta"]
    cut = contenders.cut_texts(make_data(texts).dataset, tokenizer, CHUNK)
    assert [part["text"][0] for part in cut.values()] == [texts[0], "red  one two three alpha beta", texts[2]]


def test_word_counts_do_not_hold_the_documents():
    size, count = 5_000, 600
    texts = [("red blue green " * size)[:size] + WORDS[index % 2] for index in range(count)]
    data = make_data(texts)
    del texts
    tracemalloc.start()
    predictions = tfidf_predictions(data.dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(predictions) == len(data.dataset["test"])
    # The 200 training documents are 1 MB as strings; 16 of them and the words of one are held.
    print(f"peak {peak / 1e6:.2f} MB")
    assert peak < 200 * size


@pytest.fixture
def flags(tmp_path, tiny_bert) -> list[str]:
    rows = [
        {"text": text, "label": ["no", "yes"][index % 2], "author": index // 3}
        for index, text in enumerate(make_texts(60))
    ]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label", "author"])
        writer.writeheader()
        writer.writerows(rows)
    flags = ["--train_file", tmp_path / "rows.csv", "--model_name_or_path", tiny_bert, "--fa_model", tiny_bert]
    flags += ["--fa_lengths", CHUNK, 32, "--stock_length", CHUNK, "--token_budget", 150, "--long_threshold", 20]
    flags += ["--max_tokens_per_batch", 64, "--use_cpu", "--num_threads", 1, "--mixed_precision", "no"]
    return [str(flag) for flag in [*flags, "--output_dir", tmp_path / "out"]]


def run(flags: list[str]) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    return script.main(flags)


def test_report_compares_all_rows_and_is_resumed_by_cell(flags, tmp_path, capsys):
    results = run(flags)
    folder = tmp_path / "out"
    names = [row["model"] for row in results["rows"]]
    assert names[0] == results["reference"] and len(names) == 6
    table = (folder / "report.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert (folder / "baselines.png").stat().st_size > 0 and not list((folder / "unfinished").iterdir())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        if row["train_tokens"] is not None:  # one batch of 64 tokens over the budget, at most
            assert 150 <= row["train_tokens"] < 150 + 64
        assert (row["all_difference"] is None) == (row["model"] == results["reference"])
    assert 0 < results["num_documents"]["long"] < results["num_documents"]["all"]

    with pytest.raises(FileExistsError, match="--resume"):
        run(flags)
    with pytest.raises(ValueError, match="--token_budget was 150"):
        run([*flags, "--resume", "--token_budget", "99"])
    cells = sorted((folder / "cells").iterdir())
    written = {path: path.stat().st_mtime_ns for path in cells}
    before = cells[0].read_text()
    cells[0].unlink()
    assert run([*flags, "--resume"])["rows"] == [
        row | {"train_seconds": other["train_seconds"]}
        for row, other in zip(results["rows"], json.loads((folder / "results.json").read_text())["rows"], strict=True)
    ]
    assert json.loads(cells[0].read_text())["predictions"] == json.loads(before)["predictions"]
    assert {path: path.stat().st_mtime_ns for path in cells[1:]} == {path: written[path] for path in cells[1:]}
    rows = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(rows.replace(",no,", ",x,").replace(",yes,", ",no,").replace(",x,", ",yes,"))
    with pytest.raises(ValueError, match="holds cells of other data: the labels of train, the labels of .* changed"):
        run([*flags, "--resume"])


@pytest.mark.slow
def test_folds_pair_differences_over_folds_and_seeds(flags):
    results = run([*flags, "--folds", "3", "--group_column", "author", "--seeds", "0", "1", "--fa_lengths", "32"])
    assert results["paired_over"] == "folds" and results["num_documents"]["all"] == 60
    runs = {row["kind"]: row["runs"] for row in results["rows"]}
    assert runs == {"softmax": 6, "passages": 6, "factorized": 6, "words": 3}
    assert all(row["all_difference"]["count"] == 3 for row in results["rows"][1:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--folds", "2"], "at least 3"),
        (["--group_column", "author"], "give --folds"),
        (["--token_budget", "0"], "--token_budget"),
        (["--seeds", "1", "1"], "each once"),
        (["--fa_lengths", "2"], "--fa_lengths"),
    ],
)
def test_wrong_flags_are_named(wrong, message, capsys):
    with pytest.raises(SystemExit):
        script.parse(wrong)
    assert message in capsys.readouterr().err


def test_several_processes_are_refused_before_anything_is_written(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "make_accelerator", lambda args: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="trains in one process"):
        script.main(flags)
    assert not (tmp_path / "out").exists()
