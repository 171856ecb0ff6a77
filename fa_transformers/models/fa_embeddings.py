"""The sum of embeddings that a text enters an encoder as.

Shape letters: B batch, N tokens, C hidden width.
"""

import torch
from torch import Tensor, nn

from .fa_packed import PackedDocuments
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
            else nn.Embedding(config.max_position_embeddings, config.hidden_size)
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
        mask: Tensor | None,
        documents: PackedDocuments | None = None,
    ) -> Tensor:
        embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            if position_ids is None:
                position_ids = self.positions(embeddings, mask, documents)
            elif not torch.compiler.is_compiling() and not position_ids.is_meta and position_ids.numel():
                self.check_longest(int(position_ids.max()) + 1)
            if self.is_periodic:
                position_ids = position_ids % self.position_embeddings.num_embeddings
            embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))

    def positions(self, embeddings: Tensor, mask: Tensor | None, documents: PackedDocuments | None) -> Tensor:
        """Count each document's real tokens from 0: [B, N], or [1, N] where nothing is padded."""
        longest = embeddings.shape[1]
        can_read = not torch.compiler.is_compiling() and not embeddings.is_meta and longest > 0
        if documents is not None:
            position_ids = documents.positions[None]
            longest = int(documents.lengths.max()) if can_read else 0
        elif mask is None:
            position_ids = torch.arange(longest, device=embeddings.device)[None]
        else:
            position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
            longest = int(mask.sum(dim=1).max()) if can_read and len(mask) else longest
        self.check_longest(longest)
        return position_ids

    def split(
        self,
        shard: Shard,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """This rank's part of each input of `forward`; tokens are counted, and checked, over all ranks."""
        if self.position_embeddings is None:
            position_ids = None
        elif position_ids is None:
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            assert tokens is not None
            position_ids = self.positions(tokens, mask, None)
        elif position_ids.numel():
            self.check_longest(int(position_ids.max()) + 1)
        inputs = (input_ids, inputs_embeds, token_type_ids, position_ids, mask)
        return tuple(None if tensor is None else shard.own(tensor) for tensor in inputs)

    def check_longest(self, longest: int) -> None:
        table_size = self.position_embeddings.num_embeddings
        # In this order: under torch.compile the comparison would bind the graph to the lengths of one side of it.
        if not self.is_periodic and longest > table_size:
            raise ValueError(
                f"The document has {longest} tokens but the position table has {table_size} rows "
                "(`max_position_embeddings`). Truncate it, enlarge the table, or use "
                'position_embedding_type="periodic".'
            )
