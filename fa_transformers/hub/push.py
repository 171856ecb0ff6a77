"""A published model folder's way to the Hub: checked, uploaded, loaded back, and pinned in its card."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from ..mistakes import names_arguments
from .card import FACTS_FILE, UNPUBLISHED, FactError, ModelFacts, render_card
from .certificate import CERTIFICATE_FILE, Certificate
from .login import PushError, check_login, describe_cause
from .publish import CARD_FILE, check_folder, check_in_fresh_process, read_card_facts
from .self_check import SELF_TEST_FILE, SelfTestError, path_inside, read_self_test

# Every file that the Hub keeps outside its store of large ones is smaller.
MAX_IN_MEMORY = 64 * 2**20


@names_arguments(hub_token="token")
def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Check a published folder, upload it to the Hub, load it back from there, then pin the commit in its model card.

    The login is asked for first. Weights and code are one commit; the card, whose loading snippet names that commit, is
    a second one. Files that are already there are not sent again, so a failed push goes on where it stopped, and
    pushing twice changes nothing. Only the files that `publish` wrote are sent, with the content that the check read.
    The folder's code runs in the check, offline and without the token. The checks of its certificate are repeated
    before anything is sent.

    Args:
        folder: what `publish` wrote.
        repo_id: "owner/name", or a name under the token's account; created if it does not exist.
        private: create it private. An existing public repository is then an error.
        revision: branch to push to, created from main if it does not exist; None is main.
        token: of the Hub; None uses HF_TOKEN or the stored login.

    Returns:
        `repo_id`, `branch`, `commit` (of weights and code), `card_commit`, and what `check_folder` returns, for the
        upload.

    Raises:
        SelfTestError: the folder is not fit to be pushed, as in `check_folder`; nothing was sent.
        FactError: the folder's facts are incomplete, or its card was edited by hand.
        PushError: there is no login, or the Hub refused or could not be reached; the message names the step, and what
            was sent. Or the upload, loaded back, differs.
    """
    check_login(repo_id, token)
    folder = Path(folder).resolve()
    self_test = (folder / SELF_TEST_FILE).read_bytes() if (folder / SELF_TEST_FILE).is_file() else b""
    check_folder(folder)
    facts = read_card_facts(folder)
    files = read_self_test(folder)["files"]
    if CERTIFICATE_FILE not in files:
        raise SelfTestError(f"{folder} has no {CERTIFICATE_FILE}; run `fa-transformers check {folder} --write` first")
    if facts.certificate != Certificate.load(folder / CERTIFICATE_FILE).rows:
        raise FactError(
            f"{folder / FACTS_FILE}: fact 'certificate' is not what {CERTIFICATE_FILE} says; run "
            f"`fa-transformers check {folder} --write`"
        )
    names = [*files, SELF_TEST_FILE]
    branch = revision or "main"
    api = HfApi(token=token)
    with push_step("creating the repository", repo_id, "No file was sent."):
        # A bare name becomes one under the account of the token.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError("it exists and is public; make it private in its settings, or choose another name")
    if branch != "main":
        with push_step(f"creating the branch {branch}", repo_id, "No file was sent."):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    with push_step("uploading the files", repo_id):
        operations = [_checked_file(folder, name, sha256) for name, sha256 in files.items()]
        operations.append(_checked_file(folder, SELF_TEST_FILE, hashlib.sha256(self_test).hexdigest()))
        message = f"Weights and code of {facts.heading}"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch).oid
    with push_step("loading the upload back", repo_id):
        result = _check_upload(repo_id, commit, token)
    with push_step("uploading the model card", repo_id):
        commit = _pinned_commit(api, repo_id, commit, names)
        card_commit = _commit_card(api, replace(facts, repo_id=repo_id, revision=commit), branch)
    return result | {"repo_id": repo_id, "branch": branch, "commit": commit, "card_commit": card_commit}


def _checked_file(folder: Path, name: str, sha256: str) -> CommitOperationAdd:
    """The upload of one file, of exactly the content that the check read.

    The Hub compares what it receives of a large file with the checksum that it was announced with, which is taken
    here; it does not of a small one, which is therefore read once and sent from memory.

    Raises:
        ValueError: the file was altered since the check.
    """
    path = path_inside(folder, name, f"{folder / SELF_TEST_FILE}: a name of 'files'")
    is_large = path.stat().st_size > MAX_IN_MEMORY
    operation = CommitOperationAdd(name, path if is_large else path.read_bytes())
    if operation.upload_info.sha256.hex() != sha256:
        raise ValueError(f"{path} was altered after it was checked")
    return operation


def _check_upload(repo_id: str, commit: str, token: str | None) -> dict[str, Any]:
    """Download the commit here, then load it in a fresh process, offline: its code never sees the token."""
    with tempfile.TemporaryDirectory() as cache:
        snapshot_download(repo_id, revision=commit, cache_dir=cache, token=token)
        return check_in_fresh_process([repo_id, "--revision", commit], {"HF_HUB_CACHE": cache})


@contextmanager
def push_step(step: str, repo_id: str, sent: str = "What had arrived by then is kept.") -> Iterator[None]:
    """Tell any error within a block as a `PushError` of the step that failed, and of what was sent by then."""
    try:
        yield
    # The client raises HfHubHTTPError, RuntimeError, ValueError and, without a connection, its HTTP library's errors.
    except Exception as error:
        raise PushError(
            f"{step} failed for {repo_id}: {describe_cause(error)}\n{sent} Mend the cause and run the same command "
            "again: it goes on from there."
        ) from error


def _pinned_commit(api: HfApi, repo_id: str, commit: str, names: list[str]) -> str:
    """The commit the repository's card already pins, when weights and code are the same there; otherwise `commit`."""
    try:
        pinned = ModelFacts.load(api.hf_hub_download(repo_id, FACTS_FILE, revision=commit)).revision
        if pinned != UNPUBLISHED and _blobs(api, repo_id, pinned, names) == _blobs(api, repo_id, commit, names):
            return pinned
    except (EntryNotFoundError, RevisionNotFoundError, FactError):
        return commit
    return commit


def _blobs(api: HfApi, repo_id: str, revision: str, names: list[str]) -> dict[str, str]:
    return {file.path: file.blob_id for file in api.get_paths_info(repo_id, names, revision=revision)}


def _commit_card(api: HfApi, facts: ModelFacts, branch: str) -> str:
    operations = [
        CommitOperationAdd(CARD_FILE, render_card(facts).encode()),
        CommitOperationAdd(FACTS_FILE, (json.dumps(facts.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()),
    ]
    message = f"Model card, pinned to {facts.revision[:12]}"
    return api.create_commit(facts.repo_id, operations, commit_message=message, revision=branch).oid
