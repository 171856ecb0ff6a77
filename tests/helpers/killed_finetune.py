"""Started by test_killed_finetune.py: whole runs of the command that fine-tunes, killed and started again.

One process imports and forks a child for each run. A run is cut into phases by the functions that it goes through, and
counts its events in each of them: beginnings and ends, steps of the optimiser, and files of the output folder that are
opened, made, renamed or removed. SIGKILL falls before an event; the same command, which has `--resume_from_checkpoint
auto`, then goes on.
"""

import csv
import hashlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from tiny_models import make_tokenizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import BertConfig, BertForSequenceClassification

from fa_transformers.commands import finetune as command
from fa_transformers.hub import publish as publishing
from fa_transformers.training import finetune, loop

PHASES = ("before training", "training", "saving a checkpoint", "before publishing", "publishing", "report")
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link")
CHANGING = ("seconds", "second", "share", "shares", "gib", "output_dir", "command")


class Phases:
    """The phase that a run is in; kills the process before event number `at` of `phase`."""

    def __init__(self, folder: Path, phase: str | None, at: int):
        self.now, self.counts, self._folder, self._kill = PHASES[0], Counter(), folder, (phase, at)
        for module, name, phase, following in (
            (finetune, "run_training", "training", "before publishing"),
            (loop, "save_checkpoint", "saving a checkpoint", None),
            (finetune, "publish", "publishing", "report"),
        ):
            setattr(module, name, self.within(getattr(module, name), phase, following))
        sys.addaudithook(self.hear)
        register_optimizer_step_post_hook(lambda *_: self.count())

    def within(self, function: Callable, phase: str, following: str | None) -> Callable:
        def entered(*arguments, **options):
            before, self.now = self.now, phase
            self.count()
            returned = function(*arguments, **options)
            self.now = following or before
            self.count()
            return returned

        return entered

    def hear(self, event: str, arguments: tuple) -> None:
        if event in EVENTS and str(self._folder) in str(arguments[0]):
            is_read = event == "open" and arguments[1] is not None and not set(str(arguments[1])) & set("wxa+")
            if not is_read:
                self.count()

    def count(self) -> None:
        if self._kill == (self.now, self.counts[self.now]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.counts[self.now] += 1


def write_inputs(work: Path) -> None:
    tokenizer = make_tokenizer(["sea", "ship", "law", "court"], max_length=16)
    tokenizer.save_pretrained(work / "bert")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, num_labels=2, **sizes)
    BertForSequenceClassification(config).save_pretrained(work / "bert")
    rows = [("sea ship" if index % 2 else "law court", ["law", "sea"][index % 2]) for index in range(20)]
    for name in ("train", "validation"):
        with open(work / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])


def run(work: Path, output_dir: Path, phase: str | None = None, at: int = 0) -> Counter | None:
    """A run in a process of its own: its events by phase, or None where it was killed."""
    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        said = os.open(work / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        try:
            phases = Phases(output_dir, phase, at)
            flags = ["--train_file", work / "train.csv", "--validation_file", work / "validation.csv"]
            flags += ["--model_name_or_path", work / "bert", "--max_length", 16, "--use_cpu", "--num_threads", 1]
            flags += ["--per_device_train_batch_size", 4, "--max_steps", 8, "--save_steps", 2, "--eval_steps", 4]
            flags += ["--report_to", "none", "--output_dir", output_dir, "--resume_from_checkpoint", "auto"]
            command.main([str(flag) for flag in flags])
            answer.write_text(json.dumps(phases.counts))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    if status:
        raise SystemExit(f"{phase} {at}: {(work / 'said.txt').read_text()}")
    return Counter(json.loads(answer.read_text()))


def result(folder: Path) -> dict:
    """What a finished run leaves, but for seconds and the folder's own name."""
    left = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(("checkpoint-", ".launch")):
            left[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("README.md", "model_facts.json", "all_results.json", "report.html"):
        left[name] = ""  # they name times and the folder
    left["self_test.json"] = ""
    scores = json.loads((folder / "all_results.json").read_text())
    left |= {name: value for name, value in scores.items() if not name.endswith(CHANGING)}
    publishing.self_check.read_self_test(folder)
    return left


def spread(count: int, number: int) -> list[int]:
    """`number` events of `count`, from the first to the last; the middle one where it is one."""
    if number == 1:
        return [count // 2]
    return sorted({round(index * (count - 1) / (number - 1)) for index in range(number)})


@contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_CACHE_HOME = f"{folder}/cache"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        write_inputs(Path(folder))
        yield Path(folder)


def main(number: int) -> None:
    """Kill `number` runs in each phase, and print how many went on and ended as one that was not disturbed."""
    with workplace() as work:
        events = run(work, work / "whole")
        assert events is not None and set(events) == set(PHASES), events
        expected, kills = result(work / "whole"), Counter()
        for phase in PHASES:
            for at in spread(events[phase], number):
                folder = work / f"{PHASES.index(phase)}-{at}"
                assert run(work, folder, phase, at) is None, f"{phase} {at} was not reached"
                assert run(work, folder) is not None
                found = result(folder)
                differing = {name for name in expected | found if expected.get(name) != found.get(name)}
                assert not differing, f"{phase} {at}: {differing}"
                kills[phase] += 1
    print(json.dumps({"events": events, "kills": kills}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
