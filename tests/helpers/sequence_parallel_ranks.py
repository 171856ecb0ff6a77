"""What test_sequence_parallel.py runs on each of several processes, and how it starts them.

A check is a function of (rank, size, group) that returns what its test looks at; one start of processes runs many.
"""

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


def run_on_ranks(checks: dict[str, Callable], size: int, folder: Path) -> dict[str, list]:
    """Run the checks on `size` new processes; what each rank found, or the traceback of what it raised, by name."""
    torch.multiprocessing.spawn(_work, (checks, size, folder), nprocs=size)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    return {name: [found[name] for found in ranks] for name in checks}


def _work(rank: int, checks: dict[str, Callable], size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/ranks", rank=rank, world_size=size, timeout=datetime.timedelta(minutes=3)
    )
    found = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            found[name] = check(rank, size, dist.group.WORLD)
        except Exception:
            found[name] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients, which are taken away from them."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, of each tensor as a share of its largest number where that is above 0.1; NaN counts."""
    assert actual.keys() == expected.keys() and len(expected) > 0, actual.keys() ^ expected.keys()
    errors = []
    for name, value in expected.items():
        assert actual[name].shape == value.shape, (name, actual[name].shape, value.shape)
        if value.numel():
            difference = (actual[name] - value).detach().abs().max()
            errors.append(difference / value.detach().abs().max().clamp(min=0.1))
    return float(torch.stack(errors).max())


class ByteCounter:
    """While it is open: the bytes that this rank hands to each kind of exchange, by kind."""

    def __enter__(self):
        self.calls: list[tuple[str, int]] = []
        self._originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "batch_isend_irecv")}
        dist.all_reduce = self._counting("all_reduce", lambda tensor: tensor)
        dist.all_gather = self._counting("all_gather", lambda parts, tensor: tensor)
        dist.batch_isend_irecv = self._counting_transfers
        return self

    def __exit__(self, *error):
        for name, function in self._originals.items():
            setattr(dist, name, function)

    def _counting(self, name: str, choose: Callable) -> Callable:
        def function(*args, **kwargs):
            self.calls.append((name, choose(*args).nbytes))
            return self._originals[name](*args, **kwargs)

        return function

    def _counting_transfers(self, operations):
        self.calls += [("send", each.tensor.nbytes) for each in operations if each.op is dist.isend]
        return self._originals["batch_isend_irecv"](operations)


class SavedBytes:
    """While it is open: bytes of the storages that autograd keeps for the backward pass, but those of `model`."""

    def __init__(self, model: nn.Module):
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._storages: dict[int, int] = {}
        self._kept: list[Tensor] = []  # alive, so that no address is used twice

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor)
        return tensor

    @property
    def total(self) -> int:
        return sum(self._storages.values())
