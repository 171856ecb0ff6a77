"""The optimiser of a run: which weights it trains, at which rates, by which schedule."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from ..options import LoopOptions


def group_parameters(
    model: PreTrainedModel,
    learning_rate: float,
    head_learning_rate: float,
    weight_decay: float,
    mixers_are_new: bool = False,
) -> list[dict]:
    """AdamW parameter groups of a transformers model: encoder and head apart, with and without weight decay.

    The head is every parameter outside `model.base_model`; where `mixers_are_new`, the feature maps, convolutions and
    gates of FA layers count as head, because a stock checkpoint has no values for them. Biases, norms and every other
    vector get no decay. Frozen parameters are left out.
    """
    prefix = f"{model.base_model_prefix}."

    def rates_of(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        is_head = not name.startswith(prefix) or (mixers_are_new and ".mixer." in name)
        decays = parameter.ndim > 1 and not name.endswith(("bias", "log_sharpness"))
        return head_learning_rate if is_head else learning_rate, weight_decay if decays else 0.0

    return group_by_rates(model, rates_of)


def group_by_rates(module: nn.Module, rates_of: Callable[[str, nn.Parameter], tuple[float, float]]) -> list[dict]:
    """AdamW parameter groups of a module, one for each (learning rate, weight decay) that `rates_of` gives.

    `rates_of` takes a parameter's name and the parameter. Frozen parameters are left out.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rates_of(name, parameter), []).append(parameter)
    return [{"params": parameters, "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]


def build_optimizer(groups: list[dict], loop: LoopOptions, max_steps: int) -> tuple[Optimizer, LRScheduler]:
    """AdamW over parameter groups, and the schedule of their rates that `loop` names, over `max_steps` steps."""
    optimizer = torch.optim.AdamW(groups)
    num_warmup_steps = loop.warmup_steps or int(loop.warmup_ratio * max_steps)
    return optimizer, get_scheduler(loop.lr_scheduler_type, optimizer, num_warmup_steps, max_steps)


def freeze_bottom_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Stop training of the embeddings and the lowest `num_layers` encoder layers; 0 freezes nothing.

    Raises:
        ValueError: the encoder has fewer layers, or `num_layers` is negative.
    """
    if num_layers == 0:
        return
    layers = model.base_model.encoder.layer
    if not 0 < num_layers <= len(layers):
        raise ValueError(f"--freeze_layers must be from 0 to {len(layers)}, the number of layers, got {num_layers}.")
    for module in (model.base_model.embeddings, *layers[:num_layers]):
        module.requires_grad_(False)
