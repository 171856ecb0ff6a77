"""Protects `attn_implementation="factorized"` for stock transformers encoders.

One table of tiny random encoders proves that the operator is reached in each layer, and that padding changes nothing; a
second one proves that what it can't express raises instead of running wrong. `why_unsupported` must agree with both.
"""

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
    REFUSED,
    SIZES,
    TEXT,
    TEXT_ENCODERS,
    TRAPPED,
    VISION_ENCODERS,
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

from fa_transformers import attention_interface
from fa_transformers.attention_interface import (
    MASK_TRAP_MODEL_TYPES,
    FactorizedAttentionError,
    factorized_attention_forward,
    why_unsupported,
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
    assert why_unsupported(model) is None


@named(NOT_REACHED_IN_5_3)
def test_a_model_that_the_oldest_transformers_computes_itself_is_reached_or_said_not_to_be(encoder, calls):
    reason = why_unsupported(encoder.build())
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
    reason = why_unsupported(encoder.build())
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
    assert "never call the factorized operator" in why_unsupported(model)
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


def test_masks_with_holes_and_of_floating_point_ones_are_taken_as_by_stock_attention():
    model = BertModel(BertConfig(**TEXT, attn_implementation="factorized")).eval()
    ids, mask = torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 3:5], mask[1, 6:] = 0, 0
    expected = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    for given in (mask.float(), mask.double(), mask.bool()):
        assert torch.equal(model(ids, attention_mask=given).last_hidden_state[mask.bool()], expected)
    others = ids.where(mask.bool(), 64 - ids)
    assert torch.equal(model(others, attention_mask=mask).last_hidden_state[mask.bool()], expected)
