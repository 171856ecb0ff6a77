"""Protects the pages as Markdown: README's size and figures, tables beside their JSON, every public name and link."""

import ast
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
from doc_blocks import FENCE, read_blocks
from repository import ROOT

import fa_transformers

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
RESULTS = sorted((DOCS / "results").glob("*.json"))
FIELDS = {"title", "command", "machine", "date", "columns", "rows"}


def load_tables():
    """docs/tables.py as a module, which no package holds."""
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of_table(text: str, first_cell: str) -> list[list[str]]:
    """The cells of the Markdown table whose heading begins with `first_cell`, without bold."""
    start = text.index(f"| {first_cell} |")
    lines = text[start:].split("\n\n")[0].splitlines()
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def anchors_of(page: Path) -> set[str]:
    """The anchors that mkdocs and GitHub give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_readme_is_short_and_says_what_is_lost():
    text = README.read_text(encoding="utf-8")
    prose = re.sub(r"<!--.*?-->", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    print(f"README: {text.count(chr(10))} lines, {len(prose.split())} words outside code")
    assert text.count("\n") <= 120
    assert len(prose.split()) <= 1100
    assert "FNet, which has no attention, is faster" in prose
    assert "TF-IDF" in prose.split("## When not to use it")[0]


def test_readmes_first_program_has_six_lines():
    first = next(block for block in read_blocks(README) if block.language == "python")
    assert len([line for line in first.code.splitlines() if line]) <= 6


def test_trainer_program_has_at_most_40_lines():
    program = read_blocks(DOCS / "tutorials" / "trainer-and-lora.md")[0]
    assert program.code.count("\n") <= 40
    assert all(name in program.code for name in ("Trainer(", "PackingCollator()", "fa_lora_config(", "train.csv"))


def test_the_first_python_example_of_fine_tuning_has_at_most_15_lines():
    first = read_blocks(DOCS / "tutorials" / "your-documents.md")[0]
    assert len(first.code.splitlines()) <= 15
    assert "fa_transformers.finetune(rows" in first.code


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_result_has_command_machine_and_date(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    for table in [content] if "points" in content else content["tables"].values():
        if "points" not in table:
            assert table.keys() >= FIELDS
            assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["title"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", table["date"])
        assert table["machine"]
        assert table["command"].startswith(("python ", "accelerate ", "make ", "pytest ", "fa-transformers "))


def test_every_result_is_shown_and_every_table_is_what_its_file_says():
    tables = load_tables()
    shown = set()
    for page in sorted((DOCS / "results").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text, page.parent) == text, f"run python docs/tables.py: {page.name} differs from its JSON"
        shown |= {(found[2], found[3]) for found in tables.PLACE.finditer(text)}
    held = {
        (path.name, name) for path in RESULTS for name in json.loads(path.read_text(encoding="utf-8")).get("tables", ())
    }
    assert held <= shown


def test_readmes_times_are_those_of_the_results():
    readme = rows_of_table(README.read_text(encoding="utf-8"), "tokens")
    results = rows_of_table((DOCS / "results" / "speed.md").read_text(encoding="utf-8"), "tokens")
    by_length = {row[0]: row[1:] for row in results[1:]}
    assert [name.split(" (")[0] for name in results[0][1:]] == readme[0][1:]
    assert len(readme) == 6
    for length, *cells in readme[1:]:
        assert [cell.split(" / ")[0] for cell in by_length[length]] == cells, length


def test_results_of_the_benchmark_become_a_table_as_they_are(tmp_path):
    point = {"model": "BERT", "series": "BERT", "status": "ok", "time_limit_s": 60.0}
    ours = {**point, "model": "FA-BERT", "series": "FA-BERT"}
    points = [
        {**ours, "mode": "forward", "size": 512, "median_seconds": 0.1149},
        {**ours, "mode": "training", "size": 512, "median_seconds": 12.6},
        {**point, "mode": "forward", "size": 512, "median_seconds": 1.5},
        {**point, "mode": "training", "size": 512, "status": "timed out"},
        {**ours, "mode": "forward", "size": 1024, "status": "out of memory"},
        {**ours, "mode": "training", "size": 1024, "status": "out of memory"},
    ]
    about = {"command": "python x", "machine": "x86_64", "setting": "2 layers.", "date": "2026-01-01"}
    (tmp_path / "benchmark.json").write_text(json.dumps(about | {"points": points}))
    rows = rows_of_table(load_tables().render_table(tmp_path / "benchmark.json", "text"), "tokens")
    assert rows[1:] == [
        ["512", "0.11 / 13", "1.50 / > 60"],
        ["1,024", "out of memory", "not tried"],
    ]


def test_the_reference_has_every_public_name_once():
    text = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    documented = re.findall(r"^::: fa_transformers\.(\w+)$", text, flags=re.MULTILINE)
    in_flags = {name for name in fa_transformers.__all__ if name.endswith("Options") and f"`{name}`" in text}
    assert len(documented) == len(set(documented))
    assert set(documented) | in_flags == set(fa_transformers.__all__) - {"__version__"}
    assert all(dataclasses.is_dataclass(getattr(fa_transformers, name)) for name in in_flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    dead = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            dead.append(target)
    assert not dead


def test_python_blocks_of_every_page_parse():
    for page in PAGES:
        for block in read_blocks(page):
            if block.language == "python":
                ast.parse(block.code)
