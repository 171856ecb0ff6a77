"""Configuration of FABert: stock BERT's fields and those of factorized attention."""

from .configuration_fa import FactorizedConfig

# Not used here: from a local folder, transformers 5.3 copies only the files that this one itself imports. The import
# can go when `setup.py` asks for a transformers that copies what those import too, as 5.23 does.
from .fa_checkpoint_names import translate_config  # noqa: F401

ANY_LENGTH = 10_000_000
"""`max_position_embeddings` of a model that reads any length. A number, and not -1: what reads it wants one, such as
sentence-transformers, which cuts texts to the smaller of it and the tokenizer's own limit."""


class FABertConfig(FactorizedConfig):
    """Configuration of the FABert models; reads stock BERT configurations too.

    Args:
        vocab_size: number of token ids.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: widths and counts as in BERT.
        hidden_act: activation of the feed-forward part, a key of transformers' ACT2FN.
        hidden_dropout_prob: dropout on embeddings and sub-layer outputs.
        attention_probs_dropout_prob: kept for checkpoints' sake. It acts in `softmax_layers`; factorized layers have no
            attention probabilities to drop.
        max_position_embeddings: tokens of the longest document. With "absolute" positions these are the rows of the
            position table. With "periodic" positions and "none" any length runs, and it is `ANY_LENGTH`: a smaller
            number that is given for them means `position_table_size`.
        position_table_size: rows of the position table with "periodic" positions; None: `max_position_embeddings`.
            With "absolute" positions leave it out.
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
        position_table_size=None,
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
        self.position_table_size = self._choose_table_size(max_position_embeddings, position_table_size)
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.classifier_dropout = classifier_dropout
        self.check_fields()

    def _choose_table_size(self, longest, table_size):
        """Return the rows of the position table, of the two fields that may say them; ValueError if they can't."""
        if self.position_embedding_type == "absolute":
            if table_size not in (None, longest):
                raise ValueError(
                    f'`position_table_size` {table_size!r}: with "absolute" positions the table has '
                    f"`max_position_embeddings` rows, {longest!r}; leave it out."
                )
            return longest
        if table_size is None and longest == ANY_LENGTH:
            raise ValueError("`position_table_size` is missing: it says the rows of the position table.")
        return longest if table_size is None else table_size

    @property
    def max_position_embeddings(self):
        """Tokens of the longest document, `ANY_LENGTH` where any length runs. Setting it to less sets the table."""
        return self.position_table_size if self.position_embedding_type == "absolute" else ANY_LENGTH

    @max_position_embeddings.setter
    def max_position_embeddings(self, value):
        if self.position_embedding_type == "absolute" or value != ANY_LENGTH:
            self.position_table_size = value

    def to_dict(self):
        fields = super().to_dict() | {"max_position_embeddings": self.max_position_embeddings}
        if self.position_embedding_type == "absolute":
            fields.pop("position_table_size", None)
        return fields

    def check_fields(self):
        super().check_fields()
        rows = "max_position_embeddings" if self.position_embedding_type == "absolute" else "position_table_size"
        for name in ("vocab_size", rows, "type_vocab_size"):
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
