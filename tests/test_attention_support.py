"""Protects what `supports` and `why_unsupported` say about stock models, and that asking leaves a model as it was."""

import copy

import pytest
import torch
import transformers
from stock_encoders import IMAGE, PIXELS, SAMPLES, SPEECH, SWIN, TEXT, WHISPER, WORKING, Encoder, text_tower
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from fa_transformers import FABertConfig, FABertModel, attention_interface
from fa_transformers.attention_interface import supports, why_unsupported


@pytest.mark.parametrize("encoder", WORKING, ids=lambda encoder: encoder.name)
def test_there_is_no_reason_against_what_works(encoder):
    assert why_unsupported(encoder.build()) is None


@pytest.mark.parametrize(("model", "is_supported"), [("BertModel", True), ("FNetModel", False)])
def test_supports_is_true_where_there_is_no_reason(model, is_supported):
    encoder = text_tower(model).build()
    assert supports(encoder) is is_supported
    assert (why_unsupported(encoder) is None) is is_supported


@pytest.mark.parametrize(
    ("encoder", "why"),
    [
        (text_tower("DebertaV2Model"), "never calls"),
        (text_tower("FNetModel"), "never calls"),
        (Encoder("WavLMModel", SPEECH, SAMPLES), "never calls"),
        (Encoder("Swinv2Model", SWIN, PIXELS), "never calls"),
        (Encoder("ConvNextModel", {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2}, PIXELS), "never calls"),
        (Encoder("WhisperModel", WHISPER, (2, 8, 32)), "causal"),
        (text_tower("VisualBertModel"), "never call"),
    ],
    ids=lambda value: value.name if isinstance(value, Encoder) else "",
)
def test_the_reason_says_why_not(encoder, why):
    assert why in why_unsupported(encoder.build())


class HalfReached(BertModel):
    """A BERT whose second layer computes something of its own."""

    def __init__(self, config: BertConfig):
        super().__init__(config)

        class OwnAttention(nn.Module):
            def forward(self, hidden_states, *args, **kwargs):
                return hidden_states, None

        self.encoder.layer[1].attention = OwnAttention()


def test_the_reason_names_a_layer_that_is_not_reached():
    reason = why_unsupported(HalfReached(BertConfig(**TEXT)))
    assert "1 of the attention layers of HalfReached" in reason
    assert "encoder.layer.1.attention" in reason


def test_the_reason_may_be_that_no_dummy_input_is_known():
    clip = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(**clip))
    assert "No dummy input is known for CLIPModel" in why_unsupported(model)
    assert why_unsupported(model.vision_model) is None


@pytest.mark.parametrize("head", ["BertForMultipleChoice", "SplinterForQuestionAnswering", "BertForMaskedLM"])
def test_the_probe_reaches_the_encoder_behind_any_head(head):
    config = BertConfig if head.startswith("Bert") else transformers.SplinterConfig
    assert why_unsupported(getattr(transformers, head)(config(**TEXT))) is None


def test_what_is_not_a_transformers_model_is_refused():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel"):
        why_unsupported(nn.Linear(2, 2))


def test_asking_leaves_the_model_and_the_warning_as_they_were(caplog):
    model = BertModel(BertConfig(**TEXT, attn_implementation="sdpa")).train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    weights, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    attention_interface._warned.discard("bert")
    assert why_unsupported(model) is None
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "bert" not in attention_interface._warned
    assert not caplog.records


def test_the_reason_says_that_our_own_models_need_no_choice():
    assert "FABertModel is factorized by itself" in why_unsupported(FABertModel(FABertConfig(**TEXT)))


def test_asking_draws_nothing_from_the_random_state():
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**IMAGE))  # draws the kept patches in its forward
    random_state = torch.random.get_rng_state()
    assert why_unsupported(model) is None
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_asking_works_in_half_precision():
    assert why_unsupported(BertModel(BertConfig(**TEXT)).to(torch.bfloat16)) is None
    assert why_unsupported(ViTModel(ViTConfig(**IMAGE)).to(torch.bfloat16)) is None


def test_the_probes_name_is_not_for_use():
    with pytest.raises(ValueError, match='choose attn_implementation="factorized"'):
        BertModel(BertConfig(**TEXT, attn_implementation="factorized_probe"))(torch.arange(7)[None])
