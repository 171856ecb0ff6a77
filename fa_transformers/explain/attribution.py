"""Scores of an input's tokens for one answer of a classifier, by five methods, for documents of any length.

Shape letters: B batch (in a packed batch 1), N tokens, C hidden width, L labels, S units, D documents,
which are B unless packed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from ..models.fa_context import accumulator_dtype
from ..models.fa_layout import Layout
from .attention import roll_out, target_weights
from .encoder import CHUNK_SIZE, EncoderInput, entered, find_encoder, forward_replaced
from .implied import left_multiply
from .units import sum_units

Method = Literal["rollout", "rows", "gradient_x_input", "integrated_gradients", "occlusion"]


def attribute(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: int | None = None,
    method: Method | None = None,
    units: Tensor | None = None,
    *,
    steps: int = 32,
) -> Tensor:
    """Return how much each token, or each sentence, passage or patch, adds to a classifier's answer.

    The methods, by what they take beside the model:

    - "rollout": `rollout` of the token that the classifier reads, or of the mean. It is the same for all answers.
    - "rows": the last layer's attention of that token, the mean over heads. It is the same for all answers.
    - "gradient_x_input": Σ_c x_c · ∂logit/∂x_c, of word embeddings or pixels. One forward and one backward pass.
    - "integrated_gradients": (x - 0) times the mean gradient on the way from an input of zeros to x, over `steps`
      points, through captum. `steps` passes of each kind.
    - "occlusion": how far the logit falls when the unit is masked, as padding is. A forward pass for each unit, so give
      `units`. A masked first token is not read by "cls" pooling: the next one is. A model in half precision rounds each
      logit, in bfloat16 by up to 2⁻⁸ of its size: that much a score can be off by, twice.

    Gradients pass through one layer at a time, whose feed-forward part is cut into pieces: the memory is that of the
    layers' inputs and of about ten tensors [B, N, C]. Without gradients, layers run in chunks.

    Args:
        model: an FABert for sequence classification or an FAViT for image classification.
        inputs: the arguments of its forward pass, by name; `labels` take no part.
        target: the label; None is for each document the one with the largest logit.
        method: see above. None is "occlusion" of `units` and without these "rollout", as docs/results/explain.md found:
            occlusion is better than orders at random wherever it was tried, but costs a pass for each unit.
        units: int [B, N], the unit that each token belongs to, -1 for none: from `sentence_units`, `passage_units` or
            `patch_units`. None: every token is one.
        steps: of integrated gradients, at least 1.

    Returns:
        [B, N], or with `units` their sums [B, S] (of occlusion, what the whole unit takes with it), with S the largest
        unit + 1. Padding has exactly zero, and of an image's gradients so have CLS and registers.

    Raises:
        TypeError: `model` has no FABert or FAViT encoder, or is no classifier of texts or images.
        ValueError: an argument is unknown or has another shape, or the model refuses its inputs.
        ImportError: captum is missing for "integrated_gradients".
    """
    if method is None:
        method = "rollout" if units is None else "occlusion"
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {', '.join(get_args(Method))}, got {method!r}.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with entered(model, inputs) as entry:
        is_real, layout = entry.is_real, entry.layout
        check_units(units, is_real)
        if method == "rollout":
            scores = roll_out(entry, read_token(model, inputs, target))
        elif method == "rows":
            scores = last_row(entry, read_token(model, inputs, target))
        else:
            labels = choose_labels(answers(model, inputs), target)
            if method == "occlusion":
                return occlude(model, inputs, labels, entry, units)
            scores = attribute_by_gradients(model, inputs, labels, layout, steps if method != "gradient_x_input" else 0)
    scores = scores.masked_fill(~is_real, 0.0)
    return scores if units is None else sum_units(scores, units)


def read_token(model: nn.Module, inputs: Mapping[str, Any], target: int | None = None) -> Literal[0, "mean"]:
    """Return what a classifier reads, as `rollout` takes it; which is the same for all its labels.

    Raises:
        TypeError: it has no logits of whole documents or images.
        ValueError: it has no label `target`.
    """
    # Any configuration has a pooling: what kind a head is, and its labels, show in its answer.
    choose_labels(answers(model, shortest(model, inputs)), target)
    config: Any = model.config
    return "mean" if config.classifier_pooling == "mean" else 0


def shortest(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs of as many documents or images without contents, of one token or patch each."""
    config: Any = model.config
    if inputs.get("pixel_values") is not None:
        images = inputs["pixel_values"]
        return {"pixel_values": images.new_zeros(*images.shape[:2], *config.patch_shape)}
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    tokens = inputs[name]
    samples, width = (tokens.shape[:-1], ()) if name == "input_ids" else (tokens.shape[:-2], tokens.shape[-1:])
    if inputs.get("cu_seqlens") is None:
        return {name: tokens.new_zeros(*samples, 1, *width)}
    number = count_packed(inputs["cu_seqlens"])
    packed = {name: tokens.new_zeros(1, number, *width), "cu_seqlens": torch.arange(number + 1, device=tokens.device)}
    return packed | {key: inputs[key] for key in ("num_choices",) if key in inputs}


def count_packed(cu_seqlens: Any) -> int:
    """Return the number of documents of a packed batch, from what its model takes as `cu_seqlens`."""
    return len(getattr(cu_seqlens, "cu_seqlens", cu_seqlens)) - 1


def last_row(entry: EncoderInput, target: Literal[0, "mean"]) -> Tensor:
    """Return the last layer's attention of a token, or of all, the mean over heads: [B, N]."""
    for layer, hidden_states in entry.forwards():
        if layer is entry.layers[-1]:
            weights = target_weights(entry, target)[:, None, None]
            return left_multiply(layer, hidden_states, entry.layout, weights).mean(dim=1)[:, 0]
    raise AssertionError("an encoder has a layer")


def rows_by_layer(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return each layer's attention of what the classifier reads, the mean over heads: [B, N] for each layer.

    The last one is what `attribute` gives for the method "rows".

    Raises:
        TypeError, ValueError: as in `attribute`.
    """
    with entered(model, inputs) as entry:
        weights = target_weights(entry, read_token(model, inputs))[:, None, None]
        rows = (left_multiply(*step, entry.layout, weights).mean(dim=1)[:, 0] for step in entry.forwards())
        return [row.masked_fill(~entry.is_real, 0.0) for row in rows]


def answers(model: nn.Module, inputs: Mapping[str, Any], chunk_size: int | None = CHUNK_SIZE) -> Tensor:
    """Return a classifier's logits [D, L], computed in chunks unless documents are packed or `chunk_size` is None.

    Raises:
        TypeError: it has no logits of whole documents or images.
    """
    options = {**inputs, "return_dict": True}
    if chunk_size is None or options.get("cu_seqlens") is not None:
        options.pop("chunk_size", None)
    else:
        options.setdefault("chunk_size", chunk_size)
    logits = getattr(model(**options), "logits", None)
    dimensions = {"input_ids": 2, "inputs_embeds": 3}
    are_choices = any(inputs.get(name) is not None and inputs[name].dim() != dimensions[name] for name in dimensions)
    if inputs.get("cu_seqlens") is not None and logits is not None:
        are_choices = len(logits) != count_packed(inputs["cu_seqlens"])
    if logits is None or logits.dim() != 2 or are_choices:
        raise TypeError(f"`model` must be a classifier of whole texts or images, got {type(model).__name__}.")
    return logits


def choose_labels(logits: Tensor, target: int | None) -> Tensor:
    """Return the label of each document: int [D].

    Raises:
        ValueError: there is no such label.
    """
    if target is None:
        return logits.argmax(dim=1)
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < logits.shape[1]:
        raise ValueError(f"`target` must be a label from 0 to {logits.shape[1] - 1}, or None, got {target!r}.")
    return torch.full((len(logits),), target, device=logits.device)


def check_units(units: Tensor | None, is_real: Tensor) -> None:
    """Raise ValueError unless `units` are integers for each token of the batch."""
    if units is None:
        return
    if units.is_floating_point() or units.dtype == torch.bool or units.shape != is_real.shape:
        raise ValueError(f"`units` must be integers [batch, tokens] = {tuple(is_real.shape)}, got {units.shape}.")


def occlude(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, entry: EncoderInput, units: Tensor | None
) -> Tensor:
    """Return how far the logits of `labels` fall when a unit is masked, one unit of every sample at a time: [B, S].

    It is in float32, or float64 of a float64 model. A model in half precision has rounded each logit before, by up to
    2⁻⁸ of its size in bfloat16 and 2⁻¹¹ in float16: falls below that are lost.
    """
    is_real = entry.is_real
    members = torch.arange(is_real.shape[1], device=is_real.device).expand_as(is_real) if units is None else units
    full = answers(model, inputs).gather(1, labels[:, None])[:, 0]
    full = full.to(accumulator_dtype(full))  # differences of half precision would be rounded once more
    drops = full.new_zeros(len(is_real), int(members.max()) + 1)
    members = members.masked_fill(~is_real, -1)
    for unit in range(drops.shape[1]):
        has_unit = (members == unit).any(dim=1)
        if not has_unit.any():
            continue
        masked = answers(model, with_mask(inputs, entry, is_real & (members != unit)))
        fall = full - masked.gather(1, labels[:, None])[:, 0].to(full.dtype)
        # A packed row has one document or more of the unit; the others' logits stay as they are.
        fall = fall if len(fall) == len(is_real) else fall.sum()[None]
        drops[:, unit] = fall.where(has_unit, 0.0)
    return drops


def with_mask(inputs: Mapping[str, Any], entry: EncoderInput, mask: Tensor) -> dict[str, Any]:
    """Return the inputs with another mask, bool [B, N]; tokens of texts keep the positions that they had."""
    masked = {**inputs, "attention_mask": mask}
    if entry.layout.grid is None and masked.get("position_ids") is None:
        masked["position_ids"] = Layout(entry.is_real, documents=entry.layout.documents).places()
    return masked


def attribute_by_gradients(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, layout: Layout, steps: int
) -> Tensor:
    """Return gradient × input, or with `steps` integrated gradients: [B, N]."""
    options = dict(inputs)
    if layout.grid is not None:
        name, start = "pixel_values", options.pop("pixel_values")
    else:
        name, start = "inputs_embeds", options.pop("inputs_embeds", None)
        ids = options.pop("input_ids", None)
        start = model.get_input_embeddings()(ids) if start is None else start  # type: ignore[operator]

    def chosen_logits(values: Tensor) -> Tensor:
        return answers(model, {**options, name: values}, chunk_size=None).gather(1, labels[:, None])[:, 0]

    start = start.detach().clone().requires_grad_()
    with through_layers_in_pieces(model), torch.enable_grad():
        if steps:
            gradients = integrated_gradients(chosen_logits, start, steps)
        else:
            (gradient,) = torch.autograd.grad(chosen_logits(start).sum(), start)
            gradients = start.detach() * gradient
    gradients = gradients.to(accumulator_dtype(gradients))
    return gradients.sum(dim=2) if layout.grid is None else sum_over_patches(model, gradients)


def integrated_gradients(function: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Return x times the mean gradient of a function on the way from zeros to x, a point at a time; in x's shape.

    Source: Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", arXiv:1703.01365.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise ImportError(
            '`method="integrated_gradients"` needs captum: pip install "fa_transformers[explain]".'
        ) from error
    explained = IntegratedGradients(function).attribute(start, n_steps=steps, internal_batch_size=len(start))
    return explained.detach()


def sum_over_patches(model: nn.Module, pixels: Tensor) -> Tensor:
    """Add up numbers of pixels [B, channels, height, width] over patches, with zero for CLS and registers: [B, N]."""
    config: Any = model.config
    height, width = config.patch_shape
    pixels = pixels.sum(dim=1)
    pixels = F.pad(pixels, (0, -pixels.shape[2] % width, 0, -pixels.shape[1] % height))
    patches = pixels.unflatten(2, (-1, width)).unflatten(1, (-1, height)).sum(dim=(2, 4)).flatten(1)
    return F.pad(patches, (1 + config.num_register_tokens, 0))


@contextmanager
def through_layers_in_pieces(model: nn.Module) -> Iterator[None]:
    """Let gradients of a model's inputs pass its layers one at a time, from their inputs, for a block.

    A layer is computed once more on the way back, its feed-forward part `CHUNK_SIZE` tokens at a time. Weights get no
    gradients.
    """
    encoder = find_encoder(model)

    def forward(hidden_states: Tensor, layout: Layout, output_hidden_states: bool) -> BaseModelOutput:
        for layer in encoder.layer:
            hidden_states = checkpoint(run_in_pieces, layer, hidden_states, layout, use_reentrant=False)
        return BaseModelOutput(last_hidden_state=hidden_states)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with forward_replaced(encoder, forward):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def run_in_pieces(layer: Any, hidden_states: Tensor, layout: Layout) -> Tensor:
    """Compute a layer's output [B, N, C], keeping only inputs of the pieces of its feed-forward part for gradients."""
    attention, normalize = layer.attention_and_norm
    mixed = attention(normalize(hidden_states), layout)
    pieces = zip(mixed.split(CHUNK_SIZE, dim=1), hidden_states.split(CHUNK_SIZE, dim=1), strict=True)
    outputs = [checkpoint(layer.feed_forward, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(outputs, dim=1)
