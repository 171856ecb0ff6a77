"""Protects what readers copy: every Python and shell block of README and of the pages runs, or says why not."""

import contextlib
import importlib
import shlex
from pathlib import Path

import pytest
from doc_blocks import (
    Block,
    read_blocks,
    reader_environment,
    run_python,
    run_shell,
    says_the_same,
    write_reader_files,
)
from hub_server import HubServer
from repository import ROOT

from fa_transformers import options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [page for folder in ("tutorials", "concepts") for page in sorted((ROOT / "docs" / folder).glob("*.md"))]
BLOCKS = {page: read_blocks(page) for page in PAGES}
SCRIPTS = {"finetune": "finetune", "distill": "distill", "convert_checkpoint": "convert", "push_to_hub": "push"}
ALL_FLAGS = {f"--{name}" for group in vars(options).values() for name in getattr(group, "__dataclass_fields__", {})}


def named(pages: list[Path]) -> list:
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in pages]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with a reader's files, where the test stands."""
    write_reader_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(blocks: list[Block], folder: Path) -> None:
    """Run blocks in order, those of Python in one namespace, and compare what they print with what the page shows."""
    namespace: dict = {"__name__": "__main__"}
    with HubServer() if any(block.language == "bash" for block in blocks) else contextlib.nullcontext() as hub:
        for block in blocks:
            if block.language == "bash":
                printed = run_shell(block, folder, reader_environment(folder, hub.environment))
            else:
                printed = run_python(block, namespace)
            if block.shown:
                assert says_the_same(printed, block.shown), f"{block.page.name}:{block.line} printed\n{printed}"


@pytest.mark.parametrize("page", named([p for p in PAGES if any(not (b.note) for b in BLOCKS[p])]))
def test_quick_blocks_run_and_print_what_the_page_shows(page, reader):
    run_page([block for block in BLOCKS[page] if not block.note], reader)


@pytest.mark.slow
@pytest.mark.parametrize("page", named([p for p in PAGES if any(b.is_slow for b in BLOCKS[p])]))
def test_all_blocks_run_in_order(page, reader):
    run_page([block for block in BLOCKS[page] if not block.reason], reader)


def test_a_note_says_how_a_block_is_tested_and_few_are_not_run():
    every = [block for blocks in BLOCKS.values() for block in blocks]
    unclear = [f"{b.page.name}:{b.line}: {b.note}" for b in every if b.note and not (b.is_slow or b.reason)]
    assert not unclear
    left_out = [block for block in every if block.reason]
    print(f"{len(every)} blocks, {sum(block.is_slow for block in every)} slow, {len(left_out)} not run:")
    for block in left_out:
        print(f"  {block.page.relative_to(ROOT)}:{block.line}: {block.reason}")
    assert len(left_out) <= 5


def check_flags(words: list[str]) -> str | None:
    """What is wrong with a command of ours, parsed as it would be; None where nothing is, or it is not ours."""
    script = next((word for word in words if word.startswith(("scripts/", "fa_transformers.commands."))), None)
    if words[0] == "fa-transformers":
        name, flags = words[1], words[2:]
    elif script is None:
        return None
    else:
        name, flags = Path(script).stem.split(".")[-1], words[words.index(script) + 1 :]
        path = ROOT / script
        if script.startswith("scripts/") and not path.is_file():
            return f"there is no {script}"
        if name not in SCRIPTS.keys() | SCRIPTS.values():
            unknown = {flag for flag in flags if flag.startswith("--")} - ALL_FLAGS
            return next((flag for flag in unknown if f'"{flag}"' not in path.read_text(encoding="utf-8")), None)
    command = importlib.import_module(f"fa_transformers.commands.{SCRIPTS.get(name, name)}")
    try:
        command.parse(flags)
    except SystemExit:
        return f"{name} refuses {shlex.join(flags)}"
    return None


@pytest.mark.parametrize("page", named(PAGES))
def test_commands_of_shell_blocks_have_flags_that_exist(page):
    commands = [words for block in BLOCKS[page] if block.language == "bash" for words in block.commands]
    wrong = [problem for words in commands if (problem := check_flags(words))]
    assert not wrong


def test_outputs_are_compared_by_words_and_numbers():
    assert says_the_same("{'a': 0.431, 'b': 17}", "{'a': 0.43, 'b': 17}")
    assert not says_the_same("{'a': 0.53, 'b': 17}", "{'a': 0.43, 'b': 17}")
    assert not says_the_same("{'c': 0.43, 'b': 17}", "{'a': 0.43, 'b': 17}")
    assert not says_the_same("torch.Size([1, 2])", "torch.Size([1, 2, 3])")
