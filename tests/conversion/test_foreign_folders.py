"""Protects the reader's own files from a folder that somebody else made: it can name nothing outside of itself."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_tokenizer
from transformers import BertConfig, BertModel

from fa_transformers import convert_checkpoint
from fa_transformers.conversion.source import read_modules, read_source, read_tensors
from fa_transformers.hub.self_check import path_inside

SECRET = "the reader's own private words"
TYPE = "sentence_transformers.models."


@pytest.fixture
def model(tmp_path) -> Path:
    """A sentence model of somebody else, beside which lies a private file of the reader."""
    folder = tmp_path / "model"
    tokenizer = make_tokenizer(["red", "blue"], max_length=16)
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text(SECRET)
    return folder


def name_modules(folder: Path, *paths: object) -> None:
    modules = [
        {"path": path, "type": TYPE + kind}
        for path, kind in zip(paths, ["Transformer", "Pooling", "Dropout"], strict=False)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def assert_refused(folder: Path, message: str) -> None:
    """Nothing outside the output folder changes, nothing private is in it, and one line names file and entry."""
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(folder, output_dir=folder.parent / "converted")
    assert len(str(caught.value).splitlines()) == 1
    assert not (folder.parent / "converted").exists()
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "path", ["../private", "/etc", "1_Pooling/../../private", "a\\b", "C:/x", ".git/hooks", "x/.GIT"]
)
def test_a_module_outside_of_the_folder_is_refused_by_file_and_entry(path, model):
    name_modules(model, "", "1_Pooling", path)
    assert_refused(model, r'modules.json: "path" of module 3 is .*, which is not a plain path inside')


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_module_that_is_a_link_out_of_the_folder_is_refused(place, model, tmp_path):
    name_modules(model, "", "1_Pooling", "2_Extra")
    if place == "folder":
        (model / "2_Extra").symlink_to(tmp_path / "private")
    else:
        (model / "2_Extra").mkdir()
        (model / "2_Extra" / "key").symlink_to(tmp_path / "private" / "key")
    assert_refused(model, "2_Extra.*a link that leads out of")


@pytest.mark.parametrize("content", ["[1]", "[{}]", '[{"path": 5, "type": "x"}]', "not json", "{}", '[{"path": "a"}]'])
def test_damaged_modules_are_one_line_that_names_the_file(content, model):
    (model / "modules.json").write_text(content)
    assert_refused(model, r"model/modules\.json")


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "vocab.txt", "config_sentence_transformers.json", "additional_chat_templates/x.jinja"],
)
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(name, model, tmp_path):
    name_modules(model, "", "1_Pooling")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(tmp_path / "private" / "key")
    assert_refused(model, f"{name}', a link that leads out of")


def test_a_tokenizer_that_names_a_file_outside_is_refused_and_one_of_another_machine_is_not(model, tmp_path):
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"vocab_file": "/content/nowhere/vocab.txt"}))
    read_source(model)
    path.write_text(json.dumps(settings | {"vocab_file": str(tmp_path / "private" / "key")}))
    assert_refused(model, "tokenizer_config.json: 'vocab_file' is .*, which is not a plain path")


def test_later_modules_in_the_models_own_folder_bring_no_files(model, tmp_path):
    (model / "notes.md").write_text("of the authors")
    name_modules(model, "", "1_Pooling", "")
    folder = convert_checkpoint(model, output_dir=tmp_path / "converted").folder
    assert (folder / "1_Pooling" / "config.json").is_file() and not (folder / "notes.md").exists()


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/x.safetensors", 5, None])
def test_an_index_of_weights_names_files_inside(file, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: \"weight_map\" of 'x' is"):
        read_tensors(folder)
    for content in ("[]", '{"weight_map": {}}', '{"weight_map": [1]}', "{"):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            read_tensors(folder)


def test_weights_may_be_a_link(model, tmp_path):
    os.rename(model / "model.safetensors", tmp_path / "weights.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    assert convert_checkpoint(model).counts["kept"]


def test_the_hubs_cache_links_to_its_own_contents_alone(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "sum").write_text("[]")
    (snapshot / "modules.json").symlink_to("../../blobs/sum")
    assert read_modules(snapshot) == [] and path_inside(snapshot, "modules.json", "x").read_text() == "[]"
    (snapshot / "other").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out of"):
        path_inside(snapshot, "other", "x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id2label", ["a"]),
        ("auto_map", 7),
        ("dtype", "evil"),
        ("dtype", "os"),
        ("architectures", [1]),
        ("architectures", "BertModel"),
        ("num_hidden_layers", 10**9),
        ("key_feature_size", 10**9),
        ("check_fields", 1),
        ("to_dict", 1),
        ("hidden_size", "wide"),
        ("num_hidden_layers", None),
    ],
)
def test_a_broken_field_of_a_configuration_is_named_beside_its_file(field, value, model):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert_refused(model, rf"config\.json: .*'{field}'")


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "evil"), ("num_attention_heads", 0), ("vocab_size", -1)])
def test_a_field_that_no_fa_model_can_have_is_named_beside_its_file(field, value, model):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert_refused(model, rf"config\.json: .*`{field}`")


@pytest.mark.parametrize("content", ["[]", "{", '{"a": ' + "[" * 3000 + "]" * 3000 + "}", "\xff"])
def test_a_configuration_that_is_no_object_is_named(content, model):
    (model / "config.json").write_bytes(content.encode("latin-1"))
    assert_refused(model, r"config\.json")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_cut_off_are_named(name, model):
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(weights[:-100])
    assert_refused(model, rf"{name} is damaged or no file of weights")
