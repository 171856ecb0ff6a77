"""Model folders that load without this package, and their way to the Hub.

`publish` writes a folder, `check_folder` loads it in a fresh process, `push_folder` uploads it and loads it back.
"""

import base64
import copy
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import sha256_of, write_text
from ..models import ARCHITECTURES
from ..version import __version__
from . import self_check
from .card import FACTS_FILE, UNPUBLISHED, FactError, ModelFacts, render_card
from .self_check import SELF_TEST_FILE, SelfTestError

CARD_FILE = "README.md"
SELF_TEST_TEXTS = [
    "Permission is hereby granted, free of charge, to any person obtaining a copy.",
    "The software is provided as is, without warranty of any kind, express or implied, "
    "and in no event shall the authors be liable for any claim.",
]
SELF_TEST_MAX_LENGTH = 32


class PublishError(ValueError):
    """A model, a processor or a folder cannot be published; the message says what to change."""


class PushError(RuntimeError):
    """An upload did not complete; the message names the step, the cause and how to go on."""


def publish(
    model: PreTrainedModel,
    processor: Any,
    facts: ModelFacts,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model folder that loads anywhere with `trust_remote_code=True`, without this package.

    It holds the weights, the configuration with its complete `auto_map`, the model's code files, the tokenizer or
    image processor, the model card (`README.md`) with its facts (`model_facts.json`), and `self_test.json`: a small
    input, the outputs of `model` for it, and the SHA-256 of every file. It appears by rename, complete or not at all.

    Args:
        model: an FA model, not wrapped.
        processor: its tokenizer or image processor.
        facts: what the card says.
        folder: where to; must be new or empty.
        overwrite: replace what an earlier `publish` wrote there. Other files in the folder are kept.
        extra_files: further files by their path inside the folder, such as those of sentence-transformers.

    Returns:
        The folder's path.

    Raises:
        PublishError: model and processor do not fit together or do not fit `facts`; the model's outputs are not finite.
        FileExistsError: the folder is not empty and `overwrite` is False.
        OSError: the folder cannot be written; nothing of it remains.
    """
    auto_class = find_auto_class_of(model)
    _check_processor(model, processor)
    if facts.auto_class != auto_class:
        raise PublishError(
            f"`facts.auto_class` is {facts.auto_class!r}, but {type(model).__name__} loads with {auto_class!r}"
        )
    folder = check_target(folder, overwrite)
    with _written_beside(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        for name, content in (extra_files or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        paths = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        files = {path.relative_to(partial).as_posix(): sha256_of(path) for path in paths}
        test = _make_self_test(model, processor, auto_class) | {"files": files}
        write_text(partial / SELF_TEST_FILE, json.dumps(test, indent=1, allow_nan=False) + "\n")
        facts.save(partial / FACTS_FILE)
        write_text(partial / CARD_FILE, render_card(facts))
    return folder


def check_target(folder: str | os.PathLike, overwrite: bool) -> Path:
    """The absolute path; FileExistsError if it is a file, or not empty and not to be overwritten."""
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"`folder` {folder} is a file; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"`folder` {folder} is not empty; choose another one, or pass overwrite=True")
    return folder


def check_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Load a published folder in a fresh process that cannot import this package, and compare with its self-test.

    Returns:
        `source`, `model_class`, `max_difference`, `tolerance` (of the outputs, absolute) and `files` (their number).

    Raises:
        SelfTestError: not a published folder; a file is missing or altered; it does not load; the outputs differ.
    """
    folder = Path(folder).resolve()
    self_check.read_self_test(folder)
    return _check_in_fresh_process([str(folder)], {"HF_HUB_OFFLINE": "1"})


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Check a published folder, upload it to the Hub, load it back from there, then pin the commit in its model card.

    Weights and code are one commit; the card, whose loading snippet names that commit, is a second one. Files that are
    already there are not sent again, so a failed push goes on where it stopped, and pushing twice changes nothing.
    Only the files that `publish` wrote are sent.

    Args:
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
        PushError: the Hub refused or could not be reached; the message names the step. Or the upload, loaded back,
            differs.
    """
    folder = Path(folder).resolve()
    check_folder(folder)
    facts = ModelFacts.load(folder / FACTS_FILE)
    if (folder / CARD_FILE).read_text(encoding="utf-8") != render_card(facts):
        raise FactError(
            f"{folder / CARD_FILE} is not what {FACTS_FILE} says; edit the facts and run "
            f"`python -m fa_transformers.hub.card {folder / FACTS_FILE} {folder / CARD_FILE}`"
        )
    names = [*self_check.read_self_test(folder)["files"], SELF_TEST_FILE]
    branch = revision or "main"
    api = HfApi(token=token)
    with _push_step("creating the repository", repo_id):
        # A bare name becomes one under the account of the token.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError("it exists and is public; make it private in its settings, or choose another name")
    if branch != "main":
        with _push_step(f"creating the branch {branch}", repo_id):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    with _push_step("uploading the files", repo_id):
        operations = [CommitOperationAdd(name, folder / name) for name in names]
        message = f"Weights and code of {facts.title}"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch).oid
    with _push_step("loading the upload back", repo_id):
        environment = {"HF_HUB_OFFLINE": "0"} | ({"HF_TOKEN": token} if token else {})
        result = _check_in_fresh_process([repo_id, "--revision", commit], environment)
    with _push_step("uploading the model card", repo_id):
        commit = _pinned_commit(api, repo_id, commit, names)
        card_commit = _commit_card(api, replace(facts, repo_id=repo_id, revision=commit), branch)
    return result | {"repo_id": repo_id, "branch": branch, "commit": commit, "card_commit": card_commit}


def find_auto_class_of(model: Any) -> str:
    """The name of the Auto class that loads an FA model; PublishError if it isn't one."""
    if not isinstance(model, PreTrainedModel):
        raise PublishError(
            f"`model` is a {type(model).__name__}; pass the plain model, for example accelerator.unwrap_model(model), "
            "and merge adapters first"
        )
    for architectures in ARCHITECTURES.values():
        for auto_class, model_class in architectures.items():
            if type(model) is model_class:
                return auto_class
    known = sorted(cls.__name__ for architectures in ARCHITECTURES.values() for cls in architectures.values())
    raise PublishError(f"`model` is a {type(model).__name__}, which is none of {known}")


def _check_processor(model: PreTrainedModel, processor: Any) -> None:
    input_name = model.main_input_name
    given = getattr(processor, "model_input_names", None)
    if not given or not hasattr(processor, "save_pretrained") or given[0] != input_name:
        wanted = "an image processor" if input_name == "pixel_values" else "a tokenizer"
        raise PublishError(f"`processor` must be {wanted}, got {type(processor).__name__}")
    if not isinstance(processor, PreTrainedTokenizerBase):
        return
    config = model.config
    if len(processor) > config.vocab_size:
        raise PublishError(
            f"`processor` has {len(processor)} tokens, the model's table only {config.vocab_size}; "
            "call model.resize_token_embeddings(len(tokenizer)) or pass the model's own tokenizer"
        )
    table = config.max_position_embeddings
    if config.position_embedding_type == "absolute" and processor.model_max_length > table:
        raise PublishError(
            f"`processor.model_max_length` is {processor.model_max_length}, but the model has {table} positions; "
            f"set it to at most {table}, so that long texts are truncated instead of failing"
        )


@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends, and vanishes when the block fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if folder.is_dir() and any(folder.iterdir()):
            _replace_published(folder, partial)
        else:
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_published(folder: Path, partial: Path) -> None:
    previous = folder.with_name(f".{folder.name}.previous-{os.getpid()}")
    ours = {SELF_TEST_FILE, FACTS_FILE, CARD_FILE}
    if (folder / SELF_TEST_FILE).is_file():
        files = json.loads((folder / SELF_TEST_FILE).read_text(encoding="utf-8"))["files"]
        ours.update(name.split("/")[0] for name in files)
    folder.rename(previous)
    partial.rename(folder)
    for path in previous.iterdir():
        if path.name not in ours and not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(previous)


def _make_self_test(model: PreTrainedModel, processor: Any, auto_class: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "written_by": {
            "fa_transformers": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "auto_class": auto_class,
    }
    if isinstance(processor, PreTrainedTokenizerBase):
        content["processor_class"] = "AutoTokenizer"
        content["texts"] = SELF_TEST_TEXTS
        limits = [SELF_TEST_MAX_LENGTH, processor.model_max_length, model.config.max_position_embeddings]
        content["max_length"] = int(min(limits))
    else:
        content["processor_class"] = "AutoImageProcessor"
        content["image_png"] = _make_image_png(model.config.num_channels)
    inputs = self_check.prepare_inputs(processor, content)
    clone = copy.deepcopy(model).to("cpu").eval()
    outputs = self_check.compute_outputs(clone, inputs, auto_class)
    exact = self_check.compute_outputs(clone.double(), inputs, auto_class)
    content["inputs"] = {name: self_check.take_samples(tensor) for name, tensor in inputs.items()}
    content["outputs"] = {name: self_check.take_samples(tensor) for name, tensor in outputs.items()}
    content["tolerance"] = max(_rounding_tolerance(name, outputs[name], exact[name]) for name in outputs)
    return content


def _make_image_png(num_channels: int) -> str:
    from PIL import Image

    if num_channels not in (1, 3, 4):
        raise PublishError(f"the model reads images of {num_channels} channels; its self-test needs 1, 3 or 4")
    ramp = torch.arange(96)[None, :, None] * 2 + torch.arange(64)[:, None, None] * 3
    pixels = ((ramp + torch.arange(num_channels) * 60) % 256).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2).numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _rounding_tolerance(name: str, output: Tensor, exact: Tensor) -> float:
    """Eight times this machine's rounding error, as another one sums in another order, plus sixteen units of the last
    place of the largest output, as few outputs may be rounded well by luck. Values at the dtype's limit mark padding:
    they are set, not computed."""
    limits = torch.finfo(output.dtype)
    computed = output.double().abs() < limits.max / 2
    if not (torch.isfinite(output).all() and computed.any()):
        raise PublishError(f"the model's output {name} is not finite; it cannot be published")
    error = (output.double() - exact)[computed].abs().max().item()
    return 8 * error + 16 * limits.eps * output.double()[computed].abs().max().item()


def _check_in_fresh_process(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": f"{scratch}/modules",
            "HF_HUB_CACHE": f"{scratch}/hub",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        }
        command = [sys.executable, "-P", self_check.__file__, *arguments]
        finished = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.strip()] or ["no message"]
        own = [line for line in lines if line.startswith("error: ")]
        raise SelfTestError(own[-1].removeprefix("error: ") if own else "it does not load: " + " | ".join(lines[-3:]))
    return json.loads(finished.stdout.splitlines()[-1])


@contextmanager
def _push_step(step: str, repo_id: str) -> Iterator[None]:
    try:
        yield
    # The client raises HfHubHTTPError, RuntimeError, ValueError and, without a connection, its HTTP library's errors.
    except Exception as error:
        causes = [str(cause) for cause in (error, error.__cause__) if cause is not None]
        raise PushError(
            f"{step} failed for {repo_id}: {' '.join(': '.join(causes).split())}\n"
            "What was sent is kept. Mend the cause and run the same command again: it goes on from there."
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
