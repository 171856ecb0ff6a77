"""Protects fine-tuning from Python: lists in, predictions out, results that are what the files say."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_models import make_tokenizer
from transformers import BertConfig, BertForSequenceClassification, pipeline

import fa_transformers as fa
from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.training.calls import describe_call, fill_options
from fa_transformers.training.plan import mean_size
from fa_transformers.training.recipes import count_short_epochs

WORDS = ["red", "blue", "green", "one", "two", "three"]


@pytest.fixture(autouse=True)
def fresh_accelerate(tmp_path, monkeypatch):
    """Accelerate keeps its settings for the whole process, and each call must choose its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A stock BERT checkpoint with random weights and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = make_tokenizer(WORDS, max_length=16)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def options(tiny_bert: Path, **loop) -> dict:
    return {
        "model": fa.ModelOptions(model_name_or_path=str(tiny_bert), max_length=16, classifier_pooling="mean"),
        "loop": fa.LoopOptions(
            **{"use_cpu": True, "num_threads": 1, "report_to": "none", "max_steps": 2, "output_dir": "mine"} | loop
        ),
    }


def columns(num: int) -> dict[str, list]:
    """Documents whose label is their first word, the only one that names a colour."""
    texts = [f"{WORDS[index % 3]} {WORDS[3 + index % 2]} {WORDS[3 + index % 3]}" for index in range(num)]
    return {"text": texts, "label": [text.split()[0] for text in texts]}


def test_a_list_of_texts_and_labels_becomes_a_prediction(tiny_bert):
    result = fa.finetune(columns(60), **options(tiny_bert, max_steps=100, eval_steps=100, learning_rate=5e-3))
    classify = pipeline("text-classification", str(result.output_dir), trust_remote_code=True)
    assert [row["label"] for row in classify(["red one two", "blue two one"])] == ["red", "blue"]


def test_the_result_is_what_the_folder_says(tiny_bert):
    lengths = options(tiny_bert, report_lengths=(3, 4, 16))
    result = fa.finetune(columns(30), **lengths, card=fa.CardOptions(data_name="Colours", license="mit"))
    written = json.loads((result.output_dir / "all_results.json").read_text())
    assert result.summary == written and result.output_dir == Path("mine")
    assert written["model"]["accuracy"] == result.scores["accuracy"] and written["data"] == "Colours"
    assert result.baselines["majority class"]["accuracy"] == written["baselines"]["majority class"]["accuracy"]
    assert isinstance(result.model, fa.FABertForSequenceClassification) and result.processor.model_max_length == 16
    assert result.pushed is None
    by_length = written["by_length"]
    assert [(row["tokens"], row["longer"] == row["examples"]) for row in by_length] == [
        (3, True),
        (4, True),
        (16, False),
    ]
    assert by_length[2]["accuracy"] == pytest.approx(written["model"]["accuracy"])
    assert by_length[2]["macro_f1"] == pytest.approx(written["model"]["macro_f1"])
    assert "license: mit" in (result.output_dir / "README.md").read_text()


@pytest.mark.parametrize("kind", ["mapping", "dataset", "splits"])
def test_rows_may_be_columns_a_dataset_or_splits(kind, tiny_bert):
    part = datasets.Dataset.from_dict(columns(30))
    rows = {"mapping": columns(30), "dataset": part, "splits": datasets.DatasetDict(train=part, test=part)}[kind]
    result = fa.finetune(rows, **options(tiny_bert))
    assert result.summary["split"] == "test" and result.summary["num_examples"] == (30 if kind == "splits" else 3)


def test_a_dry_run_tells_the_plan_and_trains_and_writes_nothing(tiny_bert):
    rows = columns(29)
    rows["text"].append(" ".join(["red"] * 40))
    rows["label"].append("red")
    asked = options(tiny_bert, dry_run=True, max_steps=-1, num_train_epochs=2.0, per_device_train_batch_size=5)
    result = fa.finetune(rows, **asked)
    plan, told = result.plan, str(result.plan)
    assert not Path("mine").exists() and (result.scores, result.summary) == ({}, {})
    stock = load_file(tiny_bert / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(result.model.state_dict()[name], stock[name])
    assert plan.num_parameters == result.model.num_parameters() and plan.steps == 2 * -(-24 // 5)
    assert (plan.lengths[0.0], plan.lengths[0.5], plan.lengths[1.0]) == (5, 5, 16)
    assert (
        plan.share_at_limit == 1 / 24
        and plan.largest_batch[1] == 16
        and "estimated peak memory of each process" in plan.memory
    )
    assert 0 < plan.seconds < 600 and plan.timed_batches == 3 and plan.refusal is None
    assert "red" in told and "(rows)  24" in told and "4.2% fill the limit" in told
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("of mine")
    assert "--overwrite_output_dir" in fa.finetune(rows, **asked).plan.refusal
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("short_epochs", [0, 1, 2])
def test_the_time_of_a_plan_is_that_of_all_padded_tokens(short_epochs, packing):
    lengths = np.random.default_rng(0).integers(3, 60, 203)
    sampler = LengthGroupedBatchSampler(
        lengths, 16, max_tokens=400, packing=packing, short_epochs=short_epochs, short_length=5
    )
    num_batches = sum(len(sampler.batches(epoch)) for epoch in range(3))
    sizes = []
    for epoch in range(3):
        short = np.minimum(lengths, 5) if epoch < short_epochs else lengths
        for batch in sampler.batches(epoch):
            sizes.append(short[batch].sum() if packing else len(batch) * short[batch].max())
    # Batches differ a little from one epoch to the next, as neighbours in length are drawn.
    assert num_batches * mean_size(sampler, num_batches) == pytest.approx(sum(sizes), rel=0.02)


def test_options_that_no_run_can_use_are_named(tiny_bert):
    with pytest.raises(ValueError, match="`learning_rate` must be above 0"):
        fa.finetune(columns(9), **options(tiny_bert, learning_rate=0))
    with pytest.raises(ValueError, match="`task` must be one of text-classification, image-classification"):
        fa.finetune(columns(9), task="translation")
    with pytest.raises(ValueError, match="`full_recipe=True` is of the built-in demo data; `rows`"):
        fa.finetune(columns(9), full_recipe=True)
    with pytest.raises(fa.DataError, match="label"):
        fa.finetune({"text": ["red"] * 9}, **options(tiny_bert))


def test_a_second_call_says_that_the_folder_is_used_and_goes_on_when_asked(tiny_bert):
    fa.finetune(columns(30), **options(tiny_bert))
    with pytest.raises(FileExistsError, match="`overwrite_output_dir=True`"):
        fa.finetune(columns(30), **options(tiny_bert))
    longer = fa.finetune(columns(30), **options(tiny_bert, max_steps=3, resume_from_checkpoint="last"))
    assert longer.summary["steps"] == 3


def test_a_call_is_described_by_what_was_given_and_without_the_token():
    given = dict(data=fa.DataOptions(), loop=fa.LoopOptions(seed=1), card=fa.CardOptions(hub_token="hf_secret"))
    line = describe_call("finetune", {"task": "text-classification"}, given, has_rows=True)
    assert line == "fa_transformers.finetune(rows, task='text-classification', loop=LoopOptions(seed=1))"


def test_a_described_call_without_rows_can_be_typed_again():
    given = {"data": fa.DataOptions(train_file="a.csv"), "loop": fa.LoopOptions(output_dir="mine")}
    line = describe_call("finetune", {}, given, has_rows=False)
    assert line == "fa_transformers.finetune(data=DataOptions(train_file='a.csv'), loop=LoopOptions(output_dir='mine'))"
    names = {name: getattr(fa, name) for name in ("DataOptions", "LoopOptions")}
    assert eval(line.replace("fa_transformers.finetune", "dict"), names) == given


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"data": {"text": ["red"]}}, TypeError, r"`data` must be DataOptions\(\.\.\.\), got dict. Rows are the first"),
        ({"model": "minilm"}, TypeError, "`model` must be ModelOptions"),
        ({"loop": fa.LoopOptions(max_steps="3")}, TypeError, "`max_steps` must be of type int, got '3', which is str"),
        ({"loop": fa.LoopOptions(use_cpu="no")}, TypeError, "`use_cpu=True` must be of type bool"),
        ({"loop": fa.LoopOptions(seed=True)}, TypeError, "`seed` must be of type int, got True"),
        (
            {"loop": fa.LoopOptions(lr_scheduler_type="lin")},
            ValueError,
            "`lr_scheduler_type` must be one of linear, .*'lin'",
        ),
    ],
)
@pytest.mark.parametrize("function", [fa.finetune, fa.distill])
def test_arguments_and_options_of_another_type_are_named(function, given, error, message):
    with pytest.raises(error, match=message):
        function(**given)


def test_numbers_of_numpy_and_whole_numbers_for_fractions_are_options_as_well():
    loop = fa.LoopOptions(max_steps=np.int64(3), learning_rate=1, weight_decay=np.float32(0.5), output_dir="mine")
    assert fill_options({"loop": loop}, {"loop": fa.LoopOptions}) == {"loop": loop}


def test_a_mistyped_checkpoint_does_not_cost_the_run_that_is_overwritten(tiny_bert):
    result = fa.finetune(columns(30), **options(tiny_bert))
    before = sorted(result.output_dir.rglob("*"))
    again = options(tiny_bert, overwrite_output_dir=True)
    with pytest.raises(FileNotFoundError, match="'no/such/folder' is no folder here"):
        fa.finetune(columns(30), **again | {"model": fa.ModelOptions(model_name_or_path="no/such/folder")})
    assert before and sorted(result.output_dir.rglob("*")) == before


def test_lengths_that_cannot_be_scored_are_refused_before_anything_is_read(tiny_bert):
    with pytest.raises(ValueError, match="`report_lengths` is for text, and needs lengths of at least 3 tokens"):
        fa.finetune(columns(30), **options(tiny_bert, report_lengths=(2, 8)))
    images, loop = {"image": [], "label": []}, fa.LoopOptions(report_lengths=(8,), output_dir="mine")
    with pytest.raises(ValueError, match="`report_lengths` is for text"):
        fa.finetune(images, task="image-classification", loop=loop)
    assert not Path("mine").exists()


def test_texts_of_a_stock_checkpoint_are_short_in_all_epochs_but_the_last_unless_steps_are_counted():
    assert [count_short_epochs(epochs, -1) for epochs in (0.5, 1.0, 2.2, 3.0)] == [0, 0, 2, 2]
    assert count_short_epochs(3.0, 200) == 0


def test_a_resumed_run_keeps_its_short_epochs(tiny_bert, capsys):
    """One of ours has none."""
    short = options(tiny_bert, max_steps=-1, num_train_epochs=2, short_length=4)
    result = fa.finetune(columns(30), **short)
    assert "Its training began with 1 epoch on the first 4." in capsys.readouterr().out
    more = options(tiny_bert, max_steps=-1, num_train_epochs=4, short_length=4, resume_from_checkpoint="last")
    assert fa.finetune(columns(30), **more).summary["epochs"] == 4
    capsys.readouterr()
    ours = options(result.output_dir, max_steps=-1, num_train_epochs=2, short_length=4, output_dir="again")
    fa.finetune(columns(30), **ours)
    assert "Its training began" not in capsys.readouterr().out


@pytest.mark.parametrize(("given", "expected"), [({}, (64, "periodic")), ({"local_window": 0}, (0, "periodic"))])
def test_a_stock_text_checkpoint_gets_a_window_and_periodic_positions_unless_they_are_given(tiny_bert, given, expected):
    """One of ours keeps the layers that it has."""
    loop = fa.LoopOptions(use_cpu=True, num_threads=1, report_to="none", dry_run=True, output_dir="mine")

    def layers(**model) -> tuple:
        config = fa.finetune(columns(30), model=fa.ModelOptions(max_length=16, **model), loop=loop).model.config
        return config.local_window, config.position_embedding_type

    assert layers(model_name_or_path=str(tiny_bert), **given) == expected
    stock = fa.load_factorized(str(tiny_bert), "AutoModelForSequenceClassification", num_labels=3)
    stock.save_pretrained("ours")
    shutil.copy(tiny_bert / "tokenizer.json", "ours")
    shutil.copy(tiny_bert / "tokenizer_config.json", "ours")
    assert layers(model_name_or_path="ours") == (0, "absolute")
