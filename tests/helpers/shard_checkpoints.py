"""Started by test_nothing_lost.py: a model sharded by FSDP2 over two CPU processes, saved, loaded by one and by two.

Accelerate's FSDP needs an accelerator. It saves through the same functions of torch.distributed.checkpoint.
"""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from killed_training import Documents, free_port, in_child, pad
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fa_transformers import FABertConfig, FABertForSequenceClassification

WHOLE = StateDictOptions(full_state_dict=True)


def build(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    config = FABertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, classifier_pooling="mean", local_window=1, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = FABertForSequenceClassification(config)
    if distributed.is_initialized():
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for layer in model.base_model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    documents = Documents(6)
    model(**pad([documents[index] for index in range(6)])).loss.backward()  # the same for all: their mean is one's
    optimizer.step()
    optimizer.zero_grad()


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in get_model_state_dict(model, options=WHOLE).items()}


def save(folder: Path) -> dict:
    model, optimizer = build(seed=0)
    step(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "sharded")
    saved = whole(model)
    if distributed.get_rank() == 0:
        plain = FABertForSequenceClassification(model.config)
        plain.load_state_dict(saved)
        plain.save_pretrained(folder / "final")
    step(model, optimizer)
    return {"saved": saved, "after": whole(model)}


def load(folder: Path) -> dict:
    model, optimizer = build(seed=1)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    checkpoint.load(state, checkpoint_id=folder / "sharded")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = whole(model)
    step(model, optimizer)
    return {"saved": loaded, "after": whole(model)}


def in_processes(num_processes: int, folder: Path, action: Callable[[Path], dict]) -> dict:
    """What `action` returns on the first of as many new processes."""

    def connect_and_act() -> dict:
        if num_processes > 1:
            distributed.init_process_group("gloo")
        return action(folder)

    port, children = free_port(), {}
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            in_child(connect_and_act, folder / f"answer-{rank}.pickle", rank, num_processes, port)
        children[child] = rank
    for child, rank in children.items():
        if os.waitpid(child, 0)[1]:
            raise SystemExit((folder / f"errors-{rank}.txt").read_text())
    return pickle.loads((folder / "answer-0.pickle").read_bytes())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    saved = in_processes(2, folder, save)
    report = {"weights": [path.name for path in (folder / "final").glob("*.safetensors*")]}
    final = FABertForSequenceClassification.from_pretrained(folder / "final").state_dict()
    report["final"] = difference(saved["saved"], final)
    for num_processes in (1, 2):
        loaded = in_processes(num_processes, folder, load)
        report[f"loaded by {num_processes}"] = [difference(saved[when], loaded[when]) for when in ("saved", "after")]
    print(json.dumps(report))


def difference(expected: dict, got: dict) -> float:
    """Largest absolute one over all weights."""
    assert expected.keys() == got.keys(), expected.keys() ^ got.keys()
    return max(float((expected[name] - got[name]).abs().max()) for name in expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
