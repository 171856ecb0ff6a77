"""A trained classifier or regressor from its folder, or one line that says why a folder can't answer."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..conversion.json_file import SourceError
from ..conversion.source import load_processor, locate_checkpoint, read_source
from ..lora import describe_adapter
from ..models.configuration_fa import FactorizedConfig

HEADS = {"ForSequenceClassification": "input_ids", "ForImageClassification": "pixel_values"}
"""Ends of the names of classes that answer for a whole text or image, and what these take."""


def load_classifier(
    name: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a factorized classifier or regressor and its tokenizer or image processor.

    Args:
        name: a folder, or a repository of the Hub, which is downloaded.
        device: None is the GPU, if there is one.
        dtype: of the weights; None is as they were saved.

    Raises:
        SourceError: it is a stock model, an adapter, a model with another head or none, or damaged.
        FileNotFoundError: there is no such folder or repository.
    """
    place = _find_device(device)
    folder = locate_checkpoint(name)
    _check_folder(name, folder)
    try:
        source = read_source(str(folder))
    except OSError as error:
        raise SourceError(f"{name} is no model folder: {' '.join(str(error).split())}") from error
    model_type = source.config.model_type
    if not isinstance(source.config, FactorizedConfig):
        raise SourceError(
            f"{name} is a stock {model_type} model with softmax attention: convert it first (fa-transformers convert "
            f"{name} OUTPUT_DIR), and fine-tune what comes out, or fine-tune it at once "
            f"(fa-transformers finetune --model_name_or_path {name})"
        )
    head = next((head for head in HEADS if source.architecture.endswith(head)), None)
    if head is None:
        what = source.architecture or model_type
        raise SourceError(
            f"{name} is a {what}, without a classifier's head: fine-tune it first (fa-transformers finetune)"
        )
    auto_class = getattr(transformers, f"AutoModel{head}")
    processor = _load_processor(name, source, HEADS[head])
    try:
        model, report = auto_class.from_pretrained(
            source.model_folder, config=source.config, dtype=dtype or "auto", output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise SourceError(f"{name}: the weights can't be loaded: {' '.join(str(error).split()):.300}") from error
    if report["missing_keys"]:
        raise SourceError(f"{name}: the weights lack {sorted(report['missing_keys'])[0]}: copy the folder again")
    _check_vocabulary(name, processor, source.config)
    model.to(place).eval()
    for parameter in model.parameters():
        # Weights that were read from a file lie at any address, and products may round by it: a run that goes on with
        # another one must find the same digits.
        parameter.data = parameter.data.clone()
    return model, processor


def _find_device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch's words for a device that isn't there
        raise ValueError(f"`device={str(device)!r}` can't be used: {str(error).splitlines()[0]}") from error
    return place


def _check_folder(name: str, folder: Path) -> None:
    if (told := describe_adapter(folder, name)) is not None:
        raise SourceError(told)
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise SourceError(f"{name} is no model folder: it has no config.json")


def _load_processor(name: str, source: Any, main_input_name: str) -> Any:
    try:
        processor = load_processor(source, main_input_name)
    except Exception as error:  # of a damaged file there is no end of kinds, some direct children of Exception
        raise SourceError(f"{name}: the {_noun(main_input_name)} can't be loaded: {str(error):.300}") from error
    if processor is None:
        raise SourceError(f"{name} has no {_noun(main_input_name)}: save the one that it was trained with beside it")
    return processor


def _noun(main_input_name: str) -> str:
    return "tokenizer" if main_input_name == "input_ids" else "image processor (preprocessor_config.json)"


def _check_vocabulary(name: str, processor: Any, config: Any) -> None:
    rows = getattr(config, "vocab_size", None)
    if rows is not None and len(processor) > rows:
        raise SourceError(
            f"{name}: the tokenizer has {len(processor)} tokens, the model's table {rows}: they don't belong together"
        )
