"""Protects data parallel training: what several processes learn is what one learns from the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_in_processes as worker
from repository import HELPERS, ROOT
from torch import Tensor

from fa_transformers import PackingCollator

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def train_plainly(
    num_processes: int, dtype: torch.dtype, accumulation: int, packing: bool = False, checkpointing: bool = False
) -> dict[str, Tensor]:
    """The weights after steps on the mean loss over all examples of each step, without Accelerate or gradient
    checkpointing: the batches of all processes and micro-steps are one batch.
    """
    model, sampler = worker.make_model(dtype), worker.make_sampler(num_processes, packing)
    optimizer, scheduler = worker.make_optimizer(model)
    examples, per_step = worker.documents(), num_processes * accumulation
    collate = PackingCollator() if packing else worker.pad
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < worker.STEPS:
        batches = sampler.batches(epoch)
        groups = [batches[start : start + per_step] for start in range(0, len(batches), per_step)]
        steps += [[index for batch in group for index in batch] for group in groups]
        epoch += 1
    for indices in steps[: worker.STEPS]:
        model(**collate([examples[index] for index in indices])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), worker.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model.state_dict()


def assert_same_training(weights: dict[str, Tensor], num_processes: int, case: dict, output: str = "") -> None:
    expected = train_plainly(num_processes, **case | {"dtype": torch.float64})
    if case["dtype"] == torch.float64:
        for name, weight in weights.items():
            # Where a gradient is zero but for rounding, as of a key's bias, AdamW divides that noise by eps = 1e-8; of
            # float64 sums 2^-50 x 1e8 x the learning rate is below 1e-9 a step.
            torch.testing.assert_close(weight, expected[name], rtol=0.0, atol=1e-8, msg=name)
        return
    # Plain training in float32 differs from that in float64 by this much; the order of sums is all that ours adds.
    plain = train_plainly(num_processes, **case)
    worst = {name: float((plain[name] - expected[name]).abs().max()) for name in weights}
    ours = {name: float((weights[name] - expected[name]).abs().max()) for name in weights}
    print(f"{output}float32: largest error {max(ours.values()):.1e}, of plain training {max(worst.values()):.1e}")
    for name in weights:
        # A key's bias has no gradient but rounding noise, of which AdamW makes steps of up to the learning rate.
        allowed = worker.STEPS * worker.LEARNING_RATE if name.endswith("key.bias") else 4 * worst[name] + 2.0**-22
        assert ours[name] <= allowed, name


def test_the_cases_hold_batches_of_unequal_size_and_a_smaller_last_step():
    for num_processes in (1, 2):
        for packing in (False, True):
            sampler = worker.make_sampler(num_processes, packing)
            sizes = {len(batch) for epoch in range(3) for batch in sampler.batches(epoch)}
            assert len(sizes) > 2
            assert any(len(sampler.batches(epoch)) % (2 * num_processes) for epoch in range(3))


@pytest.mark.parametrize("name", ["padded", "float32"])
def test_accumulated_batches_train_as_one_large_batch_does(name, tmp_path):
    case = worker.CASES[name]
    model, _ = worker.train(**case, output_dir=tmp_path)
    assert_same_training(model.state_dict(), 1, case)


def test_the_weights_of_a_step_add_up_to_one_share_per_example():
    for num_processes, accumulation in ((1, 1), (2, 1), (2, 3), (3, 2)):
        sampler = worker.make_sampler(num_processes)
        batches = sampler.batches(0)
        per_step = num_processes * accumulation
        for first in range(0, len(batches), per_step):
            positions = range(first, min(first + per_step, len(batches)), num_processes)
            shares = {
                # What one example's loss is multiplied by: the batch's mean, the weight, Accelerate's and DDP's means.
                sampler.loss_weight(0, batch, rank, accumulation)
                / (len(batches[batch + rank]) * accumulation * num_processes)
                for batch in positions
                for rank in range(num_processes)
            }
            count = sum(sampler.count_examples(0, batch) for batch in positions)
            assert all(share == pytest.approx(1 / count, rel=1e-14) for share in shares)


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    subprocess.run([*TORCHRUN, str(worker.__file__), str(folder)], check=True, env=ENVIRONMENT, timeout=240)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", worker.CASES)
def test_two_processes_train_to_the_weights_of_one(name, trained_by_two):
    first, second = (torch.load(trained_by_two / f"{name}-{rank}.pt")["weights"] for rank in (0, 1))
    for key, weight in first.items():
        assert torch.equal(weight, second[key]), key
    assert_same_training(first, 2, worker.CASES[name], "two processes, ")


@pytest.mark.slow
def test_two_processes_report_their_communication_and_both_trace_it(trained_by_two):
    figures = torch.load(trained_by_two / "padded-0.pt")["figures"]
    assert figures["communication_ms_per_step"] > 0
    for rank in (0, 1):
        trace = json.loads((trained_by_two / "padded" / "profile" / f"rank-{rank}.json").read_text())
        assert any(event["name"].startswith("gloo:") for event in trace["traceEvents"] if "name" in event)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    folder, script = tmp_path_factory.mktemp("reports"), HELPERS / "shard_in_processes.py"
    subprocess.run([*TORCHRUN, str(script), str(folder)], check=True, env=ENVIRONMENT, timeout=240)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_every_parameter_of_every_head_has_a_gradient_under_plain_ddp(reports):
    assert [report["without gradient"] for report in reports] == [[], []]


@pytest.mark.slow
def test_a_fully_sharded_model_trains_as_the_whole_one_does(reports):
    assert reports[0]["sharded"] == reports[1]["sharded"]
    for model, errors in reports[0]["sharded"].items():
        print(f"{model}: largest error {max(row[1] for row in errors):.1e}, plain {max(row[2] for row in errors):.1e}")
        assert len(errors) > 20
        for name, sharded, plain in errors:
            # Both are float32 with another order of sums.
            assert sharded <= 4 * plain + 2.0**-22, (model, name)
