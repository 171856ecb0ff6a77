"""Explanations made by hand, without a model: of a long document, of one whose every text is hostile, of an image."""

import numpy as np
from hostile_page import HOSTILE

from fa_transformers.prediction.answers import Prediction
from fa_transformers.prediction.explanation import (
    Deletion,
    DocumentExplanation,
    ImageExplanation,
    Passage,
    Scores,
)

SHARES = (0.0, 0.01, 0.05, 0.1, 0.25)


def make_scores(shape: tuple[int, ...], labels: list[str], num_layers: int = 2) -> tuple[Scores, ...]:
    """Scores of every kind: of each label, of all labels, of each layer; those of the layers weren't deleted by."""
    random = np.random.default_rng(0)
    curve = dict.fromkeys(labels, (0.9, 0.7, 0.5, 0.3, 0.2))
    deletion = Deletion(SHARES, curve)
    scores = [Scores("gradient_x_input", label, None, random.normal(size=shape), deletion) for label in labels]
    scores.append(Scores("rollout", None, None, random.random(shape), deletion))
    return (*scores, *(Scores("rows", None, layer, random.random(shape)) for layer in range(num_layers)))


def fields_of(name: str, labels: list[str], scores: tuple[Scores, ...], num_tokens: int) -> dict:
    probabilities = {label: 1 / (2 + place) for place, label in enumerate(labels)}
    answer = Prediction(labels[0], 0.5, probabilities, num_tokens)
    random = Deletion(SHARES, dict.fromkeys(labels, (0.9, 0.9, 0.8, 0.8, 0.7)))
    return dict(
        name=name, answer=answer, probabilities=probabilities, seconds=0.5, explaining_seconds=3.0, scores=scores,
        random=random,
    )  # fmt: skip


def explain_sentences(sentences: list[str], labels: list[str], name: str, num_layers: int = 2) -> DocumentExplanation:
    """An explanation of sentences, which stand in one paragraph of 20 each, 60 on a page."""
    text, passages = "", []
    for number, sentence in enumerate(sentences):
        passages.append(Passage(len(text), len(text) + len(sentence), 1 + number // 60))
        text += sentence + ("\n\n" if number % 20 == 19 else " ")
    scores = make_scores((len(sentences),), labels, num_layers)
    num_tokens = len(text.split()) + 2
    return DocumentExplanation(**fields_of(name, labels, scores, num_tokens), text=text, passages=tuple(passages))


def long_explanation(num_tokens: int = 100_000) -> DocumentExplanation:
    """An explanation of a document of so many words in sentences of 20, with six layers."""
    words = [f"word{number % 977}" for number in range(num_tokens)]
    sentences = [" ".join(words[start : start + 20]) + "." for start in range(0, num_tokens, 20)]
    return explain_sentences(sentences, ["contract", "tort", "property"], "judgment.txt", num_layers=6)


def hostile_explanation() -> DocumentExplanation:
    """An explanation whose labels, name and sentences are markup, control characters and changes of direction."""
    return explain_sentences(HOSTILE * 12, HOSTILE[:3], HOSTILE[1])


def image_explanation(name: str = "scan.png", labels: tuple[str, ...] = ("cat", "dog")) -> ImageExplanation:
    """An explanation of an image of 120 x 200 pixels in squares of 16, with context maps of two layers."""
    ramp = np.linspace(0, 255, 200, dtype=np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None], (120, 200, 3)).copy()
    random = np.random.default_rng(0)
    maps = {layer: random.random((2, 3, 8, 13)).astype(np.float32) for layer in range(2)}
    shares = {layer: np.full((2, 3), 0.3, np.float32) for layer in maps}
    fields = fields_of(name, list(labels), make_scores((8, 13), list(labels)), 105)
    return ImageExplanation(**fields, pixels=pixels, square=(16, 16), context_maps=maps, map_shares=shares)
