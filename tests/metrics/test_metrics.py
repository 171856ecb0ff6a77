"""Protects the scores: they equal scikit-learn's and SciPy's on the whole set, whatever the batches and processes."""

import csv
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import evaluate
import numpy as np
import pytest
from repository import HELPERS, ROOT
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sklearn_metrics

import fa_transformers.metrics
from fa_transformers.metrics import (
    PROBLEM_METRICS,
    RunningScores,
    decide,
    describe_intervals,
    load_metric,
    wilson_interval,
)
from fa_transformers.metrics.classification import MATRIX_MAX_CLASSES

NAMES = ["ant", "bee", "cat", "dog"]
WORKER = HELPERS / "evaluate_in_processes.py"


def random_classes(num: int = 53) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    references = random.integers(0, 3, num)
    return np.where(random.random(num) < 0.4, random.integers(0, 3, num), references), references


def test_single_label_scores_equal_scikit_learn():
    predictions, references = random_classes()
    scores = load_metric("single_label_classification").compute(
        predictions=predictions, references=references, label_names=NAMES
    )
    assert scores["accuracy"] == sklearn_metrics.accuracy_score(references, predictions)
    assert scores["macro_f1"] == sklearn_metrics.f1_score(references, predictions, average="macro")
    assert "micro_f1" not in scores, "it is the accuracy"
    table = sklearn_metrics.classification_report(
        references, predictions, labels=range(4), target_names=NAMES, output_dict=True, zero_division=0
    )
    for row in scores["per_class"]:
        expected = table[row["label"]]
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == tuple(expected.values())
    matrix = np.array(scores["confusion_matrix"])
    assert matrix.shape == (4, 4) and matrix.sum() == len(references)
    assert matrix[0, 1] == np.sum((references == 0) & (predictions == 1))


def test_multi_label_scores_equal_scikit_learn():
    random = np.random.default_rng(2)
    references, predictions = random.integers(0, 2, (2, 37, 4))
    scores = load_metric("multi_label_classification").compute(
        predictions=predictions, references=references, label_names=NAMES
    )
    assert scores["accuracy"] == sklearn_metrics.accuracy_score(references, predictions)
    for average in ("macro", "micro"):
        assert scores[f"{average}_f1"] == sklearn_metrics.f1_score(references, predictions, average=average)
    expected = sklearn_metrics.f1_score(references, predictions, average=None)
    assert [row["f1"] for row in scores["per_class"]] == expected.tolist()


def test_regression_scores_equal_scikit_learn_and_scipy():
    random = np.random.default_rng(3)
    references = random.normal(size=29)
    predictions = references + random.normal(size=29)
    scores = load_metric("regression").compute(predictions=predictions, references=references)
    assert scores["mse"] == sklearn_metrics.mean_squared_error(references, predictions)
    assert scores["mae"] == sklearn_metrics.mean_absolute_error(references, predictions)
    assert scores["pearson"] == pearsonr(references, predictions).statistic
    assert scores["spearman"] == spearmanr(references, predictions).statistic


def test_an_undefined_correlation_is_none_and_not_nan():
    scores = load_metric("regression").compute(predictions=[1.0, 1.0], references=[0.0, 2.0])
    assert scores["pearson"] is None and scores["spearman"] is None and scores["mse"] == 1.0


def test_batches_of_different_size_add_up_to_the_whole():
    predictions, references = random_classes()
    metric = load_metric("single_label_classification")
    for batch in (slice(0, 20), slice(20, 50), slice(50, 53)):
        metric.add_batch(predictions=predictions[batch], references=references[batch])
    assert metric.compute(label_names=NAMES)["accuracy"] == sklearn_metrics.accuracy_score(references, predictions)


@pytest.mark.parametrize("file", ["classification", "multi_label", "regression"])
def test_each_file_loads_with_evaluate_and_without_a_network(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = Path(fa_transformers.metrics.__file__).with_name(f"{file}.py")
    metric = evaluate.load(str(path), cache_dir=str(tmp_path))
    values = [[0, 1], [1, 1]] if file == "multi_label" else [0, 1]
    names = {} if file == "regression" else {"label_names": ["no", "yes"]}
    scores = metric.compute(predictions=values, references=values, **names)
    assert scores["mse" if file == "regression" else "accuracy"] == (0.0 if file == "regression" else 1.0)


@pytest.mark.parametrize(
    ("problem_type", "predictions", "references", "message"),
    [
        ("single_label_classification", [4], [0], "predictions hold class 4, but label_names has 4 names"),
        ("single_label_classification", [0], [-1], "references hold class -1"),
        ("multi_label_classification", [[0, 1]], [[0, 1]], r"predictions\[0\] must be 4 zeros and ones"),
        ("multi_label_classification", [[0, 1, 2, 0]], [[0, 0, 0, 0]], r"predictions\[0\] must be 4 zeros and ones"),
        ("regression", [float("nan")], [0.0], "predictions hold a number that is not finite"),
    ],
)
def test_values_that_cannot_be_scored_are_errors(problem_type, predictions, references, message):
    names = {} if problem_type == "regression" else {"label_names": NAMES}
    with pytest.raises(ValueError, match=message):
        load_metric(problem_type).compute(predictions=predictions, references=references, **names)


def test_an_unknown_problem_type_is_an_error():
    with pytest.raises(ValueError, match="problem_type must be one of"):
        load_metric("ranking")
    with pytest.raises(ValueError, match="problem_type must be one of"):
        decide(np.zeros((1, 2)), "ranking")


def test_logits_become_decisions_and_diverged_ones_an_error():
    logits = np.array([[0.1, -2.0], [-3.0, 4.0]])
    assert decide(logits, "single_label_classification").tolist() == [0, 1]
    assert decide(logits, "multi_label_classification").tolist() == [[1, 0], [0, 1]]
    assert decide(logits[:, :1], "regression").tolist() == [0.1, -3.0]
    with pytest.raises(ValueError, match="not finite"):
        decide(np.array([[np.nan, 0.0]]), "single_label_classification")


@pytest.fixture(scope="module")
def reports_of_two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("reports")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, str(WORKER), str(folder)], check=True, env=environment, timeout=240)
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    for problem_type, report in reports[0].items():
        with (folder / f"{problem_type}.csv").open(encoding="utf-8", newline="") as file:
            report["answers"] = list(csv.DictReader(file))
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("problem_type", sorted(PROBLEM_METRICS))
def test_two_real_processes_score_every_example_once(problem_type, reports_of_two_processes):
    first, second = (reports[problem_type] for reports in reports_of_two_processes)
    assert first["scores"] == second["scores"]
    assert first["num_processes"] == 2 and first["batches"] == second["batches"]
    logits, references = np.array(first["logits"]), np.array(first["references"])
    predictions = decide(logits, problem_type)
    scores = first["scores"]
    assert scores["num_examples"] == len(references) == 11
    if problem_type == "regression":
        # The logits went through float32.
        assert scores["mse"] == pytest.approx(np.mean((predictions - references) ** 2), rel=1e-6)
        assert scores["spearman"] == pytest.approx(spearmanr(predictions, references).statistic)
    else:
        assert scores["accuracy"] == sklearn_metrics.accuracy_score(references, predictions)
        assert scores["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(references, predictions, average="macro"))


@pytest.mark.slow
@pytest.mark.parametrize("problem_type", sorted(PROBLEM_METRICS))
def test_two_real_processes_write_each_answer_beside_its_example(problem_type, reports_of_two_processes):
    report = reports_of_two_processes[0][problem_type]
    logits, rows = np.array(report["logits"]), sorted(report["answers"], key=lambda row: int(row["row"]))
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 12)]
    if problem_type == "regression":
        np.testing.assert_allclose([float(row["predicted"]) for row in rows], logits[:, 0], rtol=1e-5)
        return
    odds = 1 / (1 + np.exp(-logits))
    if problem_type == "single_label_classification":
        odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = [[float(row[f"score of {name}"]) for name in ("ant", "bee", "cat")] for row in rows]
    np.testing.assert_allclose(found, odds, atol=1e-5)


@pytest.mark.parametrize("num_classes", [101, 1_000, 100_000])
def test_many_classes_are_scored_without_a_matrix_of_their_square(num_classes):
    predictions, references = random_classes(200)
    # The last class is confused with the first most often.
    predictions[:50], references[:50] = 0, num_classes - 1
    names = [f"class {index}" for index in range(num_classes)]
    tracemalloc.start()
    scores = load_metric("single_label_classification").compute(
        predictions=predictions, references=references, label_names=names
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 * 16 + 2000 * num_classes
    assert "confusion_matrix" not in scores
    assert scores["most_confused"][0] == {"true": names[-1], "predicted": names[0], "count": 50}
    assert sum(row["count"] for row in scores["most_confused"]) == np.sum(predictions != references)
    assert len(scores["per_class"]) == num_classes
    occurring = sklearn_metrics.f1_score(references, predictions, average="macro")
    assert scores["macro_f1"] == occurring


def test_up_to_a_hundred_classes_keep_their_matrix():
    names = [str(index) for index in range(MATRIX_MAX_CLASSES)]
    scores = load_metric("single_label_classification").compute(predictions=[99], references=[3], label_names=names)
    assert scores["confusion_matrix"][3][99] == 1 and "most_confused" not in scores


@pytest.mark.parametrize("problem_type", sorted(PROBLEM_METRICS))
def test_running_scores_of_batches_are_the_metric_of_the_whole(problem_type):
    random = np.random.default_rng(3)
    if problem_type == "multi_label_classification":
        references, predictions = random.integers(0, 2, (2, 37, 4))
    elif problem_type == "regression":
        references, predictions = random.normal(size=(2, 37))
    else:
        predictions, references = random_classes(37)
    names = None if problem_type == "regression" else NAMES
    running = RunningScores(problem_type, names)
    for batch in (slice(0, 10), slice(10, 11), slice(11, 37)):
        running.add(predictions[batch], references[batch])
    given = {} if names is None else {"label_names": names}
    whole = load_metric(problem_type).compute(predictions=predictions, references=references, **given)
    assert running.compute() == whole and running.num_examples == 37
    with pytest.raises(ValueError, match="no examples"):
        RunningScores(problem_type, names).compute()


def test_many_labels_of_many_rows_are_scored_in_the_memory_of_their_counts():
    """2,000 rows of 1,000 classes are 16 MB as integers; what is added a batch at a time is not kept."""
    random = np.random.default_rng(0)
    names = [str(index) for index in range(1_000)]
    batches = [random.random((2, 100, 1_000)) < 0.01 for _ in range(2)]
    tracemalloc.start()
    scores = RunningScores("multi_label_classification", names)
    for index in range(20):
        scores.add(*batches[index % 2])
    result = scores.compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 * 4
    references = np.concatenate([batch[1] for batch in batches])
    predictions = np.concatenate([batch[0] for batch in batches])
    assert result["micro_f1"] == sklearn_metrics.f1_score(references, predictions, average="micro")


def test_wilson_intervals_are_the_shares_at_which_the_score_test_stands_at_its_limit():
    """The ends p solve |share - p| = 1.96 sqrt(p (1 - p) / n), which is how the interval is defined."""
    for share, num_examples in ((0.0, 1), (0.5, 4), (0.9, 20), (1.0, 12), (0.731, 434)):
        for end in wilson_interval(share, num_examples):
            assert (share - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / num_examples, abs=1e-12)
    assert wilson_interval(1.0, 12)[1] == 1.0
    with pytest.raises(ValueError, match="1 or more examples"):
        wilson_interval(0.5, 0)


def test_scores_without_an_interval_are_named_below_thirty_examples():
    scores = {"accuracy": 0.5, "macro_f1": 0.4}
    few = describe_intervals(scores, 20, "single_label_classification")
    assert few == [
        "The 95 % interval of its accuracy is 0.299 to 0.701.",
        "20 examples are too few for an interval of its macro_f1.",
    ]
    assert describe_intervals(scores, 30, "single_label_classification")[0].startswith("The 95 % interval of its acc")
    assert len(describe_intervals(scores, 30, "single_label_classification")) == 1
    assert describe_intervals({"mse": 1.0, "mae": 1.0}, 5, "regression") == [
        "5 examples are too few for an interval of its mse, mae."
    ]
