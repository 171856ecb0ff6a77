"""A visitor of the app: a real browser that uploads files, types, presses buttons and waits for what they bring."""

import json
import time
from pathlib import Path
from typing import Any

from browser import PATIENCE_S, Browser


class Visitor(Browser):
    """A browser at the app's address; `requests` and `complaints` are of the page opened last, `asked` all requests."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.asked: list[str] = []

    def visit(self, address: str, width: int = 1200, scheme: str = "light", height: int = 900) -> None:
        """Open an address in a window of so many pixels, "light" or "dark"; returns when it is loaded."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.asked += self.requests
        self.requests, self.complaints, self._is_loaded = [], [], False
        self._address = address
        self.call("Page.navigate", url=address)
        while not self._is_loaded:
            self._receive()

    def visit_app(self, address: str, width: int = 1200, scheme: str = "light") -> None:
        """Open the app and wait for its first tab."""
        self.visit(address, width, scheme)
        self.wait_for("document.querySelector('button[role=tab]')")
        self.wait_for("document.querySelector('input[type=file]')")

    def wait_for(self, expression: str, seconds: float = PATIENCE_S) -> Any:
        """Return the first true value of a JavaScript expression."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := self.ask(f"(() => {{ const found = {expression}; return found?.nodeType ? true : found }})()"):
                return value
            time.sleep(0.1)
        raise TimeoutError(f"never true: {expression}\n{self.ask('document.body.innerText')}")

    def press(self, name: str, role: str = "button.primary") -> None:
        """Press the visible button, or another thing that can be pressed, of a name."""
        words = json.dumps(name)
        self.wait_for(
            f"[...document.querySelectorAll('{role}')].filter(one => one.offsetParent !== null)"
            f".find(one => one.textContent.trim() === {words} && (one.click(), true))"
        )

    def open_tab(self, name: str) -> None:
        """Open a tab and wait for its button."""
        self.press(name, "button[role=tab]")
        button = "Compare" if name == "Compare" else "Explain"
        self.wait_for(
            "[...document.querySelectorAll('button.primary')].find(one => one.offsetParent !== null && "
            f"one.textContent.trim() === '{button}')"
        )

    def upload(self, path: Path, place: int = 0) -> None:
        """Give a file to the visible file field of a number, and wait until the server has it."""
        self.ask(
            "window.fields = [...document.querySelectorAll('input[type=file]')]"
            ".filter(one => one.closest('.tabitem')?.offsetParent !== null); window.fields.length"
        )
        found = self.call("Runtime.evaluate", expression=f"window.fields[{place}]")["result"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["objectId"])

    def type_text(self, text: str, place: int = 0) -> None:
        """Type a text at the end of the visible text field of a number."""
        fields = "[...document.querySelectorAll('textarea')].filter(one => one.offsetParent !== null)"
        self.ask(f"{fields}[{place}].focus()")
        self.call("Input.insertText", text=text)

    def press_cross(self, place: int = 0) -> None:
        """Take back the file of a visible file field."""
        crosses = "[...document.querySelectorAll('.tabitem button[aria-label=Clear]')]"
        self.wait_for(f"({crosses}.filter(one => one.offsetParent !== null)[{place}].click(), true)")

    def choose(self, field: str, beginning: str) -> None:
        """Choose the first entry of a visible list whose text begins so."""
        found = f"document.querySelector('.tabitem:not([style*=none]) input[aria-label={json.dumps(field)}]')"
        self.wait_for(f"({found}.focus(), true)")
        self.wait_for(
            "[...document.querySelectorAll('[role=option]')]"
            f".find(one => one.textContent.trim().replace('✓', '').trim().startsWith({json.dumps(beginning)}) && "
            "(one.dispatchEvent(new MouseEvent('mousedown', {bubbles: true})), true))"
        )

    def result(self, part: str = ".fa-app", seconds: float = PATIENCE_S) -> str:
        """Return the text of a part of the result that is in sight, as soon as it is there."""
        return self.wait_for(
            f"[...document.querySelectorAll('.fa-result {part}')].filter(one => one.offsetParent !== null)[0]"
            "?.innerText",
            seconds,
        )
