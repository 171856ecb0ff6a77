"""The self-test that `publish` leaves in a model folder: one small fixed input and the outputs the model gave for it.

This file also runs as a program, in a process that cannot import our package, as a stranger's process cannot:

    python -P self_check.py FOLDER
    python -P self_check.py OWNER/NAME --revision COMMIT

It loads tokenizer or image processor and model with the Auto classes and `trust_remote_code=True`, compares what they
give with `self_test.json`, and prints one line of JSON, or "error: ..." with exit status 1. With `--certificate` it
then runs the checks of `model_checks.py`, which it reads by its path. So it must not import any other file of the
package.
"""

import argparse
import base64
import copy
import hashlib
import importlib.abc
import importlib.util
import io
import json
import math
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import transformers
from torch import Tensor

SELF_TEST_FILE = "self_test.json"
PACKAGE = "fa_transformers"
MAX_SAMPLES = 256
# Image files are decoded exactly; resizing may round differently in another version of Pillow by one level of 255,
# which normalisation multiplies by about 4.
PIXEL_TOLERANCE = 4 / 255
# Of the largest output. Rounding in bfloat16, eight times over, stays below; whatever is above compares nothing.
MAX_TOLERANCE = 0.5
PADDING_MARK = 32_000


class SelfTestError(ValueError):
    """A model folder is incomplete or altered, or gives other outputs than when it was published."""


def prepare_inputs(processor: Any, self_test: dict[str, Any]) -> dict[str, Tensor]:
    """Make model inputs of the self-test's texts or image by the folder's own tokenizer or image processor.

    Where an example is a pair, its second image is the image upside down.
    """
    if "texts" in self_test:
        return dict(
            processor(
                self_test["texts"],
                padding=len(self_test["texts"]) > 1,
                truncation=True,
                max_length=self_test["max_length"],
                return_tensors="pt",
            )
        )
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(self_test["image_png"])))
    if self_test.get("is_pair"):
        return dict(processor((image, image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)), return_tensors="pt"))
    return dict(processor(images=image, return_tensors="pt"))


@torch.no_grad()
def compute_outputs(
    model: transformers.PreTrainedModel, inputs: dict[str, Tensor], auto_class: str
) -> dict[str, Tensor]:
    """Return every output tensor of `model`, by name. For multiple choice the texts are the choices of one sample."""
    if auto_class == "AutoModelForMultipleChoice":
        inputs = {name: tensor.unsqueeze(0) for name, tensor in inputs.items()}
    inputs = {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    outputs = model(**inputs, return_dict=True)
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def take_samples(tensor: Tensor) -> dict[str, Any]:
    """Return the shape and at most 256 evenly spaced values of `tensor`, as JSON keeps them exactly."""
    step = math.ceil(tensor.numel() / MAX_SAMPLES)
    values = tensor.flatten()[::step]
    return {"shape": list(tensor.shape), "values": (values.double() if values.is_floating_point() else values).tolist()}


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    # As `files.sha256_of`, which a program that must run without our package can't import.
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_inside(folder: Path, name: Any, where: str) -> Path:
    """Return the path of what a file's entry names inside `folder`: a folder's own name for it, with "/" between parts.

    Args:
        where: the file and the entry, which begin the message.

    Raises:
        ValueError: the name is no text, is absolute, has "..", a drive, a backslash or ".git" in it, or leads out of
            the folder by a link. Links of the Hub's cache are no such links: they lead to its store of contents.
    """
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"{where} is {name!r}; it must name something inside {folder}")
    parts = PurePosixPath(name).parts
    is_plain = not PurePosixPath(name).is_absolute() and not PureWindowsPath(name).drive and "\\" not in name
    if not is_plain or ".." in parts or ".git" in (part.lower() for part in parts):
        raise ValueError(f"{where} is {name!r}, which is not a plain path inside {folder}")
    root = folder.resolve()
    roots = [root, *([folder.absolute().parents[1] / "blobs"] if folder.absolute().parent.name == "snapshots" else [])]
    path = folder / name
    if not any(path.resolve().is_relative_to(inner.resolve()) for inner in roots):
        raise ValueError(f"{where} is {name!r}, a link that leads out of {folder}; put a copy in its place")
    return path


def read_self_test(folder: Path) -> dict[str, Any]:
    """Read a folder's self-test and check that the files it lists are there and unaltered.

    Raises:
        SelfTestError: the folder was not written by `publish`, a file is missing or was altered, the test lists one
            outside of the folder, or it would accept any outputs.
    """
    if not folder.is_dir():
        raise SelfTestError(f"{folder} is not a folder")
    if not (folder / SELF_TEST_FILE).is_file():
        raise SelfTestError(
            f"{folder} has no {SELF_TEST_FILE}, so it was not written by {PACKAGE}.publish; publish the model first"
        )
    try:
        self_test = json.loads((folder / SELF_TEST_FILE).read_text(encoding="utf-8"))
        _check_content(self_test)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SelfTestError(f"{folder / SELF_TEST_FILE} is damaged ({error!r}); publish the model again") from error
    for name, expected in self_test["files"].items():
        try:
            path = path_inside(folder, name, f"{folder / SELF_TEST_FILE}: a name of 'files'")
        except ValueError as error:
            raise SelfTestError(str(error)) from error
        if not path.is_file():
            raise SelfTestError(f"{folder} has lost {name}; publish the model again")
        if compute_sha256(path) != expected:
            raise SelfTestError(f"{path} was altered after the model was published; publish the model again")
    return self_test


def _check_content(self_test: Any) -> None:
    """Check the parts that decide how much the test is worth: files, tolerance, and the classes that load.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: a part is missing, or is none that `publish` writes.
    """
    if not isinstance(self_test["files"], dict) or not self_test["files"]:
        raise ValueError(f"'files' must name the folder's files, got {self_test['files']!r:.80}")
    for name in ("auto_class", "processor_class"):
        if not self_test[name].startswith("Auto"):
            raise ValueError(f"{name!r} must be an Auto class, got {self_test[name]!r}")
    tolerance = self_test["tolerance"]
    largest = largest_output(self_test["outputs"])
    if isinstance(tolerance, bool) or not 0 <= tolerance <= MAX_TOLERANCE * largest:
        raise ValueError(
            f"'tolerance' is {tolerance!r}, must be between 0 and {MAX_TOLERANCE} of the largest output, {largest:.3g}"
        )


def largest_output(outputs: dict[str, Any]) -> float:
    """Return the largest absolute value among the stored samples, those left out that mark padding: they are set to
    the lowest value of their type, float16's or below."""
    values = (abs(value) for output in outputs.values() for value in output["values"])
    return max((value for value in values if value <= PADDING_MARK), default=0.0)


def compare_samples(what: str, name: str, found: Tensor, expected: dict[str, Any], tolerance: float) -> float:
    """Return the largest difference between `found` and the stored samples.

    Raises:
        SelfTestError: the shape differs, or a value differs by more than `tolerance` or is NaN.
    """
    samples = take_samples(found)
    if samples["shape"] != expected["shape"]:
        raise SelfTestError(f"{what}: {name} has shape {samples['shape']}, was {expected['shape']} when published")
    difference = max(
        (abs(a - b) for a, b in zip(samples["values"], expected["values"], strict=True)), default=0.0, key=_nan_last
    )
    if not difference <= tolerance:
        raise SelfTestError(
            f"{what}: {name} differs by {difference:.3g} from when the model was published (at most {tolerance:.3g})"
        )
    return difference


def _nan_last(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def load(auto_class: str, source: str, revision: str | None, **options: Any) -> Any:
    return getattr(transformers, auto_class).from_pretrained(
        source, revision=revision or "main", trust_remote_code=True, **options
    )


def check(source: str, revision: str | None, with_certificate: bool = False) -> dict[str, Any]:
    """Check a folder, or a repository at a commit, against its self-test, and then, if asked, its weights.

    Raises:
        SelfTestError: as in `read_self_test` and `compare_samples`, or a weight is missing from the file.
    """
    folder = Path(source)
    if revision is not None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, revision=revision))
    self_test = read_self_test(folder)
    processor = load(self_test["processor_class"], source, revision)
    inputs = prepare_inputs(processor, self_test)
    if set(inputs) != set(self_test["inputs"]):
        raise SelfTestError(f"the processor gives {sorted(inputs)}, gave {sorted(self_test['inputs'])} when published")
    for name, tensor in inputs.items():
        tolerance = PIXEL_TOLERANCE if tensor.is_floating_point() else 0
        compare_samples("the tokenizer or image processor changed", name, tensor, self_test["inputs"][name], tolerance)
    model, loading = load(self_test["auto_class"], source, revision, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise SelfTestError(f"{source} has {kind.replace('_', ' ')} in its weights: {sorted(loading[kind])[:5]}")
    exact = copy.deepcopy(model).double() if self_test.get("is_exact") else model
    outputs = compute_outputs(exact.eval(), inputs, self_test["auto_class"])
    if set(outputs) != set(self_test["outputs"]):
        raise SelfTestError(f"the model gives {sorted(outputs)}, gave {sorted(self_test['outputs'])} when published")
    difference = max(
        compare_samples("the model changed", name, tensor, self_test["outputs"][name], self_test["tolerance"])
        for name, tensor in outputs.items()
    )
    result = {
        "source": source,
        "model_class": type(model).__name__,
        "max_difference": difference,
        "tolerance": self_test["tolerance"],
        "files": len(self_test["files"]),
    }
    if with_certificate:
        checks = _read_model_checks()
        saved = checks.check_saved(model, self_test.get("weights"))
        result["certificate"] = [saved, *checks.check_model(model, processor, self_test["auto_class"])]
    return result


def _read_model_checks() -> Any:
    """The module beside this file, which a program that can't import the package reads by its path."""
    spec = importlib.util.spec_from_file_location("model_checks", Path(__file__).with_name("model_checks.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _WithoutPackage(importlib.abc.MetaPathFinder):
    """Makes an installed copy of our package unimportable, so that only the folder's own code can be used."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the self-test)", name=name)
        return None


def _refuse_network(event: str, _arguments: tuple) -> None:
    """An audit hook: the folder's code has no business on the network."""
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        raise PermissionError("the self-test runs offline, and the folder's code asked for the network")


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a published model in this process and compare its outputs.")
    parser.add_argument("source", help="folder, or OWNER/NAME with --revision")
    parser.add_argument("--revision", help="commit, branch or tag of a Hub repository; without it, source is a folder")
    parser.add_argument("--certificate", action="store_true", help="run the checks of a certificate too")
    options = parser.parse_args()
    sys.meta_path.insert(0, _WithoutPackage())
    sys.addaudithook(_refuse_network)
    transformers.logging.set_verbosity_error()
    try:
        result = check(options.source, options.revision, options.certificate)
    except SelfTestError as error:
        parser.exit(1, f"error: {error}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
