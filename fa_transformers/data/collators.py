"""Packed batches: documents one after the other in one row, with `cu_seqlens` that say where each ends."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """The packed "input_ids", "token_type_ids" (if there are such) and "cu_seqlens" of tokenized documents.

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
