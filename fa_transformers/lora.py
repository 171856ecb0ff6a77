"""A LoRA preset for converted models: it names the weights that get low-rank updates and those that train whole."""

from typing import Any

from transformers import PreTrainedModel

from .models.fa_mixer import FactorizedMixer
from .models.modeling_fa import FAPreTrainedModel

ATTENTION_PROJECTIONS = r".*\.attention\..*\b(query|key|value|dense)"
"""All four linear layers of every attention, by their full names; the feed-forward layers are left out."""

# Question answering has none here: peft 0.21's wrapper for it drops `token_type_ids` and `position_ids`.
TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
PRETRAINED_HEADS = ("cls", "decoder")
"""Heads of pretraining, which a checkpoint brings along; every other head starts fresh and has to train whole."""


def fa_lora_config(model: PreTrainedModel, *, r: int = 8, lora_alpha: int | None = None, **options: Any) -> Any:
    """Make a `peft.LoraConfig` for an FA model: `peft.get_peft_model(model, fa_lora_config(model))`.

    The projections to Q, K, V and the attention's output get updates of rank `r`. Parameters that a stock checkpoint
    lacks train whole and are saved with the adapter: the head of a classifier, and the mixers' own parameters (feature
    maps, temperatures, convolutions, gates), where the model has any.

    Args:
        r: rank of the updates.
        lora_alpha: they are scaled by `lora_alpha` / `r`. None is 2 `r`.
        options: further fields of `LoraConfig`; they win over the preset's.

    Raises:
        ModuleNotFoundError: peft is not installed.
        TypeError: `model` is not an FA model.
    """
    try:
        from peft import LoraConfig  # only here: it takes a second to import
    except ImportError as error:
        raise ModuleNotFoundError(
            "`fa_lora_config` needs peft, which is not installed: pip install 'peft>=0.18.1'"
        ) from error
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
    preset = {
        "task_type": next((task for head, task in TASK_TYPES.items() if type(model).__name__.endswith(head)), None),
        "target_modules": ATTENTION_PROJECTIONS,
        "modules_to_save": whole or None,
        "lora_alpha": 2 * r if lora_alpha is None else lora_alpha,
    }
    return LoraConfig(r=r, **preset | options)
