"""Collators, which make a batch of examples: documents padded or packed, images stacked, labels as tensors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:  # else `import fa_transformers` would load the readers and the datasets library
    from .labelled import LabelledData

PADDING = 0
"""Token id that `pad_batch` fills rows up with."""


class PackingCollator:
    """Joins tokenized documents to a packed batch for FABert models, in a DataLoader or transformers' Trainer.

    Documents have "input_ids" and perhaps "token_type_ids" (joined to [1, tokens of all]) and labels, "label" or
    "labels": an integer or a number each ([documents]), a list of floats for multi-label classification
    ([documents, L]), or a list of integers, one for each token ([1, tokens of all]); or "start_positions" and
    "end_positions" ([documents]). "attention_mask" is left out: nothing is padded.

    `per_device_train_batch_size` of Trainer counts documents. Each device must have a process of its own, as `torchrun`
    gives it: a batch has one row, which can't be split.

    Raises:
        ValueError: a column is unknown, a document is padded, or it has not one label per token.
    """

    def __call__(self, examples: Sequence[dict]) -> dict[str, Tensor]:
        packed, labels = pack_tokens(examples), {}
        for name in examples[0].keys() - {"input_ids", "token_type_ids", "attention_mask"}:
            if name not in ("label", "labels", "start_positions", "end_positions"):
                raise ValueError(f"PackingCollator can't pack the column {name!r}; remove it from the examples.")
            values = [torch.as_tensor(example[name]) for example in examples]
            labels["labels" if name == "label" else name] = _join_labels(values, packed["cu_seqlens"].diff())
        return packed | labels


def _join_labels(labels: list[Tensor], lengths: Tensor) -> Tensor:
    if labels[0].is_floating_point():
        return torch.stack(labels).float()
    if labels[0].dim() == 0:
        return torch.stack(labels).long()
    if [len(label) for label in labels] != lengths.tolist():
        raise ValueError(
            "Lists of integers are labels of tokens, and a document has more or fewer labels than tokens; give the "
            "labels of multi-label classification as floats."
        )
    return torch.cat(labels)[None].long()


def pack_tokens(examples: Sequence[dict]) -> dict[str, Tensor]:
    """Return the packed "input_ids", "token_type_ids" (if there are such) and "cu_seqlens" of tokenized documents.

    Raises:
        ValueError: a document is padded.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    for example, length in zip(examples, lengths, strict=True):
        if int(sum(example.get("attention_mask", [1] * length))) != length:
            raise ValueError("A document is padded: its attention mask has zeros. Tokenize with padding=False to pack.")
    packed = {
        name: torch.cat([torch.as_tensor(example[name]) for example in examples])[None]
        for name in ("input_ids", "token_type_ids")
        if name in examples[0]
    }
    return packed | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(dim=0, dtype=torch.int32)}


class TextCollator:
    """Pads the documents of a batch to its longest one, or with `packing` puts them one after the other.

    Args:
        tokenizer: pads; not asked for with `packing`.
        data: says what the labels are; None, or examples without "label", leaves them out of the batch.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, data: "LabelledData | None" = None, packing: bool = False
    ) -> None:
        self.tokenizer, self.data, self.packing = tokenizer, data, packing

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        tokens = [{name: value for name, value in example.items() if name != "label"} for example in examples]
        batch = pack_tokens(tokens) if self.packing else dict(self.tokenizer.pad(tokens, return_tensors="pt"))
        return batch | _labels_of(examples, self.data)


class ImageCollator:
    """Stacks the images of a batch; `data` says what the labels are, and None leaves them out of the batch."""

    def __init__(self, data: "LabelledData | None" = None) -> None:
        self.data = data

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values} | _labels_of(examples, self.data)


class DetectorCollator:
    """Pads the images of a batch right and bottom with zeros to the largest sides; `pixel_mask` says what is real."""

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        images = [example["pixel_values"] for example in examples]
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        pixel_values = images[0].new_zeros(len(images), images[0].shape[0], height, width)
        pixel_mask = torch.zeros(len(images), height, width, dtype=torch.long)
        for row, (image, example) in enumerate(zip(images, examples, strict=True)):
            rows, columns = image.shape[1:]
            pixel_values[row, :, :rows, :columns] = image
            pixel_mask[row, :rows, :columns] = example.get("pixel_mask", 1)
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def _labels_of(examples: list[dict], data: "LabelledData | None") -> dict[str, Tensor]:
    if data is None or "label" not in examples[0]:
        return {}
    return {"labels": label_tensor([example["label"] for example in examples], data.problem_type, data.num_labels)}


def label_tensor(labels: Sequence, problem_type: str, num_labels: int) -> Tensor:
    """Return labels as the loss takes them: classes [B] in int64, zeros and ones [B, L] or numbers [B] in float32."""
    if problem_type == "single_label_classification":
        return torch.tensor(labels, dtype=torch.long)
    if problem_type == "regression":
        return torch.tensor(labels, dtype=torch.float32)
    rows = torch.zeros(len(labels), num_labels)
    for row, classes in zip(rows, labels, strict=True):
        row[list(classes)] = 1.0
    return rows


def pad_batch(examples: list[dict]) -> dict[str, Tensor]:
    """Pad examples of a task without a tokenizer on the right to the longest, with `PADDING`.

    Returns ids and mask [B, N] and labels [B]; no mask where no example is padded.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    input_ids = torch.full((len(examples), max(lengths)), PADDING)
    for row, example in zip(input_ids, examples, strict=True):
        row[: len(example["input_ids"])] = torch.from_numpy(np.asarray(example["input_ids"], dtype=np.int64))
    batch = {"input_ids": input_ids, "labels": torch.tensor([example["label"] for example in examples])}
    if min(lengths) < max(lengths):
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch
