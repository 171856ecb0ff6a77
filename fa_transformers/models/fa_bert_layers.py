"""The parts of FABert's encoder: the sum of embeddings that a text enters as, and a post-norm layer.

Parameter names are those of stock BERT checkpoints.

Shape letters: B batch, N tokens, C hidden width, H heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GradientCheckpointingLayer
from transformers.activations import ACT2FN

from .fa_chunked import run_layer_in_chunks
from .fa_layers import apply_in_pieces
from .fa_layout import PLAIN, Layout
from .fa_mixer import build_mixer
from .fa_sequence_parallel import Shard


class FABertEmbeddings(nn.Module):
    """Sum of word, segment and position embeddings, normalised: ids [B, N] or embeddings [B, N, C] -> [B, N, C]."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.position_embeddings = (
            None
            if config.position_embedding_type == "none"
            else nn.Embedding(config.position_table_size, config.hidden_size)
        )
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.is_periodic = config.position_embedding_type == "periodic"

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        layout: Layout = PLAIN,
    ) -> Tensor:
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if inputs_embeds is not None and layout.mask is not None:
            # No layer lets padding reach a token, but NaN times a gradient of zero is NaN in every weight.
            overflows = ~inputs_embeds.square().sum(dim=2).isfinite()
            embeddings = inputs_embeds.masked_fill((overflows & ~layout.mask)[:, :, None], 0.0)
        if token_type_ids is None:
            token_type_ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = self.positions(embeddings, layout)
            elif not torch.compiler.is_compiling() and not position_ids.is_meta and position_ids.numel():
                self.check_longest(int(position_ids.max()) + 1)
            if self.is_periodic:
                position_ids = position_ids % self.position_embeddings.num_embeddings
            embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))

    def positions(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Number each document's tokens from 0 at its first real one: [B, N], or [1, N] where a row is a document.

        Masked tokens between real ones are counted, padding around them isn't.
        """
        longest = tokens.shape[1]
        can_read = not torch.compiler.is_compiling() and not tokens.is_meta and longest > 0
        if layout.documents is None and layout.mask is None:
            position_ids = torch.arange(longest, device=tokens.device)[None]
        else:
            assert layout.documents is not None or layout.mask is not None
            position_ids = layout.places() if layout.mask is not None else layout.documents.positions[None]
            unread = longest if layout.documents is None else 0
            longest = int(position_ids.max()) + 1 if can_read and len(position_ids) else unread
        self.check_longest(longest)
        return position_ids

    def split(
        self,
        shard: Shard,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Return this process's part of each input of `forward`; positions count the tokens of all processes."""
        if self.position_embeddings is None:
            position_ids = None
        elif position_ids is None:
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            assert tokens is not None
            position_ids = self.positions(tokens, Layout(shard.mask))
        elif position_ids.numel():
            self.check_longest(int(position_ids.max()) + 1)
        inputs = (input_ids, inputs_embeds, token_type_ids, position_ids)
        return tuple(None if tensor is None else shard.own(tensor) for tensor in inputs)

    def check_longest(self, longest: int) -> None:
        """Raise ValueError if a document of so many tokens is longer than the table of "absolute" positions."""
        table_size = self.position_embeddings.num_embeddings
        # In this order: under torch.compile the comparison would bind the graph to the lengths of one side of it.
        if not self.is_periodic and longest > table_size:
            raise ValueError(
                f"The document has {longest} tokens but the position table has {table_size} rows "
                "(`max_position_embeddings`). Truncate it (truncation=True, for a pipeline too), enlarge the table, or "
                'use position_embedding_type="periodic".'
            )


class FABertSelfAttention(nn.Module):
    """Project to Q, K, V and mix tokens per head: [B, N, C] -> [B, N, C]."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.mixer = build_mixer(config, layer_index, spatial_rank=1)

    def project(self, projection: nn.Module, hidden_states: Tensor) -> Tensor:
        """Apply one of the three projections and cut it into heads: [B, N, C] -> [B, H, N, C / H]."""
        return projection(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        query, key, value = (self.project(part, hidden_states) for part in (self.query, self.key, self.value))
        return self.mixer(query, key, value, layout).transpose(1, 2).flatten(2)


class FABertOutput(nn.Module):
    """Project a sub-layer's result and add the residual, post-norm: [B, N, *], [B, N, C] -> [B, N, C]."""

    def __init__(self, config, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class FABertIntermediate(nn.Module):
    """The first half of the feed-forward part: [B, N, C] -> [B, N, intermediate_size]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states))


def _identity(hidden_states: Tensor) -> Tensor:
    return hidden_states


class FABertLayer(GradientCheckpointingLayer):
    """One encoder layer: [B, N, C] -> [B, N, C]."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = nn.ModuleDict(
            {"self": FABertSelfAttention(config, layer_index), "output": FABertOutput(config, config.hidden_size)}
        )
        self.intermediate = FABertIntermediate(config)
        self.output = FABertOutput(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        """Mix the tokens, then transform each; with a `chunk_size` in the layout, overwrites `hidden_states`."""
        attention, normalize = self.attention_and_norm
        if layout.chunk_size is not None:
            return run_layer_in_chunks(hidden_states, layout, attention, normalize, self.feed_forward)
        return self.feed_forward(attention(normalize(hidden_states), layout), hidden_states)

    @property
    def attention_and_norm(self) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The self-attention and the function from the layer's input to the attention's, each token on its own."""
        return self.attention["self"], _identity

    def feed_forward(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        """Compute the layer's output from the mixed tokens and its input, each token on its own: [B, N, C] each."""
        piece_size = self.chunk_size_feed_forward
        return apply_in_pieces(self.feed_forward_piece, piece_size, mixed, hidden_states, training=self.training)

    def feed_forward_piece(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        attended = self.attention["output"](mixed, hidden_states)
        return self.output(self.intermediate(attended), attended)
