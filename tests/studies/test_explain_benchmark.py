"""Protects what rollout is measured against: the product of a stock model's matrices, of the same weights."""

import pytest
import torch
from tiny_models import build, text_inputs
from transformers import BertConfig, BertModel

from fa_transformers import rollout
from fa_transformers.models import FABertConfig, FABertModel
from fa_transformers.studies.explain_benchmark import (
    COST_COLUMNS,
    DENSE_COLUMNS,
    ExplainOptions,
    cost_rows,
    dense_rollout,
    dense_rows,
    draw_chart,
    measure,
    with_ratios,
)


def test_dense_rollouts_equal_ours_where_our_layers_keep_softmax_attention():
    model = build(FABertConfig, FABertModel, softmax_layers=[0, 1], num_hidden_layers=2)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = {name: getattr(model.config, name) for name in (*names, "max_position_embeddings")}
    stock = BertModel(BertConfig(**sizes, attn_implementation="eager")).eval()
    stock.load_state_dict(model.state_dict())
    inputs = {"input_ids": text_inputs("AutoModel", (20,))["input_ids"]}
    for is_product in (False, True):
        torch.testing.assert_close(dense_rollout(stock, inputs, is_product), rollout(model, inputs))


def test_a_row_has_ratios_to_the_forward_pass_of_its_length():
    rows = [
        {"method": "forward", "tokens": 8, "seconds": 2.0, "peak_mib": 10.0},
        {"method": "rollout", "tokens": 8, "seconds": 3.0, "peak_mib": 11.0},
        measure("dense_row", 9, ExplainOptions(longest_dense=8)),
    ]
    ratios = [(row["seconds_over_forward"], row["peak_mib_over_forward"]) for row in with_ratios(rows)]
    assert ratios == [(1.0, 1.0), (1.5, 1.1), (None, None)]


def test_a_row_has_no_ratio_where_the_forward_pass_ran_out_of_memory():
    unmeasured = {"method": "forward", "tokens": 8, "seconds": None, "peak_mib": None}
    rows = [unmeasured, {"method": "rollout", "tokens": 8, "seconds": 3.0, "peak_mib": 11.0}]
    assert [row["seconds_over_forward"] for row in with_ratios(rows)] == [None, None]


def test_tables_and_chart_hold_what_was_measured_and_leave_out_what_did_not_fit(tmp_path):
    def row(method, tokens, seconds, mib):
        return {"method": method, "tokens": tokens, "seconds": seconds, "peak_mib": mib}

    rows = [row("forward", 8, 2.0, 10.0), row("rollout", 8, 3.0, 11.0), row("dense_row", 8, 60.0, 440.0)]
    rows = with_ratios(
        [*rows, row("forward", 16, 4.0, 20.0), row("rollout", 16, 6.0, 24.0), row("dense_row", 16, None, None)]
    )
    cost, dense = cost_rows(rows), dense_rows(rows)
    assert [one["seconds_ratio"] for one in cost] == [1.5, 1.5] and cost[1]["peak_mib_ratio"] == 1.2
    assert [one["seconds_ratio"] for one in dense] == [20.0, None] and dense[0]["peak_mib_ratio"] == 40.0
    assert set(cost[0]) == set(COST_COLUMNS) and set(dense[0]) == set(DENSE_COLUMNS)
    draw_chart(rows, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong",
    [{"methods": ("lime",)}, {"methods": ()}, {"repeats": 0}, {"threads": 0}, {"lengths": (0,)}, {"lengths": ()}],
)
def test_mistakes_name_the_flag(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))} "):
        ExplainOptions(**wrong).check()
