"""LoRA for converted models: a preset of what trains, where an adapter's base lies, and folders of adapters."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, logging

from .models.fa_mixer import FactorizedMixer
from .models.modeling_fa import FAPreTrainedModel

logger = logging.get_logger(__name__)

ATTENTION_PROJECTIONS = r".*\.attention\..*\b(query|key|value|dense)"
"""All four linear layers of every attention, by their full names; the feed-forward layers are left out."""

# Question answering has none here: peft 0.21's wrapper for it drops `token_type_ids` and `position_ids`.
TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
PRETRAINED_HEADS = ("cls", "decoder")
"""Heads of pretraining, which a checkpoint brings along; every other head starts fresh and has to train whole."""
ADAPTER_CONFIG = "adapter_config.json"
NO_BASE = (
    "The adapter will name no base, so that AutoPeftModel can't load it: no folder holds this model as it is (a stock "
    "checkpoint that was converted in memory, or other fields than its folder has). Convert and save the base first: "
    "convert_checkpoint(..., output_dir='base'), whose model knows its folder."
)


def fa_lora_config(model: PreTrainedModel, *, r: int = 8, lora_alpha: int | None = None, **options: Any) -> Any:
    """Make a `peft.LoraConfig` for an FA model: `peft.get_peft_model(model, fa_lora_config(model))`.

    The projections to Q, K, V and the attention's output get updates of rank `r`. Parameters that a stock checkpoint
    lacks train whole and are saved with the adapter: the head of a classifier, the mixers' own parameters (feature
    maps, temperatures, convolutions, gates), where the model has any, and a pooler that the conversion drew anew.

    An adapter names its base where a folder or repository holds the very model: one that `convert_checkpoint` or
    `publish` wrote, or that `load_factorized` loaded as it is. Of any other it names none, with a warning: the name of
    a stock checkpoint would make peft load its softmax model, whose layers have the same names.

    Args:
        r: rank of the updates.
        lora_alpha: they are scaled by `lora_alpha` / `r`. None is 2 `r`.
        options: further fields of `LoraConfig`; they win over the preset's.

    Raises:
        ModuleNotFoundError: peft is not installed.
        TypeError: `model` is not an FA model.
        ValueError: `options` reach the word embeddings or the decoder tied to them, so that merging would part the two.
    """
    require_peft("`fa_lora_config`")
    from peft import LoraConfig  # only here: it takes a second to import

    if not isinstance(model, FAPreTrainedModel):
        raise TypeError(
            f"`model` must be an FA model, as `load_factorized` gives it, got {type(model).__name__}; call this before "
            "`get_peft_model`."
        )
    whole = [
        name
        for name, child in model.named_children()
        if name not in (model.base_model_prefix, *PRETRAINED_HEADS) and any(True for _ in child.parameters())
    ]
    if model.base_model is model:  # without a head its children are the encoder's own parts
        whole = []
    if any(any(True for _ in part.parameters()) for part in model.modules() if isinstance(part, FactorizedMixer)):
        whole.append("mixer")
    whole += [name for name in getattr(model, "fresh_modules", ()) if name.endswith("pooler.dense")]
    preset = {
        "task_type": next((task for head, task in TASK_TYPES.items() if type(model).__name__.endswith(head)), None),
        "target_modules": ATTENTION_PROJECTIONS,
        "modules_to_save": whole or None,
        "lora_alpha": 2 * r if lora_alpha is None else lora_alpha,
    }
    config = LoraConfig(r=r, **preset | options)
    _check_tied(model, config)
    if model.name_or_path and _is_stock(model):
        set_location(model, "")
    if not model.name_or_path:
        logger.warning(NO_BASE)
    return config


def require_peft(what: str) -> None:
    """Check that peft is installed.

    Raises:
        ModuleNotFoundError: it isn't; the message begins with `what`, which needs it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(f"{what} needs peft, which is not installed: pip install 'peft>=0.18.1'")


def set_location(model: PreTrainedModel, name: str) -> None:
    """Say where a model's weights can be loaded from, which peft writes into adapters: a folder, a repository or ""."""
    model.name_or_path = model.config.name_or_path = name


def is_unmerged(model: PreTrainedModel) -> bool:
    """Return True where adapters are inside a model, so that its weights have other names than its class gives them."""
    return any(part in name for name, _ in model.named_parameters() for part in (".base_layer.", ".modules_to_save."))


def describe_adapter(folder: Path, name: str | None = None) -> str | None:
    """Return a sentence that says of a folder, called `name`, that it is an adapter of which base, and what to do.

    None where it is none, or has the weights of a whole model as well.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, base = content.get("peft_type"), content.get("base_model_name_or_path")
    except (ValueError, RecursionError, AttributeError):
        kind = base = None
    kind = {"LORA": "LoRA", None: "PEFT"}.get(kind, kind)
    return (
        f"{name or folder} is a {kind} adapter of {base or 'a base that it does not name'}: merge it first "
        "(merge_and_unload), then save the merged model and give its folder."
    )


def _is_stock(model: PreTrainedModel) -> bool:
    """Whether the configuration at a model's location is of another type, as after loading a stock checkpoint."""
    name = model.name_or_path
    try:
        path: Any = Path(name, "config.json") if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
        return json.loads(Path(path).read_text(encoding="utf-8")).get("model_type") != model.config.model_type
    except (OSError, ValueError, TypeError):  # it is gone since, or came from elsewhere
        return False


def _check_tied(model: PreTrainedModel, config: Any) -> None:
    """Raise ValueError, naming the field, where a LoRA config reaches weights that embeddings and decoder share."""
    words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    if decoder is None or decoder.weight is not words.weight:
        return
    names = {part: name for name, part in model.named_modules()}
    tied = (names[words], names[decoder])
    holders = [name for name in names.values() if any(f"{one}.".startswith(f"{name}.") for one in tied)]
    holders.remove(names[decoder])  # one that trains whole is parted from the embeddings by peft itself, bias and all
    targets = config.target_modules or ()
    if isinstance(targets, str):
        is_target = any(re.fullmatch(targets, name) for name in tied)
    else:
        is_target = any(f".{name}".endswith(f".{target}") for name in tied for target in targets)
    wrong = {
        "target_modules": is_target,
        "modules_to_save": any(name.endswith(part) for part in config.modules_to_save or () for name in holders),
        "trainable_token_indices": getattr(config, "trainable_token_indices", None) is not None,
    }
    field = next((field for field, is_wrong in wrong.items() if is_wrong), None)
    if field is not None:
        raise ValueError(
            f"`{field}` {getattr(config, field)!r} reaches the word embeddings or the decoder that is tied to them: "
            f"merging would give {type(model).__name__} other outputs or lose its bias. Leave them out; to train the "
            "decoder, modules_to_save=['decoder'] parts it from the embeddings."
        )
