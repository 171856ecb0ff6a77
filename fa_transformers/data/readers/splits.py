"""The draw of missing splits from train: stratified by label, by whole groups where rows have one, seeded.

Time and memory are linear in rows and classes, but for a sort.
"""

import logging
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.compute

from ...tables import counted
from .tables import DataError

logger = logging.getLogger(__name__)

REGRESSION_STRATA = 10
"""Quantiles of a number to predict that a draw takes its share of each from."""
MOST_MOVES = 100
"""Moves of whole groups, for each drawn split, that bring its size nearer to its share."""


def fill_splits(
    dataset: datasets.DatasetDict, validation_share: float, test_share: float, seed: int
) -> datasets.DatasetDict:
    """Draw a missing "validation" from "train", and a missing "test" too if neither of the two was given.

    A drawn split has of each class the exact share rounded up or down, and `round(share * rows)` rows in all, or a few
    more: a class of three or more rows is in every split. Train keeps a row of each class, so a class of one row stays
    there. Rows of several labels stand for their rarest one, numbers to predict for the tenth of all rows that they
    fall in. Rows keep their order.

    Where train has a column "group", whole groups are drawn: no group is in two splits, and the sizes and classes are
    met as nearly as whole groups allow. The column is left out of the result.

    Raises:
        DataError: a share is not between 0 and 0.5, there are too few rows or groups, or a row's group is missing.
    """
    shares = {"validation": validation_share, "test": test_share}
    if "validation" in dataset:
        return _without_groups(dataset)
    if "test" in dataset:
        del shares["test"]
    for split, share in shares.items():
        if not 0 < share < 0.5:
            raise DataError(f"{split}_share must lie between 0 and 0.5, got {share}; or give a {split} file")
    train = dataset["train"]
    counts = [max(1, round(share * len(train))) for share in shares.values()]
    if sum(counts) >= len(train):
        raise DataError(
            f"{counted(len(train), 'row', 'is', 'are')} too few to draw {' and '.join(shares)} from: give more rows or "
            "own files"
        )
    drawn = _draw(train, np.array(list(shares.values())), np.array(counts), seed)
    filled = dict(dataset) | {"train": train.select(np.flatnonzero(drawn == 0))}
    for number, split in enumerate(shares, start=1):
        filled[split] = train.select(np.flatnonzero(drawn == number))
        if not len(filled[split]):
            raise DataError(_too_few(train, list(shares)))
        logger.warning(
            "no %s data was given: %s drawn from train with seed %d",
            split,
            counted(len(filled[split]), "row", "was", "were"),
            seed,
        )
    return _without_groups(
        datasets.DatasetDict({split: filled[split] for split in ("train", "validation", "test") if split in filled})
    )


def count_classes(part: datasets.Dataset) -> np.ndarray:
    """Return the rows of each class of the column "label", [classes]; a row of several labels counts for each."""
    feature = part.features["label"]
    num_classes = getattr(feature, "feature", feature).num_classes
    return np.bincount(_read_labels(part, 1, np.random.default_rng(0))[1], minlength=num_classes)


def _too_few(train: datasets.Dataset, splits: list[str]) -> str:
    wanted = " and ".join(splits)
    if "group" in train.column_names:
        return (
            f"the groups of --group_column are too few to draw {wanted} from by whole groups "
            f"({counted(len(train), 'row')}, and train keeps a group of each class): give more groups, own files for "
            f"{wanted}, or leave --group_column off"
        )
    feature = train.features["label"]
    names = getattr(getattr(feature, "feature", feature), "names", ())
    are_numbers = "; numbers to predict go by --problem_type regression" if all(map(str.isdecimal, names)) else ""
    return (
        f"{counted(len(train), 'row', 'is', 'are')} too few to draw {wanted} from, as train keeps a row of each class "
        f"({counted(len(names), 'class')}): give more rows of each class or own files{are_numbers}"
    )


def _without_groups(dataset: datasets.DatasetDict) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {
            split: part.remove_columns("group") if "group" in part.column_names else part
            for split, part in dataset.items()
        }
    )


class _Units(NamedTuple):
    """The units that are drawn whole, rows or groups: the rows of each, and the labels that occur in it, as pairs."""

    sizes: np.ndarray
    units: np.ndarray
    labels: np.ndarray

    def strata(self) -> np.ndarray:
        """Return the number of each unit's rarest label, by units, or one past the last label where it has none."""
        counts = np.bincount(self.labels)
        by_rarity = np.argsort(counts, kind="stable")
        rarity = np.empty(len(counts), np.int64)
        rarity[by_rarity] = np.arange(len(counts))
        rarest = np.full(len(self.sizes), len(counts))
        np.minimum.at(rarest, self.units, rarity[self.labels])
        return np.append(by_rarity, len(counts))[rarest]


def _draw(train: datasets.Dataset, shares: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Return for each row the number of its split: 0 stays in train, 1 is the first drawn split."""
    random = np.random.default_rng(seed)
    is_grouped = "group" in train.column_names
    rows, labels = _read_labels(train, 1 if is_grouped else max(1, min(REGRESSION_STRATA, counts.min())), random)
    if not is_grouped:
        units = _Units(np.ones(len(train), np.int64), rows, labels)
        strata = units.strata()
        kept = np.arange(strata.max() + 1) <= labels.max(initial=-1)  # all rows without a label may be drawn
        return _keep_classes(units, _draw_rows(strata, kept, shares, counts, random))
    unit_of = _read_groups(train)
    pairs = np.unique(np.stack([unit_of[rows], labels]), axis=1)
    units = _Units(np.bincount(unit_of), *pairs)
    return _draw_groups(units, counts, random)[unit_of]


def _read_labels(train: datasets.Dataset, num_bins: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of a row and a label of it; of a number to predict the label is its quantile of `num_bins`."""
    feature = train.features["label"]
    column = train.select_columns("label").with_format("arrow")[:]["label"]
    rows = np.arange(len(train))
    if isinstance(feature, datasets.ClassLabel):
        return rows, column.to_numpy().astype(np.int64)
    if isinstance(getattr(feature, "feature", None), datasets.ClassLabel):
        lengths = pyarrow.compute.list_value_length(column).to_numpy()
        return np.repeat(rows, lengths), pyarrow.compute.list_flatten(column).to_numpy().astype(np.int64)
    ranks = np.empty(len(train), np.int64)
    ranks[np.lexsort((random.random(len(train)), column.to_numpy()))] = rows
    return rows, ranks * num_bins // len(train)


def _read_groups(train: datasets.Dataset) -> np.ndarray:
    """Return the number of each row's group."""
    column = train.select_columns("group").with_format("arrow")[:]["group"].combine_chunks()
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"train, row {row + 1}: the group is missing ({column.null_count} such rows); give each row one, or leave "
            "--group_column off"
        )
    return column.dictionary_encode().indices.to_numpy().astype(np.int64)


def _draw_rows(
    strata: np.ndarray, kept: np.ndarray, shares: np.ndarray, counts: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Return the number of each row's split; train keeps `kept` rows of each stratum."""
    stratum_sizes = np.bincount(strata)
    limits = np.cumsum(_share_out(stratum_sizes, kept, shares, counts, random), axis=0)
    order = np.lexsort((random.random(len(strata)), strata))
    starts = np.cumsum(stratum_sizes) - stratum_sizes
    places = np.arange(len(strata)) - starts[strata[order]]
    drawn = np.zeros(len(strata), np.int64)
    for number, limit in reversed(list(enumerate(limits, start=1))):
        drawn[order[places < limit[strata[order]]]] = number
    return drawn


def _share_out(
    sizes: np.ndarray, kept: np.ndarray, shares: np.ndarray, counts: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Return the rows that each drawn split takes of each stratum, [splits, strata]."""
    quotas = shares[:, None] * sizes
    is_wanted = sizes > len(shares)  # a row for each split and one for train
    taken = np.zeros((len(shares), len(sizes)), np.int64)
    for number, (quota, count) in enumerate(zip(quotas, counts, strict=True)):
        least_later = np.maximum(np.floor(quotas[number + 1 :]), is_wanted).sum(axis=0).astype(np.int64)
        room = np.maximum(0, sizes - kept - taken.sum(axis=0) - least_later)
        taken[number] = _round_quotas(quota, room, count, is_wanted, random)
    return taken


def _round_quotas(
    quota: np.ndarray, room: np.ndarray, count: int, is_wanted: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Round quotas up or down, largest remainders up, so that their sum is `count`; none is above its `room`.

    Wanted strata get a row each, and where that is more than `count` the sum is more.
    """
    least = np.maximum(np.floor(quota + 1e-9), is_wanted).astype(np.int64)  # 0.29 * 100 is a little less than 29
    taken = np.minimum(least, room)
    order = np.lexsort((random.random(len(quota)), taken - quota))
    order = order[(taken < room)[order]]
    taken[order[: max(0, count - taken.sum())]] += 1
    return taken


def _keep_classes(units: _Units, drawn: np.ndarray) -> np.ndarray:
    """Move a unit of each label that train lacks back to train."""
    is_kept = np.zeros(units.labels.max(initial=-1) + 1, bool)
    is_kept[units.labels[drawn[units.units] == 0]] = True
    lacking, first = np.unique(np.where(is_kept[units.labels], -1, units.labels), return_index=True)
    drawn[units.units[first[lacking >= 0]]] = 0
    return drawn


def _draw_groups(units: _Units, counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the number of each group's split.

    Groups of one stratum stand together, and each goes to the split that lacks most rows of its share so far, so that
    every stretch of strata is shared out alike. Train keeps a group of each label.
    """
    sizes = units.sizes
    wanted = np.array([sizes.sum() - counts.sum(), *counts])
    order = np.lexsort((random.random(len(sizes)), units.strata()))
    drawn = np.zeros(len(sizes), np.int64)
    shares, lacks = (wanted / wanted.sum()).tolist(), [0.0] * len(wanted)
    for unit, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        lacks = [lack + share * size for lack, share in zip(lacks, shares, strict=True)]
        drawn[unit] = number = lacks.index(max(lacks))
        lacks[number] -= size
    drawn = _keep_classes(units, drawn)
    for number, count in enumerate(counts, start=1):
        _move_groups(units, drawn, number, count)
    return drawn


def _move_groups(units: _Units, drawn: np.ndarray, number: int, count: int) -> None:
    """Move groups between train and a drawn split while that brings it nearer to `count` rows; none is left empty."""
    for _ in range(MOST_MOVES):
        lack = count - units.sizes[drawn == number].sum()
        source = 0 if lack > 0 else number
        can_move = drawn == source
        if not lack or np.count_nonzero(can_move) == 1:
            return
        if source == 0:  # train keeps a group of each label
            in_train = drawn[units.units] == 0
            kept = np.bincount(units.labels[in_train], minlength=units.labels.max(initial=-1) + 1)
            can_move[units.units[in_train & (kept[units.labels] == 1)]] = False
        candidates = np.flatnonzero(can_move)
        if not len(candidates):
            return
        errors = np.abs(abs(lack) - units.sizes[candidates])
        best = int(errors.argmin())
        if errors[best] >= abs(lack) and (drawn == number).any():
            return
        drawn[candidates[best]] = number if source == 0 else 0
