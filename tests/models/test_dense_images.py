"""Protects what enters and leaves FADense: images of any size, COCO's annotations, masks at full size, run lengths."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fa_transformers.models import (
    FADenseConfig,
    FADenseForObjectDetection,
    FADenseImageProcessor,
    FAStereoImageProcessor,
    FAViTImageProcessor,
    fa_pictures,
)
from fa_transformers.models.fa_rle import decode_mask, encode_mask, tight_boxes
from fa_transformers.models.modeling_fa_dense import FADenseOutput

SQUARE = [[10.0, 20.0, 40.0, 20.0, 40.0, 50.0, 10.0, 50.0]]


def draw(height: int, width: int, mode: str = "RGB") -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-2, -1, 1, 1), 60).convert(mode)


def annotation(**fields) -> dict:
    return {"id": 7, "category_id": 1, "bbox": [10, 20, 30, 30], "iscrowd": 0, "segmentation": SQUARE, **fields}


def random_mask(height: int, width: int, seed: int) -> torch.Tensor:
    """Blobs, so that runs are long and short."""
    noise = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    return functional.avg_pool2d(noise, 5, 1, 2)[0, 0] > 0.05


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (None, (60, 90)),
        ({"longest_edge": 45}, (30, 45)),
        ({"longest_edge": 500}, (60, 90)),
        ({"shortest_edge": 20}, (20, 30)),
        ({"shortest_edge": 120}, (120, 180)),
        ({"shortest_edge": 120, "longest_edge": 100}, (67, 100)),
    ],
)
def test_images_keep_their_aspect_and_their_size_unless_told(size, expected):
    batch = FADenseImageProcessor(size=size)(draw(60, 90), return_tensors="pt")
    assert tuple(batch["pixel_values"].shape) == (1, 3, *expected) and batch["pixel_mask"].all()
    assert batch["pixel_mask"].is_contiguous(), "loaders copy it into pinned memory, and users write into it"
    assert tuple(FADenseImageProcessor()(draw(60, 90), size=size)["pixel_values"].shape) == (1, 3, *expected)


@pytest.mark.parametrize("kept", [{}, {"do_rescale": False}, {"do_normalize": False}])
def test_values_are_rescaled_and_normalised(kept):
    images = [draw(9, 12), draw(13, 7)]
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in ([0.1, 0.2, 0.3], [1.0, 2.0, 0.25]))
    batch = FADenseImageProcessor(image_mean=mean.tolist(), image_std=std.tolist(), **kept)(images)["pixel_values"]
    scale = 1.0 if "do_rescale" in kept else 1 / 255
    mean, std = (0 * mean, 0 * std + 1) if "do_normalize" in kept else (mean, std)
    for values, image in zip(batch, images, strict=True):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        product, shift = pixels * (scale / std), -mean / std
        inside = values[:, : image.height, : image.width].permute(1, 2, 0)
        # Half a unit of float32 for each of factor, shift, product and sum.
        bound = 2.0**-24 * (3 * product + 2 * shift.abs())
        assert ((inside - (product + shift)).abs() <= bound * 1.01).all()


@pytest.mark.parametrize("rows", [1, 4, 13, 50])
def test_strips_of_a_picture_have_the_values_of_the_formula_to_the_last_bit(rows, monkeypatch):
    monkeypatch.setattr(fa_pictures, "STRIP_NUMBERS", 3 * 7 * rows)
    images = [draw(13, 7), draw(9, 12)]
    before = [image.tobytes() for image in images]
    batch = FADenseImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 0.25])(images)["pixel_values"]
    factors, shifts = torch.tensor([1 / 255, 1 / 510, 4 / 255]), torch.tensor([-0.1, -0.1, -1.2])
    for values, image, pixels in zip(batch, images, before, strict=True):
        values = values[:, : image.height, : image.width].permute(1, 2, 0)
        whole = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(values.shape)
        assert torch.equal(values, whole.float() * factors + shifts) and image.tobytes() == pixels


@pytest.mark.parametrize("processor", [FADenseImageProcessor, FAViTImageProcessor, FAStereoImageProcessor])
def test_one_mean_and_deviation_hold_for_all_channels_and_a_deviation_of_0_is_named(processor):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    images = [(image, image)] if processor is FAStereoImageProcessor else image
    three, one = (
        processor(image_mean=[0.25] * count, image_std=[0.5] * count)(images, return_tensors="pt")["pixel_values"]
        for count in (3, 1)
    )
    assert torch.equal(one, three)
    with pytest.raises(ValueError, match="`image_std` must not have a 0"):
        processor(image_std=[0.5, 0, 0.5])(images)
    with pytest.raises(ValueError, match="`image_mean` must be one number or three"):
        processor(image_mean=[0.5, 0.5])(images)


def test_a_batch_is_padded_on_the_right_and_bottom():
    images = [draw(30, 50), draw(64, 20), draw(30, 50)]
    processor = FADenseImageProcessor()
    batch = processor(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, 64, 50)
    for index, image in enumerate(images):
        alone = processor(image, return_tensors="pt")["pixel_values"][0]
        inside = batch["pixel_values"][index, :, : image.height, : image.width]
        assert torch.equal(inside, alone) and batch["pixel_mask"][index].sum() == image.height * image.width
        assert batch["pixel_mask"][index, : image.height, : image.width].all()
        assert not batch["pixel_values"][index, :, batch["pixel_mask"][index] == 0].any()
    with pytest.raises(ValueError, match="`do_pad`"):
        FADenseImageProcessor(do_pad=False)(images)


def test_masks_of_both_processors_are_of_truth_values():
    image = draw(32, 48)
    for processor, images in ((FADenseImageProcessor(), image), (FAStereoImageProcessor(), (image, image))):
        assert processor(images, return_tensors="pt")["pixel_mask"].dtype == torch.bool
        assert processor(images, return_tensors="np")["pixel_mask"].dtype == bool


def test_every_kind_of_image_gives_the_same_pixels():
    image = draw(13, 17)
    array = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(13, 17, 3)
    processor = FADenseImageProcessor()
    expected = processor(image)["pixel_values"]
    for other in (array, array.numpy(), array.permute(2, 0, 1), image.convert("RGBA")):
        assert torch.equal(processor(other)["pixel_values"], expected)
    grey = processor(draw(13, 17, "L"))["pixel_values"]
    plane = torch.frombuffer(bytearray(draw(13, 17, "L").tobytes()), dtype=torch.uint8).view(13, 17)
    assert torch.equal(processor(plane)["pixel_values"], grey)
    assert processor(image, return_tensors="np")["pixel_values"].shape == (1, 3, 13, 17)


def test_a_picture_that_its_tag_turns_is_turned():
    image = draw(13, 17)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6  # turn it by 90 degrees to the right to look at it
    assert torch.equal(*(FADenseImageProcessor()(one)["pixel_values"] for one in (image, turned)))


@pytest.mark.parametrize(
    "image",
    [Image.new("I;16", (4, 4)), Image.new("F", (4, 4)), torch.zeros(4, 4, 3), torch.zeros(4, 4, 5).byte(), "a.png"],
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match="image"):
        FADenseImageProcessor()(image)


@pytest.mark.parametrize("size", [{}, {"height": 3, "width": 4}, {"longest_edge": 0}, 224, {"shortest_edge": 1.5}])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="`size`"):
        FADenseImageProcessor(size=size)
    with pytest.raises(ValueError, match="`do_flip`"):
        FADenseImageProcessor()(draw(4, 4), do_flip=True)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_labels_are_fractions_of_the_image_with_the_masks_tight_boxes(scale):
    boxes = {"boxes": [[0.25, 0.4375, 0.3, 0.375]]}  # of 100 x 80 pixels, whatever they are scaled to
    entry = {"image_id": 3, "annotations": [annotation()]}
    images = [draw(80, 100), draw(40, 300)]
    batch = FADenseImageProcessor(size={"shortest_edge": 80 * scale})(images, [entry, {"annotations": []}])
    labels, empty = batch["labels"]
    assert labels["boxes"].tolist() == [pytest.approx(boxes["boxes"][0])]
    assert labels["size"].tolist() == [80 * scale, 100 * scale] and labels["orig_size"].tolist() == [80, 100]
    assert labels["class_labels"].tolist() == [1] and labels["image_id"].tolist() == [3]
    assert labels["masks"].shape == (1, 80 * scale, 100 * scale) and labels["masks"].sum() == 900 * scale**2
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 80 * scale, 600 * scale)


def test_without_segmentations_there_are_boxes_cut_to_the_image():
    entry = {"annotations": [annotation(bbox=[-10, 60.5, 30, 100], segmentation=None), annotation()]}
    labels = FADenseImageProcessor()(draw(80, 100), entry)["labels"][0]
    assert "masks" not in labels
    assert labels["boxes"][0].tolist() == pytest.approx([0.1, (60.5 + 80) / 160, 0.2, 19.5 / 80])
    with pytest.raises(ValueError, match="`segmentation` of annotation 7"):
        FADenseImageProcessor()(draw(80, 100), entry, return_segmentation_masks=True)


def test_crowds_are_ignored_regions_and_what_shrinks_away_keeps_a_pixel():
    tiny = annotation(segmentation=[[50, 60, 50.3, 60, 50.3, 60.3]], bbox=[50, 60, 0.3, 0.3])
    crowd = annotation(iscrowd=1, segmentation=encode_mask(random_mask(80, 100, 0).numpy()))
    entry = {"annotations": [annotation(), crowd, tiny]}
    labels = FADenseImageProcessor(size={"longest_edge": 25})(draw(80, 100), entry)["labels"][0]
    assert labels["class_labels"].tolist() == [1, 1] and labels["masks"].flatten(1).sum(1)[1] == 1
    assert labels["boxes"][1].tolist() == pytest.approx([12.5 / 25, 15.5 / 20, 1 / 25, 1 / 20])
    assert labels["ignore"].shape == (20, 25) and 0 < labels["ignore"].sum() < 500
    boxed = FADenseImageProcessor()(draw(80, 100), {"annotations": [annotation(iscrowd=1, segmentation=None)]})
    assert tight_boxes(boxed["labels"][0]["ignore"][None].numpy()).tolist() == [[10, 20, 40, 50]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bbox": [200, 20, 30, 30]}, "`bbox` of annotation 7, .* covers nothing"),
        ({"bbox": [10, 20, 0, 30]}, "`bbox` of annotation 7, .* covers nothing"),
        ({"bbox": [10, 20, math.nan, 30]}, "`bbox` of annotation 7, .* covers nothing"),
        ({"bbox": [10, 20, 30]}, "`bbox` of annotation 7 must be"),
        (
            {"segmentation": [[1, 2, 3, 4]]},
            "`segmentation` of annotation 7: a polygon needs",
        ),
        ({"segmentation": {"size": [100, 80], "counts": [8000]}}, "`segmentation` of annotation 7 has the size"),
        (
            {"segmentation": {"size": [80, 100], "counts": [10, 20]}},
            "`segmentation` of annotation 7: the counts",
        ),
    ],
)
def test_annotations_that_do_not_fit_are_errors_that_name_them(fields, message):
    with pytest.raises(ValueError, match=message):
        FADenseImageProcessor()(draw(80, 100), {"annotations": [annotation(**fields)]})
    with pytest.raises(ValueError, match="`annotations` must be one for each of 1 images"):
        FADenseImageProcessor()(draw(80, 100), [])


def make_outputs(sizes: list[tuple[int, int]], queries: int = 3) -> FADenseOutput:
    """Outputs for a padded batch: each query's logits rise to the right within a window, and overlap the next one's."""
    height, width = (max(-(-side // 4) for side in sides) for sides in zip(*sizes, strict=True))
    logits = torch.full((len(sizes), queries, 2), -20.0)
    masks = torch.full((len(sizes), queries, height, width), -20.0)
    for index, query in itertools.product(range(len(sizes)), range(queries)):
        logits[index, query, query % 2] = 3.0 - query
        generator = torch.Generator().manual_seed(query)
        masks[index, query, 1:5, 2 + query : 7 + query] = 4 * torch.randn(4, 5, generator=generator)
    boxes = torch.tensor([0.5, 0.25, 0.5, 0.25]).expand(len(sizes), queries, 4)
    return FADenseOutput(logits=logits, pred_boxes=boxes, pred_masks=masks, image_sizes=torch.tensor(sizes))


def test_boxes_come_back_in_pixels_of_each_images_own_size():
    outputs = make_outputs([(24, 40), (40, 24)])
    processor = FADenseImageProcessor()
    first, second = processor.post_process_object_detection(outputs, 0.8, [(240, 400), (40, 24)])
    assert first["boxes"].tolist() == [[100.0, 30.0, 300.0, 90.0]] * 2 and second["boxes"][0].tolist() == [6, 5, 18, 15]
    assert first["labels"].tolist() == [0, 1] and first["scores"].tolist() == pytest.approx([0.952574, 0.880797])
    assert processor.post_process_object_detection(outputs, 0.99)[0]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("target", [(24, 40), (23, 37), (71, 120), (12, 9), (5, 5)])
def test_masks_at_any_size_are_the_interpolated_logits_of_their_window(target):
    outputs = make_outputs([(24, 40), (40, 24)])
    result = FADenseImageProcessor().post_process_instance_segmentation(
        outputs, 0.1, 0.3, target_sizes=[target, (40, 24)], return_coco_rle=True
    )[0]
    assert [info["label_id"] for info in result["segments_info"]] == [0, 1, 0]
    for query, rle in enumerate(result["segmentation"]):
        mask = torch.from_numpy(decode_mask(rle).copy())
        assert tuple(mask.shape) == target
        window = outputs.pred_masks[0, query, 1:5, 2 + query : 7 + query].double()
        for row, column in itertools.product(range(target[0]), range(target[1])):
            y, x = (row + 0.5) * 24 / target[0] / 4, (column + 0.5) * 40 / target[1] / 4  # in places
            value = -20.0
            if 1 <= y < 5 and 2 + query <= x < 7 + query:
                y, x = min(max(y - 1.5, 0), 3), min(max(x - 2.5 - query, 0), 4)
                (i, u), (j, v) = ((int(z), z - int(z)) for z in (y, x))
                corners = window[[[i], [min(i + 1, 3)]], [[j, min(j + 1, 4)]]].tolist()
                top, bottom = (one + v * (other - one) for one, other in corners)
                value = top + u * (bottom - top)
            if abs(value - math.log(0.3 / 0.7)) > 1e-4:
                assert mask[row, column].item() == (value > math.log(0.3 / 0.7))


def test_the_map_shows_the_surest_object_of_each_pixel():
    outputs = make_outputs([(24, 40)])
    processor = FADenseImageProcessor()
    whole = processor.post_process_instance_segmentation(outputs, 0.1)[0]
    single = processor.post_process_instance_segmentation(outputs, 0.1, return_coco_rle=True)[0]
    masks = [torch.from_numpy(decode_mask(rle).copy()) for rle in single["segmentation"]]
    expected = torch.zeros(24, 40, dtype=torch.int32)
    for number, mask in reversed(list(enumerate(masks, start=1))):
        expected[mask] = number
    assert torch.equal(whole["segmentation"], expected) and (masks[0] & masks[1]).any()
    assert [info["id"] for info in whole["segments_info"]] == [1, 2, 3]
    assert whole["segments_info"] == single["segments_info"]


def test_pictures_that_train_are_computed_plane_by_plane():
    model = FADenseForObjectDetection(FADenseConfig(num_labels=2))
    seen = []
    hook = model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    pixels = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    for records in (True, False):
        with torch.set_grad_enabled(records):
            model(pixels)
    hook.remove()
    assert seen == [True, False], "torch's backward pass damages memory where channels lie side by side"
