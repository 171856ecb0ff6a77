"""Scores of a detector on whole pictures, whichever process they lie on, and of a guess beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from ..data.readers.objects import DenseImage
from ..evaluation import evaluating
from ..metrics.detection import Detections, detection_scores
from ..models.fa_rle import encode_part

SCORE_FLOOR = 0.01
"""Probability below which an object that was found is left out of the scores."""
GRID = 10
"""Boxes to a side that a guess has."""
PLAIN_SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def find_objects(
    processor: Any, output: Any, images: Sequence[DenseImage], floor: float = SCORE_FLOOR
) -> list[Detections]:
    """Return the objects that a model found, at the pictures' own size; with masks where it has some.

    Args:
        processor: a `FADenseImageProcessor`.
        output: of the model for a batch, in evaluation mode.
        images: the pictures of the batch.
        floor: probability that an object must exceed.
    """
    sizes = [image.size for image in images]
    if output.pred_masks is None:
        found = processor.post_process_object_detection(output, floor, sizes)
        names = ("scores", "labels", "boxes")
        values = [{name: each[name].cpu().numpy() for name in names} for each in found]
        return [Detections(image.image_id, **each) for image, each in zip(images, values, strict=True)]
    results = processor.post_process_instance_segmentation(output, floor, target_sizes=sizes, return_coco_rle=True)
    entries = []
    for image, result in zip(images, results, strict=True):
        info = result["segments_info"]
        scores, labels, boxes = (np.array([one[name] for one in info]) for name in ("score", "label_id", "box"))
        entries.append(Detections(image.image_id, scores, labels, boxes.reshape(-1, 4), result["segmentation"]))
    return entries


def evaluate_dense(
    model: nn.Module,
    processor: BaseImageProcessor,
    loader: DataLoader,
    truths: Sequence[DenseImage],
    class_names: Sequence[str],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return the scores of `detection_scores` for whole pictures, each counted once, with the mean loss.

    Args:
        loader: batches of `DenseExamples` without views over `truths`.
        truths: the pictures, in the examples' order; with masks for instance segmentation alone.
    """
    found: list[tuple[int, Detections, float]] = []
    with evaluating(model):
        for batch in loader:
            output = model(**batch)
            rows = [int(labels["row"]) for labels in batch["labels"]]
            entries = find_objects(processor, output, [truths[row] for row in rows])
            found += [(row, entry, output.loss.item()) for row, entry in zip(rows, entries, strict=True)]
    by_row = {row: (entry, loss) for row, entry, loss in gather_object(found)}  # whose copies fill up a last batch
    scores = detection_scores([entry for entry, _ in by_row.values()], truths, class_names)
    loss = float(np.mean([loss for _, loss in by_row.values()]))
    return scores | {"loss": loss, "num_examples": len(by_row)}


def plain_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of all classes together that have a value."""
    names = [f"{kind}_{name}" for kind in ("box", "mask") for name in PLAIN_SCORES]
    return {name: scores[name] for name in names if scores.get(name) is not None}


def without_masks(images: Sequence[DenseImage]) -> list[DenseImage]:
    """Return pictures whose objects have boxes alone, as detection is scored on."""
    return [replace(image, rles=None, mask_boxes=image.boxes) for image in images]


def score_guess(train: Sequence[DenseImage], truths: Sequence[DenseImage], class_names: Sequence[str]) -> dict:
    """Return the scores of boxes of the training objects' median size on a grid, all of the most frequent class."""
    shapes = [image.boxes[:, 2:] - image.boxes[:, :2] for image in train]
    width, height = np.median(np.concatenate(shapes), axis=0) if sum(map(len, shapes)) else (1.0, 1.0)
    label = int(np.bincount(np.concatenate([image.labels for image in train]), minlength=1).argmax())
    entries = []
    for image in truths:
        y, x = ((np.arange(GRID) + 0.5) * side / GRID for side in image.size)
        centres = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        half = np.array([width, height]) / 2
        limits = np.array(image.size[::-1])
        boxes = np.concatenate([np.clip(centres - half, 0, limits), np.clip(centres + half, 0, limits)], axis=1)
        rles = None if image.rles is None else [box_rle(box, image.size) for box in boxes]
        entries.append(Detections(image.image_id, np.full(len(boxes), 0.5), np.full(len(boxes), label), boxes, rles))
    return plain_scores(detection_scores(entries, truths, class_names))


def box_rle(box: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """Return the mask that fills a box (left, top, right, bottom), run-length encoded at the size of its picture."""
    left, top, right, bottom = (int(side) for side in np.round(box))
    part = np.ones((bottom - top, right - left), dtype=bool)
    return encode_part(part, top, left, *size)


def forward_pictures(model: nn.Module, processor: Any, images: Sequence[DenseImage], floor: float) -> list[Detections]:
    """Return the objects that a model finds in pictures that are read one after another, as a user's would be."""
    entries = []
    with evaluating(model), torch.no_grad():
        for image in images:
            inputs = processor(image.open(), return_tensors="pt").to(model.device)
            entries += find_objects(processor, model(**inputs), [image], floor)
    return entries
