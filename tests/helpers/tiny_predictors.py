"""Folders of tiny classifiers and regressors with random weights that differ from text to text, and their texts."""

from pathlib import Path

import numpy as np
import torch
from tiny_models import make_tokenizer
from transformers import ViTImageProcessor

from fa_transformers import (
    FABertConfig,
    FABertForSequenceClassification,
    FAViTConfig,
    FAViTForImageClassification,
)

WORDS = ["sea", "ship", "law", "court", "red", "blue"]
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, initializer_range=0.5)
SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def label_fields(names: list[str], problem_type: str) -> dict:
    if problem_type == NUMBER:
        return {"num_labels": 1, "problem_type": NUMBER}
    named = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    return {"num_labels": len(names), "problem_type": problem_type, **named}


def write_text_model(
    folder: Path,
    names: list[str] = ["ant", "bee", "cat"],  # noqa: B006 - never changed
    problem_type: str = SINGLE,
    positions: str = "periodic",
    rows: int = 32,
) -> Path:
    """Write a text model with a table of `rows` positions, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS, max_length=rows)
    fields = label_fields(names, problem_type) | {"position_embedding_type": positions, "max_position_embeddings": rows}
    config = FABertConfig(vocab_size=len(tokenizer), local_window=2, classifier_pooling="mean", **SIZES, **fields)
    FABertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_image_model(folder: Path, do_resize: bool = False) -> Path:
    """Write an image model; its processor leaves images in their size unless `do_resize`."""
    torch.manual_seed(0)
    config = FAViTConfig(image_size=16, patch_size=8, **SIZES, **label_fields(["cat", "dog"], SINGLE))
    FAViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, do_resize=do_resize).save_pretrained(folder)
    return folder


def make_texts(count: int, longest: int = 60) -> list[str]:
    """Texts of one to `longest` words, each length as likely."""
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, random.integers(1, longest + 1))) for _ in range(count)]
