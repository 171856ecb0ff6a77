"""Where the repository and its parts are, for tests that run its scripts or read its files."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
HELPERS = ROOT / "tests" / "helpers"


def load_script(name: str) -> ModuleType:
    """A script of `scripts/` or `scripts/studies/` as a module, whose `main` a test calls in its own process."""
    (path,) = SCRIPTS.rglob(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_json_line(printed: str) -> dict:
    """The line of JSON that a run prints for programs, before those that say where its files are."""
    (line,) = (line for line in printed.splitlines() if line.startswith('{"'))
    return json.loads(line)
