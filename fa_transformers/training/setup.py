"""The processes and devices of a run: its accelerator, threads, groups of processes, trackers, and the whole model."""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, LoggerType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from ..cores import choose_threads
from ..models import ARCHITECTURES
from ..models.fa_sequence_parallel import open_context, sequence_parallel
from ..options import LoopOptions
from ..redaction import redact, without_local_paths
from ..tables import counted
from .processes import meet_after_restart

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""Ways of running in which no process has all weights of a model."""


def choose_mixed_precision(name: str | None, on_cpu: bool) -> str | None:
    """`name`, or for "auto" bf16 where the device multiplies matrices faster in it, else "no".

    Of CPUs, those with AMX or AVX512-BF16 do.
    """
    if name != "auto":
        return name
    if not on_cpu:
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "no"
    # torch has told what the processor can do since 2.12.
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def make_accelerator(loop: LoopOptions) -> Accelerator:
    """The accelerator that `loop` asks for, on the CPU where there is nothing faster.

    The schedule is stepped by the loop, once per optimiser step whatever the number of processes.

    Raises:
        ValueError: Accelerate knows no such tracker.
    """
    on_cpu = loop.use_cpu or not torch.accelerator.is_available()
    timeout = timedelta(seconds=loop.ddp_timeout)
    if loop.report_to not in ("none", *LoggerType.list()):
        raise ValueError(f"--report_to must be none or one of {', '.join(LoggerType.list())}, got {loop.report_to!r}.")
    meet_after_restart(timeout)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=choose_mixed_precision(loop.mixed_precision, on_cpu),
        gradient_accumulation_steps=loop.gradient_accumulation_steps,
        log_with=None if loop.report_to == "none" else loop.report_to,
        project_dir=loop.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    use_cpu_threads(accelerator, loop.num_threads)
    if not accelerator.is_main_process:  # every process would warn of the same
        logging.getLogger(__package__.partition(".")[0]).setLevel(logging.ERROR)
    return accelerator


def gather_model(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """The plain FA model inside a prepared one, in float32; every process must call this.

    Where FSDP or DeepSpeed shard the weights it is a new model, which has them on the main process alone.
    """
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the card times it as users load it
    if accelerator.distributed_type not in SHARDING:
        return plain
    weights = accelerator.get_state_dict(model)
    # FSDP derives a class of its own from the model's.
    known = [model_class for heads in ARCHITECTURES.values() for model_class in heads.values()]
    bases = [model_class for model_class in known if isinstance(plain, model_class)]
    whole = max(bases, key=lambda model_class: len(model_class.__mro__))(plain.config)  # the most derived
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    return whole.eval()


def use_cpu_threads(accelerator: Accelerator, num_threads: int) -> None:
    """Let this process compute with `num_threads` CPU threads, or for 0 with as many as `choose_threads` finds."""
    torch.set_num_threads(choose_threads(num_threads, count_local_processes(accelerator)).count)


def describe_processes(accelerator: Accelerator, num_threads: int) -> str:
    """Return processes, device and CPU threads of a run with `num_threads`, in words for a message."""
    threads = choose_threads(num_threads, count_local_processes(accelerator))
    each = " each" if accelerator.num_processes > 1 else ""
    processes = counted(accelerator.num_processes, "process")
    return f"{processes} on {accelerator.device} with {counted(threads.count, 'thread')}{each} ({threads.origin})"


def count_local_processes(accelerator: Accelerator) -> int:
    """Training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def count_replicas(loop: LoopOptions, accelerator: Accelerator) -> int:
    """Groups of `sequence_parallel_size` processes, each of which works on batches of its own.

    Raises:
        ValueError: the processes cannot be grouped so.
    """
    replicas, rest = divmod(accelerator.num_processes, loop.sequence_parallel_size)
    if rest:
        raise ValueError(
            f"--sequence_parallel_size {loop.sequence_parallel_size} must divide the number of processes, "
            f"{accelerator.num_processes}."
        )
    return replicas


def share_sequences(loop: LoopOptions, accelerator: Accelerator) -> AbstractContextManager:
    """The context for `sequence_parallel_size` neighbouring processes to share the tokens of each batch."""
    if loop.sequence_parallel_size == 1:
        return nullcontext()
    shape = (count_replicas(loop, accelerator), loop.sequence_parallel_size)
    return sequence_parallel(init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp", "sp")))


def reports_examples() -> bool:
    """True on the one process of each sequence-parallel group that reports scores, so that each example counts once."""
    context = open_context()
    return context is None or dist.get_rank(context.group) == 0


def log_after(steps_before: int, accelerator: Accelerator, name: str = "") -> Callable[[dict, int], None]:
    """Return what logs values and their step to the trackers for one of several loops of a run, one after the other.

    Steps go on after the `steps_before` of the earlier loops, as trackers such as wandb drop steps that go back, and
    values are called `name`/VALUE, so that no curve lies over that of another loop.
    """

    def log(values: dict, step: int) -> None:
        named = {f"{name}/{value}" if name else value: number for value, number in values.items()}
        accelerator.log(named, step=steps_before + step)

    return log


def start_trackers(accelerator: Accelerator, report_to: str, name: str, config: dict) -> None:
    """Start the trackers that the accelerator was made with, with the run's flags as their config.

    Neither tokens of the Hub nor local paths are in it, as a tracker may be a server.

    Raises:
        ValueError: `report_to` names a tracker that is not installed.
    """
    if report_to == "none":
        return
    if not accelerator.log_with:
        raise ValueError(f"--report_to {report_to}: that tracker is not installed; install it, or use none.")
    plain = {key: value for key, value in config.items() if isinstance(value, (int, float, str, bool))}
    plain.pop("hub_token", None)
    plain = {key: without_local_paths(value) if isinstance(value, str) else value for key, value in plain.items()}
    accelerator.init_trackers(name, config=redact(plain))
