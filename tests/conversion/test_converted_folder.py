"""Protects what conversion leaves behind: a model that says it is untrained, wherever it is loaded, and a folder that
loads elsewhere, with the modules of sentence-transformers where there were some; and the script that writes it.
"""

import json
import logging
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from repository import SCRIPTS
from sentence_transformers import SentenceTransformer
from stock_models import SIZES
from test_convert import VISION, make_stock, stock_bert
from tiny_models import outputs_of, randomize
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from fa_transformers import FABertModel, convert_checkpoint, load_factorized
from fa_transformers.conversion.source import describe_source, read_source
from fa_transformers.hub.card import ModelFacts, render_card
from fa_transformers.hub.publish import check_folder
from fa_transformers.hub.self_check import compute_sha256
from fa_transformers.models.modeling_fa import NOT_RECOVERED
from fa_transformers.training.card_facts import describe_base_model

SCRIPT = SCRIPTS / "convert_checkpoint.py"


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


def test_an_fa_model_is_marked_where_a_layer_becomes_another_and_not_where_its_table_only_grows(tmp_path):
    stock_bert().save_pretrained(tmp_path / "stock")
    plain = convert_checkpoint(tmp_path / "stock", local_window=2).model
    plain.config.recovery = "distilled"
    plain.save_pretrained(tmp_path / "distilled")
    again = {
        "distilled": convert_checkpoint(tmp_path / "distilled", max_length=100),
        "pending": convert_checkpoint(tmp_path / "distilled", key_feature_size=24),
    }
    for recovery, conversion in again.items():
        assert conversion.model.config.recovery == recovery
    off = convert_checkpoint(tmp_path / "distilled", local_window=0)
    dropped = {change.source for change in off.report if change.action == "dropped"}
    assert off.model.config.recovery == "pending" and any("mixer.window_gate" in name for name in dropped)
    last = plain.config.num_hidden_layers - 1
    fewer = convert_checkpoint(tmp_path / "distilled", softmax_layers=[last]).model
    assert fewer.config.recovery == "distilled"
    fewer.save_pretrained(tmp_path / "fewer")
    assert convert_checkpoint(tmp_path / "fewer", softmax_layers=[]).model.config.recovery == "pending"


def test_weights_in_half_precision_are_trained_in_float32_and_converted_as_they_are(tmp_path):
    stock_bert().half().save_pretrained(tmp_path)
    assert load_factorized(tmp_path, "AutoModel").dtype == torch.float32
    assert convert_checkpoint(tmp_path).model.dtype == torch.float16


def test_an_unknown_recovery_is_refused():
    with pytest.raises(ValueError, match="`recovery`"):
        FABertModel.config_class(recovery="perhaps")


@pytest.fixture(scope="module")
def small_sentence_model(minilm, tmp_path_factory) -> Path:
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
    first_line = (folder / "README.md").read_text().split(f"\n# {facts.heading}\n\n")[1].splitlines()[0]
    assert first_line.startswith("**Converted and not trained since")
    assert re.fullmatch(r"FA-BERT \([\w.-]+\), converted and not trained", facts.heading)
    assert 0 < facts.scores[0].value < 1
    assert pooling in json.loads((folder / "self_test.json").read_text())["files"]
    assert check_folder(folder)["model_class"] == "FABertModel"
    with pytest.raises(FileExistsError, match="not empty"):
        convert_checkpoint(small_sentence_model, output_dir=folder)
    convert_checkpoint(small_sentence_model, output_dir=folder, overwrite=True)


def test_sentence_transformers_loads_the_folder_and_pools_as_the_source_did(
    small_sentence_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "converted"
    convert_checkpoint(small_sentence_model, output_dir=folder, max_length=200, local_window=2)
    sentences = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    texts = ["A short one.", "And one of more words than the table of the source had rows. " * 8]
    found = sentences.encode(texts, convert_to_tensor=True)
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] > 64 and sentences.max_seq_length == 200
    hidden = outputs_of(AutoModel.from_pretrained(folder), batch)["last_hidden_state"]
    mask = batch["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    torch.testing.assert_close(found, torch.nn.functional.normalize(mean), rtol=0.0, atol=2.0**-18)


def test_a_saved_sentence_model_keeps_its_length(small_sentence_model, tmp_path):
    folder = tmp_path / "converted"
    conversion = convert_checkpoint(small_sentence_model, output_dir=folder, max_length=200, positions="periodic")
    assert conversion.model.config.position_table_size == 64 and conversion.processor.model_max_length == 200
    first = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    first.save(str(tmp_path / "saved"))
    second = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    text = "And one of more words than the table has rows. " * 30
    assert first.max_seq_length == second.max_seq_length == 200
    assert (first.encode(text) == second.encode(text)).all()


@pytest.mark.slow
def test_a_saved_minilm_reads_4096_tokens(minilm, tmp_path):
    convert_checkpoint(minilm, output_dir=tmp_path / "fa", max_length=4096, positions="periodic")
    first = SentenceTransformer(str(tmp_path / "fa"), trust_remote_code=True, device="cpu")
    first.save(str(tmp_path / "saved"))
    second = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    text = "The tenant pays the rent. " * 200 + "Whales dive under the ice. " * 200
    assert first.max_seq_length == second.max_seq_length == 4096
    assert first.similarity(first.encode(text), second.encode(text)).item() == pytest.approx(1.0, abs=2.0**-20)


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
    revision = f"sha256 {compute_sha256(old / 'model.safetensors')} of model.safetensors"
    assert describe_source(read_source(old.parent)) == ("local/old", revision)


def test_an_image_model_and_its_processor_are_written_at_the_new_size(tmp_path):
    stock = make_stock("ViTForImageClassification", {**VISION, "num_labels": 3}).float()
    stock.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    folder = tmp_path / "converted"
    conversion = convert_checkpoint(tmp_path / "vit", output_dir=folder, image_size=64, key_feature_size=40)
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    patch = stock.config.patch_size
    sides = conversion.processor(image, return_tensors="pt")["pixel_values"].shape[2:]
    assert sides[0] < sides[1] and sides[0] * sides[1] <= 64 * 64 and not any(side % patch for side in sides)
    squashed = convert_checkpoint(tmp_path / "vit", image_size=64, square=True, key_feature_size=40)
    assert squashed.processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
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
        "--verbose",
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
    with pytest.raises(SystemExit, match="error: OUTPUT_DIR .* is not empty; .* --overwrite_output_dir$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_short_name_is_called_by_its_name_on_the_hub(minilm, tmp_path):
    convert_checkpoint("minilm", output_dir=tmp_path / "fa")
    facts = ModelFacts.load(tmp_path / "fa" / "model_facts.json")
    assert facts.base_model == "sentence-transformers/all-MiniLM-L6-v2" and facts.license == "apache-2.0"
    assert facts.base_model_revision.startswith("sha256 ")
    trained_from_it = read_source(tmp_path / "fa")
    name, revision = describe_source(trained_from_it)
    assert name == facts.base_model  # a Hub name, where the folder has none
    weights = compute_sha256(tmp_path / "fa" / "model.safetensors")
    assert revision == f"{facts.base_model_revision}, by way of local/fa, sha256 {weights} of model.safetensors"
    again = convert_checkpoint(tmp_path / "fa", output_dir=tmp_path / "again", local_window=4)
    assert again.model.config.local_window == 4
    assert ModelFacts.load(tmp_path / "again" / "model_facts.json").base_model == facts.base_model
    assert describe_base_model(read_source(tmp_path / "fa"), "me/mine") == ("me/mine", revision)
    assert describe_base_model(read_source(tmp_path / "fa"), None) == (name, revision)
    (tmp_path / "fa" / "model_facts.json").write_text("{}")  # of another version
    assert describe_source(trained_from_it) == ("local/fa", f"sha256 {weights} of model.safetensors")


@pytest.mark.slow
def test_minilm_converts_to_16384_tokens_and_keeps_its_sentence_modules(minilm, tmp_path):
    conversion = convert_checkpoint(minilm, output_dir=tmp_path / "fa", max_length=16384, local_window=64)
    assert conversion.counts == {"kept": 102, "resized": 1, "new": 6, "dropped": 1}  # position_ids
    assert check_folder(tmp_path / "fa")["model_class"] == "FABertModel"
    assert (tmp_path / "fa" / "1_Pooling" / "config.json").is_file()
    ids = torch.randint(1000, 2000, (1, 3000), generator=torch.Generator().manual_seed(0))
    assert outputs_of(conversion.model, {"input_ids": ids})["last_hidden_state"].isfinite().all()
