"""Two sets of labelled English prose that every installation brings along: what a piece of Python's manuals is about.

`docstrings`  short: a docstring of 200 to 2,000 characters (median 120 tokens); its label is the project, of ten
`modules`     long: the docstrings of a file, one after the other (median 2,000 tokens); its label is the part of the
              project, such as "scipy.stats", of sixteen

The names of projects, of their parts and the usual abbreviations are masked, so that the text itself has to tell. A
file is in one split alone. What comes out depends on the versions that are installed, which `constraints.txt` fixes,
and on nothing random.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

import datasets

from .broad_text import ATTRIBUTION, package_roots, read_docstrings

__all__ = ["ATTRIBUTION", "KINDS", "load_python_docs"]

Kind = Literal["docstrings", "modules"]
KINDS = ("docstrings", "modules")
PROJECTS = {
    "matplotlib": "mpl plt pyplot", "networkx": "nx", "numpy": "np ndarray", "pandas": "pd", "python": "cpython",
    "scipy": "sp", "sklearn": "scikit", "sympy": "", "torch": "pytorch",
    "transformers": "huggingface",
}  # fmt: skip
"""Project -> what else it goes by."""
PARTS = (
    "networkx.algorithms", "pandas.core", "scipy.linalg", "scipy.optimize", "scipy.sparse", "scipy.stats",
    "sympy.core", "sympy.functions", "sympy.physics", "sympy.polys", "torch.ao", "torch.distributed", "torch.fx",
    "torch.nn", "torch.utils", "transformers.models",
)  # fmt: skip
CHARACTERS = {"docstrings": (200, 2_000), "modules": (3_000, 2**20)}
PER_CLASS = {"docstrings": 290, "modules": 60}
"""Most documents of a class, so that none of them weighs much more than another."""
PER_FILE = 12
"""Most docstrings of a file, so that a large one does not fill a split."""
SPLITS = (("train", 0.7), ("validation", 0.8), ("test", 1.0))
"""Splits, with the share of the files of a class at which each ends."""
MASK = "NAME"
_WORD = re.compile(r"[A-Za-z]+")


def load_python_docs(kind: Kind) -> datasets.DatasetDict:
    """Return the splits train, validation and test of one kind, with the columns text and label (a name).

    Raises:
        ValueError: the kind is unknown.
        RuntimeError: a class has no document, as its project is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}.")
    classes = tuple(PROJECTS) if kind == "docstrings" else PARTS
    words = {word for name in (*PROJECTS, *PARTS) for word in name.split(".")}
    words |= {word for others in PROJECTS.values() for word in others.split()}
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for label, file, texts in _documents(kind):
        if label in classes and texts:
            found[label][file] = texts
    if missing := [label for label in classes if not found[label]]:
        raise RuntimeError(f"there is no prose of {missing[0]!r}: install the extras that `make` installs.")
    rows: dict[str, list[dict]] = {split: [] for split, _ in SPLITS}
    for label in classes:
        for split, texts in _split(found[label], PER_CLASS[kind]).items():
            rows[split] += [{"text": _mask(text, words), "label": label} for text in texts]
    return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in rows.items()})


def _mask(text: str, words: set[str]) -> str:
    return _WORD.sub(lambda found: MASK if found.group().lower() in words else found.group(), text)


def _documents(kind: Kind) -> Iterator[tuple[str, str, list[str]]]:
    """Yield label, file and documents of every file; of files with the same text, the first."""
    shortest, longest = CHARACTERS[kind]
    seen: set[str] = set()
    for project, file, docstrings in read_docstrings(package_roots()):
        new = [text for text in docstrings if text not in seen]
        seen.update(new)
        if kind == "docstrings":
            yield project, file, [text for text in new if shortest <= len(text) <= longest][:PER_FILE]
        else:
            folders = file.split("/")
            whole = "\n\n".join(new)
            yield ".".join(folders[:2]), file, [whole] if shortest <= len(whole) <= longest else []


def _split(files: dict[str, list[str]], most: int) -> dict[str, list[str]]:
    """Share the files of a class out in the order of their names' hashes, at most `most` documents in all."""
    order = sorted(files, key=lambda file: hashlib.sha256(file.encode()).digest())
    total = min(most, sum(map(len, files.values())))
    parts: dict[str, list[str]] = {split: [] for split, _ in SPLITS}
    taken = 0
    for file in order:
        split = next(name for name, end in SPLITS if taken < end * total or end == 1.0)
        texts = files[file][: total - taken]
        parts[split] += texts
        taken += len(texts)
    return parts
