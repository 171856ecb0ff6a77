"""Checkpoints that appear by rename only, the state that makes a run resumable, and Ctrl-C.

A checkpoint is a folder `checkpoint-STEP` with Accelerate's state (weights, optimiser, scheduler, random generators of
every process) and `training_state.json`: the step, the epoch and the batch to go on with, and the best score so far.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self

from accelerate import Accelerator

from .metrics import LOWER_IS_BETTER

STATE_FILE = "training_state.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint can't be written or read; the message names the folder and what to do."""


@dataclasses.dataclass
class TrainingState:
    """Where a run stands. `settings` are those that decide the order of the batches: a resumed run must have the same.

    `epoch` and `batch` count finished epochs and, within the current one, finished batches of one process. `tokens` are
    real tokens over all processes, `seconds` the time spent on them, `data_wait_seconds` the part of it in which this
    process waited for its next batch.
    """

    settings: dict
    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    best_score: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False

    @property
    def data_wait_share(self) -> float:
        """Fraction of `seconds`."""
        return self.data_wait_seconds / max(self.seconds, 1e-9)

    def finish_batch(self, epoch_ends: bool) -> None:
        """Move on to the next batch, which is the first of the next epoch where `epoch_ends`."""
        self.epoch, self.batch = (self.epoch + 1, 0) if epoch_ends else (self.epoch, self.batch + 1)

    def record_score(self, scores: dict, metric: str) -> bool:
        """Note an evaluation at the present step; True where its `metric` beats every earlier one.

        A tie, which is common on a small validation split, goes to the lower loss.

        Raises:
            ValueError: `metric` is not among the scores, or is undefined on this split.
        """
        if not isinstance(scores.get(metric), float):
            known = sorted(name for name, value in scores.items() if isinstance(value, float))
            raise ValueError(f"--metric_for_best_model {metric} has no value on validation; choose of {known}.")
        score, loss = scores[metric], scores["loss"]
        if self.best_score is None or self.best_loss is None:
            gained = True
        elif score == self.best_score:
            gained = loss < self.best_loss
        else:
            gained = (score < self.best_score) == (metric in LOWER_IS_BETTER)
        if gained:
            self.best_score, self.best_loss, self.best_step = score, loss, self.step
            self.evaluations_without_gain = 0
        else:
            self.evaluations_without_gain += 1
        return gained


def prepare_output_dir(output_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Make sure that `output_dir` exists, can be written, and holds nothing that the run would mix with.

    Leftovers of a save that was cut short are removed. With `overwrite`, the earlier run's checkpoints are deleted, so
    that they aren't mistaken for this run's; other files are replaced by name when this run ends.

    Raises:
        FileExistsError: the folder holds files, and neither `overwrite` nor `resume` was asked for.
        CheckpointError: the folder can't be created or written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".write_probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"--output_dir {output_dir} can't be written: {error}. Choose another folder.") from error
    for leftover in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    entries = sorted(entry.name for entry in output_dir.iterdir())
    if resume or not entries:
        return
    if not overwrite:
        raise FileExistsError(
            f"--output_dir {output_dir} is not empty (it holds {entries[0]}). Choose another folder, continue that run "
            "with --resume_from_checkpoint last, or replace it with --overwrite_output_dir."
        )
    for checkpoint in [*output_dir.glob("checkpoint-*"), *output_dir.glob("at_*_px/checkpoint-*")]:
        if _CHECKPOINT_NAME.fullmatch(checkpoint.name):
            shutil.rmtree(checkpoint)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of `output_dir`, oldest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def find_checkpoint(resume_from: str, output_dir: Path) -> Path:
    """The folder that `--resume_from_checkpoint` means: a path, or "last" for the newest one of `output_dir`.

    Raises:
        CheckpointError: there is none.
    """
    if resume_from == "last":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise CheckpointError(
                f"--resume_from_checkpoint last: {output_dir} holds no checkpoint. Give the right --output_dir, or "
                "leave the flag out to start anew."
            )
        return checkpoints[-1]
    path = Path(resume_from)
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(
            f"--resume_from_checkpoint {path}: no {STATE_FILE} there, so it is not a checkpoint of this script."
        )
    return path


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, state: TrainingState, save_total_limit: int | None = None
) -> Path:
    """Write `checkpoint-STEP` and delete the oldest ones beyond `save_total_limit`, never the best one nor this one.

    Every process must call this. The folder is written under a temporary name, flushed to disk and renamed.

    Raises:
        CheckpointError: writing failed, or the folder exists; nothing half-written remains and earlier checkpoints are
            untouched.
    """
    target = output_dir / f"checkpoint-{state.step}"
    temporary = output_dir / f".checkpoint-{state.step}.tmp"
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / STATE_FILE, dataclasses.asdict(state))
            _flush(temporary)
            temporary.rename(target)
            _flush_folder(output_dir)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors and torch.save report a full disk by exceptions of their own, which aren't OSErrors.
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"Can't save {target}: {error}. Nothing half-written was left. {_free_space(output_dir)} Free some "
            "space or choose another --output_dir, then resume from the newest checkpoint."
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and save_total_limit is not None:
        keep = {target, output_dir / f"checkpoint-{state.best_step}"}
        removable = [path for path in list_checkpoints(output_dir) if path not in keep]
        num_kept = len(list_checkpoints(output_dir)) - len(removable)
        for path in removable[: len(removable) - max(0, save_total_limit - num_kept)]:
            shutil.rmtree(path)
    return target


def resume_run(accelerator: Accelerator, resume_from: str, output_dir: Path, settings: dict) -> TrainingState:
    """Continue from `resume_from`, as `find_checkpoint` and `load_checkpoint` say.

    The run's best checkpoint is copied where `output_dir` is another folder; where it was not kept, the best score is
    forgotten.

    Raises:
        CheckpointError: as those two; or `output_dir` holds newer checkpoints, which the run would mix with.
    """
    checkpoint = find_checkpoint(resume_from, output_dir)
    state = load_checkpoint(accelerator, checkpoint, settings)
    newer = [path.name for path in list_checkpoints(output_dir) if _step_of(path) > state.step]
    if newer:
        raise CheckpointError(
            f"{output_dir} holds {newer[-1]}, which is newer than {checkpoint}: a run that goes on from the older one "
            "would mix with it. Use --resume_from_checkpoint last, or another --output_dir."
        )
    best = f"checkpoint-{state.best_step}"
    source = checkpoint.parent / best
    if state.best_step is not None and not (source.is_dir() or (output_dir / best).is_dir()):
        state.best_score = state.best_loss = state.best_step = None
    elif state.best_step is not None and not (output_dir / best).is_dir() and accelerator.is_main_process:
        temporary = output_dir / f".{best}.tmp"
        shutil.copytree(source, temporary)
        temporary.rename(output_dir / best)
    accelerator.wait_for_everyone()
    return state


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, settings: dict) -> TrainingState:
    """Load a checkpoint into what `accelerator` has prepared, and return its state.

    Raises:
        CheckpointError: it can't be read, or it was made with other `settings`, so that the batches would differ.
    """
    try:
        state = TrainingState(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} can't be read: {error}. Use an older checkpoint.") from error
    for name in sorted(settings.keys() | state.settings.keys()):
        before, now = state.settings.get(name), settings.get(name)
        if before != now:
            raise CheckpointError(
                f"{checkpoint} was made with {name}={before}, this run has {name}={now}: the batches would not be "
                f"those that remain. Resume with {name}={before}, or start anew in another --output_dir."
            )
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this model or is damaged: {error}. Resume with the flags of the first run, or "
            "use an older checkpoint."
        ) from error
    return state


def write_json(path: Path, content: dict) -> None:
    """Write `content` to `path` by rename, flushed to disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class StopRequest:
    """Turns the first Ctrl-C (SIGINT) or SIGTERM inside a `with` block into a flag that a loop can ask for.

    A second signal stops at once, unless several processes run: launchers repeat the signal while workers still save.
    """

    def __init__(self, accelerator: Accelerator, announce: Callable[[str], None] = print):
        self.accelerator = accelerator
        self.announce = announce
        self._previous: dict[int, signal.Handlers | Callable | int | None] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.accelerator.num_processes == 1:
            self.__exit__()
        self.accelerator.set_trigger()
        if self.accelerator.is_main_process:
            self.announce(f"{signal.Signals(number).name}: finishing this step, then saving a checkpoint.")

    def __bool__(self) -> bool:
        """True, once, on every process after any of them had the signal; all must ask equally often."""
        return self.accelerator.check_trigger()


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there."
