"""Pictures with objects: what a data set of them is in memory, and the checks that every picture and object passes.

Masks stay run-length encoded until a batch needs them. Faults are collected: one DataError names them all, or, where
`drop_bad` asks for it, the object or picture is left out and counted.
"""

import functools
import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ...models.fa_rle import decode_mask, rle_area
from ...tables import counted
from .files import fill_splits
from .images import convert_image, open_image
from .object_checks import check_object, shorten
from .problems import SHOWN_ROWS, BadRows
from .tables import DataError, listing

logger = logging.getLogger(__name__)

EXIF_ORIENTATION = 274


@dataclass(frozen=True, kw_only=True)
class ObjectOptions:
    """The reading of pictures with objects, and the draw of missing splits from train.

    Args:
        masks: True needs a mask for every object, False ignores masks; None takes masks where train has any.
        drop_bad: leave out bad objects and pictures, and count them, instead of raising an error that names them.
        check_pictures: decode every picture once, instead of reading its size alone.
        validation_share, test_share: fractions of the train pictures that are drawn where these splits are missing.
        seed: of that draw.
    """

    masks: bool | None = None
    drop_bad: bool = False
    check_pictures: bool = True
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class RowPicture:
    """The picture in a row of a loaded data set, decoded when it is opened."""

    rows: datasets.Dataset
    row: int
    column: str

    def __str__(self) -> str:
        return f"row {self.row + 1}"


@dataclass(frozen=True)
class DenseImage:
    """One picture and its n objects, as the file has them; `open` decodes the picture.

    Args:
        image_id: the id in the file.
        picture: where it is.
        size: (height, width) in pixels of the picture that `open` returns, and of all masks.
        is_turned: whether `open` turns the picture as its EXIF orientation says; else it takes the pixels as stored.
        labels: int64 [n], indices of classes.
        boxes: float32 [n, 4], the file's, as (left, top, right, bottom) in pixel edges.
        areas: float64 [n], the file's, in square pixels: of the mask, or of the box where there are none.
        is_crowd: bool [n]: a region of many objects, which is neither learnt nor scored.
        rles: n compressed masks, or None.
        mask_boxes: float32 [n, 4], the tight boxes of the masks; the boxes where there are none.
    """

    image_id: int | str
    picture: Path | RowPicture
    size: tuple[int, int]
    is_turned: bool
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    rles: tuple[dict[str, Any], ...] | None
    mask_boxes: np.ndarray

    @functools.cached_property
    def mask_areas(self) -> np.ndarray:
        """The pixels inside each mask, int64 [n]; nothing where there are no masks."""
        return np.array([rle_area(rle) for rle in self.rles or ()], dtype=np.int64)

    def open(self) -> Image.Image:
        """Return the picture in mode RGB, of `size`.

        Raises:
            DataError: it can't be read, or is not as it was when the data was read.
        """
        image = open_picture(self.picture, self.is_turned)
        if image.size[::-1] != self.size:
            raise DataError(
                f"{self.picture}: the picture had {self.size[1]} x {self.size[0]} pixels when the data was read, and "
                f"has {image.width} x {image.height} now"
            )
        return convert_image(image)

    def masks(self) -> np.ndarray:
        """Return the masks, bool [n, H, W]. Raises ValueError where there are none."""
        if self.rles is None:
            raise ValueError(f"image {self.image_id!r} has no masks.")
        return np.stack([decode_mask(rle) for rle in self.rles]) if self.rles else np.zeros((0, *self.size), dtype=bool)


@dataclass(frozen=True)
class DenseData:
    """Pictures with objects by split, "train", "validation" and "test".

    Args:
        splits: name of a split -> its pictures.
        class_names: one for each label.
        has_masks: whether every object has a mask.
        num_dropped: split -> number of objects and pictures that were left out because of faults.
    """

    splits: dict[str, list[DenseImage]]
    class_names: list[str]
    has_masks: bool
    num_dropped: dict[str, int] = field(default_factory=dict)


class Faults(BadRows):
    """The faults of one source's pictures and objects, collected as bad rows are."""

    def check(self) -> None:
        """Call this after the last picture: raise, or warn where faults are dropped; nothing where there are none.

        Raises:
            DataError: there are faults that are not to be dropped; up to 20 are named.
        """
        faulty = "object or picture" if self.count == 1 else "objects or pictures"
        if self.count and not self.drop:
            raise DataError(
                f"{self.source}: {self.count} {faulty} can't be used:{self._lines(SHOWN_ROWS)}\nMend them, "
                "or leave them out with --drop_bad_objects (drop_bad in Python)."
            )
        if self.count:
            logger.warning("%s: left out %d bad %s:%s", self.source, self.count, faulty, self._lines(SHOWN_ROWS))


def open_picture(picture: Path | RowPicture, is_turned: bool) -> Image.Image:
    """Decode a picture, turned as its EXIF orientation says or as it is stored.

    Raises:
        DataError: it is missing, broken or too large.
    """
    if isinstance(picture, Path) and is_turned:
        return open_image(picture)
    try:
        image = open_header(picture)
        image.load()
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise DataError(f"{picture}: the picture is broken or truncated ({error})") from error
    return ImageOps.exif_transpose(image) if is_turned else image


def open_header(picture: Path | RowPicture) -> Image.Image:
    """Return a picture whose pixels may still be undecoded, as it is stored.

    Raises:
        DataError: a row has none.
        OSError: the file can't be opened.
    """
    if isinstance(picture, Path):
        return Image.open(picture)
    image = picture.rows[picture.row][picture.column]
    if not isinstance(image, Image.Image):
        raise DataError(f"{picture}: column {picture.column!r} has no picture but {shorten(image)}")
    return image


def inspect_picture(
    picture: Path | RowPicture, stated: tuple[int, int] | None, decode: bool
) -> tuple[tuple[int, int], bool]:
    """Return the (height, width) of a picture as it is to be opened, and whether it is to be turned as EXIF says.

    `stated` is the (width, height) that the annotations name, None where they name none; `decode` reads all pixels.

    Raises:
        DataError: it is missing, broken, too large, of pixels without an agreed range, or of another size than stated.
    """
    if isinstance(picture, Path) and not picture.is_file():
        raise DataError(f"{picture}: there is no such file")
    try:
        with open_header(picture) as image:
            stored, orientation = image.size, image.getexif().get(EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError):
        open_picture(picture, True)  # which tells what is wrong
        raise
    is_turned = find_turn(stored, orientation, stated)
    if decode:
        convert_image(open_picture(picture, is_turned))
    turned = stored[::-1] if is_turned and 5 <= orientation <= 8 else stored
    return turned[::-1], is_turned


def find_turn(stored: tuple[int, int], orientation: int, stated: tuple[int, int] | None) -> bool:
    """Return whether a picture is to be turned as its EXIF orientation says, for its objects to lie right.

    Args:
        stored: (width, height) of the stored pixels.
        orientation: of EXIF, 1 for upright.
        stated: (width, height) that the annotations name; None where they name none.

    Raises:
        DataError: the stated size is neither the stored nor the turned one, or doesn't tell which of the two is meant.
    """
    swaps = 5 <= orientation <= 8
    turned = stored[::-1] if swaps else stored
    if stated is not None and stated not in (stored, turned):
        shown = f" ({turned[0]} x {turned[1]} turned as EXIF says)" if swaps else ""
        raise DataError(
            f"the picture has {stored[0]} x {stored[1]} pixels{shown}, and the annotations say {stated[0]} x "
            f"{stated[1]}: they are of another picture, or it was resized"
        )
    if orientation == 1:
        return True
    if stated is None or stored == turned:
        raise DataError(
            f"the picture has the EXIF orientation {orientation}, and width and height don't tell whether the objects "
            "are those of the turned or of the stored pixels: save it upright"
        )
    return stated == turned


@dataclass(frozen=True)
class Record:
    """One picture and its objects as the source has them, unchecked; `where` names it in messages."""

    where: str
    image_id: int | str
    picture: Path | RowPicture
    stated_size: tuple[int, int] | None
    objects: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """One split as it is in its source: the name of each category by its id, its pictures, and the faults so far."""

    classes: Mapping[Hashable, str]
    records: list[Record]
    faults: Faults


def build_data(sources: Mapping[str, Source], options: ObjectOptions) -> DenseData:
    """Check all pictures and objects of the splits, draw those that are missing, and number the classes as train does.

    Raises:
        DataError: there is no train; a share is out of range; or there are faults, and `options.drop_bad` is False.
    """
    if "train" not in sources:
        raise DataError(f"there is no train, only {listing(sources)}")
    names = list(sources["train"].classes.values())
    masks = options.masks
    if masks is None:
        masks = any(record.get("segmentation") for each in sources["train"].records for record in each.objects)
    splits, num_dropped = {}, {}
    for split, source in sources.items():
        labels = {key: names.index(name) for key, name in source.classes.items() if name in names}
        splits[split] = list(_check_records(source, labels, masks, options, split))
        source.faults.check()
        num_dropped[split] = source.faults.count
        if not splits[split]:
            raise DataError(f"{source.faults.source}: there are no pictures")
    splits = _draw_splits(splits, options, names)
    for split, images in splits.items():
        _report(split, images, names, masks)
    return DenseData(splits, names, masks, num_dropped)


def _check_records(
    source: Source, labels: Mapping[Hashable, int], masks: bool, options: ObjectOptions, split: str
) -> Iterator[DenseImage]:
    """Yield the pictures that can be used, with the objects that can be; pictures are read by a few threads."""

    def inspect(record: Record) -> tuple[tuple[int, int], bool] | DataError:
        try:
            return inspect_picture(record.picture, record.stated_size, options.check_pictures)
        except DataError as error:
            return error

    seen = set()
    with ThreadPoolExecutor(max_workers=4) as pool:
        inspected = pool.map(inspect, source.records)
        progress = tqdm(inspected, total=len(source.records), desc=f"checking {split}", unit="image")
        for record, outcome in zip(source.records, progress, strict=True):
            if record.image_id in seen:
                source.faults.add(record.where, "its id is there twice: give every image an id of its own")
            elif isinstance(outcome, DataError):
                source.faults.add(record.where, str(outcome))
            else:
                size, is_turned = outcome
                seen.add(record.image_id)
                yield _check_record(record, size, is_turned, source, labels, masks)


def _check_record(
    record: Record, size: tuple[int, int], is_turned: bool, source: Source, labels: Mapping[Hashable, int], masks: bool
) -> DenseImage:
    kept: list[tuple[Any, ...]] = []
    for number, entry in enumerate(record.objects, start=1):
        name = f"annotation {entry['id']!r}" if entry.get("id") is not None else f"object {number}"
        try:
            kept.append((_label_of(entry, source, labels), *check_object(entry, size, masks)))
        except ValueError as error:
            source.faults.add(f"{record.where}, {name}", str(error))
    rles = tuple(rle for *_, rle, _ in kept) if masks else None
    boxes = np.array([box for _, box, *_ in kept], dtype=np.float32).reshape(-1, 4)
    return DenseImage(
        image_id=record.image_id,
        picture=record.picture,
        size=size,
        is_turned=is_turned,
        labels=np.array([label for label, *_ in kept], dtype=np.int64),
        boxes=boxes,
        areas=np.array([area for _, _, area, *_ in kept], dtype=np.float64),
        is_crowd=np.array([crowd for _, _, _, crowd, *_ in kept], dtype=bool),
        rles=rles,
        mask_boxes=np.array([tight for *_, tight in kept], dtype=np.float32).reshape(-1, 4) if masks else boxes,
    )


def _label_of(entry: Mapping[str, Any], source: Source, labels: Mapping[Hashable, int]) -> int:
    """The label of an object; ValueError where its category is unknown."""
    key = entry.get("category_id")
    if not isinstance(key, Hashable) or key not in source.classes:
        raise ValueError(f"category_id {key!r} is none of the categories, {listing(source.classes)}")
    if key not in labels:
        raise ValueError(f"the category {source.classes[key]!r} is not among those of train")
    return labels[key]


def _draw_splits(
    splits: dict[str, list[DenseImage]], options: ObjectOptions, names: list[str]
) -> dict[str, list[DenseImage]]:
    """Draw missing splits from train as other data has them drawn: a picture counts for the rarest class on it."""
    features = datasets.Features(
        {"image": datasets.Value("int64"), "label": datasets.Sequence(datasets.ClassLabel(names=names))}
    )
    rows = {
        split: datasets.Dataset.from_dict(
            {"image": list(range(len(part))), "label": [sorted(set(image.labels.tolist())) for image in part]}, features
        )
        for split, part in splits.items()
    }
    filled = fill_splits(datasets.DatasetDict(rows), options.validation_share, options.test_share, options.seed)
    return {
        split: [splits[split if split in splits else "train"][index] for index in part["image"]]
        for split, part in filled.items()
    }


def _report(split: str, images: list[DenseImage], names: list[str], masks: bool) -> None:
    counts = Counter(int(label) for image in images for label in image.labels)
    missing = [name for index, name in enumerate(names) if not counts[index]]
    if missing:
        logger.warning("%s has no object of %d of %d classes: %s", split, len(missing), len(names), listing(missing))
    logger.info(
        "%s: %s, %d without objects; %s with %s, %d of them crowds",
        split,
        counted(len(images), "image"),
        sum(not len(image.labels) for image in images),
        counted(sum(counts.values()), "object"),
        "masks" if masks else "boxes",
        sum(int(image.is_crowd.sum()) for image in images),
    )
