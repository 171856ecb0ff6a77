"""FABert: BERT whose self-attention is factorized, so that time and memory grow linearly with the document.

Paper: Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243.
Parameter names are those of stock BERT checkpoints, so such checkpoints load as they are. A layer's token mixing stands
in `fa_mixer.py`, the operator in `fa_attention.py`.

Padding may stand on the left, on the right or on both sides: positions and the CLS token follow the mask. Or there is
none: with `cu_seqlens` a batch is one row of documents, one after the other (see `fa_packed.py`).

Shape letters: B batch, N tokens, C hidden width, H heads, L labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GradientCheckpointingLayer
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

# `noqa` marks what is not used here: from a local folder, transformers 5.3 copies only the files that this one itself
# imports.
from .configuration_fa import FactorizedConfig  # noqa: F401
from .configuration_fa_bert import FABertConfig
from .fa_attention import factorized_attention  # noqa: F401
from .fa_attention_blocked import blocked_attention  # noqa: F401
from .fa_attention_triton import triton_attention  # noqa: F401
from .fa_checkpoint_names import translate_config  # noqa: F401
from .fa_chunked import check_chunk_size, embed_text_in_chunks, run_layer_in_chunks
from .fa_context import apply_context  # noqa: F401
from .fa_embeddings import FABertEmbeddings
from .fa_local import window_attention  # noqa: F401
from .fa_mixer import build_mixer
from .fa_packed import PackedDocuments, pack
from .fa_sequence_parallel import Shard, current_shard, split_tokens
from .modeling_fa import (
    FAPreTrainedModel,
    apply_in_pieces,
    check_mask,
    classification_loss,
    count_choices,
    first_real_token,
    mean_over_real,
    span_loss,
    token_loss,
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

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        documents: PackedDocuments | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        query, key, value = (self.project(part, hidden_states) for part in (self.query, self.key, self.value))
        return self.mixer(query, key, value, mask, documents=documents, shard=shard).transpose(1, 2).flatten(2)


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

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        documents: PackedDocuments | None = None,
        chunk_size: int | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """With `chunk_size`, overwrites `hidden_states`."""
        if chunk_size is not None:
            return run_layer_in_chunks(
                hidden_states, mask, chunk_size, self.attention["self"], nn.Identity(), self.finish, shard=shard
            )
        return self.finish(self.attention["self"](hidden_states, mask, documents, shard), hidden_states)

    def finish(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        """What follows the token mixing, each token on its own: mixed and the layer's input, [B, N, C] -> [B, N, C]."""
        chunk_size = self.chunk_size_feed_forward
        return apply_in_pieces(self.finish_piece, chunk_size, mixed, hidden_states, training=self.training)

    def finish_piece(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        attended = self.attention["output"](mixed, hidden_states)
        return self.output(self.intermediate(attended), attended)


class FABertEncoder(nn.Module):
    """The stack of layers: [B, N, C] -> [B, N, C], with every layer's input on request."""

    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(FABertLayer(config, index) for index in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        output_hidden_states: bool,
        documents: PackedDocuments | None = None,
        chunk_size: int | None = None,
        shard: Shard | None = None,
    ) -> BaseModelOutput:
        collected = [hidden_states]
        for layer in self.layer:
            if chunk_size is not None and output_hidden_states:
                hidden_states = hidden_states.clone()  # the layer overwrites what it gets
            hidden_states = layer(hidden_states, mask, documents=documents, chunk_size=chunk_size, shard=shard)
            if output_hidden_states:
                collected.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=tuple(collected) if output_hidden_states else None
        )


class FABertPooler(nn.Module):
    """A dense layer and tanh over each document's first real token: [B, N, C] -> [B, C], packed [documents, C]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None, documents: PackedDocuments | None = None) -> Tensor:
        if documents is not None:
            first = documents.first_tokens(hidden_states)
        else:
            first = first_real_token(hidden_states, mask, current_shard())
        return torch.tanh(self.dense(first))


class FABertPreTrainedModel(FAPreTrainedModel):
    """Base of the FABert models."""

    config_class = FABertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["FABertEmbeddings", "FABertLayer"]
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids", r"cls\.seq_relationship"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FABertMaskedLMPrediction):
            nn.init.zeros_(module.bias)


class FABertModel(FABertPreTrainedModel):
    """The encoder: token ids [B, N] -> hidden states [B, N, C] and the pooled first real token [B, C]."""

    def __init__(self, config: FABertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = FABertEmbeddings(config)
        self.encoder = FABertEncoder(config)
        self.pooler = FABertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | PackedDocuments | None = None,
        chunk_size: int | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Encode documents.

        Args:
            input_ids: int [B, N]; or give `inputs_embeds` [B, N, C].
            attention_mask: int or bool [B, N], 1 = real; real tokens are contiguous. None means that all are real.
            token_type_ids: int [B, N], 0 where missing.
            position_ids: int [B, N] or [1, N]; by default real tokens are counted from 0.
            output_attentions: refused if true, as there are no attention maps.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False returns a tuple.
            cu_seqlens: int [documents + 1], the running total of lengths from 0 to N, for a packed batch: B is 1, there
                is no mask, positions restart in every document, and the pooled vectors are [documents, C], those of an
                empty document being what zeros pool to. Layers in `softmax_layers` don't compile with it.
            chunk_size: tokens of each document to work on at a time, where activations of all would not fit into
                memory. The result is the same, within rounding; the memory is that of one [B, N, C] tensor and of the
                activations of one chunk (`softmax_layers` add two such tensors). Without gradients and `cu_seqlens`
                only. None: all at once.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, the mask has another shape or a
                hole, a document is longer than the table of "absolute" positions, `cu_seqlens` doesn't fit, or
                `chunk_size` is below 1 or comes with gradients or `cu_seqlens`.
        """
        check_chunk_size(chunk_size, cu_seqlens)
        output_hidden_states = self.wants_hidden_states(output_attentions, output_hidden_states)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, and not both.")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        mask = check_mask(attention_mask, tokens.shape[:2])
        documents = pack(cu_seqlens, tokens.shape[:2], tokens.device, mask)
        shard = split_tokens(tokens, tokens.shape[1], mask, packed=documents is not None)
        inputs: tuple[Tensor | None, ...] = (input_ids, inputs_embeds, token_type_ids, position_ids, mask)
        if shard is not None:
            inputs = self.embeddings.split(shard, *inputs)
        if chunk_size is None:
            embeddings = self.embeddings(*inputs, documents)
        else:
            embeddings = embed_text_in_chunks(self.embeddings, chunk_size, *inputs)
        encoded = self.encoder(embeddings, inputs[-1], output_hidden_states, documents, chunk_size, shard)
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=None if self.pooler is None else self.pooler(encoded.last_hidden_state, mask, documents),
            hidden_states=encoded.hidden_states,
        )
        return self.as_requested(output, return_dict)


class FABertHead(FABertPreTrainedModel):
    """What the heads have in common: `bert`, a dropout and a pooling.

    Their inputs are those of `FABertModel.forward`, `options` its keyword arguments that are not named. Of a packed
    batch the documents are the samples: for what a head says of whole documents, B is their number.
    """

    def __init__(self, config: FABertConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.bert = FABertModel(config, add_pooling_layer=add_pooling_layer)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)

    def get_input_embeddings(self):
        return self.bert.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.bert.set_input_embeddings(value)

    def pool(self, encoded: BaseModelOutputWithPooling, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """One vector per document, as `classifier_pooling` says: [B, C]."""
        if self.config.classifier_pooling == "cls":
            return encoded.pooler_output
        documents = self.documents(encoded, cu_seqlens)
        if documents is not None:
            return documents.mean(encoded.last_hidden_state)
        return mean_over_real(encoded.last_hidden_state, None if mask is None else mask.bool(), current_shard())

    def drop(self, pooled: Tensor) -> Tensor:
        """Apply dropout, the same on all ranks that share the documents."""
        shard = current_shard()
        return self.dropout(pooled) if shard is None else shard.from_first_rank(self.dropout(pooled))

    def documents(self, encoded: BaseModelOutputWithPooling, cu_seqlens: Tensor | None) -> PackedDocuments | None:
        """The documents of a batch that `bert` has encoded; None where it was not packed."""
        tokens = encoded.last_hidden_state
        return pack(cu_seqlens, tokens.shape[:2], tokens.device, None)


class FABertMaskedLMPrediction(nn.Module):
    """Transform and decode hidden states to vocabulary logits: [B, N, C] -> [B, N, vocab_size]."""

    def __init__(self, config):
        super().__init__()
        self.transform = FABertTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


class FABertTransform(nn.Module):
    """Dense layer, activation and layer norm before the decoder: [B, N, C] -> [B, N, C]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class FABertForMaskedLM(FABertHead):
    """Predict masked tokens. `labels` int [B, N], -100 = ignored; logits [B, N, vocab_size]."""

    TOKEN_OUTPUTS = {"logits": 1, "hidden_states": 1}
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: FABertConfig):
        super().__init__(config)
        self.cls = nn.ModuleDict({"predictions": FABertMaskedLMPrediction(config)})
        self.post_init()

    def get_output_embeddings(self):
        return self.cls["predictions"].decoder

    def set_output_embeddings(self, new_embeddings):
        self.cls["predictions"].decoder = new_embeddings
        self.cls["predictions"].bias = new_embeddings.bias

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **options
        )
        logits = self.cls["predictions"](encoded.last_hidden_state)
        loss = None if labels is None else token_loss(logits, labels, current_shard())
        return self.as_requested(
            MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states), return_dict
        )


class FABertForSequenceClassification(FABertHead):
    """Classify or score whole documents; logits [B, L].

    `labels`: int [B] for single-label classification, float [B, L] for multi-label classification, float [B] (or
    [B, L]) for regression; see `config.problem_type`.
    """

    def __init__(self, config: FABertConfig):
        super().__init__(config, add_pooling_layer=config.classifier_pooling == "cls")
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **options,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*inputs, return_dict=True, cu_seqlens=cu_seqlens, **options)
        logits = self.classifier(self.drop(self.pool(encoded, attention_mask, cu_seqlens)))
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self.as_requested(output, return_dict)


class FABertForTokenClassification(FABertHead):
    """Classify every token. `labels` int [B, N], -100 = ignored; logits [B, N, L]."""

    TOKEN_OUTPUTS = {"logits": 1, "hidden_states": 1}

    def __init__(self, config: FABertConfig):
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options,
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        encoded = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **options
        )
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None if labels is None else token_loss(logits, labels, current_shard())
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self.as_requested(output, return_dict)


class FABertForQuestionAnswering(FABertHead):
    """Find an answer's first and last token; start and end logits [B, N], lowest at padding.

    `start_positions` and `end_positions` are int [B] indices into the N tokens, of packed documents into its own;
    those outside are ignored by the loss.
    """

    TOKEN_OUTPUTS = {"start_logits": 1, "end_logits": 1, "hidden_states": 1}

    def __init__(self, config: FABertConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"`num_labels` must be 2 (start and end) for question answering, got {config.num_labels}.")
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **options,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*inputs, return_dict=True, cu_seqlens=cu_seqlens, **options)
        shard = current_shard()
        start_logits, end_logits = self.qa_outputs(encoded.last_hidden_state).unbind(dim=2)
        if attention_mask is not None:
            # Padding must not share in the softmax over positions, or the loss would depend on its amount.
            padding, lowest = ~attention_mask.bool(), torch.finfo(start_logits.dtype).min
            padding = padding if shard is None else shard.own(padding)
            start_logits = start_logits.masked_fill(padding, lowest)
            end_logits = end_logits.masked_fill(padding, lowest)
        loss = None
        if start_positions is not None and end_positions is not None:
            documents = self.documents(encoded, cu_seqlens)
            start_loss, end_loss = (
                span_loss(logits if shard is None else shard.gather(logits, dim=1), positions, documents)
                for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
            )
            loss = (start_loss + end_loss) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=encoded.hidden_states
        )
        return self.as_requested(output, return_dict)


class FABertForMultipleChoice(FABertHead):
    """Choose among K texts: inputs [B, K, N] -> logits [B, K]. `labels` int [B].

    A packed batch has the K texts of the first example, then those of the second, and so on; K is `num_choices`, by
    default the number of documents over that of labels.
    """

    def __init__(self, config: FABertConfig):
        super().__init__(config, add_pooling_layer=config.classifier_pooling == "cls")
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        num_choices: int | None = None,
        **options,
    ) -> MultipleChoiceModelOutput | tuple[Tensor, ...]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, and not both.")
        inputs: tuple[Tensor | None, ...] = (
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
        )
        if cu_seqlens is None:
            num_choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            inputs = tuple(None if tensor is None else tensor.flatten(0, 1) for tensor in inputs)
        encoded = self.bert(*inputs, return_dict=True, cu_seqlens=cu_seqlens, **options)
        scores = self.classifier(self.drop(self.pool(encoded, inputs[1], cu_seqlens)))
        if cu_seqlens is not None:
            num_choices = count_choices(len(scores), num_choices, labels)
        logits = scores.view(-1, num_choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self.as_requested(output, return_dict)
