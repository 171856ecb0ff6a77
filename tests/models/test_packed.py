"""Packed batches below the models: operator, mixer and layouts against oracles that see one document at a time."""

from functools import partial

import pytest
import torch
from oracles import MemoryMeter, attention, error_budget
from tiny_models import EXACT, randomize, tiny_config
from torch import Tensor

import fa_transformers
from fa_transformers import factorized_attention
from fa_transformers.models import FABertConfig
from fa_transformers.models.fa_layout import Layout
from fa_transformers.models.fa_mixer import FactorizedMixer, SoftmaxMixer
from fa_transformers.models.fa_packed import TILE, PackedDocuments

# One token, less than a tile, a whole tile, one token more, none, several tiles; an empty one first or last.
LENGTHS = [(1,), (0, 1, TILE, 0), (3, 1, 0, TILE + 1, 5, 3 * TILE - 1), (1,) * 70, (TILE * 2,)]
both_normalizations = pytest.mark.parametrize("normalization", ["softmax", "scaling"])


@pytest.fixture(autouse=True, params=["blocked", "reference"])
def implementation(request, monkeypatch) -> str:
    """Every test of the operator here holds for each implementation that a CPU runs."""
    monkeypatch.setitem(
        globals(), "factorized_attention", partial(fa_transformers.factorized_attention, impl=request.param)
    )
    return request.param


many_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")


def running_total(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(dim=0)


def spans(lengths) -> list[slice]:
    ends = running_total(lengths).tolist()
    return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True) if start < end]


def make_inputs(num_tokens: int, dtype: torch.dtype = torch.float64, widths=(5, 5, 7)) -> list[Tensor]:
    """Query, key and value as a model makes them: heads are a transposed view of token-major memory."""
    shapes = [(1, num_tokens, 2, width) for width in widths]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    direction = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * direction).sum(), inputs)


@both_normalizations
@many_lengths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_document_equals_the_oracle_of_that_document_alone(normalization, lengths, dtype):
    inputs = make_inputs(sum(lengths), dtype)
    inputs[1] = inputs[1] + 50.0  # far from 0, where exponentials without the document's own maximum would overflow
    output = factorized_attention(*inputs, normalization=normalization, cu_seqlens=running_total(lengths))
    assert output.dtype == dtype and output.shape == inputs[2].shape
    for span in spans(lengths):
        alone = [tensor[:, :, span] for tensor in inputs]
        error = output[:, :, span].double() - attention(*alone, normalization=normalization)
        budget = error_budget(*alone, normalization=normalization)
        assert (error.abs() <= budget).all(), (error.abs() / budget).max()


@both_normalizations
@many_lengths
def test_gradients_equal_those_of_documents_alone(normalization, lengths):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(sum(lengths))]
    packed = factorized_attention(*inputs, normalization=normalization, cu_seqlens=running_total(lengths).int())
    parts = [[tensor[:, :, span] for tensor in inputs] for span in spans(lengths)]
    alone = torch.cat([factorized_attention(*part, normalization=normalization) for part in parts], dim=2)
    torch.testing.assert_close(packed, alone, **EXACT)
    for actual, expected in zip(gradients(packed, inputs), gradients(alone, inputs), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_second_gradients_equal_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(5, widths=(2, 2, 2))]
    total = running_total((2, 3))
    assert torch.autograd.gradgradcheck(
        lambda *tensors: factorized_attention(*tensors, cu_seqlens=total, impl="reference"), inputs
    )


def test_a_given_scale_holds_for_every_document():
    inputs = make_inputs(9)
    options = {"normalization": "scaling", "scale": -0.3}
    output = factorized_attention(*inputs, **options, cu_seqlens=running_total((4, 5)))
    expected = factorized_attention(*(tensor[:, :, 4:] for tensor in inputs), **options)
    torch.testing.assert_close(output[:, :, 4:], expected, **EXACT)


@both_normalizations
def test_what_a_document_holds_reaches_no_other_one(normalization):
    lengths = (TILE + 3, 5, 2 * TILE)
    inputs = make_inputs(sum(lengths))
    expected = factorized_attention(*inputs, normalization=normalization, cu_seqlens=running_total(lengths))
    span = spans(lengths)[1]
    for tensor in inputs:
        tensor[:, :, span] = float("nan")
    output = factorized_attention(*inputs, normalization=normalization, cu_seqlens=running_total(lengths))
    assert output[:, :, span].isnan().all()
    for other in (spans(lengths)[0], spans(lengths)[2]):
        assert torch.equal(output[:, :, other], expected[:, :, other])


def test_memory_grows_with_the_tokens_whatever_their_number_of_documents():
    peaks = {}
    for num_tokens, length in ((8192, 512), (16384, 512), (16384, 128), (16384, 16384)):
        inputs = make_inputs(num_tokens, torch.float32, widths=(32, 32, 32))
        total = running_total([length] * (num_tokens // length))
        with MemoryMeter() as meter:
            factorized_attention(*inputs, cu_seqlens=total)
        peaks[num_tokens, length] = meter.peak_bytes / inputs[0].nbytes
        print(f"{num_tokens} tokens in documents of {length}: {peaks[num_tokens, length]:.1f} times the query")
    # At once: weights, values, keys and queries in tiles, the output twice, and the contexts, S/D = 1/2 of the query
    # for tiles and less for documents; a tile more for every document adds TILE / length of each.
    assert all(peak < 8 * (1 + TILE / length) for (_, length), peak in peaks.items())
    assert peaks[16384, 512] == pytest.approx(peaks[8192, 512], rel=0.02)


@pytest.mark.parametrize("normalization", ["softmax", pytest.param("scaling", marks=pytest.mark.slow)])
def test_one_graph_serves_packed_batches_of_several_sizes(normalization):
    torch.compiler.reset()
    compiled = torch.compile(factorized_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    stances = ("default", "fail_on_recompile", "fail_on_recompile")
    for lengths, stance in zip([(40, 3, 70), (5, 9, 0, 200), (64, 64, 1, 33, 6)], stances, strict=True):
        inputs = [tensor.requires_grad_() for tensor in make_inputs(sum(lengths))]
        options = {"normalization": normalization, "cu_seqlens": running_total(lengths)}
        with torch.compiler.set_stance(stance):
            actual = compiled(*inputs, **options)
        expected = factorized_attention(*inputs, **options)
        torch.testing.assert_close(actual, expected, **EXACT)
        for one, other in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(one, other, **EXACT)


@both_normalizations
@pytest.mark.parametrize("is_softmax", [False, True], ids=["factorized", "softmax"])
@pytest.mark.parametrize("lengths", [(9, 1, 0, 2, 70, 1, 1, 4)], ids=["8 documents"])
def test_no_term_of_a_mixer_crosses_a_documents_end(normalization, is_softmax, lengths):
    options = {
        "key_feature_size": 21,
        "local_kernel_size": 7,
        "local_window": 3,
        "attention_normalization": normalization,
    }
    config = tiny_config(FABertConfig, **options)
    mixer = SoftmaxMixer(config) if is_softmax else randomize(FactorizedMixer(config, spatial_rank=1).double())
    inputs = [tensor.requires_grad_() for tensor in make_inputs(sum(lengths), widths=(16, 16, 16))]
    everything = [*inputs, *mixer.parameters()]
    packed = mixer(*inputs, Layout(documents=PackedDocuments(running_total(lengths), sum(lengths))))
    alone = torch.cat([mixer(*(tensor[:, :, span] for tensor in inputs)) for span in spans(lengths)], dim=2)
    torch.testing.assert_close(packed, alone, **EXACT)
    for actual, expected in zip(gradients(packed, everything), gradients(alone, everything), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize(("normalization", "scale"), [("softmax", None), ("scaling", None), ("scaling", 0.3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_tokens_are_no_keys_of_their_document(normalization, scale, dtype):
    """One document has holes in several tiles, one no real token, one a single one."""
    lengths = (2 * TILE + 3, 5, 7, 0, 1)
    query, key, value = make_inputs(sum(lengths), dtype)
    mask = torch.rand(1, sum(lengths)) > 0.4
    mask[0, 2 * TILE + 3 : 2 * TILE + 8] = False
    mask[0, -8:-1] = torch.arange(7) == 3
    options = {"normalization": normalization, "scale": scale}
    output = factorized_attention(query, key, value, mask, cu_seqlens=running_total(lengths), **options)
    for span in spans(lengths):
        parts = [tensor[:, :, span] for tensor in (query, key, value)]
        expected = attention(*parts, mask[:, span], **options)
        # Values that carry the number of real tokens are rounded once more.
        size = attention(*(part.abs() for part in parts), mask[:, span], **options)
        budget = error_budget(*parts, mask[:, span], **options) + torch.finfo(dtype).eps / 2 * size
        assert ((output[:, :, span].double() - expected).abs() <= budget).all()
    hidden = ~mask[:, None, :, None]
    junk = [tensor.masked_fill(hidden, torch.nan) for tensor in (key, value)]
    assert torch.equal(factorized_attention(query, *junk, mask, cu_seqlens=running_total(lengths), **options), output)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (torch.tensor([0.0, 9.0]), "must be int32 or int64"),
        (torch.tensor([[0, 9]]), "must be int32 or int64"),
        (torch.tensor([0]), "at least one document"),
        (torch.tensor([0, 4]), "number of tokens, 9, .* got .0, 4.: it is the running total"),
        (torch.tensor([1, 9]), "must rise from 0"),
        (torch.tensor([0, 6, 5, 9]), "without falling"),
        (torch.tensor([0, 9], device="meta"), "`cu_seqlens` is on meta but the tokens are on cpu"),
        (PackedDocuments(torch.tensor([0, 4]), 4), "`cu_seqlens` is of 4 tokens, the batch has 9"),
    ],
)
def test_a_total_that_does_not_fit_is_an_error_that_says_so(total, message):
    with pytest.raises(ValueError, match=message):
        factorized_attention(*make_inputs(9), cu_seqlens=total)


def test_what_a_packed_batch_cannot_have_is_an_error():
    query, key, value = make_inputs(9)
    total = torch.tensor([0, 9])
    with pytest.raises(ValueError, match="`key` must have the 8 positions of `query`, got 9"):
        factorized_attention(query[:, :, :8], key, value, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="one row that holds all documents, got 2"):
        factorized_attention(*(tensor.expand(2, -1, -1, -1) for tensor in (query, key, value)), cu_seqlens=total)
