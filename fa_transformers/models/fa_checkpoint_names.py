"""Pure functions that translate the names in stock checkpoints to ours.

FA models use the names that stock BERT and ViT checkpoints have on disk. DINOv2 names differ, and so do the names that
transformers 5 uses in memory and some tools write. Loading with `from_pretrained` and conversion both go through the
tables here.
"""

import re

# Applied in order to a whole parameter name. Our own names match none of them.
VIT_NAME_PATTERNS = {
    r"^(dinov2_with_registers|dinov2)\.": r"vit.",
    r"^((?:vit\.)?)layers\.": r"\1encoder.layer.",
    r"^((?:vit\.)?encoder\.)layers\.": r"\1layer.",
    r"\.norm1\.": r".layernorm_before.",
    r"\.norm2\.": r".layernorm_after.",
    r"\.mlp\.fc1\.": r".intermediate.dense.",
    r"\.mlp\.fc2\.": r".output.dense.",
    r"\.attention\.q_proj\.": r".attention.attention.query.",
    r"\.attention\.k_proj\.": r".attention.attention.key.",
    r"\.attention\.v_proj\.": r".attention.attention.value.",
    r"\.attention\.o_proj\.": r".attention.output.dense.",
}

# Fields that describe the checkpoint file and must not travel to a model of another type.
_CHECKPOINT_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version")
# DINOv2 fields without a meaning here.
_DINOV2_FIELDS = ("stage_names", "use_mask_token")


def translate_vit_name(name: str) -> str:
    """Return FAViT's name of a parameter of stock ViT or DINOv2, as transformers 4 or 5 calls it."""
    for pattern, replacement in VIT_NAME_PATTERNS.items():
        name = re.sub(pattern, replacement, name)
    return name


def translate_config(config_dict: dict, model_type: str, stock_model_types: tuple[str, ...]) -> dict:
    """Return a stock checkpoint's configuration as one of `model_type`, marked as converted and not trained.

    A configuration of `model_type` itself comes back unchanged.

    Raises ValueError if the configuration is of an architecture that cannot be translated.
    """
    source = config_dict.get("model_type", model_type)
    if source == model_type:
        return config_dict
    if source not in stock_model_types:
        raise ValueError(
            f"The checkpoint is of type {source!r}, which cannot be loaded as {model_type!r}; "
            f"types that can: {', '.join(stock_model_types)}."
        )
    translated = {name: value for name, value in config_dict.items() if name not in _CHECKPOINT_FIELDS}
    translated["model_type"] = model_type
    translated.setdefault("recovery", "pending")
    return _translate_dinov2(translated, source) if source.startswith("dinov2") else translated


def _translate_dinov2(config_dict: dict, source: str) -> dict:
    for name in ("use_swiglu_ffn", "drop_path_rate"):
        if config_dict.pop(name, 0):
            raise ValueError(f"DINOv2 checkpoints with `{name}` set are not supported; it must be off.")
    for name in _DINOV2_FIELDS:
        config_dict.pop(name, None)
    if config_dict.get("out_indices") == [
        config_dict.get("num_hidden_layers", 12)
    ]:  # the default, also of fewer layers
        config_dict.pop("out_indices")
        config_dict.pop("out_features", None)
    mlp_ratio = config_dict.pop("mlp_ratio", 4)
    config_dict.setdefault("hidden_size", 768)
    config_dict["intermediate_size"] = int(config_dict["hidden_size"] * mlp_ratio)
    config_dict.setdefault("layerscale_value", 1.0)
    config_dict.setdefault("layer_norm_eps", 1e-6)
    has_registers = source == "dinov2_with_registers"
    config_dict.setdefault("patch_size", 16 if has_registers else 14)
    config_dict.setdefault("num_register_tokens", 4 if has_registers else 0)
    config_dict["position_embedding_antialias"] = has_registers
    return config_dict
