"""A real browser for tests: Chromium without a screen, spoken to over pipes by its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 90
"""Seconds that an answer may take on a machine that is busy."""


def find_browser() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A `with` block in which pages are opened; `requests` and `complaints` are of the page opened last.

    `requests` are the addresses that the page asked for beside its own, `complaints` what the console says.
    """

    def __init__(self, folder: Path):
        self.folder, self.requests, self.complaints = folder, [], []
        self._number, self._rest, self._session = 0, b"", None

    def __enter__(self) -> Self:
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        self._reader, self._writer = ours_in, ours_out
        command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={self.folder}"]
        # The browser reads commands from descriptor 3 and answers on 4.
        script = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        os.close(self._reader)
        os.close(self._writer)

    def open(self, path: Path, width: int, scheme: str = "light", height: int = 900) -> None:
        """Open a file in a window of so many pixels, "light" or "dark"; returns when it is loaded."""
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="", features=features)
        self.requests, self.complaints = [], []
        self._is_loaded = False
        self._address = path.resolve().as_uri()
        self.call("Page.navigate", url=self._address)
        while not self._is_loaded:
            self._receive()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def ask_later(self, promise: str) -> Any:
        """The value that a JavaScript promise comes to in the page."""
        found = self.call("Runtime.evaluate", expression=promise, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key that is a letter."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=f"Key{key.upper()}", **text)

    def photograph(self, path: Path) -> None:
        """Write a PNG of the whole page, in a window that is as high."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        metrics = {"width": size["width"], "height": size["height"], "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **metrics, mobile=size["width"] < 600)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: Any) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        number, until = self._number, time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
        raise TimeoutError(f"the browser did not answer to {method}")

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            part = os.read(self._reader, 1 << 16)
            assert part, "the browser ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        answer = json.loads(line)
        self._note(answer.get("method"), answer.get("params", {}))
        return answer

    def _note(self, method: str | None, found: dict) -> None:
        if method == "Page.loadEventFired":
            self._is_loaded = True
        elif method == "Network.requestWillBeSent":
            address = found["request"]["url"]
            if address != self._address and not address.startswith("data:"):
                self.requests.append(address)
        elif method == "Log.entryAdded":
            self.complaints.append(found["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
            self.complaints.append(f"{method}: {found}")
