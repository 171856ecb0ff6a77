"""Protects the shape of images: whole patches, no more pixels than the square's, the aspect of the image, whatever it
was stored as; and the values of the library's own processor, for images of the square's size.
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor

from fa_transformers.conversion.image_processors import fit_image_processor, native_side
from fa_transformers.models import FAViTConfig, FAViTImageProcessor
from fa_transformers.models.image_processing_fa_vit import choose_grid


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_grids_hold_no_more_patches_than_the_square_and_are_nearest_to_the_image():
    random = np.random.default_rng(0)
    for _ in range(500):
        num_patches, (height, width) = int(random.choice([1, 7, 64, 196, 1369])), random.integers(1, 4000, 2).tolist()
        patch = (16, int(random.choice([8, 16, 14])))
        rows, columns = choose_grid(height, width, patch, num_patches)
        assert min(rows, columns) >= 1 and rows * columns <= num_patches
        # Both sides before rounding, in patches: either is a patch away at most, or the image is thinner than a patch.
        wanted = [math.sqrt(num_patches * (height / patch[0]) / (width / patch[1]))]
        wanted.append(num_patches / wanted[0])
        if min(wanted) >= 1:
            assert abs(rows - wanted[0]) <= 1 and abs(columns - wanted[1]) <= 1
        else:
            assert min(rows, columns) == 1 and max(rows, columns) >= num_patches // 2


@pytest.mark.parametrize(
    ("size", "grid"),
    [((9, 9), (16, 16)), ((200, 3000), (4, 61)), ((300, 400), (14, 18)), ((1, 3000), (1, 256)), ((3000, 1), (256, 1))],
)
def test_known_grids_of_224_pixels_in_patches_of_14(size, grid):
    processor = FAViTImageProcessor(224, 14)
    assert processor.grid_of(*size) == grid
    pixels = processor(images=noise(*size), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 14 * grid[0], 14 * grid[1]) and pixels.isfinite().all()


@pytest.mark.parametrize("resample", [2, 3])
def test_square_images_come_out_as_the_library_makes_them(resample):
    fields = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": resample}
    stock = ViTImageProcessor(size={"height": 32, "width": 32}, **fields)
    ours = fit_image_processor(stock, FAViTConfig(image_size=32, patch_size=8))
    for image in (noise(50, 50), noise(32, 32), noise(7, 7)):
        expected, actual = (one(images=image, return_tensors="pt")["pixel_values"] for one in (stock, ours))
        # Bytes, resized alike, times three roundings of float32.
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=4 * 2.0**-23 / 0.2)


def test_images_lie_upright_and_arrays_are_images():
    processor, image = FAViTImageProcessor(32, 8), noise(20, 60)
    turned = image.transpose(Image.Transpose.ROTATE_90)  # as a camera stores it: 6 turns it back
    turned.getexif()[0x0112] = 6
    expected = processor(images=image)["pixel_values"]
    assert expected.shape == (1, 3, 16, 48)
    assert torch.equal(processor(images=turned)["pixel_values"], expected)
    assert torch.equal(processor(images=np.array(image))["pixel_values"], expected)
    assert processor(images=noise(20, 60, "L"))["pixel_values"].shape == expected.shape
    assert processor(images=noise(20, 60), grid=(1, 2))["pixel_values"].shape == (1, 3, 8, 16)


def test_what_cannot_be_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="`image_size` 7 is smaller than a patch of 8"):
        FAViTImageProcessor(7, 8)
    with pytest.raises(ValueError, match="`image_size` must be a positive integer"):
        FAViTImageProcessor(0, 8)
    processor = FAViTImageProcessor(32, 8)
    with pytest.raises(ValueError, match=r"different grids of patches, \[\(2, 6\), \(4, 4\)\]: process those of one"):
        processor(images=[noise(20, 60), noise(9, 9)])
    with pytest.raises(ValueError, match="`size` cannot be set"):
        processor(images=noise(9, 9), size={"height": 8, "width": 8})
    oblong = ViTImageProcessor(size={"height": 32, "width": 64})
    with pytest.raises(ValueError, match="--image_size: the checkpoint's processor says .*no square"):
        native_side(oblong)


def test_the_square_is_what_is_asked_for_and_a_stock_processor_stays_itself():
    config = FAViTConfig(image_size=32, patch_size=8)
    stock = ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=[0.1] * 3)
    assert fit_image_processor(stock, config, square=True) is stock
    assert fit_image_processor(stock, FAViTConfig(image_size=32, patch_size=8, num_channels=1)) is stock
    kept = fit_image_processor(stock, config)
    assert (kept.image_size, kept.patch_size, kept.image_mean, kept.resample) == (48, 8, [0.1] * 3, int(stock.resample))
    assert native_side(kept) == native_side(stock) == 48 and fit_image_processor(kept, config, 64).num_patches == 64
    for processor in (stock, kept):
        for size, shape in ((24, (24, 24)), ((16, 40), (16, 40))):
            squashing = fit_image_processor(processor, config, size, square=True)
            assert type(squashing) is type(stock)
            assert squashing(images=noise(20, 60), return_tensors="pt")["pixel_values"].shape == (1, 3, *shape)


def test_a_saved_folder_has_the_code_and_loads_again(tmp_path):
    FAViTConfig(image_size=32, patch_size=8).save_pretrained(tmp_path)
    FAViTImageProcessor((32, 48), 8, image_mean=[0.25] * 3).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_fa_vit.FAViTImageProcessor"}
    assert {"image_processing_fa_vit.py", "fa_pictures.py"} <= {path.name for path in tmp_path.iterdir()}
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, FAViTImageProcessor) and loaded.num_patches == 24 and loaded.image_mean == [0.25] * 3
