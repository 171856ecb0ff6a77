"""The way of a batch through an encoder's layers, first to last or last to first, in little memory.

Nothing of a layer's inside is kept, only inputs of layers [B, N, C]: all of up to `KEPT_STATES` layers, and where there
are more, some of them, while what lies between two is computed once more. Layers run in chunks, as with `chunk_size`,
but for packed batches.

Shape letters: B batch, N tokens, C hidden width.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation import evaluating
from ..models.fa_context import accumulator_dtype
from ..models.fa_layers import FAEncoder
from ..models.fa_layout import Layout

CHUNK_SIZE = 4096
"""Tokens of a sample that a layer works on at a time."""

KEPT_STATES = 6
"""Inputs of layers [B, N, C] kept at a time on the way back.

A forward pass holds five such tensors (a layer's input, Q, K, V and the mixed tokens), so that six take 1.2 times its
memory. Of six layers none is computed twice, of twelve half are, of 24 most are.
"""


class _Entered(Exception):
    """Carries the arguments of an encoder out of a model's forward pass, which ends there."""


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """A batch where it enters the encoder.

    Attributes:
        layers: the encoder's layers.
        embeddings: [B, N, C].
        layout: where the tokens lie, with a `chunk_size` unless documents are packed.
    """

    layers: list[Any]
    embeddings: Tensor
    layout: Layout

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and sums over tokens: float64 for a float64 model, else float32."""
        return accumulator_dtype(self.embeddings)

    @property
    def is_real(self) -> Tensor:
        """True where a token is real: bool [B, N]."""
        if self.layout.mask is not None:
            return self.layout.mask
        return torch.ones(self.embeddings.shape[:2], dtype=torch.bool, device=self.embeddings.device)

    def forwards(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each layer and its input [B, N, C], first to last; the next step overwrites the input."""
        hidden_states = self.embeddings.clone()
        for layer in self.layers[:-1]:
            yield layer, hidden_states
            hidden_states = layer(hidden_states, self.layout)
        yield self.layers[-1], hidden_states

    def backwards(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each layer and its input [B, N, C], last to first, with at most `KEPT_STATES` inputs held at a time.

        A caller that lets go of an input before it asks for the next one holds none beyond.
        """
        yield from self._backwards([self.embeddings], self.layers, KEPT_STATES)

    def _backwards(self, start: list[Tensor], layers: list[Any], room: int) -> Iterator[tuple[Any, Tensor]]:
        """Yield some layers and their inputs, last to first, from the input of the first of them.

        The later layers come first. They are done from a state on the way, for which one of `room` is used, and when
        they are done the earlier ones have the whole room.

        Args:
            start: the input of the first layer, which is taken out of the list so that no caller holds it.
            layers: of the encoder, one after the other.
            room: states that may be held at a time, `start` included.
        """
        state = start.pop()
        if len(layers) > 1:
            _, split = plan_runs(len(layers), room)
            later = [self._run(state, layers[:split])]
            yield from self._backwards(later, layers[split:], room - 1)
            yield from self._backwards([state], layers[:split], room)
        else:
            yield layers[0], state

    def _run(self, hidden_states: Tensor, layers: list[Any]) -> Tensor:
        """Return the output of some layers, which leaves `hidden_states` as they are."""
        if self.layout.chunk_size is not None:
            hidden_states = hidden_states.clone()  # layers that work in chunks overwrite what they get
        for layer in layers:
            hidden_states = layer(hidden_states, self.layout)
        return hidden_states


@functools.cache
def plan_runs(num_layers: int, room: int) -> tuple[float, int]:
    """Return how often layers have to run so that their inputs are had from last to first, and where to split them.

    The input of the first layer is given, and at most `room` inputs are held at a time, that one included. The layers
    before the split run once to get to the input of those behind it, which are done first with one less of room.

    Returns:
        The smallest number of runs, infinite where the room is too small, and the layers before the split.
    """
    if num_layers == 1:
        return 0, 0
    if room < 2:
        return math.inf, 0
    ways = (
        (split + plan_runs(split, room)[0] + plan_runs(num_layers - split, room - 1)[0], split)
        for split in range(1, num_layers)
    )
    return min(ways)


def find_encoder(model: nn.Module) -> FAEncoder:
    """Return the one FABert or FAViT encoder inside a model.

    Raises:
        TypeError: it has none, or several.
    """
    # By name: remote code may hold another copy of a class.
    encoders = [module for module in model.modules() if type(module).__name__ == FAEncoder.__name__]
    if len(encoders) != 1:
        raise TypeError(f"`model` must have one FABert or FAViT encoder, {type(model).__name__} has {len(encoders)}.")
    return encoders[0]  # type: ignore[return-value]


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute another function for a block."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def entered(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[EncoderInput]:
    """Run a model as far as its encoder and give out what enters there; in evaluation mode and without gradients.

    Args:
        model: an FABert or FAViT with any head.
        inputs: the arguments of its forward pass, by name.

    Raises:
        TypeError: the model has no FABert or FAViT encoder, or several.
        ValueError: the model refuses its inputs, or is in `sequence_parallel`.
    """
    encoder = find_encoder(model)

    def leave(embeddings: Tensor, layout: Layout, output_hidden_states: bool) -> None:
        raise _Entered(embeddings, layout)

    # Not in inference mode, whose tensors no gradient can be taken through.
    with torch.inference_mode(False), evaluating(model):
        try:
            with forward_replaced(encoder, leave):
                model(**inputs)
        except _Entered as arguments:
            embeddings, layout = arguments.args
        if layout.shard is not None:
            raise ValueError("`model` is in `sequence_parallel`; explanations need all tokens in one process.")
        if layout.mask is not None:  # padding may hold anything, NaN included, and zero times NaN is NaN
            embeddings = embeddings.masked_fill(~layout.mask[:, :, None], 0.0)
        if layout.documents is None:
            layout = replace(layout, chunk_size=layout.chunk_size or CHUNK_SIZE)
        yield EncoderInput(list(encoder.layer), embeddings, layout)
