"""A tokenizer must belong to the model and be able to pad, which is looked at before anything is tokenized."""

import pytest
from tiny_models import make_tokenizer
from transformers import BertConfig, PreTrainedTokenizerFast

from fa_transformers import convert_checkpoint
from fa_transformers.data.collators import TextCollator
from fa_transformers.data.tokenizing import check_tokenizer, load_tokenizer
from fa_transformers.models import FABertConfig, FABertModel

WORDS = ["sea", "ship", "law"]
CONFIG = BertConfig(vocab_size=8, pad_token_id=0)


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary, of which no token has a name."""
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(WORDS, 32).backend_tokenizer)


def test_more_tokens_than_the_table_has_rows_are_refused_wherever_a_checkpoint_is_read(tmp_path):
    tokenizer = make_tokenizer(WORDS, 32)
    check_tokenizer(tokenizer, CONFIG, "mine")
    tokenizer.add_tokens(["<doc>"])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    FABertModel(FABertConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for refused in (lambda: load_tokenizer(tmp_path, CONFIG, packing=True), lambda: convert_checkpoint(str(tmp_path))):
        with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer has 9 tokens, the checkpoint's table 8"):
            refused()


def test_a_tokenizer_that_cannot_pad_is_refused_with_the_mend_unless_nothing_is_padded():
    for config in (BertConfig(vocab_size=8, pad_token_id=5), BertConfig(vocab_size=8, pad_token_id=None)):
        with pytest.raises(ValueError, match=r"mine: the tokenizer has no padding token.*tokenizer_config.*--packing"):
            check_tokenizer(plain_tokenizer(), config, "mine")
        check_tokenizer(plain_tokenizer(), config, "mine", packing=True)


def test_the_models_padding_token_is_taken_where_it_is_called_so_and_told(caplog):
    tokenizer = plain_tokenizer()
    check_tokenizer(tokenizer, CONFIG, "mine")
    assert "mine: the tokenizer names no padding token: '[PAD]', the model's, is taken" in caplog.text
    examples = [dict(tokenizer("sea ship")), dict(tokenizer("sea ship law"))]
    batch = TextCollator(tokenizer)(examples)
    assert batch["input_ids"].shape[0] == 2 and batch["input_ids"][0, -1] == 0
