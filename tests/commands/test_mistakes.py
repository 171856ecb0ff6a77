"""Protects the end of commands: a mistake is one line with status 2, a stop says how to go on, a bug is a traceback."""

import ast
import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from repository import ROOT, SCRIPTS, load_script

import fa_transformers as fa
from fa_transformers import commands
from fa_transformers.commands import flags
from fa_transformers.commands.flags import CommandFailed, ends_with_resume, mistakes_in_one_line
from fa_transformers.conversion.json_file import SourceError
from fa_transformers.mistakes import in_arguments, in_flags, names_arguments, speaking_flags
from fa_transformers.options import DataOptions, LoopOptions
from fa_transformers.training.progress import TrainingDiverged

PACKAGE = ROOT / "fa_transformers"
OWN_FLAGS = {  # of commands, and of studies whose modules are not loaded here
    "task", "recipe", "full_recipe", "verbose", "write", "json", "private", "revision", "lengths", "help", "help_all",
    "explain",
}  # fmt: skip


FLAG = re.compile(r"(?<![\w-])--([a-z]\w+)\b(?!-)")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory of a user: a sound table, broken ones, a used folder, a broken checkpoint; no login."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "home/token"))
    rows = [("red one", "a"), ("blue two", "b")] * 6
    for name, header, more in (
        ("my", ("text", "label"), []),
        ("wrong", ("body", "label"), []),
        ("empty", ("text", "label"), [("", "a"), ("red", "b"), ("", "b")]),
    ):
        with open(f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *more, *rows])
    for name in ("used", "hollow", "broken"):
        Path(name).mkdir()
    Path("used/notes.txt").write_text("mine")
    Path("broken/config.json").write_text("{")
    return tmp_path


MY_EMPTY = ["finetune", "--train_file", "empty.csv"]
MISTAKES = [
    ("finetune --train_file nix.csv", r"nix\.csv: there is no such file"),
    ("finetune --train_file wrong.csv", r"no text column 'text'.*Name the right one with --text_column_name"),
    ("finetune --train_file used", r"--train_file used is a folder: name a file in it, or the folder with --dataset_"),
    ("finetune --image_folder nix", r"nix: there is no such folder"),
    ("finetune --image_folder hollow --task text-classification", r"--image_folder.*give --task image-classification"),
    ("finetune --task image-classification --train_file my.csv", r"--train_file is for text.*leave --task out"),
    ("finetune --train_file my.csv --max_steps 0", r"--max_steps must be at least 1.*--dry_run"),
    ("finetune --train_file my.csv --report_to nonsense", r"--report_to must be none or one of .*'nonsense'"),
    ("finetune --train_file my.csv --model_name_or_path broken", r"broken/config\.json is no JSON file"),
    ("finetune --train_file my.csv --model_name_or_path a/b/c", r"'a/b/c' is no folder here, and no name that a repos"),
    ("finetune --train_file my.csv --output_dir used", r"--output_dir used is not empty.*--overwrite_output_dir"),
    ("finetune --train_file my.csv --push_to_hub", r"--push_to_hub publishes .*--license apache-2\.0"),
    ("finetune --train_file my.csv --push_to_hub --license mit", r"not logged in to the Hub: log in .*--hub_token"),
    ("finetune --train_file my.csv --hub_model_id a/b/c", r"--hub_model_id must be owner/name"),
    ("distill --train_file my.csv --output_dir used --model_name_or_path broken", r"broken/config\.json is no JSON"),
    ("distill --max_length 3", r"--max_length must be at least 32 tokens, got 3"),
    ("convert broken out", r"broken/config\.json is no JSON file"),
    ("convert nix out", r"'nix' is no folder here, and the Hub gave no such repository"),
    ("check nix", r"nix is not a folder"),
    ("push used me/mine", r"you are not logged in to the Hub.*Nothing was sent"),
    ("push used me/mine/more", r"'me/mine/more' is no name of a repository.*Nothing was sent"),
    ("finetune_dense --coco_folder nix --task object-detection", r"nix: there is no such folder"),
    ("finetune_dense --flip 2", r"--flip must lie between 0 and 1"),
    ("finetune_stereo --train_folder nix", r"nix: there is no such folder"),
    ("finetune_stereo --push_to_hub", r"--push_to_hub publishes .*--license apache-2\.0"),
]


@pytest.mark.parametrize(("typed", "message"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_of_any_command_is_one_line_with_status_2(typed, message, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    AcceleratorState._reset_state(reset_partial_state=True)
    command = typed.split()
    if command[0] in ("finetune", "distill", "finetune_dense", "finetune_stereo"):
        command += [] if "--report_to" in command else ["--report_to", "none"]
        command += ["--use_cpu", "--num_threads", "1"] + ([] if "--output_dir" in command else ["--output_dir", "out"])
    with pytest.raises(CommandFailed) as ended:
        commands.main(command)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert line == lines[-1] and re.search(message, line), line
    assert "`" not in line.replace("`hf auth login`", "") and "Traceback" not in "".join(lines)
    assert not Path("out").exists()


def test_all_bad_rows_are_told_at_once(folder, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(CommandFailed):
        commands.main([*MY_EMPTY, "--use_cpu", "--output_dir", "out", "--report_to", "none"])
    told = capsys.readouterr().err
    assert "2 bad rows" in told and "row 1 (line 2)" in told and "row 3 (line 4)" in told


@pytest.mark.parametrize("study", ["encode_long", "needle", "measure_packing"])
def test_scripts_end_in_the_same_way(study, capsys):
    script = load_script(study)
    assert "with mistakes_in_one_line():\n" in Path(script.__file__).read_text()
    flag = {"encode_long": "--num_tokens", "needle": "--num_train", "measure_packing": "--batch_tokens"}[study]
    with pytest.raises(SystemExit) as ended:
        script.parse([flag, "-1"])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_every_program_ends_a_mistake_in_one_line():
    without_input = {"fingerprint", "estimate_sequence_parallel"}
    wraps_itself = {"convert_checkpoint", "push_to_hub"}
    for path in sorted({*SCRIPTS.glob("*.py"), *SCRIPTS.glob("studies/*.py")}):
        if path.stem not in without_input | wraps_itself:
            assert "with mistakes_in_one_line():" in path.read_text().partition("__main__")[2], path.name


def raised_by_a_caller(error: BaseException) -> None:
    """The error as the package itself raises it: its `raise` stands in a file of the package."""
    code = compile("raise error", str(PACKAGE / "checks.py"), "exec")
    exec(code, {"error": error})


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (fa.DataError("a.csv: no rows"), "a.csv: no rows"),
        (TrainingDiverged("the loss is nan"), "the loss is nan"),
        (fa.PushError("no login"), "no login"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. The disk is full: free some"),
        (RuntimeError("IoError(Os { code: 28, kind: StorageFull })"), "The disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: use less of it"),
        (ImportError("needs peft: pip install peft"), "needs peft: pip install peft"),
        (ValueError("--seed is wrong"), "--seed is wrong"),
    ],
)
def test_what_a_user_can_mend_is_a_mistake_wherever_it_is_raised(error, line, capsys):
    with pytest.raises(CommandFailed, match="^error: ") as ended, mistakes_in_one_line():
        raise error
    assert line in str(ended.value) and capsys.readouterr().err == f"{ended.value}\n"


def test_a_fault_of_the_program_keeps_its_traceback_and_a_told_value_does_not():
    for fault in (ValueError("shapes differ"), RuntimeError("a bug"), KeyError("x"), TypeError("of numpy")):
        with pytest.raises(type(fault)), mistakes_in_one_line():
            raise fault  # in this file, which is none of the package's
    with pytest.raises(ValueError, match="inhomogeneous"), mistakes_in_one_line():
        np.array([[1], [2, 3]])
    with pytest.raises(CommandFailed, match="documents are too few"), mistakes_in_one_line():
        raised_by_a_caller(ValueError("documents are too few"))
    with pytest.raises(RuntimeError), mistakes_in_one_line():
        raised_by_a_caller(RuntimeError("a bug"))


def test_torchrun_reports_the_line_as_the_cause(tmp_path, monkeypatch, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(CommandFailed), mistakes_in_one_line():
        raise fa.DataError("a.csv: no rows")
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "error: a.csv: no rows"


@pytest.fixture
def interruptible():
    """Let SIGINT interrupt, which a shell's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_stop_outside_of_the_loop_ends_with_the_resume_command(
    number, has_checkpoint, tmp_path, capsys, interruptible
):
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with ends_with_resume("type this", LoopOptions(output_dir=tmp_path)):
            if has_checkpoint:
                (tmp_path / "checkpoint-3").mkdir()
                os.utime(tmp_path / "checkpoint-3", (2**31, 2**31))  # as clocks of file systems are coarse
            signal.raise_signal(number)  # in this thread: another one would leave this one waiting
            time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 130 and signal.getsignal(signal.SIGTERM) == before
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("type this" if has_checkpoint else "Stopped. Nothing was saved yet: start it again.")


def test_checkpoints_of_an_earlier_run_are_not_offered(tmp_path, capsys):
    (tmp_path / "checkpoint-3").mkdir()
    os.utime(tmp_path / "checkpoint-3", (1, 1))
    with pytest.raises(SystemExit), ends_with_resume("type this", LoopOptions(output_dir=tmp_path)):
        raise KeyboardInterrupt
    assert "type this" not in capsys.readouterr().out


def test_flags_become_arguments_with_their_values():
    others = {"task": Literal["images"]}
    for flag, argument in {
        "--seed must not be negative, got -1.": "`seed` must not be negative, got -1.",
        "--max_length 8192 is above 512": "`max_length=8192` is above 512",
        "or --resume_from_checkpoint last.": "or `resume_from_checkpoint='last'`.",
        "leave them out with --drop_bad_rows": "leave them out with `drop_bad_rows=True`",
        "Did you mean --text_column_name 'body text'?": "Did you mean `text_column_name='body text'`?",
        "--output_dir a/b is used": "`output_dir` a/b is used",
        "give --task images, or --task": "give `task='images'`, or `task`",
        "`fa-transformers check x --write`": "`fa-transformers check x --write`",
    }.items():
        assert in_arguments(flag, others) == argument
    assert in_arguments("give --hub_token", renamed={"hub_token": "token"}) == "give `token`"
    typed = {"max_length": "--max_length", "overwrite": "--overwrite_output_dir", "folder": "OUTPUT_DIR"}
    assert in_flags("`folder` x, `overwrite=True`, `max_length=9`, `model`", typed) == (
        "OUTPUT_DIR x, --overwrite_output_dir, --max_length 9, `model`"
    )


def test_a_caller_from_python_reads_arguments_and_a_command_line_flags():
    @names_arguments(hub_token="token")
    def refuse() -> None:
        raise ValueError("--seed and --hub_token")

    with pytest.raises(ValueError, match="^`seed` and `token`$"):
        refuse()
    with pytest.raises(ValueError, match="^--seed and --hub_token$"), speaking_flags():
        refuse()
    with pytest.raises(ValueError, match="`label_names`|`train_file` and `image_folder` are two sources"):
        fa.finetune(data=DataOptions(train_file="a.csv", image_folder="b"))


def test_every_flag_that_a_message_names_is_one():
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    fields_of_options = re.compile(r"^    (\w+): .* = option\(", re.MULTILINE)
    known = OWN_FLAGS.union(*(fields_of_options.findall(text) for text in texts.values()))
    assert {"max_length", "coco_folder", "hub_token"} <= known
    for path, text in texts.items():
        raised = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise)] if "--" in text else []
        for node in raised:
            said = " ".join(c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and type(c.value) is str)
            assert set(FLAG.findall(said)) <= known, (path.name, said)


def test_every_message_of_the_checks_names_an_option_in_both_ways():
    tree = ast.parse((PACKAGE / "checks.py").read_text(encoding="utf-8"))
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    assert len(raised) > 25
    for node in raised:
        parts = ast.walk(node.exc.args[0])
        text = "".join("seed" if isinstance(c, ast.FormattedValue) else getattr(c, "value", "")
                       for c in parts if isinstance(c, ast.FormattedValue | ast.Constant)
                       and (isinstance(c, ast.FormattedValue) or type(c.value) is str))  # fmt: skip
        assert re.search(r"--[a-z]", text), text
        translated = in_arguments(text, {"task": str})
        assert "`" in translated and not FLAG.search(translated), translated


def test_a_program_that_no_launcher_started_is_named_as_it_was_typed(monkeypatch):
    for name in flags.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["scripts/finetune.py"])
    assert flags.how_started("finetune", "scripts/finetune.py") == "python scripts/finetune.py"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert flags.how_started("finetune", "scripts/finetune.py") == "accelerate launch scripts/finetune.py"
    monkeypatch.setattr(sys, "argv", ["fa-transformers"])
    assert flags.how_started("finetune", "scripts/finetune.py") == "fa-transformers finetune"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "status"),
    [
        ([], 2),
        (["-m", "accelerate.commands.launch", "--quiet", "--cpu"], 1),
        (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"], 1),
    ],
    ids=["python", "accelerate", "torchrun"],
)
def test_the_line_is_the_last_that_is_read_under_a_launcher(launcher, status, tmp_path):
    flags_typed = ["--train_file", str(tmp_path / "nix.csv"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    command = [sys.executable, *launcher, str(SCRIPTS / "finetune.py"), *flags_typed, "--report_to", "none"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == status
    told = [line for line in ran.stderr.splitlines() if not set(line) <= {"="}]
    assert re.search(r"error: .*nix\.csv: there is no such file$", told[-1]), ran.stderr[-2000:]


def test_the_result_of_a_command_is_json_for_scripts_that_read_it(capsys):
    flags.print_json({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_a_field_of_a_file_is_told_as_it_stands_there_and_an_argument_as_a_flag(monkeypatch, capsys):
    monkeypatch.setattr("fa_transformers.commands.flags._flags_of_command", {"local_window": "--local_window"})
    for error, told in (
        (SourceError("config.json: `local_window` must be at least 0"), "config.json: `local_window` must"),
        (fa.DataError("`local_window` must be at least 0"), "--local_window must"),
    ):
        with pytest.raises(CommandFailed), mistakes_in_one_line():
            raise error
        assert told in capsys.readouterr().err
