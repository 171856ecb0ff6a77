"""Stock checkpoints load with no encoder weight missing, and with softmax in every layer compute what stock models do.

Real MiniLM and DINOv2-S weights come from installed packages; tiny random stock models cover both layouts on disk.
Comparisons run in float64, where the two codes may differ by the order of sums alone.
"""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stock_models import BERT, IMAGES, INTERPOLATED, STOCK, TOLERANCE, VIT
from tiny_models import OPTION_SETS, as_float64, image_inputs, outputs_of, randomize, text_inputs, tiny_config
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from fa_transformers import load_factorized
from fa_transformers.models import (
    ENCODERS,
    FABertForMaskedLM,
    FABertModel,
    FAViTConfig,
    FAViTForImageClassification,
    FAViTModel,
)
from fa_transformers.models.fa_checkpoint_names import translate_config, translate_vit_name

TEXTS = [
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software.",
    "Redistribution and use in source and binary forms, with or without modification, are permitted.",
    "THE SOFTWARE IS PROVIDED AS IS",
]


def load(model_class, folder, **fields):
    """The model in float64, and the names its checkpoint lacked and had too many of."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **fields)
    assert not report["mismatched_keys"]
    return model.eval().double(), set(report["missing_keys"]), set(report["unexpected_keys"])


def test_minilm_loads_completely_and_softmax_layers_reproduce_it(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    stock, _, _ = load(BertModel, minilm)
    model, missing, unexpected = load(FABertModel, minilm, softmax_layers=list(range(6)))
    assert not missing and not unexpected
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    assert not real.all()
    single = tokenizer(TEXTS[:1], return_tensors="pt")
    for inputs, rows in ((dict(batch), real), (dict(single), single["attention_mask"].bool())):
        with torch.no_grad():
            expected, actual = (one(**inputs, output_hidden_states=True) for one in (stock, model))
        for state, reference in zip(actual.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state[rows], reference[rows], **TOLERANCE)
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, **TOLERANCE)


def test_minilm_with_factorized_layers_keeps_its_weights_and_ignores_padding(minilm):
    stock = BertModel.from_pretrained(minilm)
    model, missing, unexpected = load(
        FABertModel, minilm, local_window=4, local_kernel_size=3, key_feature_size=40, softmax_layers=[5]
    )
    new = {"feature_map", "local_convolution", "window_gate"}
    assert not unexpected and all(any(part in name for part in new) for name in missing)
    weights = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.equal(weights[name], parameter.double()), name
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    alone = outputs_of(model, dict(tokenizer(TEXTS[2:], return_tensors="pt")))["last_hidden_state"]
    length = alone.shape[1]
    for side, real in (("right", slice(0, length)), ("left", slice(-length, None))):
        tokenizer.padding_side = side
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        padded = outputs_of(model, dict(batch))["last_hidden_state"][2:, real]
        torch.testing.assert_close(padded, alone, **TOLERANCE)


@pytest.mark.parametrize("kind", ["absolute", "periodic"])
def test_minilm_takes_4096_tokens_after_conversion(minilm, kind):
    model = load_factorized(
        str(minilm), "AutoModelForSequenceClassification", max_length=4096, position_embedding_type=kind
    )
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.randint(1000, 2000, (1, 4096))).logits
    assert logits.isfinite().all()


def test_dinov2_loads_completely_and_softmax_layers_reproduce_it(dinov2):
    stock, stock_missing, stock_unexpected = load(Dinov2Model, dinov2)
    assert not stock_missing and not stock_unexpected
    model, missing, unexpected = load(FAViTModel, dinov2, softmax_layers=list(range(12)), add_pooling_layer=False)
    assert not missing and unexpected <= {"embeddings.mask_token"}
    assert model.config.native_grid == (37, 37) and model.config.layerscale_value == 1.0
    for height, width in ((112, 154), (70, 70)):
        with torch.no_grad():
            inputs = as_float64(image_inputs(height, width))
            expected, actual = (one(**inputs, output_hidden_states=True) for one in (stock, model))
        for state, reference in zip(actual.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state, reference, **INTERPOLATED)
        torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, **INTERPOLATED)


@pytest.mark.slow
def test_dinov2_equals_the_stock_model_at_its_native_size(dinov2):
    stock, _, _ = load(Dinov2Model, dinov2)
    model, _, _ = load(FAViTModel, dinov2, softmax_layers=list(range(12)), add_pooling_layer=False)
    inputs = as_float64(image_inputs(518, 518, batch=1))
    expected, actual = (outputs_of(one, inputs)["last_hidden_state"] for one in (stock, model))
    assert actual.shape == (1, 1370, 384)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_dinov2_with_factorized_layers_saves_and_loads_in_our_names(dinov2, tmp_path):
    fields = {"local_window": 2, "local_kernel_size": 3, "key_feature_size": 80, "classifier_pooling": "mean"}
    model, missing, _ = load(FAViTForImageClassification, dinov2, **fields)
    assert all("mixer." in name or name.startswith("classifier.") for name in missing)
    model.save_pretrained(tmp_path)
    assert all(translate_vit_name(name) == name for name in load_file(tmp_path / "model.safetensors"))
    again, missing, unexpected = load(FAViTForImageClassification, tmp_path)
    assert not missing and not unexpected
    inputs = as_float64(image_inputs(70, 56))
    assert torch.equal(outputs_of(again, inputs)["logits"], outputs_of(model, inputs)["logits"])


@pytest.mark.parametrize("is_original_layout", [True, False], ids=["layout of 4", "layout of 5"])
@pytest.mark.parametrize("kind", STOCK)
def test_stock_models_of_both_layouts_are_reproduced_by_softmax_layers(kind, is_original_layout, tmp_path):
    config, stock_name, auto_class = STOCK[kind]
    stock = randomize(getattr(transformers, stock_name)(config).eval())
    stock.save_pretrained(tmp_path, save_original_format=is_original_layout)
    model = load_factorized(str(tmp_path), auto_class, softmax_layers=[0, 1]).eval()
    _, missing, unexpected = load(type(model), tmp_path, softmax_layers=[0, 1])
    assert all(name.startswith("pooler.") for name in missing)  # DINOv2 has none
    assert all(name.endswith("mask_token") or ".pooler." in name for name in unexpected)  # what the head has no use for
    stock, model = stock.double(), model.double()
    if model.main_input_name == "input_ids":
        cases = [text_inputs(auto_class)]
    else:
        cases = [as_float64(image_inputs(height, width)) for height, width in ((32, 32), (40, 16), (24, 56))]
    for inputs in cases:
        options = {} if kind.startswith(("bert", "dinov2")) else {"interpolate_pos_encoding": True}
        if stock_name == "ViTForMaskedImageModeling":
            if inputs["pixel_values"].shape[2] != inputs["pixel_values"].shape[3]:
                continue  # the stock head reconstructs squares only
            inputs["bool_masked_pos"] = torch.arange(32).view(2, 16) % 3 == 0
        expected, actual = outputs_of(stock, inputs | options), outputs_of(model, inputs)
        is_resized = "pixel_values" in inputs and inputs["pixel_values"].shape[2] != 32
        if "loss" in expected:  # the stock loss counts masked pixels in float32
            torch.testing.assert_close(actual.pop("loss").float(), expected["loss"].float())
        for name in set(actual) - ({"pooler_output"} if kind.startswith("dinov2") else set()):
            reference = expected.get(name, expected.get("prediction_logits"))
            value = actual[name]
            if model.main_input_name == "input_ids" and value.shape[:2] == inputs["input_ids"].shape:
                real = inputs["attention_mask"].bool()
                value, reference = value[real], reference[real]
            torch.testing.assert_close(value, reference, **(INTERPOLATED if is_resized else TOLERANCE))


def test_layer_norms_under_their_oldest_names_load(tmp_path):
    stock = randomize(BertForMaskedLM(BERT).eval())
    stock.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new_end, old_end in old.items():
        state = {name.replace(new_end, old_end): value for name, value in state.items()}
    assert any(name.endswith("gamma") for name in state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model, missing, unexpected = load(FABertForMaskedLM, tmp_path)
    assert not missing and not unexpected
    weights = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.equal(weights[name], parameter.double()), name


@pytest.mark.parametrize(
    "model",
    [
        ViTModel(VIT),
        ViTForImageClassification(VIT),
        ViTForMaskedImageModeling(VIT),
        Dinov2Model(Dinov2Config(**IMAGES)),
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**IMAGES)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_translation_of_names_is_idempotent_and_loses_none(model):
    names = list(model.state_dict())
    translated = [translate_vit_name(name) for name in names]
    assert len(set(translated)) == len(names)
    assert [translate_vit_name(name) for name in translated] == translated


def test_translation_leaves_our_own_names_alone():
    fields = {**OPTION_SETS["all"], "num_register_tokens": 2, "layerscale_value": 1.0}
    for model_class in ENCODERS[FAViTConfig].values():
        for name in model_class(tiny_config(FAViTConfig, **fields)).state_dict():
            assert translate_vit_name(name) == name


def test_translated_configurations_carry_defaults_that_the_file_left_out():
    for kind, config in (("dinov2", Dinov2Config()), ("dinov2_with_registers", Dinov2WithRegistersConfig())):
        sparse = translate_config({"model_type": kind}, "fa_vit", ("vit", "dinov2", "dinov2_with_registers"))
        full = translate_config(config.to_dict(), "fa_vit", ("vit", "dinov2", "dinov2_with_registers"))
        ours, ours_full = (FAViTConfig(**fields) for fields in (sparse, full))
        for name in ("patch_size", "num_register_tokens", "layerscale_value", "layer_norm_eps", "intermediate_size"):
            assert getattr(ours, name) == getattr(ours_full, name), name


def test_translation_does_not_change_its_input():
    fields = Dinov2Config().to_dict()
    before = dict(fields)
    translate_config(fields, "fa_vit", ("dinov2",))
    assert fields == before
