"""Protects the app's gate: what a visitor can't ask of the server, and that pages go to who knows their address."""

import asyncio
import json
import os

import pytest

from fa_transformers.app import gate
from fa_transformers.app.gate import API, FORM_BYTES, MAX_BODY_BYTES, PAGES, Gate
from fa_transformers.app.page_store import PageStore
from fa_transformers.app.uploads import MAX_FILE_BYTES


class Behind:
    """The app behind the gate: it keeps what reached it."""

    def __init__(self):
        self.reached: list[tuple[str, bytes]] = []

    async def __call__(self, scope, receive, send):
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.reached.append((scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Referrer-Policy", b"unsafe-url")]})
        await send({"type": "http.response.body", "body": b"reached"})


@pytest.fixture
def behind():
    return Behind()


@pytest.fixture
def ask(behind, tmp_path):
    pages = PageStore()
    made = Gate(behind, tmp_path, pages)

    def asking(path: str, body: bytes | None = None, length: int | None = None, method: str = "", more=()):
        sent: list[dict] = []
        half = len(body or b"") // 2
        parts = [] if body is None else [body[:half], body[half:]]

        async def receive():
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        announced = [] if body is None else [(b"content-length", str(len(body) if length is None else length).encode())]
        scope = {"type": "http", "path": path, "headers": [*(announced if length != -1 else []), *more]}
        scope["method"] = method or ("GET" if body is None else "POST")
        asyncio.run(made(scope, receive, send))
        return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])

    asking.pages = pages
    return asking


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/file=/etc/passwd",
        f"{API}/file=http://example.com/",
        f"{API}/proxy=http://example.com/",
        f"{API}/deep_link",
        f"{API}/call/document",
        f"{API}/run/predict",
        f"{API}/runs",
        "/monitoring",
        "/docs",
        "/login",
    ],
)
def test_addresses_that_the_interface_does_not_need_are_not_there(path, ask, behind):
    status, _, _ = ask(path)
    assert status == 404 and not behind.reached


def test_what_the_interface_needs_is_there_under_headers_that_keep_the_page_to_its_host(ask, behind):
    for path in ("/", "/config", "/assets/index.js", f"{API}/queue/data", f"{API}/heartbeat/abc"):
        status, body, headers = ask(path)
        assert (status, body) == (200, b"reached")
        assert b"default-src 'self'" in headers[b"content-security-policy"]
        assert headers[b"referrer-policy"] == b"no-referrer" and b"Referrer-Policy" not in headers
    assert len(behind.reached) == 5
    assert ask("/config", method="DELETE")[0] == 405


def test_a_request_names_no_file_but_uploads_however_deep_it_hides_the_name(ask, behind, tmp_path):
    def joined(path) -> int:
        body = json.dumps({"data": ["sea", {"deep": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]}).encode()
        return ask(f"{API}/queue/join", body)[0]

    own = tmp_path / "abc" / "letter.txt"
    assert joined(str(own)) == 200 and joined(None) == 200
    sent = [json.loads(body) for _, body in behind.reached]
    assert sent[0]["data"][1]["deep"][0]["path"] == str(own), "the app gets what was sent"
    others = [
        "/etc/passwd",
        "http://example.com/x.txt",
        f"{tmp_path}/../secret",
        "letter.txt",
        f"{tmp_path}x/a",
        "a\0b",
        1,
    ]
    assert [joined(path) for path in others] == [403] * len(others)
    (tmp_path / "link").symlink_to("/etc")
    assert joined(str(tmp_path / "link" / "passwd")) == 403
    assert ask(f"{API}/queue/join", b"{")[0] == 400
    assert ask(f"{API}/queue/join", b"[" * 100_000)[0] == 400
    assert len(behind.reached) == 2


def test_requests_are_bounded_in_bytes_and_uploads_in_number(ask, behind, tmp_path, monkeypatch):
    assert ask(f"{API}/queue/join", b"{}", MAX_BODY_BYTES + 1)[0] == 413
    assert ask(f"{API}/upload", b"", MAX_FILE_BYTES + FORM_BYTES + 1)[0] == 413
    assert ask(f"{API}/upload", b"", -1)[0] == 411
    for path in (f"{API}/upload", f"{API}/queue/join"):  # in chunks the announced length would hold nothing back
        assert ask(path, b"{}", more=[(b"transfer-encoding", b"chunked")])[0] == 411
    assert not behind.reached
    assert ask(f"{API}/upload", b"form", MAX_FILE_BYTES)[0] == 200
    monkeypatch.setattr(gate, "MAX_STORED_FILES", 3)
    for number in range(3):
        assert ask(f"{API}/upload", b"form")[0] == 200
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "letter.txt").write_bytes(b"sea")
    status, reason, _ = ask(f"{API}/upload", b"form")
    assert status == 503 and b"too many uploads" in reason
    (tmp_path / "0" / "letter.txt").write_bytes(b"")
    assert ask(f"{API}/upload", b"form")[0] == 200, "an empty file takes no room"
    left, new = tmp_path / "tmpabc", tmp_path / "tmpdef"
    for path in (left, new):
        path.write_bytes(b"of an upload that broke off")
    os.utime(left, (0, 0))
    os.utime(tmp_path / "1" / "letter.txt", (0, 0))
    assert ask(f"{API}/upload", b"form")[0] == 503 and not left.exists() and new.exists()
    assert (tmp_path / "1" / "letter.txt").exists(), "old uploads are deleted by Gradio, which knows of them"
    monkeypatch.setattr(gate, "MAX_STORED_FILES", 100)
    monkeypatch.setattr(gate, "MAX_STORED_BYTES", 9)
    assert ask(f"{API}/upload", b"form")[0] == 503
    assert ask(f"{API}/queue/join", b"{}")[0] == 200, "who has uploaded can go on"


def test_a_page_is_found_by_its_token_alone_and_has_an_origin_of_its_own(ask, behind):
    token = ask.pages.add(b"<p>ground</p>")
    assert len(token) == 32 and token != ask.pages.add(b"<p>ground</p>")
    status, body, headers = ask(f"{PAGES}{token}")
    assert (status, body) == (200, b"<p>ground</p>") and not behind.reached
    assert headers[b"content-security-policy"].startswith(b"sandbox allow-scripts") and b"no-store" in headers.values()
    for other in ("", token[:-1], f"{token}x", f"{token}/", "../config"):
        assert ask(f"{PAGES}{other}")[0] == 404


def test_pages_are_forgotten_by_age_and_by_size_the_oldest_first():
    seconds = [0.0]
    store = PageStore(kept_seconds=60, kept_bytes=10, clock=lambda: seconds[0])
    first, second = store.add(b"1234"), store.add(b"5678")
    assert store.find(first) == b"1234"
    third = store.add(b"9012")
    assert (store.find(first), store.find(second), store.find(third)) == (None, b"5678", b"9012")
    large = store.add(b"x" * 100)
    assert store.find(large) == b"x" * 100 and store.find(third) is None, "the newest stays, whatever its size"
    seconds[0] = 60.0
    assert store.find(large) is None


def test_web_sockets_are_closed_and_the_start_of_the_server_passes(behind, tmp_path):
    sent, passed = [], []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    async def send(message):
        sent.append(message)

    made = Gate(app, tmp_path, PageStore())
    asyncio.run(made({"type": "websocket", "path": "/"}, None, send))
    asyncio.run(made({"type": "lifespan"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}] and passed == ["lifespan"]
