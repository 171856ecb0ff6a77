"""Rows, columns and rollouts equal those of the dense N×N matrix, for every option of a layer and every kind of batch.

The matrices are built from the definitions in float64 (`dense_attention.py`). Chunks are of nine tokens here, so that
every document has seams.
"""

import fuzz
import pytest
import torch
from dense_attention import dense_matrices, dense_rollout
from oracles import MemoryMeter
from tiny_models import OPTION_SETS, VOCAB_SIZE, build, image_inputs, text_inputs

from fa_transformers import attention_received, attention_rows, context_maps, effective_support, rollout
from fa_transformers.explain import encoder, implied
from fa_transformers.explain.attention import leading_context_maps
from fa_transformers.models import (
    FABertConfig,
    FABertForMultipleChoice,
    FABertModel,
    FAViTConfig,
    FAViTModel,
)

ROWS, ROLLOUT, EXACT = 1e-6, 1e-5, 1e-12
OPTIONS = [name for name in OPTION_SETS if name != "every stage"]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    for module in (encoder, implied):
        monkeypatch.setattr(module, "CHUNK_SIZE", 9)
    monkeypatch.setattr(implied, "LARGEST_SCORES", 2000)


def assert_near(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected, rtol=0.0, atol=tolerance)


def first_and_mean(real: torch.Tensor, num_prefix: int = 0) -> dict:
    """The weights that a rollout starts from, [B, N] each, where a sample is a document."""
    first, counted = torch.zeros(real.shape), real.double()
    for sample, marks in enumerate(real):
        if num_prefix or marks.any():
            first[sample, 0 if num_prefix else int(marks.nonzero()[0])] = 1.0
    counted[:, :num_prefix] = 0.0
    return {0: first, "mean": counted / counted.sum(dim=1, keepdim=True).clamp(min=1)}


def check_all(model, inputs, starts, tolerances=(EXACT, EXACT)):
    """Hold everything against the dense matrices; `starts` are the rollouts' first weights by target."""
    matrices = dense_matrices(model, inputs)
    num_tokens = matrices[0].shape[2]
    rows = attention_rows(model, inputs, range(num_tokens))
    for actual, expected in zip(rows, matrices, strict=True):
        assert_near(actual, expected, tolerances[0])
        assert not actual[expected == 0].any()
    for target, start in starts.items():
        assert_near(rollout(model, inputs, target), dense_rollout(matrices, start), tolerances[1])
    return rows, matrices


def text(lengths=(23, 17, 1), **options):
    return build(FABertConfig, FABertModel, **options), text_inputs("AutoModel", lengths)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", ["right", "left"])
def test_text_equals_the_dense_matrix(options, batch):
    model, inputs = text(**OPTION_SETS[options])
    if batch == "right":
        inputs["attention_mask"][2] = 0  # of padding alone
    else:
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
        inputs["attention_mask"][:2, [9, 10, 15]] = 0
    real = inputs["attention_mask"].bool()
    rows, _ = check_all(model.double(), inputs, first_and_mean(real))
    if OPTION_SETS[options].get("attention_normalization") != "scaling":
        for layer in rows:
            sums = real[:, None].double().expand(layer.shape[:3])
            torch.testing.assert_close(layer.sum(dim=3), sums, rtol=0.0, atol=EXACT)
            assert (layer >= 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_documents_equal_the_dense_matrix(options):
    model, inputs = text((40,), **OPTION_SETS[options])
    bounds = torch.tensor([0, 7, 7, 8, 30, 40])
    real = torch.ones(1, 40, dtype=torch.bool)
    real[0, [0, 12, 13]] = False
    packed = {"input_ids": inputs["input_ids"], "cu_seqlens": bounds, "attention_mask": real}
    starts = {target: torch.zeros(1, 40, dtype=torch.float64) for target in (0, "mean")}
    starts[0][0, [1, 7, 8, 30]] = 1.0
    for start, stop in ((0, 7), (7, 8), (8, 30), (30, 40)):
        starts["mean"][0, start:stop] = real[0, start:stop].double() / real[0, start:stop].sum()
    check_all(model.double(), packed, starts)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("has_holes", [False, True])
def test_images_equal_the_dense_matrix(options, has_holes):
    model = build(FAViTConfig, FAViTModel, **{"num_register_tokens": 2, **OPTION_SETS[options]}).double()
    inputs = image_inputs(70, 43)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    num_prefix = 1 + model.config.num_register_tokens
    real = torch.ones(2, num_prefix + 9 * 6, dtype=torch.bool)
    if has_holes:
        real[:, num_prefix + 4 :: 7] = False
        inputs["attention_mask"] = real
    check_all(model, inputs, first_and_mean(real, num_prefix))


@pytest.mark.parametrize("index", range(20))
def test_drawn_models_and_batches_equal_the_dense_matrix(index):
    case = {**fuzz.draw(17, index), "dtype": "float64"}
    subject = fuzz.Subject(case)
    inputs, real = subject.text_batch() if subject.is_text else subject.image_batch()
    num_prefix = 0 if subject.is_text else subject.num_prefix
    # Scores grow with depth and temperature: what rows are off by grows with them, and so does what they are.
    check_all(subject.model, inputs, first_and_mean(real, num_prefix), (1e-10, 1e-10))


@pytest.mark.parametrize("options", ["plain", "all"])
def test_float32_at_512_tokens_equals_the_dense_matrix(options, monkeypatch):
    for module in (encoder, implied):
        monkeypatch.setattr(module, "CHUNK_SIZE", 200)
    monkeypatch.setattr(implied, "LARGEST_SCORES", 2**20)
    model, inputs = text((512, 301), **OPTION_SETS[options], max_position_embeddings=512)
    matrices = dense_matrices(model, inputs)
    positions = [0, 300, 511]
    for actual, expected in zip(attention_rows(model, inputs, positions), matrices, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, expected[:, :, positions], ROWS)
    for target, start in first_and_mean(inputs["attention_mask"].bool()).items():
        assert_near(rollout(model, inputs, target), dense_rollout(matrices, start), ROLLOUT)


@pytest.mark.parametrize(("num_layers", "room"), [(1, 2), (3, 2), (5, 2), (5, 3)])
def test_more_layers_than_states_are_kept_give_the_same_rollout(num_layers, room, monkeypatch):
    monkeypatch.setattr(encoder, "KEPT_STATES", room)
    model, inputs = text(num_hidden_layers=num_layers, local_window=2)
    model.double()
    start = first_and_mean(inputs["attention_mask"].bool())[0]
    assert_near(rollout(model, inputs, residual=0.2), dense_rollout(dense_matrices(model, inputs), start, 0.2), EXACT)


def test_attention_received_is_the_mean_row():
    model, inputs = text(**OPTION_SETS["all"])
    real = inputs["attention_mask"].double()
    mean = real / real.sum(dim=1, keepdim=True)
    for actual, matrix in zip(attention_received(model, inputs), dense_matrices(model, inputs), strict=True):
        assert_near(actual, torch.einsum("bi,bhij->bhj", mean, matrix), ROWS)


def test_context_maps_are_columns_of_the_keys_softmax():
    model, inputs = text(**{**OPTION_SETS["all"], "softmax_layers": [0]})
    keys = []
    mixer = model.encoder.layer[1].attention_and_norm[0].mixer
    mixer.register_forward_hook(lambda mixer, arguments, output: keys.append(mixer.key_features(arguments[1])))
    with torch.no_grad():
        model(**inputs)
    padding = ~inputs["attention_mask"].bool()[:, None, :, None]
    expected = keys[0].double().masked_fill(padding, -torch.inf).softmax(dim=2).transpose(2, 3)
    maps = context_maps(model, inputs)
    assert list(maps) == [1] and maps[1].shape == (3, 2, 37, 23)
    assert_near(maps[1], expected, ROWS)


@pytest.mark.parametrize("target", [0, "mean"])
def test_leading_context_maps_add_up_to_the_row_of_attention(target):
    model = build(FABertConfig, FABertModel).double()
    inputs = {name: value[:1] for name, value in text_inputs("AutoModel", (23, 17)).items()}
    starts = first_and_mean(inputs["attention_mask"].bool())
    all_maps = context_maps(model, inputs)
    leading = leading_context_maps(model, inputs, target, number=100)
    for (index, (shares, maps)), matrix in zip(leading.items(), dense_matrices(model, inputs), strict=True):
        expected = torch.einsum("bi,bhij->bhj", starts[target].double(), matrix)
        assert_near(torch.einsum("bhf,bhfn->bhn", shares, maps), expected, EXACT)
        assert maps.shape == all_maps[index].shape and not (shares.diff(dim=2) > 0).any()
    first = leading_context_maps(model, inputs, target, number=2)[0]
    assert torch.equal(first[0], leading[0][0][..., :2]) and torch.equal(first[1], leading[0][1][:, :, :2])
    with pytest.raises(ValueError, match="`number` must be at least 1"):
        leading_context_maps(model, inputs, target, number=0)


def test_effective_support_counts_tokens():
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(effective_support(rows), torch.tensor([4.0, 1.0, 2.0, 0.0]))
    with pytest.raises(ValueError, match="`rows`"):
        effective_support(-rows)


def test_every_choice_is_a_document():
    model = build(FABertConfig, FABertForMultipleChoice)
    inputs = text_inputs("AutoModelForMultipleChoice")
    assert attention_rows(model, inputs, [0])[0].shape == (2 * 3, 2, 1, 11)
    assert rollout(model, inputs).shape == (2 * 3, 11)


def test_a_models_mode_forward_and_hidden_chunks_change_nothing():
    model, inputs = text(hidden_dropout_prob=0.5)
    expected = rollout(model, inputs)
    model.train()
    with torch.inference_mode():
        torch.testing.assert_close(rollout(model, {**inputs, "chunk_size": 3}), expected)
    assert model.training and "forward" not in vars(model.encoder)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_window_takes_the_padding_of_no_number():
    """What padding holds, NaN included, changes nothing, also where the model embeds it chunk by chunk."""
    model, inputs = text(**OPTION_SETS["local"])
    embeddings = torch.randn(3, 23, 32)
    padding = ~inputs["attention_mask"].bool()[:, :, None]
    results = [
        rollout(
            model,
            {
                "inputs_embeds": embeddings.masked_fill(padding, filler),
                "attention_mask": inputs["attention_mask"],
                "chunk_size": 4,
            },
        )
        for filler in (0.0, torch.nan)
    ]
    assert torch.equal(*results) and results[0].isfinite().all()


def test_memory_grows_with_the_number_of_tokens_and_not_with_its_square(monkeypatch):
    for module in (encoder, implied):
        monkeypatch.setattr(module, "CHUNK_SIZE", 128)
    model = build(FABertConfig, FABertModel, position_embedding_type="none", local_window=4, local_kernel_size=3)
    peaks = []
    for length in (512, 1024):
        inputs = {"input_ids": torch.randint(VOCAB_SIZE, (1, length))}
        with MemoryMeter() as meter:
            rollout(model, inputs)
        assert meter.largest_numel < length * length // 4
        peaks.append(meter.peak_bytes)
    assert peaks[1] < 2.1 * peaks[0]


def test_memory_does_not_grow_with_the_layers_above_the_states_that_are_kept(monkeypatch):
    for module in (encoder, implied):
        monkeypatch.setattr(module, "CHUNK_SIZE", 128)
    monkeypatch.setattr(encoder, "KEPT_STATES", 3)
    peaks = []
    for num_layers in (3, 4, 7):
        sizes = {"position_embedding_type": "none", "num_hidden_layers": num_layers}
        model = build(FABertConfig, FABertModel, **sizes)
        with MemoryMeter() as meter:
            rollout(model, {"input_ids": torch.randint(VOCAB_SIZE, (1, 1024))})
        peaks.append(meter.peak_bytes)
    assert max(peaks) < 1.02 * peaks[0]


def test_the_layers_run_as_seldom_as_the_room_allows():
    runs = {(layers, room): encoder.plan_runs(layers, room)[0] for layers, room in [(6, 6), (7, 6), (12, 6), (5, 2)]}
    assert runs == {(6, 6): 5, (7, 6): 7, (12, 6): 17, (5, 2): 10}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_distributions_in_float32(dtype):
    model, inputs = text(**OPTION_SETS["all"])
    for rows in attention_rows(model.to(dtype), inputs, [0, 9]):
        assert rows.dtype == torch.float32 and (rows >= 0).all()
        torch.testing.assert_close(rows[:2].sum(dim=3), torch.ones(2, 2, 2), rtol=0.0, atol=ROWS)


ERRORS = {
    "`positions` must lie between 0 and 22": lambda model, inputs: attention_rows(model, inputs, [0, 23]),
    "`positions` must be a list": lambda model, inputs: attention_rows(model, inputs, [0.5]),
    "`positions` must have at least": lambda model, inputs: attention_rows(model, inputs, []),
    "`positions` must have": lambda model, inputs: attention_rows(model, inputs, torch.zeros(0, dtype=torch.long)),
    "`target` 23 is not": lambda model, inputs: rollout(model, inputs, 23),
    "`target` 20 is not": lambda model, inputs: rollout(model, inputs, 20),
    "`target` must be": lambda model, inputs: rollout(model, inputs, "first"),
    "`residual`": lambda model, inputs: rollout(model, inputs, residual=1.5),
    "Give either `input_ids`": lambda model, inputs: rollout(model, {}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message](*text())


def test_a_model_without_an_encoder_of_ours_is_refused():
    with pytest.raises(TypeError, match="`model` must have one FABert or FAViT encoder, Linear has 0"):
        rollout(torch.nn.Linear(2, 2), {})
