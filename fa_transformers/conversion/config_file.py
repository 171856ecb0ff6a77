"""The configuration file of a checkpoint that somebody else made: read, or refused in one line with file and field."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..models.configuration_fa import check_content
from .json_file import read_json

CONFIG_FILE = "config.json"


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
    try:
        check_content(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}".replace("`", "'")) from error
    try:
        return AutoConfig.from_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of a broken field there is no end of kinds, some of them direct children of Exception
        field = _find_field(content)
        where = f"{path}: field {field!r}, {content[field]!r:.80}" if field else str(path)
        message = " ".join(str(error).split())
        raise ValueError(f"{where}: {message:.500}") from error


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
