"""ListOps as Long Range Arena draws it: nested operations on digits, whose value is one of ten classes.

    [MAX 2 9 [MIN 4 7 ] 0 ]  ->  9

A tree is drawn from its root at depth 1. A node above depth 10 is a digit with probability 3/4, else an operation on 2
to 10 nodes; a node at depth 10 is a digit. Operations are MIN, MAX, MED (the median, rounded down) and SM (the sum
modulo 10). Digits, operations and numbers of nodes are uniform. Trees of 501 to 1,999 tokens are kept, each once: a
digit is one token, an operation two, its name and the X that closes it.

Trees are drawn level by level, many at a time. That changes nothing of their distribution, because all draws of a node
are independent of those of others; and a tree that is bound to be too long is left before its size explodes.

Rules: Tay et al. 2021, arXiv:2011.04006, after Nangia and Bowman 2018, arXiv:1804.06028.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

OPERATORS = ("MIN", "MAX", "MED", "SM")
VOCABULARY = ("[PAD]", *map(str, range(10)), *OPERATORS, "X")
FIRST_DIGIT, FIRST_OPERATOR, CLOSE = 1, 11, 15
NUM_CLASSES = 10
MAX_DEPTH = 10
DIGIT_SHARE = 0.75
MIN_NODES, MAX_NODES = 2, 10
SHORTEST, LONGEST = 501, 1999
OFFICIAL_SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}
TREES_AT_ONCE = 4096


@dataclass
class _Level:
    """The nodes of one depth of many trees, siblings side by side. `operator` is -1 at digits."""

    tree: np.ndarray
    parent: np.ndarray
    operator: np.ndarray
    digit: np.ndarray


def load_listops(
    sizes: dict[str, int] | None = None, seed: int = 0, *, shortest: int = SHORTEST, longest: int = LONGEST
) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """Token ids (places in `VOCABULARY`) and values of each split, all trees different.

    The smaller splits are drawn first, so that a smaller train split is the beginning of a larger one beside the same
    test split. About 40 s on one CPU core for the official sizes, which are the default.

    Raises:
        ValueError: a size is below 1, or no tree can have from `shortest` to `longest` tokens.
    """
    sizes = dict(OFFICIAL_SIZES if sizes is None else sizes)
    if min(sizes.values()) < 1:
        raise ValueError(f"`sizes` must be at least 1 each, got {sizes}.")
    if not 1 <= shortest <= longest:
        raise ValueError(f"`shortest` ({shortest}) must be at least 1 and at most `longest` ({longest}).")
    found = _different_trees(np.random.default_rng(seed), shortest, longest, sum(sizes.values()))
    splits = {}
    for split in sorted(sizes, key=lambda name: sizes[name]):
        rows = [next(found) for _ in range(sizes[split])]
        splits[split] = [tokens for tokens, _ in rows], np.array([value for _, value in rows])
    return {split: splits[split] for split in sizes}


def _different_trees(
    random: np.random.Generator, shortest: int, longest: int, count: int
) -> Iterator[tuple[np.ndarray, int]]:
    seen: set[bytes] = set()
    with tqdm(total=count, desc="drawing ListOps trees", unit="tree") as bar:
        while True:
            for tokens, value in draw_trees(random, shortest, longest):
                if tokens.tobytes() not in seen:
                    seen.add(tokens.tobytes())
                    bar.update()
                    yield tokens, value


def draw_trees(
    random: np.random.Generator, shortest: int = SHORTEST, longest: int = LONGEST, count: int = TREES_AT_ONCE
) -> list[tuple[np.ndarray, int]]:
    """Draw `count` trees; return the tokens [length] and the value of those neither too short nor too long."""
    levels, lengths = _draw_levels(random, longest, count)
    kept = (lengths >= shortest) & (lengths <= longest)
    levels = _keep(levels, kept)
    if not levels:
        return []
    values, sizes = _evaluate(levels)
    tokens, ends = _write_tokens(levels, sizes)
    return list(zip(np.split(tokens, ends[:-1]), values.tolist(), strict=True))


def _draw_levels(random: np.random.Generator, longest: int, count: int) -> tuple[list[_Level], np.ndarray]:
    """The levels of `count` trees and their lengths; a tree that is too long has no nodes below where that was seen."""
    lengths = np.zeros(count, dtype=np.int64)
    tree = parent = np.arange(count)
    levels = []
    for depth in range(1, MAX_DEPTH + 1):
        is_digit = random.random(len(tree)) < DIGIT_SHARE if depth < MAX_DEPTH else np.ones(len(tree), dtype=bool)
        operator = np.where(is_digit, -1, random.integers(len(OPERATORS), size=len(tree)))
        num_nodes = np.where(is_digit, 0, random.integers(MIN_NODES, MAX_NODES + 1, size=len(tree)))
        levels.append(_Level(tree, parent, operator, random.integers(10, size=len(tree))))
        lengths += np.bincount(tree, np.where(is_digit, 1, 2), minlength=count).astype(np.int64)
        expected = lengths + np.bincount(tree, num_nodes, minlength=count)  # every node has a token or more
        num_nodes[expected[tree] > longest] = 0
        lengths = np.maximum(lengths, np.where(expected > longest, expected, 0).astype(np.int64))
        tree, parent = np.repeat(tree, num_nodes), np.repeat(np.arange(len(tree)), num_nodes)
    return levels, lengths


def _keep(levels: list[_Level], kept: np.ndarray) -> list[_Level]:
    """The levels of the kept trees alone, without empty ones."""
    number = np.cumsum(kept) - 1
    result, row = [], number  # of the level above: the root's parent is its tree
    for level in levels:
        mask = kept[level.tree]
        if not mask.any():
            break
        parts = (number[level.tree], row[level.parent], level.operator, level.digit)
        result.append(_Level(*(part[mask] for part in parts)))
        row = np.cumsum(mask) - 1
    return result


def _evaluate(levels: list[_Level]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The values of the roots, and the number of tokens of each level's nodes."""
    values = levels[-1].digit
    sizes = [np.ones(len(values), dtype=np.int64)]
    for level, below in zip(levels[-2::-1], levels[:0:-1], strict=True):
        count = np.bincount(below.parent, minlength=len(level.tree))
        node_sizes = np.where(level.operator < 0, 1, 2) + np.bincount(below.parent, sizes[0], minlength=len(count))
        ordered = values[np.lexsort((values, below.parent))]  # the nodes of each parent from low to high
        starts = np.cumsum(count) - count
        is_operation = level.operator >= 0
        start, last = starts[is_operation], (starts + count - 1)[is_operation]
        results = np.select(
            [level.operator[is_operation] == index for index in range(4)],
            [
                ordered[start],
                ordered[last],
                (ordered[(start + last) // 2] + ordered[(start + last + 1) // 2]) // 2,
                np.add.reduceat(ordered, start) % 10 if len(start) else start,
            ],
        )
        values = level.digit.copy()
        values[is_operation] = results
        sizes.insert(0, node_sizes.astype(np.int64))
    return values, sizes


def _write_tokens(levels: list[_Level], sizes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All trees' tokens in a row, in reading order, and where each tree ends."""
    ends = np.cumsum(sizes[0])
    tokens = np.zeros(ends[-1], dtype=np.uint8)
    place = np.zeros(len(ends), dtype=np.int64)  # of each parent's first node; of roots, tree by tree
    for level, size in zip(levels, sizes, strict=True):
        before = np.cumsum(size) - size  # tokens of the nodes before, of which those of other parents don't count
        is_first = np.diff(level.parent, prepend=-1) != 0
        if level is not levels[0]:
            offset = before - np.repeat(before[is_first], np.diff(np.append(np.flatnonzero(is_first), len(size))))
            starts = place[level.parent] + offset
        else:
            starts = before
        is_digit = level.operator < 0
        tokens[starts] = np.where(is_digit, FIRST_DIGIT + level.digit, FIRST_OPERATOR + level.operator)
        tokens[(starts + size - 1)[~is_digit]] = CLOSE
        place = starts + 1
    return tokens, ends
