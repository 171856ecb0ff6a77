"""Blocks of Markdown pages, and a folder in which they run as a reader would run them.

A comment above a fence says how its block is tested; nothing said, it runs in `make test`:

    <!-- test: slow -->                          with the slow tests
    <!-- test: slow, with --max_steps 2 -->      likewise, these flags added to its first command
    <!-- test: not run, it needs 8 GPUs -->      not at all, and why
"""

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

FENCE = re.compile(r"(?:^<!-- test: (?P<note>.*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
# Programs of the environment that the tests run in, under the names that a reader types, and Python's words for them.
PROGRAMS = {
    "python": "",
    "accelerate": "-m accelerate.commands.accelerate_cli",
    "torchrun": "-m torch.distributed.run",
}


@dataclass(frozen=True)
class Block:
    """A block of code of a page, and the output that the page shows below it ("" where it shows none)."""

    page: Path
    line: int
    language: str
    code: str
    note: str
    shown: str = ""

    @property
    def is_slow(self) -> bool:
        return self.note.startswith("slow")

    @property
    def reason(self) -> str | None:
        """Why the block isn't run; None where it is."""
        return self.note.partition("not run, ")[2] or None

    @property
    def commands(self) -> list[list[str]]:
        """The words of a shell block's commands."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def read_blocks(page: Path) -> list[Block]:
    """The Python and shell blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    end = 0
    for found in FENCE.finditer(text):
        language, code = found["language"], found["code"]
        if language == "text" and blocks and not text[end : found.start()].strip():
            last = blocks.pop()
            blocks.append(Block(last.page, last.line, last.language, last.code, last.note, code))
        elif language in ("python", "bash"):
            line = text[: found.start("code")].count("\n") + 1
            blocks.append(Block(page, line, language, code, found["note"] or ""))
        end = found.end()
    return blocks


def run_python(block: Block, namespace: dict) -> str:
    """Run a block in the namespace that the page's blocks share, and return what it printed."""
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def run_shell(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """Run a block's commands, with the flags that its note adds to the first one, and return what they printed."""
    script = block.code.rstrip()
    _, _, added = block.note.partition("with ")
    if added:
        first, *others = re.split(r"(?<!\\)\n", script)
        script = "\n".join([f"{first} {added}", *others])
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (
        f"{block.page.name}:{block.line}\n{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def says_the_same(printed: str, shown: str) -> bool:
    """Whether the last lines of what was printed are those shown: word for word, numbers within 3 % or 0.02."""
    printed = "\n".join(printed.splitlines()[-len(shown.splitlines()) :])
    words, numbers = (
        [NUMBER.sub("#", text).split() for text in (printed, shown)],
        [list(map(float, NUMBER.findall(text))) for text in (printed, shown)],
    )
    close = (math.isclose(a, b, rel_tol=0.03, abs_tol=0.02) for a, b in zip(*numbers, strict=False))
    return words[0] == words[1] and len(numbers[0]) == len(numbers[1]) and all(close)


def write_programs(folder: Path) -> None:
    """Write the programs that a reader types into `folder`, as an installation would have put them on the path."""
    folder.mkdir()
    for name, words in PROGRAMS.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
    command = f"#!{sys.executable}\nfrom fa_transformers.commands import main\n\nmain()\n"
    (folder / "fa-transformers").write_text(command)
    for path in folder.iterdir():
        path.chmod(0o755)


def write_reader_files(folder: Path) -> None:
    """Write what a reader of the pages has: tables, shards of one, pictures, and the repository's scripts."""
    import datasets
    from PIL import Image

    (folder / "scripts").symlink_to(ROOT / "scripts")
    things = [f"{adjective} {noun}" for adjective in ("old", "new", "red") for noun in ("house", "train", "book")]
    words = {"lovely": "praise", "great": "praise", "awful": "complaint", "broken": "complaint"}
    pairs = [(thing, word) for thing in things for word in words]
    rows = {
        "text": [f"The {thing} was {word}. " * (1 + number % 5) for number, (thing, word) in enumerate(pairs)],
        "label": [words[word] for _, word in pairs],
        "author": [f"author {number % 4}" for number, _ in enumerate(pairs)],
    }
    table = datasets.Dataset.from_dict(rows)
    table.to_csv(folder / "train.csv")
    table.select(range(16)).to_csv(folder / "valid.csv")
    (folder / "shards").mkdir()
    for number in range(2):
        table.shard(2, number).to_parquet(folder / "shards" / f"{number}.parquet")
    for kind, colour in (("cats", (200, 120, 30)), ("dogs", (40, 90, 160))):
        (folder / "photos" / kind).mkdir(parents=True)
        for number in range(100):
            image = Image.new("RGB", (96, 80), colour)
            image.putpixel((number % 96, number % 80), (255, 255, 255))
            image.save(folder / "photos" / kind / f"{number}.png")


def reader_environment(folder: Path, hub: dict[str, str]) -> dict[str, str]:
    """Variables of a reader's shell whose programs and caches are in `folder` and whose Hub is a local one."""
    programs = folder / "programs"
    if not programs.exists():
        write_programs(programs)
    unwanted = {name: "" for name in os.environ if name.startswith(("PYTEST_", "RANK", "WORLD_SIZE"))}
    return {
        **{name: value for name, value in os.environ.items() if name not in unwanted},
        **hub,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
