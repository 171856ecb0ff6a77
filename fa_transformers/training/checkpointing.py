"""Checkpoints that appear by rename only, the state that makes a run resumable, and Ctrl-C.

A checkpoint is a folder `checkpoint-STEP` with Accelerate's state (weights, optimiser, scheduler, random generators of
every process), `training_state.json`: the step, the epoch and the batch to go on with, and the best score so far, and
`manifest.json`, by which damage is noticed. No state of a data loader is needed: the batches of an epoch are a pure
function of (lengths, settings, seed, epoch), so a resumed run takes up their list at the batch that is next, and loads
none of those before it.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from ..files import flush_folder, write_json
from ..hub.folder_lock import LOCK_FILE, lock_folder, unlock_folder
from ..hub.placing import PREFIX, probe_placing
from ..metrics import LOWER_IS_BETTER
from ..mistakes import Mistake
from .curve import Curve
from .manifest import find_damage, write_manifest
from .processes import ProcessFailed, run_together, was_restarted

STATE_FILE = "training_state.json"
LAUNCH_FILE = ".launch"  # which launcher's run accepted the folder
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# Of a checkpoint that was being saved or deleted, and of a file that was being written by rename.
_LEFTOVER_NAME = re.compile(r"\.checkpoint-\d+\.tmp|\..+\.\d+-[0-9a-f]{8}\.tmp")


class CheckpointError(Mistake, RuntimeError):
    """A checkpoint can't be written or read; the message names the folder and what to do."""


@dataclasses.dataclass
class TrainingState:
    """The progress of a run. `settings` decide the order of the batches: a resumed run must have equal ones, and keeps
    the first run's `num_processes` and `gradient_accumulation_steps` among them.

    `num_processes` is how many processes train now. `epoch` and `batch` count finished epochs and, within the current
    one, finished batches of all processes together, of `epoch_batches` (None where it has no end). `tokens` are real
    tokens over all processes, `seconds` the time spent on them, `cpu_seconds` the processor time of this process alone,
    without workers that load data, `data_wait_seconds` the part of `seconds` in which it waited for its next batch.
    `mean_loss` is a running mean over about the last 20 batches of the main process. `curve` is the course so far.
    """

    settings: dict
    num_processes: int = 1
    step: int = 0
    epoch: int = 0
    batch: int = 0
    epoch_batches: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    mean_loss: float | None = None
    best_score: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    curve: Curve = dataclasses.field(default_factory=Curve)

    @classmethod
    def load(cls, checkpoint: Path) -> Self:
        """Read the state of a checkpoint.

        Raises:
            OSError, ValueError, TypeError, LookupError: the file can't be read or holds something else.
        """
        content = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return cls(**content | ({"curve": Curve.load(content["curve"])} if "curve" in content else {}))

    @property
    def epochs(self) -> float:
        """Epochs, with the finished part of the current one."""
        return self.epoch + (self.batch / self.epoch_batches if self.epoch_batches else 0.0)

    @property
    def data_wait_share(self) -> float:
        """Fraction of `seconds`."""
        return self.data_wait_seconds / max(self.seconds, 1e-9)

    def finish_batch(self, epoch_ends: bool) -> None:
        """Move every process on to its next batch, which is the first of the next epoch where `epoch_ends`."""
        self.epoch, self.batch = (self.epoch + 1, 0) if epoch_ends else (self.epoch, self.batch + self.num_processes)

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
        self.curve.scores.add(self.step, score, loss)
        return gained


def prepare_output_dir(output_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Make sure that `output_dir` exists, can be written, and holds nothing that the run would mix with.

    Leftovers of a save or a deletion that was cut short are removed. With `overwrite`, the earlier run's checkpoints
    are deleted, so that they aren't mistaken for this run's; other files are replaced by name when this run ends. The
    folder is locked until `folder_lock.released` or the process ends.

    Raises:
        FileExistsError: the folder holds files, and neither `overwrite` nor `resume` was asked for; or another run
            uses it.
        CheckpointError: the folder can't be created or written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe_placing(output_dir)  # so that publishing can't fail for it after all the training
    except OSError as error:
        raise CheckpointError(f"--output_dir {output_dir} can't be written: {error}. Choose another folder.") from error
    lock_folder(output_dir, f"--output_dir {output_dir}")
    for leftover in [*output_dir.glob(".*.tmp"), *output_dir.glob("*/.*.tmp")]:
        if _LEFTOVER_NAME.fullmatch(leftover.name):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)  # gone with its folder
    if refusal := why_refused(output_dir, overwrite=overwrite, resume=resume):
        unlock_folder(output_dir)
        raise FileExistsError(refusal)
    earlier = [*output_dir.glob("*checkpoint-*"), *output_dir.glob("*/*checkpoint-*")]  # of stages too
    for checkpoint in [] if resume else earlier:
        if _CHECKPOINT_NAME.fullmatch(checkpoint.name.removeprefix("damaged-")):
            shutil.rmtree(checkpoint)
    (output_dir / LAUNCH_FILE).write_text(_launch(), encoding="utf-8")


def why_refused(output_dir: Path, *, overwrite: bool, resume: bool) -> str | None:
    """Return why a run may not write to `output_dir`, which holds files of another one; None where it may."""
    names = sorted(entry.name for entry in output_dir.iterdir()) if output_dir.is_dir() else []
    entries = [name for name in names if name != LAUNCH_FILE and not name.startswith((PREFIX, LOCK_FILE))]
    if not entries or resume or overwrite:
        return None
    return (
        f"--output_dir {output_dir} is not empty (it holds {entries[0]}). Choose another folder, continue that run "
        "with --resume_from_checkpoint last, or replace it with --overwrite_output_dir."
    )


def _launch() -> str:
    """An identifier that all starts of these processes by one launcher share: the number of their parent process."""
    return f"{socket.gethostname()} {os.getppid()}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of `output_dir`, oldest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was saved."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def choose_resume(resume_from: str | None, output_dir: Path) -> str | None:
    """`--resume_from_checkpoint` as given, or "auto" where torchrun restarted the processes after a failure.

    A run that began from a checkpoint elsewhere does so again, unless it has saved its own by then; and what an earlier
    launch left in `output_dir` is not this run's, so that it is refused or overwritten as at the first start. Every
    process must call this, before the main one changes `output_dir`.
    """

    def look() -> tuple[bool, bool]:
        path = output_dir / LAUNCH_FILE
        is_ours = path.is_file() and path.read_text(encoding="utf-8") == _launch()
        return is_ours, bool(list_checkpoints(output_dir))

    is_ours, has_own = run_together(look)[0]
    return "auto" if was_restarted() and is_ours and (resume_from is None or has_own) else resume_from


def find_checkpoint(resume_from: str, output_dir: Path, announce: Callable[[str], None] = print) -> Path | None:
    """The folder that `--resume_from_checkpoint` means: a path, "last" for the newest sound one of `output_dir`, or
    "auto" for the same, or None where `output_dir` holds none.

    Damaged ones that are newer get the name `damaged-checkpoint-STEP`, out of the way of those that follow, and are
    announced with what is wrong.

    Raises:
        CheckpointError: there is none, or none that is sound.
    """
    if resume_from not in ("last", "auto"):
        path = Path(resume_from)
        if not (path / STATE_FILE).is_file():
            raise CheckpointError(
                f"--resume_from_checkpoint {path}: no {STATE_FILE} there, so it is not a checkpoint of this script."
            )
        if (damage := find_damage(path)) is not None:
            raise CheckpointError(f"--resume_from_checkpoint {path} is damaged: {damage}. Use an older checkpoint.")
        return path
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(output_dir)):
        if (damage := find_damage(checkpoint)) is None:
            for newer, reason in damaged.items():
                aside = newer.with_name(f"damaged-{newer.name}")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)
                announce(f"{newer} is damaged: {reason}. It is now {aside.name}; resuming from {checkpoint.name}.")
            return checkpoint
        damaged[checkpoint] = damage
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise CheckpointError(f"Every checkpoint of {output_dir} is damaged ({reasons}). Start anew in another folder.")
    if resume_from == "auto":
        return None
    raise CheckpointError(
        f"--resume_from_checkpoint last: {output_dir} holds no checkpoint. Give the right --output_dir, or leave the "
        "flag out to start anew."
    )


def read_settings(resume_from: str, output_dir: Path) -> dict:
    """The settings of the run that `resume_from` means, which all its checkpoints share; empty where none is readable.

    What is wrong with a checkpoint is for `find_checkpoint` to say.
    """
    is_path = resume_from not in ("last", "auto")
    for checkpoint in [Path(resume_from)] if is_path else reversed(list_checkpoints(output_dir)):
        try:
            return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, state: TrainingState, save_total_limit: int | None = None
) -> Path:
    """Write `checkpoint-STEP` and delete the oldest ones beyond `save_total_limit`, never the best one nor this one.

    Every process must call this. The folder is written under a temporary name with its manifest, flushed to disk, read
    back, and renamed; only then older ones are deleted.

    Raises:
        CheckpointError: writing failed on any process, or the folder exists; raised on all. Nothing half-written
            remains and earlier checkpoints are untouched.
    """
    target = output_dir / f"checkpoint-{state.step}"
    temporary = output_dir / f".checkpoint-{state.step}.tmp"
    is_main = accelerator.is_main_process
    try:
        run_together(lambda: shutil.rmtree(temporary, ignore_errors=True) if is_main else None)
        run_together(lambda: _save_state(accelerator, temporary))
        run_together(lambda: _complete(temporary, target, state) if is_main else None)
    except ProcessFailed as error:
        # safetensors and torch.save report a full disk by exceptions of their own, which aren't OSErrors.
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"Can't save {target}: {error}. Nothing half-written was left. {_free_space(output_dir)} Free some "
            "space or choose another --output_dir, then resume from the newest checkpoint."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if is_main and save_total_limit is not None:
        keep = {target, output_dir / f"checkpoint-{state.best_step}"}
        removable = [path for path in list_checkpoints(output_dir) if path not in keep]
        num_kept = len(list_checkpoints(output_dir)) - len(removable)
        for path in removable[: len(removable) - max(0, save_total_limit - num_kept)]:
            delete_checkpoint(path)
    return target


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, which loses its name at once: half of one must not keep it."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    def unwrap(models: list[nn.Module], weights: list[dict], output_dir: str) -> None:
        # Else the names would begin with DDP's "module.", and one process could not read what two have written. FSDP
        # and DeepSpeed write their weights themselves.
        weights[:] = [accelerator.get_state_dict(model) for model in models[: len(weights)]]

    hook = accelerator.register_save_state_pre_hook(unwrap)
    try:
        accelerator.save_state(str(folder))
    finally:
        hook.remove()


def _complete(temporary: Path, target: Path, state: TrainingState) -> None:
    write_json(temporary / STATE_FILE, dataclasses.asdict(state))
    write_manifest(temporary)
    _flush(temporary)
    if (damage := find_damage(temporary)) is not None:
        raise CheckpointError(f"what was written does not read back: {damage}")
    temporary.rename(target)
    flush_folder(target.parent)


def resume_run(accelerator: Accelerator, resume_from: str, output_dir: Path, settings: dict) -> TrainingState:
    """Continue from `resume_from`, as `find_checkpoint` and `load_checkpoint` say; anew where that finds none.

    The run's best checkpoint is copied where `output_dir` is another folder; where it was not kept or is damaged, the
    best score is forgotten.

    Raises:
        CheckpointError: as those two; or `output_dir` holds newer checkpoints, which the run would mix with.
    """
    is_main = accelerator.is_main_process
    try:
        checkpoint = run_together(lambda: find_checkpoint(resume_from, output_dir) if is_main else None)[0]
    except ProcessFailed as error:
        raise CheckpointError(str(error)) from error
    if checkpoint is None:
        return TrainingState(settings, settings.get("num_processes", accelerator.num_processes))
    state = load_checkpoint(accelerator, checkpoint, settings)
    newer = [path.name for path in list_checkpoints(output_dir) if step_of(path) > state.step]
    if newer:
        raise CheckpointError(
            f"{output_dir} holds {newer[-1]}, which is newer than {checkpoint}: a run that goes on from the older one "
            "would mix with it. Use --resume_from_checkpoint last, or another --output_dir."
        )
    best = checkpoint.with_name(f"checkpoint-{state.best_step}")
    if state.best_step is not None and not run_together(lambda: not is_main or _keep_best(best, output_dir))[0]:
        state.best_score = state.best_loss = state.best_step = None
    return state


def _keep_best(best: Path, output_dir: Path) -> bool:
    """Return True if the best checkpoint is sound; it is copied to `output_dir` where it lies elsewhere."""
    kept = output_dir / best.name
    source = kept if kept.is_dir() else best
    damage = find_damage(source) if source.is_dir() else "it was not kept"
    if damage is not None:
        print(f"{source}, the best checkpoint so far, can't be used: {damage}. The next evaluation starts afresh.")
    elif source != kept:
        temporary = output_dir / f".{best.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        temporary.rename(kept)
    return damage is None


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, settings: dict) -> TrainingState:
    """Load a checkpoint into what `accelerator` has prepared, and return its state.

    The number of processes may differ from the run that saved it where num_processes x gradient_accumulation_steps is
    the same: the batches of every optimiser step stay the same, and so do weights, optimiser and schedule. Random
    numbers (dropout) are then drawn anew, from seed, step and process.

    Raises:
        CheckpointError: it can't be read, or it was made with other `settings`, so that the batches would differ.
    """
    try:
        state = TrainingState.load(checkpoint)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} can't be read: {error}. Use an older checkpoint.") from error
    _check_settings(checkpoint, state.settings, settings)
    _load_state(accelerator, checkpoint)
    num_processes = settings.get("num_processes", accelerator.num_processes)  # those sharing a sequence count as one
    num_saved = len(list(checkpoint.glob("random_states_*.pkl")))
    if state.num_processes != num_processes or num_saved != accelerator.num_processes:
        state.num_processes = num_processes
        accelerator.step = state.batch // state.num_processes
        set_seed(state.settings.get("seed", 0) + state.step, device_specific=True)
    return state


def load_best(accelerator: Accelerator, checkpoint: Path) -> None:
    """Load the weights, and what else Accelerate keeps, of a run's best checkpoint, at its end.

    Raises:
        CheckpointError: it is damaged.
    """
    damage = run_together(lambda: find_damage(checkpoint) if accelerator.is_main_process else None)[0]
    if damage is not None:
        raise CheckpointError(
            f"{checkpoint}, the best of this run, is damaged: {damage}. Finish with the last weights by "
            "--resume_from_checkpoint last --no-load_best_model_at_end."
        )
    _load_state(accelerator, checkpoint)


def _check_settings(checkpoint: Path, before: dict, now: dict) -> None:
    shared = ("num_processes", "gradient_accumulation_steps")
    for name in sorted((before.keys() | now.keys()) - {*shared, "data"}):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"{checkpoint} was made with {name}={before.get(name)}, this run has {name}={now.get(name)}: the "
                f"batches would not be those that remain. Resume with {name}={before.get(name)}, or start anew in "
                "another --output_dir."
            )
    data_before, data_now = (settings.get("data") or {} for settings in (before, now))
    changed = [name for name in data_before | data_now if data_before.get(name) != data_now.get(name)]
    if changed:
        raise CheckpointError(
            f"{checkpoint} was made with other data: {', '.join(changed)} changed since. Resume with the data of the "
            "first run, or start anew in another --output_dir."
        )
    batches_before, batches_now = (math.prod(settings.get(name, 1) for name in shared) for settings in (before, now))
    if batches_before != batches_now:
        num_processes = now.get("num_processes", 1)
        remedy = f"on a number of processes that divides {batches_before}"
        if batches_before % num_processes == 0:
            remedy = f"with --gradient_accumulation_steps {batches_before // num_processes}"
        raise CheckpointError(
            f"{checkpoint} was made with {batches_before} batches in an optimiser step (num_processes x "
            f"gradient_accumulation_steps), this run has {batches_now}. Resume {remedy}."
        )


def _load_state(accelerator: Accelerator, checkpoint: Path) -> None:
    def unwrap(models: list[nn.Module], input_dir: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    hook = accelerator.register_load_state_pre_hook(unwrap)
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint} does not fit this model or is damaged: {reason}. Resume with the flags of the first run, or "
            "use an older checkpoint."
        ) from error
    finally:
        hook.remove()


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
    flush_folder(folder)


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there."
