"""Images and COCO annotations for FADense, and its outputs as objects in the original image.

Images keep their aspect, and their size unless told otherwise. A batch is padded on the right and bottom, and
`pixel_mask` says where, so that the model never sees the padding. Masks are made at the original size, one at a time
and only around each object.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from .fa_pictures import to_picture, to_values
from .fa_rle import decode_mask, encode_part, encode_polygons, tight_boxes

try:
    from PIL import Image
except ImportError:  # the class says so when it is made
    Image = None  # type: ignore[assignment]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MASK_STRIDE = 4
"""Pixels of the processed image per place of `pred_masks`."""
FLOOR = -20.0
"""Logit of `pred_masks` outside an object's window."""


class FADenseImageProcessor(BaseImageProcessor):
    """Prepare images and annotations for `FADenseForObjectDetection` and `FADenseForInstanceSegmentation`.

    Args:
        do_resize: whether `size` is applied.
        size: None keeps the size. {"longest_edge": L} shrinks images whose longer side exceeds L pixels to it;
            {"shortest_edge": S} scales the shorter side to S; both: to S, or less where the longer side would exceed L.
        do_rescale, rescale_factor: whether values are multiplied by the factor.
        do_normalize, image_mean, image_std: whether the mean of each channel is subtracted and the result divided by
            the deviation.
        do_pad: whether a batch is padded to its largest height and width. Otherwise sizes must be equal.
        kwargs: passed to transformers' `BaseImageProcessor`.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: `size` is of another kind.
    """

    model_input_names = ["pixel_values", "pixel_mask"]

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        do_pad: bool = True,
        **kwargs: Any,
    ) -> None:
        if Image is None:
            raise ImportError("FADenseImageProcessor needs Pillow: pip install pillow.")
        super().__init__(**kwargs)
        check_size(size)
        self.do_resize = do_resize
        self.size = size
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_pad = do_pad

    def preprocess(
        self,
        images: Any,
        annotations: Any = None,
        return_segmentation_masks: bool | None = None,
        size: dict[str, int] | None = None,
        do_resize: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn images, and annotations if there are any, into a batch for the model.

        Args:
            images: one image or a list: Pillow images, turned upright if their EXIF tag says how, or arrays and tensors
                uint8 [H, W], [H, W, 3] or [3, H, W].
            annotations: one dict or a list, one an image: {"image_id": id, "annotations": [...]} with COCO's objects:
                "bbox" (x, y, width, height) in pixels, "category_id" (the label), "segmentation" (polygons or run
                lengths), "iscrowd". They are of the upright image. Crowds become the label "ignore".
            return_segmentation_masks: whether labels have masks; None: if every object has a segmentation.
            size, do_resize: in place of the processor's own.
            return_tensors: "pt", "np" or None (tensors as well).
            kwargs: not known; a name that the processor has as a field may come with the value it has.

        Returns:
            `pixel_values` [B, 3, H, W] in torch's memory format `channels_last`, `pixel_mask` bool [B, H, W], and
            `labels`: for each image {"class_labels": int64 [K], "boxes": float32 [K, 4] (centre x, centre y, width,
            height) in fractions of the image, "orig_size" and "size": (height, width) before and after, and where they
            were given "image_id", "masks": bool [K, height, width] and "ignore": bool [height, width]}. With masks,
            boxes are the masks' tight boxes.

        Raises:
            ValueError: an image has more than 8 bits or another shape, an annotation doesn't fit its image or has no
                extent; the message names it.
        """
        self._check_options(kwargs)
        check_size(size)
        size = self.size if size is None else size
        do_resize = self.do_resize if do_resize is None else do_resize
        pictures = [to_picture(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
        sizes = [resized_size((one.height, one.width), size if do_resize else None) for one in pictures]
        if not self.do_pad and len(set(sizes)) > 1:
            raise ValueError(
                f"Images of a batch have different sizes {sizes}: set `do_pad`, or process them one by one."
            )
        height, width = (max(side) for side in zip(*sizes, strict=True))
        # Channels side by side, as pictures have them. What is written anyway isn't set to 0 before.
        pixel_values = torch.empty(len(pictures), height, width, 3)
        pixel_mask = torch.ones(len(pictures), height, width, dtype=torch.bool)
        for picture, values, mask, (rows, columns) in zip(pictures, pixel_values, pixel_mask, sizes, strict=True):
            self._write(picture, values[:rows, :columns])
            for tensor in (values, mask):
                tensor[rows:], tensor[:rows, columns:] = 0, 0
        data = {"pixel_values": pixel_values.permute(0, 3, 1, 2), "pixel_mask": pixel_mask}
        batch = BatchFeature(data, tensor_type=return_tensors)
        if annotations is not None:
            entries = [annotations] if isinstance(annotations, Mapping) else list(annotations)
            if len(entries) != len(pictures):
                raise ValueError(f"`annotations` must be one for each of {len(pictures)} images, got {len(entries)}.")
            batch["labels"] = [
                BatchFeature(
                    to_labels(entry, (picture.height, picture.width), target, return_segmentation_masks),
                    tensor_type=return_tensors,
                )
                for entry, picture, target in zip(entries, pictures, sizes, strict=True)
            ]
        return batch

    def _check_options(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            if not hasattr(self, name) or getattr(self, name) != value:
                raise ValueError(f"`{name}` cannot be set to {value!r} in a call; make a processor that has it.")

    def _write(self, picture: Any, out: Tensor) -> None:
        """Resize a picture to `out` [height, width, 3] and write its values there, rescaled and normalised."""
        scale = self.rescale_factor if self.do_rescale else None
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else (None, None)
        to_values(picture, (out.shape[0], out.shape[1]), Image.Resampling.BILINEAR, scale, mean, std, out)

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None
    ) -> list[dict[str, Tensor]]:
        """Return the objects of each image, surest first.

        Args:
            outputs: of the model.
            threshold: probability that an object must exceed.
            target_sizes: (height, width) of each image, in whose pixels boxes come back; None: in fractions.

        Returns:
            For each image "scores" [K], "labels" int64 [K], and "boxes" (left, top, right, bottom) [K, 4].
        """
        probabilities, labels = outputs.logits.float().sigmoid().max(2)
        results = []
        for index, scores in enumerate(probabilities):
            is_sure = scores > threshold
            centre, size = outputs.pred_boxes[index, is_sure].float().split(2, dim=1)
            boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
            if target_sizes is not None:
                height, width = (int(side) for side in target_sizes[index])
                boxes = boxes * boxes.new_tensor([width, height, width, height])
            results.append({"scores": scores[is_sure], "labels": labels[index, is_sure], "boxes": boxes})
        return results

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: Any = None,
        return_coco_rle: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the objects of each image with their masks, surest first, at full size.

        Args:
            outputs: of `FADenseForInstanceSegmentation`.
            threshold: probability that an object must exceed.
            mask_threshold: probability that a pixel of its mask must exceed.
            overlap_mask_area_threshold: no effect; masks may overlap. The library's pipeline passes it.
            target_sizes: (height, width) of each image, which masks get; None: of the processed image.
            return_coco_rle: whether masks come as COCO's run lengths, which hold overlaps, instead of as one map.

        Returns:
            For each image "segmentation": int32 [height, width] with the id of the surest object of each pixel, 0
            where there is none, or a list of {"size", "counts"}; and "segments_info": for each object its "id" from 1,
            "label_id", "score", "was_fused" (False) and "box" (left, top, right, bottom) in pixels.
        """
        if target_sizes is None:
            target_sizes = outputs.image_sizes
        found = self.post_process_object_detection(outputs, threshold, target_sizes)
        limit = math.log(mask_threshold / (1 - mask_threshold)) if 0 < mask_threshold < 1 else None
        if limit is None:
            raise ValueError(f"`mask_threshold` must be between 0 and 1, got {mask_threshold}.")
        results = []
        for index, objects in enumerate(found):
            target, source = ((int(one[index][0]), int(one[index][1])) for one in (target_sizes, outputs.image_sizes))
            is_sure = outputs.logits[index].float().sigmoid().amax(1) > threshold
            masks: list[dict[str, Any]] = []
            whole = torch.zeros(target, dtype=torch.int32)
            for number, logits in enumerate(outputs.pred_masks[index, is_sure].float().cpu(), start=1):
                (top, left), inside = enlarge(logits, source, target, limit)
                if return_coco_rle:
                    masks.append(encode_part(inside.numpy(), top, left, *target))
                else:
                    part = whole[top : top + inside.shape[0], left : left + inside.shape[1]]
                    part[inside & (part == 0)] = number
            info = [
                {"id": number, "label_id": label, "score": score, "was_fused": False, "box": box}
                for number, (label, score, box) in enumerate(
                    zip(*(objects[name].tolist() for name in ("labels", "scores", "boxes")), strict=True), start=1
                )
            ]
            results.append({"segmentation": masks if return_coco_rle else whole, "segments_info": info})
        return results


def check_size(size: Any) -> None:
    """Raise ValueError unless `size` is None or names a longest edge, a shortest edge or both, in pixels."""
    if size is None:
        return
    is_known = isinstance(size, Mapping) and size and set(size) <= {"shortest_edge", "longest_edge"}
    if not is_known or any(type(edge) is not int or edge < 1 for edge in size.values()):
        raise ValueError(
            '`size` must be None or {"shortest_edge": pixels, "longest_edge": pixels}, either or both: images keep '
            f"their aspect. Got {size!r}."
        )


def resized_size(original: tuple[int, int], size: Mapping[str, int] | None) -> tuple[int, int]:
    """Return the (height, width) that `size` gives an image, by the same factor, rounded, of 1 pixel at least."""
    if size is None:
        return original
    scale = size["shortest_edge"] / min(original) if "shortest_edge" in size else 1.0
    if "longest_edge" in size:
        scale = min(scale, size["longest_edge"] / max(original))
    return max(round(scale * original[0]), 1), max(round(scale * original[1]), 1)


def to_labels(
    entry: Any, original: tuple[int, int], size: tuple[int, int], with_masks: bool | None
) -> dict[str, Tensor]:
    """Return DETR's labels of one image's COCO annotations, for the image resized from `original` to `size`."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("annotations"), Sequence):
        raise ValueError(
            f'Annotations of an image must be {{"image_id": id, "annotations": [...]}}, got {entry!r:.80}.'
        )
    crowds = [one for one in entry["annotations"] if one.get("iscrowd")]
    objects = [one for one in entry["annotations"] if not one.get("iscrowd")]
    if with_masks is None:
        with_masks = all(one.get("segmentation") for one in objects)
    (height, width), (new_height, new_width) = original, size
    boxes = torch.stack([to_box(one, original) for one in objects]) if objects else torch.zeros(0, 4)
    boxes = boxes * torch.tensor([new_width / width, new_height / height, new_width / width, new_height / height])
    labels = {
        "class_labels": torch.tensor([int(one["category_id"]) for one in objects], dtype=torch.long),
        "orig_size": torch.tensor(original),
        "size": torch.tensor(size),
    }
    if with_masks:
        shrunk = [resize_mask(to_mask(one, original), size) for one in objects]
        for mask, box in zip(shrunk, boxes, strict=True):
            if not mask.any():  # smaller than a pixel now
                x, y = ((box[:2] + box[2:]) / 2).long().tolist()
                mask[min(y, new_height - 1), min(x, new_width - 1)] = True
        labels["masks"] = torch.stack(shrunk) if shrunk else torch.zeros(0, *size, dtype=torch.bool)
        boxes = torch.from_numpy(tight_boxes(labels["masks"].numpy())).float()
    boxes = boxes / torch.tensor([new_width, new_height, new_width, new_height])
    labels["boxes"] = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
    if "image_id" in entry:
        labels["image_id"] = torch.tensor([int(entry["image_id"])])
    if crowds:
        labels["ignore"] = torch.stack([resize_mask(to_mask(one, original), size) for one in crowds]).any(0)
    return labels


def to_box(annotation: Mapping, size: tuple[int, int]) -> Tensor:
    """Return the box (left, top, right, bottom) of an annotation, cut to its image; ValueError if nothing is left."""
    values = annotation.get("bbox")
    where = f"`bbox` of annotation {annotation.get('id')!r}"
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise ValueError(f"{where} must be (x, y, width, height), got {values!r}.")
    x, y, width, height = (float(value) for value in values)
    box = torch.tensor([x, y, x + width, y + height]).clamp(min=0.0)
    box = torch.minimum(box, torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32))
    if not box.isfinite().all() or (box[2:] <= box[:2]).any():
        raise ValueError(f"{where}, {values!r}, covers nothing of an image of {size[1]} x {size[0]} pixels.")
    return box


def to_mask(annotation: Mapping, size: tuple[int, int]) -> Tensor:
    """Return the mask bool [height, width] of an annotation; a crowd without segmentation is its box."""
    segmentation = annotation.get("segmentation")
    where = f"`segmentation` of annotation {annotation.get('id')!r}"
    if not segmentation and annotation.get("iscrowd"):
        left, top, right, bottom = to_box(annotation, size).tolist()
        segmentation = [[left, top, right, top, right, bottom, left, bottom]]
    if isinstance(segmentation, Mapping):
        if list(segmentation.get("size", ())) != list(size):
            raise ValueError(f"{where} has the size {segmentation.get('size')}, its image {list(size)}.")
    elif not isinstance(segmentation, (list, tuple)) or not segmentation:
        raise ValueError(f"{where} must be polygons or run lengths, got {segmentation!r:.80}.")
    try:
        encoded = segmentation if isinstance(segmentation, Mapping) else encode_polygons(segmentation, *size)
        mask = torch.from_numpy(decode_mask(encoded).copy())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(segmentation, Mapping) and not mask.any():  # a polygon thinner than a pixel
        left, top, right, bottom = to_box(annotation, size).tolist()
        mask[min(int((top + bottom) / 2), size[0] - 1), min(int((left + right) / 2), size[1] - 1)] = True
    return mask


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a mask bool [H, W] to pixels of which at least half was in it."""
    if tuple(mask.shape) == size:
        return mask
    picture = Image.frombytes("L", (mask.shape[1], mask.shape[0]), (mask.to(torch.uint8) * 255).numpy().tobytes())
    picture = picture.resize((size[1], size[0]), resample=Image.Resampling.BOX)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size) >= 128


def enlarge(
    logits: Tensor, source: tuple[int, int], target: tuple[int, int], limit: float
) -> tuple[tuple[int, int], Tensor]:
    """Interpolate one object's logits bilinearly to pixels of the target, in its window only.

    Args:
        logits: [H/4, W/4] of the padded batch.
        source: (height, width) of the processed image.
        target: (height, width) of the result.
        limit: logit that a pixel of the mask exceeds.

    Returns:
        (first row, first column) of the window in the target, and the mask in it.
    """
    seen = logits > FLOOR
    corner, parts = [], []
    for axis in (0, 1):
        places = seen.any(1 - axis).nonzero()[:, 0]
        if not len(places):
            return (0, 0), torch.zeros(0, 0, dtype=torch.bool)
        first, last = int(places[0]), int(places[-1])
        # Middles of the target's pixels, in places.
        position = (torch.arange(target[axis]) + 0.5) * (source[axis] / target[axis]) / MASK_STRIDE
        inside = ((position >= first) & (position < last + 1)).nonzero()[:, 0]
        if not len(inside):
            return (0, 0), torch.zeros(0, 0, dtype=torch.bool)
        position = (position[inside] - 0.5).clamp(first, last)
        lower = position.floor().long()
        corner.append(int(inside[0]))
        parts.append((lower, (lower + 1).clamp(max=last), position - lower))
    (above, below, down), (before, after, right) = parts
    rows = torch.lerp(logits[above], logits[below], down[:, None])
    return (corner[0], corner[1]), torch.lerp(rows[:, before], rows[:, after], right) > limit
