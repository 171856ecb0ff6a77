"""Protects the layout of a batch: made and checked once per forward pass, and whole wherever a layer gets it."""

import dataclasses

import pytest
import torch
from tiny_models import HEAD_IDS, HEADS, OPTION_SETS, build, inputs_of, loss_of, text_inputs
from torch import Tensor

from fa_transformers.models import ENCODERS, FABertConfig, FABertForMultipleChoice, fa_attention, fa_layout
from fa_transformers.models.fa_layout import Layout, lay_out_image, lay_out_text
from fa_transformers.models.fa_packed import PackedDocuments

every_head = pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS, ids=HEAD_IDS)
every_config = pytest.mark.parametrize("config_class", ENCODERS, ids=lambda config_class: config_class.__name__)


def with_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give images a mask with padding among their 15 patches; texts have one."""
    if "pixel_values" in inputs:
        inputs["attention_mask"] = torch.ones(2, 16, dtype=torch.long)
        inputs["attention_mask"][1, 4:7] = 0
    return inputs


@every_head
def test_a_forward_pass_checks_its_inputs_once_and_its_layers_nothing(
    config_class, auto_class, model_class, monkeypatch
):
    checked, check_mask = [], fa_layout.check_mask

    def note_and_check(*args, **options):
        checked.append("mask")
        return check_mask(*args, **options)

    monkeypatch.setattr(fa_layout, "check_mask", note_and_check)
    monkeypatch.setattr(fa_attention, "check_attention_arguments", lambda *args: checked.append("operator"))
    model = build(config_class, model_class, **OPTION_SETS["local"])
    loss_of(model, auto_class, with_mask(inputs_of(model, auto_class)))
    assert checked == ["mask"]


def test_a_packed_batch_is_packed_once_by_a_head_and_its_encoder(monkeypatch):
    packed = []
    make = PackedDocuments.__init__
    monkeypatch.setattr(PackedDocuments, "__init__", lambda *args: packed.append(1) or make(*args))
    model = build(FABertConfig, FABertForMultipleChoice, **OPTION_SETS["all"])
    model(torch.arange(1, 13)[None], cu_seqlens=torch.tensor([0, 5, 12]), labels=torch.tensor([1]))
    assert packed == [1]


@every_config
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_layer_gets_its_layout_again(config_class, use_reentrant):
    base_class = ENCODERS[config_class]["AutoModel"]
    model = build(config_class, base_class, **OPTION_SETS["all"]).double().train()
    inputs = with_mask(inputs_of(model, "AutoModel"))
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.zero_grad()
        loss_of(model, "AutoModel", inputs).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_accelerate_moves_a_layout_to_the_device_of_a_layer():
    operations = pytest.importorskip("accelerate.utils.operations", reason="accelerate is not installed")
    documents = PackedDocuments(torch.tensor([0, 4, 9]), 9)
    layout = Layout(torch.ones(1, 9, dtype=torch.bool), (3, 3), documents, chunk_size=4)
    moved = operations.send_to_device(layout, torch.device("meta"))
    assert moved.mask.is_meta and moved.documents.document_ids.is_meta
    assert (moved.grid, moved.chunk_size, moved.documents.num_documents) == ((3, 3), 4, 2)
    assert layout.mask.device.type == "cpu"


def test_a_layout_cannot_be_changed_and_says_how_many_prefix_tokens_there_are():
    tokens = text_inputs("AutoModel")
    text = lay_out_text(tokens["input_ids"], tokens["attention_mask"])
    assert torch.equal(text.mask, tokens["attention_mask"].bool()) and text.whole_mask is text.mask
    assert text.num_prefix(11) == 0
    assert lay_out_image(torch.zeros(2, 3, 16, 24), (2, 3), num_prefix=5).num_prefix(11) == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        text.chunk_size = 3
