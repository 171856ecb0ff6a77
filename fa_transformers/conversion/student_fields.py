"""The learned parts that layers get in the place of softmax attention, with which recovery was measured."""

from typing import Any

from transformers import PretrainedConfig

from .stock_checkpoints import find_family

STUDENT_FIELDS: dict[str, dict[str, Any]] = {
    "text": dict(position_embedding_type="periodic", local_kernel_size=15, local_window=64),
    "images": dict(local_kernel_size=5),
    "object-detection": dict(local_kernel_size=5, learned_temperatures=True),
}
"""Fields of a stock checkpoint's configuration as one of ours by what it reads, beside maps of twice the head width."""


def student_fields(config: PretrainedConfig, task: str) -> dict[str, Any]:
    """Return the fields that a stock checkpoint gets: those of `task` in `STUDENT_FIELDS`, and its `double_maps`.

    Raises:
        ValueError: a checkpoint of this type can't be converted.
    """
    return STUDENT_FIELDS[task] | double_maps(config)


def double_maps(config: PretrainedConfig) -> dict[str, int]:
    """Return the field for learned maps of twice the head width.

    Raises:
        ValueError: a checkpoint of this type can't be converted.
    """
    find_family(config.model_type)
    return {"key_feature_size": 2 * config.hidden_size // config.num_attention_heads}
