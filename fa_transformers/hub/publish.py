"""Model folders that load without this package: `publish` writes one, `check_folder` loads it in a fresh process."""

import base64
import copy
import io
import json
import logging
import os
import platform
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..files import sha256_of, write_text
from ..lora import describe_adapter, is_unmerged, set_location
from ..mistakes import Mistake
from ..models import ARCHITECTURES, FABertTokenizerFast, tokenization_fa_bert
from ..redaction import environment_without_secrets
from ..version import __version__
from . import self_check
from .card import FACTS_FILE, FactError, ModelFacts, render_card
from .certificate import CERTIFICATE_FILE, Certificate, measure
from .model_checks import ROUNDINGS, digest_weights, image_shape
from .placing import holds_only_leftovers, placed_in
from .self_check import SELF_TEST_FILE, SelfTestError

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SELF_TEST_TEXTS = [
    "Permission is hereby granted, free of charge, to any person obtaining a copy.",
    "The software is provided as is, without warranty of any kind, express or implied, "
    "and in no event shall the authors be liable for any claim.",
]
SELF_TEST_MAX_LENGTH = 32


class PublishError(Mistake, ValueError):
    """A model, a processor or a folder cannot be published; the message says what to change."""


def publish(
    model: PreTrainedModel,
    processor: Any,
    facts: ModelFacts,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    extra_files: Mapping[str, bytes] | None = None,
    certified: bool = True,
) -> Path:
    """Write a model folder that loads anywhere with `trust_remote_code=True`, without this package.

    It holds the weights, the configuration with its complete `auto_map`, the model's code files, the tokenizer or
    image processor, the model card (`README.md`) with its facts (`model_facts.json`), and `self_test.json`: a small
    input, the outputs of `model` for it, and the SHA-256 of every file. `certificate.json` has what was checked on the
    model's own weights, as `certify` does, and so has the card; a check that fails is a warning, so that nothing is
    lost, but `push` refuses such a folder.

    The tokenizer of a model with "absolute" positions is saved with the code that cuts longer texts, which no pipeline
    asks for; that of a model of any length is saved without a limit.

    All is written to a folder inside `folder` and moved from there file by file, `self_test.json` last: a folder that
    has it is complete. `folder` itself is never renamed: it may be a mount point or the working directory.

    Args:
        model: an FA model, not wrapped; its `name_or_path` becomes `folder`, by which adapters of it name their base.
        processor: its tokenizer or image processor.
        facts: what the card says.
        folder: where to; must be new or empty.
        overwrite: replace what an earlier `publish` wrote there. Other files in the folder are kept.
        extra_files: further files by their path inside the folder, such as those of sentence-transformers.
        certified: run the checks of the certificate: seconds for a model of MiniLM's size.

    Returns:
        The folder's path.

    Raises:
        PublishError: model and processor do not fit together or do not fit `facts`; the model's outputs are not finite;
            a name of `extra_files` is no path inside the folder.
        FileExistsError: the folder is not empty and `overwrite` is False.
        OSError: the folder cannot be written; what it held before remains.
    """
    auto_class = find_auto_class_of(model)
    _check_processor(model, processor)
    if facts.auto_class != auto_class:
        raise PublishError(
            f"`facts.auto_class` is {facts.auto_class!r}, but {type(model).__name__} loads with {auto_class!r}"
        )
    location, folder = os.fspath(folder), check_target(folder, overwrite)
    for name in extra_files or {}:
        try:
            self_check.path_inside(folder, name, "a name of `extra_files`")
        except ValueError as error:
            raise PublishError(str(error)) from error
    if isinstance(processor, PreTrainedTokenizerBase) and not cuts_texts(model, processor):
        processor = _without_limit(processor)
    with placed_in(folder, SELF_TEST_FILE, {FACTS_FILE, CARD_FILE}) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if cuts_texts(model, processor):
            _let_tokenizer_cut(partial, processor)
        for name, content in (extra_files or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        certificate = measure(model, processor, auto_class, partial) if certified else None
        if certificate:
            certificate.save(partial / CERTIFICATE_FILE)
        facts = replace(facts, certificate=certificate.rows if certificate else None)
        paths = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        files = {path.relative_to(partial).as_posix(): sha256_of(path) for path in paths}
        _write_self_test(partial, _make_self_test(model, processor, auto_class) | {"files": files})
        facts.save(partial / FACTS_FILE)
        write_text(partial / CARD_FILE, render_card(facts))
        _share_mode(partial)
    set_location(model, location)
    for failure in certificate.failures if certificate else []:
        logger.warning("The model in %s FAILED a check, and push will refuse it: %s", folder, failure)
    return folder


def check_target(folder: str | os.PathLike, overwrite: bool) -> Path:
    """Return the absolute path of a folder to write to.

    Raises:
        FileExistsError: it is a file, or it is not empty and `overwrite` is False.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"`folder` {folder} is a file; choose another name")
    if folder.is_dir() and not holds_only_leftovers(folder) and not overwrite:
        raise FileExistsError(f"`folder` {folder} is not empty; choose another one, or pass `overwrite=True`")
    return folder


def certify(model: PreTrainedModel, processor: Any) -> Certificate:
    """Check a model's own weights: saving, padding, neighbours, chunks, packing, and each precision beside float64.

    Args:
        model: an FA model, not wrapped; it stays as it is.
        processor: its tokenizer or image processor.

    Raises:
        PublishError: model and processor do not fit together.
    """
    auto_class = find_auto_class_of(model)
    _check_processor(model, processor)
    return measure(model, processor, auto_class)


@dataclass(frozen=True)
class FolderCheck:
    """The findings on a published folder.

    Args:
        self_test: `source`, `model_class`, `max_difference`, `tolerance` (of the outputs, absolute) and `files` (their
            number).
        certificate: the checks on its weights, as they came out now.
        stated: the folder's own certificate; None where it has none.
    """

    self_test: dict[str, Any]
    certificate: Certificate
    stated: Certificate | None

    @property
    def mistakes(self) -> list[str]:
        """The checks that failed, and where the folder's certificate says otherwise; each in one line."""
        found = self.certificate.failures
        if self.stated is not None and not found:
            found = [f"{CERTIFICATE_FILE}: {line}" for line in self.stated.disagreements(self.certificate)]
        return found


def examine_folder(folder: str | os.PathLike) -> FolderCheck:
    """Load a published folder in a fresh process that cannot import this package, compare it with its self-test, and
    check its weights.

    The folder's code runs there: offline, and without tokens, passwords and keys in its environment.

    Raises:
        SelfTestError: not a published folder; a file is missing or altered; it does not load; the outputs differ; its
            certificate is none.
    """
    folder = Path(folder).resolve()
    if (adapter := describe_adapter(folder)) is not None:
        raise SelfTestError(adapter)
    files = self_check.read_self_test(folder)["files"]
    result = check_in_fresh_process([str(folder), "--certificate"])
    try:
        stated = Certificate.load(folder / CERTIFICATE_FILE) if CERTIFICATE_FILE in files else None
        found = Certificate.from_list(result.pop("certificate", None))
    except FactError as error:
        raise SelfTestError(str(error)) from error
    return FolderCheck(result, found, stated)


def check_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Check a published folder as `examine_folder` does: it loads in a fresh process, without this package, offline and
    without secrets, gives what its self-test says, and its weights pass every check of a certificate.

    Returns:
        `source`, `model_class`, `max_difference`, `tolerance` (of the outputs, absolute) and `files` (their number).

    Raises:
        SelfTestError: not a published folder; a file is missing or altered; it does not load; the outputs differ; a
            check on its weights fails, or its certificate says otherwise.
    """
    found = examine_folder(folder)
    if found.mistakes:
        raise SelfTestError(f"{Path(folder).resolve()}: {'; '.join(found.mistakes)}")
    return found.self_test


def write_certificate(folder: str | os.PathLike, certificate: Certificate) -> None:
    """Put a certificate into a published folder, and onto its card, in the place of what was there.

    Raises:
        FactError: the folder's facts are incomplete, or its card was edited by hand.
        SelfTestError: as in `examine_folder`.
    """
    folder = Path(folder).resolve()
    facts = read_card_facts(folder)
    test = self_check.read_self_test(folder)
    test["files"].pop(CERTIFICATE_FILE, None)
    # Listed last: a process that is killed in between leaves a folder without a certificate.
    _write_self_test(folder, test)
    certificate.save(folder / CERTIFICATE_FILE)
    facts = replace(facts, certificate=certificate.rows)
    facts.save(folder / FACTS_FILE)
    write_text(folder / CARD_FILE, render_card(facts))
    test["files"][CERTIFICATE_FILE] = sha256_of(folder / CERTIFICATE_FILE)
    _write_self_test(folder, test)


def read_card_facts(folder: Path) -> ModelFacts:
    """Read a published folder's facts, which its card must say.

    Raises:
        FactError: they are incomplete, or the card was edited by hand.
    """
    facts = ModelFacts.load(folder / FACTS_FILE)
    if (folder / CARD_FILE).read_text(encoding="utf-8") != render_card(facts):
        raise FactError(
            f"{folder / CARD_FILE} is not what {FACTS_FILE} says; edit the facts and run "
            f"`python -m fa_transformers.hub.card {folder / FACTS_FILE} {folder / CARD_FILE}`"
        )
    return facts


def _write_self_test(folder: Path, test: Mapping[str, Any]) -> None:
    write_text(folder / SELF_TEST_FILE, json.dumps(test, indent=1, allow_nan=False) + "\n")


def find_auto_class_of(model: Any) -> str:
    """Return the name of the Auto class that loads an FA model.

    Raises:
        PublishError: `model` isn't one, or is wrapped.
    """
    if not isinstance(model, PreTrainedModel):
        raise PublishError(
            f"`model` is a {type(model).__name__}; pass the plain model, for example accelerator.unwrap_model(model), "
            "and merge adapters first (merge_and_unload)"
        )
    if is_unmerged(model):
        raise PublishError(
            f"`model` has adapters inside, which no {type(model).__name__} loads; pass what merge_and_unload() returns"
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


def cuts_texts(model: PreTrainedModel, processor: Any) -> bool:
    """Return whether the tokenizer that is saved cuts long texts: the model has "absolute" positions."""
    is_text = isinstance(processor, PreTrainedTokenizerBase)
    return is_text and model.config.position_embedding_type == "absolute"


def _without_limit(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that neither cuts a text to a number of tokens nor warns that there are more."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    return tokenizer


def _let_tokenizer_cut(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the code of `FABertTokenizerFast` in a saved tokenizer's file, and bring it.

    The class of the library stays named: without `trust_remote_code` the tokenizer loads as that one.
    """
    path, code = folder / TOKENIZER_CONFIG_FILE, Path(tokenization_fa_bert.__file__)
    if not (folder / TOKENIZER_FILE).is_file():  # not a fast one, which no other class could read
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model_input_names"] = tokenizer.model_input_names  # which a class of the library knows without a file
    settings["auto_map"] = {"AutoTokenizer": [None, f"{code.stem}.{FABertTokenizerFast.__name__}"]}
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    shutil.copyfile(code, folder / code.name)


def _share_mode(folder: Path) -> None:
    """Give every file the mode of a new one: safetensors' files could be read by their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _make_self_test(model: PreTrainedModel, processor: Any, auto_class: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "written_by": {
            "fa_transformers": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "auto_class": auto_class,
        "weights": digest_weights(model),
    }
    if isinstance(processor, PreTrainedTokenizerBase):
        content["processor_class"] = "AutoTokenizer"
        # One text alone needs no padding, which a model that was trained on packed documents may have no token for.
        content["texts"] = SELF_TEST_TEXTS if processor.pad_token is not None else SELF_TEST_TEXTS[:1]
        limits = [SELF_TEST_MAX_LENGTH, processor.model_max_length, model.config.max_position_embeddings]
        content["max_length"] = int(min(limits))
    else:
        content["processor_class"] = "AutoImageProcessor"
        shape = image_shape(model)
        content["image_png"] = _make_image_png(shape[-1])
        content["is_pair"] = len(shape) == 2
        # Objects are chosen by comparison, which rounding to less could change on another machine.
        content["is_exact"] = hasattr(type(model), "COMPARED_MODULES")
    inputs = self_check.prepare_inputs(processor, content)
    clone = copy.deepcopy(model).to("cpu").eval()
    is_exact = content.get("is_exact", False)
    outputs = self_check.compute_outputs(clone.double() if is_exact else clone, inputs, auto_class)
    exact = outputs if is_exact else self_check.compute_outputs(clone.double(), inputs, auto_class)
    content["inputs"] = {name: self_check.take_samples(tensor) for name, tensor in inputs.items()}
    content["outputs"] = {name: self_check.take_samples(tensor) for name, tensor in outputs.items()}
    tolerances = [
        _exact_tolerance(output) if is_exact else _rounding_tolerance(name, output, exact[name])
        for name, output in outputs.items()
        if output.is_floating_point()
    ]
    content["tolerance"] = max(tolerances)
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


def _exact_tolerance(output: Tensor) -> float:
    """The rounding of float64 that a certificate's checks allow, as another machine may have another one."""
    if not torch.isfinite(output).all():
        raise PublishError("the model's outputs are not finite; it cannot be published")
    return ROUNDINGS * torch.finfo(output.dtype).eps / 2 * output.abs().max().item()


def check_in_fresh_process(arguments: list[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run `self_check` as a program that cannot import this package, with caches of its own; return what it prints.

    It runs offline, without secrets in its environment, and with an empty home folder, where logins are stored.

    Raises:
        SelfTestError: the check failed, with its message, or the model does not load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **environment_without_secrets(os.environ),
            "HOME": scratch,
            "PYTHONUSERBASE": site.getuserbase(),
            "HF_HOME": scratch,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{scratch}/modules",
            "HF_HUB_CACHE": f"{scratch}/hub",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **(environment or {}),
        }
        command = [sys.executable, "-P", self_check.__file__, *arguments]
        finished = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.strip()] or ["no message"]
        own = [line for line in lines if line.startswith("error: ")]
        raise SelfTestError(own[-1].removeprefix("error: ") if own else "it does not load: " + " | ".join(lines[-3:]))
    return json.loads(finished.stdout.splitlines()[-1])
