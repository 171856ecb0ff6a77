"""Started by test_nothing_lost.py under torchrun: finetune.py as users run it, but process 1 is lost before step 5."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
how, *flags = sys.argv[1:]
num_steps = 0


def lose(optimizer: Optimizer, *_: object) -> None:
    global num_steps
    num_steps += 1
    if os.environ["RANK"] != "1" or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" or num_steps < 5:
        return
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what hangs in C code does not get to Python's handler either
    time.sleep(3600)


register_optimizer_step_pre_hook(lose)
sys.argv = [str(SCRIPT), *flags]
runpy.run_path(str(SCRIPT), run_name="__main__")
