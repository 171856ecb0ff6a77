"""Floating-point operations of training, counted from the model, and what devices can do at most."""

import torch
from torch import nn

from ..models.modeling_fa import FAPreTrainedModel

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}
"""Peak of dense bf16 matrix products in 10^12 operations per second by a part of the device's name, from NVIDIA's data
sheets; the first part that fits counts."""


def peak_flops(device_name: str) -> float | None:
    """Operations per second of dense bf16 products at most, or None for a device that is not in `PEAK_TFLOPS`."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_TFLOPS.items():
        if all(word in words for word in name.split()):
            return peak * 1e12
    return None


def device_peak_flops(device: torch.device) -> float | None:
    """`peak_flops` of a CUDA device; None for any other."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def training_flops_per_token(model: nn.Module) -> tuple[float, float] | None:
    """Operations of forward and backward pass per token, 6 P + 3 A, as (a, b) for documents of N tokens: a + b N.

    P is the number of weights that multiply every token: those of the encoder's linear maps, feature maps and
    convolutions, of the patch projection, and of the head of masked language models. Pooler and classifiers, which
    see one token of a document, are left out. A is what the mixers do beside, forward, per layer with hidden width C:

        factorized   4 C F            context and its application; F is `key_feature_size` or the head width
        window       4 C (2 w + 1)    of `local_window` w; for images the square of the bracket
        softmax      4 C N            a layer of `softmax_layers`

    Forward a product takes two operations per weight, backward four: two for the gradient of its input and two for that
    of its weight. Recomputation by gradient checkpointing and padding are not counted; frozen layers are, as if they
    trained. None where `model` is no FA model.
    """
    if not isinstance(model, FAPreTrainedModel):
        return None
    config = model.config
    weights = [
        parameter
        for name, parameter in model.base_model.encoder.named_parameters()
        if parameter.dim() > 1 and not name.endswith(("bias", "log_sharpness"))
    ]
    weights += [module.weight for module in model.base_model.embeddings.modules() if isinstance(module, nn.Conv2d)]
    if model.get_output_embeddings() is not None:
        inside = set(model.base_model.modules())
        outside = [module for module in model.modules() if module not in inside and isinstance(module, nn.Linear)]
        weights += [module.weight for module in outside]
    features = config.key_feature_size or config.hidden_size // config.num_attention_heads
    is_image = hasattr(config, "patch_shape")
    window = (2 * config.local_window + 1) ** (2 if is_image else 1) if config.local_window else 0
    num_softmax = len(config.softmax_layers)
    mixed = 12 * config.hidden_size * (config.num_hidden_layers - num_softmax) * (features + window)
    return 6 * sum(weight.numel() for weight in weights) + mixed, 12 * config.hidden_size * num_softmax
