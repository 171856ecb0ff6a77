"""The token mixer's parts against oracles that loop over positions: feature maps, convolution, window, gate, prefix.

Oracles build every neighbourhood from coordinates, in float64; the mixer cuts tiles and pads.
"""

import itertools
import math

import pytest
import torch
from oracles import MemoryMeter, attention
from tiny_models import EXACT, randomize, tiny_config
from torch import Tensor, nn

from fa_transformers.models import FABertConfig, FAViTConfig, factorized_attention
from fa_transformers.models.fa_layout import Layout
from fa_transformers.models.fa_local import LocalConvolution, window_attention
from fa_transformers.models.fa_mixer import (
    FEATURE_NOISE,
    FactorizedMixer,
    FeatureMap,
    SoftmaxMixer,
    build_mixer,
)

GRIDS = [(1,), (2,), (15,), (63,), (65,), (1, 1), (5, 7), (13, 4), (1, 20), (9, 17)]


def tensors(*shape: int, count: int = 3) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def window_oracle(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """Softmax attention of each real position over the real ones whose coordinates differ by `window` at most."""
    batch, heads, *grid, width = query.shape
    output = torch.zeros_like(value)
    positions = list(itertools.product(*map(range, grid)))
    for sample in range(batch):
        real = [position for position in positions if mask is None or mask[(sample, *position)]]
        for position in real:
            near = [other for other in real if max(abs(a - b) for a, b in zip(position, other, strict=True)) <= window]
            keys = torch.stack([key[(sample, slice(None), *other)] for other in near], dim=1)
            values = torch.stack([value[(sample, slice(None), *other)] for other in near], dim=1)
            scores = (keys @ query[(sample, slice(None), *position)][:, :, None])[..., 0] / math.sqrt(width)
            mixed = (scores.softmax(dim=1)[:, :, None] * values).sum(dim=1)
            index = torch.zeros_like(output)
            index[(sample, slice(None), *position)] = 1.0
            output = output + index * mixed.view(1, heads, *[1] * len(grid), -1)
    return output


def convolution_oracle(value: Tensor, weight: Tensor) -> Tensor:
    """Cross-correlation of each channel with its own kernel, zeros outside the grid."""
    batch, heads, *grid, width = value.shape
    output = torch.zeros_like(value)
    reach = weight.shape[-1] // 2
    kernels = weight.view(heads, width, *weight.shape[2:])
    for position in itertools.product(*map(range, grid)):
        for offset in itertools.product(*[range(-reach, reach + 1)] * len(grid)):
            neighbour = tuple(p + o for p, o in zip(position, offset, strict=True))
            if all(0 <= n < size for n, size in zip(neighbour, grid, strict=True)):
                kernel = kernels[(..., *(o + reach for o in offset))]
                target = (slice(None), slice(None), *position)
                output[target] += kernel * value[(slice(None), slice(None), *neighbour)].detach()
    return output


def some_mask(*shape: int) -> Tensor:
    mask = torch.rand(*shape) > 0.3
    mask[0].view(-1)[0] = True
    return mask


@pytest.mark.parametrize("window", [1, 3, 20])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "unmasked"])
def test_window_equals_the_oracle_with_its_gradients(grid, window, is_masked):
    query, key, value = tensors(2, 2, *grid, 4)
    mask = some_mask(2, *grid) if is_masked else None
    real = torch.ones(2, 1, *grid, 1) if mask is None else mask[:, None, ..., None]
    actual = window_attention(query, key, value * real, mask, window) * real
    expected = window_oracle(query, key, value, mask, window)
    torch.testing.assert_close(actual, expected, **EXACT)
    direction = torch.randn_like(actual)
    gradients = torch.autograd.grad((actual * direction).sum(), (query, key, value))
    oracle_gradients = torch.autograd.grad((expected * direction).sum(), (query, key, value))
    for gradient, oracle_gradient in zip(gradients, oracle_gradients, strict=True):
        torch.testing.assert_close(gradient, oracle_gradient, **EXACT)


def test_window_as_wide_as_the_text_is_ordinary_attention():
    query, key, value = tensors(2, 2, 40, 8)
    expected = (query @ key.transpose(2, 3) / math.sqrt(8)).softmax(dim=3) @ value
    torch.testing.assert_close(window_attention(query, key, value, None, 40), expected, **EXACT)


def test_window_without_any_real_neighbour_is_zero_and_has_finite_gradients():
    query, key, value = tensors(1, 1, 20, 4)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    output = window_attention(query, key, value * 0.0, mask, 2)
    output.sum().backward()
    assert (output == 0).all() and all(tensor.grad.isfinite().all() for tensor in (query, key, value))


@pytest.mark.parametrize("shape", [(512,), (64, 64)], ids=["text", "image"])
def test_window_memory_grows_linearly_and_no_square_tensor_is_made(shape):
    peaks, largest = [], []
    for doubling in (1, 2, 4):
        grid = (shape[0] * doubling, *shape[1:])
        query, key, value = torch.randn(3, 1, 2, *grid, 8)
        with MemoryMeter() as meter:
            window_attention(query, key, value, None, 3)
        peaks.append(meter.peak_bytes)
        largest.append(meter.largest_numel / math.prod(grid) ** 2)
    # Doubling adds as many bytes as the doubled part has: the second step adds twice what the first did, within a tile.
    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) == pytest.approx(2.0, rel=0.1)
    assert largest[-1] < 0.25


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("grid", [(1,), (9,), (5, 7), (1, 4)], ids=str)
def test_convolution_equals_the_oracle(grid, kernel_size):
    module = randomize(LocalConvolution(6, kernel_size, spatial_rank=len(grid)).double())
    value = torch.randn(2, 3, *grid, 2, dtype=torch.float64)
    torch.testing.assert_close(module(value), convolution_oracle(value, module.weight), **EXACT)


def test_fresh_convolution_and_gate_are_what_is_documented():
    fields = {"local_kernel_size": 3, "local_window": 2}
    mixer = FactorizedMixer(tiny_config(FABertConfig, **fields), spatial_rank=1)
    assert (mixer.local_convolution.weight == 0).all()
    torch.testing.assert_close(mixer.window_gate.sigmoid(), torch.full_like(mixer.window_gate, 0.8))


def mixer_of(config_class, **fields) -> FactorizedMixer:
    rank = 2 if config_class is FAViTConfig else 1
    return randomize(FactorizedMixer(tiny_config(config_class, **fields), spatial_rank=rank).double())


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize(("grid", "prefix"), [((21,), 0), ((5, 7), 1), ((7, 5), 5)], ids=["text", "image", "registers"])
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "unmasked"])
def test_mixer_is_the_documented_sum_of_its_terms(normalization, grid, prefix, is_masked):
    fields = {"attention_normalization": normalization, "local_kernel_size": 3, "local_window": 2}
    mixer = mixer_of(FABertConfig if len(grid) == 1 else FAViTConfig, **fields)
    size = prefix + math.prod(grid)
    query, key, value = tensors(2, 2, size, 16)
    mask = some_mask(2, size) if is_masked else None
    actual = mixer(query, key, value, Layout(mask, grid if len(grid) == 2 else None))
    expected = attention(query, key, value, mask, normalization=normalization)
    on_grid = [tensor[:, :, prefix:].unflatten(2, grid) for tensor in (query, key, value)]
    grid_mask = None if mask is None else mask[:, prefix:].unflatten(1, grid)
    window = window_oracle(*on_grid, grid_mask, 2).flatten(2, -2)
    values = on_grid[2] if grid_mask is None else on_grid[2] * grid_mask[:, None, ..., None]
    convolved = convolution_oracle(values, mixer.local_convolution.weight).flatten(2, -2)
    gate = mixer.window_gate.sigmoid()[:, None, None]
    expected[:, :, prefix:] = (1 - gate) * expected[:, :, prefix:] + gate * window + convolved
    real = torch.ones(2, size, dtype=torch.bool) if mask is None else mask
    for sample in range(2):
        torch.testing.assert_close(actual[sample][:, real[sample]], expected[sample][:, real[sample]], **EXACT)


def test_padding_does_not_reach_the_convolution_or_the_window():
    mixer = mixer_of(FABertConfig, local_kernel_size=5, local_window=3)
    query, key, value = (tensor.detach() for tensor in tensors(1, 2, 12, 16))
    mask = torch.arange(12)[None] < 8
    expected = mixer(query[:, :, :8], key[:, :, :8], value[:, :, :8])
    for filler in (0.0, 1e3):
        filled = [tensor.masked_fill(~mask[:, None, :, None], filler) for tensor in (query, key, value)]
        torch.testing.assert_close(mixer(*filled, Layout(mask))[:, :, :8], expected, **EXACT)


def test_prefix_tokens_take_part_in_the_factorized_term_only():
    mixer = mixer_of(FAViTConfig, local_kernel_size=3, local_window=1)
    query, key, value = tensors(1, 2, 3 + 4 * 5, 16)
    output = mixer(query, key, value, Layout(grid=(4, 5)))
    torch.testing.assert_close(output[:, :, :3], factorized_attention(query, key, value)[:, :, :3], **EXACT)
    silent = [tensor.detach().clone() for tensor in (query, key, value)]
    for tensor in silent:
        tensor[:, :, :3] = 7.0
    changed = mixer(*silent, Layout(grid=(4, 5))) - output
    gate = mixer.window_gate.sigmoid()[:, None, None]
    factorized = factorized_attention(*silent) - factorized_attention(query, key, value)
    torch.testing.assert_close(changed[:, :, 3:], ((1 - gate) * factorized)[:, :, 3:], **EXACT)


def test_neighbours_of_an_image_lie_on_the_grid_and_not_along_the_scan_line():
    mixer = mixer_of(FAViTConfig, local_kernel_size=3)
    query, key, value = (tensor.detach() for tensor in tensors(1, 2, 16, 16))
    changed = value.clone()
    changed[:, :, 4] += 1.0  # row 1, column 0
    factorized = factorized_attention(query, key, changed) - factorized_attention(query, key, value)
    layout = Layout(grid=(4, 4))
    local = mixer(query, key, changed, layout) - mixer(query, key, value, layout) - factorized
    touched = local.abs().amax(dim=(0, 1, 3)).view(4, 4) > 1e-6
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:3, :2] = True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("num_features", [17, 24, 32, 37, 48])
def test_feature_map_without_its_noise_is_the_plain_operator(normalization, num_features):
    module = FeatureMap(2, 16, num_features, normalization).double()
    nn.init.zeros_(module.query_weight)
    nn.init.zeros_(module.key_weight)
    query, key, value = tensors(2, 2, 11, 16)
    mapped = (module.map_query(query), module.map_key(key))
    assert all(tensor.shape == (2, 2, 11, num_features) for tensor in mapped)
    actual = factorized_attention(*mapped, value, normalization=normalization)
    torch.testing.assert_close(actual, factorized_attention(query, key, value, normalization=normalization), **EXACT)


@pytest.mark.parametrize("num_features", [17, 37, 48])
def test_fresh_feature_map_starts_within_the_stated_noise_of_the_plain_operator(num_features):
    module = FeatureMap(2, 16, num_features, "softmax").double()
    for weight in (module.query_weight, module.key_weight):
        assert weight.std().item() == pytest.approx(FEATURE_NOISE, rel=0.2)
    query, key, value = tensors(2, 2, 50, 16)
    plain = factorized_attention(query, key, value)
    noisy = factorized_attention(module.map_query(query), module.map_key(key), value)
    # Logits that move by at most d change each softmax weight by a factor within exp(±2d). Entries of the N×N matrix,
    # whose rows sum to one, are sums of products of one weight of each softmax: factors within exp(±2(dq + dk)).
    moved = sum((x @ w).abs().max().item() for x, w in ((query, module.query_weight), (key, module.key_weight)))
    bound = math.expm1(2.0 * moved) * value.abs().max().item()
    distance = (noisy - plain).abs().max().item()
    assert 0.0 < distance <= bound


@pytest.mark.parametrize("num_features", [17, 37, 48])
def test_fresh_feature_map_in_scaling_stays_within_the_sum_of_its_products(num_features):
    module = FeatureMap(2, 16, num_features, "scaling").double()
    query, key, value = tensors(2, 2, 50, 16)
    plain = factorized_attention(query, key, value, normalization="scaling")
    noisy = factorized_attention(module.map_query(query), module.map_key(key), value, normalization="scaling")
    # (q + dq)·(k + dk) - q·k has three products left, averaged over positions with weights of size |value|.
    mapped_query, mapped_key = (
        tensor.abs().sum(dim=-1).max().item() for tensor in (module.map_query(query), module.map_key(key))
    )
    dq, dk = (query @ module.query_weight).abs().max().item(), (key @ module.key_weight).abs().max().item()
    bound = (mapped_query * dk + mapped_key * dq + num_features * dq * dk) * value.abs().max().item()
    distance = (noisy - plain).abs().max().item()
    assert 0.0 < distance <= bound


def test_copies_of_a_feature_diverge_in_training_which_exact_copies_cannot():
    query, key, value = (tensor.detach() for tensor in tensors(2, 2, 30, 16))
    target = torch.randn(2, 2, 30, 16, dtype=torch.float64)

    def distance_of_copies_after_training(has_noise: bool) -> float:
        module = FeatureMap(2, 16, 32, "softmax").double()
        if not has_noise:
            nn.init.zeros_(module.query_weight)
            nn.init.zeros_(module.key_weight)
        optimizer = torch.optim.SGD(module.parameters(), lr=100.0)
        for _ in range(20):
            optimizer.zero_grad()
            (factorized_attention(module.map_query(query), module.map_key(key), value) - target).pow(
                2
            ).mean().backward()
            optimizer.step()
        weight = module.query_weight
        return (weight[..., :16] - weight[..., 16:]).abs().mean().item()

    started = FEATURE_NOISE * 2.0 / math.sqrt(math.pi)  # the mean distance of two such normal numbers
    assert distance_of_copies_after_training(has_noise=False) < 1e-12
    assert distance_of_copies_after_training(has_noise=True) > 1.5 * started


def test_weight_decay_pulls_the_feature_map_to_the_plain_operator():
    module = FeatureMap(2, 16, 37, "softmax").double()
    query, key, value = (tensor.detach() for tensor in tensors(2, 2, 30, 16))
    plain = factorized_attention(query, key, value)
    before = (factorized_attention(module.map_query(query), module.map_key(key), value) - plain).abs().max()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    after = (factorized_attention(module.map_query(query), module.map_key(key), value) - plain).abs().max()
    assert after < 0.7 * before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_softmax_mixer_is_ordinary_attention_over_real_positions(implementation):
    config = tiny_config(FABertConfig, softmax_layers=[0])
    config._attn_implementation = implementation
    mixer = build_mixer(config, 0, spatial_rank=1)
    assert isinstance(mixer, SoftmaxMixer) and isinstance(build_mixer(config, 1, spatial_rank=1), FactorizedMixer)
    query, key, value = tensors(2, 2, 11, 16)
    mask = some_mask(2, 11)
    actual = mixer.eval()(query, key, value, Layout(mask))
    for sample in range(2):
        keys, values = key[sample][:, mask[sample]], value[sample][:, mask[sample]]
        expected = (query[sample] @ keys.transpose(1, 2) / 4.0).softmax(dim=2) @ values
        torch.testing.assert_close(actual[sample], expected, **EXACT)


@pytest.mark.parametrize("length", [1, 2, 63, 65])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_gradients_of_the_whole_mixer_equal_finite_differences(length, normalization):
    fields = {
        "attention_normalization": normalization,
        "key_feature_size": 19,
        "local_kernel_size": 3,
        "local_window": 2,
    }
    mixer = mixer_of(FABertConfig, **fields)
    inputs = tensors(1, 2, length, 16)
    mask = torch.arange(length)[None] < max(1, length - 3)
    direction = torch.randn(1, 2, length, 16, dtype=torch.float64) * mask[:, None, :, None]
    parameters = [*inputs, *mixer.parameters()]
    gradients = torch.autograd.grad((mixer(*inputs, Layout(mask)) * direction).sum(), parameters)
    # A central difference along one random direction of all inputs and parameters: its error is step² times the third
    # derivative, of order one to ten, plus rounding over the step.
    step, moves = 1e-5, [torch.randn_like(parameter) for parameter in parameters]
    slope = sum((gradient * move).sum() for gradient, move in zip(gradients, moves, strict=True))

    def value_after(distance: float) -> Tensor:
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.add_(move, alpha=distance)
        return (mixer(*inputs, Layout(mask)) * direction).sum()

    with torch.no_grad():
        difference = (value_after(step) - value_after(-2 * step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)


def test_sign_pairs_start_as_hedgehogs_features_and_count_their_copies():
    module = FeatureMap(2, 16, 37, "softmax", sign_pairs=True).double()
    nn.init.zeros_(module.query_weight)
    nn.init.zeros_(module.key_weight)
    query, key, _ = tensors(2, 2, 11, 16)
    mapped_query, mapped_key = module.map_query(query), module.map_key(key)
    expected = torch.cat((query, -query, query[..., :5]), dim=-1)
    copies = torch.ones(37, dtype=torch.float64)
    copies[:5], copies[32:] = 2.0, 2.0  # the third turn repeats the first five features, and none of the negative ones
    torch.testing.assert_close(mapped_query, expected - copies.log(), **EXACT)
    torch.testing.assert_close(mapped_key, torch.cat((key, -key, key[..., :5]), dim=-1), **EXACT)


@pytest.mark.parametrize("fields", [{}, {"key_feature_size": 24}])
def test_learned_temperatures_divide_the_logits_of_either_softmax(fields):
    config = tiny_config(FABertConfig, learned_temperatures=True, **fields)
    mixer = FactorizedMixer(config, spatial_rank=1).double()
    query, key, value = tensors(2, 2, 11, 16)
    plain = FactorizedMixer(tiny_config(FABertConfig, **fields), spatial_rank=1).double()
    plain.load_state_dict({name: w for name, w in mixer.state_dict().items() if name != "log_sharpness"})
    torch.testing.assert_close(mixer(query, key, value), plain(query, key, value), **EXACT)
    temperatures = torch.tensor([[0.5, 2.0], [3.0, 0.25]], dtype=torch.float64)
    with torch.no_grad():
        mixer.log_sharpness.copy_(-temperatures.log())
    features = (plain.query_features(query), plain.key_features(key))
    cooled = [part / temperature[:, None, None] for part, temperature in zip(features, temperatures, strict=True)]
    torch.testing.assert_close(mixer(query, key, value), factorized_attention(*cooled, value), **EXACT)
