"""Heads whose outputs are labels: when a checkpoint's can be carried over, and what is told of one that can't."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

LABEL_HEADS = re.compile(r"^(classifier|class_labels_classifier)\.")
"""Names of parameters that have a row for each label."""
LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")
_MADE_UP = re.compile(r"LABEL_\d+")
_LISTED = 4


def replace_labels(fields: Mapping[str, Any], earlier: PretrainedConfig, overrides: Mapping[str, Any]) -> dict:
    """Return a configuration's fields with the labels that `overrides` ask for.

    Of the earlier ones names and problem type stay where there are as many labels and no others are named.

    Args:
        fields: of the checkpoint's configuration.
        earlier: the configuration that they make.
        overrides: fields that were asked for; those of labels are taken.
    """
    asked = {name: overrides[name] for name in LABEL_FIELDS if name in overrides}
    names = asked.get("id2label")
    count = len(names) if names is not None else asked.get("num_labels", earlier.num_labels)
    if count == earlier.num_labels and (names is None or not _differ(earlier.id2label, names)):
        return {**fields, **asked}
    kept = {name: value for name, value in fields.items() if name not in LABEL_FIELDS}
    if names is not None and "label2id" not in asked:
        asked["label2id"] = {name: index for index, name in names.items()}
    return {**kept, **asked}


def label_difference(earlier: PretrainedConfig, config: PretrainedConfig) -> str | None:
    """Return the reason why one configuration's outputs of labels mean nothing to another's; None where they do."""
    if earlier.num_labels != config.num_labels:
        return f"it has outputs for {_count(earlier.num_labels)}, the result for {_count(config.num_labels)}"
    if _differ(earlier.id2label, config.id2label):
        return f"its labels are {_show(earlier.id2label)}, those of the result {_show(config.id2label)}"
    if _kind(earlier) != _kind(config):
        return f"it was trained for {_kind(earlier)}, the result is for {_kind(config)}"
    return None


def list_sizes(parameters: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """Return names and shapes of parameters in a few words, the first of them where there are many."""
    shown = [f"{name} ({' x '.join(map(str, shape)) or 'scalar'})" for name, shape in parameters]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more


def _list_names(names: Mapping[Any, str]) -> list[str]:
    return [name for _, name in sorted((int(index), str(name)) for index, name in names.items())]


def _differ(names: Mapping[Any, str], others: Mapping[Any, str]) -> bool:
    """Whether two sets of labels have other names; those that a configuration made up, as LABEL_0, differ from none."""
    before, after = _list_names(names), _list_names(others)
    are_made_up = (all(map(_MADE_UP.fullmatch, listed)) for listed in (before, after))
    return before != after and not any(are_made_up)


def _kind(config: PretrainedConfig) -> str:
    """The problem type, or what transformers infers where there is none."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def _count(number: int) -> str:
    return "1 label" if number == 1 else f"{number} labels"


def _show(names: Mapping[Any, str]) -> str:
    return f"{', '.join(map(repr, _list_names(names))):.80}"
