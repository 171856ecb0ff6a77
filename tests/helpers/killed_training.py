"""Started by test_nothing_lost.py: trains a tiny model again and again, killed at seeded points and resumed.

Imports take longest, so one process prepares them and forks a child for each run: `rank` processes that train together.
What a finished run reports is everything that a resumed one must have bit for bit; only seconds differ.
"""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset
from transformers import get_scheduler

from fa_transformers import FABertConfig, FABertForSequenceClassification
from fa_transformers.data.batching import LengthGroupedBatchSampler, make_loader
from fa_transformers.data.collators import pack_tokens
from fa_transformers.options import LoopOptions
from fa_transformers.training.checkpointing import STATE_FILE, list_checkpoints, prepare_output_dir
from fa_transformers.training.loop import run_training
from fa_transformers.training.manifest import find_damage
from fa_transformers.training.setup import make_accelerator

NUM_STEPS, NUM_EXAMPLES = 12, 22
FLAGS = dict(
    resume_from_checkpoint="auto", gradient_accumulation_steps=1, max_grad_norm=1.0, logging_steps=1, eval_steps=3,
    save_steps=2, save_total_limit=1, early_stopping_patience=0, load_best_model_at_end=True,
    use_cpu=True, mixed_precision="no", report_to="none", num_threads=1, ddp_timeout=60,
    profile=False,
)  # fmt: skip
VARIANTS = {
    "grouped": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "packed": {"packing": True},
    "workers": {"num_workers": 1},
    "two processes": {"num_processes": 2},
}


class Documents(Dataset):
    """Random tokens of random length; the label is whether the first is even."""

    def __init__(self, num: int):
        generator = np.random.default_rng(num)
        self.lengths = generator.integers(3, 12, num)
        self.rows = [generator.integers(1, 30, length).tolist() for length in self.lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.rows[index], "label": self.rows[index][0] % 2}


def pad(examples: list[dict]) -> dict:
    longest = max(len(example["input_ids"]) for example in examples)
    rows = [example["input_ids"] + [0] * (longest - len(example["input_ids"])) for example in examples]
    ids = torch.tensor(rows)
    labels = torch.tensor([example["label"] for example in examples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def pack(examples: list[dict]) -> dict:
    labels = torch.tensor([example["label"] for example in examples])
    return pack_tokens([{"input_ids": example["input_ids"]} for example in examples]) | {"labels": labels}


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict:
    model.eval()
    rows = []
    for batch in loader:
        output = model(**batch)
        hits = (output.logits.argmax(-1) == batch["labels"]).tolist()
        rows += accelerator.gather_for_metrics([(hit, output.loss.item()) for hit in hits], use_gather_object=True)
    model.train()
    return {"accuracy": float(np.mean([hit for hit, _ in rows])), "loss": float(np.mean([loss for _, loss in rows]))}


def train(
    output_dir: Path,
    *,
    packing: bool = False,
    num_workers: int = 0,
    dropout: float = 0.2,
    max_tokens: int | None = 32,
    **flags,
) -> tuple[torch.nn.Module, dict]:
    """One run to its end: the model, and what it must give whether or not it was interrupted."""
    loop = LoopOptions(**FLAGS | flags, output_dir=output_dir)
    set_seed(0)
    accelerator = make_accelerator(loop)
    if accelerator.is_main_process:
        prepare_output_dir(output_dir, overwrite=False, resume=True)
    accelerator.wait_for_everyone()
    config = FABertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, classifier_pooling="mean", local_window=1, hidden_dropout_prob=dropout,
    )  # fmt: skip
    model = FABertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = get_scheduler("linear", optimizer, 2, NUM_STEPS)
    loaders, samplers = [], []
    for split in (Documents(NUM_EXAMPLES), Documents(7)):
        shuffle = len(split) == NUM_EXAMPLES
        samplers.append(
            LengthGroupedBatchSampler(
                split.lengths, 4, max_tokens=max_tokens, packing=packing, group_by_length=not packing, shuffle=shuffle,
                seed=3, num_processes=accelerator.num_processes,
            )
        )  # fmt: skip
        loader = make_loader(split, samplers[-1], pack if packing else pad, num_workers if shuffle else 0)
        loaders.append(accelerator.prepare(loader))
    model, state, _ = run_training(
        loop, model, optimizer, scheduler, loaders[0], samplers[0], accelerator,
        evaluate=lambda trained: evaluate(trained, loaders[1], accelerator), best_metric="accuracy",
        max_steps=NUM_STEPS, output_dir=output_dir, data_digests={},
    )  # fmt: skip
    model = accelerator.unwrap_model(model)
    return model, report(model, output_dir / f"checkpoint-{NUM_STEPS}", vars(state))


def report(model: torch.nn.Module, last: Path, state: dict) -> dict:
    """Checksums of the weights that the run ends with and of each part of the last checkpoint."""
    found = {"returned weights": checksum(model.state_dict())}
    for path in sorted([*last.glob("*.bin"), *last.glob("*.pkl")]):
        found[path.name] = checksum(torch.load(path, weights_only=False))
    found["model.safetensors"] = hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()
    return found | {name: value for name, value in state.items() if not name.endswith("seconds")}


def checksum(content: object) -> str:
    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, np.ndarray):
            return value.tobytes()
        if isinstance(value, dict):
            return [(name, plain(item)) for name, item in value.items()]
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return hashlib.sha256(repr(plain(content)).encode()).hexdigest()


class Events:
    """Counts what a run does, by kind, and kills the process at the event `at` of kind `kind`, before it happens.

    With `num_bytes`, files can't grow beyond that from then on: the kernel kills the process in the middle of the first
    that does, or where `is_fatal` is false the writer sees an error, as on a full disk.
    """

    def __init__(self, folder: Path, kind: str = "", at: int = 0, num_bytes: int = 0, is_fatal: bool = True):
        self.folder, self.kind, self.at, self.num_bytes, self.is_fatal = folder, kind, at, num_bytes, is_fatal
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self.on_audit)
        register_module_forward_hook(lambda module, *_: self.add("forward" if module.training else "evaluation"))
        register_module_full_backward_hook(lambda *_: self.add("backward"))
        register_optimizer_step_pre_hook(lambda *_: self.add("optimizer"))
        register_optimizer_step_post_hook(lambda *_: self.add("optimizer"))

    def on_audit(self, event: str, arguments: tuple) -> None:
        """Files that are opened for writing, renamed or removed in the output folder, and the folders there."""
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        is_read = event == "open" and arguments[1] is not None and not set(str(arguments[1])) & set("wxa+")
        if str(self.folder) in str(arguments[0]) and not is_read:
            self.add("file")

    def add(self, kind: str) -> None:
        if kind == self.kind and self.counts[kind] == self.at:
            if self.num_bytes:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.is_fatal else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, resource.RLIM_INFINITY))
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        self.counts[kind] += 1


def run(
    work: Path, output_dir: Path, variant: dict, kill: dict | None = None, after_s: float | None = None
) -> dict | None:
    """A run in processes of its own; what it reports, or None where it was killed. All die with the first that does.

    Args:
        kill: where `Events` is to kill a process: the main one, which writes the files, or else the last one.
        after_s: seconds after which all processes are killed.
    """
    variant = dict(variant)
    num_processes = variant.pop("num_processes", 1)
    doomed = 0 if kill and kill["kind"] == "file" else num_processes - 1
    port = free_port()
    answers = [work / f"answer-{rank}.pickle" for rank in range(num_processes)]
    children = {}
    for rank, answer in enumerate(answers):
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            in_child(lambda rank=rank: finish(output_dir, variant, kill if rank == doomed else None),
                     answer, rank, num_processes, port)  # fmt: skip
        children[child] = rank
    if after_s is not None:
        time.sleep(after_s)
        for child in children:
            os.kill(child, signal.SIGKILL)
    was_killed, failed = False, []
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if os.WIFSIGNALED(status):
            was_killed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
        elif os.WEXITSTATUS(status):
            failed.append(rank)
    if failed and not was_killed:
        raise SystemExit(f"rank {failed[0]} of {output_dir} failed: {(work / f'errors-{failed[0]}.txt').read_text()}")
    return None if was_killed else pickle.loads(answers[0].read_bytes())


def finish(output_dir: Path, variant: dict, kill: dict | None) -> dict:
    events = Events(output_dir, **kill or {})
    model, found = train(output_dir, **variant)
    return found | {"events": events.counts, "weights": model.state_dict()}


def in_child(action: Callable[[], dict], answer: Path, rank: int, num_processes: int, port: int) -> None:
    """Run `action` in this forked process, leave what it returns in the file `answer`, and exit."""
    errors = os.open(answer.parent / f"errors-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        answer.write_bytes(pickle.dumps(action()))
        os._exit(0)  # the parent's exit handlers are not this process's
    except BaseException:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def draw_kill(generator: random.Random, events: Counter, kind: str) -> dict:
    """A kill point of that kind; "torn" is in the middle of the first file, from some file on, that passes a size.

    Sizes are log-uniform from 32 B to 32 KiB: a checkpoint's files have from 1 KiB (its state) to 60 KiB (AdamW's).
    """
    if kind != "torn":
        return {"kind": kind, "at": generator.randrange(events[kind])}
    num_bytes = int(2 ** generator.uniform(5, 15))
    return {"kind": "file", "at": generator.randrange(events["file"]), "num_bytes": num_bytes}


def kill_and_resume(work: Path, variant: dict, seed: int, num_points: int) -> dict:
    """How many runs were killed in which kind of event, each of which then ended as the uninterrupted one did."""
    generator, counts = random.Random(seed), Counter()
    started = time.perf_counter()
    expected = run(work, work / "whole", variant)
    whole_s = time.perf_counter() - started
    events, _ = expected.pop("events"), expected.pop("weights")
    for point in range(num_points):
        output_dir = work / f"killed-{point}"
        kind = ["file", "torn", "forward", "backward", "optimizer", "evaluation", "clock"][point % 7]
        if kind == "clock":
            survived = run(work, output_dir, variant, after_s=generator.uniform(0, whole_s))
        else:
            survived = run(work, output_dir, variant, draw_kill(generator, events, kind))
        counts[kind if survived is None else "not reached"] += 1
        damaged = {path.name: find_damage(path) for path in list_checkpoints(output_dir)}
        assert not any(damaged.values()), f"point {point}, {kind}: {damaged}"
        counts["resumed from a checkpoint" if damaged else "started anew"] += 1
        resumed = run(work, output_dir, variant)
        differing = {key for key in expected if expected[key] != resumed.get(key)}
        assert not differing, f"point {point}, {kind}: {differing}"
        shutil.rmtree(output_dir)
    return dict(counts)


def change_processes(work: Path, before: int, after: int) -> dict:
    """Largest difference between the weights of a whole run on `before` processes and of one that went on, from the
    middle of an epoch, on `after` ones, with as many batches in an optimiser step.
    """
    # Dropout is drawn anew for the new processes. Without a token budget an epoch has 6 batches, 2 in each step, so the
    # kill in step 9, the last of the third epoch, leaves a checkpoint of the middle of that epoch.
    same_steps = {"dropout": 0.0, "max_tokens": None, "load_best_model_at_end": False}
    variants = [{"num_processes": num, "gradient_accumulation_steps": 2 // num} | same_steps for num in (before, after)]
    whole = run(work, work / "whole", variants[0])
    assert run(work, work / "changed", variants[0], {"kind": "optimizer", "at": 2 * 8}) is None
    resumed_at = json.loads((list_checkpoints(work / "changed")[-1] / STATE_FILE).read_text())
    changed = run(work, work / "changed", variants[1])
    differences = [float((changed["weights"][name] - weight).abs().max()) for name, weight in whole["weights"].items()]
    differing = [name for name in ("step", "tokens", "settings", "scheduler.bin") if whole[name] != changed[name]]
    return {"difference": max(differences), "differing": differing, "resumed_at": resumed_at}


def fill_the_disk(work: Path) -> dict:
    """What two processes say where the second, which writes its random state alone, can't any more at step 4."""
    variant = VARIANTS["two processes"]
    expected = run(work, work / "whole", variant)
    full = {"kind": "optimizer", "at": 2 * 3, "num_bytes": 1000, "is_fatal": False}
    try:
        run(work, work / "full", variant, full)
        raise AssertionError("the full disk was not noticed")
    except SystemExit:
        said = [(work / f"errors-{rank}.txt").read_text() for rank in (0, 1)]
    left = {path.name: find_damage(path) for path in (work / "full").iterdir() if path.is_dir()}
    resumed = run(work, work / "full", variant)
    differing = [name for name in expected.keys() - {"events", "weights"} if expected[name] != resumed[name]]
    return {"said": said, "left": left, "differing": differing}


def main(action: str, seed: int, num_points: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if action in VARIANTS:
            found = kill_and_resume(Path(folder), VARIANTS[action], seed, num_points)
        elif action == "full disk":
            found = fill_the_disk(Path(folder))
        else:
            found = change_processes(Path(folder), seed, num_points)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
