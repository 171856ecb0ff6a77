"""Protects FAStereo: the cost volume, the soft-argmin, convex upsampling, padding, the identity start and the loss."""

import pytest
import torch
from stereo_sets import SMALL
from tiny_models import EXACT, randomize

from fa_transformers.models import FAStereoConfig, FAStereoForDepthEstimation
from fa_transformers.models.configuration_fa_stereo import ATTENTION_BLOCKS

EPS64 = torch.finfo(torch.float64).eps


def make_model(**options) -> FAStereoForDepthEstimation:
    return randomize(FAStereoForDepthEstimation(FAStereoConfig(**SMALL | options))).double().eval()


def make_pairs(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, 3, height, width, dtype=torch.float64)


def disparity_of(model, pairs, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(pairs, **options).predicted_depth


def test_the_cost_volume_equals_a_loop_over_places_and_disparities():
    model = make_model()
    groups, own, height, width = 4, 2, 3, 6
    matched = torch.randn(4, 16, height, width, dtype=torch.float64)
    concatenated = torch.randn(4, own, height, width, dtype=torch.float64)
    volume = model.match(matched, concatenated)
    assert volume.shape == (2, groups + 2 * own, 4, height, width)
    expected = torch.zeros_like(volume)
    for pair in range(2):
        left, right = matched[2 * pair], matched[2 * pair + 1]
        for level in range(4):
            for row in range(height):
                for column in range(level, width):
                    for group in range(groups):
                        part = slice(4 * group, 4 * group + 4)
                        one, other = left[part, row, column], right[part, row, column - level]
                        cosine = one @ other / (one.norm() * other.norm())
                        expected[pair, group, level, row, column] = cosine
                    both = [concatenated[2 * pair, :, row, column], concatenated[2 * pair + 1, :, row, column - level]]
                    expected[pair, groups:, level, row, column] = torch.cat(both)
    # Products of two units of four numbers each: a dozen roundings of numbers up to 1.
    assert (volume - expected).abs().max() <= 16 * EPS64


def test_the_soft_argmin_is_the_mean_level_in_pixels():
    model = make_model()
    sure = torch.full((1, 4, 2, 2), -1e4, dtype=torch.float64)
    sure[:, 3] = 0.0
    assert torch.equal(model.regress(sure), torch.full((1, 2, 2), 12.0, dtype=torch.float64))
    assert torch.equal(model.regress(torch.zeros_like(sure)), torch.full((1, 2, 2), 6.0, dtype=torch.float64))
    costs = torch.randn(1, 4, 5, 5)
    halved = model.regress(costs.bfloat16())
    assert halved.dtype == torch.float32 and torch.equal(halved, model.regress(costs.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.regress(costs)
    assert torch.equal(mixed, model.regress(costs))


def test_upsampled_disparities_lie_between_their_neighbours_and_constants_stay():
    model = make_model()
    features = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    disparity = torch.rand(2, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        whole = model.upsample(disparity, features, (18, 28))
        flat = model.upsample(torch.full_like(disparity, 3.0), features, (18, 28))
    assert whole.shape == (2, 18, 28)
    around = torch.nn.functional.unfold(
        torch.nn.functional.pad(disparity[:, None], (1, 1, 1, 1), mode="replicate"), 3
    ).view(2, 9, 5, 7)
    for bound, sign in ((around.amin(dim=1), 1), (around.amax(dim=1), -1)):
        bound = bound.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :18, :28]
        assert (sign * (whole - bound) >= -16 * EPS64).all()
    assert (flat - 3.0).abs().max() <= 3 * 16 * EPS64


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 3), (33, 64)])
def test_pairs_of_any_size_run_also_narrower_than_the_disparities(size):
    disparity = disparity_of(make_model(), make_pairs(*size))
    assert disparity.shape == (2, *size) and disparity.isfinite().all()
    assert disparity.min() >= 0 and disparity.max() <= 12  # the last of four levels


def test_padding_changes_nothing_whatever_it_holds():
    model = make_model()
    sizes = [(20, 31), (13, 24), (20, 31)]
    pairs = make_pairs(24, 36, batch=3)
    labels = 16 * torch.rand(3, 24, 36, dtype=torch.float64)
    mask = torch.zeros(3, 24, 36, dtype=torch.long)
    for index, (height, width) in enumerate(sizes):
        mask[index, :height, :width] = 1
        pairs[index, :, :, height:] = pairs[index, :, :, :, width:] = torch.nan
    output = model(pairs, pixel_mask=mask, labels=labels)
    losses = []
    for index, (height, width) in enumerate(sizes):
        part = slice(index, index + 1)
        alone = model(pairs[part, :, :, :height, :width], labels=labels[part, :height, :width])
        torch.testing.assert_close(
            output.predicted_depth[part, :height, :width].detach(), alone.predicted_depth.detach(), **EXACT
        )
        losses.append(alone.loss.item())
    assert (output.predicted_depth[mask == 0] == 0).all()
    # The mean over pairs, each the mean over its own pixels: another order of some hundred sums.
    assert output.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-12)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_masks_that_are_no_rectangle_at_the_top_left_are_refused():
    model, pairs = make_model(), make_pairs(12, 16)
    mask = torch.ones(2, 12, 16, dtype=torch.bool)
    for spoil in ((1, 5, 5), (0, 0, 0), (1, slice(0, 2))):
        spoilt = mask.clone()
        spoilt[spoil] = False
        with pytest.raises(ValueError, match="rectangle at the top left"):
            model(pairs, pixel_mask=spoilt)
    with pytest.raises(ValueError, match="`pixel_mask` must be"):
        model(pairs, pixel_mask=mask[:, :, 1:])


@pytest.mark.parametrize("places", [(place,) for place in ATTENTION_BLOCKS] + [ATTENTION_BLOCKS])
def test_blocks_start_as_the_identity_also_when_a_checkpoint_lacks_them(places, tmp_path):
    plain = make_model(attention_blocks=())
    plain.save_pretrained(tmp_path)
    config = FAStereoConfig(**SMALL, attention_blocks=places)
    model, report = FAStereoForDepthEstimation.from_pretrained(
        tmp_path, config=config, dtype=torch.float64, output_loading_info=True
    )
    assert not report["unexpected_keys"] and report["missing_keys"]
    ends = ("queries", "keys", "values", "reprojection")
    assert all(name.split(".")[-2] in ends for name in report["missing_keys"])
    pairs = make_pairs(17, 30)
    assert torch.equal(disparity_of(model.eval(), pairs), disparity_of(plain, pairs))
    fresh = FAStereoForDepthEstimation(config)
    zero = [name for name, value in fresh.named_parameters() if "reprojection" in name and value.abs().max() == 0]
    assert len(zero) == len([name for name in fresh.state_dict() if "reprojection" in name]) > 0


def test_blocks_matter_once_they_are_trained():
    pairs = make_pairs(17, 30)
    plain = disparity_of(make_model(attention_blocks=()), pairs)
    assert not torch.allclose(plain, disparity_of(make_model(), pairs), atol=1e-3)


def test_the_loss_leaves_out_labels_that_are_unknown_or_out_of_range():
    model, pairs = make_model(), make_pairs(12, 20)
    labels = 15 * torch.rand(2, 12, 20, dtype=torch.float64) + 0.5
    known = torch.rand(2, 12, 20) < 0.5
    expected = model(pairs, labels=labels, labels_mask=known).loss
    for value in (torch.nan, torch.inf, 0.0, 16.0):
        spoilt = labels.masked_fill(~known, value)
        assert torch.equal(model(pairs, labels=spoilt, labels_mask=known).loss, expected)
        assert torch.equal(model(pairs, labels=spoilt).loss, expected)
    assert model(pairs, labels=torch.full_like(labels, 99.0)).loss == 0
    for name in ("labels", "labels_mask"):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            model(pairs, **{"labels": labels, name: known[:, 1:]})


def test_the_loss_sums_all_disparity_maps_with_their_weights():
    pairs, labels = make_pairs(12, 20), torch.full((2, 12, 20), 7.0, dtype=torch.float64)
    losses = {}
    for decay in (0.0, 0.5, 1.0):
        model = make_model(loss_decay=decay)
        losses[decay] = model(pairs, labels=labels).loss.item()
    maps = [each.detach() for each in model.estimate(pairs, with_earlier=True)]
    assert len(maps) == 2 + SMALL["num_hourglasses"]
    single = [torch.nn.functional.smooth_l1_loss(each, labels).item() for each in maps]
    for decay, loss in losses.items():
        weights = [decay ** (len(maps) - 1 - index) for index in range(len(maps))]
        assert loss == pytest.approx(sum(w * s for w, s in zip(weights, single, strict=True)), rel=1e-12)


def test_a_trained_network_looks_for_larger_disparities_with_the_same_weights(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    wider, info = FAStereoForDepthEstimation.from_pretrained(tmp_path, max_disparity=32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and wider.config.max_disparity == 32
    pairs = make_pairs(8, 48, batch=1)
    costs = [one.compute_costs(pairs)[1][0] for one in (model, wider.double().eval())]
    assert costs[1].shape[1] == 8 and torch.equal(costs[1][:, :4], costs[0]), "plain correlations of the first levels"


def test_inputs_of_another_shape_are_refused():
    for shape in ((2, 3, 12, 16), (2, 1, 3, 12, 16), (1, 2, 1, 12, 16)):
        with pytest.raises(ValueError, match="`pixel_values` must be"):
            make_model()(torch.zeros(shape, dtype=torch.float64))


def test_the_default_network_is_small():
    count = sum(parameter.numel() for parameter in FAStereoForDepthEstimation(FAStereoConfig()).parameters())
    assert 150_000 <= count <= 500_000, count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_disparity": 30}, "`max_disparity` must be a multiple of 4"),
        ({"max_disparity": 4}, "`max_disparity` must be a multiple of 4 of at least 8"),
        ({"feature_channels": 20}, "`feature_channels` must be a multiple of 8"),
        ({"correlation_groups": 5}, "must divide `feature_channels`"),
        ({"dilations": [0]}, "`dilations` must be"),
        ({"attention_blocks": ["feature"]}, "`attention_blocks` must be"),
        ({"attention_kind": "linear"}, "`attention_kind` must be"),
        ({"attention_heads": 3}, "`attention_heads` .3. must divide"),
        ({"key_channels": 3, "attention_heads": 2}, "`key_channels` .3. must be a multiple"),
        ({"loss_decay": 1.5}, "`loss_decay` must be"),
        ({"num_hourglasses": 0}, "`num_hourglasses` must be"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        FAStereoConfig(**fields)
