"""Protects that a token is written nowhere: whole runs of every command, with each source of a token, and an upload."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from repository import ROOT
from tiny_models import make_tokenizer
from transformers import BertConfig, BertModel

WORDS = ["red", "blue", "one", "two"]


@pytest.fixture
def checkpoint(tmp_path) -> str:
    tokenizer = make_tokenizer(WORDS, max_length=16)
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    rows = [f"{colour} {number},{colour}\n" for colour in WORDS[:2] for number in WORDS[2:] for _ in range(5)]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(rows))
    texts = [" ".join(WORDS[(i * j) % 4] for j in range(1, 80)) for i in range(1, 121)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return "bert"


def commands(checkpoint: str, flag: list[str]) -> dict[str, list[str]]:
    """A short run of each command; `flag` gives the token to those that take one, and the others don't know it then."""
    common = ["--max_length", "32", "--use_cpu", "--num_threads", "1", "--report_to", "tensorboard"]
    common += ["--model_name_or_path", checkpoint]
    named = ["--data_name", f"mine {TOKEN}"]
    finetune = ["--train_file", "train.csv", "--max_steps", "1", "--output_dir", "out/finetune", "--push_to_hub"]
    finetune += ["--license", "mit"]
    distill = ["--train_file", "texts.jsonl", "--teacher_name_or_path", checkpoint, "--output_dir", "out/distill"]
    distill += ["--transfer_steps", "1", "--end_to_end_steps", "1", "--long_steps", "0"]
    return {
        "finetune": [*common, *named, *finetune, *flag],
        "distill": [*common, *distill, *([] if flag else named)],
        "convert": [checkpoint, "out/convert", "--base_model", "a/b", "--license", "mit"],
        "check": ["out/convert"],
        "push": ["out/convert", "tester/convert", *flag],
    }


def holders(folder: Path, hub: HubServer) -> list[str]:
    """Names of files in a folder, and of what the Hub received, that hold the token."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    for name, repository in hub.repositories.items():
        for commit in repository.commits.values():
            texts = {"title": commit.title.encode()} | commit.files
            found += [f"{name}: {path}" for path, content in texts.items() if TOKEN.encode() in content]
    return found + [oid for oid, content in hub.lfs_objects.items() if TOKEN.encode() in content]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["flag", "environment", "login"])
def test_no_command_writes_prints_tracks_or_uploads_a_token(source, checkpoint, tmp_path):
    pytest.importorskip("tensorboard")
    flag = ["--hub_token", TOKEN] if source == "flag" else []
    (tmp_path / "home").mkdir()
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        del environment["HF_TOKEN"]
        environment |= {"OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": TOKEN} if source == "environment" else {})
        if source == "login":
            (tmp_path / "home" / "token").write_text(TOKEN)
        for name, words in commands(checkpoint, flag).items():
            command = [sys.executable, "-m", f"fa_transformers.commands.{name}", *words]
            ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, f"{name}: {ended.stderr[-2000:]}"
            assert TOKEN not in ended.stdout + ended.stderr, name
            if source == "login":  # where it belongs
                (tmp_path / "home" / "token").write_text("")
            assert holders(tmp_path, hub) == [], name
            if source == "login":
                (tmp_path / "home" / "token").write_text(TOKEN)
        assert {"tester/finetune", "tester/convert"} == set(hub.repositories)
        assert all("README.md" in one.branches["main"].files for one in hub.repositories.values())
    events = [path for path in (tmp_path / "out").rglob("*") if "tfevents" in path.name]
    assert {path.relative_to(tmp_path / "out").parts[0] for path in events} == {"finetune", "distill"}
