"""Explanations as values: the answer, scores of passages or squares, and the answer without the highest of them."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from .answers import Prediction

SAME_FOR_ALL_LABELS = ("rollout", "rows")
"""Methods that say where attention takes from, whatever the answer."""
NUMBER = "number"
"""Name of a regressor's one answer, in the place of a label."""


class Passage(NamedTuple):
    """Characters of a text, from `start` to before `stop`, on a `page` from 1 on, or None where there are no pages."""

    start: int
    stop: int
    page: int | None = None


@dataclass(frozen=True)
class Deletion:
    """An answer after parts of its input were deleted: points by the share of the tokens that is gone.

    Args:
        shares: of the passages' tokens that are deleted, from 0 on, which is the whole input.
        probabilities: label -> its probability at each share; the number itself in regression.
    """

    shares: tuple[float, ...]
    probabilities: dict[str, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of an input's passages or squares by one method.

    Args:
        method: as in `attribute`.
        label: that they are for; None where they are the same for all.
        layer: of the attention, from 0, for the method "rows"; None where all layers take part.
        values: float64, [passages], or of an image [rows, columns].
        deletion: the answer without the passages that score highest, None where it wasn't measured.
    """

    method: str
    label: str | None
    layer: int | None
    values: np.ndarray
    deletion: Deletion | None = None

    def order(self) -> list[int]:
        """Return the numbers of the passages, highest score first."""
        return np.argsort(-self.values.ravel(), kind="stable").tolist()


@dataclass(frozen=True, eq=False)
class Explanation:
    """The ground of a model's answer to one input.

    Args:
        name: of the input, for people.
        answer: the model's answer, whose `scores` hold the probability of each label.
        probabilities: label -> its probability, for the labels that are explained, the most probable first; in
            regression the number under the name "number".
        seconds: of the answer.
        explaining_seconds: of all that was computed beside it.
        scores: of each method, label and layer.
        random: the answer without passages at random, the mean of some draws; None where nothing was deleted.
    """

    name: str
    answer: Prediction
    probabilities: dict[str, float]
    seconds: float
    explaining_seconds: float
    scores: tuple[Scores, ...]
    random: Deletion | None

    @property
    def num_tokens(self) -> int:
        """Tokens or patches that the model read."""
        return self.answer.num_tokens

    def find(self, method: str, label: str | None = None, layer: int | None = None) -> Scores:
        """Return the scores of a method for a label, and of "rows" for a layer, by default the last one.

        Raises:
            KeyError: there are none.
        """
        wanted = None if method in SAME_FOR_ALL_LABELS else label or next(iter(self.probabilities))
        found = [one for one in self.scores if (one.method, one.label) == (method, wanted)]
        found = found if layer is None else [one for one in found if one.layer == layer]
        if not found:
            raise KeyError(f"there are no scores by {method!r} for the label {label!r} and the layer {layer!r}")
        return found[-1]

    def to_json(self) -> dict[str, Any]:
        """Return all of it but the pixels and text between passages, as `json.dumps` takes it."""
        answer = {"label": self.answer.label, "score": self.answer.score, "scores": self.answer.scores}
        facts: dict[str, Any] = {"name": self.name, "answer": answer, "probabilities": self.probabilities}
        facts |= {"num_tokens": self.num_tokens, "is_truncated": self.answer.is_truncated}
        facts |= {"seconds": self.seconds, "explaining_seconds": self.explaining_seconds, **self._parts()}
        facts["scores"] = [
            {"method": one.method, "label": one.label, "layer": one.layer, "values": one.values.tolist()}
            | ({} if one.deletion is None else {"deletion": vars(one.deletion)})
            for one in self.scores
        ]
        return facts | {"random_deletion": None if self.random is None else vars(self.random)}

    def _parts(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class DocumentExplanation(Explanation):
    """The ground of a model's answer to a document; for the other fields see `Explanation`.

    Args:
        text: the document.
        passages: its parts that have a score each, in their order; what was not read has none.
        passage_size: "sentence", or the tokens of a passage.
    """

    text: str = ""
    passages: tuple[Passage, ...] = ()
    passage_size: Literal["sentence"] | int = "sentence"

    def text_of(self, number: int) -> str:
        """Return the text of a passage."""
        return self.text[self.passages[number].start : self.passages[number].stop]

    def _parts(self) -> dict[str, Any]:
        passages = [{**passage._asdict(), "text": self.text_of(number)} for number, passage in enumerate(self.passages)]
        return {"passage_size": self.passage_size, "passages": passages}


@dataclass(frozen=True, eq=False)
class ImageExplanation(Explanation):
    """The ground of a model's answer to an image; for the other fields see `Explanation`.

    Args:
        pixels: the image as the model sees it, in the size that its processor makes: bytes [height, width, 3].
        square: height and width in pixels of the squares that have a score each; those at the right and bottom may
            reach beyond the image.
        context_maps: layer, from 0 -> float32 [heads, maps, rows, columns], the maps of which each head takes most,
            each the sum over about `MAP_SIDE` squares along the longer side.
        map_shares: layer -> [heads, maps], the share of each map.
    """

    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))
    square: tuple[int, int] = (1, 1)
    context_maps: dict[int, np.ndarray] = field(default_factory=dict)
    map_shares: dict[int, np.ndarray] = field(default_factory=dict)

    def box_of(self, number: int) -> tuple[int, int, int, int]:
        """Return the left, top, right and bottom edge of a square in pixels."""
        height, width = self.pixels.shape[:2]
        row, column = divmod(number, self.scores[0].values.shape[1])
        (high, wide), left, top = self.square, column * self.square[1], row * self.square[0]
        return left, top, min(left + wide, width), min(top + high, height)

    def _parts(self) -> dict[str, Any]:
        maps = {str(layer): np.round(one.astype(float), 8).tolist() for layer, one in self.context_maps.items()}
        return {
            "width": self.pixels.shape[1],
            "height": self.pixels.shape[0],
            "square": list(self.square),
            "context_maps": maps,
            "map_shares": {str(layer): one.tolist() for layer, one in self.map_shares.items()},
        }
