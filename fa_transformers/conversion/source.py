"""A checkpoint to start from: found once by its name, then handed on with its configuration and its files.

`read_source` resolves a name, a folder or a model in memory; conversion, tokenizer or image processor, and the model
card all take the `CheckpointSource` that it returns, so that a run looks each name up once.
"""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..files import sha256_of
from ..hub.card import FACTS_FILE, FROM_SCRATCH, FactError, ModelFacts
from ..hub.self_check import path_inside
from ..lora import describe_adapter
from .config_file import read_config
from .json_file import read_json, refusing_sources
from .packaged import HUB_IDS, resolve_checkpoint

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MODULES_FILE = "modules.json"
POOLING_MODES = {
    "pooling_mode_mean_tokens": "mean", "mean": "mean", "pooling_mode_cls_token": "cls", "cls": "cls",
}  # fmt: skip
WITHOUT_WEIGHTS = (".Pooling", ".Normalize")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint as it was found.

    Args:
        name: what messages and the card call it: the path, the Hub name or the class.
        config: its configuration.
        architecture: the name of its model class, "" where it isn't stated.
        dtype: what the result is to have; "auto" is as the configuration or the tensors say.
        folder: where its files are; None for a model in memory.
        model_folder: the same, or the folder inside it that an old sentence-transformers model keeps its encoder in.
        tensors: of a model in memory, by name; None where they are in the folder and read when they are needed.
    """

    name: str
    config: PretrainedConfig
    architecture: str
    dtype: torch.dtype | str = "auto"
    folder: Path | None = None
    model_folder: Path | None = None
    tensors: Mapping[str, Tensor] | None = None

    def load_tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors, by the names that they have in the checkpoint.

        Raises:
            FileNotFoundError: the folder has no weights.
        """
        if self.tensors is not None:
            return {name: tensor.clone() for name, tensor in self.tensors.items()}
        assert self.model_folder is not None  # only a model in memory has none
        return read_tensors(self.model_folder)


@refusing_sources()
def read_source(model_or_path: str | os.PathLike | PreTrainedModel | CheckpointSource) -> CheckpointSource:
    """Find a checkpoint and read its configuration; its weights are read when they are needed.

    Args:
        model_or_path: a model in memory, a folder, a short name of `packaged`, or a repository of the Hub, which is
            downloaded. A source that was found already is returned as it is.

    Raises:
        ModuleNotFoundError: the package with the weights that a short name stands for is not installed.
        OSError: there is no such folder or repository, or it has no configuration.
        ValueError: it is an adapter; a file of it is damaged, or names or links to one outside of the folder.
    """
    if isinstance(model_or_path, CheckpointSource):
        return model_or_path
    if isinstance(model_or_path, PreTrainedModel):
        model = model_or_path
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        class_name = type(model).__name__
        return CheckpointSource(class_name, model.config, class_name, model.dtype, tensors=tensors)
    name = os.fspath(model_or_path)
    folder = locate_checkpoint(name)
    if (adapter := describe_adapter(folder, name)) is not None:
        raise ValueError(adapter)
    model_folder = _find_encoder(folder)
    for one in {folder, model_folder}:
        check_links(one)
    config = read_config(model_folder)
    architecture = (config.architectures or [""])[0]
    return CheckpointSource(name, config, architecture, "auto", folder, model_folder)


def locate_checkpoint(name_or_path: str) -> Path:
    """Return the folder of a checkpoint, as `read_source` takes it by name; a repository of the Hub is downloaded.

    Raises:
        ModuleNotFoundError: the package with the weights that a short name stands for is not installed.
        OSError: there is no such folder or repository.
    """
    found = name_or_path if Path(name_or_path).is_dir() else resolve_checkpoint(name_or_path)
    if Path(found).is_dir():
        return Path(found)
    try:
        return _download(found)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name_or_path!r} is no folder here, and no name that a repository of the Hub can have, such as "
            "'owner/name'; correct it"
        ) from error
    except OSError as error:  # which need not say what was looked for
        raise FileNotFoundError(
            f"{name_or_path!r} is no folder here, and the Hub gave no such repository; correct the name. The Hub's "
            f"client said: {' '.join(str(error).split())}"
        ) from error


def _find_encoder(folder: Path) -> Path:
    """The folder of the first module of a sentence-transformers model; any other folder itself."""
    modules = read_modules(folder)
    return folder / modules[0]["path"] if modules else folder


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """Return the modules of a sentence-transformers model, with their "path" and "type"; [] for any other folder.

    Raises:
        ValueError: the list is damaged, or a module lies outside of the folder; the message names file and entry.
    """
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    modules = read_json(path, list)
    for number, module in enumerate(modules, start=1):
        for key in ("path", "type"):
            if not isinstance(module, dict) or not isinstance(module.get(key), str):
                raise ValueError(f"{path}: module {number} must be an object with a text {key!r}, got {module!r:.80}")
        path_inside(folder, module["path"], f'{path}: "path" of module {number}')
    return modules


def check_links(folder: Path) -> None:
    """Check that what a checkpoint's folder would have copied into ours comes from the folder itself.

    Weights may be links to elsewhere: only tensors are read of them.

    Raises:
        ValueError: a file is a link that leads out of the folder, or the tokenizer names a file outside of it.
    """
    for path in [*sorted(folder.iterdir()), *sorted((folder / "additional_chat_templates").glob("*"))]:
        if path.is_symlink() and path.exists() and path.name not in WEIGHT_FILES:
            path_inside(folder, path.relative_to(folder).as_posix(), f"{folder}: the entry")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return
    for key, value in read_json(settings, dict).items():
        # Many checkpoints name a file of the machine that they were made on, which is not here.
        if key.endswith("_file") and isinstance(value, str) and os.path.exists(folder / value):
            path_inside(folder, value, f"{settings}: {key!r}")


@refusing_sources()
def read_pooling(folder: Path) -> str | None:
    """Return how a sentence-transformers model makes one vector of a text, "mean" or "cls"; None where it isn't stated.

    Raises:
        ValueError: it pools in another way.
    """
    for module in read_modules(folder):
        if not module["type"].endswith(".Pooling"):
            continue
        settings = read_json(folder / module["path"] / "config.json", dict)
        # Later versions write one name, or a list of those that they concatenate; earlier ones a switch for each.
        stated = settings.get("pooling_mode")
        if stated is None:
            stated = [name for name, on in settings.items() if on is True and name.startswith("pooling_mode_")]
        modes = [stated] if isinstance(stated, str) else stated
        if len(modes) != 1 or modes[0] not in POOLING_MODES:
            raise ValueError(
                f"{folder} pools by {', '.join(modes) or 'nothing'}; only the mean and the first token are known here."
            )
        return POOLING_MODES[modes[0]]
    return None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder's weights, in one file or several, preferably safetensors.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged, or the index names one outside of the folder; the message names the file.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = _files_of_index(index)
        elif (folder / name).is_file():
            files = [name]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _read_tensor_file(folder / file)
        return tensors
    raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}, whole or in parts.")


def _files_of_index(index: Path) -> list[str]:
    parts = read_json(index, dict).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f'{index}: "weight_map" must name the file of every tensor, got {parts!r:.80}')
    for tensor, file in parts.items():
        path_inside(index.parent, file, f'{index}: "weight_map" of {tensor!r}')
    return sorted(set(parts.values()))


def _read_tensor_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or no file of weights: {reason}") from error


def load_processor(source: CheckpointSource, main_input_name: str, **options: Any) -> Any:
    """Load the tokenizer or image processor beside a checkpoint; None where there is none.

    `main_input_name` says which of the two; `options` are for an image processor.
    """
    folder = source.model_folder
    if folder is None:
        return None
    if main_input_name == "pixel_values":
        has_processor = (folder / "preprocessor_config.json").is_file()
        return AutoImageProcessor.from_pretrained(folder, **options) if has_processor else None
    has_tokenizer = any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))
    return AutoTokenizer.from_pretrained(folder) if has_tokenizer else None


def describe_source(model_or_path: str | os.PathLike | PreTrainedModel | CheckpointSource) -> tuple[str, str]:
    """Return the name by which a model card calls a checkpoint, and what fixes exactly which weights those were.

    Of a repository of the Hub these are its name and the commit, of a local folder what `describe_folder` finds.

    Raises:
        OSError: there is no such folder or repository, as in `read_source`.
    """
    source = read_source(model_or_path)
    if source.model_folder is None:
        return f"local/{source.name}", "a model in memory"
    if not Path(source.name).is_dir() and source.name not in HUB_IDS:
        assert source.folder is not None
        return source.name, source.folder.resolve().name  # the cache names each revision's folder by its commit
    return describe_folder(source.name, source.model_folder)


def describe_folder(name: str, encoder: Path) -> tuple[str, str]:
    """Return the Hub name of a local checkpoint, and the checksum of the weights in the folder `encoder`.

    A folder that `publish` wrote goes by the base model that its card names, which is on the Hub; others by "local/".
    """
    weights = min(path for file in WEIGHT_FILES for path in encoder.glob(f"{Path(file).stem}*{Path(file).suffix}"))
    revision = f"sha256 {sha256_of(weights)} of {weights.name}"
    if name in HUB_IDS:
        return HUB_IDS[name], revision
    local_name = "local/" + "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(name).resolve().name)
    try:
        origin = ModelFacts.load(Path(name) / FACTS_FILE)
    except (FactError, FileNotFoundError):  # of another version, or none: what was trained must not be lost for it
        return local_name, revision
    if origin.base_model == FROM_SCRATCH:
        return local_name, revision
    return origin.base_model, f"{origin.base_model_revision}, by way of {local_name}, {revision}"


def _download(repo_id: str) -> Path:
    """Download a repository's texts and weights, of each module safetensors or else PyTorch's format; its folder."""
    folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    modules = read_modules(folder)
    places = [module["path"] for module in modules if not module["type"].endswith(WITHOUT_WEIGHTS)] or [""]
    missing = [f"{place}/*.bin".lstrip("/") for place in places if not any((folder / place).glob("*.safetensors"))]
    return Path(snapshot_download(repo_id, allow_patterns=missing)) if missing else folder
