"""Digests of the data of a run, by which a resumed run notices that it has other data than its first part had."""

import hashlib
from pathlib import Path
from typing import Any

import datasets

from ..data.labelled import LabelledData

SAMPLED_BYTES = 2**12
"""Bytes at either end of an image file that take part in its digest, beside its size: a set may fill a disk."""


def digest_data(data: LabelledData) -> dict[str, str]:
    """Return the digest of each part of the data by its name in words, such as "the labels of train".

    Documents, images in memory and labels count whole and in their order; of image files their size and both ends.
    Of a stream the source counts, whose rows nobody has read yet, and the splits that are in memory.
    """
    digests = {}
    for split, part in data.dataset.items():
        if split == "train" and data.stream is not None:
            continue
        for column in ("text", "image"):
            if column in part.column_names:
                noun = "documents" if column == "text" else "images"
                digests[f"the {noun} of {split}"] = _digest_column(part, column)
        digests[f"the labels of {split}"] = _digest_column(part, "label")
    if data.stream is not None:
        rows = data.stream.rows
        source = f"{data.facts.name}, {rows.num_shards} shards, {rows.column_names}"
        digests["the stream"] = hashlib.sha256(source.encode()).hexdigest()
    digests["the names of the classes"] = hashlib.sha256(repr(data.label_names).encode()).hexdigest()
    return digests


def _digest_column(part: datasets.Dataset, column: str) -> str:
    rows = part.select_columns(column)
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    digest = hashlib.sha256()
    for batch in rows.with_format(None).iter(batch_size=256):
        for value in batch[column]:
            content = _content_of(value)
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()


def _content_of(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, dict):  # an image that is not decoded
        return value["bytes"] if value.get("bytes") is not None else _sample_file(Path(value["path"]))
    return repr(value).encode()


def _sample_file(path: Path) -> bytes:
    """The size of a file and its first and last bytes; its name stays out, so that a set may be moved."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(SAMPLED_BYTES)
        file.seek(max(0, size - SAMPLED_BYTES))
        return size.to_bytes(8, "little") + first + file.read()
