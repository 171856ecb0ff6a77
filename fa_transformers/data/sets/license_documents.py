"""Long-document classification data: 2172 licence texts in seven categories, from the packaged `licensedcode-data`.

The texts run from 20 to 19,133 BERT tokens (median 471), so a model of 512 positions sees only the head of many. The
label is the category that the ScanCode project gave the licence. Nothing is random: one package version gives the same
bytes, and every split's sha256 is checked whenever it is read.

Many licences are near copies of each other, so a random split would leak. Documents are put in families, and a family
is never cut by the split: two documents are relatives if their keys have the same stem (the part before the first
version number) or if the Jaccard similarity of their sets of 3-word shingles is at least 0.5, transitively.
"""

import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from ...files import write_bytes

logger = logging.getLogger(__name__)

PACKAGE = "licensedcode-data"
PACKAGE_VERSION = "32.1.0"
INSTALL_COMMAND = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
LICENSE = "cc-by-4.0"
ATTRIBUTION = (
    f"Licence texts and categories of the ScanCode LicenseDB, package {PACKAGE} {PACKAGE_VERSION}, (c) nexB Inc. and "
    "AboutCode contributors, CC-BY-4.0, https://scancode-licensedb.aboutcode.org. The licence texts themselves are "
    "documents of their respective authors."
)

LABELS = [
    "Permissive",
    "Copyleft Limited",
    "Copyleft",
    "Proprietary Free",
    "Commercial",
    "Free Restricted",
    "Source-available",
]
SPLIT_SHARES = {"train": 0.70, "validation": 0.10, "test": 0.20}
SPLIT_SHA256 = {
    "train": "7e57681fbfd4433e0174547c56b7b70f2dd834438fcb74ef31dc4edb3dd609c1",
    "validation": "4c15d30bc1498199f8b7f8dbac4cd62802e615932598f7e3d1a2ff9bfe9ff44e",
    "test": "819a46ea238dee0d24cf4a745cb20c2ae2eaaf30eb51b54badd2504c86901085",
}
COLUMNS = ("text", "label", "key", "family")
SHINGLE_WORDS = 3
# Larger families go to train whole, so that no family dominates a score.
MAX_EVALUATION_FAMILY = 12

Document = dict[str, str]


def load_license_documents(cache_dir: str | Path | None = None) -> datasets.DatasetDict:
    """The licence documents as train (1521), validation (217), test (434); columns text, label (a name), key, family.

    The set is built once (a few seconds) and kept as JSON lines in `cache_dir`, by default a folder in the cache of
    Hugging Face. A kept file whose sha256 isn't the expected one is built again, with a warning.

    Raises ModuleNotFoundError if `licensedcode-data` isn't installed, ImportError if it has another version, and
    RuntimeError if its files were changed, so that the built set isn't the expected one.
    """
    cache_dir = Path(cache_dir) if cache_dir else Path(datasets.config.HF_CACHE_HOME) / "fa_transformers"
    folder = cache_dir / f"license-documents-{PACKAGE_VERSION}"
    paths = {split: folder / f"{split}.jsonl" for split in SPLIT_SHA256}
    if not all(_is_intact(path, SPLIT_SHA256[split]) for split, path in paths.items()):
        for split, content in build_license_documents().items():
            if hashlib.sha256(content).hexdigest() != SPLIT_SHA256[split]:
                raise RuntimeError(
                    f"the licence documents built from {PACKAGE} {PACKAGE_VERSION} differ from the expected ones in "
                    f"the split {split!r}: the installed package was changed. Install it again: "
                    f"{INSTALL_COMMAND} --force-reinstall"
                )
            write_bytes(paths[split], content)
    features = datasets.Features({column: datasets.Value("string") for column in COLUMNS})
    return datasets.load_dataset(
        "json",
        data_files={split: str(path) for split, path in paths.items()},
        features=features,
        cache_dir=str(cache_dir / "arrow"),
    )


def build_license_documents() -> dict[str, bytes]:
    """The JSON lines of every split, built from the installed package; needs no network and nothing random."""
    documents = list(_read_documents())
    _add_families(documents)
    splits = _assign_splits(documents)
    return {
        name: "".join(
            json.dumps({column: document[column] for column in COLUMNS}, ensure_ascii=False) + "\n"
            for document, split in zip(documents, splits, strict=True)
            if split == name
        ).encode("utf-8")
        for name in SPLIT_SHARES
    }


def _is_intact(path: Path, sha256: str) -> bool:
    if not path.exists():
        return False
    if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return True
    logger.warning("%s is damaged (its sha256 isn't the expected one): it is built again", path)
    return False


def _package_folder() -> Path:
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the licence documents are read from the package {PACKAGE}, which isn't installed: {INSTALL_COMMAND}"
        ) from error
    if distribution.version != PACKAGE_VERSION:
        raise ImportError(
            f"the licence documents need {PACKAGE} {PACKAGE_VERSION}, but {distribution.version} is installed and "
            f"would give other documents: {INSTALL_COMMAND}"
        )
    return Path(str(distribution.locate_file("licensedcode/data/licenses")))


def _read_documents() -> Iterator[Document]:
    """English licences of the seven categories, without placeholders, in the order of their file names."""
    for path in sorted(_package_folder().glob("*.LICENSE")):
        facts, text = _parse_license(path.read_text(encoding="utf-8"))
        if not text or facts.get("category") not in LABELS or facts.get("language", "en") != "en":
            continue
        if facts.get("is_unknown") or facts.get("is_generic"):
            continue
        yield {"text": text, "label": facts["category"], "key": facts["key"]}


def _parse_license(content: str) -> tuple[dict[str, str], str]:
    """The front matter's flat `name: value` lines, and the body; ({}, "") if there is no front matter."""
    parts = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n(.*))?\Z", content, re.DOTALL)
    if not parts:
        return {}, ""
    facts = {}
    for line in parts.group(1).splitlines():
        fact = re.match(r"([a-z_]+):[ \t]*(.*)$", line)
        if fact:
            facts[fact.group(1)] = fact.group(2).strip().strip("'\"")
    return facts, (parts.group(2) or "").strip()


def _add_families(documents: list[Document]) -> None:
    """Give each document its `family`: the key of the first document that it is related to, directly or not."""
    stems = [re.split(r"[-_]v?\d", document["key"])[0] for document in documents]
    first_with_stem = {stem: index for index, stem in reversed(list(enumerate(stems)))}
    same_stem = [(index, first_with_stem[stem]) for index, stem in enumerate(stems)]
    pairs = np.array(same_stem + _similar_pairs([document["text"] for document in documents]))
    graph = sparse.coo_array((np.ones(len(pairs)), pairs.T), shape=(len(documents), len(documents)))
    _, components = connected_components(graph, directed=False)
    _, first_members = np.unique(components, return_index=True)
    for document, component in zip(documents, components, strict=True):
        document["family"] = documents[first_members[component]]["key"]


def _similar_pairs(texts: list[str]) -> list[tuple[int, int]]:
    """Pairs of texts whose sets of 3-word shingles A, B have Jaccard similarity |A ∩ B| / |A ∪ B| >= 1/2.

    All the |A ∩ B| of one text are a row of M Mᵀ, where M is the 0/1 matrix of texts × shingles; in integers the
    condition is 3 |A ∩ B| >= |A| + |B|, so that no rounding decides about a pair.
    """
    numbers: dict[str, int] = {}
    shingles = [sorted({numbers.setdefault(s, len(numbers)) for s in _word_shingles(text)}) for text in texts]
    sizes = np.array([len(members) for members in shingles])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    matrix = sparse.csr_array(
        (np.ones(offsets[-1], dtype=np.int32), np.concatenate(shingles), offsets), shape=(len(texts), len(numbers))
    )
    transposed = matrix.T.tocsr()
    rows_at_once = 64
    pairs: list[tuple[int, int]] = []
    for start in tqdm(range(0, len(texts), rows_at_once), desc="comparing licence texts", unit_scale=rows_at_once):
        shared = (matrix[start : start + rows_at_once] @ transposed).tocoo()
        rows, columns = shared.row + start, shared.col
        similar = 3 * shared.data >= sizes[rows] + sizes[columns]
        pairs.extend(zip(rows[similar].tolist(), columns[similar].tolist(), strict=True))
    return pairs


def _word_shingles(text: str) -> set[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _assign_splits(documents: list[Document]) -> list[str]:
    """The split of each document: whole families, largest first, each to where its labels lack most.

    The cost of a split is the sum over labels of share · (count / (share · total))², so a family goes where it adds
    the least; ties between families of one size are ordered by the sha256 of their names.
    """
    families: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        families[document["family"]].append(document)
    totals = Counter(document["label"] for document in documents)
    counts: dict[str, Counter] = {split: Counter() for split in SPLIT_SHARES}
    split_of_family = {}

    def added_cost(split: str, family_counts: Counter) -> float:
        share = SPLIT_SHARES[split]
        return share * sum(
            ((counts[split][label] + added) / (share * totals[label])) ** 2
            - (counts[split][label] / (share * totals[label])) ** 2
            for label, added in family_counts.items()
        )

    order = sorted(families, key=lambda name: (-len(families[name]), hashlib.sha256(name.encode()).hexdigest()))
    for name in order:
        family_counts = Counter(document["label"] for document in families[name])
        if len(families[name]) > MAX_EVALUATION_FAMILY:
            split = "train"
        else:
            split = min(SPLIT_SHARES, key=lambda candidate: added_cost(candidate, family_counts))
        counts[split].update(family_counts)
        split_of_family[name] = split
    return [split_of_family[document["family"]] for document in documents]
