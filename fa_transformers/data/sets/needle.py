"""Documents whose label needs both ends: two statements, planted far apart in real text, either agree or contradict.

One sentence, "the seal is COLOUR .", stands in the first quarter of a document and another in the last quarter, so at
least half of the document lies between them: 4,096 tokens of 8,192. The label says whether they name the same colour.
The label is a fair coin, the first colour is uniform, and the second follows from the two; so each colour alone is
uniform whatever the label, and whoever reads one statement only, such as a model that cuts a document of 1,024 tokens
or more at 512, is right half of the time by construction.

Everything else is real text, word by word, without the colours, so that it says nothing of them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from torch.utils.data import Dataset

COLOURS = ("amber", "violet", "cedar", "maple")
STATEMENT = ("the", "seal", "is", "{colour}", ".")
LABEL_NAMES = ("contradict", "agree")
PADDING, UNKNOWN = 0, 1
MIN_LENGTH = 4 * len(STATEMENT)


def split_words(text: str) -> list[str]:
    """Words and single punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def build_vocabulary(texts: Iterable[str], num_words: int = 2000) -> dict[str, int]:
    """Return word -> id: the statements' words and the `num_words` most frequent ones; 0 is padding, 1 unknown."""
    counts = Counter(word for text in texts for word in split_words(text))
    planted = [*STATEMENT[:3], STATEMENT[4], *COLOURS]
    frequent = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:num_words]
    words = dict.fromkeys([*planted, *frequent])
    return {word: UNKNOWN + 1 + index for index, word in enumerate(words)}


def encode_filler(texts: Iterable[str], vocabulary: dict[str, int]) -> np.ndarray:
    """Return all texts, one after the other, as ids, without the colours.

    Raises:
        ValueError: there are no words.
    """
    words = [word for text in texts for word in split_words(text) if word not in COLOURS]
    if not words:
        raise ValueError("`texts` has no words: documents are made of them.")
    return np.array([vocabulary.get(word, UNKNOWN) for word in words], dtype=np.int32)


def plant_statements(
    filler: np.ndarray, vocabulary: dict[str, int], length: int, random: np.random.Generator
) -> tuple[np.ndarray, int, tuple[int, int]]:
    """Make one document: ids [length], its label, and the places of the two colours.

    The filler is a piece from anywhere of it, or goes round where it is shorter.

    Raises:
        ValueError: `length` is below `MIN_LENGTH`, so that a statement doesn't fit into a quarter.
    """
    if length < MIN_LENGTH:
        raise ValueError(f"`length` must be at least {MIN_LENGTH} tokens, got {length}.")
    start = random.integers(len(filler))
    tokens = filler.take(np.arange(start, start + length), mode="wrap")
    label = int(random.integers(2))
    first = int(random.integers(len(COLOURS)))
    second = first if label else (first + int(random.integers(1, len(COLOURS)))) % len(COLOURS)
    quarter, size = length // 4, len(STATEMENT)
    starts = int(random.integers(quarter - size + 1)), int(random.integers(length - quarter, length - size + 1))
    for at, colour in zip(starts, (first, second), strict=True):
        sentence = [word.format(colour=COLOURS[colour]) for word in STATEMENT]
        tokens[at : at + size] = [vocabulary[word] for word in sentence]
    place = STATEMENT.index("{colour}")
    return tokens, label, (starts[0] + place, starts[1] + place)


class NeedleDocuments(Dataset):
    """Documents of the given `lengths`, in tokens, drawn from (seed, epoch, index).

    Of `fresh` ones every epoch has others; those to compare models by are the same in all epochs.
    In the first `short_epochs` epochs none is longer than `short_length`. With `cut`, only that many first tokens of a
    document are given.
    """

    def __init__(
        self,
        filler: np.ndarray,
        vocabulary: dict[str, int],
        lengths: Sequence[int],
        seed: int,
        *,
        fresh: bool,
        short_epochs: int = 0,
        short_length: int = 0,
        cut: int | None = None,
    ):
        self._documents = np.asarray(lengths)
        self.lengths = self._documents if cut is None else np.minimum(self._documents, cut)
        self._filler, self._vocabulary, self._seed, self._epoch, self._cut = filler, vocabulary, seed, 0, cut
        self._short_epochs, self._short_length, self._fresh = short_epochs, short_length, fresh

    def set_epoch(self, epoch: int) -> None:
        if self._fresh:
            self._epoch = epoch

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict:
        length = int(self._documents[index])
        if self._epoch < self._short_epochs:
            length = min(length, self._short_length)
        random = np.random.default_rng([self._seed, self._epoch, index])
        tokens, label, _ = plant_statements(self._filler, self._vocabulary, length, random)
        return {"input_ids": tokens[: self._cut], "label": label}
