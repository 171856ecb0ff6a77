"""The gate before Gradio's server: which addresses there are, how much a request may bring, what pages may fetch.

Gradio by itself serves every file that anyone uploaded to whoever knows its path, takes up to a thousand files in one
request, and fetches addresses of other hosts for its visitors, both as the source of a file and as a file to serve.
Here uploads are never served, addresses that the interface doesn't need aren't there, and a request names no file but
those that were uploaded.
"""

import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from .page_store import PageStore
from .uploads import MAX_FILE_BYTES, MAX_STORED_BYTES, MAX_STORED_FILES, STORED_SECONDS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

API = "/gradio_api"
PAGES = "/pages/"
EXACT = frozenset(
    {"/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"}
    | {f"{API}/{name}" for name in ("info", "startup-events", "queue/join", "queue/data", "reset", "cancel")}
    | {f"{API}/upload", f"{API}/upload_progress", f"{API}/theme.css"}
)
BELOW = ("/assets/", "/static/", "/svelte/", f"{API}/heartbeat/")
"""What the interface asks for, as whole addresses and as folders. Files of the cache and of other hosts, deep links,
proxies, monitoring and the run history are not among it."""
MAX_BODY_BYTES = 2**23
"""Bytes of a request that is no upload, such as a pasted text."""
FORM_BYTES = 2**16
"""Bytes of an upload beside its file: names and boundaries of the form."""
HEADERS = {
    # Gradio's interface is made of scripts and styles in the page; none of it may come from, or go to, another host.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
PAGE_HEADERS = {
    # An origin of its own: a page can't reach the app, whose address it comes from. Its own policy stands inside it.
    # On the Hub the app stands in a frame itself, and each frame around a page must be allowed.
    "content-security-policy": "sandbox allow-scripts allow-popups; frame-ancestors 'self'"
    + (" https://huggingface.co" if os.environ.get("SPACE_ID") else ""),
    "content-type": "text/html; charset=utf-8",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-robots-tag": "noindex",
}


class Refused(Exception):
    """A request that the gate turns away, with the status and the reason that are sent back."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Gate:
    """ASGI middleware before Gradio's app.

    Args:
        app: what is behind the gate.
        upload_folder: where Gradio puts what is uploaded.
        pages: the explanation pages, served at `PAGES` + token.
    """

    def __init__(self, app: App, upload_folder: Path, pages: PageStore):
        self.app, self.upload_folder, self.pages = app, upload_folder, pages

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket, which the interface doesn't open
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        try:
            if path.startswith(PAGES):
                page = self.pages.find(path.removeprefix(PAGES))
                if page is None:
                    raise Refused(404, "This page is gone: pages are kept for an hour. Explain the document again.")
                await answer(send, 200, page, PAGE_HEADERS)
                return
            if path not in EXACT and not path.startswith(BELOW):
                raise Refused(404, "There is nothing at this address.")
            if scope["method"] == "POST":
                receive = await self._checked(scope, receive)
            elif scope["method"] not in ("GET", "HEAD"):
                raise Refused(405, "Addresses here are read or posted to.")
        except Refused as refusal:
            await answer(send, refusal.status, refusal.reason.encode(), {"content-type": "text/plain; charset=utf-8"})
            return
        await self.app(scope, receive, with_headers(send))

    async def _checked(self, scope: MutableMapping[str, Any], receive: Receive) -> Receive:
        """Return what the app receives of a POST that it may have."""
        headers = dict(scope["headers"])
        if b"transfer-encoding" in headers:  # which would make the server ignore the length
            raise Refused(411, "A request must say how long it is, and not come in chunks.")
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            raise Refused(411, "The request doesn't say how long it is.")
        if scope["path"] == f"{API}/upload":
            # Without a transfer encoding the server passes on no more bytes than were announced.
            if int(length) > MAX_FILE_BYTES + FORM_BYTES:
                raise Refused(413, f"A file may have {MAX_FILE_BYTES >> 20} MiB.")
            check_room(self.upload_folder)
            return receive
        if int(length) > MAX_BODY_BYTES:
            raise Refused(413, f"A text may have {MAX_BODY_BYTES >> 20} MiB.")
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "The request broke off.")
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        check_files(body, self.upload_folder)
        is_first = True

        async def replay() -> Message:
            nonlocal is_first
            if is_first:
                is_first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return replay


def check_room(folder: Path) -> None:
    """Raise `Refused` where the uploads that are kept are too many, or too large all together.

    Gradio deletes old uploads, but not its own temporary files: those of uploads that broke off, and an empty one for
    each request with a file. Those that are old go here, and empty ones don't count.
    """
    sizes = []
    for path in list(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            if path.is_dir():
                continue
            found = path.stat()
            if path.parent == folder and time.time() - found.st_mtime > STORED_SECONDS:
                path.unlink()
            elif found.st_size:
                sizes.append(found.st_size)
    if len(sizes) >= MAX_STORED_FILES or sum(sizes) >= MAX_STORED_BYTES:
        raise Refused(503, "There are too many uploads at the moment: try again in some minutes.")


def check_files(body: bytes, folder: Path) -> None:
    """Raise `Refused` where a request names a file that isn't among the uploads, such as an address or a local path."""
    if not body:
        return
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request is no JSON.") from error
    root = folder.resolve()
    for path in named_files(content):
        if not isinstance(path, str) or "\0" in path or not Path(path).resolve().is_relative_to(root):
            raise Refused(403, "The request names a file that was not uploaded.")


def named_files(content: Any) -> Iterator[Any]:
    """Yield what stands under "path" anywhere in the content of a request."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def with_headers(send: Send) -> Send:
    """Return what sends the app's answer with `HEADERS`."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", []) if name.decode().lower() not in HEADERS]
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": kept + added}
        await send(message)

    return sending


async def answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    """Send a whole answer."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
