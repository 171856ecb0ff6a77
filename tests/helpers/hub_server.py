"""A small Hub: the part of the Hub's HTTP API that pushing and loading a model or a Space needs, for the real client.

Standard library only, threaded, on 127.0.0.1, everything in memory. Repositories have commits, branches, privacy and
two kinds of files (regular ones travel in the commit, .safetensors through LFS). Uploads can be made to fail half-way.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment})

The client must run with HF_HUB_DISABLE_XET=1 (in `environment`): with Xet it asks for an upload protocol of its own.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_local_test_token"
USER = "tester"


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]
    lfs_paths: frozenset[str]


@dataclass
class Repository:
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, bytes], lfs_paths: frozenset[str]) -> Commit:
        parent = self.branches[branch].oid if branch in self.branches else ""
        digest = hashlib.sha1(f"{parent} {len(self.commits)} {title}".encode())
        for path in sorted(files):
            digest.update(path.encode() + hashlib.sha256(files[path]).digest())
        commit = Commit(digest.hexdigest(), title, files, lfs_paths)
        self.branches[branch] = self.commits[commit.oid] = commit
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.commits.get(revision)


class HubServer:
    """Context manager; `repositories` holds what was pushed, `requests` every request as (method, path).

    Models are called "owner/name" there, Spaces "spaces/owner/name".

    Args:
        fail_lfs_upload: refuse the content of LFS files (507) while True, after the repository was created.
        fail_commit: refuse commits (403) while True, after the LFS files were stored.
        corrupt_downloads: flip one bit of each LFS file on its way out while True.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail_lfs_upload = False
        self.fail_commit = False
        self.corrupt_downloads = False
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make `huggingface_hub` talk to this server."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


def blob_oid(content: bytes) -> str:
    """The identifier git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    routes = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/(?P<repo>(models|spaces)/[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "create_branch"),
        ("GET", r"/api/(?P<repo>(models|spaces)/[^/]+/[^/]+)/refs", "refs"),
        ("POST", r"/api/(?P<repo>(models|spaces)/[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/(?P<repo>(models|spaces)/[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/(?P<repo>(models|spaces)/[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", r"/api/(?P<repo>(models|spaces)/[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", r"/api/(?P<repo>(models|spaces)/[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<repo>(spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/(?P<repo>(spaces/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(?P<repo>(spaces/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *_) -> None:
        """Keep the test output quiet."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._read_body()
        try:
            with self.hub.lock:
                self.hub.requests.append((self.command, url.path))
                for method, pattern, name in self.routes:
                    match = re.fullmatch(pattern, url.path)
                    if match and method == self.command:
                        groups = {key: unquote(text) for key, text in match.groupdict().items() if text is not None}
                        if "repo" in groups:
                            groups["repo"] = groups["repo"].removeprefix("models/")
                        status, headers, body = getattr(self, name)(**groups)
                        break
                else:
                    raise _HubError(404, f"this server has no {self.command} {url.path}")
        except _HubError as error:
            status, body = error.status, json.dumps({"error": str(error)}).encode()
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _HubError(401, "Invalid username or password.")

    def _repository(self, repo: str) -> Repository:
        repository = self.hub.repositories.get(repo)
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not has_token):
            raise _HubError(404 if has_token else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, repo: str, revision: str) -> Commit:
        commit = self._repository(repo).find(revision)
        if commit is None:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    @staticmethod
    def _json(value: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {}, json.dumps(value).encode()

    def whoami(self):
        self._require_token()
        return self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        if not re.match(r"---\n(.+\n)+---\n", content):
            return self._json({"errors": [{"message": "README.md has no YAML metadata"}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def create_repository(self):
        self._require_token()
        request = json.loads(self.body)
        repo = f"{request.get('organization') or USER}/{request['name']}"
        if request.get("type") == "space":
            if request.get("sdk") not in ("gradio", "docker", "static"):
                raise _HubError(400, "a Space needs an sdk")
            repo = f"spaces/{repo}"
        if repo in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
        repository = Repository(private=request.get("visibility") == "private" or request.get("private") is True)
        attributes = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        repository.commit("main", "initial commit", attributes, frozenset())
        self.hub.repositories[repo] = repository
        return self._json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo.removeprefix("spaces/")})

    def create_branch(self, repo: str, branch: str):
        self._require_token()
        repository = self._repository(repo)
        if branch in repository.branches:
            raise _HubError(409, "Reference already exists")
        request = json.loads(self.body or b"{}")
        repository.branches[branch] = self._commit(repo, request.get("startingPoint", "main"))
        return self._json({}, 201)

    def refs(self, repo: str):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.oid}
            for name, commit in self._repository(repo).branches.items()
        ]
        return self._json({"branches": branches, "tags": [], "converts": []})

    def preupload(self, repo: str, revision: str):
        self._require_token()
        commit = self._commit(repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, answer = file["path"], {}
            if path in commit.files:
                content = commit.files[path]
                in_lfs = path in commit.lfs_paths
                answer["oid"] = hashlib.sha256(content).hexdigest() if in_lfs else blob_oid(content)
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **answer})
        return self._json({"files": files})

    def lfs_batch(self, repo: str):
        self._require_token()
        self._repository(repo)
        objects = []
        for item in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs/{item['oid']}/verify"},
            }
            is_stored = item["oid"] in self.hub.lfs_objects
            objects.append({"oid": item["oid"], "size": item["size"], **({} if is_stored else {"actions": actions})})
        return self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        if self.hub.fail_lfs_upload:
            raise _HubError(507, "Insufficient storage")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _HubError(400, "content does not have the announced SHA-256")
        self.hub.lfs_objects[oid] = self.body
        return 200, {}, b""

    def lfs_verify(self, oid: str):
        if oid not in self.hub.lfs_objects:
            raise _HubError(404, "LFS object was not uploaded")
        return 200, {}, b""

    def commit(self, repo: str, revision: str):
        self._require_token()
        parent = self._commit(repo, revision)
        if self.hub.fail_commit:
            raise _HubError(403, "Forbidden: storage quota exceeded")
        title, files, lfs_paths = "", dict(parent.files), set(parent.lfs_paths)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                lfs_paths.discard(value["path"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    raise _HubError(400, f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
                lfs_paths.add(value["path"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _HubError(400, f"unknown commit operation {item['key']}")
        oid = self._repository(repo).commit(revision, title, files, frozenset(lfs_paths)).oid
        return self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _entries(self, commit: Commit) -> list[dict]:
        entries = []
        for path, content in sorted(commit.files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}
            if path in commit.lfs_paths:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def info(self, repo: str, revision: str = "main"):
        commit, repository = self._commit(repo, revision), self._repository(repo)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return self._json(
            {"_id": repo, "id": repo, "modelId": repo, "sha": commit.oid, "private": repository.private, "tags": []}
            | {"siblings": siblings, "downloads": 0, "likes": 0, "gated": False, "disabled": False}
        )

    def tree(self, repo: str, revision: str, folder: str = ""):
        entries = [entry for entry in self._entries(self._commit(repo, revision)) if entry["path"].startswith(folder)]
        if folder and not entries:
            raise _HubError(404, f"{folder} does not exist", "EntryNotFound")
        return self._json(entries)

    def paths_info(self, repo: str, revision: str):
        paths = parse_qs(self.body.decode())["paths"]
        return self._json([entry for entry in self._entries(self._commit(repo, revision)) if entry["path"] in paths])

    def resolve(self, repo: str, revision: str, path: str):
        commit = self._commit(repo, revision)
        if path not in commit.files:
            raise _HubError(404, f"Entry not found: {path}", "EntryNotFound")
        content = commit.files[path]
        in_lfs = path in commit.lfs_paths
        etag = hashlib.sha256(content).hexdigest() if in_lfs else blob_oid(content)
        if in_lfs and self.hub.corrupt_downloads:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        headers["Accept-Ranges"] = "bytes"
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested is None:
            return 200, headers, content
        start, end = int(requested[1]), int(requested[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return 206, headers, content[start : end + 1]
