"""Configuration of FABert: stock BERT's fields and those of factorized attention."""

from .configuration_fa import FactorizedConfig

# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. The import
# can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .fa_checkpoint_names import translate_config  # noqa: F401


class FABertConfig(FactorizedConfig):
    """Configuration of the FABert models; reads stock BERT configurations too.

    Args:
        vocab_size: number of token ids.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: widths and counts as in BERT.
        hidden_act: activation of the feed-forward part, a key of transformers' ACT2FN.
        hidden_dropout_prob: dropout on embeddings and sub-layer outputs.
        attention_probs_dropout_prob: kept for checkpoints' sake. It acts in `softmax_layers`; factorized layers have no
            attention probabilities to drop.
        max_position_embeddings: rows of the position table, in tokens. With "absolute" positions also the longest
            document.
        type_vocab_size: number of segment ids.
        initializer_range: standard deviation of fresh weights.
        layer_norm_eps: epsilon of the layer norms.
        classifier_dropout: dropout before classifiers; None means `hidden_dropout_prob`.
        kwargs: the fields of `FactorizedConfig` and of transformers' `PretrainedConfig`.

    Raises:
        ValueError: a field has a value that cannot be used; the message names it.
    """

    model_type = "fa_bert"
    STOCK_MODEL_TYPES = ("bert",)
    AUTO_MAP = {
        "AutoConfig": "configuration_fa_bert.FABertConfig",
        "AutoModel": "modeling_fa_bert.FABertModel",
        "AutoModelForMaskedLM": "modeling_fa_bert.FABertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_fa_bert.FABertForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_fa_bert.FABertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_fa_bert.FABertForQuestionAnswering",
        "AutoModelForMultipleChoice": "modeling_fa_bert.FABertForMultipleChoice",
    }

    def __init__(
        self,
        vocab_size=30522,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=512,
        type_vocab_size=2,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
        classifier_dropout=None,
        pad_token_id=0,
        tie_word_embeddings=True,
        **kwargs,
    ):
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.classifier_dropout = classifier_dropout
        self.check_fields()

    def check_fields(self):
        super().check_fields()
        for name in ("vocab_size", "max_position_embeddings", "type_vocab_size"):
            self.check_integer(name, minimum=1)
        if self.pad_token_id is not None:
            self.check_integer("pad_token_id", minimum=0)
            if self.pad_token_id >= self.vocab_size:
                raise ValueError(
                    f"`pad_token_id` ({self.pad_token_id}) must be below `vocab_size` ({self.vocab_size}), or None."
                )
        if self.classifier_dropout is not None:
            self.check_number("classifier_dropout", 0.0, 1.0)
        self.check_boolean("tie_word_embeddings")
