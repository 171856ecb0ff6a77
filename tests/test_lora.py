"""The LoRA preset trains little and what is new, is saved and merged without loss, and keeps every way of running."""

import inspect
import json
import re
import sys

import pytest
import torch
from tiny_models import HEAD_IDS, HEADS, OPTION_SETS, as_float64, build, inputs_of, loss_of, make_tokenizer, outputs_of
from transformers import BertConfig, BertForSequenceClassification

from fa_transformers import (
    FABertConfig,
    FABertForMaskedLM,
    FABertForSequenceClassification,
    PublishError,
    convert_checkpoint,
    fa_lora_config,
    load_factorized,
    push,
)
from fa_transformers.hub.publish import examine_folder, find_auto_class_of
from fa_transformers.lora import describe_adapter, set_location

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
    merged.save_pretrained(tmp_path / "merged")
    stored = outputs_of(model_class.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval(), inputs)
    for name, value in outputs_of(merged, inputs).items():
        torch.testing.assert_close(actual[name], expected[name], rtol=0.0, atol=0.0)
        torch.testing.assert_close(value, expected[name], **MERGED)
        torch.testing.assert_close(stored[name], value, rtol=0.0, atol=0.0)


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


def masked_language_model() -> FABertForMaskedLM:
    return build(FABertConfig, FABertForMaskedLM).double()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "word_embeddings"]},
        {"target_modules": ["query", "decoder"]},
        {"target_modules": r".*(query|decoder)"},
        {"modules_to_save": ["word_embeddings"]},
        {"modules_to_save": ["embeddings"]},
        {"modules_to_save": ["predictions"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_options_that_would_part_a_tied_decoder_in_the_merge_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` .*tied"):
        fa_lora_config(masked_language_model(), **options)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["decoder"]}, {"modules_to_save": ["transform"]}, {"target_modules": "all-linear"},
     {"bias": "all"}],
    ids=str,
)  # fmt: skip
def test_a_tied_decoder_keeps_weight_and_bias_through_merge_and_file(options, tmp_path):
    model = masked_language_model()
    inputs = as_float64(inputs_of(model, "AutoModelForMaskedLM"))
    adapted = peft.get_peft_model(model, fa_lora_config(model, r=2, init_lora_weights=False, **options)).double().eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = outputs_of(adapted, inputs)["logits"]
    adapted.merge_and_unload().save_pretrained(tmp_path)
    stored = FABertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert stored.cls.predictions.decoder.bias.abs().max() > 0.1
    torch.testing.assert_close(outputs_of(stored, inputs)["logits"], expected, **MERGED)


def adapter_of(model, folder, **options) -> dict:
    """What the file of an adapter that was saved of a model says."""
    peft.get_peft_model(model, fa_lora_config(model, r=2, **options)).save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


def test_an_adapter_names_a_base_that_a_folder_holds_as_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    build(FABertConfig, FABertForSequenceClassification, num_labels=3).save_pretrained("base")
    model = load_factorized("base", "AutoModelForSequenceClassification")
    assert model.name_or_path == "base"
    inputs = inputs_of(model, "AutoModelForSequenceClassification")
    expected = outputs_of(model.eval(), inputs)["logits"]
    assert adapter_of(model, tmp_path / "adapter")["base_model_name_or_path"] == "base"
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained("adapter").eval()
    assert torch.equal(outputs_of(loaded, inputs)["logits"], expected) and not caplog.text
    # Without a task of peft's own, AutoPeftModel makes our class by its name.
    build(FABertConfig, FABertForMaskedLM).save_pretrained("masked")
    adapter_of(load_factorized("masked", "AutoModelForMaskedLM"), tmp_path / "words")
    allowed = {"import_allowlist": ["fa_transformers"]} if takes_allowlist() else {}
    assert isinstance(peft.AutoPeftModel.from_pretrained("words", **allowed).get_base_model(), FABertForMaskedLM)


def takes_allowlist() -> bool:
    return "import_allowlist" in inspect.signature(peft.AutoPeftModel.from_pretrained).parameters


@pytest.mark.parametrize("fields", [{"num_labels": 2}, {"local_window": 1}, {"max_length": 80}, {"id2label": {0: "a"}}])
def test_no_base_is_named_that_differs_from_the_model(fields, tmp_path, caplog):
    build(FABertConfig, FABertForSequenceClassification, num_labels=3).save_pretrained(tmp_path / "base")
    model = load_factorized(tmp_path / "base", "AutoModelForSequenceClassification", **fields)
    assert adapter_of(model, tmp_path / "adapter")["base_model_name_or_path"] in (None, "")
    assert caplog.text.count("Convert and save the base first") == 1


@pytest.mark.parametrize("load", ["converted", "read by an FA class"])
def test_a_stock_checkpoint_is_never_named_whose_softmax_model_would_load(load, tmp_path, caplog):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    if load == "converted":
        model = load_factorized(tmp_path / "bert", "AutoModelForSequenceClassification")
    else:
        model = FABertForSequenceClassification.from_pretrained(tmp_path / "bert")
    assert adapter_of(model, tmp_path / "adapter")["base_model_name_or_path"] in (None, "")
    assert str(tmp_path / "bert") not in (tmp_path / "adapter/README.md").read_text()
    assert caplog.text.count("Convert and save the base first") == 1


def test_a_converted_folder_is_the_base_of_the_model_that_was_written_to_it(tmp_path, caplog):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    tokenizer, folder = make_tokenizer(["red"], max_length=16), tmp_path / "converted"
    model = convert_checkpoint(tmp_path / "bert", output_dir=folder, processor=tokenizer).model
    assert model.name_or_path == str(folder)
    adapted = peft.get_peft_model(model, fa_lora_config(model))
    with pytest.raises(PublishError, match="merge_and_unload"):
        find_auto_class_of(adapted)
    with pytest.raises(PublishError, match="adapters inside"):
        find_auto_class_of(model)
    assert find_auto_class_of(adapted.merge_and_unload()) == "AutoModelForSequenceClassification"


def test_a_pooler_that_was_drawn_anew_trains_and_is_saved(tmp_path):
    build(FABertConfig, FABertForMaskedLM).save_pretrained(tmp_path / "words")  # without a pooler
    model = load_factorized(tmp_path / "words", "AutoModelForSequenceClassification")
    assert model.name_or_path == str(tmp_path / "words")  # of which the adapter replaces head and pooler
    inputs = inputs_of(model, "AutoModelForSequenceClassification")
    expected = outputs_of(model.eval(), inputs)["logits"]
    assert "bert.pooler.dense" in adapter_of(model, tmp_path / "adapter")["modules_to_save"]
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(outputs_of(loaded, inputs)["logits"], expected)


def test_a_folder_of_an_adapter_is_none_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr("fa_transformers.hub.push.check_login", lambda repo_id, token: "me")
    model = build(FABertConfig, FABertForSequenceClassification)
    set_location(model, "outputs/base")
    adapter_of(model, tmp_path)
    message = "is a LoRA adapter of outputs/base: merge it first (merge_and_unload), then save"
    assert message in describe_adapter(tmp_path)
    for use in (convert_checkpoint, examine_folder, lambda folder: push(folder, "me/mine")):
        with pytest.raises(ValueError, match=re.escape(message)):
            use(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter of a base that it does not name" in describe_adapter(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert describe_adapter(tmp_path) is None


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
