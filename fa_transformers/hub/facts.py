"""Dataclasses of facts: what may stand in them, checked, and made from JSON. The message of an error names the fact."""

import dataclasses
import sys
import types
import typing
from typing import Any

from ..mistakes import Mistake


class FactError(Mistake, ValueError):
    """A fact of a model card is missing, empty, of the wrong type or unknown; the message names it."""


def check_facts(facts: Any, prefix: str = "") -> None:
    """Check that every fact of a dataclass is there, of its type, and finite; `prefix` begins the names in messages.

    Raises:
        FactError: one isn't.
    """
    hints = typing.get_type_hints(type(facts))
    for field in dataclasses.fields(facts):
        _check_value(getattr(facts, field.name), hints[field.name], prefix + field.name)


def _check_value(value: Any, hint: Any, name: str) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return
        hint = arguments[0]
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if (
        value is None
        or (isinstance(value, (str, list, dict)) and not value)
        or (hint is str and not str(value).strip())
    ):
        raise FactError(f"fact '{name}' is missing: a model card must state it")
    expected = origin or hint
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number if expected is float else isinstance(value, expected) and not isinstance(value, bool)):
        raise FactError(f"fact '{name}' must be a {expected.__name__}, got {value!r:.80}")
    if is_number and not abs(value) <= sys.float_info.max:  # of an integer with hundreds of digits too
        raise FactError(f"fact '{name}' is {value!r:.80}; a model card states finite numbers only")
    if expected is list:
        for index, item in enumerate(value):
            _check_value(item, arguments[0], f"{name}[{index}]")
    elif expected is dict:
        for key, item in value.items():
            _check_value(item, arguments[1], f"{name}[{key!r}]")
    elif dataclasses.is_dataclass(expected):
        check_facts(value, f"{name}.")


def facts_from_dict(cls: type, values: Any, prefix: str = "") -> Any:
    """Make a dataclass of facts from a dictionary, as JSON has it, with dictionaries for the dataclasses in its lists.

    Raises:
        FactError: a fact is missing, unknown, empty or of the wrong type.
    """
    if not isinstance(values, dict):
        raise FactError(f"fact '{prefix.rstrip('.') or 'the whole file'}' must be a JSON object, got {values!r:.80}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise FactError(f"fact '{prefix}{unknown[0]}' is unknown; the facts are {sorted(fields)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise FactError(f"fact '{prefix}{name}' is missing: a model card must state it")
            continue
        arguments[name] = values[name]
        hint = hints[name]
        if isinstance(hint, types.UnionType):
            if values[name] is None:
                continue
            hint = typing.get_args(hint)[0]
        item_type = next(iter(typing.get_args(hint)), None)
        if isinstance(item_type, type) and dataclasses.is_dataclass(item_type):
            if not isinstance(values[name], list):
                raise FactError(f"fact '{prefix}{name}' must be a list, got {values[name]!r:.80}")
            arguments[name] = [
                facts_from_dict(item_type, item, f"{prefix}{name}[{index}].") for index, item in enumerate(values[name])
            ]
    return cls(**arguments)
