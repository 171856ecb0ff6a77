"""Protects what FADense learns from: the heat map's target, the places that learn boxes, and each loss's formula."""

import math

import pytest
import torch
from tiny_models import EXACT

from fa_transformers.models.fa_dense_losses import (
    box_places,
    centres,
    generalized_iou_loss,
    heatmap_loss,
    heatmap_target,
    mask_loss,
)


def draw_boxes(count: int, height: int, width: int, least: float = 0.5, most: float = 60.0, seed: int = 0):
    """Boxes (left, top, right, bottom) in pixels, cut to an image."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    centre = torch.rand(count, 2, generator=generator).double() * limit[:2]
    sides = least + (most - least) * torch.rand(count, 2, generator=generator).double()
    return torch.minimum(torch.cat([centre - sides / 2, centre + sides / 2], dim=1).clamp(min=0), limit)


def test_heatmap_target_is_one_at_centres_and_falls_as_wide_as_the_box():
    boxes, classes = draw_boxes(6, 96, 120), torch.tensor([0, 2, 2, 0, 2, 1])
    target = heatmap_target(boxes, classes, 4, 12, 15)
    for label in range(4):
        for row in range(12):
            for column in range(15):
                bumps = [0.0]
                for (left, top, right, bottom), own in zip(boxes.tolist(), classes.tolist(), strict=True):
                    if own == label:
                        y, x = int((top + bottom) / 16), int((left + right) / 16)
                        high, wide = ((0.54 * side / 8 + 1) / 6 for side in (bottom - top, right - left))
                        bumps.append(math.exp(-((row - y) ** 2) / (2 * high**2) - (column - x) ** 2 / (2 * wide**2)))
                assert target[label, row, column].item() == pytest.approx(max(bumps), rel=1e-12, abs=1e-300)
    distinct = {(*place, label) for place, label in zip(centres(boxes, 12, 15).tolist(), classes.tolist(), strict=True)}
    assert (target == 1).sum() == len(distinct)


def test_a_centre_on_the_last_edge_lies_in_the_last_place():
    boxes = torch.tensor([[16.0, 16.0, 24.0, 24.0], [0.0, 0.0, 0.0, 0.0], [15.5, 15.0, 15.5, 17.0]])
    assert centres(boxes, 2, 2).tolist() == [[1, 1], [0, 0], [1, 1]]


def test_heatmap_loss_is_the_focal_loss_and_spares_what_is_ignored():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=generator).double() * 3
    target = torch.rand(2, 3, 4, generator=generator).double()
    target[1, 2, 1] = target[0, 0, 0] = 1.0
    ignore = torch.zeros(21, 30, dtype=torch.bool)
    ignore[:8, :8] = ignore[4:13, 20:30] = True

    def one(logit, wanted):
        p = 1 / (1 + math.exp(-logit))
        return -((1 - p) ** 2) * math.log(p) if wanted == 1 else -((1 - wanted) ** 4) * p**2 * math.log(1 - p)

    whole = sum(one(a, b) for a, b in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True))
    assert heatmap_loss(logits, target, None).item() == pytest.approx(whole, rel=1e-12)
    # Middles of places in ignored pixels: (4, 4), whose first label is a centre, (4, 20), (4, 28), (12, 20), (12, 28).
    spared = sum(
        one(logits[label, row, column].item(), target[label, row, column].item())
        for label in range(2)
        for row, column in ((0, 0), (0, 2), (0, 3), (1, 2), (1, 3))
        if target[label, row, column] != 1
    )
    assert heatmap_loss(logits, target, ignore).item() == pytest.approx(whole - spared, rel=1e-12)


def test_places_that_learn_a_box_lie_in_it_next_to_its_centre_and_belong_to_it_alone():
    boxes = draw_boxes(30, 96, 120, seed=1)
    places, owners, weights = box_places(boxes, 12, 15)
    totals = torch.zeros(30, dtype=torch.float64).index_add_(0, owners, weights)
    torch.testing.assert_close(totals, torch.ones(30, dtype=torch.float64), **EXACT)
    middle = (places.flip(1) + 0.5) * 8
    is_centre = (places == centres(boxes, 12, 15)[owners]).all(1)
    inside = (middle > boxes[owners, :2]).all(1) & (middle < boxes[owners, 2:]).all(1)
    assert (is_centre | inside).all() and is_centre.sum() == 30 and (~is_centre).sum() > 10
    assert ((places - centres(boxes, 12, 15)[owners]).abs() <= 1).all()
    flat = places[:, 0] * 15 + places[:, 1]
    assert all((flat == place).sum() == 1 for place in flat[~is_centre])


def test_giou_loss_is_one_less_the_generalized_overlap():
    boxes, others = draw_boxes(50, 100, 100), draw_boxes(50, 100, 100, seed=9)
    others[0] = boxes[0]
    for box, other, loss in zip(boxes.tolist(), others.tolist(), generalized_iou_loss(boxes, others), strict=True):
        wide = max(0, min(box[2], other[2]) - max(box[0], other[0]))
        high = max(0, min(box[3], other[3]) - max(box[1], other[1]))
        areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (box, other)]
        hull = (max(box[2], other[2]) - min(box[0], other[0])) * (max(box[3], other[3]) - min(box[1], other[1]))
        union = sum(areas) - wide * high
        assert loss.item() == pytest.approx(1 - wide * high / union + (hull - union) / hull, abs=1e-12)
    assert generalized_iou_loss(boxes, others)[0].abs() < 1e-12


def test_mask_loss_is_cross_entropy_and_dice_against_the_share_of_each_place():
    masks = torch.zeros(1, 21, 14, dtype=torch.bool)
    masks[0, 3:17, 2:14] = True
    logits = torch.randn(5, 4, dtype=torch.float64)
    total = mask_loss(
        lambda features, filters, box: ((slice(1, 6), slice(0, 4)), logits),
        torch.zeros(8, 6, 4, dtype=torch.float64),
        torch.zeros(1, 3),
        torch.zeros(1, 4),
        masks,
    )
    entropy, both, square, true = [], 0.0, 0.0, 0.0
    for row in range(1, 6):
        for column in range(4):
            pixels = masks[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            share = pixels.double().mean().item()
            p = 1 / (1 + math.exp(-logits[row - 1, column].item()))
            entropy.append(-share * math.log(p) - (1 - share) * math.log(1 - p))
            both, square, true = both + p * share, square + p * p, true + share * share
    expected = sum(entropy) / 20 + 1 - (2 * both + 1) / (square + true + 1)
    assert total.item() == pytest.approx(expected, rel=1e-12)
