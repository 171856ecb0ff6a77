"""Encoding in chunks gives what encoding at once gives, for every head and option, in the memory of one hidden state.

The oracle is the unchanged model; of the streaming context, the float64 attention matrix in `oracles.py`.
"""

import json
import subprocess
import sys

import pytest
import torch
from oracles import MemoryMeter, attention, error_budget
from repository import SCRIPTS
from tiny_models import (
    ALL_OPTIONS,
    EXACT,
    HEADS,
    OPTION_SETS,
    ROW_IDS,
    ROWS,
    as_float64,
    build,
    image_inputs,
    inputs_of,
    outputs_of,
    text_inputs,
)
from torch import Tensor

from fa_transformers.models import FABertConfig, FABertModel, FAViTConfig, FAViTModel
from fa_transformers.models.fa_chunked import join, slices
from fa_transformers.models.fa_context import LARGEST_BLOCK, ContextAccumulator, apply_context

CHUNK_SIZES = (1, 3, 7, 1000)
WIDE_HALO = {"local_window": 9, "local_kernel_size": 3}
OPTIONS = {**OPTION_SETS, "wide halo": WIDE_HALO}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def assert_chunks_change_nothing(model, inputs: dict[str, Tensor], chunk_sizes=CHUNK_SIZES, **options) -> None:
    """In float64, over all of a model's output tensors."""
    model, inputs = model.double(), as_float64(inputs)
    expected = outputs_of(model, inputs, **options)
    for chunk_size in chunk_sizes:
        actual = outputs_of(model, inputs, chunk_size=chunk_size, **options)
        assert actual.keys() == expected.keys() and len(expected) > 0
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, **EXACT, msg=lambda text, at=(name, chunk_size): f"{at}: {text}"
            )


@pytest.mark.parametrize(("config_class", "auto_class", "model_class", "options"), ROWS, ids=ROW_IDS)
def test_every_head_and_option_gives_what_it_gives_at_once(config_class, auto_class, model_class, options):
    model = build(config_class, model_class, **OPTION_SETS[options])
    assert_chunks_change_nothing(model, inputs_of(model, auto_class))


@every_option
@pytest.mark.parametrize(("left", "right"), [(6, 0), (0, 6), (3, 5)], ids=["left", "right", "both sides"])
def test_padded_text_gives_what_it_gives_at_once(options, left, right):
    inputs = text_inputs("AutoModel", lengths=(15, 9))
    inputs = {name: torch.nn.functional.pad(value, (left, right)) for name, value in inputs.items()}
    inputs = {name: torch.cat([value, 0 * value[:1]]) for name, value in inputs.items()}  # one without a real token
    assert_chunks_change_nothing(build(FABertConfig, FABertModel, **options), inputs)


@every_option
def test_unpadded_text_positions_and_embeddings_give_what_they_give_at_once(options):
    model = build(FABertConfig, FABertModel, **options)
    ids = text_inputs("AutoModel", lengths=(23, 23))["input_ids"]
    assert_chunks_change_nothing(model, {"input_ids": ids})
    positions = torch.arange(23).flip(0)[None] // 2
    assert_chunks_change_nothing(model, {"input_ids": ids, "position_ids": positions})
    embedded = torch.randn(2, 23, model.config.hidden_size, dtype=torch.float64)
    kept = embedded.clone()
    assert_chunks_change_nothing(model, {"inputs_embeds": embedded, "position_ids": positions.expand(2, -1)})
    assert torch.equal(embedded, kept)


@every_option
@pytest.mark.parametrize(("height", "width"), [(75, 43), (8, 70), (70, 8)], ids=str)
def test_masked_images_of_any_shape_give_what_they_give_at_once(options, height, width):
    model = build(FAViTConfig, FAViTModel, **options)
    inputs = image_inputs(height, width, batch=3)
    num_tokens = 1 + model.config.num_register_tokens + -(-height // 8) * -(-width // 8)
    inputs["attention_mask"] = (torch.rand(3, num_tokens) > 0.3).long()
    inputs["attention_mask"][2] = 0
    assert_chunks_change_nothing(model, inputs, chunk_sizes=(1, 13, 30))


@pytest.mark.parametrize(("config_class", "auto_class", "model_class"), [HEADS[0], HEADS[-3]], ids=["text", "image"])
def test_hidden_states_are_those_of_the_whole(config_class, auto_class, model_class):
    model = build(config_class, model_class, **ALL_OPTIONS).double()
    inputs = as_float64(inputs_of(model, auto_class))
    with torch.inference_mode():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        actual = model(**inputs, output_hidden_states=True, chunk_size=3).hidden_states
    assert len(actual) == len(expected) == 3
    for part, whole in zip(actual, expected, strict=True):
        torch.testing.assert_close(part, whole, **EXACT)


@every_option
@pytest.mark.parametrize("is_image", [False, True], ids=["text", "image"])
def test_float32_departs_by_less_than_a_hundred_thousandth_of_the_largest_value(options, is_image):
    if is_image:
        model, inputs = build(FAViTConfig, FAViTModel, **options), image_inputs(330, 201)
    else:
        options = {"position_embedding_type": "periodic", **options}
        model, inputs = build(FABertConfig, FABertModel, **options), text_inputs("AutoModel", lengths=(1501, 1203))
    expected = outputs_of(model, inputs)["last_hidden_state"]
    for chunk_size in (97, 641):
        difference = outputs_of(model, inputs, chunk_size=chunk_size)["last_hidden_state"] - expected
        error = (difference.abs().max() / expected.abs().max()).item()
        assert error <= 1e-5, f"{error:.1e} at {chunk_size}"


def test_what_padded_embeddings_hold_changes_nothing():
    model = build(FABertConfig, FABertModel, local_kernel_size=5)
    mask = torch.arange(40)[None] < torch.tensor([[40], [17]])
    embedded = torch.randn(2, 40, model.config.hidden_size)
    poisoned = embedded.masked_fill(~mask[:, :, None], torch.nan)
    clean, actual = (
        outputs_of(model, {"inputs_embeds": values, "attention_mask": mask}, chunk_size=7)
        for values in (embedded, poisoned)
    )
    torch.testing.assert_close(actual["last_hidden_state"][mask], clean["last_hidden_state"][mask], rtol=0, atol=0)


def test_bfloat16_autocast_rounds_as_at_once():
    model, inputs = build(FABertConfig, FABertModel, **ALL_OPTIONS), text_inputs("AutoModel", lengths=(61, 40))
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (outputs_of(model, inputs, chunk_size=size)["last_hidden_state"] for size in (None, 9))
    exact = outputs_of(model, inputs)["last_hidden_state"]
    assert actual.dtype == expected.dtype
    # Both round at the same places; a sum in another order may fall to the other side of a rounding boundary.
    assert (actual - exact).abs().max() <= 2 * (expected - exact).abs().max()


# Memory


def bytes_per_token(model, sizes: list[int], inputs_at, **options) -> float:
    """Growth of the peak from the first number of tokens to the second, over hidden states of the model's width."""
    peaks = []
    for size in sizes:
        inputs = inputs_at(size)
        with torch.inference_mode(), MemoryMeter() as meter:
            model(**inputs, **options)
        peaks.append(meter.peak_bytes)
    return (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) / (model.config.hidden_size * 4)


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 1.2), ({"local_kernel_size": 5, "local_window": 2}, 1.2), ({"softmax_layers": [1]}, 3.2)],
    ids=["plain", "local", "softmax layer"],
)
def test_text_takes_one_hidden_state_per_token_and_a_softmax_layer_two_more(options, limit):
    model = build(FABertConfig, FABertModel, position_embedding_type="periodic", **options)

    def inputs_at(size: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, size, dtype=torch.long)}

    # Position numbers are 8 of the 128 bytes of a hidden state; a mask of softmax layers would be more.
    assert bytes_per_token(model, [2048, 4096], inputs_at, chunk_size=128) <= limit
    assert bytes_per_token(model, [4096, 8192], inputs_at) > 5  # above one piece of inference


@pytest.mark.parametrize("options", [{}, {"local_kernel_size": 5, "local_window": 2}], ids=["plain", "local"])
def test_images_take_two_hidden_states_per_token(options):
    model = build(FAViTConfig, FAViTModel, **options)

    def inputs_at(size: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(1, 3, size // 16 * 8, 16 * 8)}

    assert bytes_per_token(model, [2048, 4096], inputs_at, chunk_size=128) <= 2.1
    assert bytes_per_token(model, [4096, 8192], inputs_at) > 5  # above one piece of inference


# Errors


@pytest.mark.parametrize("chunk_size", [0, -5, 2.0, True, "8"])
@pytest.mark.parametrize(("config_class", "auto_class", "model_class"), [HEADS[0], HEADS[-1]], ids=["text", "image"])
def test_a_chunk_size_that_is_no_number_of_tokens_is_an_error(config_class, auto_class, model_class, chunk_size):
    model = build(config_class, model_class)
    with torch.no_grad(), pytest.raises(ValueError, match="`chunk_size` must be a number of tokens"):
        model(**inputs_of(model, auto_class), chunk_size=chunk_size)


@pytest.mark.parametrize(("config_class", "auto_class", "model_class"), [HEADS[1], HEADS[-1]], ids=["text", "image"])
def test_chunks_with_gradients_are_an_error_that_says_what_to_do(config_class, auto_class, model_class):
    model = build(config_class, model_class)
    with pytest.raises(ValueError, match=r"torch.inference_mode.*gradient checkpointing"):
        model(**inputs_of(model, auto_class), chunk_size=4)


def test_chunks_of_a_packed_batch_are_an_error():
    model, ids = build(FABertConfig, FABertModel), torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match="`chunk_size` is for whole documents"):
        model(input_ids=ids, cu_seqlens=torch.tensor([0, 4, 9]), chunk_size=4)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_inputs_of_another_length_are_an_error_in_chunks_too(name):
    model, ids = build(FABertConfig, FABertModel), torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match=f"`{name}` must be"):
        model(input_ids=ids, **{name: torch.zeros(1, 11, dtype=torch.long)}, chunk_size=4)


def test_text_longer_than_the_table_of_positions_is_an_error_in_chunks_too():
    model = build(FABertConfig, FABertModel)
    with torch.no_grad(), pytest.raises(ValueError, match="max_position_embeddings"):
        model(input_ids=torch.ones(1, 65, dtype=torch.long), chunk_size=8)


# The streaming context


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["unmasked", "masked"])
def test_pieces_in_any_order_give_attention_over_the_whole(normalization, dtype, is_masked):
    num_positions = 2 * LARGEST_BLOCK + 77
    # Token-major, with logits that grow along the document, so that the running maximum moves in every piece.
    query, key, value = (torch.randn(3, num_positions, 2, 5) for _ in range(3))
    key = key + torch.linspace(-60, 60, num_positions)[:, None, None] * (normalization == "softmax")
    query, key, value = (tensor.to(dtype).transpose(1, 2) for tensor in (query, key, value))
    mask = None
    if is_masked:
        mask = torch.rand(3, num_positions) > 0.4
        mask[0, : LARGEST_BLOCK + 9] = False
        mask[2] = False
        key, value = (tensor.masked_fill(~mask[:, None, :, None], torch.nan) for tensor in (key, value))
    accumulator = ContextAccumulator(normalization)
    for piece in reversed(slices(0, num_positions, 400)):
        accumulator.add(key[:, :, piece], value[:, :, piece], None if mask is None else mask[:, piece])
    actual = apply_context(query, accumulator.context(), normalization)
    assert actual.dtype == dtype
    error = (actual.double() - attention(query, key, value, mask, normalization=normalization)).abs()
    budget = error_budget(query, key, value, mask, normalization=normalization)
    assert (error <= budget).all(), f"error {error.max():.1e} of a budget of {budget.max():.1e}"


def test_a_given_scale_takes_the_place_of_the_mean():
    key, value = torch.randn(2, 1, 2, 9, 4)
    accumulator = ContextAccumulator("scaling")
    accumulator.add(key, value)
    torch.testing.assert_close(accumulator.context(0.5), 0.5 * key.transpose(2, 3) @ value)
    torch.testing.assert_close(accumulator.context() * 9, accumulator.context(1.0))


def test_a_context_of_nothing_and_a_scaled_softmax_are_errors():
    accumulator = ContextAccumulator()
    with pytest.raises(ValueError, match="call `add` first"):
        accumulator.context()
    accumulator.add(*torch.randn(2, 1, 2, 9, 4))
    with pytest.raises(ValueError, match="`scale` applies to"):
        accumulator.context(0.5)


def test_no_temporary_of_the_context_grows_with_the_document():
    peaks = []
    for num_positions in (16 * LARGEST_BLOCK, 64 * LARGEST_BLOCK):
        query, key, value = (torch.randn(1, num_positions, 2, 8).transpose(1, 2) for _ in range(3))
        mask = torch.ones(1, num_positions, dtype=torch.bool)
        accumulator = ContextAccumulator()
        with torch.no_grad(), MemoryMeter() as meter:
            accumulator.add(key, value, mask)
            context = accumulator.context()
        peaks.append(meter.peak_bytes)
    assert peaks[0] == peaks[1]
    with torch.no_grad(), MemoryMeter() as meter:
        apply_context(query, context, "softmax")
    output_bytes = query.numel() * 4
    assert output_bytes < meter.peak_bytes <= 1.25 * output_bytes


def test_join_holds_one_piece_at_a_time():
    with MemoryMeter() as meter:
        joined = join((torch.full((1, 10, 4), float(index)) for index in range(50)), 500)
    assert torch.equal(joined[0, :, 0], torch.arange(50.0).repeat_interleave(10))
    assert meter.peak_bytes <= (500 + 2 * 10) * 4 * 4


def test_the_script_for_long_documents_ends_with_its_figures():
    script = SCRIPTS / "encode_long.py"
    command = [sys.executable, str(script), "--num_tokens", "3000", "--chunk_size", "512", "--num_threads", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout.splitlines()[-1])
    assert facts["num_tokens"] == 3000 and facts["peak_resident_gib"] >= facts["resident_before_gib"] > 0
