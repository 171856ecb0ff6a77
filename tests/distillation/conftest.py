"""A stock checkpoint to distil from, and a fresh Accelerate for each test."""

from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState
from tiny_distillation import WORDS
from tiny_models import make_tokenizer, randomize, tiny_config
from transformers import BertConfig, BertModel


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps its settings for the whole process, and each run must choose its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def stock(tmp_path, monkeypatch) -> Path:
    """A stock BERT with random weights whose attention is not flat, and a word-level tokenizer."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "stock"
    tokenizer = make_tokenizer(WORDS, max_length=64)
    tokenizer.save_pretrained(folder)
    config = tiny_config(BertConfig, vocab_size=len(tokenizer))
    randomize(BertModel(config)).bfloat16().save_pretrained(folder)
    return folder
