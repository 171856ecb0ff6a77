"""Protects what leaves this machine: no token of the Hub, found by its value, and no path of its disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from repository import SCRIPTS
from tiny_models import make_tokenizer
from transformers import BertConfig, BertForSequenceClassification

import fa_transformers as fa
from fa_transformers import redaction
from fa_transformers.commands.finetune import main
from fa_transformers.files import write_json
from fa_transformers.redaction import HIDDEN, environment_without_secrets, keep_secret, redact, without_local_paths

TOKEN = "hf_planted0secret0value"
WORDS = ["red", "blue", "one", "two"]


@pytest.fixture(autouse=True)
def forgotten(tmp_path, monkeypatch):
    """Each test has tokens, working directory and accelerator of its own."""
    monkeypatch.setattr(redaction, "_given", set())
    for name in redaction.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login" / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "login" / "stored_tokens"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def give(source: str, monkeypatch) -> None:
    """Let the token come from `source`."""
    if source == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    elif source == "given":
        keep_secret(TOKEN)
    else:
        path = Path(constants.HF_TOKEN_PATH if source == "login" else constants.HF_STORED_TOKENS_PATH)
        path.parent.mkdir()
        path.write_text(f"{TOKEN}\n" if source == "login" else f"[mine]\nhf_token = {TOKEN}\n")


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A stock checkpoint and a table, by absolute path."""
    tokenizer = make_tokenizer(WORDS, max_length=16)
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    rows = "".join(f"{colour} {number},{colour}\n" for colour in WORDS[:2] for number in WORDS[2:] for _ in range(5))
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    return {"model_name_or_path": str(tmp_path / "bert"), "train_file": str(tmp_path / "train.csv")}


def files_with(text: str, folder: Path) -> list[str]:
    """Files below a folder that hold a text, in any place."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("source", ["given", "environment", "login", "stored logins"])
def test_a_token_of_any_source_is_hidden_at_any_depth(source, monkeypatch):
    assert redact(f"a {TOKEN} b") == f"a {TOKEN} b"
    give(source, monkeypatch)
    assert redact({"k": [f"a {TOKEN} b", 3, (None, TOKEN)], TOKEN: True}) == {
        "k": [f"a {HIDDEN} b", 3, (None, HIDDEN)],
        HIDDEN: True,
    }


def test_what_looks_like_a_token_is_hidden_and_words_are_not():
    assert redact("x=hf_" + "aB3" * 12) == f"x={HIDDEN}"
    keep_secret("short")
    keep_secret(None)
    keep_secret("")
    assert redact("a short text of hf_hub and hf_transfer") == "a short text of hf_hub and hf_transfer"


def test_files_are_written_without_tokens_and_options_shown_without(tmp_path):
    card = fa.CardOptions(hub_token=TOKEN)
    write_json(tmp_path / "x.json", {"name": TOKEN})
    assert json.loads((tmp_path / "x.json").read_text()) == {"name": HIDDEN}
    assert TOKEN not in repr(card)


FLAGS = ["--max_steps", "1", "--use_cpu", "--num_threads", "1", "--max_length", "8", "--output_dir", "out"]


@pytest.mark.parametrize("form", [["--hub_token", TOKEN], [f"--hub_token={TOKEN}"], []])
def test_a_run_of_the_command_leaves_no_token_anywhere(form, files, tmp_path, monkeypatch, capfd):
    pytest.importorskip("tensorboard")
    if not form:
        give("environment", monkeypatch)
    given = [word for name, value in files.items() for word in (f"--{name}", value)]
    argv = [*given, *FLAGS, *form, "--data_name", f"mine {TOKEN}", "--data_attribution", TOKEN]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *argv])
    main([*argv, "--report_to", "tensorboard"])
    assert files_with("mine", tmp_path / "out"), "what is searched for tokens is there"
    assert files_with(TOKEN, tmp_path) == []
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err and HIDDEN in printed.out
    assert TOKEN not in " ".join(sys.argv), "some trackers record it"


def test_a_call_leaves_no_token_and_its_published_files_no_local_path(files, tmp_path, capfd):
    result = fa.finetune(
        data=fa.DataOptions(train_file=files["train_file"]),
        model=fa.ModelOptions(model_name_or_path=files["model_name_or_path"], max_length=8),
        loop=fa.LoopOptions(max_steps=1, use_cpu=True, num_threads=1, report_to="none", output_dir=tmp_path / "out"),
        card=fa.CardOptions(hub_token=TOKEN, data_name=f"mine {TOKEN}"),
    )
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err + str(result.summary)
    assert files_with(TOKEN, tmp_path / "out") == []
    uploaded = [
        *json.loads((tmp_path / "out" / "self_test.json").read_text())["files"],
        "README.md",
        "model_facts.json",
    ]
    assert not set(files_with(str(tmp_path), tmp_path / "out")) & {str(tmp_path / "out" / name) for name in uploaded}
    assert "train_file='train.csv'" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("argv", [["--hub_tok", TOKEN], [f"--hub_tok={TOKEN}"], ["--hub_token", TOKEN, TOKEN]])
def test_a_mistyped_flag_is_refused_without_its_value(argv):
    command = [sys.executable, str(SCRIPTS / "finetune.py"), *argv]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and TOKEN not in ended.stdout + ended.stderr


def test_local_paths_become_relative_or_names_and_other_text_stays(tmp_path):
    shown = without_local_paths(
        f"finetune --train_file {tmp_path}/data/a.csv --output_dir=/srv/out '--probe_file=/home/me/my data/b c.csv' "
        "--image_folder ~/pictures x(PosixPath('/home/me/d e.csv'), 'https://hf.co/a/b') owner/name ./c ../d 1/2 a / b"
    )
    assert shown == (
        "finetune --train_file data/a.csv --output_dir=out '--probe_file=b c.csv' "
        "--image_folder pictures x(PosixPath('d e.csv'), 'https://hf.co/a/b') owner/name ./c ../d 1/2 a / b"
    )


def test_paths_of_windows_become_names():
    shown = without_local_paths(
        r"finetune --train_file 'C:\Users\me\my data\a.csv' --output_dir=D:/runs/out '--probe_file=E:\b c\d.csv' "
        r"--image_folder \\server\me\photos DataOptions(train_file='C:\\me\\a.csv') https://hf.co/a/b 'x' '\\|' a:b"
    )
    assert shown == (
        "finetune --train_file 'a.csv' --output_dir=out '--probe_file=d.csv' --image_folder photos "
        r"DataOptions(train_file='a.csv') https://hf.co/a/b 'x' '\\|' a:b"
    )


def test_another_process_is_given_no_secret(monkeypatch):
    give("given", monkeypatch)
    kept = {"PATH": "/bin", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": "/x"}
    secret = {"HF_TOKEN": "a", "WANDB_API_KEY": "b", "AWS_SECRET_ACCESS_KEY": "c", "OTHER": f"--x={TOKEN}"}
    assert environment_without_secrets(kept | secret) == kept
