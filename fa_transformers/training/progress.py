"""Meters of a run: progress, speed, where the time of a step goes, memory, and a profiler's trace."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from ..files import written_by_rename
from ..memory import MemoryEstimate, estimate_memory, format_bytes
from ..mistakes import Mistake
from ..models.configuration_fa import FactorizedConfig
from ..tables import counted
from .checkpointing import TrainingState
from .flops import device_peak_flops

Batch = TypeVar("Batch")
STEP_PARTS = ("data", "forward", "backward", "optimizer")
PROFILED_STEPS = 3
"""Optimiser steps in a trace."""
NUM_UNRECORDED = 2
"""Steps before them: one that is passed over, and one that warms the profiler up."""
COLLECTIVES: dict[DeviceType, tuple[str, ...]] = {
    DeviceType.CPU: ("gloo:",),
    DeviceType.CUDA: ("ncclDevKernel", "ncclKernel"),
}
"""Beginnings of the profiler's names of communication between processes, where it takes its time.

NCCL's ranges on the CPU and its annotations on the GPU cover the same time as its kernels.
"""


def communication_us(events: Iterable[FunctionEvent]) -> float:
    """Microseconds of communication between processes among a profiler's events, each collective counted once."""
    return sum(
        event.time_range.elapsed_us()
        for event in events
        if event.name.startswith(COLLECTIVES.get(event.device_type, ()))
        and (event.device_type == DeviceType.CPU or not event.is_user_annotation)  # gloo has nothing but annotations
    )


class TrainingDiverged(Mistake, RuntimeError):
    """The loss is no longer finite; the message says at which step and what to change."""


class StepTimes:
    """Seconds of each of `STEP_PARTS`, on the device: on CUDA between events, which are read once they have passed."""

    def __init__(self, device: torch.device):
        self.seconds = dict.fromkeys(STEP_PARTS, 0.0)
        self._is_cuda = device.type == "cuda"
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        if not self._is_cuda:
            started = time.perf_counter()
            yield
            self.seconds[part] += time.perf_counter() - started
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._pending.append((part, start, end))

    def collect(self) -> None:
        """Add up what the device has finished, without waiting for it."""
        while self._pending and self._pending[0][2].query():
            part, start, end = self._pending.popleft()
            self.seconds[part] += start.elapsed_time(end) / 1000


def peak_memory(device: torch.device) -> int | None:
    """Largest memory so far in bytes: of tensors on a CUDA device, else of the whole process (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # which Windows lacks
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int | None:
    """Memory of this process at the moment, in bytes; None where the system doesn't tell it as Linux does."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def describe_peak(estimate: MemoryEstimate, device: torch.device, returns_freed: bool) -> str:
    """Return a sentence on the peak that training will reach, of what `peak_memory` measures and the bar shows.

    Off CUDA devices that is the process: Python, its libraries and the data too, and the weights, which it holds at the
    call. Unless it `returns_freed` memory (see `return_freed_memory`), the C library keeps some of it, up to the size
    of the activations: the peak then has an upper end, too.
    """
    resident = resident_memory()
    if device.type == "cuda" or resident is None:
        return f"estimated peak memory of tensors: {estimate}"
    least = max(resident + estimate.growth, peak_memory(device) or 0)
    most = max(least, resident + estimate.growth + (0 if returns_freed else estimate.activations))
    ends = dict.fromkeys((format_bytes(least), format_bytes(most)))
    needed = f"optimizer {format_bytes(estimate.optimizer)}, " if estimate.optimizer else ""
    needed += f"gradients {format_bytes(estimate.gradients)} or activations {format_bytes(estimate.activations)}"
    return (
        f"estimated peak memory of each process: {' to '.join(ends)}, of which it takes {format_bytes(resident)} now "
        f"with libraries, data and weights, and training takes {format_bytes(estimate.growth)} ({needed})"
    )


def describe_memory(
    config: FactorizedConfig,
    largest_batch: tuple[int, int],
    accelerator: Accelerator,
    *,
    trained: nn.Module,
    gradient_checkpointing: bool = False,
    num_sharing: int = 1,
    beside: int = 0,
) -> str:
    """Return a sentence on the memory that a step on the largest batch may take.

    Where less than half of the parameters train, it says that activations are counted as if all did.

    Args:
        config: of the model that trains.
        largest_batch: its examples, and the tokens that they are padded to.
        trained: what trains, of whose parameters some may be frozen.
        num_sharing: processes that share the tokens of a batch.
        beside: bytes of weights that are held beside the model's, such as a teacher's.
    """
    num_examples, longest = largest_batch
    num_trained = sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)
    estimate = estimate_memory(
        config,
        -(-longest // num_sharing),
        batch_size=num_examples,
        training=True,
        num_trained=num_trained,
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision=accelerator.mixed_precision,
        device_type=accelerator.device.type,
    )
    # A pooler that nobody reads may be frozen, too.
    is_partial = num_trained < sum(weight.numel() for weight in trained.parameters()) / 2
    counted_as = "; activations are counted as if all parameters trained, which is an upper end" if is_partial else ""
    estimate = replace(estimate, weights=estimate.weights + beside)
    peak = describe_peak(estimate, accelerator.device, returns_freed=gradient_checkpointing)
    return f"{peak}{counted_as}; the largest batch has {counted(num_examples * longest, 'token')}"


class ProgressMeter:
    """Progress bar over optimiser steps with loss, tokens per second of all processes, where the time goes, memory, and
    remaining time; silent off the main process.

    Keeps `tokens`, `seconds`, `cpu_seconds`, `data_wait_seconds` and `mean_loss` of the run's state, which go on where
    a resumed run stopped; the split of a step and the rate of operations are of this start alone, and of this process.

    Args:
        flops_per_token: as `training_flops_per_token` gives it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        max_steps: int,
        state: TrainingState,
        flops_per_token: tuple[float, float] | None = None,
    ):
        self.bar = tqdm(
            total=max_steps,
            initial=state.step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        self.accelerator, self.state = accelerator, state
        self.times = StepTimes(accelerator.device)
        self._flops_per_token = flops_per_token
        self._peak_flops = device_peak_flops(accelerator.device)
        self._num_tokens = self._num_examples = 0
        self._seconds_before = state.seconds
        self._started = time.perf_counter() - state.seconds
        self._cpu_started = time.process_time() - state.cpu_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what the block takes out of the seconds."""
        paused_at, cpu_paused_at = time.perf_counter(), time.process_time()
        yield
        self._started += time.perf_counter() - paused_at
        self._cpu_started += time.process_time() - cpu_paused_at

    def waited_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield `batches`; the time until each is there, on this process's device, counts as waiting."""
        iterator = iter(batches)
        while True:
            asked_at = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            seconds = time.perf_counter() - asked_at
            self.state.data_wait_seconds += seconds
            self.times.seconds["data"] += seconds
            yield batch

    def add_batch(self, loss: float, num_tokens: int, num_examples: int) -> None:
        """Note a batch. `num_tokens`, `num_examples`: real tokens and examples over all processes.

        Raises:
            TrainingDiverged: the loss is not finite; no update was made from it.
        """
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"The loss is {loss} at step {self.state.step}. Lower --learning_rate, raise "
                "--warmup_ratio, or train without --mixed_precision; checkpoints before this step are sound."
            )
        mean = self.state.mean_loss
        self.state.mean_loss = loss if mean is None else 0.95 * mean + 0.05 * loss
        self.state.tokens += num_tokens
        self._num_tokens += num_tokens
        self._num_examples += num_examples

    def finish_step(self) -> None:
        self.state.seconds = time.perf_counter() - self._started
        self.state.cpu_seconds = time.process_time() - self._cpu_started
        self.times.collect()
        shown = {"loss": f"{self.state.mean_loss:.3f}", "tokens_per_s": f"{self.tokens_per_second:,.0f}"}
        shown |= {name: f"{share:.0%}" for name, share in self.step_shares.items()}
        memory, mfu = peak_memory(self.accelerator.device), self._utilisation(self.flops_per_second)
        if memory is not None:
            shown["memory"] = format_bytes(memory).replace(" ", "")
        if mfu is not None:
            shown["mfu"] = f"{mfu:.0%}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of training, over all processes together."""
        return self.state.tokens / max(self.state.seconds, 1e-9)

    @property
    def step_shares(self) -> dict[str, float]:
        """Fraction of this start's seconds by part of a step, without evaluation and checkpoints.

        "data" is the time that this process waited for batches, with a stream also for those of the others. "backward"
        holds the communication of gradients, which overlaps with it, and the wait for slower processes; `StepProfiler`
        gives the communication.
        """
        seconds = max(self.state.seconds - self._seconds_before, 1e-9)
        return {part: self.times.seconds[part] / seconds for part in STEP_PARTS}

    @property
    def flops_per_second(self) -> float | None:
        """Model operations of all processes together, at the mean length of the examples so far."""
        if self._flops_per_token is None or not self._num_examples:
            return None
        fixed, by_length = self._flops_per_token
        per_token = fixed + by_length * self._num_tokens / self._num_examples
        return per_token * self._num_tokens / max(self.state.seconds - self._seconds_before, 1e-9)

    def _utilisation(self, flops_per_second: float | None) -> float | None:
        if flops_per_second is None or self._peak_flops is None:
            return None
        return flops_per_second / (self._peak_flops * self.accelerator.num_processes)

    @property
    def values(self) -> dict[str, float | None]:
        """Return the figures of the last steps for the tracker; one without a value here is left out."""
        memory, flops = peak_memory(self.accelerator.device), self.flops_per_second
        values = {
            "loss": self.state.mean_loss,
            "tokens_per_second": self.tokens_per_second,
            "data_wait_share": self.state.data_wait_share,
            **{f"{part}_share": share for part, share in self.step_shares.items()},
            "peak_memory_gib": None if memory is None else memory / 2**30,
            "model_tflops_per_second": None if flops is None else flops / 1e12,
            "mfu": self._utilisation(flops),
        }
        return {name: value for name, value in values.items() if value is not None}

    def figures(self) -> dict:
        """Return the report's figures: split of a step, memory of the process that takes most, operations per second,
        and seconds of processor time, in which others' work on the machine doesn't count.

        Processor time is that of the main process over all starts of the run: other processes, workers that load data
        among them, are not counted.

        All processes must call this. A figure that can't be had here is None.
        """
        memory = peak_memory(self.accelerator.device)
        peaks = self.accelerator.gather(torch.tensor([memory or 0], device=self.accelerator.device))
        flops = self.flops_per_second
        mfu = self._utilisation(flops)
        return {
            "step_shares": {part: round(share, 4) for part, share in self.step_shares.items()},
            "cpu_seconds": round(self.state.cpu_seconds, 1),
            "peak_memory_gib": None if memory is None else round(int(peaks.max()) / 2**30, 3),
            "model_tflops_per_second": None if flops is None else float(f"{flops / 1e12:.4g}"),
            "mfu": None if mfu is None else round(mfu, 4),
        }

    def write(self, line: str) -> None:
        if not self.bar.disable:
            self.bar.write(line)

    def close(self) -> None:
        self.bar.close()


class StepProfiler:
    """Writes, if `is_on`, a profiler's trace of `PROFILED_STEPS` optimiser steps to `folder`/rank-R.json.

    Each process writes one file, for Perfetto or chrome://tracing; a run of fewer steps than it takes leaves fewer or
    none. For a `with` block, with a call of `finish_step` after each step.

    `figures` then holds "communication_ms_per_step": the milliseconds in which collective operations of this process
    were under way. They overlap with the backward pass and include the wait for slower processes, so they are no part
    of the step's split. A single process has no such figure.

    Raises:
        OSError: the folder can't be written.
    """

    def __init__(self, is_on: bool, folder: Path, accelerator: Accelerator):
        self.figures: dict[str, float] = {}
        self.path = folder / f"rank-{accelerator.process_index}.json"
        self._num_processes = accelerator.num_processes
        self._profiler: profile | None = None
        if is_on:
            activities = [ProfilerActivity.CPU]
            if accelerator.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            steps = schedule(wait=NUM_UNRECORDED - 1, warmup=1, active=PROFILED_STEPS, repeat=1)
            self._profiler = profile(
                activities=activities, schedule=steps, on_trace_ready=self._write, record_shapes=True, acc_events=True
            )

    def __enter__(self) -> "StepProfiler":
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def finish_step(self) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: profile) -> None:
        num_steps = profiler.step_num - NUM_UNRECORDED
        if num_steps == 0:
            return  # the run was too short
        with written_by_rename(self.path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        if self._num_processes > 1:
            milliseconds = communication_us(profiler.events() or []) / 1000
            self.figures = {"communication_ms_per_step": round(milliseconds / num_steps, 3)}
