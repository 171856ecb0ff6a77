"""Protects files of predictions: any input, bad rows kept in their place, a stopped run that ends as if it had not."""

import csv
import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from tiny_predictors import NUMBER, SEVERAL, SINGLE, make_texts, write_image_model, write_text_model

from fa_transformers.data.readers.tables import DataError
from fa_transformers.options import PredictOptions
from fa_transformers.prediction import inputs, output
from fa_transformers.prediction.predictor import Predictor
from fa_transformers.prediction.run import Columns, predict_file
from fa_transformers.prediction.sources import LabelReader

OPTIONS = PredictOptions(max_tokens_per_batch=64, chunk_size=16, device="cpu")
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_text_model(folder / "text")
    write_text_model(folder / "other", names=["ant", "bee", "dog"])
    write_text_model(folder / "number", problem_type=NUMBER)
    write_text_model(folder / "several", problem_type=SEVERAL, names=["=1+2", *NAMES])
    write_text_model(folder / "absolute", positions="absolute")
    write_image_model(folder / "images", do_resize=True)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_table(path: Path, texts: list[str], **columns: list) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *columns])
        writer.writerows(zip(texts, *columns.values(), strict=True))
    return path


def read(path: str | Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(model: Path, path: Path, columns: Columns = Columns(), lengths=(), **options):  # noqa: B008 - frozen
    return predict_file(str(model), path, replace(OPTIONS, **options), columns, lengths)


def test_a_table_is_answered_row_by_row_and_each_format_says_the_same(models, here):
    texts = make_texts(8)
    table = write_table(here / "in.csv", texts, key=[f"k{number}" for number in range(8)])
    for ending in ("csv", "jsonl", "parquet"):
        done = run(models / "text", table, output=Path(f"out.{ending}"), id_column_name="key")
        assert done.counts.rows == 8 and done.counts.errors == 0 and not done.scores
    rows = read("out.csv")
    columns = ["row", "key", "text", "predicted", "score", *(f"score of {name}" for name in NAMES)]
    assert list(rows[0]) == [*columns, "tokens", "truncated", "error"]
    predictor = Predictor.from_pretrained(models / "text", device="cpu", max_tokens_per_batch=64, chunk_size=16)
    for number, (row, answer) in enumerate(zip(rows, predictor(texts), strict=True), start=1):
        assert (row["row"], row["key"]) == (str(number), f"k{number - 1}")
        assert row["predicted"] == answer.label and row["text"].startswith(texts[number - 1][:190])
        assert [row[f"score of {name}"] for name in NAMES] == [f"{answer.scores[name]:.6g}" for name in NAMES]
        assert row["tokens"] == str(answer.num_tokens) and row["truncated"] == "false" and row["error"] == ""
    lines = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pyarrow.parquet.read_table("out.parquet").to_pylist() == lines
    for row, line in zip(rows, lines, strict=True):
        assert {name: float(value) for name, value in row.items() if name.startswith("score")} == {
            name: value for name, value in line.items() if name.startswith("score")
        }
    assert sorted(path.name for path in here.iterdir()) == ["in.csv", "out.csv", "out.jsonl", "out.parquet"]


def test_bad_rows_stand_in_their_place_with_the_reason(models, here):
    lines = ['{"text": "sea"}', '{"text": ""}', "{", '{"text": 7}', '{"other": 1}', '{"text": "law"}']
    (here / "in.jsonl").write_text("\n".join(lines))
    done = run(models / "text", here / "in.jsonl")
    rows = read("predictions.csv")
    assert [row["row"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    for row, reason in zip(
        rows, ["", "document is empty", "not valid JSON", "must be a string", "no text column", ""], strict=True
    ):
        assert reason in row["error"] and (row["error"] == "") == (reason == "")
        assert (row["predicted"] in NAMES) == (reason == "") and (row["truncated"] == "") == (reason != "")
    assert done.counts.errors == 4 and done.counts.first_error.startswith("row 2: the document is empty")
    (here / "ids.jsonl").write_text('{"text": "sea", "key": "\\ud800a"}\n')
    run(models / "text", here / "ids.jsonl", overwrite=True, id_column_name="key")
    assert read("predictions.csv")[0]["key"] == "?a", "half of a character, which no file can hold"
    with pytest.raises(ValueError, match="--id_column_name row: the output has a column of this name"):
        run(models / "text", write_table(here / "row.csv", ["sea"], row=["R1"]), overwrite=True, id_column_name="row")
    (here / "odd.csv").write_text('text,label\nsea,ant\nlaw\n"=1+1 ship",bee\n')
    run(models / "text", here / "odd.csv", overwrite=True)
    rows = read("predictions.csv")
    assert "the row has 1 fields, the header has 2" in rows[1]["error"] and rows[2]["text"] == "'=1+1 ship"
    assert [row["true"] for row in rows] == ["ant", "", "bee"]


def test_labels_of_the_table_are_scored_and_unknown_ones_counted(models, here):
    texts = make_texts(10)
    answers = [row.label for row in Predictor.from_pretrained(models / "text", device="cpu")(texts)]
    labels = [*answers[:6], "zebra", "", "ant" if answers[8] != "ant" else "bee", answers[9]]
    table = write_table(here / "in.csv", texts, kind=labels)
    assert not run(models / "text", table).scores  # nobody said that "kind" is the label
    done = run(models / "text", table, Columns(label="kind"), overwrite=True)
    assert done.scores["accuracy"] == pytest.approx(7 / 8) and done.counts.labelled == 8
    assert (
        done.counts.unknown_labels == 1 and "'zebra' doesn't occur in the model's classes" in done.counts.first_unknown
    )


def test_several_labels_and_numbers_have_their_own_columns_and_scores(models, here):
    texts = make_texts(6)
    several = Predictor.from_pretrained(models / "several", device="cpu")
    right = ["|".join(answer.label) for answer in several(texts)]
    done = run(models / "several", write_table(here / "s.csv", texts, label=right), Columns(label_separator="|"), (8,))
    assert done.scores["accuracy"] == 1.0 and done.by_length[0]["examples"] == 6
    rows = read("predictions.csv")
    assert [json.loads(row["predicted"]) for row in rows] == [answer.label for answer in several(texts)]
    assert "score of =1+2" in rows[0]
    numbers = [answer.label for answer in Predictor.from_pretrained(models / "number", device="cpu")(texts)]
    done = run(models / "number", write_table(here / "n.csv", texts, label=[1 + n for n in numbers]), overwrite=True)
    assert done.scores["mse"] == pytest.approx(1.0, abs=1e-4)
    rows = read("predictions.csv")
    assert list(rows[0]) == ["row", "text", "true", "predicted", "tokens", "truncated", "error"]
    np.testing.assert_allclose([float(row["predicted"]) for row in rows], numbers, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "written", "unknown"),
    [
        ("text", [0, 1, "2", 2.0, None, 3], "the label 3 is no place among the 3, from 0 on, of the model's classes"),
        ("several", [[0, 3], [1], [2, 1], [], None, [4]], "the label 4 is no place among the 4, from 0 on"),
        (
            "several",
            [[1, 0, 0, 1], ["0", "1", "0", "0"], [0, 1, 1, 0], [0] * 4, None, [1]],
            "expected 4 zeros and ones, one for each class, in the order of the model's classes, which are",
        ),
        ("text", ["ant", "bee", "cat", "cat", None, "1"], "the label '1' doesn't occur in the model's classes"),
    ],
)
def test_labels_may_be_numbers_of_classes_or_zeros_and_ones(models, here, model, written, unknown):
    lines = [json.dumps({"text": "sea", "label": label}) for label in written]
    (here / "in.jsonl").write_text("\n".join(lines))
    done = run(models / model, here / "in.jsonl", output=Path("out.jsonl"))
    true = [json.loads(line)["true"] for line in Path("out.jsonl").read_text().splitlines()]
    several = [["=1+2", "cat"], ["ant"], ["ant", "bee"], [], None, None]
    single = ["ant", "bee", "cat", "cat", None, None]
    assert [sorted(label) if isinstance(label, list) else label for label in true] == (
        several if model == "several" else single
    )
    assert done.counts.labelled == 4 and done.counts.unknown_labels == 1 and unknown in done.counts.first_unknown


@pytest.mark.parametrize(
    ("names", "labels", "numbers", "told"),
    [
        (["10", "20", "30"], [0, "2", 1.0], [0, 2, 1], ""),
        (["10", "20", "30"], [20, "30", 10.0], [1, 2, 0], ""),
        (["1", "0"], [0, "1", 0.0], [1, 0, 1], ""),
        (
            ["1", "2", "3"],
            [1, 3, 0],
            [0, 2, None],
            "'0' doesn't .*'1', '2', '3'; the labels were read as names.* as '1' is",
        ),
        (["10", "20"], [0, 5], [None, None], "'0' doesn't .*as there are classes that are called by numbers"),
        (["ant", "20", "cat"], [0, 1, 2], [0, 1, 2], ""),
        (["ant", "bee"], [0, 1, 2], [0, 1, None], "2 is no place among the 2.*the labels were read as places"),
        (["0", "1"], [True, 0], [None, 0], "'True' doesn't occur"),
    ],
)
def test_a_whole_number_is_the_name_of_a_class_or_a_place_and_the_reason_says_which(names, labels, numbers, told):
    reader = LabelReader(SimpleNamespace(problem_type=SINGLE, label_names=names), None, labels)
    assert [reader.read(label) for label in labels] == numbers
    assert re.search(told, reader.first_unknown) if told else not reader.first_unknown


def test_labels_that_cannot_be_read_are_told_without_flags_of_training():
    for problem_type, label in ((NUMBER, "high"), (SEVERAL, "ant")):
        reader = LabelReader(SimpleNamespace(problem_type=problem_type, label_names=NAMES), None)
        assert reader.read(label) is None and "mend the row" in reader.first_unknown
        assert "--problem_type" not in reader.first_unknown


def test_folders_of_texts_and_of_images_are_answered_file_by_file(models, here):
    (here / "letters" / "old").mkdir(parents=True)
    (here / "letters" / "b.txt").write_text("sea ship")
    (here / "letters" / "old" / "a.txt").write_bytes(b"\xff\xfe\xfa law")
    (here / "letters" / "c.txt").write_text("")
    (here / "letters" / ".hidden.txt").write_text("sea")
    done = run(models / "text", here / "letters")
    rows = read("predictions.csv")
    assert [row["file"] for row in rows] == ["b.txt", "c.txt", "old/a.txt"]
    assert [bool(row["error"]) for row in rows] == [False, True, True] and done.counts.errors == 2
    run(models / "text", here / "letters" / "b.txt", overwrite=True)
    assert read("predictions.csv") == rows[:1]
    (here / "photos").mkdir()
    for number, size in enumerate([(16, 16), (40, 30), (9, 70)]):
        Image.new("RGB", size, (90 * number, 200, 7)).save(here / "photos" / f"{number}.png")
    (here / "photos" / "3.jpg").write_bytes(b"nothing")
    run(models / "images", here / "photos", overwrite=True)
    rows = read("predictions.csv")
    assert list(rows[0]) == ["row", "file", "predicted", "score", "score of cat", "score of dog", "patches", "error"]
    assert [row["patches"] for row in rows] == ["5", "5", "5", ""] and "no image that Pillow" in rows[3]["error"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("stopped", ["killed while writing", "disk full", "killed before the first rows"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(models, here, monkeypatch, ending, stopped):
    monkeypatch.setattr(inputs, "WINDOW_ITEMS", 4)
    texts = make_texts(10, longest=12)
    texts[5] = ""
    table = write_table(here / "in.csv", texts, label=[NAMES[number % 3] for number in range(10)])
    whole, part = Path(f"whole.{ending}"), Path(f"part.{ending}")
    expected = run(models / "text", table, Columns(), (4, 8), output=whole)
    stop(monkeypatch, stopped)
    with pytest.raises((KeyboardInterrupt, ValueError)) as ended:
        run(models / "text", table, Columns(), (4, 8), output=part)
    monkeypatch.undo()
    monkeypatch.setattr(inputs, "WINDOW_ITEMS", 4)
    monkeypatch.chdir(here)
    if stopped == "disk full":
        assert str(ended.value) == (
            f"--output part.{ending}: No space left on device. 4 rows are kept in part.{ending}.partial: make room, "
            "then go on with --resume"
        )
    assert not part.exists() and Path(f"part.{ending}.partial").is_dir()
    with pytest.raises(FileExistsError, match="is an unfinished run: --resume goes on, --overwrite begins again"):
        run(models / "text", table, Columns(), (4, 8), output=part)
    found = run(models / "text", table, Columns(), (4, 8), output=part, resume=True)
    assert part.read_bytes() == whole.read_bytes()
    assert (found.counts, found.scores, found.by_length) == (expected.counts, expected.scores, expected.by_length)
    assert not Path(f"part.{ending}.partial").exists()


def stop(monkeypatch, how: str) -> None:
    """Let the writing of the second rows end in the middle; or nothing of the first be noted."""
    keep, append, calls = output.Output._keep, output.Output._append, []

    def killed(self, progress):
        calls.append(progress.rows)
        if progress.rows == (8 if how == "killed while writing" else 4):
            raise KeyboardInterrupt
        keep(self, progress)

    def full(file, content):
        calls.append(file)
        if len(calls) == 5:  # header, two files of the first rows, then half of the second ones
            append(file, content[: len(content) // 2])
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, content)

    if how == "disk full":
        monkeypatch.setattr(output.Output, "_append", staticmethod(full))
    else:
        monkeypatch.setattr(output.Output, "_keep", killed)


def test_another_input_model_or_option_is_refused_by_name(models, here, monkeypatch):
    monkeypatch.setattr(inputs, "WINDOW_ITEMS", 2)
    table = write_table(here / "in.csv", ["sea", "law", "ship", "red"])
    stop(monkeypatch, "killed before the first rows")
    with pytest.raises(KeyboardInterrupt):
        run(models / "text", table)
    assert json.loads((here / "predictions.csv.partial" / "progress.json").read_text())["progress"]["rows"] == 2
    monkeypatch.undo()
    monkeypatch.chdir(here)
    other = write_table(here / "other.csv", ["sea", "LAW", "ship", "red"])
    longer = replace(OPTIONS, max_length=5)
    for model, path, options, message in [
        (
            "text",
            other,
            OPTIONS,
            r"the first 2 rows of .*other.csv are not those that predictions.csv was begun with .*in.csv",
        ),
        ("text", write_table(here / "short.csv", ["sea"]), OPTIONS, "the first 2 rows of .*short.csv are not those"),
        ("other", table, OPTIONS, "begun with the model .*text, and .*other is another one"),
        ("text", table, longer, "begun with max_length None, now it is 5"),
        ("text", write_table(here / "labels.csv", ["sea"], label=["ant"]), OPTIONS, "begun with columns"),
    ]:
        with pytest.raises(ValueError, match=f"--resume.*{message}"):
            predict_file(str(models / model), path, replace(options, resume=True), Columns())
    (here / "predictions.csv.partial" / "progress.json").write_text("{")
    with pytest.raises(ValueError, match="--resume: .*progress.json is damaged; --overwrite begins again"):
        run(models / "text", table, resume=True)
    run(models / "text", table, overwrite=True)
    assert len(read("predictions.csv")) == 4
    with pytest.raises(FileExistsError, match="predictions.csv is complete: --overwrite predicts again"):
        run(models / "text", table, resume=True)


def test_a_document_beyond_the_table_of_positions_is_marked_or_refused(models, here):
    table = write_table(here / "in.csv", ["sea " * 90, "law"])
    done = run(models / "absolute", table)
    assert [row["truncated"] for row in read("predictions.csv")] == ["true", "false"]
    assert (done.counts.truncated, done.limit) == (1, 32)
    done = run(models / "absolute", table, overwrite=True, strict_length=True)
    assert "the document has 92 tokens, the limit is 32" in read("predictions.csv")[0]["error"]
    assert done.counts.errors == 1


def test_tokens_of_the_hub_are_in_no_output(models, here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-a-company")
    table = write_table(here / "in.csv", ["sea a-token-of-a-company ship"], id=["a-token-of-a-company"])
    run(models / "text", table, id_column_name="id")
    assert (
        "a-token-of" not in Path("predictions.csv").read_text()
        and "hidden-token" in Path("predictions.csv").read_text()
    )


def test_bad_input_and_output_are_told_in_one_line_before_anything_is_written(models, here):
    table = write_table(here / "in.csv", ["sea"], pages=[7])
    write_table(here / "empty.csv", [])
    (here / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(here / "photos" / "a.png")
    (here / "tables").mkdir()
    write_table(here / "tables" / "a.csv", ["sea"])
    (here / "old.csv").write_text("mine")
    for model, path, options, columns, message in [
        ("text", "none.csv", {}, {}, "none.csv: there is no such file or folder"),
        ("text", "in.csv", {}, {"text": "body"}, "there is no text column 'body'.*--text_column_name"),
        ("text", "in.csv", {}, {"label": "kind"}, "there is no label column 'kind'.*--label_column_name"),
        ("text", "in.csv", {"id_column_name": "key"}, {}, "there is no id column 'key'.*--id_column_name"),
        ("text", "empty.csv", {}, {}, "empty.csv: there are no rows"),
        ("text", "photos", {}, {}, r"photos: the model reads texts \(.txt\), and the folder holds none, but 1 images"),
        ("text", "photos/a.png", {}, {}, "a.png: the model reads texts, and this is an image"),
        ("text", "tables", {}, {}, "holds none, but tables: name one of 'a.csv'"),
        ("images", "in.csv", {}, {}, "in.csv: the model reads images: name an image or a folder of them"),
        ("images", "tables", {}, {}, "tables: the model reads images, and the folder holds none"),
        ("text", "in.csv", {"output": "out.xls"}, {}, "--output out.xls: the ending '.xls' is not one of .csv, .jsonl"),
        ("text", "in.csv", {"output": "no/out.csv"}, {}, "--output no/out.csv: there is no folder no"),
        (
            "text",
            "in.csv",
            {"output": "old.csv"},
            {},
            "old.csv exists: --overwrite replaces it, --output names another",
        ),
        ("text", "in.csv", {"output": "in.csv", "overwrite": True}, {}, "--output in.csv is the file to predict for"),
        ("text", "in.csv", {"overwrite": True, "resume": True}, {}, "--overwrite and --resume contradict each other"),
        ("absolute", "in.csv", {"max_length": 64}, {}, "`max_length=64` is more than the model reads"),
        ("images", "photos", {"max_length": 64}, {}, "`max_length` is for texts"),
        ("missing", "in.csv", {}, {}, "is no folder here"),
    ]:
        given = {name: Path(value) if name == "output" else value for name, value in options.items()}
        with pytest.raises((DataError, FileExistsError, FileNotFoundError, ValueError), match=message) as refused:
            run(models / model, Path(path), Columns(**columns), **given)
        assert "\n" not in str(refused.value)
        assert not Path("predictions.csv").exists() and (here / "old.csv").read_text() == "mine", message
    assert table.exists()
    Path("predictions.csv.partial").mkdir()
    owner = {"host": "node-7", "machine": "another", "pid": 17}  # a run that is alive on another machine
    Path("predictions.csv.partial/.in-use").write_text(json.dumps(owner))
    with pytest.raises(FileExistsError, match="^--output predictions.csv is in use by another run .process 17 on"):
        run(models / "text", Path("in.csv"), overwrite=True)
    shutil.rmtree("predictions.csv.partial")
    with pytest.raises(ValueError, match="--report_lengths needs true labels: in.csv has no column of them"):
        run(models / "text", Path("in.csv"), Columns(), (8,), overwrite=True)
