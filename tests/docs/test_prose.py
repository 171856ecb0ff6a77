"""Protects the wording that CONTRIBUTING asks for: docstrings that begin with their noun, and no word of a tracker."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT, SCRIPTS

SOURCES = [*sorted((ROOT / "fa_transformers").rglob("*.py")), *sorted(SCRIPTS.rglob("*.py"))]
TEXTS = [*SOURCES, *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
NO_NOUN = re.compile(r"(?:The same|Those|That of|Of all|What|Which|Nothing:)\b")


def first_sentences(path: Path) -> Iterator[str]:
    """Line and first line of every docstring of a file, its own included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"


def test_docstrings_begin_with_a_noun_or_a_verb():
    wrong = [line for path in SOURCES for line in first_sentences(path) if NO_NOUN.match(line.split(": ", 1)[1])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("word", ["issue", "ticket", "/tmp/", "/home/"])
def test_no_text_speaks_of_a_tracker_or_of_one_machine(word):
    spoken = re.compile(rf"\b{re.escape(word)}\b" if word.isalpha() else re.escape(word), flags=re.IGNORECASE)
    found = [path.relative_to(ROOT).as_posix() for path in TEXTS if spoken.search(path.read_text(encoding="utf-8"))]
    assert not found
