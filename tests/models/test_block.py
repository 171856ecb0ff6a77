"""Protects the paper's module for feature maps: its formula, its layouts, the identity start, masks and memory."""

import math

import pytest
import torch
from oracles import MemoryMeter, attention_matrix
from torch import Tensor, nn

from fa_transformers.models.fa_block import FactorizedAttentionBlock

EPS64 = torch.finfo(torch.float64).eps
PARAMETERS = {f"{name}.{kind}" for name in ("queries", "keys", "values", "reprojection") for kind in ("weight", "bias")}
SPATIAL_SIZES = [(13,), (5, 4), (3, 4, 2)]
spatial_ranks = pytest.mark.parametrize("spatial", SPATIAL_SIZES, ids=["1-D", "2-D", "3-D"])
both_normalizations = pytest.mark.parametrize("normalization", ["softmax", "scaling"])


def make_block(num_heads: int = 2, **options) -> FactorizedAttentionBlock:
    return FactorizedAttentionBlock(6, 4, 8, num_heads, **options).double()


def make_map(*spatial: int, batch: int = 2, channels: int = 6) -> Tensor:
    return torch.randn(batch, channels, *spatial, dtype=torch.float64)


def make_mask(batch: int, spatial: tuple[int, ...]) -> Tensor:
    """Real positions fill all of the first map and the first rows (but one) of the others, as in a padded batch."""
    mask = torch.ones(batch, *spatial, dtype=torch.bool)
    mask[1:, spatial[0] - 1 :] = False
    return mask


def loop_oracle(block: FactorizedAttentionBlock, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the block sample by sample and head by head, with matrix products and the explicit N×N matrix."""

    def project(layer: nn.Conv1d, features: Tensor) -> Tensor:
        return features @ layer.weight.detach()[:, :, 0].T + layer.bias.detach()

    output = x.clone()
    for i, feature_map in enumerate(x):
        real = torch.ones(math.prod(x.shape[2:]), dtype=torch.bool) if mask is None else mask[i].reshape(-1)
        features = feature_map.reshape(x.shape[1], -1).T[real]  # [real positions, C]
        query, key, value = (project(layer, features) for layer in (block.queries, block.keys, block.values))
        heads = []
        key_width, value_width = block.key_channels // block.num_heads, block.value_channels // block.num_heads
        for h in range(block.num_heads):
            of_keys = slice(h * key_width, (h + 1) * key_width)
            of_values = slice(h * value_width, (h + 1) * value_width)
            matrix = attention_matrix(
                query[None, None, :, of_keys], key[None, None, :, of_keys], normalization=block.normalization
            )
            heads.append(torch.from_numpy(matrix[0, 0]) @ value[:, of_values])
        update = torch.zeros(len(real), x.shape[1], dtype=torch.float64)
        update[real] = project(block.reprojection, torch.cat(heads, dim=1))
        output[i] += update.T.reshape(feature_map.shape)
    return output


def assert_equal_but_for_rounding(left: Tensor, right: Tensor) -> None:
    # Four chained products over at most 24 terms of numbers of order one: well under 24·4·4 roundings.
    assert (left - right).abs().max() <= 384 * EPS64 * max(1.0, right.abs().max().item())


@spatial_ranks
@both_normalizations
@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_output_equals_the_loop_over_samples_and_heads(spatial, normalization, num_heads, masked):
    block = make_block(num_heads, normalization=normalization)
    x = make_map(*spatial)
    mask = make_mask(2, spatial) if masked else None
    output = block(x, mask)
    assert output.shape == x.shape
    assert_equal_but_for_rounding(output, loop_oracle(block, x, mask))


def test_parameters_have_the_names_of_the_paper_and_one_weight_for_all_spatial_ranks():
    block = make_block()
    assert {name for name, _ in block.named_parameters()} == PARAMETERS
    assert set(block.state_dict()) == PARAMETERS
    assert block.queries.weight.shape == (4, 6, 1)
    assert block.keys.weight.shape == (4, 6, 1)
    assert block.values.weight.shape == (8, 6, 1)
    assert block.reprojection.weight.shape == (6, 8, 1)


@spatial_ranks
def test_the_residual_is_inside(spatial):
    block = make_block()
    nn.init.zeros_(block.reprojection.weight)
    x = make_map(*spatial)
    bias = block.reprojection.bias.view(1, -1, *[1] * len(spatial))
    assert torch.equal(block(x), x + bias)


@spatial_ranks
def test_spatial_shape_does_not_matter_only_the_positions(spatial):
    block = make_block()
    x = make_map(*spatial)
    assert_equal_but_for_rounding(block(x).flatten(2), block(x.flatten(2)))


@spatial_ranks
@both_normalizations
@pytest.mark.parametrize("masked", [False, True])
def test_zero_init_makes_the_block_the_identity_and_still_trainable(spatial, normalization, masked):
    block = make_block(normalization=normalization, zero_init=True)
    x = make_map(*spatial)
    output = block(x, make_mask(2, spatial) if masked else None)
    assert torch.equal(output, x)
    (output * torch.randn_like(output)).sum().backward()
    assert (block.reprojection.weight.grad != 0).all()
    assert (block.reprojection.bias.grad != 0).all()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter -= 0.1 * parameter.grad
    assert not torch.equal(block(x), x)
    block.reset_parameters()
    assert torch.equal(block(x), x)


def test_without_zero_init_the_reprojection_starts_as_a_convolution_does():
    block = make_block()
    assert (block.reprojection.weight != 0).all()
    bound = 1 / math.sqrt(8)
    assert block.reprojection.weight.abs().max() <= bound
    before = block.reprojection.weight.clone()
    block.reset_parameters()
    assert (block.reprojection.weight != before).all()


@both_normalizations
def test_gradients_of_input_and_parameters_equal_finite_differences(normalization):
    block = FactorizedAttentionBlock(3, 2, 4, 2, normalization=normalization).double()
    x = make_map(2, 2, channels=3).requires_grad_()
    mask = make_mask(2, (2, 2))

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, mask))

    names = [name for name, _ in block.named_parameters()]
    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


def test_the_key_bias_has_no_effect_and_gets_zero_gradient():
    block = make_block()
    x = make_map(5, 4)
    output = block(x)
    output.pow(2).sum().backward()
    # 40 contributions that cancel, each no larger than the largest gradient of a parameter.
    largest = max(parameter.grad.abs().max().item() for parameter in block.parameters())
    assert block.keys.bias.grad.abs().max() <= 40 * 4 * EPS64 * largest
    assert block.keys.weight.grad.abs().max() > 1e-6 * largest
    with torch.no_grad():
        block.keys.bias += 3.0
    assert_equal_but_for_rounding(block(x), output)


# Checkpoints


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_checkpoints_of_one_by_one_convolutions_of_any_rank_load(layer):
    widths = {"queries": (6, 4), "keys": (6, 4), "values": (6, 8), "reprojection": (8, 6)}
    checkpoint = {}
    for name, width in widths.items():
        layer(*width, kernel_size=1).double().state_dict(destination=checkpoint, prefix=f"{name}.")
    shapes = {name: tensor.shape for name, tensor in checkpoint.items()}
    block = make_block()
    result = block.load_state_dict(checkpoint)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.flatten(), checkpoint[name].flatten())
    assert {name: tensor.shape for name, tensor in checkpoint.items()} == shapes


def test_checkpoints_load_inside_a_larger_network():
    source = nn.Sequential(nn.Conv2d(3, 6, 3), make_block())
    checkpoint = {
        name: tensor.unsqueeze(-1) if name.startswith("1.") and name.endswith("weight") else tensor
        for name, tensor in source.state_dict().items()
    }
    target = nn.Sequential(nn.Conv2d(3, 6, 3), make_block())
    target.load_state_dict(checkpoint)
    for left, right in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(left.to(right.dtype), right)


def test_weights_that_are_not_one_by_one_are_refused():
    block = make_block()
    checkpoint = block.state_dict()
    checkpoint["keys.weight"] = torch.zeros(4, 6, 3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for keys.weight.*\[4, 6, 3, 3\]"):
        block.load_state_dict(checkpoint)
    del checkpoint["keys.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*keys.weight"):
        block.load_state_dict(checkpoint)


def test_saved_and_loaded_the_block_computes_the_same():
    block, other = make_block(), make_block()
    x = make_map(5, 4)
    assert not torch.equal(block(x), other(x))
    other.load_state_dict(block.state_dict())
    assert torch.equal(block(x), other(x))


# Padding


@spatial_ranks
@both_normalizations
@pytest.mark.parametrize("junk", [0.0, 1e4, float("inf"), float("nan")])
def test_what_padded_positions_hold_changes_no_real_position_and_no_gradient(spatial, normalization, junk):
    block = make_block(normalization=normalization)
    x = make_map(*spatial)
    mask = make_mask(2, spatial)
    real = mask[:, None].expand_as(x)

    def run(x):
        block.zero_grad()
        output = block(x, mask)
        output[real].pow(2).sum().backward()
        return output, [parameter.grad.clone() for parameter in block.parameters()]

    expected, expected_gradients = run(x)
    junk_map = x.masked_fill(~real, junk)
    output, gradients = run(junk_map)
    assert torch.equal(output[real], expected[real])
    assert torch.equal(output[~real].nan_to_num(), junk_map[~real].nan_to_num())
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, reference)


@both_normalizations
def test_a_padded_map_gives_what_it_gives_alone(normalization):
    block = make_block(normalization=normalization)
    small = make_map(3, 4, batch=1)
    padded = torch.full((1, 6, 7, 9), float("nan"), dtype=torch.float64)
    padded[:, :, 2:5, 4:8] = small
    mask = torch.zeros(1, 7, 9, dtype=torch.bool)
    mask[:, 2:5, 4:8] = True
    assert_equal_but_for_rounding(block(padded, mask)[:, :, 2:5, 4:8], block(small))


@both_normalizations
def test_a_map_without_a_real_position_comes_back_unchanged(normalization):
    block = make_block(normalization=normalization)
    x = make_map(5, 4)
    mask = make_mask(2, (5, 4))
    mask[1] = False
    output = block(x, mask)
    assert torch.equal(output[1], x[1])
    assert (output[0] != x[0]).all()
    output.sum().backward()
    for parameter in block.parameters():
        assert torch.isfinite(parameter.grad).all()


# Cost, autocast


@both_normalizations
def test_memory_grows_linearly_with_the_positions(normalization):
    block = FactorizedAttentionBlock(8, 8, 16, 2, normalization=normalization)
    peaks = []
    for side in (32, 64):
        x = torch.randn(1, 8, side, side, requires_grad=True)
        with MemoryMeter() as meter:
            block(x, torch.ones(1, side, side, dtype=torch.bool)).sum().backward()
        assert meter.largest_numel <= 16 * side**2 < side**4
        peaks.append(meter.peak_bytes)
    # Four times the positions; the parameters' gradients do not grow and can only lower the ratio.
    assert 3.8 <= peaks[1] / peaks[0] <= 4.0


def test_under_autocast_the_map_keeps_its_dtype():
    block = make_block(zero_init=True).float()
    x = make_map(5, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(x)
    assert output.dtype == torch.float32
    assert torch.equal(output, x)


def test_compiled_without_graph_breaks_it_is_equal():
    torch.compiler.reset()
    block = make_block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for spatial in ((5, 4), (7, 9)):
        x, mask = make_map(*spatial), make_mask(2, spatial)
        assert_equal_but_for_rounding(compiled(x, mask), block(x, mask))


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 5, 8, 2), r"`key_channels` \(5\) must be a multiple of `num_heads` \(2\)"),
        ((6, 4, 7, 2), r"`value_channels` \(7\) must be a multiple of `num_heads` \(2\)"),
        ((0, 4, 8, 2), "`in_channels` must be a positive integer, got 0"),
        ((6, -4, 8, 2), "`key_channels` must be a positive integer"),
        ((6, 4, 8.0, 2), "`value_channels` must be a positive integer"),
        ((6, 4, 8, 0), "`num_heads` must be a positive integer"),
    ],
)
def test_channels_that_heads_do_not_divide_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        FactorizedAttentionBlock(*arguments)


def test_an_unknown_normalization_is_an_error():
    with pytest.raises(ValueError, match="`normalization` must be one of .*'relu'"):
        FactorizedAttentionBlock(6, 4, 8, normalization="relu")


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((2, 6), None, "`x` must be"),
        ((2, 5, 4), None, "`x` must be .*6 channels"),
        ((2, 6, 4, 3), torch.full((2, 4, 3), -1e4), "`mask` must hold 1"),
        ((2, 6, 4, 3), torch.ones(2, 12, dtype=torch.bool), r"`mask` must be .*\(2, 4, 3\)"),
        ((2, 6, 4, 3), torch.ones(1, 4, 3, dtype=torch.bool), "`mask` must be"),
        ((2, 6, 4, 3), torch.ones(2, 4, 3, dtype=torch.bool, device="meta"), "`mask` is on meta"),
    ],
)
def test_wrong_input_raises_a_value_error_that_names_the_argument(shape, mask, message):
    with pytest.raises(ValueError, match=message):
        make_block()(torch.zeros(*shape, dtype=torch.float64), mask)
