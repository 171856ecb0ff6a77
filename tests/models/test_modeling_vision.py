"""Image models: any height and width, registers, layer scale, masked patches, masks, positions as in stock models."""

import pytest
import torch
from tiny_models import (
    EXACT,
    HEADS,
    IMAGE_SIZE,
    OPTION_SETS,
    PATCH_SIZE,
    as_float64,
    assert_equal_outputs,
    build,
    image_inputs,
    inputs_of,
    loss_of,
    outputs_of,
    tiny_config,
)
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from fa_transformers.models import FAViTConfig, FAViTForImageClassification, FAViTForMaskedImageModeling, FAViTModel

IMAGE_HEADS = [head for head in HEADS if head[2].main_input_name == "pixel_values"]
every_head = pytest.mark.parametrize(
    ("config_class", "auto_class", "model_class"), IMAGE_HEADS, ids=[head[2].__name__ for head in IMAGE_HEADS]
)
SIZES = [(1, 1), (7, 65), (8, 8), (32, 32), (40, 16), (63, 9), (96, 130)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("options", ["all", "all scaling"])
def test_any_height_and_width_runs_forward_and_backward(height, width, options):
    model = build(FAViTConfig, FAViTForImageClassification, **OPTION_SETS[options]).train()
    output = model(**image_inputs(height, width), labels=torch.tensor([0, 1]))
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("height", "width"), [(40, 19), (33, 32), (5, 70)])
def test_side_that_does_not_divide_equals_the_image_padded_with_zeros(height, width):
    model = build(FAViTConfig, FAViTModel, **OPTION_SETS["all"])
    pixels = image_inputs(height, width)["pixel_values"]
    bottom, right = -height % PATCH_SIZE, -width % PATCH_SIZE
    padded = torch.nn.functional.pad(pixels, (0, right, 0, bottom))
    assert_equal_outputs(outputs_of(model, {"pixel_values": pixels}), outputs_of(model, {"pixel_values": padded}))


@every_head
def test_last_row_and_column_of_pixels_take_part(config_class, auto_class, model_class):
    model = build(config_class, model_class, **OPTION_SETS["all"])
    inputs = inputs_of(model, auto_class)
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][:, :, -1, -1] += 5.0
    for name, value in outputs_of(model, inputs).items():
        assert not torch.equal(outputs_of(model, changed)[name], value)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (24, 16), (16, 80)])
@pytest.mark.parametrize("stock", ["vit", "dinov2", "dinov2_with_registers"])
def test_positions_equal_the_stock_ones_at_every_size(stock, height, width):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    stock_model, stock_config, registers = {
        "vit": (ViTModel, ViTConfig, 0),
        "dinov2": (Dinov2Model, Dinov2Config, 0),
        "dinov2_with_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, 4),
    }[stock]
    model = build(FAViTConfig, FAViTModel, num_register_tokens=registers, position_embedding_antialias=registers > 0)
    reference = stock_model(stock_config(**sizes)).eval()
    with torch.no_grad():
        reference.embeddings.position_embeddings.copy_(model.embeddings.position_embeddings)
        reference.embeddings.cls_token.zero_()
        model.embeddings.cls_token.zero_()
        for embeddings in (reference.embeddings, model.embeddings):
            if registers:
                embeddings.register_tokens.zero_()
            embeddings.patch_embeddings.projection.weight.zero_()
            embeddings.patch_embeddings.projection.bias.zero_()
        pixels = torch.zeros(1, 3, height, width)
        interpolate = {"interpolate_pos_encoding": True} if stock == "vit" else {}
        expected = reference.embeddings(pixels, **interpolate)
        layout = model.lay_out(pixels)
        actual = model.embeddings(pixels, None, None, layout)
    assert layout.grid == (height // 8, width // 8)
    assert torch.equal(actual, expected)


def test_native_size_uses_the_table_as_it_is():
    model = build(FAViTConfig, FAViTModel)
    table = model.embeddings.patch_positions((4, 4), None)
    assert torch.equal(table, model.embeddings.position_embeddings[:, 1:])


def test_other_size_is_an_error_where_interpolation_is_switched_off():
    model = build(FAViTConfig, FAViTModel)
    native = image_inputs(IMAGE_SIZE, IMAGE_SIZE)
    expected = outputs_of(model, native)
    for choice in (None, True, False):
        assert_equal_outputs(outputs_of(model, native, interpolate_pos_encoding=choice), expected)
    with pytest.raises(ValueError, match="`interpolate_pos_encoding`"):
        model(**image_inputs(40, 40), interpolate_pos_encoding=False)


def test_periodic_positions_repeat_the_native_grid():
    model = build(FAViTConfig, FAViTModel, position_embedding_type="periodic")
    native = model.embeddings.position_embeddings[0, 1:].view(4, 4, -1)
    positions = model.embeddings.patch_positions((7, 10), None).view(7, 10, -1)
    for row in range(7):
        for column in range(10):
            assert torch.equal(positions[row, column], native[row % 4, column % 4])


def test_model_without_positions_does_not_know_where_patches_are():
    fields = {"position_embedding_type": "none", "classifier_pooling": "mean"}
    model = build(FAViTConfig, FAViTForImageClassification, **fields).double()
    pixels = as_float64(image_inputs(32, 24))["pixel_values"]
    blocks = pixels.unfold(2, 8, 8).unfold(3, 8, 8)  # [B, 3, 4, 3, 8, 8]
    shuffled = blocks[:, :, torch.randperm(4)][:, :, :, torch.randperm(3)]
    shuffled = shuffled.permute(0, 1, 2, 4, 3, 5).reshape(pixels.shape)
    expected = outputs_of(model, {"pixel_values": pixels})["logits"]
    torch.testing.assert_close(outputs_of(model, {"pixel_values": shuffled})["logits"], expected, **EXACT)


@pytest.mark.parametrize("options", ["local", "all", "all scaling"])
def test_padded_patches_change_nothing_at_real_ones(options):
    fields = {**OPTION_SETS[options], "position_embedding_type": "periodic"}
    model = build(FAViTConfig, FAViTForImageClassification, **fields).double()
    registers = model.config.num_register_tokens
    small = as_float64(image_inputs(24, 24))["pixel_values"]
    expected = outputs_of(model, {"pixel_values": small})["logits"]
    canvas = torch.full((2, 3, 40, 32), 9.0, dtype=torch.float64)
    canvas[:, :, :24, :24] = small
    patches = torch.zeros(2, 5, 4, dtype=torch.long)
    patches[:, :3, :3] = 1
    mask = torch.cat([torch.ones(2, 1 + registers, dtype=torch.long), patches.flatten(1)], dim=1)
    for given in (mask, mask.bool()):
        actual = outputs_of(model, {"pixel_values": canvas, "attention_mask": given})["logits"]
        torch.testing.assert_close(actual, expected, **EXACT)


def test_full_mask_equals_no_mask():
    model = build(FAViTConfig, FAViTModel, **OPTION_SETS["all"]).double()
    inputs = as_float64(image_inputs())
    full = torch.ones(2, 1 + 5 * 3, dtype=torch.long)
    masked, plain = outputs_of(model, {**inputs, "attention_mask": full}), outputs_of(model, inputs)
    for name, value in plain.items():
        torch.testing.assert_close(masked[name], value, **EXACT)


def test_image_of_padding_alone_is_finite():
    model = build(FAViTConfig, FAViTForImageClassification, **OPTION_SETS["all"]).train()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1] = 0
    output = model(**image_inputs(), attention_mask=mask, labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_registers_stand_between_cls_and_patches_and_carry_no_position():
    model = build(FAViTConfig, FAViTModel, num_register_tokens=3)
    pixels = image_inputs(32, 32)["pixel_values"]
    embedded = model.embeddings(pixels, None, None, model.lay_out(pixels))
    assert embedded.shape[1] == 1 + 3 + 16
    assert torch.equal(embedded[:, 1:4], model.embeddings.register_tokens.expand(2, -1, -1))


def test_layer_scale_starts_at_its_value_and_scales_both_sub_layers():
    model = FAViTModel(tiny_config(FAViTConfig, layerscale_value=0.25))
    scales = [value for name, value in model.named_parameters() if name.endswith("lambda1")]
    assert len(scales) == 2 * model.config.num_hidden_layers
    assert all((scale == 0.25).all() for scale in scales)
    model = build(FAViTConfig, FAViTModel, layerscale_value=1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lambda1"):
                parameter.zero_()
    output = model(**image_inputs(), output_hidden_states=True)
    assert all(torch.equal(state, output.hidden_states[0]) for state in output.hidden_states)
    assert not any("lambda1" in name for name, _ in build(FAViTConfig, FAViTModel).named_parameters())


def test_masked_patches_do_not_reach_the_reconstruction():
    model = build(FAViTConfig, FAViTForMaskedImageModeling, **OPTION_SETS["all"])
    inputs = inputs_of(model, "AutoModelForMaskedImageModeling")
    masked = inputs["bool_masked_pos"].view(2, 5, 3).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, :40, :19]
    changed = {**inputs, "pixel_values": inputs["pixel_values"] + 3.0 * masked}
    expected = outputs_of(model, inputs)["reconstruction"]
    assert torch.equal(outputs_of(model, changed)["reconstruction"], expected)
    seen = {**inputs, "pixel_values": inputs["pixel_values"] + 3.0 * ~masked}
    assert not torch.equal(outputs_of(model, seen)["reconstruction"], expected)


def test_masked_image_loss_is_the_mean_absolute_error_over_masked_pixels():
    model = build(FAViTConfig, FAViTForMaskedImageModeling, **OPTION_SETS["all"]).double()
    inputs = as_float64(inputs_of(model, "AutoModelForMaskedImageModeling"))
    output = model(**inputs)
    masked = inputs["bool_masked_pos"].view(2, 5, 3)
    errors = [
        (inputs["pixel_values"] - output.reconstruction)[sample, :, y, x].abs().mean()
        for sample in range(2)
        for y in range(40)
        for x in range(19)
        if masked[sample, y // 8, x // 8]
    ]
    # The stock formula adds 1e-5 to the number of masked pixels.
    expected = torch.stack(errors).sum() / (len(errors) + 1e-5)
    torch.testing.assert_close(output.loss, expected, **EXACT)
    assert model(pixel_values=inputs["pixel_values"]).loss is None
    grid = {**inputs, "bool_masked_pos": masked.transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(model(**grid).loss, output.loss)


def test_patches_and_images_may_be_oblong():
    fields = {**OPTION_SETS["all"], "image_size": [32, 48], "patch_size": [8, 4]}
    model = build(FAViTConfig, FAViTForImageClassification, **fields)
    assert model.config.native_grid == (4, 12)
    assert model.vit.embeddings.position_embeddings.shape == (1, 49, 32)
    loss = loss_of(model, "AutoModelForImageClassification", image_inputs(21, 50))
    assert loss.isfinite()


def test_pooling_reads_cls_or_the_mean_of_the_patches():
    inputs = image_inputs()
    for pooling in ("cls", "mean"):
        fields = {"classifier_pooling": pooling, "num_register_tokens": 3}
        model = build(FAViTConfig, FAViTForImageClassification, **fields)
        hidden_states = model.vit(**inputs).last_hidden_state
        pooled = hidden_states[:, 0] if pooling == "cls" else hidden_states[:, 4:].mean(dim=1)
        assert torch.equal(model(**inputs).logits, model.classifier(pooled))


def test_pooler_can_be_left_out_and_have_its_own_width():
    model = build(FAViTConfig, FAViTModel, pooler_output_size=5, pooler_act="relu")
    outputs = outputs_of(model, image_inputs())
    assert outputs["pooler_output"].shape == (2, 5) and (outputs["pooler_output"] >= 0).all()
    assert FAViTModel(tiny_config(FAViTConfig), add_pooling_layer=False)(**image_inputs()).pooler_output is None
