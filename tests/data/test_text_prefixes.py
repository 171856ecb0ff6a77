"""Protects tokens of long texts: those of a beginning must be the very ones that the whole text begins with."""

import logging
import random
import time

import datasets
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fa_transformers.data import tokenizing
from fa_transformers.data.readers.tables import DataError
from fa_transformers.data.text_prefixes import find_prefix, has_safe_cuts
from fa_transformers.data.tokenizing import tokenize_documents, tokenize_texts

PIECES = (
    "sea", "ship's", "Law", "courts", "naïve", "x" * 130, "a-b", "don't", "3.14", "¼", "法院", "案件", "港", "Ελλάς",
    "ΟΔΟΣ", "ǅ", "ﬁn", "e\u0301", " \u0301", "\u200b", "\u3164", "\u00a8", "\u037a", "\x00", "[MASK]", "<doc>", "``",
    "''", "🚢", "👩\u200d🚀", "\u0d4e", "עברית", "عربي", "हिन्दी", "ไทย", "  ", "   ", "\n", "\t", "\r\n",
    "\u00a0", "\u3000",
)  # fmt: skip
CORPUS = [
    "the sea and the ship's law courts",
    "don't 3.14 naïve a-b 法院 案件",
    "hello wor\u0301ld Ελλάς ``quoted''",
] * 9


def random_text(seed: int, blanks: float) -> str:
    source = random.Random(seed)
    return "".join(
        piece + (" " if source.random() < blanks else "") for piece in source.choices(PIECES, k=source.randint(0, 200))
    )


def build(model: str) -> PreTrainedTokenizerFast:
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    if model == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    elif model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        spaces = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace("``", '"')]
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *spaces])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )
    built.add_tokens(["<doc>"])
    return built


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram", "minilm"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    if request.param == "minilm":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("minilm"))
    return build(request.param)


@pytest.fixture
def early_cuts(monkeypatch):
    """Let texts of a few words be cut already."""
    monkeypatch.setattr(tokenizing, "LEAST_CHARACTERS", 1)
    monkeypatch.setattr(tokenizing, "CHARACTERS_PER_TOKEN", 1)


def test_tokens_of_a_beginning_are_those_of_the_whole_text(tokenizer, early_cuts):
    assert has_safe_cuts(tokenizer)
    texts = [random_text(seed, blanks) for seed in range(20) for blanks in (0.0, 0.2, 0.9)]
    texts += ["法" * 300, "x" * 300, "a " * 300, " " * 300, "", "[MASK] " * 50, "word  " * 100]
    num_cut = 0
    for max_length in (3, 10, 40):
        expected = tokenizer(texts, truncation=True, max_length=max_length, padding=False, verbose=False)
        whole = [len(tokens) for tokens in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        found = tokenize_texts(tokenizer, texts, max_length)
        full_length, length = found.pop("full_length"), found.pop("length")
        assert found == dict(expected)
        assert length == [min(count, max_length) for count in whole]
        for count, true in zip(full_length, whole, strict=True):
            assert count == true if count >= 0 else max_length < -count <= true
        num_cut += sum(count < 0 for count in full_length)
    assert num_cut > 30


def test_a_cut_lies_after_a_letter_and_before_a_blank():
    """Not after what a normalization may remove, with which the blank before it would be the last."""
    assert find_prefix("\u200b ab \u0301 cd " + "x" * 100, 4) == "\u200b ab \u0301 cd"
    assert find_prefix("\u200b ab \u0301 cd " + "x" * 100, 3) == "\u200b ab"
    assert find_prefix("x" * 1000, 10) == "x" * 1000
    assert find_prefix("法" * 20 + " " + "法" * 100, 5) == "法" * 20


UNSAFE = {
    "no_split_at_blanks": ("pre_tokenizer", None),
    "a_pattern_of_its_own": ("pre_tokenizer", pre_tokenizers.Split(Regex("a b"), "isolated")),
    "bytes_without_words": ("pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
    "metaspace_without_split": ("pre_tokenizer", pre_tokenizers.Metaspace(split=False)),
    "a_sequence_with_a_pattern": (
        "pre_tokenizer",
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("a b"), "isolated")]),
    ),
    "a_replacement_of_blanks": ("normalizer", normalizers.Replace("a b", "c")),
    "a_letter_that_is_removed": ("normalizer", normalizers.Replace("a", "")),
    "a_pattern_that_is_replaced": ("normalizer", normalizers.Replace(Regex("a.*b"), "c")),
}


@pytest.mark.parametrize(("name", "part"), UNSAFE.values(), ids=UNSAFE)
def test_a_tokenizer_whose_words_may_hold_blanks_reads_whole_texts(name, part, early_cuts):
    tokenizer = build("wordpiece")
    setattr(tokenizer.backend_tokenizer, name, part)
    assert not has_safe_cuts(tokenizer)
    found = tokenize_texts(tokenizer, ["sea law " * 50], 5)
    assert found["full_length"][0] == len(tokenizer("sea law " * 50)["input_ids"])


def test_other_tokenizers_are_not_cut():
    tokenizer = build("wordpiece")
    assert not has_safe_cuts(lambda texts: texts)
    tokenizer.truncation_side = "left"
    assert not has_safe_cuts(tokenizer)
    tokenizer.truncation_side = "right"
    tokenizer.add_tokens(["two words"])
    assert not has_safe_cuts(tokenizer)


def test_the_warning_claims_no_length_that_nobody_counted_and_the_error_counts(tmp_path, caplog, early_cuts):
    tokenizer = build("wordpiece")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
    part = datasets.Dataset.from_dict({"text": ["sea", "the sea " * 100], "label": [0, 1]}, features=features)
    documents = datasets.DatasetDict(train=part)
    with caplog.at_level(logging.WARNING):
        tokenized = tokenize_documents(documents, tokenizer, max_length=8)
    assert "1 of 2 documents are longer than 8 tokens and were truncated; the longest has at least" in caplog.text
    assert "full_length" not in tokenized["train"].column_names and tokenized["train"]["length"][:] == [3, 8]
    with pytest.raises(DataError, match="row 2: the document has 202 tokens, the limit is 8"):
        tokenize_documents(documents, tokenizer, max_length=8, strict_length=True)


def test_a_long_text_costs_what_is_kept_of_it():
    """2 MB take seconds when read whole; what 16 tokens need is a thousandth of it."""
    tokenizer = build("wordpiece")
    text = "the sea and the ship's law courts " * 60_000
    started = time.perf_counter()
    tokenize_texts(tokenizer, [text], 16)
    assert time.perf_counter() - started < 0.5
