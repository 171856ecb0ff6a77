"""Protects average precision: pycocotools' numbers, right at every trap, alike over any number of processes."""

import contextlib
import functools
import io
from dataclasses import dataclass, replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fa_transformers.metrics.detection import Detections, detection_scores

HEIGHT, WIDTH = 180, 240
NAMES = ["cat", "dog", "bird", "never"]


@dataclass(frozen=True)
class Objects:
    """The true objects of an image."""

    image_id: int | str
    size: tuple[int, int]
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    rles: list | None


def encode(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return rle | {"counts": rle["counts"].decode()}


def disc(random: np.random.Generator, shift: float = 0, around: tuple | None = None) -> tuple:
    """(centre x, centre y, radius x, radius y) of an ellipse, or one near `around`."""
    if around is None:
        radii = np.exp(random.uniform(np.log(4), np.log(100), size=2))
        return (*random.uniform((0, 0), (WIDTH, HEIGHT)), *radii)
    return tuple(np.array(around) + random.normal(size=4) * shift * np.array([*around[2:], *around[2:]]) * 0.3)


def draw(discs: list[tuple]) -> tuple[np.ndarray, list[dict]]:
    """Tight boxes and RLEs of ellipses; those of which nothing is seen have an empty box."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rles = [encode(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1) for cx, cy, rx, ry in discs]
    coco = np.array([coco_mask.toBbox(rle | {"counts": rle["counts"].encode()}) for rle in rles]).reshape(-1, 4)
    return np.concatenate([coco[:, :2], coco[:, :2] + coco[:, 2:]], axis=1), rles


@functools.cache
def random_scenes(count: int = 25, masks: bool = True) -> tuple[list[Objects], list[Detections]]:
    """Images of 0 to 8 objects, some crowds, and predictions: near ones, doubled, of the wrong class, free ones."""
    random = np.random.default_rng(0)
    truths, predictions = [], []
    for index in range(count):
        discs = [disc(random) for _ in range(random.integers(0, 9))]
        labels = random.integers(0, 3, size=len(discs))
        boxes, rles = draw(discs)
        areas = np.array([coco_mask.area(rle | {"counts": rle["counts"].encode()}) for rle in rles], dtype=float)
        crowd = random.random(len(discs)) < 0.15
        image_id = f"picture {index}" if index % 2 else index
        truths.append(Objects(image_id, (HEIGHT, WIDTH), labels, boxes, areas, crowd, rles if masks else None))
        guesses = [(disc(random, 0.3, each), label) for each, label in zip(discs, labels, strict=True)]
        guesses += [(disc(random, 0.1, each), random.integers(0, 4)) for each in discs]
        guesses += [(disc(random), random.integers(0, 4)) for _ in range(random.integers(0, 5))]
        guesses = [guess for guess in guesses if min(guess[0][2:]) > 1]
        guessed_boxes, guessed = draw([each for each, _ in guesses])
        guessed_labels = np.array([label for _, label in guesses], dtype=int)
        scores = np.round(random.random(len(guesses)), 2)  # so that some are equal
        predictions.append(Detections(image_id, scores, guessed_labels, guessed_boxes, guessed if masks else None))
    return truths, predictions


def stats_of_pycocotools(truths: list[Objects], predictions: list[Detections], kind: str) -> list[float]:
    """AP, AP50, AP75, AP small, medium, large."""
    numbers = {truth.image_id: number for number, truth in enumerate(truths, start=1)}
    annotations = [
        {"image_id": numbers[t.image_id], "category_id": int(label) + 1, "area": area, "iscrowd": int(crowd)}
        | {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        | {"segmentation": rle | {"counts": rle["counts"].encode()}}
        for t in truths
        for label, area, crowd, box, rle in zip(t.labels, t.areas, t.is_crowd, t.boxes, t.rles, strict=True)
    ]
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": number, "height": HEIGHT, "width": WIDTH} for number in numbers.values()],
        "annotations": [row | {"id": index} for index, row in enumerate(annotations, start=1)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(NAMES, start=1)],
    }
    rows = [
        {"image_id": numbers[p.image_id], "category_id": int(label) + 1, "score": float(score)}
        | (
            {"segmentation": rle | {"counts": rle["counts"].encode()}}
            if kind == "mask"
            else {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        )
        for p in predictions
        for label, score, box, rle in zip(p.labels, p.scores, p.boxes, p.rles, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), {"mask": "segm", "box": "bbox"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()


def test_the_scores_are_those_of_pycocotools(capfd, caplog):
    truths, predictions = random_scenes()
    with caplog.at_level("INFO"):
        scores = detection_scores(predictions, truths, NAMES)
    printed = capfd.readouterr()
    assert not printed.out and not printed.err and not caplog.records
    for kind in ("box", "mask"):
        names = [f"{kind}_ap{suffix}" for suffix in ("", "50", "75", "_small", "_medium", "_large")]
        actual = [-1.0 if scores[name] is None else scores[name] for name in names]
        assert actual == pytest.approx(stats_of_pycocotools(truths, predictions, kind), abs=1e-12)
        assert 0.1 < scores[f"{kind}_ap"] < 0.9, "neither nothing nor everything is found"
    classes = {row["label"]: row for row in scores["per_class"]}
    assert np.mean([classes[name]["mask_ap"] for name in NAMES[:3]]) == pytest.approx(scores["mask_ap"], abs=1e-12)
    assert classes["never"] == {
        "label": "never",
        "support": 0,
        "box_ap": None,
        "box_ap50": None,
        "mask_ap": None,
        "mask_ap50": None,
    }
    assert sum(row["support"] for row in classes.values()) == sum((~truth.is_crowd).sum() for truth in truths)


def perfect(truths: list[Objects]) -> list[Detections]:
    return [Detections(t.image_id, np.ones(len(t.labels)), t.labels, t.boxes, t.rles) for t in truths]


@pytest.mark.parametrize("masks", [True, False])
def test_perfect_predictions_score_one_and_none_score_zero(masks):
    truths, _ = random_scenes(masks=masks)
    truths = [replace(truth, is_crowd=np.zeros_like(truth.is_crowd)) for truth in truths]
    scores = detection_scores(perfect(truths), truths, NAMES)
    found = {name: score for name, score in scores.items() if name != "per_class"}
    assert len(found) == 12 if masks else 6
    assert set(found.values()) == {1.0}
    nothing = [Detections(truth.image_id, [], [], [], [] if masks else None) for truth in truths]
    scores = detection_scores(nothing, truths, NAMES)
    assert {score for name, score in scores.items() if name != "per_class"} == {0.0}


def test_one_object_in_the_first_image_is_found():
    """The object that other adapters give the id 0, which is never matched."""
    truths, _ = random_scenes()
    first = next(truth for truth in truths if len(truth.labels) and not truth.is_crowd[0])
    first = Objects(
        0, first.size, *(getattr(first, name)[:1] for name in ("labels", "boxes", "areas", "is_crowd", "rles"))
    )
    assert detection_scores(perfect([first]), [first], NAMES)["mask_ap"] == 1.0


def test_images_without_objects_have_no_score():
    empty = Objects("a", (9, 9), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool), [])
    scores = detection_scores([Detections("a", [0.5], [0], [[0, 0, 4, 4]], [encode(np.ones((9, 9)))])], [empty], NAMES)
    assert {score for name, score in scores.items() if name != "per_class"} == {None}


def test_what_several_processes_gather_scores_the_same_in_any_order_and_with_images_twice():
    truths, predictions = random_scenes()
    expected = detection_scores(predictions, truths, NAMES)
    shared = predictions[1::2] + predictions[::2] + predictions[:3]
    assert detection_scores(shared, truths, NAMES) == expected


def test_counts_of_bytes_score_the_same():
    truths, predictions = random_scenes()
    as_bytes = [replace(p, rles=[rle | {"counts": rle["counts"].encode()} for rle in p.rles]) for p in predictions]
    assert detection_scores(as_bytes, truths, NAMES) == detection_scores(predictions, truths, NAMES)


def test_the_small_are_small_by_their_mask_where_the_box_is_larger():
    """A diagonal line: its box of 100 x 100 is large, its 100 pixels are small."""
    mask = np.eye(HEIGHT, WIDTH) * (np.arange(HEIGHT) < 100)[:, None]
    line = Objects(
        1,
        (HEIGHT, WIDTH),
        np.array([0]),
        np.array([[0, 0, 100, 100]]),
        np.array([100.0]),
        np.array([False]),
        [encode(mask)],
    )
    extra = Detections(
        1,
        [0.9, 1.0],
        [0, 0],
        [[0, 0, 100, 100], [120, 20, 220, 120]],
        [encode(mask), encode(np.roll(mask, (20, 120), (0, 1)))],
    )
    scores = detection_scores([extra], [line], NAMES)
    # The false one, also a thin line, is small by its pixels and halves the precision among the small.
    assert scores["mask_ap_small"] == pytest.approx(0.5) and scores["mask_ap_large"] is None


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda p: p[:-1], "lack 1 of 25 images, first 24"),
        (lambda p: [*p, replace(p[0], image_id=99)], "image 99, which is not among the truths"),
        (lambda p: [replace(p[2], scores=p[2].scores[1:]), *p], "scores, .* labels"),
        (lambda p: [replace(p[2], scores=p[2].scores * np.nan), *p], "not finite"),
        (lambda p: [replace(p[2], labels=p[2].labels + 4), *p], "and there are 4 classes"),
        (lambda p: [replace(p[2], rles=None), *p], "have no masks"),
        (lambda p: [replace(p[2], rles=[rle | {"size": [WIDTH, HEIGHT]} for rle in p[2].rles]), *p], "mask of"),
        (lambda p: [replace(p[2], rles=[rle | {"counts": [5]} for rle in p[2].rles]), *p], "sum to 5"),
    ],
)
def test_predictions_that_cannot_be_right_are_named(damage, complaint):
    truths, predictions = random_scenes()
    with pytest.raises(ValueError, match=complaint):
        detection_scores(damage(predictions), truths, NAMES)


def test_two_images_of_one_id_are_refused():
    truths, predictions = random_scenes(3)
    with pytest.raises(ValueError, match="two images of one image_id"):
        detection_scores(predictions, [*truths, truths[0]], NAMES)
