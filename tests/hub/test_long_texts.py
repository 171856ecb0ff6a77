"""Protects pipelines on texts of any length: a saved folder reads all of one, or cuts it where its table ends and says
so, without an argument.
"""

import json
import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_card import make_facts
from tiny_models import build, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline, tokenization_utils_base

from fa_transformers.hub.publish import publish
from fa_transformers.models import (
    FABertConfig,
    FABertForMaskedLM,
    FABertForSequenceClassification,
    FABertForTokenClassification,
    FABertModel,
    FABertTokenizerFast,
)
from fa_transformers.models.tokenization_fa_bert import STOCK_CLASS

WORDS = ["red", "green", "blue", "sea", "ship"]
LONG = "red sea ship green " * 30
ROWS = 24
TASKS = {
    "text-classification": ("AutoModelForSequenceClassification", FABertForSequenceClassification),
    "token-classification": ("AutoModelForTokenClassification", FABertForTokenClassification),
    "feature-extraction": ("AutoModel", FABertModel),
    "fill-mask": ("AutoModelForMaskedLM", FABertForMaskedLM),
}


@pytest.fixture
def said():
    """Every warning, of transformers and of the code in a folder."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    loggers = [logging.getLogger("transformers"), logging.getLogger()]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


def write(folder, task: str, kind: str):
    auto_class, model_class = TASKS[task]
    tokenizer = make_tokenizer(WORDS, max_length=ROWS)
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": ROWS, "position_embedding_type": kind}
    model = build(FABertConfig, model_class, **fields)
    publish(model, tokenizer, make_facts(pipeline_tag=task, auto_class=auto_class), folder)
    return model, tokenizer


def answers(task: str, output) -> torch.Tensor:
    if task == "feature-extraction":
        return torch.tensor(output)
    return torch.tensor([one["score"] for one in output])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["periodic", "absolute"])
def test_a_pipeline_reads_any_text_or_cuts_it_and_says_so(task, kind, tmp_path, said):
    model, tokenizer = write(tmp_path / "out", task, kind)
    pipe = pipeline(task, str(tmp_path / "out"), trust_remote_code=True)
    text = f"[MASK] {LONG}" if task == "fill-mask" else LONG
    options = {"top_k": 5} if task.startswith(("text", "fill")) else {}
    output = pipe(text, **options)
    longest = len(tokenizer(text, verbose=False)["input_ids"])
    cut = tokenizer(text, truncation=True, max_length=ROWS if kind == "absolute" else longest, return_tensors="pt")
    read = cut["input_ids"].shape[1]
    assert longest > 4 * ROWS and read == (ROWS if kind == "absolute" else longest)
    with torch.no_grad():
        result = model(input_ids=cut["input_ids"], attention_mask=cut["attention_mask"])
    if task == "text-classification":
        expected = result.logits[0].softmax(0).sort(descending=True).values
    elif task == "token-classification":
        expected = result.logits[0, 1:-1].softmax(1).max(1).values[: len(output)]
        assert kind == "absolute" or output[-1]["end"] == len(text.rstrip())
    elif task == "fill-mask":
        expected = result.logits[0, 1].softmax(0).sort(descending=True).values[:5]
    else:
        expected = result.last_hidden_state
    torch.testing.assert_close(answers(task, output), expected, rtol=1e-4, atol=1e-5)
    if kind == "periodic":
        pipe.model.forward = partial(pipe.model.forward, chunk_size=16)
    torch.testing.assert_close(answers(task, pipe(text, **options)), expected, rtol=1e-4, atol=1e-5)
    told = [message for message in said if "cut to its first 24 tokens" in message]
    is_told = kind == "absolute" and task != "token-classification"  # which asks for truncation itself
    assert len(told) == is_told and not [message for message in said if "indexing errors" in message]


def test_a_tokenizer_of_a_table_cuts_unless_it_is_told_otherwise_and_stays_one_of_the_library(tmp_path):
    model, _ = write(tmp_path / "out", "text-classification", "absolute")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["auto_map"] == {"AutoTokenizer": [None, "tokenization_fa_bert.FABertTokenizerFast"]}
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    cutting = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(cutting).__name__ == "FABertTokenizerFast" and type(plain) is not type(cutting)
    assert plain.model_max_length == cutting.model_max_length == ROWS
    whole = plain(LONG, verbose=False)["input_ids"]
    assert len(whole) > ROWS and cutting(LONG, truncation=False, verbose=False)["input_ids"] == whole
    assert cutting(LONG)["input_ids"] == plain(LONG, truncation=True)["input_ids"]
    assert cutting([LONG, "red"])["input_ids"][1] == plain("red")["input_ids"]
    assert len(cutting(LONG, max_length=10, truncation=True)["input_ids"]) == 10
    facts = make_facts(pipeline_tag="text-classification", auto_class="AutoModelForSequenceClassification")
    publish(model, cutting, facts, tmp_path / "twice")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "twice")) is type(plain), "without its code, as before"
    cutting.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again(LONG)["input_ids"] == cutting(LONG)["input_ids"]
    stock = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert type(stock) is type(plain) and stock.model_max_length == ROWS
    assert stock([LONG, "red"], truncation=True).data == plain([LONG, "red"], truncation=True).data


@pytest.mark.parametrize("positional", [False, True])
def test_saving_with_a_push_does_what_the_library_does(positional, tmp_path, monkeypatch):
    done, classes = [], []

    def create_repo(repo_id, **given):
        done.append(("create", repo_id, given))
        return SimpleNamespace(repo_id=repo_id)

    def upload(self, folder, *args, **given):
        names = sorted(path.name for path in Path(folder).iterdir())
        classes.append(json.loads((Path(folder) / "tokenizer_config.json").read_text())["tokenizer_class"])
        done.append(("upload", names, args, given))

    if hasattr(tokenization_utils_base, "hf_api"):  # of later versions
        monkeypatch.setattr(tokenization_utils_base, "hf_api", lambda: SimpleNamespace(create_repo=create_repo))
    else:
        monkeypatch.setattr(tokenization_utils_base, "create_repo", create_repo)
    monkeypatch.setattr(PreTrainedTokenizerFast, "_upload_modified_files", upload)
    monkeypatch.setattr(PreTrainedTokenizerFast, "push_to_hub", lambda *args, **given: done.append("push_to_hub"))
    stock = make_tokenizer(WORDS, max_length=ROWS)
    ours = FABertTokenizerFast(tokenizer_object=stock.backend_tokenizer, **stock.special_tokens_map)
    asked = {"private": True, "token": "hf_mine", "commit_message": "here"}
    given = ([None, None, True], asked) if positional else ([], asked | {"push_to_hub": True, "repo_id": "me/mine"})
    for folder, tokenizer in (("stock", stock), ("ours", ours)):
        tokenizer.save_pretrained(str(tmp_path / folder / "name"), *given[0], **given[1])
    assert [entry[0] for entry in done] == ["create", "upload"] * 2 and done[2:] == done[:2]
    assert done[2][2]["private"] is True, "or a public repository would come about"
    assert classes == [type(stock).__name__, STOCK_CLASS], "named before the upload"


def test_a_tokenizer_of_any_length_has_no_limit_and_no_code(tmp_path):
    _, tokenizer = write(tmp_path / "out", "text-classification", "periodic")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map" not in saved and saved["model_max_length"] > 10**20
    assert tokenizer.model_max_length == ROWS, "the one in memory stays as it was given"
