"""Explanation pages in memory, each under an address that only its visitor knows."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

KEPT_SECONDS = 3600.0
KEPT_BYTES = 2**28


class PageStore:
    """Pages by a random token of 192 bits; the oldest go when they are too old, or all together too large.

    Args:
        kept_seconds: age at which a page is forgotten.
        kept_bytes: most bytes of all pages; the newest one stays, whatever its size.
        clock: seconds, which never go back.
    """

    def __init__(
        self,
        kept_seconds: float = KEPT_SECONDS,
        kept_bytes: int = KEPT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._kept_seconds, self._kept_bytes, self._clock = kept_seconds, kept_bytes, clock
        self._pages: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, page: bytes) -> str:
        """Keep a page, and return the token in its address."""
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._pages[token] = (self._clock(), page)
            self._forget()
        return token

    def find(self, token: str) -> bytes | None:
        """Return the page of a token; None where there is none, or none any more."""
        with self._lock:
            self._forget()
            found = self._pages.get(token)
        return None if found is None else found[1]

    def _forget(self) -> None:
        now = self._clock()
        size = sum(len(page) for _, page in self._pages.values())
        while self._pages:
            added, page = next(iter(self._pages.values()))
            is_too_much = size > self._kept_bytes and len(self._pages) > 1
            if now - added < self._kept_seconds and not is_too_much:
                break
            self._pages.popitem(last=False)
            size -= len(page)
