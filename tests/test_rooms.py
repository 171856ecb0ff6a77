"""Protects the order of the package's rooms: each imports only rooms before it, and `models` nothing of ours."""

import ast
from collections.abc import Iterator
from pathlib import Path

from repository import ROOT, SCRIPTS

PACKAGE = ROOT / "fa_transformers"
# A room is a file or a folder of the package. It may import the rooms of earlier floors; rooms of one floor are apart.
FLOORS = (
    ("version", "redaction", "evaluation", "tables"),
    ("options", "files", "cores"),
    ("charts", "checks", "drawings", "mistakes", "pages"),
    ("models",),
    ("metrics",),
    ("attention_interface", "explain", "lora", "memory"),
    ("data",),
    ("hub",),
    ("conversion",),
    ("prediction",),
    ("training",),
    ("distillation",),
    ("app", "studies"),
    ("commands",),
    ("__init__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """Full dotted names of what a file imports, wherever in it the import stands; of a `from` import, of every name."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = (*base, *([node.module] if node.module else []))
            yield from (".".join((*parts, alias.name)) for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """Rooms that a file imports; the package itself counts as `__init__`, which all rooms are below."""
    names = [name.split(".") for name in imports_of(path) if name.split(".")[0] == "fa_transformers"]
    return {parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else "__init__" for parts in names}


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms <= set(FLOOR_OF), f"rooms without a floor: {sorted(rooms - set(FLOOR_OF))}"


def test_rooms_import_only_rooms_of_earlier_floors():
    back = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for other in sorted(rooms_imported(path) - {room_of(path)})
        if FLOOR_OF[other] >= FLOOR_OF[room_of(path)]
    ]
    assert not back, back


def test_the_package_imports_no_script_and_no_script_another_one():
    scripts = {path.stem for path in SCRIPTS.rglob("*.py")} | {"scripts"}
    for path in [*PACKAGE.rglob("*.py"), *SCRIPTS.rglob("*.py")]:
        assert not {name.split(".")[0] for name in imports_of(path)} & scripts, path
