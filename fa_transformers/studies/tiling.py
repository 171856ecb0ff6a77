"""Whole pictures beside tiles: speed and average precision of one detector, which sees a picture at once or in slices.

The slices, what becomes of an object that several of them show, and the picture as a whole beside them are SAHI's
(`get_sliced_prediction`, package `sahi`), which needs no torchvision.

Source: Akyon et al. 2022, arXiv:2202.06934.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..checks import check_positive
from ..data.readers.coco import load_coco_folder
from ..data.readers.objects import DenseImage, ObjectOptions
from ..data.sets.digit_scenes import DIGIT_PX, load_digit_scenes
from ..metrics.detection import Detections, detection_scores
from ..models import FADenseForInstanceSegmentation, FADenseForObjectDetection, FADenseImageProcessor
from ..models.fa_rle import decode_mask, encode_mask
from ..options import OptionGroup, option
from ..training.dense_scores import find_objects, without_masks

Method = Callable[[np.ndarray], Detections]
SCORES = ("box_ap", "box_ap50", "box_ap_small", "mask_ap")
SAHI_THRESHOLD = 0.1
"""Probability from which on SAHI merges what slices found; below it would suppress instead, whatever is asked for."""
WHOLE = "whole picture"


@dataclass(frozen=True)
class TilingOptions(OptionGroup):
    """The pictures, the slices, and where the figures go."""

    coco_folder: Path | None = option(
        None, "folder in COCO's layout, whose test pictures are taken; unset = digits are drawn", group="pictures",
        common=True,
    )  # fmt: skip
    num_images: int = option(20, "pictures", group="pictures", common=True)
    canvas_size: int = option(2048, "side in pixels of a drawn canvas", group="pictures", common=True)
    digit_px: tuple[int, ...] = option(
        DIGIT_PX, "shortest and longest of the drawn digits in pixels", group="pictures", common=True
    )
    num_objects: tuple[int, ...] = option((10, 60), "fewest and most digits on a canvas", group="pictures", common=True)
    seed: int = option(0, "seed of the drawn digits", group="pictures", common=True)
    slices: tuple[int, ...] = option((512, 640), "sides of the slices in pixels", group="tiles", common=True)
    overlap: float = option(0.2, "share of its side that a slice shares with the next", group="tiles", common=True)
    shrunk: bool = option(
        False, "also slices with the whole picture, shrunk to a slice's side", group="tiles", common=True
    )
    standard: bool = option(
        False, "also slices with the whole picture at full size, SAHI's default with a detector that takes any size",
        group="tiles", common=True,
    )  # fmt: skip
    threshold: float = option(
        SAHI_THRESHOLD, "probability that an object must exceed, whichever way it was found", group="tiles", common=True
    )
    masks: bool = option(
        False, "find masks too; SAHI makes polygons of them, and boxes of these", group="tiles", common=True
    )
    output_dir: Path = option(Path("outputs/whole_or_tiles"), "folder for results.json", group="files", common=True)
    results: Path | None = option(
        None, "JSON file of a results page, into which the tables are put", group="files", common=True
    )
    table: str = option("tiles", "name of the first of these tables; the second adds _borders", group="files")

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what can't be measured."""
        check_positive(self, "num_images", "canvas_size")
        if small := [side for side in self.slices if side < 32]:
            raise ValueError(f"--slices {small[0]}: a slice must have at least 32 pixels a side.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"--overlap must be at least 0 and below 1, got {self.overlap}.")
        if not SAHI_THRESHOLD <= self.threshold < 1:
            raise ValueError(
                f"--threshold must be at least {SAHI_THRESHOLD} and below 1, got {self.threshold}: with less SAHI "
                "suppresses what slices found, and merges nothing."
            )
        for name in ("digit_px", "num_objects"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"--{name} must be two numbers, the lower first, got {len(getattr(self, name))}.")


@dataclass(frozen=True)
class Picture:
    """The id and the (height, width) of a picture, which is all that `find_objects` reads of one."""

    image_id: int | str
    size: tuple[int, int]


def load_pictures(options: TilingOptions) -> tuple[list[DenseImage], list[str]]:
    """Return the pictures and the names of the classes.

    Raises:
        ValueError: the digits find no place; the message names the flag.
        DataError: the folder can't be used.
    """
    if options.coco_folder is not None:
        data = load_coco_folder(options.coco_folder, ObjectOptions(masks=options.masks))
    else:
        try:
            data = load_digit_scenes(
                1, 1, options.num_images, options.canvas_size, options.seed,
                num_objects=(options.num_objects[0], options.num_objects[1]),
                digit_px=(options.digit_px[0], options.digit_px[1]),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"--canvas_size {options.canvas_size}: {error}") from error
    images = list(data.splits["test"])[: options.num_images]
    return images if options.masks else without_masks(images), data.class_names


def load_detector(folder: str, masks: bool) -> tuple[FADenseForObjectDetection, FADenseImageProcessor]:
    """Return a trained FADense and its image processor; of an instance segmenter without its masks unless asked for."""
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: there is no model folder of that name")
    model_class = FADenseForInstanceSegmentation if masks else FADenseForObjectDetection
    return model_class.from_pretrained(folder).eval(), FADenseImageProcessor.from_pretrained(folder)


def whole_method(
    model: FADenseForObjectDetection, processor: FADenseImageProcessor, threshold: float, longest: int | None = None
) -> Method:
    """Return how pixels [H, W, 3] become objects at once; pictures longer than `longest` are shrunk to it before."""

    def detect(pixels: np.ndarray) -> Detections:
        picture = Image.fromarray(pixels)
        if longest is not None and max(picture.size) > longest:
            picture.thumbnail((longest, longest), Image.Resampling.BILINEAR)
        with torch.inference_mode():
            output = model(**processor(picture, return_tensors="pt"))
        seen: Any = Picture(0, (pixels.shape[0], pixels.shape[1]))
        return find_objects(processor, output, [seen], threshold)[0]

    return detect


def tiled_method(
    model: FADenseForObjectDetection,
    processor: FADenseImageProcessor,
    threshold: float,
    side: int,
    overlap: float,
    *,
    shrunk: bool = False,
    standard: bool = False,
) -> Method:
    """Return how pixels [H, W, 3] become objects by SAHI's slices of a side and its greedy merging of what they found.

    Args:
        overlap: share of its side that a slice shares with the next.
        shrunk: the picture, shrunk to a slice's side, is searched as well.
        standard: the picture at full size is searched as well.

    Raises:
        ImportError: SAHI is not installed.
    """
    if importlib.util.find_spec("sahi") is None:
        raise ImportError("Slices are SAHI's, which is not installed: pip install sahi")
    from sahi.predict import get_sliced_prediction

    detect = whole_method(model, processor, threshold, longest=None if standard else side)
    slices = _slice_model(model, detect, threshold)

    def detect_tiled(pixels: np.ndarray) -> Detections:
        result = get_sliced_prediction(
            pixels, slices, side, side, overlap, overlap, perform_standard_pred=shrunk or standard, verbose=0
        )
        found = result.object_prediction_list
        boxes = np.array([each.bbox.to_xyxy() for each in found], dtype=float).reshape(-1, 4)
        rles = [encode_mask(each.mask.bool_mask.astype(bool)) for each in found] if model.has_masks else None
        scores, labels = [each.score.value for each in found], [each.category.id for each in found]
        return Detections(0, scores, np.array(labels, dtype=int), boxes, rles)

    return detect_tiled


def _slice_model(model: FADenseForObjectDetection, detect: Method, threshold: float) -> Any:
    """Return the model that SAHI asks for the objects of a slice."""
    from sahi.models.base import DetectionModel
    from sahi.prediction import ObjectPrediction
    from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list
    from sahi.utils.cv import get_coco_segmentation_from_bool_mask

    names = model.config.id2label

    class Slices(DetectionModel):
        def set_model(self, model: Any, **options: Any) -> None:
            self.model = model

        def perform_inference(self, image: np.ndarray) -> None:
            self._original_predictions = detect(image)

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = None, full_shape_list: Any = None
        ) -> None:
            found = self._original_predictions
            shift, shape = fix_shift_amount_list(shift_amount_list)[0], fix_full_shape_list(full_shape_list)[0]
            objects = []
            for index, (score, label, box) in enumerate(zip(found.scores, found.labels, found.boxes, strict=True)):
                outline = None
                if found.rles is not None:
                    outline = get_coco_segmentation_from_bool_mask(decode_mask(found.rles[index]))
                    if not outline:  # fewer pixels than a triangle
                        continue
                objects.append(
                    ObjectPrediction(
                        bbox=np.asarray(box).tolist(), category_id=int(label), category_name=names[int(label)],
                        score=float(score), segmentation=outline, shift_amount=shift, full_shape=shape,
                    )
                )  # fmt: skip
            self._object_prediction_list_per_image = [objects]

    return Slices(model=model, device="cpu", confidence_threshold=threshold)


def tile_boxes(size: tuple[int, int], side: int, overlap: float) -> np.ndarray:
    """Return SAHI's slices of a picture of (height, width) as (left, top, right, bottom) [T, 4]."""
    from sahi.slicing import get_slice_bboxes

    return np.array(
        get_slice_bboxes(*size, side, side, overlap_height_ratio=overlap, overlap_width_ratio=overlap), dtype=float
    )


def is_cut(boxes: np.ndarray, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell which of boxes [n, 4] the border of a tile cuts, and which no tile of [T, 4] shows whole: bool [n] each."""
    low, high = np.maximum(boxes[:, None, :2], tiles[:, :2]), np.minimum(boxes[:, None, 2:], tiles[:, 2:])
    is_seen = np.all(low < high, axis=2)  # [n, T]
    starts_inside = np.all(boxes[:, None, :2] >= tiles[:, :2], axis=2)
    is_whole = starts_inside & np.all(boxes[:, None, 2:] <= tiles[:, 2:], axis=2)
    return np.any(is_seen & ~is_whole, axis=1), ~np.any(is_whole, axis=1)


def score_part(
    found: Sequence[Detections],
    images: Sequence[DenseImage],
    names: Sequence[str],
    chosen: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Return `SCORES` of the predictions; of `chosen` objects alone (bool [n] an image), others being no mistake."""
    if chosen is not None:
        images = [replace(image, is_crowd=image.is_crowd | ~part) for image, part in zip(images, chosen, strict=True)]
    scores = detection_scores(found, images, names)
    return {name: scores.get(name) for name in SCORES}


def run_methods(
    methods: Mapping[str, Method], images: Sequence[DenseImage]
) -> tuple[dict[str, list[Detections]], dict[str, dict[str, list[float]]]]:
    """Return what each method finds in each picture, and its wall and CPU seconds; the methods take turns."""
    found: dict[str, list[Detections]] = {name: [] for name in methods}
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in methods}
    first = np.asarray(images[0].open())
    for method in methods.values():  # which loads the libraries
        method(first)
    for image in tqdm(images, desc="pictures", unit="picture"):
        pixels = np.asarray(image.open())
        for name, method in methods.items():
            wall, cpu = time.perf_counter(), time.process_time()
            entry = method(pixels)
            seconds[name]["wall"].append(time.perf_counter() - wall)
            seconds[name]["cpu"].append(time.process_time() - cpu)
            found[name].append(replace(entry, image_id=image.image_id))
    return found, seconds


def compare(folder: str, options: TilingOptions) -> dict[str, Any]:
    """Search the pictures whole and in slices with one detector, on one thread.

    Returns:
        "methods": for each its pictures a second, its time as a multiple of the whole picture's, in wall and CPU time,
        and its scores; "borders": for each side of slices, of the objects that a border cuts and of those that no slice
        shows whole, their number and box AP, in slices and in the whole picture.

    Raises:
        ValueError: the digits find no place.
        FileNotFoundError: there is no such model.
        ImportError: SAHI or faster-coco-eval is not installed.
        DataError: the folder of pictures can't be used.
    """
    torch.set_num_threads(1)
    model, processor = load_detector(folder, options.masks)
    images, names = load_pictures(options)
    own_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if own_names != list(names):
        raise ValueError(f"{folder} knows the classes {', '.join(own_names)}; the pictures have {', '.join(names)}.")
    methods = {WHOLE: whole_method(model, processor, options.threshold)}
    for side in options.slices:
        arguments = (model, processor, options.threshold, side, options.overlap)
        methods[slices_name(side)] = tiled_method(*arguments)
        if options.shrunk:
            methods[shrunk_name(side)] = tiled_method(*arguments, shrunk=True)
        if options.standard:
            methods[standard_name(side)] = tiled_method(*arguments, standard=True)
    found, seconds = run_methods(methods, images)
    rows = []
    for name in methods:
        row: dict[str, Any] = {"method": name, "pictures_per_second": len(images) / sum(seconds[name]["wall"])}
        for kind in ("wall", "cpu"):
            row[f"slower_{kind}"] = sum(seconds[name][kind]) / sum(seconds[WHOLE][kind])
        rows.append(row | score_part(found[name], images, names))
    borders = [_score_borders(side, options.overlap, found, images, names) for side in options.slices]
    return {"methods": rows, "borders": [row for part in borders for row in part]}


def slices_name(side: int) -> str:
    """Return the name of the method that has slices of a side."""
    return f"slices of {side} px"


def shrunk_name(side: int) -> str:
    """Return the name of the method that has slices of a side, and the whole picture shrunk to it."""
    return f"{slices_name(side)} and the picture shrunk"


def standard_name(side: int) -> str:
    """Return the name of the method that has slices of a side, and the whole picture at full size."""
    return f"{slices_name(side)} and the whole picture, SAHI's default"


def _score_borders(
    side: int,
    overlap: float,
    found: Mapping[str, Sequence[Detections]],
    images: Sequence[DenseImage],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """The rows of the objects that a border cuts and of those that no slice shows whole, with the AP of each way."""
    parts = [is_cut(np.asarray(image.boxes), tile_boxes(image.size, side, overlap)) for image in images]
    ways = {"whole": WHOLE, "tiled": slices_name(side), "shrunk": shrunk_name(side), "standard": standard_name(side)}
    rows = []
    for index, objects in enumerate(("cut by a border", "whole in no slice")):
        chosen = [part[index] for part in parts]
        row: dict[str, Any] = {"slices": side, "overlap_px": int(side * overlap), "objects": objects}
        row["number"] = int(sum(part.sum() for part in chosen))
        for key, name in ways.items():
            if name in found:
                row[key] = score_part(found[name], images, names, chosen)["box_ap"] if row["number"] else None
        rows.append(row)
    return rows
