"""Started by test_data_parallel.py under torchrun: every head under DDP, whole models under FSDP2's `fully_shard`."""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import HEADS, OPTION_SETS, build, image_inputs, inputs_of, loss_of, text_inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fa_transformers.models import (
    FABertConfig,
    FABertForSequenceClassification,
    FAViTConfig,
    FAViTForImageClassification,
)

SHARDED = [(FABertConfig, FABertForSequenceClassification), (FAViTConfig, FAViTForImageClassification)]
STEPS, LEARNING_RATE = 3, 0.1


class WithLoss(torch.nn.Module):
    """Lets DDP see the loss of any head as the result of a forward pass."""

    def __init__(self, model, auto_class):
        super().__init__()
        self.model, self.auto_class = model, auto_class

    def forward(self, inputs):
        return loss_of(self.model, self.auto_class, inputs)


def find_parameters_without_gradient() -> list[str]:
    """By names; DDP itself raises in the second step where a parameter had none."""
    missing = []
    for config_class, auto_class, model_class in HEADS:
        for options in ("plain", "all"):
            model = build(config_class, model_class, **OPTION_SETS[options]).train()
            wrapped = DistributedDataParallel(WithLoss(model, auto_class))
            for _ in range(2):
                wrapped.zero_grad()
                wrapped(inputs_of(model, auto_class)).backward()
            names = [name for name, parameter in model.named_parameters() if parameter.grad is None]
            missing += [f"{model_class.__name__} {options}: {name}" for name in names]
    return missing


def inputs_for(config_class: type, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if config_class is FABertConfig:
        return text_inputs("AutoModel", (11, 7, 4, 9)) | {"labels": torch.tensor([0, 1, 1, 0])}
    return {"pixel_values": image_inputs(batch=4)["pixel_values"].to(dtype), "labels": torch.tensor([0, 1, 1, 0])}


def train(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for _ in range(STEPS):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compare_sharded_with_whole(rank: int) -> dict[str, list[tuple[str, float, float]]]:
    """For each model, by parameter: the error of the sharded training and of plain float32, against plain float64."""
    mesh = init_device_mesh("cpu", (2,))
    errors = {}
    for config_class, model_class in SHARDED:
        sharded = build(config_class, model_class, **OPTION_SETS["local"]).train()
        plain, exact = copy.deepcopy(sharded), copy.deepcopy(sharded).double()
        train(plain, inputs_for(config_class, torch.float32))
        train(exact, inputs_for(config_class, torch.float64))
        for layer in sharded.base_model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        half = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs_for(config_class, torch.float32).items()}
        train(sharded, half)
        wanted, plainly = dict(exact.named_parameters()), dict(plain.named_parameters())
        errors[model_class.__name__] = [
            (
                name,
                float((parameter.full_tensor().detach() - wanted[name]).abs().max()),
                float((plainly[name].detach() - wanted[name]).abs().max()),
            )
            for name, parameter in sharded.named_parameters()
        ]
    return errors


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report = {
        "without gradient": find_parameters_without_gradient(),
        "sharded": compare_sharded_with_whole(dist.get_rank()),
    }
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
