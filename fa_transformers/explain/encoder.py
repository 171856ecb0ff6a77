"""The way of a batch through an encoder's layers, first to last or last to first, in little memory.

Nothing of a layer's inside is kept, only inputs of layers [B, N, C]: all of up to `KEPT_STATES` layers, and where there
are more, every second or third one and so on, while what lies between two is computed once more. Layers run in chunks,
as with `chunk_size`, but for packed batches.

Shape letters: B batch, N tokens, C hidden width.
"""

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
"""Inputs of layers [B, N, C] kept for the way back.

A forward pass holds five such tensors (a layer's input, Q, K, V and the mixed tokens), so that six layers take 1.2
times its memory, and no layer is computed twice. Of twelve, every second input is kept, half of the layers are computed
twice, and the memory is 1.4 times that of a forward pass.
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
        """Yield each layer and its input [B, N, C], last to first."""
        step = -(-len(self.layers) // KEPT_STATES)
        starts = range(0, len(self.layers), step)
        kept = [self.embeddings]
        for start in starts[1:]:
            kept.append(self._run(kept[-1], self.layers[start - step : start]))
        for start in reversed(starts):
            segment = self.layers[start : start + step]
            states = [kept.pop()]
            for layer in segment[:-1]:
                states.append(self._run(states[-1], [layer]))
            for layer in reversed(segment):
                yield layer, states.pop()

    def _run(self, hidden_states: Tensor, layers: list[Any]) -> Tensor:
        """Return the output of some layers, which leaves `hidden_states` as they are."""
        if self.layout.chunk_size is not None:
            hidden_states = hidden_states.clone()  # layers that work in chunks overwrite what they get
        for layer in layers:
            hidden_states = layer(hidden_states, self.layout)
        return hidden_states


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
