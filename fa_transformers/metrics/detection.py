"""Average precision of boxes and masks as COCO defines it, over the predictions of one or several processes.

The matching is faster-coco-eval's (extra `dense`), which equals pycocotools. What it would score wrong without a word
is kept from it: objects with the id 0, results with a box and a mask, results of an image that isn't there, run lengths
that don't add up.

Source: Lin et al. 2014, arXiv:1405.0312, and the evaluation code that belongs to it.
"""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..models.fa_rle import compress_runs, mask_size, run_lengths

MAX_DETECTIONS = 100
"""Predictions of an image and class that count, those of highest score: COCO's number."""
AREA_RANGES = ("all", "small", "medium", "large")
"""COCO's ranges of the true area: below 32², up to 96², and beyond, in square pixels of the file's image."""


@dataclass(frozen=True)
class Detections:
    """The predictions for one image of n objects.

    Args:
        image_id: the id of the image in the data.
        scores: [n], larger is surer.
        labels: [n] indices of classes.
        boxes: [n, 4] as (left, top, right, bottom) in pixels of the image as it is in the file.
        rles: n masks of the image's full size as COCO's run-length code; None where there are only boxes.
    """

    image_id: int | str
    scores: Sequence[float] | np.ndarray
    labels: Sequence[int] | np.ndarray
    boxes: Sequence[Sequence[float]] | np.ndarray
    rles: Sequence[Mapping[str, Any]] | None = None


class Truth(Protocol):
    """The true objects of one image, as `data.readers.coco.DenseImage` has them."""

    @property
    def image_id(self) -> int | str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def areas(self) -> np.ndarray: ...
    @property
    def is_crowd(self) -> np.ndarray: ...
    @property
    def rles(self) -> Sequence[Mapping[str, Any]] | None: ...


def detection_scores(
    predictions: Iterable[Detections], truths: Sequence[Truth], class_names: Sequence[str]
) -> dict[str, Any]:
    """Return COCO's average precisions, from 0 to 1, of all predictions for all images.

    With several processes gather the lists of all (`accelerate.utils.gather_object`) and hand over the whole: an image
    that comes twice, because a sampler has filled up the last batch with it, counts once.

    Returns:
        `box_ap` (mean over overlaps from 0.50 to 0.95), `box_ap50`, `box_ap75`, `box_ap_small`, `box_ap_medium`,
        `box_ap_large`, and where the truths have masks the same with `mask_`; `per_class`: rows of label, support (true
        objects, crowds not counted), ap and ap50 of boxes and masks. A score is None where no object is in question.

    Raises:
        ImportError: faster-coco-eval is not installed.
        ValueError: an image has no entry among the predictions (one without objects has an empty one), an entry's image
            is not among the truths, or its scores, labels, boxes or masks can't be right.
    """
    by_image = {truth.image_id: truth for truth in truths}
    if len(by_image) < len(truths):
        raise ValueError("truths have two images of one image_id: give every image an id of its own.")
    found: dict[int | str, Detections] = {}
    for entry in predictions:
        if entry.image_id not in by_image:
            raise ValueError(f"predictions are for an image {entry.image_id!r}, which is not among the truths.")
        found.setdefault(entry.image_id, entry)
    missing = [image_id for image_id in by_image if image_id not in found]
    if missing:
        raise ValueError(
            f"predictions lack {len(missing)} of {len(truths)} images, first {missing[0]!r}: gather those of all "
            "processes, and give an image without predictions an empty entry."
        )
    has_masks = bool(truths) and all(truth.rles is not None for truth in truths)
    for entry in found.values():
        _check(entry, by_image[entry.image_id], len(class_names), has_masks)
    scores: dict[str, Any] = {}
    supports = np.zeros(len(class_names), dtype=int)
    for truth in truths:
        np.add.at(supports, np.asarray(truth.labels)[~np.asarray(truth.is_crowd, dtype=bool)], 1)
    rows = [{"label": name, "support": int(n)} for name, n in zip(class_names, supports, strict=True)]
    for kind in ("box", "mask") if has_masks else ("box",):
        precision = _precision(kind, found, truths, len(class_names))
        scores |= _summarize(kind, precision)
        for index, row in enumerate(rows):
            row |= {f"{kind}_ap": _mean(precision[:, :, index, 0]), f"{kind}_ap50": _mean(precision[0, :, index, 0])}
    return scores | {"per_class": rows}


def check_evaluator() -> None:
    """Raise ImportError, which says what to install, where faster-coco-eval is missing."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ImportError(
            "Scoring detections needs faster-coco-eval, which is not installed: pip install 'fa_transformers[dense]'"
        )


def _check(entry: Detections, truth: Truth, num_classes: int, has_masks: bool) -> None:
    """Raise ValueError, naming the image, where predictions can't be right."""
    where = f"the predictions for image {entry.image_id!r}"
    scores, labels = np.asarray(entry.scores, dtype=float), np.asarray(entry.labels)
    boxes = np.asarray(entry.boxes, dtype=float).reshape(-1, 4)
    masks = len(scores) if entry.rles is None else len(entry.rles)
    if not len(scores) == len(labels) == len(boxes) == masks:
        raise ValueError(f"{where} are {len(scores)} scores, {len(labels)} labels, {len(boxes)} boxes, {masks} masks.")
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise ValueError(f"{where} have a score or a box that is not finite: the training has diverged.")
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"{where} have the label {labels.max()}, and there are {num_classes} classes.")
    if has_masks and entry.rles is None:
        raise ValueError(f"{where} have no masks, and the true objects have: give `rles`, or truths without them.")
    for rle in entry.rles or ():
        try:
            size = mask_size(rle)
            run_lengths(rle)  # one that doesn't add up can keep the evaluation busy forever
        except ValueError as error:
            raise ValueError(f"{where} have a broken mask: {error}") from error
        if size != tuple(truth.size):
            raise ValueError(f"{where} have a mask of {list(size)} pixels, and the image has {list(truth.size)}.")


def _precision(
    kind: str, found: Mapping[int | str, Detections], truths: Sequence[Truth], num_classes: int
) -> np.ndarray:
    """Precision [overlaps, recalls, classes, areas] at `MAX_DETECTIONS`; -1 where there is no such object."""
    check_evaluator()
    from faster_coco_eval import COCO, COCOeval_faster

    def say_nothing(*_: Any) -> None:
        pass

    truth = COCO(_as_coco(kind, truths, num_classes), print_function=say_nothing)
    results = truth.loadRes(_as_results(kind, found, truths))
    evaluation = COCOeval_faster(
        truth, results, {"box": "bbox", "mask": "segm"}[kind], print_function=say_nothing, rle_iou_max_workers=1
    )
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[..., -1]


def _as_coco(kind: str, truths: Sequence[Truth], num_classes: int) -> dict[str, Any]:
    """Truths as the content of a COCO file; ids begin with 1, because an object with the id 0 is never matched."""
    annotations: list[dict[str, Any]] = []
    for image_number, truth in enumerate(truths, start=1):
        for index, (left, top, right, bottom) in enumerate(np.asarray(truth.boxes, dtype=float).reshape(-1, 4)):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_number,
                "category_id": int(truth.labels[index]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": float(truth.areas[index]),
                "iscrowd": int(truth.is_crowd[index]),
            }
            if kind == "mask" and truth.rles is not None:
                annotation["segmentation"] = _as_bytes(truth.rles[index])
            annotations.append(annotation)
    images = [
        {"id": number, "height": int(truth.size[0]), "width": int(truth.size[1])}
        for number, truth in enumerate(truths, start=1)
    ]
    categories = [{"id": index + 1, "name": str(index)} for index in range(num_classes)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _as_results(kind: str, found: Mapping[int | str, Detections], truths: Sequence[Truth]) -> list[dict[str, Any]]:
    """Predictions as the rows of a COCO result file; a mask comes without a box, from which its area would be taken."""
    rows = []
    for image_number, truth in enumerate(truths, start=1):
        entry = found[truth.image_id]
        for index, (left, top, right, bottom) in enumerate(np.asarray(entry.boxes, dtype=float).reshape(-1, 4)):
            row: dict[str, Any] = {
                "image_id": image_number,
                "category_id": int(entry.labels[index]) + 1,
                "score": float(entry.scores[index]),
            }
            if kind == "box":
                row["bbox"] = [left, top, right - left, bottom - top]
            elif entry.rles is not None:
                row["segmentation"] = _as_bytes(entry.rles[index])
            rows.append(row)
    return rows


def _as_bytes(rle: Mapping[str, Any]) -> dict[str, Any]:
    """An RLE with counts of bytes, as the evaluation takes them."""
    counts = rle["counts"]
    if not isinstance(counts, str | bytes):
        counts = compress_runs(counts)
    return {"size": list(rle["size"]), "counts": counts.encode("ascii") if isinstance(counts, str) else counts}


def _summarize(kind: str, precision: np.ndarray) -> dict[str, float | None]:
    overall = {"ap": precision[..., 0], "ap50": precision[0, ..., 0], "ap75": precision[5, ..., 0]}
    by_area = {f"ap_{name}": precision[..., index] for index, name in enumerate(AREA_RANGES) if index}
    return {f"{kind}_{name}": _mean(values) for name, values in (overall | by_area).items()}


def _mean(precision: np.ndarray) -> float | None:
    """Mean precision where there are objects; None where there is none."""
    values = precision[precision > -1]
    return float(values.mean()) if len(values) else None
