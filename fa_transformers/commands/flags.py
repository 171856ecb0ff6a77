"""Command lines made from the dataclasses of `options`: one field, one flag.

A command opts in to groups of fields; flags of the other groups are unknown to it. Nothing here imports torch, so that
--help and a mistyped flag answer at once.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, Field, fields
from opcode import opmap
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from ..mistakes import Mistake, in_flags, speaking_flags
from ..options import UNSET, LoopOptions
from ..redaction import keep_secret, redact

Recipe = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# What people type who come from other trainers, for "did you mean".
SYNONYMS = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path", "teacher": "teacher_name_or_path", "max_seq_length": "max_length",
    "output": "output_dir", "data": "train_file", "dataset": "dataset_name", "fp16": "mixed_precision",
    "bf16": "mixed_precision", "cpu": "use_cpu", "no_cuda": "use_cpu",
}  # fmt: skip
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "WORLD_SIZE")
"""Variables of the environment that `accelerate launch` and torchrun set, one or the other, for their processes."""
MEMORY_FLAGS = ("--max_tokens_per_batch", "--per_device_train_batch_size", "--chunk_size", "--max_length")
"""Flags that lower the memory that a command takes, the one that helps most first."""
PACKAGE = Path(__file__).resolve().parents[1]
_DISK_FULL = re.compile(r"No space left on device|StorageFull|Disk quota exceeded")
_NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|CUDA out of memory")
_flags_of_command: dict[str, str] = {}
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
        self._aliases: dict[str, str] = {}

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

    def add_aliases(self, **typed: str) -> None:
        """Say how arguments of Python that messages name are typed here, where the flag has another name."""
        self._aliases |= typed

    def parse(self, argv: Sequence[str] | None = None) -> "Parsed":
        """Parse a command line; --help, --help-all and mistakes end the process as argparse does."""
        try:
            flags = read_flag_files(sys.argv[1:] if argv is None else argv)
        except ValueError as error:
            self._parser.error(str(error))
        _flags_of_command.clear()
        _flags_of_command.update(self._parser.typed_names | self._aliases)
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


def read_flag_files(flags: Sequence[str]) -> list[str]:
    """Return the flags with the words of FILE in the place of each @FILE that there is; # begins a comment.

    Any other text that begins with @ stays as it is.

    Raises:
        ValueError: a file has a quote that doesn't end, or is no text.
    """
    words = []
    for flag in flags:
        path = Path(flag[1:])
        if not flag.startswith("@") or not path.is_file():
            words.append(flag)
            continue
        try:
            words += shlex.split(path.read_text(encoding="utf-8"), comments=True)
        except ValueError as error:
            raise ValueError(f"{flag}, a file of flags: {error}") from error
    return words


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
        )
        self._common: dict[str, bool] = {}
        self._field_defaults: dict[str, Any] = {}
        help_flags = self.add_argument_group("help")
        help_flags.add_argument("-h", "--help", action="store_true", help="show the flags that most people need")
        help_flags.add_argument("--help-all", action="store_true", help="show every flag")

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

    @property
    def typed_names(self) -> dict[str, str]:
        """Name of each option and positional argument -> how it is typed."""
        return {a.dest: a.option_strings[0] if a.option_strings else str(a.metavar or a.dest) for a in self._actions}

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
        if first.startswith("@"):
            return f"{first}: there is no such file of flags; a value that begins with @ is typed as --flag={first}"
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


class CommandFailed(SystemExit):
    """The end of a command after a mistake of its user, with exit status 2; its text is the line that was printed."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = 2


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End the process with "error: ..." and status 2 where a user's mistake was found, and with status 130 on Ctrl-C;
    any other error keeps its traceback. No token of the Hub stands in either.

    A mistake is what `describe_mistake` knows. Under torchrun its line is also what the launcher's own report gives as
    the cause, which is the last that is read there.
    """
    sys.excepthook = _print_redacted
    try:
        with speaking_flags():
            yield
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        message = describe_mistake(error)
        if message is None:
            raise
        line = redact(f"error: {message}")
        print(line, file=sys.stderr)
        _tell_torchrun(line)
        raise CommandFailed(line) from error


def describe_mistake(error: Exception) -> str | None:
    """Return what a user has to mend, in words of the command line that was parsed; None for a fault of the program.

    Mistakes are those that this package tells on purpose (`Mistake`, and any ValueError, TypeError or ImportError that
    a `raise` of its own made), packages to install, files, folders and networks (OSError), and memory and disks that
    are full.
    """
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    if _DISK_FULL.search(str(error)):
        return f"{text}. The disk is full: free some space, then go on or start again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(text):
        first_line = text.partition("\n")[0]
        known = [f" by {flag}" for flag in MEMORY_FLAGS if flag in _flags_of_command.values()]
        return f"out of memory: use less of it{''.join(known[:1])}. {first_line}".strip()
    is_to_install = isinstance(error, ImportError) and "pip install" in text
    if isinstance(error, Mistake | OSError) or is_to_install or _is_raised_here(error):
        is_about_options = error.is_about_options if isinstance(error, Mistake) else True
        return (in_flags(text, _flags_of_command) if is_about_options else text) or type(error).__name__
    return None


def _is_raised_here(error: Exception) -> bool:
    """True for a message to a user: an error that begins with a flag, or that a `raise` of this package made.

    What numpy, torch or an expression of ours raises by itself is a fault of the program.
    """
    if not isinstance(error, ImportError | TypeError | ValueError):
        return False
    if str(error).startswith("--"):
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code = innermost.tb_frame.f_code
    is_statement = code.co_code[innermost.tb_lasti] == opmap["RAISE_VARARGS"]
    started = getattr(sys.modules["__main__"], "__file__", None)
    return is_statement and (Path(code.co_filename).is_relative_to(PACKAGE) or code.co_filename == started)


def _tell_torchrun(line: str) -> None:
    """Write the file from which torchrun takes the cause that it reports after all processes have ended."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": told}}), encoding="utf-8")


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def ends_with_resume(resume_command: str, loop: LoopOptions) -> AbstractContextManager[None]:
    """Speak of flags, and let Ctrl-C or SIGTERM outside of the training loop, too, end with how to go on.

    The loop has its own way: it finishes its step and saves. Before the first checkpoint there is nothing to resume.
    """

    def find_checkpoints() -> list[Path]:
        return [*loop.output_dir.glob("checkpoint-*"), *loop.output_dir.glob("*/checkpoint-*")]

    return resumable(resume_command, find_checkpoints, is_resumed=loop.resume_from_checkpoint is not None)


@contextmanager
def resumable(resume_command: str, find_saved: Callable[[], list[Path]], *, is_resumed: bool) -> Iterator[None]:
    """Speak of flags, and let Ctrl-C or SIGTERM end with how to go on, where there is something to go on with.

    Args:
        find_saved: finds the files or folders that a later start would go on with; those from before this start count
            only where it `is_resumed`.
    """
    started = time.time()
    is_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main_thread else None
    try:
        with speaking_flags():
            yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            saved = [path for path in find_saved() if path.exists()]
            has_begun = any(is_resumed or path.stat().st_mtime >= started for path in saved)
            how = f"Resume:\n{resume_command}" if has_begun else "Nothing was saved yet: start it again."
            print(f"Stopped. {how}", flush=True)
        raise SystemExit(130) from None
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, previous)


def resuming(command: str) -> str:
    """The command that goes on with the run of `command` after a stop."""
    return command.replace(" --overwrite_output_dir", "") + " --resume_from_checkpoint last"


def how_started(name: str, script: str, launcher: str = "accelerate launch") -> str:
    """Return how this process was started, for messages: the console command, a module, or else the script.

    A script or module that no launcher started is told as started by python.
    """
    started_as = Path(sys.argv[0]).name
    if started_as in (f"{name}.py", Path(script).name) and not set(LAUNCHER_VARIABLES) & set(os.environ):
        launcher = "python"
    if started_as == "fa-transformers":
        return f"fa-transformers {name}"
    if started_as == f"{name}.py" and Path(sys.argv[0]).parent.name == "commands":
        return f"{launcher} -m fa_transformers.commands.{name}"
    return f"{launcher} {script}"


def print_json(result: Any) -> None:
    """Print the result of a command as one line of JSON, in which no token stands."""
    print(json.dumps(redact(result), ensure_ascii=False))
