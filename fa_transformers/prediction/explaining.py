"""The ground of one answer: scores of passages or patches, and what deleting the highest does to the answer.

The work is bounded: an answer takes one forward pass, each cheap method one or a few more for each label, and deletions
as many as a number of tokens allows. Occlusion, which takes a pass for each passage, and integrated gradients, which
deletion bears out better than the cheap methods (docs/results/explain.md), come first where a number of tokens allows
them, and for who asks.
"""

import importlib.util
import itertools
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..data.readers.tables import DataError, cut, listing
from ..evaluation import evaluating
from ..explain.attention import leading_context_maps
from ..explain.attribution import Method, answers, attribute, read_token, rows_by_layer
from ..explain.deletion import deleted_probabilities, probabilities
from ..explain.units import passage_units, patch_units, sentence_units, sum_units
from .explanation import NUMBER, Deletion, DocumentExplanation, ImageExplanation, Passage, Scores
from .inputs import ImageInputs, Prepared, TextInputs
from .predictor import Predictor

CHEAP_METHODS: tuple[Method, ...] = ("rollout", "rows", "gradient_x_input")
FIRST_METHOD_TOKENS = 2**18
"""Tokens that the passes of the first method may read where none is named, for all labels together."""
MOST_LABELS, LEAST_PROBABILITY = 3, 0.05
"""Labels that are explained where none is named: so many of the most probable, those above the least probability."""
DELETED_SHARES = (0.01, 0.05, 0.1, 0.25)
"""Shares of an input's tokens that are deleted, the passages with the highest scores first."""
NUM_RANDOM = 3
"""Draws of passages that are deleted at random beside them."""
DELETION_TOKENS = 2**18
"""Tokens that passes with deletions may read, all together; the first scores and one draw are measured in any case."""
MOST_SQUARES = 64
"""Squares along the longer side of an image that scores are added up over, where nobody says how large they are."""
MAPS_OF_A_HEAD, MAP_SIDE = 4, 48
"""Context maps that are kept of each head, and the squares along their longer side."""


def explain_document(
    predictor: Predictor,
    text: str,
    *,
    name: str = "document",
    passage: Literal["sentence"] | int = "sentence",
    methods: Sequence[Method] | None = None,
    labels: Sequence[str] | None = None,
    page_starts: Sequence[int] = (),
    deletion_tokens: int = DELETION_TOKENS,
    steps: int = 8,
    seed: int = 0,
) -> DocumentExplanation:
    """Explain the answer to one document: which passages it rests on, and what it is without them.

    Args:
        predictor: of a text model with a fast tokenizer.
        text: the document.
        name: of it, for people.
        passage: what has a score: each sentence, or runs of so many tokens.
        methods: as in `attribute`; the first one is shown first and deleted by first. "occlusion" takes a forward pass
            for each passage and label. None: see `default_methods`.
        labels: names of the classes to explain; None: the most probable, at most `MOST_LABELS`.
        page_starts: the character at which each page begins, as `read_pdf` gives it.
        deletion_tokens: tokens that passes with deletions may read, all together: at 0 nothing is deleted, else the
            first scores and one draw at random are measured in any case.
        steps: of integrated gradients.
        seed: of the random deletions.

    Raises:
        DataError: the text can't be used.
        ValueError: an argument is unknown, or the model reads images.
    """
    inputs = predictor.inputs
    if not isinstance(inputs, TextInputs):
        raise ValueError("the model reads images, and this is a text: use `explain_image`.")
    if passage != "sentence" and (isinstance(passage, bool) or not isinstance(passage, int) or passage < 1):
        raise ValueError(f'`passage` must be "sentence" or a number of tokens, got {passage!r}.')
    prepared = _prepare(inputs, text)
    batch = _batch(predictor, prepared)
    units, spans = _passages_of(inputs, batch, prepared, text, passage)
    if not spans:
        raise DataError("the document has no passage: the tokenizer finds no token in it that stands for text")
    pages = [bisect_right(page_starts, start) or None for start, _ in spans]
    passages = tuple(Passage(*span, page) for span, page in zip(spans, pages, strict=True))
    work = _Work(predictor, prepared, batch, units.to(predictor.model.device), methods, labels)
    found = work.explain(name, deletion_tokens, steps, seed)
    return DocumentExplanation(**found, text=text, passages=passages, passage_size=passage)


def explain_image(
    predictor: Predictor,
    image: Any,
    *,
    name: str = "image",
    square: int | None = None,
    methods: Sequence[Method] | None = None,
    labels: Sequence[str] | None = None,
    deletion_tokens: int = DELETION_TOKENS,
    steps: int = 8,
    seed: int = 0,
) -> ImageExplanation:
    """Explain the answer to one image: which of its regions it rests on, and what it is without them.

    Args:
        predictor: of an image model.
        image: Pillow's, an array [height, width, channels] of bytes, the path of a file, or a file's bytes.
        square: patches along each side of the squares that have a score; None: so many that the image has at most
            `MOST_SQUARES` squares along its longer side.
        name, methods, labels, deletion_tokens, steps, seed: as in `explain_document`.

    Raises:
        DataError: the image can't be used.
        ValueError: an argument is unknown, or the model reads texts.
    """
    if not isinstance(predictor.inputs, ImageInputs):
        raise ValueError("the model reads texts, and this is an image: use `explain_document`.")
    if square is not None and (isinstance(square, bool) or not isinstance(square, int) or square < 1):
        raise ValueError(f"`square` must be a number of patches, at least 1, got {square!r}.")
    prepared = _prepare(predictor.inputs, image)
    batch = _batch(predictor, prepared)
    model: Any = predictor.model
    pixels = prepared.features["pixel_values"]
    patch = model.config.patch_shape
    grid = [-(-side // length) for side, length in zip(pixels.shape[1:], patch, strict=True)]
    size = square if square is not None else -(-max(grid) // MOST_SQUARES)
    units, shape = patch_units(model, batch, size)
    work = _Work(predictor, prepared, batch, units, methods, labels)
    found = work.explain(name, deletion_tokens, steps, seed)
    found["scores"] = tuple(replace(one, values=one.values.reshape(shape)) for one in found["scores"])
    started = time.perf_counter()
    shares, maps = _context_maps(predictor, batch, (grid[0], grid[1]))
    found["explaining_seconds"] += time.perf_counter() - started
    return ImageExplanation(
        **found,
        pixels=picture_of(pixels, predictor.processor),
        square=(size * patch[0], size * patch[1]),
        context_maps=maps,
        map_shares=shares,
    )


def default_methods(num_units: int, num_tokens: int, num_labels: int, steps: int) -> tuple[Method, ...]:
    """Return the methods that explain an answer where none is named, the one to trust most first.

    That is occlusion, or else integrated gradients where captum is installed, as far as all passes of one of them read
    at most `FIRST_METHOD_TOKENS` tokens, a backward pass counted as two; the cheap methods follow.
    """
    passes: dict[Method, int] = {"occlusion": num_units}
    if importlib.util.find_spec("captum"):
        passes["integrated_gradients"] = 3 * steps
    first = (method for method, each in passes.items() if each * num_tokens * num_labels <= FIRST_METHOD_TOKENS)
    return (*itertools.islice(first, 1), *CHEAP_METHODS)


def _prepare(inputs: TextInputs | ImageInputs, item: Any) -> Prepared:
    (prepared,) = inputs.prepare([item])
    if prepared.error is not None:
        raise DataError(prepared.error)
    return prepared


def _batch(predictor: Predictor, prepared: Prepared) -> dict[str, Tensor]:
    model = predictor.model
    batch = {name: value.to(model.device) for name, value in predictor.inputs.collate([prepared]).items()}
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch


def _passages_of(
    inputs: TextInputs, batch: Mapping[str, Tensor], prepared: Prepared, text: str, passage: Literal["sentence"] | int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the passage of each token, int [1, N], and the characters of each passage that has a token.

    Raises:
        ValueError: the tokenizer can't say where its tokens stand.
    """
    if not inputs.tokenizer.is_fast:
        raise ValueError("passages need a fast tokenizer, which says where in the text its tokens stand.")
    cut_to = {} if inputs.limit is None else {"truncation": True, "max_length": inputs.limit}
    encoded = inputs.tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False, **cut_to
    )
    offsets = torch.tensor(encoded["offset_mapping"]).reshape(1, -1, 2)
    assert offsets.shape[1] == prepared.num_tokens, "what was tokenized twice gives the same tokens"
    if passage == "sentence":
        units, (sentences,) = sentence_units([text], offsets)
        with_tokens = units[units >= 0].unique()
        units = torch.where(units >= 0, torch.searchsorted(with_tokens, units.clamp(min=0)), -1)
        return units, [sentences[number] for number in with_tokens.tolist()]
    special = torch.tensor(encoded["special_tokens_mask"])[None] | (offsets[..., 0] == offsets[..., 1])
    units = passage_units({name: value.cpu() for name, value in batch.items()}, passage, special.bool())
    spans = []
    for number in range(int(units.max()) + 1):
        own = offsets[units == number]
        spans.append((int(own[:, 0].min()), int(own[:, 1].max())))
    return units, spans


class _Work:
    """One input on its way to an explanation."""

    def __init__(
        self,
        predictor: Predictor,
        prepared: Prepared,
        batch: dict[str, Tensor],
        units: Tensor,
        methods: Sequence[Method] | None,
        labels: Sequence[str] | None,
    ):
        if unknown := [method for method in methods or () if method not in get_args(Method)]:
            raise ValueError(f"`methods` must be among {', '.join(get_args(Method))}, got {unknown[0]!r}.")
        if methods is not None and not methods:
            raise ValueError("`methods` must name at least one method, got none; None takes the default ones.")
        self.predictor, self.model, self.prepared = predictor, predictor.model, prepared
        self.batch, self.units, self.methods, self.labels = batch, units, methods, labels
        self.names = [NUMBER] if predictor.label_names is None else predictor.label_names

    def explain(self, name: str, deletion_tokens: int, steps: int, seed: int) -> dict[str, Any]:
        """Return the fields of `Explanation`; `values` are flat."""
        started = time.perf_counter()
        with torch.inference_mode(), evaluating(self.model):
            logits = answers(self.model, self.batch, self.predictor.chunk_size).float().cpu().numpy()
        if not np.isfinite(logits).all():
            raise DataError("the model's answer is not a finite number: its weights are damaged, or overflow")
        kept = self.predictor.rules.shorten(logits)
        is_truncated = self.prepared.full_length > self.prepared.num_tokens
        facts = {"num_tokens": self.prepared.num_tokens, "is_truncated": is_truncated}
        answer = self.predictor.rules.prediction(kept.scores[0], kept.classes[0], **facts)
        answered = time.perf_counter()
        whole = probabilities(self.model, torch.from_numpy(logits))[0].numpy()
        chosen = self._choose(whole)
        methods = self.methods
        if methods is None:
            methods = default_methods(int(self.units.max()) + 1, self.prepared.num_tokens, len(chosen), steps)
        scores = [one for method in dict.fromkeys(methods) for one in self._score(method, chosen, steps)]
        scores, random = self._delete(scores, chosen, whole, deletion_tokens, seed)
        return {
            "name": name,
            "answer": answer,
            "probabilities": {self.names[label]: float(whole[label]) for label in chosen},
            "seconds": answered - started,
            "explaining_seconds": time.perf_counter() - answered,
            "scores": tuple(scores),
            "random": random,
        }

    def _choose(self, whole: np.ndarray) -> list[int]:
        """Return the numbers of the labels to explain.

        Raises:
            ValueError: a name is none of the model's.
        """
        if self.labels is None:
            order = np.argsort(-whole, kind="stable")[:MOST_LABELS].tolist()
            return order[:1] + [label for label in order[1:] if whole[label] >= LEAST_PROBABILITY]
        if unknown := [name for name in self.labels if name not in self.names]:
            raise ValueError(f"`labels`: the model knows no {cut(unknown[0])}, its labels are {listing(self.names)}.")
        if not self.labels:
            raise ValueError("`labels` must name at least one label, got none; None takes the most probable.")
        numbers = [self.names.index(name) for name in dict.fromkeys(self.labels)]
        return sorted(numbers, key=lambda label: -whole[label])

    def _score(self, method: Method, labels: Sequence[int], steps: int) -> Iterable[Scores]:
        if method == "rows":
            for layer, row in enumerate(rows_by_layer(self.model, self.batch)):
                yield Scores(method, None, layer, _plain(sum_units(row, self.units)))
        elif method == "rollout":
            yield Scores(method, None, None, _plain(attribute(self.model, self.batch, None, method, self.units)))
        else:
            for label in labels:
                found = attribute(self.model, self.batch, label, method, self.units, steps=steps)
                yield Scores(method, self.names[label], None, _plain(found))

    def _delete(
        self, scores: list[Scores], labels: Sequence[int], whole: np.ndarray, budget: int, seed: int
    ) -> tuple[list[Scores], Deletion | None]:
        """Measure deletions as far as the budget of tokens reaches, which scores first; see `explain_document`."""
        lengths = torch.bincount(self.units[self.units >= 0].cpu(), minlength=scores[0].values.size).numpy()
        if budget < 1 or len(lengths) < 2:
            return scores, None
        rng = np.random.default_rng(seed)
        draws = [rng.permutation(len(lengths)).tolist() for _ in range(NUM_RANDOM)]
        passes_left = max(2 * len(DELETED_SHARES), budget // self.prepared.num_tokens)
        measured: dict[int, Deletion] = {}
        random: list[Deletion] = []
        last_layers = {one.method: index for index, one in enumerate(scores)}
        wanted = [index for index, one in enumerate(scores) if one.method != "rows" or last_layers["rows"] == index]
        tasks: list[tuple[int | None, list[int]]] = [(index, scores[index].order()) for index in wanted]
        tasks[1:1] = [(None, draws[0])]
        tasks += [(None, draw) for draw in draws[1:]]
        for index, order in tasks:
            if passes_left < len(DELETED_SHARES):
                break
            deletion, num_passes = self._delete_by(order, lengths, labels, whole)
            passes_left -= num_passes
            if index is None:
                random.append(deletion)
            else:
                measured[index] = deletion
        scores = [
            replace(one, deletion=None if index not in measured else _without_repeats(measured[index]))
            for index, one in enumerate(scores)
        ]
        return scores, _without_repeats(_mean_of(random))

    def _delete_by(
        self, order: Sequence[int], lengths: np.ndarray, labels: Sequence[int], whole: np.ndarray
    ) -> tuple[Deletion, int]:
        """Return the answer without the first passages of an order, and the number of passes that it took."""
        reached = np.cumsum(lengths[list(order)]) / lengths.sum()
        # At least one passage is deleted, and at least one is left.
        counts = [min(max(1, int((reached <= share).sum())), len(order) - 1) for share in DELETED_SHARES]
        sets = {count: list(order[:count]) for count in counts}
        found = deleted_probabilities(self.model, self.batch, self.units, list(sets.values())).numpy()
        by_count = dict(zip(sets, found, strict=True))
        curves = np.stack([whole, *(by_count[count] for count in counts)])
        shares = (0.0, *(float(reached[count - 1]) for count in counts))
        curve = Deletion(shares, {self.names[label]: tuple(curves[:, label].tolist()) for label in labels})
        return curve, len(sets)


def _mean_of(draws: Sequence[Deletion]) -> Deletion:
    """Return the mean of draws, point by point."""
    names = draws[0].probabilities
    means = {name: np.mean([draw.probabilities[name] for draw in draws], axis=0) for name in names}
    shares = np.mean([draw.shares for draw in draws], axis=0)
    return Deletion(tuple(shares.tolist()), {name: tuple(mean.tolist()) for name, mean in means.items()})


def _without_repeats(curve: Deletion) -> Deletion:
    """Return a curve without the points that delete as much as the one before, as where passages are few."""
    kept = [index for index, share in enumerate(curve.shares) if index == 0 or share > curve.shares[index - 1]]
    chosen = {name: tuple(values[index] for index in kept) for name, values in curve.probabilities.items()}
    return Deletion(tuple(curve.shares[index] for index in kept), chosen)


def _plain(scores: Tensor) -> np.ndarray:
    return scores[0].double().cpu().numpy()


def _context_maps(
    predictor: Predictor, batch: Mapping[str, Tensor], grid: tuple[int, int]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Return the shares of the leading context maps of each layer and the maps, small, as in `ImageExplanation`."""
    with evaluating(predictor.model):
        target = read_token(predictor.model, batch)
    leading = leading_context_maps(predictor.model, batch, target, MAPS_OF_A_HEAD)
    step = -(-max(grid) // MAP_SIDE)
    small = [-(-side // step) for side in grid]
    shares, maps = {}, {}
    for layer, (share, full) in leading.items():
        patches = full[0, ..., -grid[0] * grid[1] :].float().unflatten(-1, grid)
        padded = torch.nn.functional.pad(patches, (0, small[1] * step - grid[1], 0, small[0] * step - grid[0]))
        squares = padded.unflatten(-1, (small[1], step)).unflatten(-3, (small[0], step)).sum(dim=(-3, -1))
        shares[layer], maps[layer] = share[0].float().cpu().numpy(), squares.cpu().numpy()
    return shares, maps


def picture_of(pixels: Tensor, processor: Any) -> np.ndarray:
    """Return what a model sees of an image as bytes [height, width, 3], of processed pixels [channels, height, width].

    The processor's mean and deviation are undone; without these the values are spread from black to white.
    """
    values = pixels.detach().float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, f"image_{name}")).reshape(-1, 1, 1) for name in ("mean", "std"))
        values = values * std + mean
    if getattr(processor, "do_rescale", False):
        values = values / getattr(processor, "rescale_factor", 1 / 255)
    low, high = float(values.min()), float(values.max())
    if low < -8 or high > 263 or high <= 1.0:  # another scale than that of bytes
        values = (values - low) / max(high - low, 1e-12) * 255
    values = values.clamp(0, 255).round().to(torch.uint8)
    values = values.expand(3, -1, -1) if len(values) == 1 else values[:3]
    return values.permute(1, 2, 0).contiguous().numpy()
