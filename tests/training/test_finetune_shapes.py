"""Protects fine-tuning on images of many shapes: a saved folder's pipeline sees what the run's evaluation saw."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from test_finetune import image_flags, run, small_images  # noqa: F401
from transformers import AutoImageProcessor, pipeline

from fa_transformers import convert_checkpoint
from fa_transformers.data.examples import ImageExamples


def check_pipeline(folder: Path, picture: Path, shape: tuple[int, int]) -> None:
    """Compare the pipeline's answer to a picture with the model's on the example that training sees."""
    classify = pipeline("image-classification", str(folder), trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    images = datasets.Dataset.from_dict({"image": [str(picture)]}).cast_column("image", datasets.Image())
    pixels = ImageExamples(images, processor, 16)[0]["pixel_values"]
    assert pixels.shape == (3, *shape)
    probabilities = classify.model(pixels[None]).logits[0].softmax(0).tolist()
    answer = {row["label"]: row["score"] for row in classify(str(picture))}
    expected = dict(zip(classify.model.config.id2label.values(), probabilities, strict=True))
    assert answer == pytest.approx(expected, abs=2.0**-20)


def draw(path: Path, size: tuple[int, int]) -> Path:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def test_images_of_many_shapes_are_trained_on_and_a_pipeline_sees_them_alike(tmp_path):
    flags = image_flags(tmp_path)
    folder = tmp_path / "images"
    for index, size in enumerate([(20, 300), (90, 30), (2, 50), (30, 40)]):
        draw(folder / ("dark", "light")[index % 2] / f"shape-{index}.png", size)
    results = run(*flags, "--max_steps", 3, "--random_crop")
    assert results["num_examples"] >= 2
    saved = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (saved["image_processor_type"], saved["image_size"], saved["patch_size"]) == ("FAViTImageProcessor", 32, 8)
    assert "in their own shape, at most as many as 32 x 32 px have" in (tmp_path / "out/README.md").read_text()
    check_pipeline(tmp_path / "out", folder / "dark" / "shape-0.png", (8, 8 * 15))


@pytest.mark.slow
def test_images_are_squashed_where_that_is_asked_for(tmp_path):
    flags = image_flags(tmp_path)
    run(*flags, "--max_steps", 1)
    squashing = [*flags, "--model_name_or_path", tmp_path / "out", "--max_steps", 1, "--square"]
    run(*squashing, "--output_dir", tmp_path / "squashed")
    saved = json.loads((tmp_path / "squashed/preprocessor_config.json").read_text())
    assert saved["image_processor_type"].startswith("ViTImageProcessor")
    assert saved["size"] == {"height": 32, "width": 32}
    assert "resized to 32 x 32 px, whatever their shape" in (tmp_path / "squashed/README.md").read_text()
    check_pipeline(tmp_path / "squashed", draw(tmp_path / "long.png", (20, 300)), (32, 32))


@pytest.mark.slow
def test_dinov2_sees_a_photograph_of_any_shape_alike_in_a_pipeline_and_in_training(dinov2, tmp_path):
    from sklearn.datasets import load_sample_image

    conversion = convert_checkpoint(
        dinov2,
        output_dir=tmp_path / "out",
        auto_class="AutoModelForImageClassification",
        num_labels=2,
        image_size=112,
        key_feature_size=128,
    )
    assert conversion.processor.num_patches == 64
    photo = load_sample_image("china.jpg")
    for name, part, grid in (("wide", photo[:40, :600], (2, 30)), ("tall", photo[:, :100], (16, 4))):
        Image.fromarray(part).save(tmp_path / f"{name}.png")
        assert conversion.processor.grid_of(*part.shape[:2]) == grid
        check_pipeline(tmp_path / "out", tmp_path / f"{name}.png", (14 * grid[0], 14 * grid[1]))
