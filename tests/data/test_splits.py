"""Protects drawn splits: a lost or doubled row, a group on both sides or a class left out makes scores worthless."""

import time

import datasets
import numpy as np
import pytest

from fa_transformers.data.readers.splits import fill_splits
from fa_transformers.data.readers.tables import DataError

SHARES = {"train": 0.75, "validation": 0.1, "test": 0.15}


def make(labels, groups=None, **others) -> datasets.DatasetDict:
    """Rows with their number, a label as its type says (classes, lists of classes, numbers) and perhaps a group."""
    if isinstance(labels[0], list):
        feature = datasets.List(datasets.ClassLabel(num_classes=max(map(max, filter(None, labels))) + 1))
    elif isinstance(labels[0], float):
        feature = datasets.Value("float32")
    else:
        feature = datasets.ClassLabel(num_classes=int(max(labels)) + 1)
    features = {"row": datasets.Value("int64"), "label": feature}
    columns = {"row": np.arange(len(labels)), "label": labels}
    if groups is not None:
        features["group"], columns["group"] = datasets.Value("string"), groups
    train = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict({"train": train} | others)


def draw(labels, groups=None, seed=0, validation_share=SHARES["validation"], test_share=SHARES["test"]) -> dict:
    """The numbers of the rows of each split, checked to be disjoint and complete and in their order."""
    filled = fill_splits(make(labels, groups), validation_share, test_share, seed)
    assert list(filled) == ["train", "validation", "test"]
    assert all(part.column_names == ["row", "label"] for part in filled.values())
    rows = {split: part.with_format("numpy")["row"][:] for split, part in filled.items()}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(len(labels)))
    assert all((np.diff(numbers) > 0).all() for numbers in rows.values())
    for split, part in filled.items():
        assert part["label"][:] == [labels[row] for row in rows[split]] or isinstance(labels[0], float)
    return rows


def draw_labels(seed: int, num_rows: int = 400) -> list[int]:
    """Labels of classes from frequent to single."""
    random = np.random.default_rng(seed)
    labels = np.minimum(random.zipf(1.6, num_rows) - 1, 40)
    return np.unique(labels, return_inverse=True)[1].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_every_class_has_its_share_within_one_row(seed):
    labels = np.array(draw_labels(seed))
    rows = draw(labels.tolist(), seed=seed)
    totals = np.bincount(labels)
    counts = {split: np.bincount(labels[numbers], minlength=len(totals)) for split, numbers in rows.items()}
    for split in ("validation", "test"):
        least = np.maximum(np.floor(SHARES[split] * totals), totals >= 3).sum()
        assert len(rows[split]) == max(round(SHARES[split] * len(labels)), least)
        assert np.abs(counts[split] - SHARES[split] * totals).max() <= 1 + 1e-9
    assert (counts["train"] > 0).all() and (counts["train"][totals == 1] == 1).all()
    absent = [(totals >= 3) & (counts[split] == 0) for split in ("validation", "test")]
    assert not np.any(absent)


def test_a_drawn_split_grows_no_further_than_rare_classes_ask():
    """Ten classes of three rows: each split gets one of each, though a tenth of all rows is three."""
    rows = draw(list(range(10)) * 3)
    assert [len(numbers) for numbers in rows.values()] == [10, 10, 10]
    rows = draw([0] * 90 + [1] * 5 + [2] * 5, validation_share=0.1, test_share=0.1)
    assert [len(numbers) for numbers in rows.values()] == [78, 11, 11]
    rows = draw([0] * 20 + list(range(1, 11)), validation_share=0.1, test_share=0.1)
    assert [len(numbers) for numbers in rows.values()] == [24, 3, 3]  # all of them of class 0


def test_the_same_seed_draws_the_same_rows_and_another_seed_others():
    labels = draw_labels(0)
    first, again, other = (draw(labels, seed=seed)["test"].tolist() for seed in (1, 1, 2))
    assert first == again != other
    groups = [str(row // 3) for row in range(len(labels))]
    first, again, other = (draw(labels, groups, seed=seed)["test"].tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_several_labels_share_out_each_label_nearly_alike_and_train_keeps_all(seed):
    random = np.random.default_rng(seed)
    odds = np.array([0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.004])
    rows_of = [np.flatnonzero(random.random(8) < odds).tolist() for _ in range(500)] + [[7], [2, 7]]
    rows = draw(rows_of, seed=seed)
    totals = np.bincount(np.concatenate(rows_of).astype(int), minlength=8)
    for split in ("validation", "test"):
        assert 0 <= len(rows[split]) - round(SHARES[split] * len(rows_of)) <= 2
        counts = np.bincount(np.concatenate([rows_of[row] for row in rows[split]]).astype(int), minlength=8)
        # The hypergeometric spread of a plain draw, which four deviations hold in all of these cases by far.
        spread = np.sqrt(totals * SHARES[split])
        assert (np.abs(counts - SHARES[split] * totals) <= 1 + 3 * spread).all()
        assert abs(counts[6] - SHARES[split] * totals[6]) <= 2  # among the rarest, most rows stand for it
    kept = np.concatenate([rows_of[row] for row in rows["train"]])
    assert set(kept) == set(np.flatnonzero(totals))


def test_numbers_to_predict_are_drawn_from_all_their_range():
    values = np.random.default_rng(0).normal(size=1000) ** 3
    rows = draw(values.tolist(), validation_share=0.1, test_share=0.1)
    tenths = np.argsort(np.argsort(values)) // 100
    for split in ("validation", "test"):
        assert np.bincount(tenths[rows[split]]).tolist() == [10] * 10


@pytest.mark.parametrize("kind", ["classes", "numbers", "several"])
@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_whole_in_any_order_of_rows_and_the_shares_are_met(kind, seed):
    random = np.random.default_rng(seed)
    groups = np.minimum(random.zipf(1.5, 600), 200) * 1000 + random.integers(0, 5, 600)
    labels = {
        "classes": groups // 1000 % 3,
        "numbers": random.normal(size=600),
        "several": [sorted({int(group) // 1000 % 3, int(group) % 4}) for group in groups],
    }[kind]
    labels = labels if kind == "several" else labels.tolist()
    order = random.permutation(600)
    groups = groups[order]
    rows = draw([labels[row] for row in order], [str(group) for group in groups], seed=seed)
    of_split = {split: set(groups[numbers]) for split, numbers in rows.items()}
    assert sum(map(len, of_split.values())) == len(set(groups))
    smallest = np.bincount(np.unique(groups, return_inverse=True)[1]).min()
    for split in ("validation", "test"):
        assert abs(len(rows[split]) - SHARES[split] * 600) <= smallest


def test_groups_of_one_class_are_shared_out_like_rows():
    """60 groups of 5 rows, each of one of three classes: every class has its share of groups within one and a half."""
    groups = np.repeat(np.arange(60), 5)
    rows = draw((groups % 3).tolist(), [f"family {group}" for group in groups])
    for split in ("validation", "test"):
        counts = np.bincount(groups[rows[split]] % 3, minlength=3) / 5
        assert len(rows[split]) == round(SHARES[split] * 300)
        assert (np.abs(counts - SHARES[split] * 20) <= 1.5).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_one_group_stays_in_train(seed):
    groups = np.arange(80) // 4
    labels = np.where(groups < 10, groups, 10 + groups % 2)
    rows = draw(labels.tolist(), [str(group) for group in groups], seed=seed)
    assert set(labels[rows["train"]]) == set(range(12)) and set(range(40)) <= set(rows["train"])
    assert len(rows["validation"]) == 8 and len(rows["test"]) == 12


def test_train_keeps_a_label_that_rarer_ones_stand_for():
    """Label 2 is in two rows, each with a label as rare; some of the draws would take both."""
    rows_of = [[0, 2], [1, 2], [0], [1], [3], [3], [3], [3]]
    for seed in range(20):
        rows = draw(rows_of, seed=seed, validation_share=0.25, test_share=0.25)
        assert {label for row in rows["train"] for label in rows_of[row]} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([0, 1], None, "2 rows are too few to draw validation and test from"),
        (list(range(30)), None, "30 rows are too few to draw .*, as train keeps a row of each class \\(30 classes\\)"),
        ([0, 1] * 10, ["a", "b"] * 10, "groups of --group_column are too few to draw validation and test"),
        ([0, 1] * 10, ["a", None] * 10, r"row 2: the group is missing \(10 such rows\).*--group_column"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_that_says_why(labels, groups, message):
    with pytest.raises(DataError, match=message):
        draw(labels, groups)


def test_three_groups_are_enough_for_three_splits():
    rows = draw([0, 1] * 9, [str(row // 6) for row in range(18)])
    assert sorted(map(len, rows.values())) == [6, 6, 6]


def test_a_given_split_is_kept_and_groups_are_left_out_of_it():
    part = make([0, 1, 0], ["a", "b", "c"])["train"]
    filled = fill_splits(make([0, 1] * 20, ["x"] * 40, validation=part), 0.1, 0.1, 0)
    assert {split: (len(rows), rows.column_names) for split, rows in filled.items()} == {
        "train": (40, ["row", "label"]),
        "validation": (3, ["row", "label"]),
    }
    filled = fill_splits(make([0, 1] * 20, test=part), 0.1, 0.1, 0)
    assert {split: len(rows) for split, rows in filled.items()} == {"train": 36, "validation": 4, "test": 3}


def test_a_million_rows_of_a_hundred_thousand_classes_take_seconds():
    """A tenth of that here, within a bound that a class-by-class pass over rows would exceed by far."""
    labels = (np.random.default_rng(0).zipf(1.3, 100_000) % 10_000).tolist()
    dataset = make(labels)
    started = time.perf_counter()
    fill_splits(dataset, 0.1, 0.1, 0)
    assert time.perf_counter() - started < 5
