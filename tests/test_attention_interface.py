"""Protects `attn_implementation="factorized"` for stock transformers encoders.

One table of tiny random encoders proves that the operator is reached in each layer, and that padding changes nothing; a
second one proves that what it can't express raises instead of running wrong. `supports` must agree with both.
"""

import copy
import logging
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from stock_encoders import (
    AUDIO_ENCODERS,
    IMAGE,
    NOT_REACHED_IN_5_3,
    PIXELS,
    REFUSED,
    SAMPLES,
    SIZES,
    SPEECH,
    SWIN,
    TEXT,
    TEXT_ENCODERS,
    TRAPPED,
    VISION_ENCODERS,
    WHISPER,
    WORKING,
    Encoder,
    text_tower,
)
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTModel,
)

from fa_transformers import FABertConfig, FABertModel, attention_interface, factorized_attention
from fa_transformers.attention_interface import (
    MASK_TRAP_MODEL_TYPES,
    FactorizedAttentionError,
    factorized_attention_forward,
    factorized_mask,
    supports,
)


def named(encoders: list[Encoder]):
    return pytest.mark.parametrize("encoder", encoders, ids=lambda encoder: encoder.name)


@pytest.fixture
def calls():
    """Counts the calls of the registered function for each attention module, without changing what it does."""
    counts: Counter[nn.Module] = Counter()

    def counted(module, *args, **kwargs):
        counts[module] += 1
        return factorized_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("factorized", counted)
    yield counts
    AttentionInterface.register("factorized", factorized_attention_forward)


def first_output(output) -> torch.Tensor:
    return next(value for value in output.to_tuple() if isinstance(value, torch.Tensor) and value.dim() > 0)


@named(WORKING)
def test_each_attention_layer_calls_the_operator_once_and_computes_something_else_than_eager(encoder, calls):
    model = encoder.build(attn_implementation="factorized")
    eager = encoder.build(attn_implementation="eager")
    inputs = encoder.inputs(model)
    with torch.no_grad():
        # Some models (ViTMAE) draw the kept patches in forward: the same ones for both.
        torch.manual_seed(2)
        output = first_output(model(**inputs))
        torch.manual_seed(2)
        expected = first_output(eager(**inputs))
    # ALBERT calls one shared layer twice; all the others call each of their own once.
    assert calls.total() == encoder.layers
    assert len(calls) == (1 if encoder.model == "AlbertModel" else encoder.layers)
    assert output.isfinite().all()
    assert output.shape == expected.shape
    assert not torch.equal(output, expected)


@named(WORKING)
def test_supports_says_yes_to_what_works(encoder):
    assert supports(encoder.build()) is None


@named(TEXT_ENCODERS)
def test_padding_does_not_change_real_tokens(encoder):
    model = encoder.build(attn_implementation="factorized")
    input_ids = encoder.inputs(model)["input_ids"]
    padded = torch.cat([input_ids, torch.full((2, 3), 63)], dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 3]).expand(2, -1)
    with torch.no_grad():
        expected = model(input_ids=input_ids, attention_mask=mask[:, :7]).last_hidden_state
        output = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :7]
        dropped = model(input_ids=padded, attention_mask=torch.ones_like(padded)).last_hidden_state[:, :7]
    # Sums over 10 positions of which 3 are zero may be grouped differently: a few roundings of values near 1.
    torch.testing.assert_close(output, expected, rtol=0, atol=32 * torch.finfo(torch.float32).eps)
    assert not torch.allclose(dropped, expected, rtol=0, atol=1e-4), (
        "the mask must matter for this test to mean something"
    )


def test_a_padded_recording_gives_what_it_gives_alone(calls):
    # Kernel and stride are equal and "layer" normalises each frame by itself, so only attention could mix padding in.
    model = AUDIO_ENCODERS[0].build(attn_implementation="factorized", feat_extract_norm="layer")
    samples, mask = torch.randn(2, 320), torch.ones(2, 320, dtype=torch.long)
    mask[1, 160:] = 0
    with torch.no_grad():
        alone = model(samples[1:, :160]).last_hidden_state
        together = model(samples, attention_mask=mask).last_hidden_state[1:, :10]
        dropped = model(samples, attention_mask=torch.ones_like(mask)).last_hidden_state[1:, :10]
    assert calls.total() == 6
    torch.testing.assert_close(together, alone, rtol=0, atol=32 * torch.finfo(torch.float32).eps)
    assert not torch.allclose(dropped, alone, rtol=0, atol=1e-4)


def test_siglip2_takes_its_patch_mask(calls):
    fields = {**SIZES, "patch_size": 8, "num_patches": 16}
    model = Encoder("Siglip2VisionModel", fields).build(attn_implementation="factorized")
    pixels, mask = torch.randn(2, 9, 192), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    shapes = torch.tensor([[3, 3], [2, 3]])
    other = pixels.clone()
    other[1, 6:] = torch.randn(3, 192)
    with torch.no_grad():
        output = model(pixels, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
        same = model(other, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
    assert calls.total() == 4
    torch.testing.assert_close(same[1, :6], output[1, :6], rtol=0, atol=32 * torch.finfo(torch.float32).eps)
    assert supports(model) is None


@named(NOT_REACHED_IN_5_3)
def test_a_model_that_the_oldest_transformers_computes_itself_is_reached_or_said_not_to_be(encoder, calls):
    reason = supports(encoder.build())
    try:
        model = encoder.build(attn_implementation="factorized")
    except KeyError as error:  # it looks the name up in a table of its own classes
        assert error.args == ("factorized",)  # noqa: PT017
        assert "never calls transformers' attention function" in reason
        return
    with torch.no_grad():
        model(**encoder.inputs(model))
    assert calls.total() == (encoder.layers if reason is None else 0)
    assert reason is None or "never calls transformers' attention function" in reason


@pytest.mark.parametrize(("encoder", "why"), REFUSED, ids=[encoder.name for encoder, _ in REFUSED])
def test_what_the_operator_cannot_express_raises(encoder, why):
    reason = supports(encoder.build())
    if "never calls transformers' attention function" in reason:
        pytest.skip(f"{encoder.name} computes its attention itself in transformers {transformers.__version__}")
    model = encoder.build(attn_implementation="factorized")
    inputs = encoder.inputs(model)
    if encoder.shape is None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    with pytest.raises(ValueError, match=f"factorized.*{why}"), torch.no_grad():
        model(**inputs)
    assert "factorized" in reason
    assert why in reason


@named(TRAPPED)
def test_models_that_would_misuse_the_mask_raise_or_ignore_it_and_are_said_not_to_be_supported(encoder, calls):
    model = encoder.build(attn_implementation="factorized")
    # Batch equal to length is where a [B, M] mask broadcasts into the scores and gives silently wrong numbers.
    input_ids = torch.randint(5, 30, (4, 4))
    mask = torch.ones_like(input_ids)
    mask[0, 3:] = 0
    assert model.config.model_type in MASK_TRAP_MODEL_TYPES
    assert "never call the factorized operator" in supports(model)
    try:
        with torch.no_grad():
            output = first_output(model(input_ids=input_ids, attention_mask=mask))
    except FactorizedAttentionError as error:
        assert "factorized" in str(error)  # noqa: PT017 (older versions don't raise: then the numbers are eager's)
        return
    assert not calls
    eager = encoder.build(attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(output, first_output(eager(input_ids=input_ids, attention_mask=mask)))


def test_every_installed_model_that_takes_our_mask_but_not_our_function_is_in_the_trap_table():
    root = Path(transformers.__file__).parent / "models"
    missing = []
    for modeling in sorted(root.glob("*/modeling_*.py")):
        source = modeling.read_text(encoding="utf-8")
        if "create_bidirectional_mask(" not in source or "ALL_ATTENTION_FUNCTIONS" in source:
            continue
        configuration = "".join(p.read_text(encoding="utf-8") for p in modeling.parent.glob("configuration_*.py"))
        model_types = set(re.findall(r'^    model_type = "([^"]+)"', configuration, re.M))
        # A mask with windows or causal order is refused by the mask function before a bidirectional one matters.
        refused_anyway = "create_causal_mask(" in source or "create_bidirectional_sliding_window_mask(" in source
        if not refused_anyway and not model_types & MASK_TRAP_MODEL_TYPES:
            missing.append((modeling.name, sorted(model_types)))
    assert not missing
    known = "".join(p.read_text(encoding="utf-8") for p in root.glob("*/configuration_*.py"))
    assert {name for name in MASK_TRAP_MODEL_TYPES if f'"{name}"' not in known} == set()


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
def test_supports_says_why_not(encoder, why):
    assert why in supports(encoder.build())


class HalfReached(BertModel):
    """A BERT whose second layer computes something of its own."""

    def __init__(self, config: BertConfig):
        super().__init__(config)

        class OwnAttention(nn.Module):
            def forward(self, hidden_states, *args, **kwargs):
                return hidden_states, None

        self.encoder.layer[1].attention = OwnAttention()


def test_supports_names_a_layer_that_is_not_reached():
    reason = supports(HalfReached(BertConfig(**TEXT)))
    assert "1 of the attention layers of HalfReached" in reason
    assert "encoder.layer.1.attention" in reason


def test_supports_says_that_it_knows_no_dummy_input():
    clip = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(**clip))
    assert "No dummy input is known for CLIPModel" in supports(model)
    assert supports(model.vision_model) is None


@pytest.mark.parametrize("head", ["BertForMultipleChoice", "SplinterForQuestionAnswering", "BertForMaskedLM"])
def test_supports_reaches_the_encoder_behind_any_head(head):
    config = BertConfig if head.startswith("Bert") else transformers.SplinterConfig
    assert supports(getattr(transformers, head)(config(**TEXT))) is None


def test_supports_refuses_what_is_not_a_transformers_model():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel"):
        supports(nn.Linear(2, 2))


def test_supports_leaves_the_model_and_the_warning_as_they_were(caplog):
    model = BertModel(BertConfig(**TEXT, attn_implementation="sdpa")).train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    weights, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    attention_interface._warned.discard("bert")
    assert supports(model) is None
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "bert" not in attention_interface._warned
    assert not caplog.records


def test_supports_says_that_our_own_models_need_no_choice():
    assert "FABertModel is factorized by itself" in supports(FABertModel(FABertConfig(**TEXT)))


def test_supports_draws_nothing_from_the_random_state():
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**IMAGE))  # draws the kept patches in its forward
    random_state = torch.random.get_rng_state()
    assert supports(model) is None
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_supports_works_in_half_precision():
    assert supports(BertModel(BertConfig(**TEXT)).to(torch.bfloat16)) is None
    assert supports(ViTModel(ViTConfig(**IMAGE)).to(torch.bfloat16)) is None


@pytest.mark.parametrize("choose", ["config", "from_pretrained", "auto config", "from_config", "live model"])
def test_it_can_be_chosen_in_every_way_that_transformers_offers(choose, tmp_path, calls):
    stock = BertModel(BertConfig(**TEXT)).eval()
    stock.save_pretrained(tmp_path)
    if choose == "config":
        model = BertModel(BertConfig(**TEXT, attn_implementation="factorized"))
    elif choose == "from_pretrained":
        model = AutoModel.from_pretrained(tmp_path, attn_implementation="factorized")
    elif choose == "auto config":
        config = AutoConfig.from_pretrained(tmp_path, attn_implementation="factorized")
        model = AutoModel.from_pretrained(tmp_path, config=config)
    elif choose == "from_config":
        model = AutoModel.from_config(BertConfig(**TEXT), attn_implementation="factorized")
    else:
        model = stock
        model.set_attn_implementation("factorized")
    model(torch.arange(7)[None])
    assert calls.total() == 2


def test_a_reload_gives_sdpa_as_the_warning_says(tmp_path):
    BertModel(BertConfig(**TEXT, attn_implementation="factorized")).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_the_first_forward_of_each_stock_class_warns_once(caplog):
    attention_interface._warned.clear()
    bert = BertModel(BertConfig(**TEXT, attn_implementation="factorized"))
    vit = ViTModel(ViTConfig(**IMAGE, attn_implementation="factorized"))
    with caplog.at_level(logging.WARNING, logger="fa_transformers.attention_interface"):
        for _ in range(2):
            bert(torch.arange(7)[None])
            BertForSequenceClassification(bert.config)(torch.arange(7)[None])
            vit(torch.randn(1, 3, 32, 32))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith('"bert"')
    assert messages[1].startswith('"vit"')
    for message in messages:
        assert "converted" in message
        assert "isn't saved" in message
        assert "FABert" in message


def test_a_compiled_first_forward_warns_as_well(caplog):
    attention_interface._warned.clear()
    model = BertModel(BertConfig(**TEXT, attn_implementation="factorized")).eval()
    with caplog.at_level(logging.WARNING, logger="fa_transformers.attention_interface"), torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager")(torch.arange(7)[None])
    assert [record.getMessage().split()[0] for record in caplog.records] == ['"bert"']


@named([TEXT_ENCODERS[0], text_tower("LayoutLMModel", max_2d_position_embeddings=16), VISION_ENCODERS[0]])
def test_it_compiles_in_one_graph(encoder):
    torch.compiler.reset()
    model = encoder.build(attn_implementation="factorized")
    inputs = encoder.inputs(model)
    if encoder.shape is None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 4:] = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = first_output(model(**inputs))
        output = first_output(torch.compile(model, fullgraph=True, backend="eager")(**inputs))
    torch.testing.assert_close(output, expected, rtol=0, atol=32 * torch.finfo(torch.float32).eps)


def test_it_exports_with_a_dynamic_length():
    model = BertModel(BertConfig(**TEXT, attn_implementation="factorized"), add_pooling_layer=False).eval()
    length = torch.export.Dim("length", min=2, max=40)
    example = (torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long))
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=({1: length}, {1: length})).module()
        input_ids, mask = torch.randint(5, 60, (2, 14)), torch.ones(2, 14, dtype=torch.long)
        mask[1, 9:] = 0
        torch.testing.assert_close(
            program(input_ids, mask).last_hidden_state, model(input_ids, mask).last_hidden_state, rtol=0, atol=1e-5
        )


def test_it_trains_under_bf16_autocast_with_rotary_positions():
    encoder = next(encoder for encoder in VISION_ENCODERS if encoder.model == "DINOv3ViTModel")
    model = encoder.build(attn_implementation="factorized").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**encoder.inputs(model)).last_hidden_state.float().pow(2).sum().backward()
    gradients = [
        parameter.grad for name, parameter in model.named_parameters() if "q_proj" in name and parameter.ndim == 2
    ]
    assert len(gradients) == 2
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


class Caller(nn.Module):
    """Stands for a stock attention layer in tests of the function alone."""

    def __init__(self, is_causal: bool = False):
        super().__init__()
        self.is_causal = is_causal


def heads(batch: int = 2, heads: int = 4, length: int = 6, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, length, heads, width).transpose(1, 2)


def attend(attention_mask=None, module=None, key_heads=4, keys=6, **kwargs) -> torch.Tensor:
    torch.manual_seed(0)
    query, key, value = heads(), heads(heads=key_heads, length=keys), heads(heads=key_heads, length=keys)
    output, weights = factorized_attention_forward(module or Caller(), query, key, value, attention_mask, **kwargs)
    assert weights is None
    return output


REAL = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def test_the_output_is_the_operators_laid_out_as_transformers_wants_it():
    torch.manual_seed(0)
    query, key, value = heads(), heads(), heads()
    output = attend(REAL, scaling=0.125, dropout=0.9)
    assert output.shape == (2, 6, 4, 8)
    assert output.is_contiguous()
    assert torch.equal(output, factorized_attention(query, key, value, REAL).transpose(1, 2))


@pytest.mark.parametrize(
    "mask",
    [
        REAL,
        REAL[:, None, None, :],
        torch.zeros(2, 1, 1, 6).masked_fill(~REAL[:, None, None, :], torch.finfo(torch.float32).min),
        torch.zeros(2, 1, 1, 6).masked_fill(~REAL[:, None, None, :], -10000.0),
        torch.zeros(2, 1, 1, 6).masked_fill(~REAL[:, None, None, :], float("-inf")),
        torch.zeros(2, 1, 1, 6, dtype=torch.bfloat16).masked_fill(~REAL[:, None, None, :], -1e4),
    ],
    ids=["bool [B,M]", "bool [B,1,1,M]", "float32 minimum", "-1e4", "-inf", "bfloat16"],
)
def test_every_way_to_write_a_padding_mask_gives_the_same(mask):
    assert torch.equal(attend(mask), attend(REAL))
    assert not torch.equal(attend(mask), attend(None))


def test_a_mask_of_one_row_serves_the_whole_batch():
    assert torch.equal(attend(REAL[1:]), attend(REAL[1:].expand(2, -1)))
    assert torch.equal(attend(REAL[1:, None, None, :]), attend(REAL[1:].expand(2, -1)))


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.ones(2, 1, 6, 6, dtype=torch.bool), "over queries or heads"),
        (torch.zeros(2, 1, 6, 6), "over queries or heads"),
        (torch.zeros(2, 4, 6, 6), "over queries or heads"),
        (torch.zeros(2, 4, 1, 6), "over queries or heads"),
        (torch.ones(2, 6, 6, dtype=torch.bool), "over queries or heads"),
        (torch.ones(2, 5, dtype=torch.bool), "key positions"),
        (torch.ones(3, 6, dtype=torch.bool), "key positions"),
        (torch.ones(2, 6), "must be bool"),
        (torch.ones(2, 6, dtype=torch.long), "must be bool"),
        (torch.full((2, 1, 1, 6), -0.5), "a bias on the scores"),
        (torch.full((2, 1, 1, 6), float("nan")), "a bias on the scores"),
        ("causal", "not a tensor"),
    ],
    ids=str,
)
def test_a_mask_that_is_not_one_row_of_keys_raises(mask, why):
    with pytest.raises(FactorizedAttentionError, match=f'"factorized" can\'t run Caller: .*{why}'):
        attend(mask)


@pytest.mark.parametrize(
    "argument",
    ["position_bias", "softcap", "s_aux", "sinks", "head_mask", "sliding_window", "cu_seq_lens_q", "block_indices"],
)
def test_an_argument_that_changes_the_scores_raises_when_it_is_set(argument):
    value = 4 if argument == "sliding_window" else torch.ones(1)
    with pytest.raises(FactorizedAttentionError, match=f"factorized.*`{argument}` is set"):
        attend(**{argument: value})
    assert torch.equal(attend(**{argument: None}), attend())


def test_causal_attention_raises_whether_the_call_or_the_module_says_so():
    for options in ({"is_causal": True}, {"module": Caller(True)}, {"module": Caller(True), "is_causal": None}):
        with pytest.raises(FactorizedAttentionError, match="factorized.*causal"):
            attend(**options)
    assert torch.equal(attend(module=Caller(True), is_causal=False), attend())


def test_attention_weights_cannot_be_had():
    with pytest.raises(FactorizedAttentionError, match="factorized.*N×N"):
        attend(output_attentions=True)
    assert torch.equal(attend(output_attentions=False), attend())
    with pytest.raises(FactorizedAttentionError, match="factorized.*N×N"):
        BertModel(BertConfig(**TEXT, attn_implementation="factorized"))(torch.arange(7)[None], output_attentions=True)


def test_grouped_key_heads_are_repeated():
    torch.manual_seed(0)
    query, key, value = heads(), heads(heads=2), heads(heads=2)
    expected = factorized_attention(query, key[:, [0, 0, 1, 1]], value[:, [0, 0, 1, 1]]).transpose(1, 2)
    assert torch.equal(attend(key_heads=2), expected)
    with pytest.raises(FactorizedAttentionError, match="4 query heads can't share 3 key heads"):
        attend(key_heads=3)


def test_keys_may_be_fewer_or_more_than_queries():
    real = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    assert attend(real, keys=9).shape == (2, 6, 4, 8)
    torch.manual_seed(0)
    query, key, value = heads(), heads(length=9), heads(length=9)
    alone, _ = factorized_attention_forward(Caller(), query[1:], key[1:, :, :5], value[1:, :, :5], None)
    torch.testing.assert_close(attend(real, keys=9)[1:], alone, rtol=0, atol=8 * torch.finfo(torch.float32).eps)


def test_a_sample_without_a_real_token_gives_zeros():
    mask = REAL.clone()
    mask[1] = False
    assert torch.equal(attend(mask)[1], torch.zeros(6, 4, 8))


def test_the_mask_function_keeps_the_mask_and_needs_nothing_of_a_versions_own_arguments():
    assert factorized_mask(attention_mask=REAL, config=BertConfig(**TEXT), cache_position=torch.arange(6)) is REAL
    assert factorized_mask(batch_size=2, q_length=6, kv_length=6) is None


def test_a_custom_mask_pattern_raises():
    with pytest.raises(FactorizedAttentionError, match="factorized.*differs from query to query"):
        factorized_mask(attention_mask=REAL, mask_function=lambda batch, head, query, key: query == key)


def test_the_probe_of_supports_is_not_for_use():
    with pytest.raises(ValueError, match='choose attn_implementation="factorized"'):
        BertModel(BertConfig(**TEXT, attn_implementation="factorized_probe"))(torch.arange(7)[None])
