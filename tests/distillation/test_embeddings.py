"""Protects embeddings and how they are compared: windows pooled as one text, pairs kept apart from directions."""

import pytest
import torch
from accelerate import Accelerator
from tiny_distillation import LOCAL, make_pair

from fa_transformers import FABertConfig, FABertModel
from fa_transformers.distillation.embeddings import embed_batches, similarity


def test_the_embedding_of_a_long_text_is_the_mean_over_the_windows_that_the_teacher_reads():
    _, teacher = make_pair(FABertConfig, FABertModel, max_position_embeddings=64, **LOCAL)
    ids = torch.randint(1, 60, (1, 21))
    loader = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    accelerator = Accelerator(cpu=True)
    found = embed_batches(teacher, loader, accelerator, "mean", window=8)
    windows = [teacher(part).last_hidden_state[0] for part in ids.split(8, dim=1)]
    torch.testing.assert_close(found[0], torch.cat(windows).mean(dim=0).float(), rtol=0.0, atol=2.0**-20)
    whole = embed_batches(teacher, loader, accelerator, "mean", window=21)
    assert whole.equal(embed_batches(teacher, loader, accelerator, "mean"))
    assert not torch.allclose(whole, found, atol=1e-3)


def test_similarity_of_equal_embeddings_is_one_and_a_rotation_keeps_only_the_pairs():
    embeddings = torch.randn(20, 8)
    same = similarity(embeddings, embeddings)
    assert same["cosine"] == pytest.approx(1.0) and same["correlation"] == pytest.approx(1.0)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    rotated = similarity(embeddings @ rotation, embeddings)
    assert rotated["correlation"] == pytest.approx(1.0, abs=1e-5) and rotated["cosine"] < 0.9
