"""Protects the command that predicts: flags to options, what it prints, and the line that goes on after a stop."""

import json
import os
from pathlib import Path

import pytest
from tiny_predictors import write_text_model

from fa_transformers import commands
from fa_transformers.commands import predict as command
from fa_transformers.options import PredictOptions
from fa_transformers.prediction import run


def test_flags_become_options():
    flags = "model in.csv --output a.jsonl --id_column_name key --report_lengths 8 16 --label_column_name kind"
    parsed = command.parse(flags.split())
    assert (parsed.model, parsed.path) == ("model", Path("in.csv"))
    assert parsed.options == PredictOptions(output=Path("a.jsonl"), id_column_name="key")
    assert (parsed.report_lengths, parsed.label_column, parsed.data.text_column_name) == ((8, 16), "kind", "text")
    assert command.parse(["model", "in.csv"]).label_column is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["model"], "the following arguments are required: PATH"),
        (["model", "in.csv", "--chunk_size", "0"], "--chunk_size must be above 0, got 0"),
        (["model", "in.csv", "--output_dir", "x"], "unknown flag --output_dir: did you mean --output?"),
        (["model", "in.csv", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_a_mistake_in_flags_ends_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_it_prints_what_is_wrong_the_scores_and_one_line_of_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text_model(tmp_path / "model", positions="absolute")
    rows = [("sea " * 50, "ant"), ("", "bee"), ("law", "zebra"), ("ship", "cat")]
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    commands.main(["predict", "model", "in.jsonl", "--report_lengths", "8", "16", "--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "wrote predictions.csv; rows: 4"
    assert printed[1] == "documents cut to 32 tokens (column truncated): 1"
    assert printed[2].startswith("rows without an answer (column error): 1, first row 2: the document is empty")
    assert printed[3].startswith("labels that can't be scored: 1; first: the label 'zebra' doesn't occur")
    assert [line.split()[0] for line in printed if line[:1].isdigit()] == ["2", "8", "16"]
    summary = json.loads(printed[-1])
    assert summary["rows"] == 4 and [row["tokens"] for row in summary["by_length"]] == [8, 16]
    with pytest.raises(SystemExit) as ended:
        commands.main(["predict", "model", "in.jsonl"])
    told = f"{ended.value}\n{capsys.readouterr().err}"
    assert "error: predictions.csv exists: --overwrite replaces it, --output names another." in told


@pytest.mark.parametrize("is_begun", [True, False])
@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_run_that_is_interrupted_prints_the_command_that_goes_on(flags, is_begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    progress = Path("predictions.csv.partial/progress.json")
    progress.parent.mkdir()
    progress.write_text("{}")
    os.utime(progress, (1, 1))  # of an earlier run

    def interrupt(*_):
        if is_begun:
            os.utime(progress, (2**31, 2**31))  # as clocks of file systems are coarse
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "predict_file", interrupt)
    with pytest.raises(SystemExit) as ended:
        command.main(["my model", "in.csv", *flags])
    assert ended.value.code == 130
    last = capsys.readouterr().out.splitlines()[-1]
    if is_begun or flags == ["--resume"]:
        assert last == "python scripts/predict.py 'my model' in.csv --resume"
    else:
        assert last == "Stopped. Nothing was saved yet: start it again."
