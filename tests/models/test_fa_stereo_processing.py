"""Protects the way of stereo pairs into FAStereo and back: normalization, padding, sizes, metres, and the pipeline."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from stereo_sets import SMALL
from tiny_models import randomize
from transformers import AutoImageProcessor, pipeline

from fa_transformers.models import (
    FAStereoConfig,
    FAStereoForDepthEstimation,
    FAStereoImageProcessor,
    FAStereoPipeline,
)

RANDOM = np.random.default_rng(0)


def make_pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(RANDOM.integers(0, 256, (2, height, width, 3), dtype=np.uint8))


def test_images_are_normalized_and_nothing_else():
    left, right = make_pair(7, 9)
    processor = FAStereoImageProcessor(image_mean=(0.5, 0.25, 0.0), image_std=(0.5, 1.0, 2.0))
    inputs = processor((left, right), return_tensors="pt")
    expected = (np.stack([left, right]) / 255 - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    # float32 numbers up to 2, each of three operations.
    assert np.abs(inputs["pixel_values"][0].permute(0, 2, 3, 1).numpy() - expected).max() <= 8 * 2**-23
    assert inputs["pixel_values"].shape == (1, 2, 3, 7, 9) and inputs["pixel_mask"].all()


def test_every_kind_of_image_gives_the_same_values():
    left, right = make_pair(6, 8)
    processor = FAStereoImageProcessor()
    expected = processor((left, right))["pixel_values"]
    kinds = [Image.fromarray, lambda image: torch.from_numpy(image).permute(2, 0, 1)]
    for kind in kinds:
        assert np.array_equal(processor((kind(left), kind(right)))["pixel_values"], expected)
    grey = left[:, :, 0]
    assert np.array_equal(
        processor((grey, grey))["pixel_values"], processor((np.stack([grey] * 3, axis=2),) * 2)["pixel_values"]
    )


def test_a_batch_of_several_sizes_is_padded_at_the_right_and_the_bottom():
    pairs = [make_pair(7, 9), make_pair(10, 5)]
    processor = FAStereoImageProcessor()
    inputs = processor(pairs)
    assert inputs["pixel_values"].shape == (2, 2, 3, 10, 9)
    for index, pair in enumerate(pairs):
        height, width = pair[0].shape[:2]
        mask = np.zeros((10, 9), bool)
        mask[:height, :width] = True
        assert np.array_equal(inputs["pixel_mask"][index].astype(bool), mask)
        alone = processor(pair)["pixel_values"][0]
        assert np.array_equal(inputs["pixel_values"][index][:, :, :height, :width], alone)


def test_a_scale_is_undone_and_disparities_grow_with_the_width():
    processor = FAStereoImageProcessor(scale_factor=0.5)
    inputs = processor([make_pair(20, 31), make_pair(11, 40)])
    assert inputs["pixel_values"].shape == (2, 2, 3, 10, 20)
    outputs = SimpleNamespace(predicted_depth=torch.full((2, 10, 20), 3.0))
    results = processor.post_process_disparity(outputs, [(20, 31), (11, 40)])
    # Half of 31 pixels are 16 (to even), half of 40 are 20.
    for result, size, factor in zip(results, [(20, 31), (11, 40)], [31 / 16, 2.0], strict=True):
        assert result["disparity"].shape == size
        torch.testing.assert_close(result["disparity"], torch.full(size, 3.0 * factor))
    assert "depth" not in results[0]
    plain = FAStereoImageProcessor().post_process_disparity(outputs)
    assert all(torch.equal(result["disparity"], torch.full((10, 20), 3.0)) for result in plain)


def test_depths_are_focal_length_times_baseline_over_disparity():
    outputs = SimpleNamespace(predicted_depth=torch.tensor([[[10.0, 40.0, 0.0]]]))
    processor = FAStereoImageProcessor()
    (result,) = processor.post_process_disparity(outputs, focal_length=1000.0, baseline=0.2)
    assert result["depth"].tolist() == [[20.0, 5.0, float("inf")]]
    (result,) = processor.post_process_disparity(outputs, focal_length=1000.0, baseline=0.2, doffs=10.0)
    assert result["depth"].tolist() == [[10.0, 4.0, 20.0]]
    for cameras, message in [
        ({"focal_length": 1000.0}, "need both"),
        ({"focal_length": 1000.0, "baseline": 0.0}, "`baseline` must be positive"),
        ({"focal_length": -1.0, "baseline": 1.0}, "`focal_length` must be positive"),
        ({"target_sizes": [(1, 3), (1, 3)]}, "2 sizes for 1 disparity maps"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor.post_process_disparity(outputs, **cameras)


LEFT, RIGHT = make_pair(6, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((LEFT, RIGHT[:, 1:]), "the left image has 8 x 6 pixels and the right one 7 x 6"),
        ([(LEFT, RIGHT), (LEFT,)], "number 2 is none"),
        ([LEFT, RIGHT, LEFT], "number 1 is none"),
        (LEFT, "must be a pair"),
        ([], "must be a pair"),
        ((LEFT / 255, RIGHT / 255), "pair 1, left: an image must have bytes"),
        ((LEFT[:, :, :2], RIGHT[:, :, :2]), "pair 1, left: an image must have bytes"),
        ((LEFT, Image.fromarray(LEFT[:, :, 0].astype(np.uint16))), "pair 1, right: .* more than 8 bits"),
        (("left.png", "right.png"), "pair 1, left: an image must be Pillow's"),
    ],
)
def test_what_is_no_pair_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        FAStereoImageProcessor()(images)


def test_scales_out_of_range_are_refused():
    for scale in (0, -0.5, 1.5, True, float("nan"), "half"):
        with pytest.raises(ValueError, match="`scale_factor` must be"):
            FAStereoImageProcessor(scale_factor=scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stereo")
    torch.manual_seed(0)
    randomize(FAStereoForDepthEstimation(FAStereoConfig(**SMALL))).save_pretrained(folder)
    FAStereoImageProcessor(scale_factor=0.5).save_pretrained(folder)
    return folder


def test_a_saved_processor_loads_and_names_its_code(folder):
    loaded = AutoImageProcessor.from_pretrained(folder)
    assert type(loaded) is FAStereoImageProcessor and loaded.scale_factor == 0.5
    saved = json.loads((folder / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_fa_stereo.FAStereoImageProcessor"}
    assert {"pipeline_fa_stereo.py", "image_processing_fa_stereo.py"} <= {path.name for path in folder.iterdir()}


def test_the_pipeline_gives_what_the_model_gives(folder, tmp_path):
    images = [Image.fromarray(image) for image in make_pair(22, 34)]
    for name, image in zip(("left", "right"), images, strict=True):
        image.save(tmp_path / f"{name}.png")
    model = FAStereoForDepthEstimation.from_pretrained(folder).eval()
    processor = FAStereoImageProcessor.from_pretrained(folder)
    pipe = pipeline("stereo-depth-estimation", model=str(folder), trust_remote_code=True, device="cpu")
    assert type(pipe).__name__ == "FAStereoPipeline"
    cameras = {"focal_length": 500.0, "baseline": 0.1, "doffs": 2.0}
    with torch.no_grad():
        outputs = model(**processor(tuple(images), return_tensors="pt"))
    (expected,) = processor.post_process_disparity(outputs, [(22, 34)], **cameras)
    paths = {name: str(tmp_path / f"{name}.png") for name in ("left", "right")}
    several = pipe([tuple(images), paths], **cameras)
    for result in (pipe(tuple(images), **cameras), pipe(paths, **cameras), *several):
        for name in ("disparity", "depth"):
            torch.testing.assert_close(result[name], expected[name])
        assert result["picture"].mode == "L" and result["picture"].size == (34, 22)
        # Half of the size: a disparity of 32 px is the largest of 16 that the model looks for.
        shares = (expected["disparity"] / 32 * 255).round().numpy()
        assert np.abs(np.asarray(result["picture"], np.float32) - shares).max() <= 1
    assert "depth" not in pipe(tuple(images))
    assert not torch.allclose(pipe(tuple(images), scale_factor=1.0)["disparity"], expected["disparity"])
    pipe.model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["custom_pipelines"] == FAStereoConfig().custom_pipelines


def test_inputs_that_are_no_pair_are_refused_by_the_pipeline(folder):
    model, processor = (
        FAStereoForDepthEstimation.from_pretrained(folder),
        FAStereoImageProcessor.from_pretrained(folder),
    )
    pipe = FAStereoPipeline(model=model, image_processor=processor, device="cpu")
    image = Image.fromarray(LEFT)
    for wrong in (image, [image, image], (image,)):
        with pytest.raises(ValueError, match="A stereo pair is a tuple"):
            pipe(wrong)
    with pytest.raises(ValueError, match='has "left" and "right"'):
        pipe({"left": image})
    with pytest.raises(ValueError, match="a rectified pair has one size"):
        pipe((image, image.resize((7, 6))))
