"""Pictures with objects from a loaded data set, in the layout that data sets of object detection have on the Hub."""

from collections.abc import Mapping
from typing import Any

import datasets

from .images import SPLIT_FOLDERS
from .objects import DenseData, Faults, ObjectOptions, Record, RowPicture, Source, build_data
from .tables import DataError, listing

CATEGORY_COLUMNS = ("category", "category_id", "label", "labels", "categories")


def encode_objects(
    dataset: datasets.DatasetDict,
    options: ObjectOptions | None = None,
    image_column: str = "image",
    objects_column: str = "objects",
) -> DenseData:
    """Read pictures and objects from a loaded data set; missing splits are drawn from train.

    The column `objects_column` holds a list of objects for each picture, or a table of lists, with "bbox" in COCO's
    form (left, top, width, height), the class in the first that is there of `CATEGORY_COLUMNS` (ClassLabel, number or
    name), and what else COCO has: "area", "iscrowd", "segmentation", "id". A column "image_id" names the pictures; else
    their rows do, from 1.

    Raises:
        DataError: there is no split train, a column is missing, or a picture or object has faults.
    """
    options = options or ObjectOptions()
    parts = {split: dataset[split] for split in SPLIT_FOLDERS if split in dataset}
    if "train" not in parts:
        raise DataError(f"the data set has no split 'train', only {listing(dataset)}: name one of them 'train'")
    sources = {}
    for split, part in parts.items():
        for column in (image_column, objects_column):
            if column not in part.column_names:
                raise DataError(f"split {split!r} has no column {column!r}, only {listing(part.column_names)}")
        if not isinstance(part.features[image_column], datasets.Image):
            raise DataError(f"split {split!r}: column {image_column!r} holds {part.features[image_column]}, not images")
        sources[split] = _read_split(part, split, options, image_column, objects_column)
    return build_data(sources, options)


def _read_split(
    part: datasets.Dataset, split: str, options: ObjectOptions, image_column: str, objects_column: str
) -> Source:
    feature = part.features[objects_column]
    fields = feature if isinstance(feature, Mapping) else getattr(feature, "feature", None)
    if not isinstance(fields, Mapping):
        raise DataError(
            f"split {split!r}: column {objects_column!r} holds {feature}, not objects with a bbox and a class"
        )
    category = next((name for name in CATEGORY_COLUMNS if name in fields), None)
    if category is None:
        raise DataError(
            f"split {split!r}: the objects have {listing(fields)}, and no class, one of {listing(CATEGORY_COLUMNS)}"
        )
    faults = Faults(f"split {split!r}", options.drop_bad)
    has_ids = "image_id" in part.column_names
    rows = part.select_columns([objects_column, *(["image_id"] if has_ids else [])])
    pictures = part.select_columns([image_column])
    records = []
    for index, row in enumerate(rows):
        try:
            entries = _entries_of(row[objects_column])
        except ValueError as error:
            faults.add(f"row {index + 1}", str(error))
            continue
        entries = [{**entry, "category_id": entry[category]} for entry in entries]
        image_id = row["image_id"] if has_ids else index + 1
        if not isinstance(image_id, int | str):
            faults.add(f"row {index + 1}", f"image_id must be a number or a string, got {image_id!r}")
            continue
        picture = RowPicture(pictures, index, image_column)
        records.append(Record(f"row {index + 1}", image_id, picture, None, entries))
    label = getattr(fields[category], "feature", fields[category])
    if isinstance(label, datasets.ClassLabel):
        return Source(dict(enumerate(label.names)), records, faults)
    keys = {entry["category_id"] for record in records for entry in record.objects} - {None}
    return Source({key: str(key) for key in sorted(keys)}, records, faults)


def _entries_of(objects: Any) -> list[dict[str, Any]]:
    """Objects of one row, from a list of them or a table of lists.

    Raises:
        ValueError: the lists are of unequal lengths.
    """
    if not isinstance(objects, Mapping):
        return [dict(each) for each in objects or ()]
    columns = {name: values for name, values in objects.items() if values is not None}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists of its objects are of unequal lengths: {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
