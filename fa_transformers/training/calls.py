"""Calls from Python: options filled in and their types checked, and the call described for a card."""

from collections.abc import Mapping
from dataclasses import Field, fields
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..options import UNSET, OptionGroup, flat
from ..redaction import redact

RESUME_CALL = "the same call with LoopOptions(..., resume_from_checkpoint='last')"
"""What a run that was called from Python prints after a stop by signal."""
KINDS: dict[type, type] = {int: Integral, float: Real}


def fill_options(given: Mapping[str, OptionGroup | None], classes: Mapping[str, type[OptionGroup]]) -> dict[str, Any]:
    """Return the options objects of a call by argument, those left out with all their defaults.

    Args:
        given: what was passed, by the name of the argument.
        classes: the class that each of these arguments has.

    Raises:
        TypeError: an argument is no object of its class, or a field holds a value of another type than it is to have.
        ValueError: a field holds none of the values that it may have.
    """
    filled = {name: options_class() if given[name] is None else given[name] for name, options_class in classes.items()}
    for name, options in filled.items():
        if not isinstance(options, classes[name]):
            raise TypeError(
                f"`{name}` must be {classes[name].__name__}(...), got {type(options).__name__}. Rows are the first "
                "argument, without a name."
            )
        for part in fields(options):
            _check_type(part, getattr(options, part.name))
    return filled


def _check_type(part: Field, value: Any) -> None:
    """Raise an error that names the flag where a field's value isn't what its annotation says; None passes."""
    if value is None or value is UNSET:
        return
    annotation: Any = part.type
    is_union = get_origin(annotation) in (Union, UnionType)
    kind = next(kind for kind in (get_args(annotation) if is_union else (annotation,)) if kind is not type(None))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"--{part.name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
        return
    expected = KINDS.get(get_origin(kind) or kind, get_origin(kind) or kind)
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        name = (get_origin(kind) or kind).__name__
        raise TypeError(f"--{part.name} must be of type {name}, got {value!r}, which is {type(value).__name__}.")


def describe_call(
    function: str, values: Mapping[str, Any], options: Mapping[str, OptionGroup], *, has_rows: bool
) -> str:
    """Return a call of this package's `function` as a line of Python, for a card; never with a token.

    Args:
        function: its name.
        values: arguments that are shown as they are, by name.
        options: arguments of which the fields are shown that differ from their defaults, by name.
        has_rows: rows were given in Python, which the line calls `rows`.
    """
    given = ["rows"] if has_rows else []
    given += [f"{name}={value!r}" for name, value in values.items()]
    for name, group in options.items():
        set_fields = {key: value for key, value in flat(group).items() if value != getattr(type(group)(), key)}
        if set_fields:
            shown = {key: str(value) if isinstance(value, Path) else value for key, value in set_fields.items()}
            listed = ", ".join(f"{key}={value!r}" for key, value in shown.items())
            given.append(f"{name}={type(group).__name__}({listed})")
    return redact(f"fa_transformers.{function}({', '.join(given)})")
