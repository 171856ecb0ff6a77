"""The LoRA preset trains little and what is new, is saved and merged without loss, and keeps every way of running."""

import sys

import pytest
import torch
from tiny_models import HEAD_IDS, HEADS, OPTION_SETS, as_float64, build, inputs_of, loss_of, outputs_of
from transformers import BertConfig, BertForSequenceClassification

from fa_transformers import FABertConfig, FABertForSequenceClassification, fa_lora_config

peft = pytest.importorskip("peft", reason="peft is not installed")
every_head = pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS, ids=HEAD_IDS)
MERGED = {"rtol": 0.0, "atol": 2.0**-30}
"""Merging adds the low-rank product to the weight: one more rounding per weight, in float64."""


@every_head
@pytest.mark.parametrize("options", ["plain", "all"])
def test_preset_trains_saves_and_merges(config_class, auto_class, model_class, options, tmp_path):
    model = build(config_class, model_class, **OPTION_SETS[options]).double()
    inputs = as_float64(inputs_of(model, auto_class))
    adapted = peft.get_peft_model(model, fa_lora_config(model, r=2, init_lora_weights=False)).double()
    loss_of(adapted, auto_class, inputs).backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert not any(".intermediate." in name or "embeddings" in name for name in trained)
    # Two matrices for each of four projections a layer.
    assert sum(".lora_" in name for name in trained) == 8 * model.config.num_hidden_layers
    assert any(".mixer." in name for name in trained) == (options == "all")
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    expected = outputs_of(adapted.eval(), inputs)

    adapted.save_pretrained(tmp_path)
    fresh = build(config_class, model_class, **OPTION_SETS[options]).double()
    restored = peft.PeftModel.from_pretrained(fresh, tmp_path).double().eval()
    actual, merged = outputs_of(restored, inputs), adapted.merge_and_unload()
    assert type(merged) is model_class
    for name, value in outputs_of(merged, inputs).items():
        torch.testing.assert_close(actual[name], expected[name], rtol=0.0, atol=0.0)
        torch.testing.assert_close(value, expected[name], **MERGED)


@pytest.mark.parametrize("index", [0, 1], ids=["factorized", "softmax"])
def test_adapted_model_encodes_in_chunks(index):
    fields = {**OPTION_SETS["all"], "softmax_layers": [index]}
    model = build(FABertConfig, FABertForSequenceClassification, **fields).double()
    adapted = peft.get_peft_model(model, fa_lora_config(model, init_lora_weights=False)).double().eval()
    inputs = inputs_of(model, "AutoModelForSequenceClassification")
    whole, pieces = outputs_of(adapted, inputs), outputs_of(adapted, inputs, chunk_size=4)
    torch.testing.assert_close(pieces["logits"], whole["logits"], **MERGED)


def test_preset_trains_a_small_share_of_a_model_of_minilm_size():
    config = FABertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, local_window=64)
    with torch.device("meta"):
        model = FABertForSequenceClassification(config)
        adapted = peft.get_peft_model(model, fa_lora_config(model))
    trained, total = adapted.get_nb_trainable_parameters()
    # 6 layers of 4 projections with 8 x (384 + 384) each, 12 gates a layer, a classifier of 2 labels.
    assert trained == 6 * (4 * 8 * 768 + 12) + 2 * 385
    assert trained / total < 0.01


def test_fields_of_the_user_win():
    model = build(FABertConfig, FABertForSequenceClassification)
    config = fa_lora_config(model, r=4, target_modules=["value"], modules_to_save=None)
    assert (config.r, config.lora_alpha, config.target_modules, config.modules_to_save) == (4, 8, {"value"}, None)


def test_other_models_are_refused():
    stock = BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    )
    with pytest.raises(TypeError, match="BertForSequenceClassification"):
        fa_lora_config(stock)
    model = build(FABertConfig, FABertForSequenceClassification)
    with pytest.raises(TypeError, match="before `get_peft_model`"):
        fa_lora_config(peft.get_peft_model(model, fa_lora_config(model)))


def test_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        fa_lora_config(build(FABertConfig, FABertForSequenceClassification))
