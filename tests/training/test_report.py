"""Protects the end of a run from its data's labels: however many and whatever they are, the report is written."""

import logging
import struct
from pathlib import Path

import datasets
import pytest

from fa_transformers.data.facts import DataFacts
from fa_transformers.data.labelled import LabelledData
from fa_transformers.metrics import load_metric
from fa_transformers.training import baselines, report
from fa_transformers.training.baselines import TFIDF_MAX_CLASSES, score_baselines
from fa_transformers.training.report import draw_report, plot_confusion_matrix, write_report


def size_of_png(path: Path) -> tuple[int, int]:
    return struct.unpack(">II", path.read_bytes()[16:24])


def scores_of(names: list[str]) -> dict:
    numbers = list(range(len(names)))
    return load_metric("single_label_classification").compute(
        predictions=numbers, references=numbers[::-1], label_names=names
    )


@pytest.mark.parametrize("num_classes", [1_000, 100_000])
def test_many_classes_are_reported_as_text_alone(num_classes, tmp_path):
    names = [f"class {index}" for index in range(num_classes)]
    scores = scores_of(names)
    write_report(tmp_path, {"steps": 1}, scores)
    draw_report(tmp_path, scores, names)
    assert {path.name for path in tmp_path.iterdir()} == {"all_results.json", "per_class.txt", "most_confused.txt"}
    assert len((tmp_path / "per_class.txt").read_text().splitlines()) == 2 + num_classes
    assert len((tmp_path / "most_confused.txt").read_text().splitlines()) == 2 + 100


def test_a_picture_of_more_classes_than_can_be_named_has_one_size(tmp_path):
    sizes = set()
    for num_classes in (31, 100):
        matrix = [[1] * num_classes] * num_classes
        plot_confusion_matrix(matrix, [str(index) for index in range(num_classes)], tmp_path / "matrix.png")
        sizes.add(size_of_png(tmp_path / "matrix.png"))
    assert sizes == {(1200, 1200)}


def test_labels_that_are_no_names_stay_lines_of_a_table_and_do_not_break_the_picture(tmp_path):
    names = ["sea\n\n# heading", "$x^{", "x" * 1_000_000, "\x1b[31mred", ""]
    scores = scores_of(names)
    write_report(tmp_path, {}, scores)
    draw_report(tmp_path, scores, names)
    lines = (tmp_path / "per_class.txt").read_text().splitlines()
    assert len(lines) == 2 + len(names) and all(len(line) < 130 and line.isprintable() for line in lines)
    assert lines[2].startswith("sea # heading ") and "…" in lines[4]
    assert max(size_of_png(tmp_path / "confusion_matrix.png")) < 1000


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise MemoryError("no memory for a picture")

    monkeypatch.setattr(report, "plot_confusion_matrix", fail)
    draw_report(tmp_path, {"confusion_matrix": [[1]]}, ["a"])
    assert "confusion_matrix.png was not drawn: MemoryError: no memory for a picture" in caplog.text


def labelled(num_classes: int) -> LabelledData:
    names = [str(index) for index in range(num_classes)]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": [f"word{index} sea" for index in range(num_classes)], "label": list(range(num_classes))}
    part = datasets.Dataset.from_dict(rows, features=features)
    splits = datasets.DatasetDict({"train": part, "validation": part})
    return LabelledData(
        splits, "single_label_classification", names, DataFacts(name="d", license="l", attribution="a"), False
    )


def test_a_comparison_that_fails_or_would_take_too_long_is_left_out(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)

    def fail(*_: object) -> dict:
        raise ValueError("empty vocabulary")

    assert "TF-IDF + logistic regression" in score_baselines(labelled(3))
    assert list(score_baselines(labelled(TFIDF_MAX_CLASSES + 1))) == ["majority class"]
    monkeypatch.setattr(baselines, "tfidf_baseline", fail)
    assert list(score_baselines(labelled(3))) == ["majority class"]
    assert "was not scored: ValueError: empty vocabulary" in caplog.text
