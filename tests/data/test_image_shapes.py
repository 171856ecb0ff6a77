"""Protects batches of images of many shapes: one grid of patches a batch, all images in one batch, crops in the grid of
their image, and answers that don't depend on the batch.
"""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from tiny_models import EXACT, build

from fa_transformers.data.batching import LengthGroupedBatchSampler, grouped_batches
from fa_transformers.data.collators import ImageCollator
from fa_transformers.data.examples import ImageExamples
from fa_transformers.data.readers.images import read_sizes
from fa_transformers.models import FAViTConfig, FAViTForImageClassification, FAViTImageProcessor

SIZES = [(30, 40), (40, 30), (9, 9), (30, 41), (20, 90), (60, 80), (31, 40), (1, 50)]


def draw(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8))


def rows(images: list) -> datasets.Dataset:
    columns = {"image": images, "label": [number % 2 for number in range(len(images))]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_sizes_are_those_of_the_upright_images_in_files_and_in_memory(tmp_path):
    turned, file = draw((30, 50)), BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 8
    turned.save(file, format="JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(file.getvalue())
    draw((7, 8)).save(tmp_path / "plain.png")
    stored = [str(tmp_path / "turned.jpg"), str(tmp_path / "plain.png")]
    for images in (rows(stored), rows([{"bytes": file.getvalue(), "path": None}, {"bytes": None, "path": stored[1]}])):
        assert read_sizes(images) == [(50, 30), (7, 8)]
        assert [image.size[::-1] for image in images["image"]] == [(50, 30), (7, 8)]


def test_what_stands_behind_the_pixels_of_a_png_turns_it_and_no_other_is_decoded(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>'
    behind = {"exif": (b"eXIf", exif.tobytes()[6:]), "xmp": (b"iTXt", xmp), "date": (b"tEXt", b"date:create\0now")}
    stored = []
    for name, (kind, content) in behind.items():
        file = BytesIO()
        draw((30, 50)).save(file, format="PNG")
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        end = file.getvalue().rindex(b"IEND") - 4
        stored.append(tmp_path / f"{name}.png")
        stored[-1].write_bytes(file.getvalue()[:end] + chunk + file.getvalue()[end:])
    images = rows([str(path) for path in stored])
    upright = [image.size[::-1] for image in images["image"]]
    decoded = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: decoded.append(self.filename) or load(self))
    assert read_sizes(images) == upright == [(50, 30), (50, 30), (30, 50)]
    assert {Path(name).stem for name in decoded} == {"exif", "xmp"}


def test_every_image_keeps_its_shape_also_where_it_is_cropped():
    processor = FAViTImageProcessor(32, 8)
    images = rows([draw(size) for size in SIZES])
    plain, cropped = (ImageExamples(images, processor, 16, random_crop=crop, seed=3) for crop in (False, True))
    for index, size in enumerate(SIZES):
        grid = processor.grid_of(*size)
        for examples in (plain, cropped):
            assert examples[index]["pixel_values"].shape == (3, 8 * grid[0], 8 * grid[1])
            assert examples.lengths[index] == grid[0] * grid[1] <= 16
    alike = ImageExamples(rows([draw((9, 9)), draw((50, 50))]), processor, 16)
    assert alike.kinds is None and alike.lengths == [16, 16]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_batch_has_one_kind_and_an_epoch_every_example_once(group_by_length, num_processes):
    kinds = np.random.default_rng(1).integers(0, 5, 60)
    options = {"num_processes": num_processes, "group_by_length": group_by_length, "seed": 2}
    sampler = LengthGroupedBatchSampler([16] * 60, 4, kinds=kinds, **options)
    orders = []
    for epoch in range(2):
        batches = sampler.batches(epoch)
        assert all(len(set(kinds[batch])) == 1 and len(batch) <= 4 for batch in batches)
        assert sorted(sum(batches, [])) == list(range(60)) and len(batches) % num_processes == 0
        orders.append(batches)
    assert orders[0] != orders[1]
    others = LengthGroupedBatchSampler([16] * 60, 4, kinds=np.roll(kinds, 1), **options)
    assert others.settings != sampler.settings and LengthGroupedBatchSampler([16] * 60, 4).kinds is None


def test_too_few_examples_are_shared_out_by_joining_those_of_a_kind_or_refused():
    sampler = LengthGroupedBatchSampler([4, 4, 4], 1, kinds=[0, 1, 0], num_processes=2)
    assert sorted(map(sorted, sampler.batches(0))) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="3 batches can't be shared by 2 processes: .*--square"):
        LengthGroupedBatchSampler([4, 4, 4], 1, kinds=[0, 1, 2], num_processes=2).batches(0)


def test_answers_do_not_depend_on_the_batch():
    model = build(FAViTConfig, FAViTForImageClassification, image_size=32, patch_size=8, local_window=1).double()
    examples = ImageExamples(rows([draw(size) for size in SIZES]), FAViTImageProcessor(32, 8), 16)
    seen = []
    with torch.no_grad():
        for indices, batch in grouped_batches(examples, ImageCollator(), 4, None, torch.device("cpu")):
            together = model(batch["pixel_values"].double()).logits
            for row, index in enumerate(indices):
                alone = model(examples[index]["pixel_values"][None].double()).logits
                torch.testing.assert_close(together[row : row + 1], alone, **EXACT)
            seen.append(indices)
    assert sorted(sum(seen, [])) == list(range(len(SIZES))) and max(map(len, seen)) > 1
