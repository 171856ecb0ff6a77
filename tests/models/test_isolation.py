"""What a document doesn't own can't touch it: another's NaN, what padding holds, seams, a long window."""

import time

import pytest
import torch
from oracles import MemoryMeter
from tiny_models import (
    EXACT,
    OPTION_SETS,
    as_float64,
    build,
    image_inputs,
    outputs_of,
    randomize,
    text_inputs,
    tiny_config,
)
from torch import Tensor

from fa_transformers.models import FABertConfig, FABertModel, FAViTConfig, FAViTModel, fa_local
from fa_transformers.models.fa_local import FEWEST_BFLOAT16_CHANNELS, LocalConvolution, window_attention
from fa_transformers.models.fa_packed import PackedDocuments

LOCAL = {
    "window": {"local_window": 4},
    "long window": {"local_window": 100},
    "all": OPTION_SETS["all"],
    "all softmax": {"softmax_layers": [0, 1]},
}
every_local = pytest.mark.parametrize("options", LOCAL.values(), ids=LOCAL)
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)
every_not_finite = pytest.mark.parametrize("value", NOT_FINITE, ids=str)


# A document's own NaN


def documents(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, length, 32, generator=generator, dtype=torch.float64) for length in lengths]


@every_local
@every_not_finite
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("place", [0, 10, 19], ids=["first", "middle", "last"])
def test_nan_stays_in_its_row_of_a_batch(options, value, chunk_size, place):
    model = build(FABertConfig, FABertModel, **options).double()
    embedded = torch.cat(documents(20, 20, 20))
    expected = outputs_of(model, {"inputs_embeds": embedded}, chunk_size=chunk_size)["last_hidden_state"]
    embedded[1, place, 5] = value
    actual = outputs_of(model, {"inputs_embeds": embedded}, chunk_size=chunk_size)["last_hidden_state"]
    assert torch.equal(actual[::2], expected[::2])
    assert actual[1].isnan().any(dim=-1).all(), "it must show in the whole of its own document"


@every_local
@every_not_finite
def test_nan_stays_in_its_document_of_a_packed_row(options, value):
    model = build(FABertConfig, FABertModel, **options).double()
    lengths = (9, 20, 3, 1)
    parts = documents(*lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(dim=0)
    expected = outputs_of(model, {"inputs_embeds": torch.cat(parts, dim=1), "cu_seqlens": bounds})["last_hidden_state"]
    parts[1][0, [0, 7, 19]] = value
    actual = outputs_of(model, {"inputs_embeds": torch.cat(parts, dim=1), "cu_seqlens": bounds})["last_hidden_state"]
    for index, (part, whole) in enumerate(
        zip(actual.split(lengths, dim=1), expected.split(lengths, dim=1), strict=True)
    ):
        assert part.isnan().any(dim=-1).all() if index == 1 else torch.equal(part, whole), index


@every_local
@every_not_finite
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_that_is_not_finite_reaches_no_real_token(options, value, chunk_size, implementation):
    model = build(FABertConfig, FABertModel, **options).double()
    model.set_attn_implementation(implementation)
    embedded = torch.cat(documents(20, 20))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :6], mask[1, 15:] = False, False
    inputs = {"inputs_embeds": embedded, "attention_mask": mask}
    expected = outputs_of(model, inputs, chunk_size=chunk_size)
    inputs["inputs_embeds"] = embedded.masked_fill(~mask[:, :, None], value)
    actual = outputs_of(model, inputs, chunk_size=chunk_size)
    assert torch.equal(actual["last_hidden_state"][mask], expected["last_hidden_state"][mask])
    assert torch.equal(actual["pooler_output"], expected["pooler_output"])


@every_local
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_masked_patches_that_are_not_finite_reach_no_real_token(options, chunk_size):
    model = build(FAViTConfig, FAViTModel, **options).double()
    pixels = as_float64(image_inputs(40, 24))["pixel_values"]  # 5 x 3 patches
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, [3, 8]] = False
    expected = outputs_of(model, {"pixel_values": pixels, "attention_mask": mask}, chunk_size=chunk_size)
    pixels[0, :, :8, 16:], pixels[0, :, 16:24, 8:16] = torch.nan, torch.inf
    actual = outputs_of(model, {"pixel_values": pixels, "attention_mask": mask}, chunk_size=chunk_size)
    assert torch.equal(actual["last_hidden_state"][mask], expected["last_hidden_state"][mask])


def gradients(model, inputs: dict[str, Tensor], real: Tensor) -> list[Tensor]:
    output = model(**inputs)
    tokens = output.last_hidden_state[real]
    loss = (tokens * torch.linspace(-1.0, 1.0, tokens.numel()).view_as(tokens)).sum() + output.pooler_output.sum()
    floats = [value for value in inputs.values() if value.requires_grad]
    found = torch.autograd.grad(loss, [*model.parameters(), *floats], allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
def test_padding_of_any_content_changes_no_gradient(options):
    model = build(FABertConfig, FABertModel, **options)
    embedded = torch.cat(documents(20, 20)).float()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :6], mask[1, 15:] = False, False
    found = []
    for filler in (0.0, torch.nan, -torch.inf, 3e38):  # the last one's square overflows
        given = embedded.masked_fill(~mask[:, :, None], filler).requires_grad_()
        found.append(gradients(model, {"inputs_embeds": given, "attention_mask": mask}, mask))
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


@every_not_finite
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_under_the_mask_token_are_not_read(dtype, chunk_size, value):
    """In bfloat16 the convolution on CPUs would carry NaN into the patch before."""
    model = randomize(FAViTModel(tiny_config(FAViTConfig), use_mask_token=True).eval()).to(dtype)
    pixels = image_inputs(40, 24)["pixel_values"].to(dtype)  # 5 x 3 patches
    masked = torch.zeros(2, 15, dtype=torch.bool)
    masked[0, [3, 8]] = True
    inputs = {"pixel_values": pixels, "bool_masked_pos": masked}
    expected = outputs_of(model, inputs, chunk_size=chunk_size)["last_hidden_state"]
    poisoned = pixels.clone()
    poisoned[0, :, 8:16, :8] = poisoned[0, :, 16:24, 16:] = value
    actual = outputs_of(model, inputs | {"pixel_values": poisoned}, chunk_size=chunk_size)["last_hidden_state"]
    assert torch.equal(actual, expected)
    if chunk_size is None:
        real = torch.ones(2, 16, dtype=torch.bool)
        assert all(
            map(torch.equal, *(gradients(model, inputs | {"pixel_values": p}, real) for p in (pixels, poisoned)))
        )


def test_scores_that_overflow_in_float16_training_stay_in_their_document():
    query, key, value = torch.randn(3, 2, 2, 20, 8).half()
    key[1] = 60000.0  # finite, but not its products with the queries of the first document
    query[0] = query[0].abs() + 30.0
    key.requires_grad_()
    alone = window_attention(query[:1], key[:1], value[:1], None, 4)
    assert torch.equal(window_attention(query, key, value, None, 4)[:1], alone)


# Windows longer than the text


def test_a_window_longer_than_the_text_costs_what_the_text_costs():
    query, key, value = torch.randn(3, 1, 2, 10, 8)
    packed = PackedDocuments(torch.arange(0, 640 * 10 + 1, 10), 6400)
    row = torch.randn(1, 2, 6400, 8)
    started = time.process_time()
    with MemoryMeter() as meter:
        text = window_attention(query, key, value, None, 100_000)
        image = window_attention(*(t.unflatten(2, (5, 2)) for t in (query, key, value)), None, 100_000)
    assert meter.peak_bytes < 2**20  # 1.2 TB of scores otherwise
    with MemoryMeter() as meter:
        window_attention(row, row, row, packed.document_ids[None] + 1, packed.clip(100_000))
    assert meter.peak_bytes < 2**26
    assert time.process_time() - started < 5.0
    whole = (query @ key.transpose(2, 3) / 8**0.5).softmax(dim=3) @ value
    # Ten float32 products of order one each, and a softmax of them.
    torch.testing.assert_close(text, whole, rtol=0.0, atol=2.0**-18)
    torch.testing.assert_close(image.flatten(2, 3), whole, rtol=0.0, atol=2.0**-18)


GRIDS = ((1,), (17,), (40,), (1, 1), (9, 2), (2, 9), (12, 20))
# Unclipped, a window of 70 on two axes takes seconds for tiles of 128 · 128, and 39 is beyond every side already.
CLIPPED = [(grid, window) for window in (8, 9, 16, 17, 39, 41, 70) for grid in GRIDS if len(grid) == 1 or window < 64]


@pytest.mark.parametrize(("grid", "window"), CLIPPED, ids=str)
def test_clipped_windows_equal_unclipped_ones(grid, window, monkeypatch):
    query, key, value = torch.randn(3, 2, 2, *grid, 4, dtype=torch.float64)
    mask = torch.rand(2, *grid) > 0.2
    value = value.masked_fill(~mask[:, None, ..., None], 0.0)
    clipped = window_attention(query, key, value, mask, window)
    monkeypatch.setattr(fa_local, "_clip", lambda window, size, smallest_tile: window)
    torch.testing.assert_close(clipped, window_attention(query, key, value, mask, window), **EXACT)


@pytest.mark.parametrize("lengths", [(300, 1, 2), (90, 90, 90), (3,), (1, 0, 70)], ids=str)
def test_packed_windows_are_clipped_to_the_longest_document_alone(lengths):
    packed = PackedDocuments(torch.tensor([0, *lengths]).cumsum(dim=0), sum(lengths))
    assert packed.longest == max(lengths)
    for window in (1, 5, 89, 90, 91, 301, 10_000):
        assert packed.clip(window) == window or max(lengths) <= packed.clip(window) <= max(64, *lengths)
    assert packed.clip(10_000) <= max(64, *lengths)


def test_models_take_a_window_longer_than_any_text_packed_and_in_chunks():
    model = build(FABertConfig, FABertModel, local_window=100_000).double()
    near = build(FABertConfig, FABertModel, local_window=64).double()
    inputs = text_inputs("AutoModel", lengths=(12, 7))
    for options in ({}, {"chunk_size": 5}):
        expected, actual = (outputs_of(m, inputs, **options)["last_hidden_state"] for m in (near, model))
        torch.testing.assert_close(actual, expected, **EXACT)
    packed = {"input_ids": inputs["input_ids"][:1], "cu_seqlens": torch.tensor([0, 5, 12])}
    expected, actual = (outputs_of(m, packed)["last_hidden_state"] for m in (near, model))
    torch.testing.assert_close(actual, expected, **EXACT)


# Terms that look away zero positions


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
@pytest.mark.parametrize("options", [{}, {"local_window": 2}, {"num_register_tokens": 2}], ids=str)
def test_a_kernel_of_one_takes_part_in_chunks(options, chunk_size):
    for config_class, model_class, inputs in (
        (FABertConfig, FABertModel, text_inputs("AutoModel", lengths=(23, 9))),
        (FAViTConfig, FAViTModel, as_float64(image_inputs(40, 19))),
    ):
        model = build(config_class, model_class, local_kernel_size=1, **options).double()
        expected = outputs_of(model, inputs)["last_hidden_state"]
        actual = outputs_of(model, inputs, chunk_size=chunk_size)["last_hidden_state"]
        torch.testing.assert_close(actual, expected, **EXACT)
        torch.nn.init.zeros_(model.encoder.layer[0].get_submodule(mixer_name(model)).local_convolution.weight)
        assert not torch.allclose(outputs_of(model, inputs)["last_hidden_state"], expected, atol=1e-3)


def mixer_name(model) -> str:
    return "attention.self.mixer" if isinstance(model, FABertModel) else "attention.attention.mixer"


# Convolution in bfloat16 on CPUs


@pytest.mark.parametrize("rank", [1, 2], ids=["text", "image"])
@pytest.mark.parametrize("is_autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("num_channels", [4, FEWEST_BFLOAT16_CHANNELS])
def test_few_channels_are_convolved_in_float32(rank, is_autocast, num_channels, monkeypatch):
    seen = []

    def conv2d(channels, weight, **options):
        seen.append((channels.dtype, torch.is_autocast_enabled("cpu")))
        return original(channels.double(), weight.double(), **options).to(channels.dtype)  # nothing that may hang

    original = torch.nn.functional.conv2d
    monkeypatch.setattr(fa_local.F, "conv2d", conv2d)
    module = randomize(LocalConvolution(num_channels, 3, rank))
    value = torch.randn(2, 2, *[9] * rank, num_channels // 2)
    exact = module.double()(value.bfloat16().double())
    seen.clear()
    module = module.float() if is_autocast else module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        mixed = module(value.bfloat16())
    is_few = num_channels < FEWEST_BFLOAT16_CHANNELS
    assert seen == [(torch.float32, False) if is_few else (torch.bfloat16, is_autocast)]
    assert mixed.dtype == torch.bfloat16
    # Weights of size 0.2 that are rounded, and one rounding of the sum of 3 or 9 products.
    torch.testing.assert_close(mixed.double(), exact, rtol=2.0**-7, atol=2.0**-7)


def test_gradients_of_the_float32_path_are_those_of_the_rounded_numbers():
    module = randomize(LocalConvolution(4, 3, 1)).bfloat16()
    value = torch.randn(1, 2, 9, 2).bfloat16().requires_grad_()
    direction = torch.randn(1, 2, 9, 2).bfloat16()
    gradients = torch.autograd.grad((module(value) * direction).sum(), (value, module.weight))
    exact, weight = value.detach().double().requires_grad_(), module.double().weight
    expected = torch.autograd.grad((module(exact) * direction.double()).sum(), (exact, weight))
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), other, rtol=2.0**-7, atol=2.0**-7)
