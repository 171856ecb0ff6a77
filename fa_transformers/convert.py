"""Load a stock or FA checkpoint as an FA model: configuration, parameter names, length of the position table."""

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .models import ARCHITECTURES


def load_factorized(
    model_name_or_path: str, auto_class: str, *, max_length: int | None = None, **config_overrides
) -> PreTrainedModel:
    """The FA model of a checkpoint of stock BERT or ViT class, or of one of ours.

    Weights that the checkpoint has are taken over, others (a new head, feature maps, local terms) are fresh. No
    recovery training is done: a stock checkpoint's factorized layers compute something else than it was trained with.

    Args:
        model_name_or_path: a local folder or a Hub repository.
        auto_class: which head, by the name of its Auto class, such as "AutoModelForSequenceClassification".
        max_length: tokens that the model must take. A shorter table of "absolute" positions is tiled to this length.
        config_overrides: configuration fields to set, such as `local_window` or `num_labels`.

    Raises:
        ValueError: the checkpoint's architecture has no FA counterpart, or no such head; or a field has a bad value.
    """
    source = AutoConfig.from_pretrained(model_name_or_path)
    families = {name: config for config in ARCHITECTURES for name in (config.model_type, *config.STOCK_MODEL_TYPES)}
    if source.model_type not in families:
        raise ValueError(
            f"{model_name_or_path!r} is of type {source.model_type!r}, which has no FA model; types that have: "
            f"{', '.join(families)}."
        )
    config_class = families[source.model_type]
    heads = ARCHITECTURES[config_class]
    if auto_class not in heads:
        raise ValueError(
            f"`auto_class` {auto_class!r} does not exist for {config_class.model_type!r}; choose from {list(heads)}."
        )
    model, loaded = heads[auto_class].from_pretrained(
        model_name_or_path, ignore_mismatched_sizes=True, output_loading_info=True, **config_overrides
    )
    # A head for another number of labels starts fresh; an encoder weight of another shape must not.
    for name, found, wanted in sorted(loaded["mismatched_keys"]):
        if name.startswith(f"{model.base_model_prefix}."):
            raise ValueError(
                f"{model_name_or_path!r} has {name} of shape {tuple(found)}, the configuration asks for "
                f"{tuple(wanted)}; leave out the field that changes it."
            )
    if max_length is not None and model.main_input_name == "input_ids":
        extend_positions(model, max_length)
    return model


def extend_positions(model: PreTrainedModel, max_length: int) -> None:
    """Tile the table of "absolute" positions to `max_length` rows, in place: row i becomes row i mod the old length.

    Tables that are long enough, "periodic" ones (any length runs) and absent ones are left as they are.
    """
    embeddings = model.base_model.embeddings
    old = embeddings.position_embeddings
    if model.config.position_embedding_type != "absolute" or old.num_embeddings >= max_length:
        return
    rows = torch.arange(max_length, device=old.weight.device) % old.num_embeddings
    embeddings.position_embeddings = nn.Embedding.from_pretrained(old.weight.detach()[rows].clone(), freeze=False)
    model.config.max_position_embeddings = max_length
