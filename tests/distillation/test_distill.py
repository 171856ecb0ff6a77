"""Protects distillation as users run it: data in, a folder that transformers loads and a true receipt out."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from repository import SCRIPTS
from tiny_distillation import (
    WORDS,
    as_sentence_model,
    grouped,
    make_texts,
    paint,
    run_flags,
    run_options,
    run_values,
    write_texts,
)
from tiny_models import randomize, tiny_config
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from fa_transformers import DistillationResult, FABertModel, FAViTModel, ModelFacts, check_folder, distill


def test_a_run_leaves_a_loadable_model_nearer_to_its_teacher_with_a_receipt(tmp_path, stock):
    labelled = tmp_path / "labelled.csv"
    rows = [f"{WORDS[index % 3]} {WORDS[3 + index % 7]},{index % 3}\n" for index in range(21)]
    labelled.write_text("text,label\n" + "".join(rows), encoding="utf-8")
    options = run_options(tmp_path, stock, long_steps=2, long_length=80, probe_file=labelled)
    result = distill(**options, command="this command")
    receipt = result.receipt
    figures = receipt["similarity"]["same kinds"]
    # Random weights embed all texts nearly alike, so that the cosine says little here; the errors tell.
    assert figures["after"]["cosine"] > 0.99
    assert receipt["similarity"]["same kinds, 65 to 80 tokens"]["after"]["num_samples"] == 12
    assert [stage["stage"] for stage in receipt["stages"]] == ["transfer", "end_to_end", "long"]
    assert all(stage["after"]["loss"] < stage["before"]["loss"] for stage in receipt["stages"][:2])
    assert receipt["tokens"] == sum(stage["train_tokens"] for stage in receipt["stages"]) > 0
    assert json.loads((tmp_path / "out" / "recovery.json").read_text()) == json.loads(json.dumps(receipt))
    assert receipt["pooling"] == "mean" and receipt["command"] == "this command"
    downstream = receipt["downstream"]
    assert downstream["num_pieces"] == 21 and downstream["majority"] == pytest.approx(1 / 3)
    assert all(downstream[name] > 0.6 for name in ("teacher", "before", "after"))
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.config.local_window == 2 and loaded.dtype == torch.float32  # the stock weights were bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length > 10**20  # positions are periodic
    assert result.processor.model_max_length == 80
    assert "recovery.json" in json.loads((tmp_path / "out" / "self_test.json").read_text())["files"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{figures['after']['cosine']:.4g}" in card and "before recovery" in card and "this command" in card
    assert " ".join(f"{error:.3f}" for error in receipt["stages"][0]["after"]["layer_errors"]) in card
    assert "compared with its teacher on texts of up to 80 tokens" in card
    assert "labelled.csv" in card and f"{downstream['after']:.4g}" in card
    AcceleratorState._reset_state(reset_partial_state=True)
    again = distill(**run_options(tmp_path, tmp_path / "out", "again", teacher_name_or_path=str(stock)))
    assert again.similarity["same kinds"]["before"]["cosine"] == pytest.approx(figures["after"]["cosine"])


def texts_options(tmp_path, stock, **changes) -> dict:
    """The arguments of `distill` beside rows: no file is named."""
    values = run_values(tmp_path, stock, **changes)
    return grouped({name: value for name, value in values.items() if not name.endswith("_file")})


def test_texts_given_as_a_list_give_every_field_of_the_result(tmp_path, stock):
    result = distill(make_texts(200), **texts_options(tmp_path, stock, output_dir=tmp_path / "out"))
    assert isinstance(result, DistillationResult)
    assert type(result.model) is FABertModel and result.model.config.recovery == "distilled"
    assert isinstance(result.processor, PreTrainedTokenizerBase)
    assert result.output_dir == tmp_path / "out"
    assert result.downstream is None  # there is text of one's own, and nothing labelled
    figures = result.similarity["same kinds"]
    assert figures["after"].keys() == figures["before"].keys() == {"cosine", "cosine_p5", "correlation", "num_samples"}
    assert [stage["stage"] for stage in result.stages] == ["transfer", "end_to_end"]
    assert all(stage["steps"] == 6 and stage["after"]["loss"] < stage["before"]["loss"] for stage in result.stages)
    assert len(result.stages[0]["after"]["layer_errors"]) == result.model.config.num_hidden_layers
    assert [stage["mixer_learning_rate"] for stage in result.stages] == [1e-2, 5e-4]
    assert [stage["learning_rate"] for stage in result.stages] == [5e-5, 5e-5]
    receipt = result.receipt
    assert receipt["similarity"] == result.similarity and receipt["stages"] == result.stages
    assert receipt["downstream"] is None and receipt["output_dir"] == "out"
    assert receipt["teacher"] == "stock" and receipt["parameters"] == result.model.num_parameters()
    assert receipt["command"].startswith(
        "fa_transformers.distill(rows, task='text', recipe='quick', model=ModelOptions("
    )
    assert json.loads((result.output_dir / "recovery.json").read_text()) == json.loads(json.dumps(receipt))
    ids = torch.randint(5, 15, (2, 20))
    with torch.no_grad():
        states = [
            model.eval()(ids).last_hidden_state for model in (result.model, AutoModel.from_pretrained(tmp_path / "out"))
        ]
    torch.testing.assert_close(*states, rtol=0.0, atol=0.0)
    facts = ModelFacts.load(result.output_dir / "model_facts.json")
    assert facts.data[0].name == "rows given in Python" and facts.base_model == "local/stock"
    assert check_folder(result.output_dir)["source"] == str(result.output_dir)


def test_the_same_texts_of_a_file_and_of_python_train_the_same_weights(tmp_path, stock):
    options = run_values(tmp_path, stock, end_to_end_steps=0)
    of_file = distill(**grouped(options | {"output_dir": tmp_path / "file"}))
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"text": make_texts(num)})
            for name, num in (("train", 60), ("validation", 12))
        }
    )
    of_python = distill(rows, **texts_options(tmp_path, stock, end_to_end_steps=0, output_dir=tmp_path / "python"))
    assert of_python.similarity == of_file.similarity
    weights = of_file.model.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in of_python.model.state_dict().items())


def test_images_are_distilled_and_probed_to_the_end(tmp_path):
    stock = tmp_path / "stock"
    randomize(ViTModel(tiny_config(ViTConfig, image_size=16, patch_size=4))).save_pretrained(stock)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(stock)
    for level, place in ((50, "photos/train/a"), (90, "photos/val/a"), (60, "probe/x"), (200, "probe/y")):
        paint(tmp_path / place, level, 12)
    values = run_values(
        tmp_path, stock, image_size=16, image_folder=tmp_path / "photos", probe_folder=tmp_path / "probe"
    )
    left_out = ("train_file", "validation_file", "max_length", "local_window")
    values |= dict(base_model="owner/stock", hub_model_id="owner/mine", license="mit", language="en")
    options = grouped({name: value for name, value in values.items() if name not in left_out})
    result = distill(task="images", **options)
    facts = ModelFacts.load(tmp_path / "out" / "model_facts.json")
    assert (facts.base_model, facts.repo_id, facts.license, facts.language) == (
        "owner/stock",
        "owner/mine",
        "mit",
        "en",
    )
    assert type(result.model) is FAViTModel and result.receipt["pooling"] == "cls"
    assert result.similarity["same kinds"]["after"]["num_samples"] == 12
    assert result.downstream["classes"] == ["x", "y"] and result.downstream["num_pieces"] == 24
    card = (tmp_path / "out" / "README.md").read_text()
    assert "compared with its teacher on images of 16 x 16 pixels" in card and "probe (probe)" in card


def test_a_sentence_model_with_its_encoder_in_a_subfolder_is_distilled_to_the_end(tmp_path, stock):
    old = tmp_path / "old"
    stock.rename(tmp_path / "encoder")
    old.mkdir()
    (tmp_path / "encoder").rename(old / "0_Transformer")
    as_sentence_model(old, pooling_mode_mean_tokens=True)
    modules = json.loads((old / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(modules))
    distill(**run_options(tmp_path, old, transfer_steps=0, end_to_end_steps=1))
    assert ModelFacts.load(tmp_path / "out" / "model_facts.json").base_model == "local/old"
    assert AutoModel.from_pretrained(tmp_path / "out").config.recovery == "distilled"


def test_a_tokenizer_without_a_length_gets_that_of_the_positions(tmp_path, stock):
    tokenizer = AutoTokenizer.from_pretrained(stock)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(stock)
    changes = dict(position_embedding_type="absolute", transfer_steps=0, end_to_end_steps=1)
    distill(**run_options(tmp_path, stock, **changes))
    longest = BertConfig.from_pretrained(stock).max_position_embeddings
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == longest
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=f"`long_length=4096` is above the student's {longest} positions"):
        distill(**run_options(tmp_path, stock, "long", **changes, long_length=4096))


def test_a_head_is_kept_through_distillation(tmp_path, stock):
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(stock)
    randomize(BertForSequenceClassification(config)).save_pretrained(stock)
    distill(**run_options(tmp_path, stock))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["architectures"] == ["FABertForSequenceClassification"]


@pytest.mark.slow
def test_two_processes_distil_a_model_with_a_head_through_all_stages(tmp_path, stock):
    randomize(BertForMaskedLM(BertConfig.from_pretrained(stock))).save_pretrained(stock)
    long = write_texts(tmp_path / "long.jsonl", 12, words=100)
    flags = run_flags(tmp_path, stock, "two", long_steps=3, long_length=96, train_file=long)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*launcher, SCRIPTS / "distill.py", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    receipt = json.loads((tmp_path / "two" / "recovery.json").read_text())
    assert [stage["steps"] for stage in receipt["stages"]] == [6, 6, 3]
    assert receipt["similarity"]["same kinds, 65 to 96 tokens"]["after"]["num_samples"] == 12
    assert json.loads((tmp_path / "two" / "config.json").read_text())["architectures"] == ["FABertForMaskedLM"]
    printed = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert printed == [receipt]  # by the main process alone
