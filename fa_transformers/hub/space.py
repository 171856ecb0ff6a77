"""The way of a Space to the Hub: uploaded as one commit, loaded back and compared file by file."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download

from ..files import sha256_of
from ..mistakes import names_arguments
from .login import check_login
from .push import push_step

SDK = "gradio"
KEPT = {".gitattributes"}
MARKER = "fa_transformers/version.py"
"""A file that tells a Space of ours, whose older files may be deleted, from another one."""
"""Files of the Hub's own, which stay."""


@names_arguments(hub_token="token")
def push_space(
    files: Mapping[str, Path | bytes], repo_id: str, *, private: bool = False, token: str | None = None
) -> dict[str, Any]:
    """Upload a Space as one commit, load it back from there, and compare.

    Files that an earlier push left there and that aren't among `files` are deleted by the same commit. What is already
    there is not sent again, so that a failed push goes on where it stopped.

    Args:
        files: a name inside the Space -> the file, or its content.
        repo_id: "owner/name", or a name under the token's account; created if it does not exist.
        private: create it private. An existing public Space is then an error.
        token: of the Hub; None uses HF_TOKEN or the stored login.

    Returns:
        `repo_id`, `commit`, `url` and `files` (their number).

    Raises:
        PushError: there is no login, or the Hub refused or could not be reached; or the upload, loaded back, differs.
    """
    check_login(repo_id, token)
    api = HfApi(token=token)
    with push_step("creating the Space", repo_id, "No file was sent."):
        created = api.create_repo(repo_id, repo_type="space", space_sdk=SDK, private=private, exist_ok=True)
        repo_id = created.repo_id
        if private and not api.repo_info(repo_id, repo_type="space").private:
            raise ValueError("it exists and is public; make it private in its settings, or choose another name")
    with push_step("uploading the files", repo_id):
        there = set(api.list_repo_files(repo_id, repo_type="space"))
        if there - KEPT - {"README.md"} and MARKER not in there:
            raise ValueError(
                f"it is another Space, whose files would be deleted: it has no {MARKER}; choose another name"
            )
        adding = [CommitOperationAdd(name, content) for name, content in files.items()]
        deleting = [CommitOperationDelete(name) for name in sorted(there - set(files) - KEPT)]
        sent = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in adding}
        commit = api.create_commit(
            repo_id, [*adding, *deleting], commit_message="The app, its model and its code", repo_type="space"
        ).oid
    with push_step("loading the upload back", repo_id), tempfile.TemporaryDirectory() as cache:
        folder = Path(snapshot_download(repo_id, repo_type="space", revision=commit, cache_dir=cache, token=token))
        found = {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
        if differing := sorted(name for name in sent if found.get(name) != sent[name]):
            raise ValueError(f"{len(differing)} of {len(sent)} files differ from what was sent, first {differing[0]}")
    return {"repo_id": repo_id, "commit": commit, "url": str(created), "files": len(sent)}
