"""Digests of the data of a run, by which a resumed run notices that it has other data than its first part had."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..data.labelled import LabelledData
from .processes import run_together

SAMPLES, SAMPLED_BYTES = 16, 2**12
"""Pieces of an image file that take part in its digest beside its size, and the bytes of each: a set may fill a disk.
They are spread evenly from the first byte to the last, so that a file of 64 KiB counts whole."""


def digest_once(accelerator: Accelerator, digest: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Return on every process what `digest` gives the main one, which alone reads the data for it."""
    return run_together(lambda: digest() if accelerator.is_main_process else {})[0]


def digest_data(data: LabelledData) -> dict[str, str]:
    """Return the digest of each part of the data by its name in words, such as "the labels of train".

    Documents, images in memory and labels count whole and in their order, image files by their size and pieces of them.
    Of a stream the source counts, whose rows nobody has read yet, and the splits that are in memory.
    """
    digests: dict[str, str] = {}
    for split, part in data.dataset.items():
        if split == "train" and data.stream is not None:
            continue
        digests |= digest_contents({split: part})
        digests[f"the labels of {split}"] = _digest_column(part, "label")
    if data.stream is not None:
        source = f"{data.facts.name}, {data.stream.num_shards} shards, {data.stream.column_names}"
        digests["the stream"] = hashlib.sha256(source.encode()).hexdigest()
    digests["the names of the classes"] = hashlib.sha256(repr(data.label_names).encode()).hexdigest()
    return digests


def digest_contents(parts: Mapping[str, datasets.Dataset]) -> dict[str, str]:
    """Return the digests of the documents and the images of rows, by names such as "the documents of train"."""
    return {
        f"the {noun} of {name}": _digest_column(part, column)
        for name, part in parts.items()
        for column, noun in (("text", "documents"), ("image", "images"))
        if column in part.column_names
    }


def digest_examples(examples: Mapping[str, torch.utils.data.Dataset]) -> dict[str, str]:
    """Return the digests of the examples of each split, which are dictionaries of arrays and numbers."""
    digests: dict[str, str] = {}
    for split, part in examples.items():
        digest = hashlib.sha256()
        for index in range(len(part)):  # type: ignore[arg-type]
            for name, value in part[index].items():
                array = np.asarray(value)
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(array.tobytes())
        digests[f"the examples of {split}"] = digest.hexdigest()
    return digests


def digest_weights(model: nn.Module) -> str:
    """Return the digest of a model's weights: those of a teacher are the labels of a distillation."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    """The size of a file and pieces of it; its name stays out, so that a set may be moved."""
    size = path.stat().st_size
    content = [size.to_bytes(8, "little")]
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLED_BYTES:
            return content[0] + file.read()
        for number in range(SAMPLES):
            file.seek((size - SAMPLED_BYTES) * number // (SAMPLES - 1))
            content.append(file.read(SAMPLED_BYTES))
    return b"".join(content)
