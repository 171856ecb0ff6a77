"""Command lines made from the dataclasses of `options`: one field, one flag.

A command opts in to groups of fields; flags of the other groups are unknown to it. Nothing here imports torch, so that
--help and a mistyped flag answer at once.
"""

import argparse
import difflib
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from ..options import UNSET
from ..redaction import keep_secret, redact

Recipe = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# What people type who come from other trainers, for "did you mean".
SYNONYMS = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path", "teacher": "teacher_name_or_path", "max_seq_length": "max_length",
    "output": "output_dir", "data": "train_file", "dataset": "dataset_name", "fp16": "mixed_precision",
    "bf16": "mixed_precision", "cpu": "use_cpu", "no_cuda": "use_cpu",
}  # fmt: skip
METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}


class FlagParser:
    """A parser of a command's flags into options objects.

    Args:
        program: how the command is typed, such as "accelerate launch scripts/finetune.py"; shown in help and errors.
        description: one sentence on what the command does.
        example: one command line that most people would begin with.
        recipe: gives the values of unset options by name, from the options that were given; --help shows them as
            defaults, as they are for the flags before --help.
    """

    def __init__(self, program: str, description: str, example: str, recipe: Recipe | None = None):
        self._parser = _Parser(prog=program, description=description, example=example)
        self._recipe = recipe or (lambda given: {})
        self._groups: list[tuple[type, list[str]]] = []

    def add_options(self, options_class: type, groups: Sequence[str], title: str) -> None:
        """Make flags of the fields of `options_class` that belong to one of `groups`, or whose own name is among them.

        Raises:
            ValueError: a group has no field, which a misspelt name would hide.
        """
        chosen = [part for part in fields(options_class) if {part.metadata["group"], part.name} & set(groups)]
        known = {name for part in chosen for name in (part.metadata["group"], part.name)}
        if missing := set(groups) - known:
            raise ValueError(f"{options_class.__name__} has no field of the groups {sorted(missing)}")
        section = self._parser.add_argument_group(title)
        for part in chosen:
            self._parser.add_field(section, part)
        self._groups.append((options_class, [part.name for part in chosen]))

    def add_argument(self, name: str, *, common: bool = True, **options: Any) -> None:
        """Add a flag or a positional argument that is a field of no options class, as argparse has it."""
        if name.startswith("-"):
            options.setdefault("default", argparse.SUPPRESS)
        self._parser.note(self._parser.add_argument(name, **options), common)

    def parse(self, argv: Sequence[str] | None = None) -> "Parsed":
        """Parse a command line; --help, --help-all and mistakes end the process as argparse does."""
        flags = list(sys.argv[1:] if argv is None else argv)
        wanted = [flag for flag in flags if flag in ("-h", "--help", "--help-all")]
        if wanted:
            given = self._parser.given_before_help([flag for flag in flags if flag not in wanted])
            self._parser.print_flags(self._recipe(given), every="--help-all" in wanted)
            raise SystemExit(0)
        given = self._parser.parse_exactly(flags)
        sys.argv[:] = redact(sys.argv)  # which some trackers record
        options = {
            options_class: options_class(**{name: given[name] for name in names if name in given})
            for options_class, names in self._groups
        }
        return Parsed(options, given, flags, self._parser.error)


class Parsed:
    """A parsed command line: `parsed[LoopOptions]` is an options object, `parsed.given` all that was typed, by name."""

    def __init__(self, options: dict[type, Any], given: dict[str, Any], flags: list[str], error: Callable[[str], Any]):
        self.given, self.flags, self._options, self._error = given, flags, options, error

    def __getitem__(self, options_class: type) -> Any:
        return self._options[options_class]

    def fail(self, message: str) -> NoReturn:
        """End the process as a wrong flag does: usage and message to standard error, exit status 2."""
        self._error(message)
        raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str, example: str):
        super().__init__(
            prog=prog,
            usage=f"{prog} [flags]" if "[" not in prog else prog,
            description=description,
            epilog=f"example:\n  {example}",
            allow_abbrev=False,
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            fromfile_prefix_chars="@",
        )
        self._common: dict[str, bool] = {}
        self._field_defaults: dict[str, Any] = {}
        help_flags = self.add_argument_group("help")
        help_flags.add_argument("-h", "--help", action="store_true", help="show the flags that most people need")
        help_flags.add_argument("--help-all", action="store_true", help="show every flag")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Return the words of a line of a file of flags, which stands as @FILE among them; # begins a comment."""
        return shlex.split(arg_line, comments=True)

    def add_field(self, section: Any, part: Field) -> None:
        """Add the flag of a dataclass field, its type and choices taken from the annotation."""
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": part.metadata["help"].replace("%", "%%")}
        kinds = [kind for kind in _alternatives(part.type) if kind is not type(None)]
        kind = kinds[0]
        if kind is bool:
            is_plain = part.default is False
            options["action"] = "store_true" if is_plain else argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            options |= {"type": get_args(kind)[0], "nargs": "*", "metavar": METAVARS[get_args(kind)[0]]}
        else:
            options |= {"type": kind, "metavar": METAVARS[kind]}
        self.note(section.add_argument(f"--{part.name}", **options), part.metadata["common"])
        self._field_defaults[part.name] = None if part.default is MISSING else part.default

    def note(self, action: argparse.Action, common: bool) -> None:
        """Remember whether --help shows a flag."""
        self._common[action.dest] = common

    def given_before_help(self, flags: Sequence[str]) -> dict[str, Any]:
        """Return the values that were typed beside --help, mistakes passed over."""
        for action in self._actions:
            action.required = False
        try:
            known, _ = super().parse_known_args(list(flags))
        except SystemExit:
            return {}
        return vars(known)

    def parse_exactly(self, flags: Sequence[str]) -> dict[str, Any]:
        """Return the values that were typed, by name; an unknown flag is an error that names the nearest known one."""
        known, unknown = super().parse_known_args(list(flags))
        keep_secret(getattr(known, "hub_token", None))
        if unknown:
            self.error(self._describe_unknown(unknown))
        given = vars(known)
        del given["help"], given["help_all"]
        return given

    def _describe_unknown(self, unknown: Sequence[str]) -> str:
        known = [flag for action in self._actions for flag in action.option_strings]
        first = unknown[0].split("=")[0]
        if not first.startswith("-"):
            return f"{first!r} is not the value of a flag; quote values that hold blanks or patterns"
        name = first.strip("-").replace("-", "_")
        matches = difflib.get_close_matches(f"--{name}", known, 1, 0.7)
        synonym = f"--{SYNONYMS.get(name, '')}"
        guess = synonym if synonym in known else matches[0] if matches else None
        hint = f"did you mean {guess}?" if guess else "--help-all lists the flags of this command"
        return f"unknown flag {first}: {hint}"

    def error(self, message: str) -> NoReturn:
        self.exit(2, redact(f"usage: {self.usage}\n{self.prog}: error: {message}\n"))

    def print_flags(self, recipe: Mapping[str, Any], every: bool) -> None:
        """Print the flags with their defaults; only the common ones unless `every`."""
        for action in self._actions:
            is_shown = every or self._common.get(action.dest, True)
            if not is_shown:
                action.help = argparse.SUPPRESS
            elif action.dest in self._field_defaults:
                default = self._field_defaults[action.dest]
                default = recipe.get(action.dest) if default is UNSET else default
                if isinstance(default, tuple):
                    default = " ".join(map(str, default))
                if default is not None and default is not False and default != "":
                    action.help = f"{action.help} (default: {default})"
        hidden = sum(not common for common in self._common.values())
        if hidden and not every:
            self.epilog = f"{self.epilog}\n\n--help-all shows {hidden} more flags."
        self.print_help()


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def script_parser(program: str, documentation: str, recipe: Recipe | None = None) -> FlagParser:
    """Return the parser of a script from its docstring: the first line is what it does, its commands are the examples.

    Examples are the lines that begin with "python" or "accelerate launch".
    """
    first, *rest = documentation.splitlines()
    examples = [line for line in rest if line.startswith(("python ", "accelerate launch "))]
    return FlagParser(program, first, "\n  ".join(examples), recipe)


def describe_command(program: str, flags: Sequence[str]) -> str:
    """The command for a card or a message, with --hub_token left out and its value hidden wherever it stands."""
    shown, hide_next = [], False
    for flag in flags:
        if flag.split("=")[0] == "--hub_token":
            hide_next = "=" not in flag
            keep_secret(flag.partition("=")[2])
        elif hide_next:
            hide_next = False
            keep_secret(flag)
        else:
            shown.append(flag)
    return shlex.join(redact([*shlex.split(program), *shown]))


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End the process in one line where a user's mistake was found; any other error keeps its traceback. No token of
    the Hub stands in either.

    Mistakes are bad data, models that can't be read, files and folders that aren't there or are in the way, checkpoints
    that can't be gone on with, and flags with which a message begins.
    """
    sys.excepthook = _print_redacted
    try:
        yield
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        from ..conversion.json_file import SourceError
        from ..data.readers.tables import DataError  # loaded by now, if any data was read
        from ..training.checkpointing import CheckpointError

        mistakes = CheckpointError | DataError | FileExistsError | FileNotFoundError | SourceError
        if isinstance(error, mistakes) or str(error).startswith("--"):
            raise SystemExit(redact(f"error: {error}")) from error
        raise


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def resuming(command: str) -> str:
    """The command that goes on with the run of `command` after a stop."""
    return command.replace(" --overwrite_output_dir", "") + " --resume_from_checkpoint last"


def how_started(name: str, script: str, launcher: str = "accelerate launch") -> str:
    """Return how this process was started, for messages: the console command, a module, or else the script."""
    started_as = Path(sys.argv[0]).name
    if started_as == "fa-transformers":
        return f"fa-transformers {name}"
    if started_as == f"{name}.py" and Path(sys.argv[0]).parent.name == "commands":
        return f"{launcher} -m fa_transformers.commands.{name}"
    return f"{launcher} {script}"


def print_json(result: Any) -> None:
    """Print the result of a command as one line of JSON, in which no token stands."""
    print(json.dumps(redact(result), ensure_ascii=False))
