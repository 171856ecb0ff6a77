"""Masks of every kind: holes inside documents against a dense oracle, and what numbers a mask may hold."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    ALL_OPTIONS,
    EXACT,
    HEADS,
    OPTION_SETS,
    as_float64,
    build,
    image_inputs,
    inputs_of,
    outputs_of,
    randomize,
    text_inputs,
)
from torch import Tensor

from fa_transformers import FactorizedAttentionBlock
from fa_transformers.models import (
    FABertConfig,
    FABertForQuestionAnswering,
    FABertModel,
    FAViTConfig,
    FAViTForMaskedImageModeling,
    FAViTModel,
)
from fa_transformers.models.fa_layout import Layout
from fa_transformers.models.fa_mixer import FactorizedMixer, SoftmaxMixer
from fa_transformers.models.fa_packed import PackedDocuments

TEXT_OPTIONS = [name for name in OPTION_SETS if name != "every stage"]
LENGTHS = (20, 1, 9, 4)
# Of four documents: holes inside, a single token, padding on both sides of a hole, nothing real at all.
MASKS = ([1] * 6 + [0] * 3 + [1, 0] * 5 + [1], [1], [0, 0, 1, 0, 0, 1, 1, 0, 0], [0] * 4)
every_option = pytest.mark.parametrize("options", TEXT_OPTIONS)


def dense(mixer, query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
    """What a mixer gives one document, [H, n, D] each, by matrices over all pairs of its tokens: [H, n, D]."""
    place = torch.arange(len(real))
    distance = (place[:, None] - place).abs()
    if isinstance(mixer, SoftmaxMixer):
        return softmax_over(query, key, real.expand(len(real), -1)) @ value
    queries, keys = mixer.query_features(query[None])[0], mixer.key_features(key[None])[0]
    if mixer.normalization == "softmax":
        positions = torch.where(real[:, None], keys, -torch.inf).softmax(dim=1).nan_to_num()
        matrix = queries.softmax(dim=2) @ positions.mT
    else:
        matrix = queries @ keys.mT * real / max(1, int(real.sum()))
    mixed = matrix @ value
    if mixer.window_gate is not None:
        gate = mixer.window_gate.sigmoid()[:, None, None]
        mixed = mixed * (1 - gate) + gate * softmax_over(query, key, (distance <= mixer.window) & real) @ value
    if mixer.local_convolution is not None:
        kernel = mixer.local_convolution.weight[:, 0].unflatten(0, (len(value), -1))  # [H, D, size]
        reach = kernel.shape[2] // 2
        for offset in range(-reach, reach + 1):
            is_read = (place - place[:, None] == offset) & real
            mixed = mixed + is_read.to(value.dtype) @ value * kernel[:, None, :, offset + reach]
    return mixed


def softmax_over(query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
    """The weights of ordinary attention, zero in a row that may read nothing: [H, n, n]."""
    scores = query @ key.mT / query.shape[2] ** 0.5
    return torch.where(allowed, scores, -torch.inf).softmax(dim=2).nan_to_num()


def dense_forward(mixer, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    lengths = [query.shape[2]] if layout.documents is None else layout.documents.lengths.tolist()
    rows = []
    for row, real in zip(zip(query, key, value, strict=True), layout.mask, strict=True):
        parts = zip(*(tensor.split(lengths, dim=1) for tensor in row), real.split(lengths), strict=True)
        rows.append(torch.cat([dense(mixer, *part) for part in parts], dim=1))
    return torch.stack(rows)


def holed(is_packed: bool) -> dict[str, Tensor]:
    """The four documents with their masks, in a row each or in one row."""
    ids = text_inputs("AutoModel", lengths=(sum(LENGTHS),))["input_ids"]
    mask = torch.tensor(sum(MASKS, [])).bool()[None]
    if is_packed:
        return {"input_ids": ids, "attention_mask": mask, "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(dim=0)}
    rows = [
        torch.nn.utils.rnn.pad_sequence(tensor[0].split(LENGTHS), batch_first=True) for tensor in (ids, mask.long())
    ]
    return {"input_ids": rows[0], "attention_mask": rows[1].bool()}


def run_with_gradients(model, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    output = model(**inputs)
    tokens = output.last_hidden_state[inputs["attention_mask"]]
    loss = (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum() + output.pooler_output.pow(2).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return tokens, output.pooler_output, list(found)


@every_option
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_documents_with_holes_equal_the_dense_oracle_with_their_gradients(options, is_packed, monkeypatch):
    model = build(FABertConfig, FABertModel, **OPTION_SETS[options]).double()
    inputs = holed(is_packed)
    actual = run_with_gradients(model, inputs)
    for mixer in (FactorizedMixer, SoftmaxMixer):
        monkeypatch.setattr(mixer, "forward", dense_forward)
    expected = run_with_gradients(model, inputs)
    # Where no token is real, what is pooled is not defined; packed it is zeros.
    torch.testing.assert_close(actual[0], expected[0], **EXACT)
    torch.testing.assert_close(actual[1][:3], expected[1][:3], **EXACT)
    if is_packed:
        for one, other in zip(actual[2], expected[2], strict=True):
            torch.testing.assert_close(one, other, rtol=2.0**-40, atol=2.0**-30)


@every_option
def test_a_document_with_holes_is_the_same_packed_padded_alone_and_in_chunks(options):
    model = build(FABertConfig, FABertModel, **OPTION_SETS[options]).double()
    inputs = holed(False)
    expected = outputs_of(model, inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    other_ids = ids.where(mask, 59 - ids)
    variants = {
        "other tokens in holes": outputs_of(model, {**inputs, "input_ids": other_ids}),
        "chunks": outputs_of(model, inputs, chunk_size=5),
        "more padding": outputs_of(model, {name: F.pad(part, (7, 3)) for name, part in inputs.items()}),
        "packed": outputs_of(model, holed(True)),
    }
    for name, output in variants.items():
        tokens = output["last_hidden_state"]
        tokens = tokens[:, 7:-3] if name == "more padding" else tokens
        tokens = tokens[holed(True)["attention_mask"]] if name == "packed" else tokens[mask]
        torch.testing.assert_close(tokens, expected["last_hidden_state"][mask], **EXACT)
        torch.testing.assert_close(output["pooler_output"][:3], expected["pooler_output"][:3], **EXACT)
    for row in range(3):
        alone = outputs_of(model, {name: part[row : row + 1] for name, part in inputs.items()})
        torch.testing.assert_close(
            alone["last_hidden_state"][0][mask[row]], expected["last_hidden_state"][row][mask[row]], **EXACT
        )


@pytest.mark.parametrize("kind", ["absolute", "periodic"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_positions_go_on_counting_over_holes_and_start_at_the_first_real_token(kind, is_packed):
    model = build(FABertConfig, FABertModel, position_embedding_type=kind, max_position_embeddings=20).double()
    inputs = holed(is_packed)
    counted = torch.tensor([*range(20), 0, 0, 0, 0, 1, 2, 3, 4, 4, 4, *[0] * 4])
    mask = inputs["attention_mask"]
    positions = counted[None]
    if not is_packed:
        positions = torch.nn.utils.rnn.pad_sequence(counted.split(LENGTHS), batch_first=True)
    expected = outputs_of(model, {**inputs, "position_ids": positions})["last_hidden_state"]
    torch.testing.assert_close(outputs_of(model, inputs)["last_hidden_state"][mask], expected[mask], **EXACT)
    if kind == "absolute":
        short = build(FABertConfig, FABertModel, max_position_embeddings=19)
        with pytest.raises(ValueError, match="The document has 20 tokens but the position table has 19 rows"):
            short(**inputs)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_packed_documents_pool_their_real_tokens(pooling):
    inputs = holed(True)
    documents = PackedDocuments(inputs["cu_seqlens"], sum(LENGTHS))
    states = torch.randn(1, sum(LENGTHS), 8, dtype=torch.float64)
    read = documents.first_tokens if pooling == "cls" else documents.mean
    for index, (own, mask) in enumerate(zip(states[0].split(LENGTHS), MASKS, strict=True)):
        real = own[torch.tensor(mask).bool()]
        expected = torch.zeros(8).double() if not len(real) else real[0] if pooling == "cls" else real.mean(dim=0)
        torch.testing.assert_close(read(states, inputs["attention_mask"])[index], expected, **EXACT)


def test_an_answer_is_never_a_masked_token():
    model = build(FABertConfig, FABertForQuestionAnswering, **ALL_OPTIONS).double()
    inputs = holed(True)
    output = model(**inputs, start_positions=torch.tensor([0, 0, 2, 0]), end_positions=torch.tensor([9, 0, 5, 0]))
    masked = ~inputs["attention_mask"]
    assert (output.start_logits[masked] == torch.finfo(torch.float64).min).all()
    kept = {name: inputs[name][:, :30] for name in ("input_ids", "attention_mask")}
    without = model(
        **kept,
        cu_seqlens=inputs["cu_seqlens"][:4],
        start_positions=torch.tensor([0, 0, 2]),
        end_positions=torch.tensor([9, 0, 5]),
    )
    assert torch.isfinite(without.loss) and torch.equal(without.start_logits, output.start_logits[:, :30])


# What numbers a mask may hold


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS, ids=[head[2].__name__ for head in HEADS])
def test_floating_point_zeros_and_ones_are_taken_as_integers(config_class, auto_class, model_class, dtype):
    model = build(config_class, model_class, **ALL_OPTIONS)
    inputs = inputs_of(model, auto_class)
    if "attention_mask" not in inputs:
        inputs["attention_mask"] = torch.ones(2, 1 + 5 * 3, dtype=torch.long)
        inputs["attention_mask"][1, 4:9] = 0
    mask = inputs["attention_mask"]
    expected = outputs_of(model, inputs)
    for chunk_size in (None, 4):
        given = outputs_of(model, {**inputs, "attention_mask": mask.to(dtype)}, chunk_size=chunk_size)
        whole = expected if chunk_size is None else outputs_of(model, inputs, chunk_size=chunk_size)
        assert all(torch.equal(value, whole[name]) for name, value in given.items())


@pytest.mark.parametrize("value", [0.5, -1.0, torch.nan, -torch.inf, torch.finfo(torch.float32).min, 1e-45], ids=str)
def test_other_numbers_are_refused_with_what_to_pass(value):
    mask = torch.ones(2, 16)
    mask[1, 5] = value
    square = torch.ones(2, 4, 4).masked_fill(torch.arange(16).view(4, 4) == 5, value)
    pixels = torch.zeros(2, 3, 32, 32)
    masked = build(FAViTConfig, FAViTForMaskedImageModeling)
    attempts = {
        "attention_mask": [
            lambda: build(FABertConfig, FABertModel)(torch.ones(2, 16, dtype=torch.long), attention_mask=mask),
            lambda: build(FAViTConfig, FAViTModel)(torch.zeros(2, 3, 24, 40), attention_mask=mask),
        ],
        "mask": [lambda: FactorizedAttentionBlock(3, 4, 4)(torch.zeros(2, 3, 4, 4), square)],
        "bool_masked_pos": [lambda: masked(pixels, bool_masked_pos=mask)],
    }
    for name, calls in attempts.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"`{name}` must hold 1 .* 0 elsewhere, got .*float32.*pass the"):
                call()


def test_a_block_takes_any_mask_of_zeros_and_ones():
    block = randomize(FactorizedAttentionBlock(3, 4, 4))
    pixels, mask = torch.randn(2, 3, 5, 4), torch.arange(40).view(2, 5, 4) % 3 != 0
    for dtype in (torch.long, torch.uint8, torch.float32, torch.float16):
        assert torch.equal(block(pixels, mask.to(dtype)), block(pixels, mask))


def test_values_are_not_read_in_graphs_nor_of_masks_that_need_no_look():
    """On a device without data a look would be an error: bool and integer masks have none on the way to the layers."""
    model = build(FAViTConfig, FAViTModel, local_window=2, local_kernel_size=3).to("meta")
    pixels = as_float64(image_inputs(16, 16))["pixel_values"].float().to("meta")
    for dtype in (torch.bool, torch.long, torch.float32):
        mask = torch.ones(2, 5, dtype=dtype, device="meta")
        assert model(pixels, attention_mask=mask).last_hidden_state.shape == (2, 5, 32)
