"""Protects what readers copy: every Python and shell block of README and of the pages runs, or says why not."""

import contextlib
import importlib
import json
import re
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
from repository import ROOT, load_script

from fa_transformers.commands import COMMANDS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [page for folder in ("tutorials", "concepts") for page in sorted((ROOT / "docs" / folder).glob("*.md"))]
BLOCKS = {page: read_blocks(page) for page in PAGES}
SCRIPTS = {
    "finetune": "finetune",
    "finetune_dense": "finetune_dense",
    "finetune_stereo": "finetune_stereo",
    "distill": "distill",
    "convert_checkpoint": "convert",
    "push_to_hub": "push",
}


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
@pytest.mark.certified
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


def check_command(words: list[str]) -> str | None:
    """What is wrong with a command of the repository, whose flags its own parser reads; None where nothing is."""
    script = next((word for word in words if re.match(r"scripts/.*\.py$|fa_transformers\.commands\.", word)), None)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return None if words[1] in targets else f"make has no target {words[1]}"
    if words[0] == "fa-transformers":
        name, flags = words[1], words[2:]
    elif script is None:
        return None
    else:
        name, flags = Path(script).stem.split(".")[-1], words[words.index(script) + 1 :]
        if script.startswith("scripts/") and not (ROOT / script).is_file():
            return f"there is no {script}"
    if name in COMMANDS or name in SCRIPTS:
        command = importlib.import_module(f"fa_transformers.commands.{SCRIPTS.get(name, name)}")
    else:
        command = load_script(name)
    if not hasattr(command, "parse"):
        text = (ROOT / script).read_text(encoding="utf-8")
        return next((flag for flag in flags if flag.startswith("--") and flag.strip("-") not in text), None)
    try:
        command.parse(flags)
    except SystemExit:
        return f"{name} refuses {shlex.join(flags)}"
    return None


@pytest.mark.parametrize("page", named([page for page in PAGES if any(b.language == "bash" for b in BLOCKS[page])]))
def test_commands_of_shell_blocks_have_flags_that_exist(page):
    commands = [words for block in BLOCKS[page] if block.language == "bash" for words in block.commands]
    wrong = [problem for words in commands if (problem := check_command(words))]
    assert not wrong


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda path: path.name)
def test_commands_of_results_have_flags_that_exist(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    tables = [content] if "points" in content else content["tables"].values()
    wrong = [problem for table in tables if (problem := check_command(shlex.split(table["command"])))]
    assert not wrong


def test_a_wrong_command_is_seen():
    assert check_command(["fa-transformers", "finetune", "--learning_rat", "1"])
    assert check_command(["python", "scripts/studies/baselines.py", "--max_length", "64"])
    assert check_command(["python", "scripts/studies/nothing.py"])
    assert check_command(["make", "nothing"])


def test_outputs_are_compared_by_words_and_numbers():
    assert says_the_same("{'a': 0.431, 'b': 17}", "{'a': 0.43, 'b': 17}")
    assert not says_the_same("{'a': 0.53, 'b': 17}", "{'a': 0.43, 'b': 17}")
    assert not says_the_same("{'c': 0.43, 'b': 17}", "{'a': 0.43, 'b': 17}")
    assert not says_the_same("torch.Size([1, 2])", "torch.Size([1, 2, 3])")
