"""Protects the command that explains: flags, the files that it writes, and mistakes in one line each."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_predictors import write_image_model, write_text_model

from fa_transformers import commands
from fa_transformers.commands import explain as command
from fa_transformers.explain.attribution import Method
from fa_transformers.options import PredictOptions

TEXT = "sea ship. law court red! blue sea\n\nlaw law. ship " * 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_text_model(folder / "text")
    write_image_model(folder / "image")
    return folder


def test_flags_become_options():
    flags = "model a.pdf --output_dir out --passage 200 --label ant bee --method rollout rows --json --max_length 9"
    parsed = command.parse(flags.split())
    assert (parsed.model, parsed.path, parsed.output_dir) == ("model", Path("a.pdf"), Path("out"))
    assert (parsed.passage, parsed.labels, parsed.methods) == (200, ["ant", "bee"], ["rollout", "rows"])
    assert parsed.has_json and not parsed.overwrite and parsed.options == PredictOptions(max_length=9)
    plain = command.parse(["model", "a.txt", "--output_dir", "out", "--passage", "sentence"])
    assert (plain.passage, plain.labels, plain.methods) == ("sentence", None, None)
    assert set(command.METHODS) == set(Method.__args__)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "out", "--passage", "0"], "'0' is neither sentence nor a number of tokens or patches"),
        (["--output_dir", "out", "--method", "lime"], "argument --method: invalid choice: 'lime'"),
        (["--output_dir", "out", "--max_length", "0"], "--max_length must be above 0, got 0"),
        ([], "the following arguments are required: --output_dir"),
    ],
)
def test_a_mistake_in_flags_ends_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse(["model", "a.txt", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_it_writes_a_page_a_picture_and_numbers_and_prints_where_they_are(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save("b.png")
    flags = ["--output_dir", "out", "--device", "cpu"]
    commands.main(["explain", str(models / "text"), "a.txt", *flags, "--passage", "5", "--json"])
    printed = capsys.readouterr().out.splitlines()
    assert "open out/a.txt.html in a browser" in printed[-2]
    summary = json.loads(printed[-1])
    assert summary["files"] == ["out/a.txt.html", "out/a.txt.png", "out/a.txt.json"] and summary["tokens"] == 39 + 2
    numbers = json.loads(Path("out/a.txt.json").read_text())
    assert numbers["passage_size"] == 5 and len(numbers["passages"]) == 8
    commands.main(["explain", str(models / "image"), "b.png", *flags, "--passage", "2"])
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "a.txt.html", "a.txt.json", "a.txt.png", "b.png.html", "b.png.png",
    ]  # fmt: skip
    Path("out/c.txt.json").write_text("mine")
    Path("c.txt").write_text(TEXT)
    commands.main(["explain", str(models / "text"), "c.txt", *flags, "--passage", "5"])
    assert Path("out/c.txt.json").read_text() == "mine", "nobody asked to replace anything"
    capsys.readouterr()
    commands.main(["explain", str(models / "text"), "a.txt", *flags, "--overwrite", "--max_length", "9"])
    printed = capsys.readouterr().out.splitlines()
    assert "the beginning alone, 9 tokens" in printed[-2] and json.loads(printed[-1])["truncated"]
    assert not Path("out/a.txt.json").exists(), "its numbers are of the page before"


def test_an_output_folder_that_is_a_file_is_told_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        commands.main(["explain", "no-model", "a.txt", "--output_dir", "out"])
    assert ended.value.code == 2 and "--output_dir out is a file: name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name", "flags", "message"),
    [
        ("text", "a.txt", ["--label", "dog"], "--label: the model knows no 'dog', its labels are 'ant', 'bee', 'cat'"),
        ("text", "b.png", [], "b.png: the model reads texts, and this is an image"),
        ("image", "a.txt", [], "a.txt: the model reads images, and this is no image that Pillow reads"),
        ("image", "b.png", ["--passage", "sentence"], "--passage sentence is for texts"),
        ("text", "none.txt", [], "none.txt: there is no such file"),
        ("text", ".", [], "is a folder: name a file in it"),
        ("text", "rows.csv", [], "predict MODEL rows.csv --explain FOLDER explains its rows"),
        ("text", "a.docx", [], "a.docx: the ending '.docx' is not one of .txt, .text, .pdf"),
        ("text", "empty.txt", [], "empty.txt: the document is empty"),
        ("text", "there.txt", [], "there.txt.png exists: --overwrite replaces it"),
    ],
)
def test_a_mistake_in_files_ends_in_one_line(model, name, flags, message, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in ("a.txt", "rows.csv", "a.docx", "there.txt"):
        Path(file).write_text(TEXT)
    Path("empty.txt").write_text(" \n")
    Path("out").mkdir()
    Path("out/there.txt.png").write_text("")
    Image.new("RGB", (8, 8)).save("b.png")
    with pytest.raises(SystemExit) as ended:
        commands.main(["explain", str(models / model), name, "--output_dir", "out", "--device", "cpu", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in Path("out").iterdir()] == ["there.txt.png"]
