"""Protects the sources of conversion: a name is looked up once, and a wrong one is an error that repeats it."""

import re

import pytest
import torch
from safetensors.torch import load_file
from stock_models import stock_bert

from fa_transformers import convert_checkpoint, load_factorized
from fa_transformers.conversion import source
from fa_transformers.conversion.source import describe_folder, describe_source, read_source


def assert_same_weights(model, expected, but: str = "$^") -> None:
    """Equal parameters by name, those aside whose names hold `but`."""
    names = [name for name in expected.state_dict() if not re.search(but, name)]
    assert names and model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], expected.state_dict()[name]) for name in names)


def test_a_source_is_found_once_and_gives_what_its_name_gives(tmp_path, monkeypatch):
    stock_bert().save_pretrained(tmp_path / "stock")
    found = read_source(tmp_path / "stock")
    assert found.name == str(tmp_path / "stock") and found.config.model_type == "bert"
    assert found.architecture == "BertModel" and found.model_folder == tmp_path / "stock"
    assert read_source(found) is found
    by_name = convert_checkpoint(tmp_path / "stock", softmax_layers=[1])
    loaded_by_name = load_factorized(tmp_path / "stock", "AutoModel", local_window=2)

    def refuse(*_):
        raise AssertionError("a source that was found was looked for again")

    for name in ("locate_checkpoint", "resolve_checkpoint"):
        monkeypatch.setattr(source, name, refuse)
    again = [convert_checkpoint(found, softmax_layers=[1]) for _ in range(2)]
    for conversion in again:
        assert conversion.report == by_name.report
        assert_same_weights(conversion.model, by_name.model)
    loaded = load_factorized(found, "AutoModel", local_window=2)
    assert_same_weights(loaded, loaded_by_name, but=r"\.mixer\.")  # local terms start from random numbers
    with torch.no_grad():
        next(again[0].model.parameters()).zero_()
    assert_same_weights(again[1].model, by_name.model)  # sources hand out copies
    assert describe_source(found) == describe_folder(str(tmp_path / "stock"), tmp_path / "stock")
    monkeypatch.undo()
    assert describe_source(tmp_path / "stock") == describe_source(found)


def test_a_source_of_a_model_in_memory_hands_out_copies():
    stock = stock_bert()
    found = read_source(stock)
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = convert_checkpoint(found, softmax_layers=[0, 1]).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())
    assert describe_source(found) == ("local/BertModel", "a model in memory")


def test_the_weights_of_a_source_are_read_only_when_they_are_needed(tmp_path, monkeypatch):
    stock_bert().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "away")
    found = read_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        found.load_tensors()
    (tmp_path / "away").rename(tmp_path / "model.safetensors")
    assert set(found.load_tensors()) == set(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["outputs/mistyped", "no/such/folder"])
def test_a_name_that_is_nowhere_is_in_the_error(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"'{name}' is no folder here, and "):
        read_source(name)
