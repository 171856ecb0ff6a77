"""FABert: BERT whose self-attention is factorized, so that time and memory grow linearly with the document.

Paper: Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243.
Parameter names are those of stock BERT checkpoints, so such checkpoints load as they are. The parts of the encoder
stand in `fa_bert_layers.py`, a layer's token mixing in `fa_mixer.py`, the operator in `fa_attention.py`.

Padding may stand on the left, on the right or on both sides: positions and the CLS token follow the mask. Masked tokens
between real ones are no keys of any term, and positions go on counting, as in stock BERT. Or there is no padding: with
`cu_seqlens` a batch is one row of documents, one after the other (see `fa_packed.py`).

Shape letters: B batch, N tokens, C hidden width, L labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_fa_bert import FABertConfig
from .fa_bert_layers import FABertEmbeddings, FABertLayer
from .fa_chunked import embed_text_in_chunks
from .fa_layers import FAEncoder
from .fa_layout import Layout, lay_out_text
from .fa_packed import PackedDocuments
from .modeling_fa import (
    FAPreTrainedModel,
    classification_loss,
    count_choices,
    pool_first,
    pool_mean,
    span_loss,
    token_loss,
)

# isort: split
# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. A test keeps
# the list whole; it can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .configuration_fa import FactorizedConfig  # noqa: F401
from .fa_attention import factorized_attention  # noqa: F401
from .fa_attention_blocked import blocked_attention  # noqa: F401
from .fa_attention_triton import triton_attention  # noqa: F401
from .fa_checkpoint_names import translate_config  # noqa: F401
from .fa_context import apply_context  # noqa: F401
from .fa_local import window_attention  # noqa: F401
from .fa_mixer import build_mixer  # noqa: F401
from .fa_sequence_parallel import Shard  # noqa: F401
from .fa_triton_kernels import triton  # noqa: F401
from .fa_validation import check_mask  # noqa: F401


class FABertPooler(nn.Module):
    """A dense layer and tanh over each document's first real token: [B, N, C] -> [B, C], packed [documents, C]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        return torch.tanh(self.dense(pool_first(hidden_states, layout)))


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
        self.encoder = FAEncoder(config, FABertLayer)
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
        layout: Layout | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Encode documents.

        Args:
            input_ids: int [B, N]; or give `inputs_embeds` [B, N, C].
            attention_mask: [B, N] of zeros and ones of any type, 1 = real. Nothing attends to other tokens, before,
                after or between real ones, and what they hold changes nothing. None means that all are real.
            token_type_ids: int [B, N], 0 where missing.
            position_ids: int [B, N] or [1, N]; by default tokens are counted from 0 at the document's first real one.
            output_attentions: refused if true, as no layer forms its attention maps.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False returns a tuple.
            cu_seqlens: int [documents + 1], the running total of lengths from 0 to N, for a packed batch: B is 1, and
                positions restart in every document. Pooled vectors are [documents, C]; for a document without real
                tokens the pooling reads zeros. Layers in `softmax_layers` don't compile with it.
            chunk_size: tokens of each document to work on at a time, where activations of all would not fit into
                memory. The result is the same, within rounding; the memory is that of one [B, N, C] tensor and of the
                activations of one chunk (`softmax_layers` add two such tensors). Without gradients and `cu_seqlens`
                only. None: all at once.
            layout: the layout that `lay_out_text` makes of `attention_mask`, `cu_seqlens` and `chunk_size`, which are
                then ignored. Heads give it, as they read it as well. None: it is made here.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given, the mask has another shape or
                numbers, a document is longer than the table of "absolute" positions, `cu_seqlens` doesn't fit, or
                `chunk_size` is below 1 or comes with gradients or `cu_seqlens`.
        """
        output_hidden_states = self.wants_hidden_states(output_attentions, output_hidden_states)
        if layout is None:
            layout = lay_out_text(given_tokens(input_ids, inputs_embeds), attention_mask, cu_seqlens, chunk_size)
        inputs: tuple[Tensor | None, ...] = (input_ids, inputs_embeds, token_type_ids, position_ids)
        if layout.shard is not None:
            inputs = self.embeddings.split(layout.shard, *inputs)
        if layout.chunk_size is None:
            embeddings = self.embeddings(*inputs, layout)
        else:
            embeddings = embed_text_in_chunks(self.embeddings, layout, *inputs)
        encoded = self.encoder(embeddings, layout, output_hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=None if self.pooler is None else self.pooler(encoded.last_hidden_state, layout),
            hidden_states=encoded.hidden_states,
        )
        return self.as_requested(output, return_dict)


def given_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return the input that is given, ids int [B, N] or embeddings [B, N, C]; ValueError for none or both."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give either `input_ids` or `inputs_embeds`, and not both.")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    assert tokens is not None
    return tokens


class FABertHead(FABertPreTrainedModel):
    """Base of the heads: `bert`, a dropout and a pooling.

    Their inputs are those of `FABertModel.forward`; `options` are its keyword arguments that are not named. In a packed
    batch the documents are the samples: where a head answers for whole documents, B is their number.
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

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cu_seqlens: Tensor | PackedDocuments | None = None,
        chunk_size: int | None = None,
        **options,
    ) -> tuple[BaseModelOutputWithPooling, Layout]:
        """Lay the tokens out and run `bert`; return its output and the layout, which the head reads as well."""
        layout = lay_out_text(given_tokens(input_ids, inputs_embeds), attention_mask, cu_seqlens, chunk_size)
        inputs = (input_ids, None, token_type_ids, position_ids, inputs_embeds)
        return self.bert(*inputs, return_dict=True, layout=layout, **options), layout

    def pool(self, encoded: BaseModelOutputWithPooling, layout: Layout) -> Tensor:
        """Return one vector per document, as `classifier_pooling` says, after dropout: [B, C]."""
        is_mean = self.config.classifier_pooling == "mean"
        pooled = pool_mean(encoded.last_hidden_state, layout) if is_mean else encoded.pooler_output
        # Dropout falls alike on all processes that share the documents.
        dropped = self.dropout(pooled)
        return dropped if layout.shard is None else layout.shard.from_first_rank(dropped)


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
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded, layout = self.encode(*inputs, **options)
        logits = self.cls["predictions"](encoded.last_hidden_state)
        loss = None if labels is None else token_loss(logits, labels, layout.shard)
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
        **options,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded, layout = self.encode(*inputs, **options)
        logits = self.classifier(self.pool(encoded, layout))
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
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded, layout = self.encode(*inputs, **options)
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None if labels is None else token_loss(logits, labels, layout.shard)
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self.as_requested(output, return_dict)


class FABertForQuestionAnswering(FABertHead):
    """Find an answer's first and last token; start and end logits [B, N], lowest at padding.

    `start_positions` and `end_positions` are int [B] indices into the N tokens, in a packed batch into the document's
    own tokens; the loss ignores positions outside.
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
        **options,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded, layout = self.encode(*inputs, **options)
        shard = layout.shard
        start_logits, end_logits = self.qa_outputs(encoded.last_hidden_state).unbind(dim=2)
        if layout.mask is not None:
            # Padding must not share in the softmax over positions, or the loss would depend on its amount.
            padding, lowest = ~layout.mask, torch.finfo(start_logits.dtype).min
            start_logits = start_logits.masked_fill(padding, lowest)
            end_logits = end_logits.masked_fill(padding, lowest)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss, end_loss = (
                span_loss(logits if shard is None else shard.gather(logits, dim=1), positions, layout.documents)
                for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
            )
            loss = (start_loss + end_loss) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=encoded.hidden_states
        )
        return self.as_requested(output, return_dict)


class FABertForMultipleChoice(FABertHead):
    """Choose among K texts: inputs [B, K, N] -> logits [B, K]. `labels` int [B].

    A packed batch has the K texts of the first example, then the K texts of the second, and so on; K is `num_choices`,
    by default the number of documents over the number of labels.
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
        if cu_seqlens is None:
            num_choices = given_tokens(input_ids, inputs_embeds).shape[1]
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                None if tensor is None else tensor.flatten(0, 1)
                for tensor in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            )
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded, layout = self.encode(*inputs, cu_seqlens=cu_seqlens, **options)
        scores = self.classifier(self.pool(encoded, layout))
        if cu_seqlens is not None:
            num_choices = count_choices(len(scores), num_choices, labels)
        logits = scores.view(-1, num_choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self.as_requested(output, return_dict)
