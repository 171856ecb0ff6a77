"""Protects the app as a Space: its files are complete, it reaches the Hub whole, and what arrived starts by itself."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from app_server import AppServer
from hub_server import TOKEN, HubServer
from packaging.requirements import Requirement
from repository import ROOT, SCRIPTS
from test_card import make_facts
from tiny_predictors import write_text_model
from transformers import AutoTokenizer

from fa_transformers import FABertForSequenceClassification, publish
from fa_transformers.app import space
from fa_transformers.app.space import package_files, space_files


@pytest.fixture
def folder(tmp_path):
    start = write_text_model(tmp_path / "start")
    model = FABertForSequenceClassification.from_pretrained(start)
    return publish(model, AutoTokenizer.from_pretrained(start), make_facts(), tmp_path / "letters")


@pytest.fixture
def files(folder, monkeypatch):
    monkeypatch.setattr(space, "check_folder", lambda _: None)
    return space_files(folder)


def test_a_space_has_front_matter_requirements_a_start_the_package_and_the_model(files, folder):
    front, card = re.fullmatch(r"---\n(.*?)\n---\n(.*)", files["README.md"].decode(), re.S).groups()
    facts = yaml.safe_load(front)
    assert facts["sdk"] == "gradio" and facts["app_file"] == "app.py" and facts["license"] == make_facts().license
    assert Requirement(f"gradio=={facts['sdk_version']}") and len(facts["short_description"]) <= 60
    assert "$" not in front and f"gradio=={facts['sdk_version']}" in card
    compile(files["app.py"], "app.py", "exec")
    assert {f"model/{path.name}" for path in folder.iterdir()} == {name for name in files if name.startswith("model/")}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fa_transformers").rglob("*") if path.is_file()}
    code = {name for name in code if "__pycache__" not in name}
    assert {name for name in files if name.startswith("fa_transformers/")} == code
    assert len(package_files()) == len(code)


def test_a_spaces_requirements_are_those_of_the_package(files):
    lines = files["requirements.txt"].decode().splitlines()
    wanted = {Requirement(line).name: Requirement(line) for line in lines if line and line[0] not in "#-"}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    stated = {Requirement(line).name: Requirement(line) for line in re.findall(r'"([\w-]+[<>=]=[^"]+)"', setup)}
    assert {name: str(one) for name, one in wanted.items()} == {name: str(stated[name]) for name in wanted}
    installed = re.search(r"install_requires=\[(.*?)\]", setup, re.S)[1]
    assert {Requirement(line).name for line in re.findall(r'"(.+?)"', installed)} <= set(wanted)


def test_a_model_that_the_app_has_no_tab_for_is_refused(folder, monkeypatch):
    monkeypatch.setattr(space, "check_folder", lambda _: None)
    monkeypatch.setattr(space, "read_card_facts", lambda _: make_facts(pipeline_tag="fill-mask"))
    with pytest.raises(ValueError, match="for classifiers of texts and images, and this is fill-mask"):
        space_files(folder)


def push(hub: HubServer, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **hub.environment, "HF_TOKEN": TOKEN, "HF_HOME": str(folder.parent / "home")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPTS / "push_to_hub.py"), str(folder), *arguments]
    return subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.certified
def test_a_space_is_pushed_checked_and_what_arrived_starts_without_this_package(folder, tmp_path):
    with HubServer() as hub:
        hub.corrupt_downloads = True
        failed = push(hub, folder, "tester/letters-app", "--space", "--private")
        assert failed.returncode == 2 and "loading the upload back failed for tester/letters-app" in failed.stderr
        hub.corrupt_downloads = False
        done = push(hub, folder, "tester/letters-app", "--space", "--private")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert list(hub.repositories) == ["spaces/tester/letters-app"], "no model repository was made"
        repository = hub.repositories["spaces/tester/letters-app"]
        assert repository.private and result["commit"] == repository.branches["main"].oid
        arrived = dict(repository.branches["main"].files)
        assert len(arrived) == result["files"] + 1, "the Hub's own file is there, too"
        stale = {**arrived, "fa_transformers/stale.py": b"", "model/old.bin": b""}
        repository.commit("main", "by an older version", stale, repository.branches["main"].lfs_paths)
        assert push(hub, folder, "tester/letters-app", "--space").returncode == 0
        assert repository.branches["main"].files == arrived
        repository.commit("main", "another app", {"app.py": b"", "notes.txt": b""}, set())
        refused = push(hub, folder, "tester/letters-app", "--space")
        assert refused.returncode == 2 and "it is another Space, whose files would be deleted" in refused.stderr
        assert set(repository.branches["main"].files) == {"app.py", "notes.txt"}
        assert "--revision is for models" in push(hub, folder, "tester/x", "--space", "--revision", "v1").stderr
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed, which the Space's own start needs")
    for name, content in arrived.items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    server = AppServer(tmp_path / "space" / "app.py", [], tmp_path / "space", {"PYTHONPATH": os.pathsep.join(others)})
    server.listen_by_variables()
    with server, urllib.request.urlopen(server.address) as answer:
        assert "What does an answer rest on?" in answer.read().decode()
        assert not server.outside
