"""Processes of one run: one outcome for all of them, and a clear error where one is lost."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from accelerate.utils import gather_object
from torch import distributed

from ..mistakes import Mistake

Result = TypeVar("Result")
# Gloo and NCCL report a lost peer partly as plain RuntimeError.
_COMMUNICATION_ERROR = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection (closed|reset|refused)|Broken pipe")


class ProcessFailed(RuntimeError):
    """An action that all processes take failed on one of them; every process raises it with that one's message."""


class ProcessLost(Mistake, RuntimeError):
    """Another process of the run died or no longer answers; the message says how to continue."""


def run_together(action: Callable[[], Result]) -> list[Result]:
    """Run `action` on every process and return all results, in order of the processes, on each.

    Without this, a process that fails leaves the others waiting for it.

    Raises:
        ProcessFailed: it raised an exception on at least one process.
    """
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    outcomes = gather_object([(result, None if failure is None else str(failure))])
    messages = [message for _, message in outcomes if message is not None]
    if messages:
        raise ProcessFailed(messages[0]) from failure
    return [result for result, _ in outcomes]


def was_restarted() -> bool:
    """True on every process where torchrun restarted any of them after a failure."""
    return any(run_together(lambda: int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0))


def meet_after_restart(timeout: timedelta) -> None:
    """Form the process group of processes that torchrun restarted on one machine; else leave that to Accelerate.

    Restarted processes share the store of those before them. By themselves they would read there, if they are faster
    than the process that is to write a new one, the address of a dead process (seen with torch 2.13: "Connection
    refused"). So they meet under a prefix of their own. On several machines the counts of restarts differ: start
    torchrun there with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which gives each attempt its own store.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not (is_one_machine and shares_store) or distributed.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    prefixed = distributed.PrefixStore(f"restart {attempt}", store)
    distributed.init_process_group(store=prefixed, rank=rank, world_size=world_size, timeout=timeout)


@contextmanager
def report_lost_processes(timeout_s: float) -> Iterator[None]:
    """Turn the communication error that a dead or hanging process causes in the others into `ProcessLost`.

    A dead process is noticed at once, one that hangs after `timeout_s`, the time-out that the process group has.
    """
    try:
        yield
    except RuntimeError as error:
        is_communication = isinstance(error, distributed.DistError) or _COMMUNICATION_ERROR.search(str(error))
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not is_communication:
            raise
        raise ProcessLost(
            f"Process {os.environ.get('RANK')} stops: another process of this run died, or did not answer within "
            f"--ddp_timeout {timeout_s:g} s. Its own output says why. Continue with --resume_from_checkpoint last; "
            f"torchrun --max-restarts does so by itself. What was seen here: {error}"
        ) from error
