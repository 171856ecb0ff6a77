"""Unlabelled English prose that every installation of this package brings along, to distil on without a network.

Kinds:

`docstrings`    of the modules, classes and functions of the standard library and of installed packages, put together
                file by file; files are parsed, never imported
`descriptions`  the long descriptions (READMEs) of installed packages
`documents`     .rst, .md and .txt files inside the standard library and installed packages

Licence texts are left out of all three: they are a kind that evaluation keeps unseen. What comes out depends on the
versions that are installed, which `constraints.txt` fixes, and on nothing random.
"""

import ast
import hashlib
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path

import datasets

KINDS = ("docstrings", "descriptions", "documents")
ATTRIBUTION = (
    "Docstrings, descriptions and documents of the Python standard library and of installed packages, under the "
    "licence of each."
)
HELDOUT_SHARE = 0.05
SHORTEST_DOCSTRING = 80
"""Characters; shorter ones say little more than the name of the function."""

LARGEST_FILE = 2**20
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
GENERATED = re.compile(rb"automatically generated|auto-?generated|do not edit", re.I)
"""Words of generated files, which repeat what others say."""

LICENSE_PACKAGES = ("licensedcode", "license_expression")
NO_PROSE = re.compile(r"licen[sc]e|copying|notice|authors|third.?party|requirements|(^|\W)tests?\W|conftest", re.I)
"""Names of files that hold licences, lists or tests."""

LICENSE_PHRASES = re.compile(
    r"permission is hereby granted|redistribution and use in source|terms and conditions for|"
    r"without warranty of any kind|\bwarranties or conditions\b",
    re.I,
)


def load_broad_text(
    *,
    kinds: Collection[str] = KINDS,
    split: str = "train",
    min_characters: int = 400,
    heldout_share: float = HELDOUT_SHARE,
) -> datasets.Dataset:
    """Documents of these kinds, whole, with the columns text, kind and source (the package's name).

    A file is in "train" or "heldout" by a hash of its package and name, so that files stay where they are when packages
    come or go. No document, and no docstring, is there twice, in neither split nor in both; documents of fewer than
    `min_characters` are left out. The files are read once, in about a minute, and cached until a version changes.

    Raises:
        ValueError: a kind or the split is unknown, or `heldout_share` is not between 0 and 1.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"`kinds` must be of {KINDS}, got {unknown[0]!r}.")
    if split not in ("train", "heldout"):
        raise ValueError(f"`split` must be 'train' or 'heldout', got {split!r}.")
    if not 0 <= heldout_share <= 1:
        raise ValueError(f"`heldout_share` must be from 0 to 1, got {heldout_share}.")
    # The versions decide the text, so they decide which cached copy is the right one.
    installed = sorted(f"{found.metadata['Name']} {found.version}" for found in metadata.distributions())
    versions = ", ".join([platform.python_version(), *installed])  # one string: of a list, each item would be a shard
    rows = datasets.Dataset.from_generator(read_documents, gen_kwargs={"roots": package_roots(), "versions": versions})
    columns = [rows[name][:] for name in ("kind", "size", "share")]
    wanted = [
        index
        for index, (kind, size, share) in enumerate(zip(*columns, strict=True))
        if kind in kinds and size >= min_characters and (share < heldout_share) == (split == "heldout")
    ]
    return rows.select(wanted).select_columns(["text", "kind", "source"])


def package_roots() -> dict[str, str]:
    """Folders with packages, each with the name that its files go by; "" = the name of the package's own folder."""
    paths = sysconfig.get_paths()
    return {paths["stdlib"]: "python"} | {paths[name]: "" for name in ("purelib", "platlib")}


def read_documents(roots: dict[str, str], versions: str) -> Iterator[dict]:
    """Every document of every kind, once, with its size in characters and its file's place between 0 and 1.

    `versions`: of what is installed; read by nothing but the cache, which keeps one copy for each.
    """
    readers = {
        "documents": lambda: _read_text_files(roots),
        "descriptions": _read_descriptions,
        "docstrings": lambda: read_docstrings(roots),
    }
    seen: set[bytes] = set()
    for kind, read in readers.items():
        for source, name, parts in read():
            kept = []
            for part in parts:
                digest = hashlib.sha256(part.encode("utf-8", "replace")).digest()[:16]
                if digest not in seen and not LICENSE_PHRASES.search(part):
                    seen.add(digest)
                    kept.append(part)
            if kept:
                text = "\n\n".join(kept)
                share = int.from_bytes(hashlib.sha256(f"{source}/{name}".encode()).digest()[:6]) / 2**48
                yield {"text": text, "kind": kind, "source": source, "size": len(text), "share": share}


def read_docstrings(roots: dict[str, str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield package, path below its root and docstrings of every Python file, in the same order everywhere."""
    for source, name, path in _find_files(roots, (".py",)):
        content = path.read_bytes()
        has_none = b'"""' not in content and b"'''" not in content
        if has_none or GENERATED.search(content[:2048]):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of other people's escape sequences
                tree = ast.parse(content)
        except (SyntaxError, ValueError):
            continue  # files for other versions of Python, and examples of broken code
        yield source, name, [part for part in _docstrings_in(tree) if len(part) >= SHORTEST_DOCSTRING]


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of `node` and of what its body defines; expressions, most of a file, are not visited."""
    if isinstance(node, DOCUMENTED):
        yield ast.get_docstring(node) or ""
    for statement in getattr(node, "body", ()):
        if hasattr(statement, "body"):
            yield from _docstrings_in(statement)


def _read_descriptions() -> Iterator[tuple[str, str, list[str]]]:
    for found in sorted(metadata.distributions(), key=lambda found: found.metadata["Name"] or ""):
        text = (found.metadata["Description"] or "").strip()
        yield found.metadata["Name"] or "", "description", [text] if text else []


def _read_text_files(roots: dict[str, str]) -> Iterator[tuple[str, str, list[str]]]:
    for source, name, path in _find_files(roots, (".rst", ".md", ".txt")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        letters = sum(character.isalpha() or character.isspace() for character in text)
        if text.count(" ") > 40 and letters > 0.75 * len(text):  # else tables and lists of names
            yield source, name, [text]


def _find_files(roots: dict[str, str], endings: tuple[str, ...]) -> Iterator[tuple[str, str, Path]]:
    """(package, name below its root, path) of the files that may hold prose, in the same order everywhere."""
    for root, package in roots.items():
        for folder, below, files in os.walk(root):
            below[:] = sorted(
                name
                for name in below
                if not name.startswith(("_", ".", "test"))
                and not name.endswith(("-info", "-packages"))
                and name not in LICENSE_PACKAGES
            )
            for file in sorted(files):
                path = Path(folder, file)
                inside = path.relative_to(root)
                if not file.endswith(endings) or NO_PROSE.search(file):
                    continue
                if not path.is_file() or path.stat().st_size > LARGEST_FILE:  # a link may lead nowhere
                    continue
                yield package or inside.parts[0].removesuffix(".py"), inside.as_posix(), path
