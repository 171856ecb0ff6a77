"""Mistakes of users and the words of their messages: flags on a command line, arguments in Python.

A message is written once, with flags ("--max_length 8192"). A public function of Python that is decorated with
`names_arguments` has them turned into its arguments ("`max_length=8192`"), unless a command line called it
(`speaking_flags`). Messages of functions that are Python's alone are written with arguments in backticks, and a command
turns those into its flags (`in_flags`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, get_args, get_origin

from .options import OptionGroup

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
QUOTES = "'\""
# Words that are values of an option although its type is any text.
_VALUES = {"auto", "comma", "last", "minilm", "none", "pipe", "semicolon", "tab"}
_FLAG = re.compile(r"(?<![\w-])--(?P<name>[a-z]\w*)(?:[ =](?P<value>'[^']*'|\"[^\"]*\"|-?[\w./-]*\w))?")
_ARGUMENT = re.compile(r"`(?P<name>[a-z_]+)(?:=(?P<value>[^`]*))?`")
_flags_are_spoken: ContextVar[bool] = ContextVar("flags_are_spoken", default=False)


class Mistake(Exception):
    """The base of errors that tell a user what to mend: a command prints them in one line, without a traceback."""

    is_about_options: ClassVar[bool] = True
    """Whether names in backticks are arguments, which a command shows as its flags; else they are fields of a file."""


@contextmanager
def speaking_flags() -> Iterator[None]:
    """Leave the flags in messages as they are within the block, because its caller is a command line."""
    token = _flags_are_spoken.set(True)
    try:
        yield
    finally:
        _flags_are_spoken.reset(token)


def names_arguments(**renamed: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Return a decorator of a public function whose errors name its arguments where they were written with flags.

    Args:
        renamed: name of a flag -> the function's argument, where the two differ.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        own = {name: part.annotation for name, part in signature(function).parameters.items()}

        @wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not _flags_are_spoken.get() and len(error.args) == 1 and isinstance(error.args[0], str):
                    error.args = (in_arguments(error.args[0], own, renamed),)
                raise

        return call

    return decorate


def in_arguments(text: str, others: Mapping[str, Any] | None = None, renamed: Mapping[str, str] | None = None) -> str:
    """Return a message with Python's arguments in the place of flags: "--seed -1" becomes "`seed=-1`".

    A word after a flag is its value where the option's type says so. Words that are no option stay as they are.

    Args:
        others: type of each argument that is no field of options, by name.
        renamed: name of a flag -> the argument, where the two differ.
    """
    kinds, renamed = _kinds_of_options() | dict(others or {}), renamed or {}

    def translate(match: re.Match) -> str:
        flag, value = match["name"], match["value"]
        if flag not in kinds and flag not in renamed:
            return match[0]
        name = renamed.get(flag, flag)
        kind = kinds.get(flag, str)
        if value is not None and _is_value(value, kind):
            is_plain = kind in (int, float) or value[0] in QUOTES
            return f"`{name}={value if is_plain else repr(value)}`"
        rest = match[0][len(flag) + 2 :]
        return f"`{name}=True`{rest}" if kind is bool else f"`{name}`{rest}"

    return _FLAG.sub(translate, text)


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """Return a message with a command's flags in the place of Python's arguments: "`max_length=9`" becomes
    "--max_length 9".

    Args:
        flags: name of an argument -> how it is typed; arguments that are not among them stay as they are.
    """

    def translate(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        if name not in flags:
            return match[0]
        return flags[name] if value in (None, "True") else f"{flags[name]} {value.strip(QUOTES)}"

    return _ARGUMENT.sub(translate, text)


def _is_value(word: str, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return word in get_args(kind)
    if kind in (int, float):
        return re.fullmatch(r"-?\d[\d.]*(e-?\d+)?", word) is not None
    if kind is bool:
        return False
    return word[0] in QUOTES or (kind is str and word in _VALUES)


def _kinds_of_options() -> dict[str, Any]:
    """Return the type of each field of any options class, without None; tuples count as their entries."""
    kinds: dict[str, Any] = {}
    classes = [OptionGroup]
    while classes:
        options_class = classes.pop()
        classes += options_class.__subclasses__()
        for part in fields(options_class):
            parts = [part.type] if get_origin(part.type) in (Literal, None, tuple) else get_args(part.type)
            kind: Any = next(one for one in parts if one is not type(None))
            kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
            if kinds.get(part.name) in (None, str, Path):  # of two options of one name the one with choices
                kinds[part.name] = kind
    return kinds
