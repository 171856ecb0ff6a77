"""The stack of layers and the cutting of a layer's feed-forward part into pieces, shared by all encoders.

Shape letters: B batch, N tokens, C hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from .fa_layout import Layout

INFERENCE_PIECE = 2048
"""Tokens of a sample that the feed-forward part of a layer works on at a time in eager inference."""


class FAEncoder(nn.Module):
    """The stack of layers: [B, N, C] -> [B, N, C], with every layer's input on request."""

    def __init__(self, config, layer_class: Callable[..., nn.Module]):
        super().__init__()
        self.layer = nn.ModuleList(layer_class(config, index) for index in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, layout: Layout, output_hidden_states: bool) -> BaseModelOutput:
        collected = [hidden_states]
        for layer in self.layer:
            if layout.chunk_size is not None and output_hidden_states:
                hidden_states = hidden_states.clone()  # the layer overwrites what it gets
            hidden_states = layer(hidden_states, layout)
            if output_hidden_states:
                collected.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=tuple(collected) if output_hidden_states else None
        )


def apply_in_pieces(
    function: Callable[..., Tensor], piece_size: int, *tensors: Tensor, training: bool = False
) -> Tensor:
    """Apply a function of single tokens to `piece_size` tokens of each sample at a time: [B, N, C] each -> [B, N, C].

    `piece_size` 0 means all tokens at once, except in eager inference, where pieces of `INFERENCE_PIECE` are faster on
    a CPU: allocating wide temporaries for a long text takes longer than computing them. With `training` 0 always means
    all at once, so that dropout draws the same when a reentrant checkpoint runs a layer twice, first without gradients.
    """
    if not (piece_size or training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
        piece_size = INFERENCE_PIECE
    if not piece_size or tensors[0].shape[1] <= piece_size:
        return function(*tensors)
    pieces = zip(*(tensor.split(piece_size, dim=1) for tensor in tensors), strict=True)
    return torch.cat([function(*piece) for piece in pieces], dim=1)
