"""Protects fine-tuning by LoRA: a merged model and an adapter of it that loads, on a base that computes the same; exact
resume; labels of another kind than the checkpoint's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from repository import ROOT, SCRIPTS
from safetensors.torch import load_file
from tiny_models import make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import fa_transformers as fa
from fa_transformers.checks import check_run
from fa_transformers.options import resolve
from fa_transformers.training import finetune, progress, recovery
from fa_transformers.training.adapters import add_adapter, remove_adapter
from fa_transformers.training.recipes import recipe_of

peft = pytest.importorskip("peft", reason="peft is not installed")
WORDS = ["red", "blue", "green", "one", "two", "three"]
TEXTS = [f"{WORDS[index % 3]} {WORDS[3 + index % 2]} {WORDS[3 + index % 3]}" for index in range(30)]
COLOURS = {"text": TEXTS, "label": [text.split()[0] for text in TEXTS]}
LENGTHS = {"text": TEXTS, "label": [len(text) / 7 for text in TEXTS]}
# Merging adds the low-rank product to each weight, one rounding of 2^-24 relative; weights and hidden states are of
# order one and 32 terms at most meet in a sum, in four projections of one layer.
MERGED = {"rtol": 0.0, "atol": 2.0**-16}
HEAD = {"classifier.weight", "classifier.bias"}


@pytest.fixture(autouse=True)
def fresh_accelerate(tmp_path, monkeypatch):
    """Accelerate keeps its settings for the whole process, and each call must choose its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a stock checkpoint in `stock`, and in `mine` what a LoRA run of four steps left of it."""
    home = tmp_path_factory.mktemp("lora")
    tokenizer = make_tokenizer(WORDS, max_length=16)
    tokenizer.save_pretrained(home / "stock")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    stock = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes))
    stock.save_pretrained(home / "stock")
    with pytest.MonkeyPatch.context() as patch:
        AcceleratorState._reset_state(reset_partial_state=True)
        patch.setattr(datasets.config, "HF_CACHE_HOME", str(home / "cache"))
        patch.setattr("fa_transformers.hub.publish.measure", lambda *_: None)
        patch.chdir(home)
        train("stock", "mine")
    return home


def train(source: str, output_dir: str, rows: dict = COLOURS, **loop) -> fa.FinetuneResult:
    options = {"use_cpu": True, "num_threads": 1, "report_to": "none", "max_steps": 4, "save_steps": 2, "eval_steps": 4}
    return fa.finetune(
        rows,
        model=fa.ModelOptions(
            model_name_or_path=source, max_length=16, classifier_pooling="mean", local_window=1, lora_rank=2
        ),
        loop=fa.LoopOptions(**options | {"learning_rate": 1e-2, "output_dir": output_dir} | loop),
    )


@torch.no_grad()
def answers(model: torch.nn.Module) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained("stock")(["red one two", "blue two"], padding=True, return_tensors="pt")
    return model.eval()(**inputs).logits


def base_of(adapter: str) -> str:
    return json.loads(Path(adapter, "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_run_ends_with_a_merged_model_and_an_adapter_that_loads(home, monkeypatch):
    monkeypatch.chdir(home)
    merged = AutoModelForSequenceClassification.from_pretrained("mine")
    adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained("mine/adapter")
    assert base_of("mine/adapter") == "mine/base"
    assert adapted.config.id2label == merged.config.id2label == {0: "blue", 1: "green", 2: "red"}
    torch.testing.assert_close(answers(adapted), answers(merged), **MERGED)
    # The base has the checkpoint's weights and says that they were not trained since.
    base = AutoModelForSequenceClassification.from_pretrained("mine/base")
    assert base.config.recovery == "pending" and merged.config.recovery == "fine_tuned"
    stock = load_file("stock/model.safetensors")
    assert all(
        torch.equal(tensor, stock[name]) for name, tensor in base.state_dict().items() if name in stock.keys() - HEAD
    )
    assert not torch.allclose(answers(base), answers(merged), **MERGED)
    card = Path("mine/README.md").read_text()
    assert "by LoRA of rank 2 (alpha 4)" in card


def test_only_projections_head_and_mixers_are_trained(home):
    before, after = load_file(home / "mine/base/model.safetensors"), load_file(home / "mine/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = "bert.encoder.layer.0.attention."
    projections = {f"{attention}self.{name}.weight" for name in ("query", "key", "value")}
    mixers = {name for name in before if ".mixer." in name}
    assert mixers and changed == projections | {f"{attention}output.dense.weight"} | HEAD | mixers


def test_a_plan_counts_what_trains_and_times_the_transfer_before(home, monkeypatch):
    monkeypatch.chdir(home)
    estimates = []
    monkeypatch.setattr(progress, "describe_peak", lambda estimate, *_, **__: estimates.append(estimate) or "")
    kept, mib = [], []

    def watched(*arguments):
        found = recovery.time_transfer(*arguments)
        kept.append(list(arguments[-1]._models))
        mib.append(found[1])
        return found

    monkeypatch.setattr(finetune, "time_transfer", watched)
    result = train("stock", "planned", dry_run=True, recovery_steps=2000)
    assert kept == [[]], "the teacher is let go"
    plan, adapter = result.plan, load_file("mine/adapter/adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in adapter.values())
    assert plan.memory.startswith("; activations are counted as if all parameters trained, which is an upper end; the")
    assert plan.num_trained == trained < plan.num_parameters and f"{trained:,} of them train" in str(plan)
    assert [(estimate.gradients, estimate.optimizer) for estimate in estimates] == [(4 * trained, 8 * trained)]
    base, model = (Path(f"mine/{name}model.safetensors").stat().st_size / 2**20 for name in ("base/", ""))
    assert plan.written_mib[0] == pytest.approx(base + model, rel=0.5) and plan.written_mib[1] < 6 * 2 * model
    weights = load_file("mine/base/model.safetensors")
    sizes = {name: tensor.numel() * (3 if ".mixer." in name else 1) for name, tensor in weights.items()}
    assert mib == [pytest.approx(4 * sum(size for name, size in sizes.items() if name.startswith("bert.")) / 2**20)]
    assert plan.written_mib[1] == pytest.approx(4 * 4 * (plan.num_parameters + 2 * trained) / 2**20 + mib[0])
    assert plan.transfer_seconds > 2 * plan.seconds and "for the attention transfer before" in str(plan)
    assert not Path("planned").exists() and result.model.name_or_path == ""
    assert result.model.state_dict().keys() == load_file("mine/base/model.safetensors").keys()


def test_a_resumed_run_ends_with_the_same_weights(home, monkeypatch):
    monkeypatch.chdir(home)
    Path("again").mkdir()
    shutil.copytree("mine/checkpoint-2", "again/checkpoint-2")
    train("stock", "again", resume_from_checkpoint="last")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "base/model.safetensors"):
        first, second = load_file(Path("mine", name)), load_file(Path("again", name))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


def test_a_classifier_is_taken_on_to_a_number(home, monkeypatch, caplog):
    monkeypatch.chdir(home)
    result = train("mine", "number", LENGTHS)
    config = result.model.config
    assert (config.num_labels, config.problem_type, result.model.name_or_path) == (1, "regression", "number")
    assert caplog.text.count("is not carried over and starts fresh") == 1
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained("number/adapter")
    assert base_of("number/adapter") == "number/base" and answers(loaded).shape == (2, 1)
    torch.testing.assert_close(answers(loaded), answers(result.model), **MERGED)


@pytest.mark.slow
def test_two_processes_leave_an_adapter_and_the_model_that_it_makes(home, monkeypatch):
    monkeypatch.chdir(home)
    rows = "".join(f"{text},{label}\n" for text, label in zip(TEXTS, COLOURS["label"], strict=True))
    Path("train.csv").write_text(f"text,label\n{rows}")
    flags = "--train_file train.csv --model_name_or_path mine --max_length 16 --lora_rank 4 --max_steps 3 --use_cpu"
    flags += " --report_to none --num_threads 1 --per_device_train_batch_size 4 --output_dir shared"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, str(SCRIPTS / "finetune.py"), *flags.split()]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "2 processes" in ran.stdout and base_of("shared/adapter") == "mine"
    adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained("shared/adapter")
    merged = AutoModelForSequenceClassification.from_pretrained("shared")
    torch.testing.assert_close(answers(adapted), answers(merged), **MERGED)
    assert not torch.equal(answers(merged), answers(AutoModelForSequenceClassification.from_pretrained("mine")))


def test_an_adapter_names_the_folder_that_holds_its_base(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    model = fa.load_factorized("mine", "AutoModelForSequenceClassification")
    before = answers(model)
    adapted = add_adapter(model, None, fa.ModelOptions(lora_rank=2), tmp_path, saves_base=True)
    adapted.save_pretrained(tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == "mine" and not (tmp_path / "base").exists()
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(answers(loaded), before)  # the updates start at zero


def test_an_earlier_adapter_goes_with_the_base_that_was_saved_for_it(tmp_path):
    def leave(base: Path) -> None:
        for name in ("adapter", "base"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))

    leave(tmp_path / "base")
    remove_adapter(tmp_path, tmp_path / "base")  # the checkpoint that the new run starts from
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    leave(tmp_path / "base")
    remove_adapter(tmp_path, None)
    assert not any(tmp_path.iterdir())
    leave(tmp_path / "other")
    remove_adapter(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    (tmp_path / "adapter").mkdir()
    remove_adapter(tmp_path, None)  # a folder of the user's own
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": -1}, "--lora_rank must not be negative"),
        ({"lora_rank": 2, "lora_alpha": 0}, "--lora_alpha must be above 0"),
        ({"lora_alpha": 4}, "--lora_alpha scales the updates of --lora_rank, which is 0"),
        ({"lora_rank": 2, "model_name_or_path": "none"}, "--lora_rank adapts a checkpoint"),
    ],
)
def test_options_that_no_run_can_use_are_named(fields, message):
    recipe = recipe_of("image-classification", is_demo=False)
    given = (fa.DataOptions(), fa.ModelOptions(**fields), fa.LoopOptions(), fa.CardOptions())
    with pytest.raises(ValueError, match=message):
        check_run(*(resolve(options, recipe) for options in given), is_text=False)


def test_missing_peft_and_sharded_weights_are_named_before_data_is_read(monkeypatch):
    options = {"rows": {"text": []}, "model": fa.ModelOptions(lora_rank=2)}
    sharding = SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=1)
    monkeypatch.setattr(sys.modules["fa_transformers.training.finetune"], "make_accelerator", lambda _: sharding)
    with pytest.raises(ValueError, match="`lora_rank` needs whole weights"):
        fa.finetune(**options)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="--lora_rank needs peft"):
        fa.finetune(**options)
