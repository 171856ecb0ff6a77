"""Protects the attention function registered as "factorized", called alone: masks, arguments, head counts, lengths."""

import pytest
import torch
from stock_encoders import TEXT
from torch import nn
from transformers import BertConfig, BertModel

from fa_transformers import factorized_attention
from fa_transformers.attention_interface import (
    FactorizedAttentionError,
    factorized_attention_forward,
    factorized_mask,
)


class Caller(nn.Module):
    """Stands for a stock attention layer in tests of the function alone."""

    def __init__(self, is_causal: bool = False):
        super().__init__()
        self.is_causal = is_causal


def heads(batch: int = 2, heads: int = 4, length: int = 6, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, length, heads, width).transpose(1, 2)


def attend(attention_mask=None, module=None, key_heads=4, keys=6, **kwargs) -> torch.Tensor:
    torch.manual_seed(0)
    query, key, value = heads(), heads(heads=key_heads, length=keys), heads(heads=key_heads, length=keys)
    output, weights = factorized_attention_forward(module or Caller(), query, key, value, attention_mask, **kwargs)
    assert weights is None
    return output


REAL = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def test_the_output_is_the_operators_laid_out_as_transformers_wants_it():
    torch.manual_seed(0)
    query, key, value = heads(), heads(), heads()
    output = attend(REAL, scaling=0.125, dropout=0.9)
    assert output.shape == (2, 6, 4, 8)
    assert output.is_contiguous()
    assert torch.equal(output, factorized_attention(query, key, value, REAL).transpose(1, 2))


@pytest.mark.parametrize(
    "mask",
    [
        REAL,
        REAL[:, None, None, :],
        torch.zeros(2, 1, 1, 6).masked_fill(~REAL[:, None, None, :], torch.finfo(torch.float32).min),
        torch.zeros(2, 1, 1, 6).masked_fill(~REAL[:, None, None, :], -10000.0),
        torch.zeros(2, 1, 1, 6).masked_fill(~REAL[:, None, None, :], float("-inf")),
        torch.zeros(2, 1, 1, 6, dtype=torch.bfloat16).masked_fill(~REAL[:, None, None, :], -1e4),
    ],
    ids=["bool [B,M]", "bool [B,1,1,M]", "float32 minimum", "-1e4", "-inf", "bfloat16"],
)
def test_every_way_to_write_a_padding_mask_gives_the_same(mask):
    assert torch.equal(attend(mask), attend(REAL))
    assert not torch.equal(attend(mask), attend(None))


def test_a_mask_of_one_row_serves_the_whole_batch():
    assert torch.equal(attend(REAL[1:]), attend(REAL[1:].expand(2, -1)))
    assert torch.equal(attend(REAL[1:, None, None, :]), attend(REAL[1:].expand(2, -1)))


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.ones(2, 1, 6, 6, dtype=torch.bool), "over queries or heads"),
        (torch.zeros(2, 1, 6, 6), "over queries or heads"),
        (torch.zeros(2, 4, 6, 6), "over queries or heads"),
        (torch.zeros(2, 4, 1, 6), "over queries or heads"),
        (torch.ones(2, 6, 6, dtype=torch.bool), "over queries or heads"),
        (torch.ones(2, 5, dtype=torch.bool), "key positions"),
        (torch.ones(3, 6, dtype=torch.bool), "key positions"),
        (torch.ones(2, 6), "must be bool"),
        (torch.ones(2, 6, dtype=torch.long), "must be bool"),
        (torch.full((2, 1, 1, 6), -0.5), "a bias on the scores"),
        (torch.full((2, 1, 1, 6), float("nan")), "a bias on the scores"),
        ("causal", "not a tensor"),
    ],
    ids=str,
)
def test_a_mask_that_is_not_one_row_of_keys_raises(mask, why):
    with pytest.raises(FactorizedAttentionError, match=f'"factorized" can\'t run Caller: .*{why}'):
        attend(mask)


@pytest.mark.parametrize(
    "argument",
    ["position_bias", "softcap", "s_aux", "sinks", "head_mask", "sliding_window", "cu_seq_lens_q", "block_indices"],
)
def test_an_argument_that_changes_the_scores_raises_when_it_is_set(argument):
    value = 4 if argument == "sliding_window" else torch.ones(1)
    with pytest.raises(FactorizedAttentionError, match=f"factorized.*`{argument}` is set"):
        attend(**{argument: value})
    assert torch.equal(attend(**{argument: None}), attend())


def test_causal_attention_raises_whether_the_call_or_the_module_says_so():
    for options in ({"is_causal": True}, {"module": Caller(True)}, {"module": Caller(True), "is_causal": None}):
        with pytest.raises(FactorizedAttentionError, match="factorized.*causal"):
            attend(**options)
    assert torch.equal(attend(module=Caller(True), is_causal=False), attend())


def test_attention_weights_cannot_be_had():
    with pytest.raises(FactorizedAttentionError, match="factorized.*N×N"):
        attend(output_attentions=True)
    assert torch.equal(attend(output_attentions=False), attend())
    with pytest.raises(FactorizedAttentionError, match="factorized.*N×N"):
        BertModel(BertConfig(**TEXT, attn_implementation="factorized"))(torch.arange(7)[None], output_attentions=True)


def test_grouped_key_heads_are_repeated():
    torch.manual_seed(0)
    query, key, value = heads(), heads(heads=2), heads(heads=2)
    expected = factorized_attention(query, key[:, [0, 0, 1, 1]], value[:, [0, 0, 1, 1]]).transpose(1, 2)
    assert torch.equal(attend(key_heads=2), expected)
    with pytest.raises(FactorizedAttentionError, match="4 query heads can't share 3 key heads"):
        attend(key_heads=3)


def test_keys_may_be_fewer_or_more_than_queries():
    real = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    assert attend(real, keys=9).shape == (2, 6, 4, 8)
    torch.manual_seed(0)
    query, key, value = heads(), heads(length=9), heads(length=9)
    alone, _ = factorized_attention_forward(Caller(), query[1:], key[1:, :, :5], value[1:, :, :5], None)
    torch.testing.assert_close(attend(real, keys=9)[1:], alone, rtol=0, atol=8 * torch.finfo(torch.float32).eps)


def test_a_sample_without_a_real_token_gives_zeros():
    mask = REAL.clone()
    mask[1] = False
    assert torch.equal(attend(mask)[1], torch.zeros(6, 4, 8))


def test_the_mask_function_keeps_the_mask_and_needs_nothing_of_a_versions_own_arguments():
    assert factorized_mask(attention_mask=REAL, config=BertConfig(**TEXT), cache_position=torch.arange(6)) is REAL
    assert factorized_mask(batch_size=2, q_length=6, kv_length=6) is None


def test_a_custom_mask_pattern_raises():
    with pytest.raises(FactorizedAttentionError, match="factorized.*differs from query to query"):
        factorized_mask(attention_mask=REAL, mask_function=lambda batch, head, query, key: query == key)
