"""The app in a process of its own, which is stopped at the end, and in which no connection leaves the machine."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

from repository import ROOT

PATIENCE_S = 300
# Runs before the app: what asks for another host is written down and refused.
WATCH = """
import socket, sys, runpy
def watched(ask, host_of):
    def asking(*args, **kwargs):
        host = host_of(*args)
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, "", "0.0.0.0", "127.0.0.1", "localhost", "::1"):
            print(f"OUTSIDE {name}", file=sys.stderr, flush=True)
            raise OSError(f"refused: {name}")
        return ask(*args, **kwargs)
    return asking
socket.getaddrinfo = watched(socket.getaddrinfo, lambda host, *rest: host)
def host_of(connection, address):
    return address[0] if connection.family in (socket.AF_INET, socket.AF_INET6) else None
for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, watched(getattr(socket.socket, name), host_of))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class AppServer:
    """A `with` block in which the app is served; `address` is where, `outside` the other hosts that it asked for.

    Args:
        script: what starts it.
        arguments: of the script.
        folder: of its output, which is also its working directory.
        environment: variables beside this process's own.
    """

    def __init__(self, script: Path, arguments: list[str], folder: Path, environment: dict[str, str] | None = None):
        self.port, self.folder, self.lines = free_port(), folder, []
        self.address = f"http://127.0.0.1:{self.port}/"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "temporary").mkdir()
        self._command = [sys.executable, "-c", WATCH, str(script), *arguments]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._environment |= {"TMPDIR": str(folder / "temporary"), "HF_HUB_OFFLINE": "1", **(environment or {})}
        self._flags = ["--port", str(self.port)]

    def listen_by_variables(self) -> None:
        """Let the app know its port as the Hub tells it to a Space, not by a flag."""
        self._environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(self.port)}
        self._flags = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [*self._command, *self._flags],
            cwd=self.folder, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.2)
        raise TimeoutError(f"the app didn't start:\n{self.output}")

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> int:
        """End the app as a terminal or a container does, and return its exit status."""
        self._process.terminate()
        return self._process.wait(60)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def outside(self) -> list[str]:
        return re.findall(r"^OUTSIDE (.*)$", self.output, re.M)

    @property
    def uploads(self) -> list[Path]:
        """The uploads that the server keeps, and whatever else of them it has written."""
        return [path for path in (self.folder / "temporary").rglob("*") if path.is_file() and path.stat().st_size]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
