"""LoRA in a fine-tuning run: adapters in the model that trains, their folder and its base's, and the merged model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..lora import ADAPTER_CONFIG, fa_lora_config, set_location
from ..options import ModelOptions

ADAPTER_FOLDER = "adapter"
BASE_FOLDER = "base"


def add_adapter(
    model: PreTrainedModel, processor: Any, options: ModelOptions, output_dir: Path, *, saves_base: bool
) -> Any:
    """Put LoRA into a model, in place, so that only what `fa_lora_config` names trains; return peft's wrapper of it.

    Where no folder or repository holds the model as it is, the adapter will name `output_dir`/base: a stock checkpoint
    would be loaded as the softmax model that it is. With `saves_base` the model is saved there.
    """
    from peft import get_peft_model  # only here: it takes a second to import

    if not model.name_or_path:
        base = output_dir / BASE_FOLDER
        if saves_base:
            model.save_pretrained(base)
            processor.save_pretrained(base)
        set_location(model, str(base))
    config = fa_lora_config(model, r=options.lora_rank, lora_alpha=options.lora_alpha)
    return get_peft_model(model, config)


def save_adapter(adapted: Any, processor: Any, output_dir: Path, announce: Callable[[str], None]) -> None:
    """Write an adapter to `output_dir`/adapter, with the tokenizer or image processor beside it."""
    folder = output_dir / ADAPTER_FOLDER
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    announce(f"wrote {folder}, an adapter of {adapted.get_base_model().name_or_path}; {output_dir} has it merged")


def remove_adapter(output_dir: Path, source: Path | None) -> None:
    """Delete the adapter that an earlier run left in a folder, and the base that it saved for it, unless `source`, the
    checkpoint to start from, lies there."""
    adapter, base = output_dir / ADAPTER_FOLDER, output_dir / BASE_FOLDER
    try:
        named = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):  # none of ours
        return
    for folder in (adapter, base) if named == str(base) else (adapter,):
        if folder.is_dir() and (source is None or source.resolve() != folder.resolve()):
            shutil.rmtree(folder)
