"""Protects command lines made from dataclasses: types, groups, mistakes that name what was meant, an answer at once."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pytest
import transformers
from accelerate.state import AcceleratorState
from repository import ROOT, SCRIPTS

from fa_transformers import commands
from fa_transformers.commands import COMMANDS
from fa_transformers.commands.flags import FlagParser, describe_command, mistakes_in_one_line, script_parser
from fa_transformers.conversion.json_file import SourceError
from fa_transformers.options import UNSET, LoopOptions, OptionGroup, Scheduler, option, resolve
from fa_transformers.training.checkpointing import CheckpointError

PARTS = {
    "prediction/*": {"predict"}, "training/recovery": {"finetune"}, "training/finetune": {"finetune"},
    "training/dense*": {"finetune_dense"}, "training/stereo*": {"finetune_stereo"}, "distillation/*": {"distill"},
    "conversion/*": {"convert", "finetune", "distill"}, "hub/p*": {"push", "finetune", "distill", "check"},
    "training/progress": {"finetune"}, "data/readers/labels": {"finetune"}, "hub/folder_lock": {"predict"},
    "app/server": {"app"},
}  # fmt: skip
"""Modules of the package, and the commands that print their messages."""
TOO_NEW = {"greedy"}  # schedulers of the newest transformers, which the oldest supported one lacks


@dataclass(frozen=True)
class Sample(OptionGroup):
    name: str = option("x", "a name of 100 % of all", group="first", common=True)
    count: int | None = option(None, "a count", group="first")
    rate: float = option(UNSET, "a rate", group="first", common=True)
    path: Path | None = option(None, "a path", group="first")
    layers: tuple[int, ...] | None = option(None, "layers", group="first")
    is_plain: bool = option(False, "a switch", group="first")
    is_chosen: bool = option(UNSET, "on or off", group="first")
    kind: Literal["a", "b"] | None = option(None, "a kind", group="first")
    hidden: int = option(7, "of another group", group="second")


@dataclass(frozen=True)
class Several(OptionGroup):
    layers: tuple[int, ...] = option(UNSET, "layers", group="only", common=True)
    words: tuple[str, ...] = option(UNSET, "words", group="only", common=True)


def make_parser() -> FlagParser:
    parser = FlagParser("program", "A sample.", "program --name y", lambda given: {"rate": 0.5, "is_chosen": True})
    parser.add_options(Sample, ("first",), "sample")
    return parser


def test_values_have_the_types_of_the_fields():
    flags = "--name y --count 3 --rate 1e-3 --path a/b --layers 0 2 --is_plain --no-is_chosen --kind b"
    sample = make_parser().parse(flags.split())[Sample]
    assert sample == Sample("y", 3, 1e-3, Path("a/b"), (0, 2), True, False, "b")
    assert isinstance(sample.path, Path) and isinstance(sample.layers, tuple)
    assert make_parser().parse(["--layers"])[Sample].layers == ()


def test_what_is_not_typed_is_left_to_the_recipe():
    sample = make_parser().parse([])[Sample]
    assert sample == Sample() and sample.rate is UNSET
    assert resolve(sample, {"rate": 0.5, "is_chosen": True, "count": 9}) == Sample(rate=0.5, is_chosen=True)
    assert resolve(make_parser().parse(["--rate", "2"])[Sample], {"rate": 0.5}).rate == 2


def test_a_file_of_flags_stands_among_them_and_later_ones_replace_its_own(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("# what I found best\n\n--count 3 --layers 0 2  # few\n--name 'two words'\n")
    parsed = make_parser().parse([f"@{tmp_path / 'mine.txt'}", "--count", "4"])
    assert parsed[Sample] == Sample("two words", 4, layers=(0, 2))
    assert parsed.flags == ["--count", "3", "--layers", "0", "2", "--name", "two words", "--count", "4"]
    assert make_parser().parse(["--name", "@"])[Sample].name == "@", "a value, as there is no such file"
    with pytest.raises(SystemExit) as ended:
        make_parser().parse(["@nowhere.txt"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("program: error:") and "nowhere.txt" in last
    (tmp_path / "open.txt").write_text("--name 'two")
    with pytest.raises(SystemExit):
        make_parser().parse([f"@{tmp_path / 'open.txt'}"])
    assert "open.txt, a file of flags: No closing quotation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nam", "y"], "unknown flag --nam: did you mean --name?"),
        (["--is-plain"], "unknown flag --is-plain: did you mean --is_plain?"),
        (["--hidden", "1"], "unknown flag --hidden: --help-all lists the flags of this command"),
        (["--lr", "1"], "unknown flag --lr: --help-all lists"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["--count", "many"], "argument --count: invalid int value: 'many'"),
        (["loose"], "'loose' is not the value of a flag"),
    ],
)
def test_a_mistake_ends_in_one_line_that_says_what_to_type(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser().parse(flags)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"program: error: {message}")


def test_names_from_other_trainers_are_told_apart(capsys):
    parser = FlagParser("program", "Train.", "program")
    parser.add_options(LoopOptions, ("optimizer", "epochs", "batches"), "training")
    for typed, meant in (("lr", "learning_rate"), ("epochs", "num_train_epochs")):
        with pytest.raises(SystemExit):
            parser.parse([f"--{typed}", "1"])
        assert f"unknown flag --{typed}: did you mean --{meant}?" in capsys.readouterr().err


def test_help_has_the_common_flags_and_their_defaults_and_help_all_every_one(capsys):
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            make_parser().parse([flag, "--mistyped"])
        assert ended.value.code == 0
        texts[flag] = " ".join(capsys.readouterr().out.split())
    assert "a name of 100 % of all (default: x)" in texts["--help"] and "a rate (default: 0.5)" in texts["--help"]
    assert "--count" not in texts["--help"] and "--help-all shows 6 more flags." in texts["--help"]
    assert "--count" in texts["--help-all"] and "--hidden" not in texts["--help-all"]


def test_a_command_opts_in_to_single_fields_by_their_names(capsys):
    parser = FlagParser("program", "A sample.", "program")
    parser.add_options(Sample, ("second", "count"), "sample")
    assert parser.parse(["--count", "3", "--hidden", "4"])[Sample] == Sample(count=3, hidden=4)
    with pytest.raises(SystemExit):
        parser.parse(["--name", "y"])
    assert "unknown flag --name" in capsys.readouterr().err


def test_several_values_are_shown_as_they_are_typed(capsys):
    parser = FlagParser("program", "A sample.", "program", lambda given: {"layers": (0, 2), "words": ()})
    parser.add_options(Several, ("only",), "sample")
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--layers [N ...] layers (default: 0 2)" in text
    assert "--words [NAME ...] words example:" in text and "more flags" not in text
    assert parser.parse(["--words", "a b", "c"])[Several].words == ("a b", "c")


def test_a_script_is_described_by_its_docstring(capsys):
    documentation = (
        "Measure it.\n\npython scripts/a.py --b    # both\naccelerate launch c.py\n\nIt runs python twice.\n"
    )
    with pytest.raises(SystemExit):
        script_parser("python scripts/a.py", documentation).parse(["--help"])
    text = capsys.readouterr().out
    assert "\nMeasure it.\n" in text and "It runs" not in text
    assert "example:\n  python scripts/a.py --b    # both\n  accelerate launch c.py\n" in text


def test_a_misspelt_group_is_an_error():
    with pytest.raises(ValueError, match=r"Sample has no field of the groups \['frist'\]"):
        make_parser().add_options(Sample, ("first", "frist"), "sample")


def test_a_token_is_left_out_of_a_described_command():
    flags = ["--hub_token", "hf_secret", "--name", "two words", "--hub_token=hf_secret"]
    assert describe_command("python x.py", flags) == "python x.py --name 'two words'"


def test_schedulers_are_those_of_transformers():
    known = {kind.value for kind in transformers.SchedulerType}
    assert set(get_args(Scheduler)) == known - TOO_NEW


# Of one command each: `fa-transformers` is `commands.main`, which tests/test_package.py runs as it is installed.
STARTS = {
    "script": [sys.executable, str(SCRIPTS / "finetune.py")],
    "module": [sys.executable, "-m", "fa_transformers.commands.finetune"],
    "convert": [sys.executable, str(SCRIPTS / "convert_checkpoint.py")],
    "push": [sys.executable, str(SCRIPTS / "push_to_hub.py")],
    "predict": [sys.executable, str(SCRIPTS / "predict.py")],
    "distill": [sys.executable, str(SCRIPTS / "distill.py")],
    "app": [sys.executable, str(SCRIPTS / "app.py")],
}


@pytest.mark.parametrize("flag", ["--help", "--output_dri"])
@pytest.mark.parametrize("start", STARTS)
def test_help_and_a_mistyped_flag_answer_before_torch_is_loaded(start, flag):
    # -X importtime lists every module that is loaded; only names are read here.
    command = [STARTS[start][0], "-X", "importtime", *STARTS[start][1:], flag]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    loaded = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert ran.returncode == (0 if flag == "--help" else 2), ran.stderr[-500:]
    assert "fa_transformers.commands.flags" in loaded
    assert not {"torch", "transformers", "numpy"} & loaded


def test_the_console_command_names_its_commands_and_what_was_meant(capsys):
    commands.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in ("finetune", "distill", "convert", "push"))
    with pytest.raises(SystemExit, match="unknown command 'finetun': did you mean finetune?"):
        commands.main(["finetun"])
    with pytest.raises(SystemExit) as ended:
        commands.main(["finetune", "--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_a_file_that_is_not_there_ends_the_command_in_one_line(command, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the settings of an earlier call
    flags = ["--train_file", str(tmp_path / "nix.csv"), "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    with pytest.raises(SystemExit, match=r"^error: .*nix\.csv: there is no such file$"):
        commands.main([command, *flags, "--use_cpu"])


def test_only_mistakes_lose_their_traceback():
    with pytest.raises(SystemExit, match="^error: --seed is wrong"), mistakes_in_one_line():
        raise ValueError("--seed is wrong")
    for mistake in (SourceError("bad/config.json: field 'id2label'"), CheckpointError("made with other data")):
        with pytest.raises(SystemExit, match=f"^error: {mistake}$"), mistakes_in_one_line():
            raise mistake
    for fault in (ValueError("shapes differ"), RuntimeError("a bug"), KeyError("x")):
        with pytest.raises(type(fault)), mistakes_in_one_line():
            raise fault


def test_no_error_shows_a_token(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("HF_TOKEN", "a-token-of-a-company")
    with pytest.raises(SystemExit) as end, mistakes_in_one_line():
        raise FileNotFoundError("owner/a-token-of-a-company is no folder")
    assert str(end.value) == "error: owner/hidden-token is no folder"
    try:
        with mistakes_in_one_line():
            raise KeyError("a-token-of-a-company")
    except KeyError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1] == "KeyError: 'hidden-token'" and "a-token-of" not in shown


def flags_of(command: str, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        importlib.import_module(f"fa_transformers.commands.{command}").parse(["--help-all"])
    return set(re.findall(r"^ +(?:-h, )?--(\w+)", capsys.readouterr().out, re.MULTILINE))


def texts_of(path: Path) -> Iterator[str]:
    """Return a module's strings without docstrings, arguments of programs, and commands that are named as a whole."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in alone:
            continue
        if not re.fullmatch(r"--[\w-]+", node.value):
            yield re.sub(r"(pip install|fa-transformers \w+)[^)`;,]*", "", node.value)


def test_messages_name_flags_that_their_command_has(capsys):
    """Flags of another command are named with it."""
    known = {command: flags_of(command, capsys) for command in COMMANDS}
    assert all(known.values())
    of_python = {"sequence_parallel_size"}  # an option that the loop's dataclass has for all kinds of networks
    for pattern, commands_of_part in PARTS.items():
        allowed = set.union(*(known[command] for command in commands_of_part)) | of_python
        paths = list((ROOT / "fa_transformers").glob(f"{pattern}.py"))
        assert paths, pattern
        for path in paths:
            named = {flag for text in texts_of(path) for flag in re.findall(r"(?<![\w-])--([a-z]\w+)", text)}
            assert named <= allowed, f"{path.name} names {named - allowed}"
