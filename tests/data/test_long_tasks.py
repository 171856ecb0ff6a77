"""Protects the generated long-range tasks: their labels, by oracles of their own, their rules, and their splits."""

import numpy as np
import pytest

from fa_transformers.data.sets import listops, needle, pathfinder

WORDS = ["this", "licence", "permits", "copying", ",", "sale", "and", "use", "of", "the", "work", "."]


def evaluate_words(words: list[str]) -> int:
    """Value of a ListOps expression, by recursion over its words."""

    def read(at: int) -> tuple[int, int]:
        if words[at].isdigit():
            return int(words[at]), at + 1
        operator, values, at = words[at], [], at + 1
        while words[at] != "X":
            value, at = read(at)
            values.append(value)
        results = {"MIN": min, "MAX": max, "MED": lambda v: int(np.median(v)), "SM": lambda v: sum(v) % 10}
        return results[operator](values), at + 1

    value, end = read(0)
    assert end == len(words), "words are left over"
    return value


def depth_and_widths(words: list[str]) -> tuple[int, list[int]]:
    """The deepest node's depth (the root's is 1) and the number of nodes of every operation."""
    widths, open_counts, deepest = [], [], 1
    for word in words:
        if word == "X":
            widths.append(open_counts.pop())
            continue
        if open_counts:
            open_counts[-1] += 1
        deepest = max(deepest, len(open_counts) + 1)
        if word in listops.OPERATORS:
            open_counts.append(0)
    return deepest, widths


@pytest.fixture(scope="module")
def trees():
    """All that is kept of 20,480 draws: some 1,700 trees."""
    random = np.random.default_rng(0)
    return [tree for _ in range(5) for tree in listops.draw_trees(random)]


def as_words(tokens: np.ndarray) -> list[str]:
    return [listops.VOCABULARY[token] for token in tokens]


def test_listops_values_are_those_of_an_independent_evaluator(trees):
    for tokens, value in trees[:300]:
        assert evaluate_words(as_words(tokens)) == value
    small = listops.draw_trees(np.random.default_rng(1), shortest=1, longest=30)
    assert {len(tokens) for tokens, _ in small} >= {1, 4, 5}
    assert all(evaluate_words(as_words(tokens)) == value for tokens, value in small)


def test_listops_trees_keep_the_rules_of_length_depth_and_width(trees):
    lengths = np.array([len(tokens) for tokens, _ in trees])
    assert lengths.min() >= 501 and lengths.max() <= 1999
    deepest, widths = zip(*(depth_and_widths(as_words(tokens)) for tokens, _ in trees[:300]), strict=True)
    assert max(deepest) == 10
    assert set(np.concatenate(widths).tolist()) == set(range(2, 11))
    assert set(np.concatenate([tokens for tokens, _ in trees])) == set(range(1, 16))


def test_listops_statistics_are_those_of_the_rules(trees):
    # Simulated apart from this code, 137,000 draws: 8.3 % kept, mean length 1,042, labels 0 and 9 17 % each. Four
    # standard errors of what is drawn here, and of the simulation's, which is seven times larger.
    slack = 4 * np.sqrt(1 + 1 / 7)
    kept, count = len(trees) / (5 * listops.TREES_AT_ONCE), len(trees)
    assert kept == pytest.approx(0.083, abs=slack * np.sqrt(0.083 * 0.917 / (5 * listops.TREES_AT_ONCE)))
    lengths = [len(tokens) for tokens, _ in trees]
    assert np.mean(lengths) == pytest.approx(1042, abs=slack * np.std(lengths) / np.sqrt(count))
    shares = np.bincount([value for _, value in trees], minlength=10) / count
    error = slack * np.sqrt(0.17 * 0.83 / count)
    assert shares[0] == pytest.approx(0.172, abs=error) and shares[9] == pytest.approx(0.168, abs=error)
    assert all(0.074 - error < share < 0.091 + error for share in shares[1:9])


def test_listops_splits_are_disjoint_repeatable_and_the_test_split_does_not_depend_on_the_train_size():
    bounds = {"shortest": 5, "longest": 20}
    sizes = {"train": 60, "validation": 20, "test": 20}
    splits = listops.load_listops(sizes, seed=3, **bounds)
    again = listops.load_listops(sizes | {"train": 30}, seed=3, **bounds)
    other = listops.load_listops(sizes, seed=4, **bounds)
    texts = {split: [tokens.tobytes() for tokens in part] for split, (part, _) in splits.items()}
    assert {split: len(part) for split, part in texts.items()} == sizes
    assert len({text for part in texts.values() for text in part}) == 100
    assert [tokens.tobytes() for tokens in again["test"][0]] == texts["test"]
    assert [tokens.tobytes() for tokens in again["train"][0]] == texts["train"][:30]
    assert [tokens.tobytes() for tokens in other["test"][0]] != texts["test"]
    with pytest.raises(ValueError, match="at least 1 each"):
        listops.load_listops({"train": 0, "test": 1})


@pytest.fixture(scope="module")
def pictures():
    return [pathfinder.draw_picture(np.random.default_rng([0, row])) for row in range(40)]


def test_pathfinder_markers_stand_on_one_snake_exactly_where_the_label_is_1(pictures):
    for picture in pictures:
        ends = [{snake.start, snake.ends[-1]} for snake in picture.snakes]
        assert any(set(picture.markers) == pair for pair in ends) == bool(picture.label)
        assert all(any(marker in pair for pair in ends) for marker in picture.markers)


def test_pathfinder_snakes_are_chains_of_dashes_with_gaps_that_never_touch(pictures):
    for picture in pictures:
        paths = [np.array([snake.start, *snake.ends], dtype=float) for snake in picture.snakes]
        for path in paths:
            assert len(path) == 15  # the start and the ends of 14 dashes
            steps = np.linalg.norm(np.diff(path[1:], axis=0), axis=1)
            # From a dash's end 1 px on to the pivot, from there 3 px to the next end, at most 90 degrees aside; each
            # of the ends is at most half a pixel's diagonal from where it is meant.
            rounding = np.sqrt(2)
            assert np.sqrt(1 + 3**2) - rounding < steps.min() and steps.max() < 1 + 3 + rounding
            assert path.min() >= 0 and path.max() <= 31
        seeds = np.linalg.norm(paths[0][0] - paths[1][0])
        assert abs(seeds - 7) < 1


def test_pathfinder_pictures_use_all_brightness_and_show_dashes_and_markers(pictures):
    for picture in pictures:
        assert picture.pixels.dtype == np.uint8 and picture.pixels.shape == (32, 32)
        assert picture.pixels.min() == 0 and picture.pixels.max() == 255
        # Without the stretch to bytes they would be at 0 to 2 of 255.
        assert all(picture.pixels[marker] > 100 for marker in picture.markers)
        reach = range(-2, 3)  # a dash's length
        near = np.max([np.roll(picture.pixels, (r, c), (0, 1)) for r in reach for c in reach], axis=0)
        assert all(near[end] > 80 for snake in picture.snakes for end in snake.ends)


def test_pathfinder_classes_have_nearly_the_same_pixels(pictures):
    by_label = [[p.pixels for p in pictures if p.label == label] for label in (0, 1)]
    means = [np.mean([pixels.mean() for pixels in part]) for part in by_label]
    error = np.std([picture.pixels.mean() for picture in pictures]) * np.sqrt(sum(1 / len(part) for part in by_label))
    assert abs(means[0] - means[1]) < 4 * error
    assert 0.25 < np.mean([picture.label for picture in pictures]) < 0.75


def test_pathfinder_rows_depend_on_seed_split_and_row_alone(tmp_path):
    sizes = {"train": 3, "test": 2}
    splits = pathfinder.load_pathfinder(sizes, seed=1, difficulty="easy", cache_dir=str(tmp_path))
    longer = pathfinder.load_pathfinder(sizes | {"train": 4}, seed=1, difficulty="easy", cache_dir=str(tmp_path))
    pixels, labels = splits["train"]
    assert pixels.shape == (3, 1024) and pixels.dtype == np.uint8 and labels.shape == (3,)
    assert np.array_equal(longer["train"][0][:3], pixels) and np.array_equal(longer["test"][0], splits["test"][0])
    assert not np.array_equal(splits["test"][0], pixels[:2])
    with pytest.raises(ValueError, match="`difficulty` must be one of"):
        pathfinder.draw_picture(np.random.default_rng(0), "harder")


@pytest.fixture(scope="module")
def text():
    """Filler and vocabulary of 20,000 words, with colours that must not stay."""
    random = np.random.default_rng(0)
    texts = [" ".join([*random.choice(WORDS, 1000), "amber"]) for _ in range(20)]
    vocabulary = needle.build_vocabulary(texts)
    return needle.encode_filler(texts, vocabulary), vocabulary


def read_colours(tokens: np.ndarray, vocabulary: dict[str, int]) -> list[tuple[int, str]]:
    """Place and colour of every "the seal is COLOUR ." in a document, found by its words."""
    words = {number: word for word, number in vocabulary.items()}
    spelled = [words.get(token, "?") for token in tokens.tolist()]
    return [
        (at + 3, spelled[at + 3])
        for at in range(len(spelled) - 4)
        if spelled[at : at + 3] == ["the", "seal", "is"] and spelled[at + 4] == "."
    ]


@pytest.mark.parametrize("length", [20, 64, 1024, 8192])
def test_needle_labels_say_whether_the_two_far_statements_agree(text, length):
    filler, vocabulary = text
    colours = [vocabulary[colour] for colour in needle.COLOURS]
    for row in range(30):
        tokens, label, places = needle.plant_statements(filler, vocabulary, length, np.random.default_rng(row))
        (first, one), (second, other) = read_colours(tokens, vocabulary)
        assert (first, second) == places and label == (one == other)
        assert second - first >= length // 2 and len(tokens) == length
        assert np.isin(tokens, colours).sum() == 2
    with pytest.raises(ValueError, match="at least 20 tokens"):
        needle.plant_statements(filler, vocabulary, 19, np.random.default_rng(0))


def test_needle_documents_cut_to_512_hold_one_statement_at_most_and_its_colour_does_not_tell_the_label(text):
    filler, vocabulary = text
    seen = np.zeros((len(needle.COLOURS), 2))
    for row in range(4000):
        tokens, label, _ = needle.plant_statements(filler, vocabulary, 1024, np.random.default_rng(row))
        found = read_colours(tokens[:512], vocabulary)
        assert len(found) <= 1
        for _, colour in found:
            seen[needle.COLOURS.index(colour), label] += 1
    # Every cell is expected to hold an eighth; five standard errors.
    assert np.abs(seen / seen.sum() - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / seen.sum())


def test_needle_documents_are_new_in_each_epoch_short_at_first_and_the_same_again(text):
    documents = needle.NeedleDocuments(*text, lengths=[100, 300], seed=5, fresh=True, short_epochs=1, short_length=64)
    assert [len(documents[row]["input_ids"]) for row in range(2)] == [64, 64]
    documents.set_epoch(1)
    second = documents[1]
    assert len(second["input_ids"]) == 300
    documents.set_epoch(2)
    assert not np.array_equal(documents[1]["input_ids"], second["input_ids"])
    documents.set_epoch(1)
    assert np.array_equal(documents[1]["input_ids"], second["input_ids"])
    cut = needle.NeedleDocuments(*text, lengths=[100, 300], seed=5, fresh=True, cut=128)
    assert list(cut.lengths) == [100, 128] and len(cut[1]["input_ids"]) == 128
    same = needle.NeedleDocuments(*text, lengths=[100, 300], seed=5, fresh=False)
    first = same[1]["input_ids"]
    same.set_epoch(1)  # as loaders do at every pass
    assert np.array_equal(same[1]["input_ids"], first)
    with pytest.raises(ValueError, match="has no words"):
        needle.encode_filler(["amber"], text[1])
