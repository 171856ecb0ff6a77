"""Small folders in COCO's format: coloured blocks on noise, with masks as RLE, polygons or none."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fa_transformers.models.fa_rle import encode_mask

NAMES = ("cat", "dog")


def write_coco(folder: Path, count: int = 6, size: tuple[int, int] = (48, 64), masks: bool = True, seed: int = 0):
    """Write `folder/train` in Roboflow's layout: pictures of two sizes with two objects each, ids with gaps."""
    random = np.random.default_rng(seed)
    (folder / "train").mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        height, width = size if index % 2 else size[::-1]
        pixels = random.integers(0, 100, (height, width, 3), dtype=np.uint8)
        images.append({"id": 7 * index, "file_name": f"{index}.png", "width": width, "height": height})
        for label in (0, 1):
            top, left = (int(random.integers(side // 2 * label, side // 2 * label + 8)) for side in (height, width))
            mask = np.zeros((height, width), dtype=bool)
            mask[top : top + 12, left : left + 16] = True
            pixels[mask] = (255, 60 * label, 0)
            rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
            box = [int(columns[0]), int(rows[0]), len(columns), len(rows)]
            fields = {"id": len(annotations), "image_id": 7 * index, "category_id": 3 * label + 1, "iscrowd": 0}
            annotation = fields | {"bbox": box, "area": int(mask.sum())}
            annotations.append(annotation | ({"segmentation": encode_mask(mask)} if masks else {}))
        Image.fromarray(pixels).save(folder / "train" / f"{index}.png")
    categories = [{"id": 3 * label + 1, "name": name} for label, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "train" / "_annotations.coco.json"
    path.write_text(json.dumps(content))
    return path
