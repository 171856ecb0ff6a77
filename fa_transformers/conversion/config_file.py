"""The configuration file of a checkpoint that somebody else made: read, or refused in one line with file and field."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from .json_file import read_json

CONFIG_FILE = "config.json"
# The field of configurations and what it may hold, where another value is an error that names neither file nor field.
_OBJECTS = ("id2label", "label2id", "auto_map", "task_specific_params")
_DTYPES = ("dtype", "torch_dtype")
# Above these a field is a mistake, or meant to use up the memory; no encoder comes near.
_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_channels", "key_feature_size"), 10**5),
    **dict.fromkeys(("local_kernel_size", "patch_size", "num_register_tokens", "type_vocab_size"), 10**5),
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 10**7),
    **dict.fromkeys(("image_size", "num_labels", "embedding_size", "local_window"), 10**7),
}


def read_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of the checkpoint in a folder.

    Raises:
        ValueError: the file is no JSON, or a field has a value that no configuration can have; the message names both.
        OSError: there is none.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return AutoConfig.from_pretrained(folder)  # whose error says where one was looked for
    content = read_json(path, dict)
    _check_content(content, path)
    try:
        return AutoConfig.from_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of a broken field there is no end of kinds, some of them direct children of Exception
        field = _find_field(content)
        where = f"{path}: field {field!r}, {content[field]!r:.80}" if field else str(path)
        message = " ".join(str(error).split())
        raise ValueError(f"{where}: {message:.500}") from error


def _check_content(content: dict[str, Any], path: Path) -> None:
    def refuse(name: str, wanted: str) -> None:
        raise ValueError(f"{path}: field {name!r} must be {wanted}, got {content[name]!r:.80}")

    for name, value in content.items():
        if callable(getattr(PretrainedConfig, name, None)) or name in ("check_fields", "__class__"):
            raise ValueError(f"{path}: no field can be called {name!r}, which is a method of configurations")
        if name in _OBJECTS and value is not None and not isinstance(value, dict):
            refuse(name, "a JSON object")
        if name in _DTYPES and value is not None and not _is_dtype(value):
            refuse(name, "the name of a dtype of torch, such as 'float32'")
        if name == "architectures" and not _is_list_of(value, str) and value is not None:
            refuse(name, "a list of class names")
        sizes = value if isinstance(value, list) else [value]
        limit = _LIMITS.get(name)
        if limit and any(isinstance(size, int | float) and not abs(size) <= limit for size in sizes):
            refuse(name, f"at most {limit:,}")


def _is_dtype(value: Any) -> bool:
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    return name == "auto" or isinstance(getattr(torch, name, None), torch.dtype)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _find_field(content: dict[str, Any]) -> str | None:
    """The field without which the configuration can be made; None where there is no such single one."""
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        return None
    for name in content:
        if name == "model_type":
            continue
        rest = {key: value for key, value in content.items() if key not in ("model_type", name)}
        try:
            AutoConfig.for_model(model_type, **rest)
        except Exception:
            continue
        return name
    return None
