"""Protects that files and functions stay small enough to be read: what grows past its limit is split or shortened."""

import ast
from pathlib import Path

import pytest
from repository import ROOT, SCRIPTS

FILE_LINES, SCRIPT_LINES, FUNCTION_LINES = 500, 200, 60
PACKAGE, TESTS = ROOT / "fa_transformers", ROOT / "tests"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def function_lines(source: str) -> dict[str, int]:
    """Lines of each function from its `def` to its end, less those of its docstring; functions inside it count too."""
    lines = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            first = node.body[0]
            has_docstring = ast.get_docstring(node, clean=False) is not None
            docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
            lines[f"{node.name}, line {node.lineno}"] = node.end_lineno - node.lineno + 1 - docstring
    return lines


def test_lines_of_a_function_are_counted_without_its_docstring():
    source = '''
@decorated
def outer(
    x,
):
    """One.

    Two.
    """

    def inner():
        return x
    return inner
'''
    assert function_lines(source) == {"outer, line 3": 7, "inner, line 11": 2}


@pytest.mark.parametrize(
    ("folder", "limit"),
    [
        pytest.param(PACKAGE, FILE_LINES, id="package"),
        pytest.param(TESTS, FILE_LINES, id="tests"),
        pytest.param(SCRIPTS, SCRIPT_LINES, id="scripts"),
    ],
)
def test_no_file_is_over_its_limit(folder, limit):
    lines = {name(path): len(read(path).splitlines()) for path in folder.rglob("*.py")}
    assert lines, f"{folder} has no file"
    assert not {path: count for path, count in lines.items() if count > limit}


@pytest.mark.parametrize("folder", [pytest.param(PACKAGE, id="package"), pytest.param(SCRIPTS, id="scripts")])
def test_no_function_is_over_its_limit(folder):
    lines = {
        f"{name(path)}: {function}": count
        for path in folder.rglob("*.py")
        for function, count in function_lines(read(path)).items()
    }
    assert lines, f"{folder} has no function"
    assert not {function: count for function, count in lines.items() if count > FUNCTION_LINES}
