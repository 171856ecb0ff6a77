"""Fill the page of flags from the options' dataclasses when the documentation is built.

mkdocs calls `on_page_markdown` for every page; `<!-- flags -->` becomes one table for each options class.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args
from unittest import mock

from fa_transformers import options
from fa_transformers.commands import COMMANDS, flags
from fa_transformers.distillation import recipes as distillation_recipes
from fa_transformers.options import UNSET
from fa_transformers.training import dense_recipe, stereo_recipe
from fa_transformers.training import recipes as training_recipes

GROUPS = [
    options.DataOptions,
    options.ModelOptions,
    options.LoopOptions,
    options.DistillationOptions,
    options.ConversionOptions,
    options.PredictOptions,
    options.CardOptions,
    dense_recipe.DenseDataOptions,
    dense_recipe.DenseModelOptions,
    stereo_recipe.StereoDataOptions,
    stereo_recipe.StereoModelOptions,
]
RECIPES = {
    "finetune": {task: training_recipes.recipe_of(task, is_demo=False) for task in training_recipes.TASKS},
    "distill": {task: distillation_recipes.recipe_of(task) for task in distillation_recipes.TASKS},
    "finetune_dense": {"images": dense_recipe.recipe_of(None, is_pretrained=False)},
    "finetune_stereo": {"stereo": stereo_recipe.recipe_of(is_demo=False, is_pretrained=False)},
}


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Return the page's text with the tables of flags, and without the notes for tests/docs."""
    markdown = re.sub(r"<!-- test: .*? -->\n", "", markdown)
    return markdown.replace("<!-- flags -->", render_flags()) if "<!-- flags -->" in markdown else markdown


def parser_of(command: str) -> flags.FlagParser:
    """The parser that a command builds before it reads its flags."""
    with mock.patch.object(flags.FlagParser, "parse", autospec=True, side_effect=_Built) as parse:
        try:
            importlib.import_module(f"fa_transformers.commands.{command}").parse([])
        except _Built:
            return parse.call_args.args[0]
    raise RuntimeError(f"the command {command!r} parsed no flags")


class _Built(Exception):
    """Stops a command once its parser is built."""


def commands_by_field() -> dict[tuple[type, str], list[str]]:
    """Names of the commands that know a flag, by options class and field."""
    known: dict[tuple[type, str], list[str]] = {}
    for command in COMMANDS:
        for options_class, names in parser_of(command)._groups:
            for name in names:
                known.setdefault((options_class, name), []).append(command)
    return known


def render_flags() -> str:
    """One section for each options class: a row for each field, with its values, default and commands."""
    known = commands_by_field()
    return "\n\n".join("\n".join(render_options(options_class, known)) for options_class in GROUPS)


def render_options(options_class: type, known: dict[tuple[type, str], list[str]]) -> Iterator[str]:
    """The lines of a class's section."""
    yield from (f"## {options_class.__name__}", "", (options_class.__doc__ or "").strip(), "")
    yield from ("| flag | values | default | what it does | commands |", "| --- | --- | --- | --- | --- |")
    for part in fields(options_class):
        flag, commands = f"`--{part.name}`", known.get((options_class, part.name), [])
        cells = [
            f"**{flag}**" if part.metadata["common"] else flag,
            show_values(part),
            show_default(part, commands),
            re.sub(r"(--\w+)", r"`\1`", part.metadata["help"].replace("|", "\\|")),
            ", ".join(commands) or "in Python alone",
        ]
        yield "| " + " | ".join(cells) + " |"


def show_values(part: Field) -> str:
    """What a flag takes: its choices, or the type of its value."""
    kinds = [kind for kind in flags._alternatives(part.type) if kind is not type(None)]
    kind = kinds[0]
    if kind is bool:
        return "" if part.default is False else f"`--no-{part.name}` is its opposite"
    choices = [value for value in get_args(kind) if isinstance(value, str)]
    if choices:
        return ", ".join(f"`{value}`" for value in choices)
    if get_args(kind):
        return {int: "several integers", float: "several numbers"}.get(get_args(kind)[0], "several names")
    return {int: "integer", float: "number", Path: "path"}.get(kind, "text")


def show_default(part: Field, commands: list[str]) -> str:
    """The default: the field's, or where a recipe fills it, what it gives to your own data by command and task."""
    if part.default is not UNSET:
        return "" if part.default in (None, False, MISSING) else f"`{part.default}`"
    cases = {
        f"{command}, {'text' if task.startswith('text') else 'images'}": recipe.get(part.name)
        for command, recipes in RECIPES.items()
        for task, recipe in recipes.items()
        if command in commands
    }
    cases = {case: f"`{value}`" for case, value in cases.items() if value is not None}
    if len(set(cases.values())) < 2:
        return next(iter(cases.values()), "")
    return "; ".join(f"{value} ({case})" for case, value in cases.items())
