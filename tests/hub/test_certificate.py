"""Protects the certificate: it passes what is right, finds what is broken on purpose, and can't be talked over."""

import dataclasses
import json
import logging
import math
import re
import shutil
import time

import pytest
import torch
from test_card import FORGED, make_facts
from tiny_models import HEADS, VOCAB_SIZE, build, make_tokenizer
from transformers import ViTImageProcessor

from fa_transformers import (
    FABertConfig,
    FABertForSequenceClassification,
    FABertModel,
    FAViTConfig,
    FAViTModel,
    convert_checkpoint,
)
from fa_transformers.commands.check import main
from fa_transformers.hub import publish as publishing
from fa_transformers.hub.card import ModelFacts, render_card
from fa_transformers.hub.certificate import CERTIFICATE_FILE, Certificate, CheckFacts
from fa_transformers.hub.facts import FactError
from fa_transformers.hub.model_checks import EXACT_BASIS, LENGTHS, check_model, digest_weights
from fa_transformers.hub.publish import FolderCheck, certify, check_folder, examine_folder, publish, write_certificate
from fa_transformers.hub.push import push
from fa_transformers.hub.self_check import SelfTestError, compute_sha256, read_self_test
from fa_transformers.models import fa_chunked, fa_mixer
from fa_transformers.models.fa_packed import PackedDocuments

pytestmark = pytest.mark.certified

LOCAL = {"local_kernel_size": 3, "local_window": 2, "classifier_pooling": "mean"}
PROPERTIES = ["saved and loaded", "weights are finite", "padding", "batch", "chunks", "packed"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([f"word{index}" for index in range(VOCAB_SIZE - 5)], max_length=64)


def processor_for(model, tokenizer):
    is_text = model.main_input_name == "input_ids"
    return tokenizer if is_text else ViTImageProcessor(size={"height": 32, "width": 32})


def classifier(**fields):
    return build(FABertConfig, FABertForSequenceClassification, **LOCAL, **fields)


def outcomes(certificate: Certificate) -> dict[str, str]:
    """The outcome of every property, and of every precision its worst."""
    return {row.check: row.outcome for row in sorted(certificate.rows, key=lambda row: row.outcome != "failed")[::-1]}


def failing(certificate: Certificate) -> set[str]:
    return {row.check for row in certificate.rows if row.outcome == "failed"}


@pytest.mark.parametrize(
    ("config_class", "auto_class", "model_class"), HEADS, ids=lambda value: getattr(value, "__name__", "")
)
def test_every_head_passes_every_check(config_class, auto_class, model_class, tokenizer):
    model = build(config_class, model_class, **LOCAL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    certificate = certify(model, processor_for(model, tokenizer))
    assert certificate.failures == []
    found = outcomes(certificate)
    is_text = model.main_input_name == "input_ids"
    assert list(dict.fromkeys(row.check for row in certificate.rows))[:6] == PROPERTIES
    assert set(found) == {*PROPERTIES, *(f"{name} beside float64" for name in ("float32", "bfloat16", "float16"))}
    assert {found[name] for name in PROPERTIES[:5]} == {"passed"} and found["float32 beside float64"] == "passed"
    assert found["packed"] == ("passed" if is_text else "not applicable")
    properties = [row for row in certificate.rows if row.basis == EXACT_BASIS]
    assert len(properties) == (4 if is_text else 3) and max(row.difference for row in properties) < 1e-12
    decides = "Classification" in auto_class or auto_class.endswith(("MaskedLM", "QuestionAnswering", "MultipleChoice"))
    assert {row.decisions is not None for row in certificate.rows if "beside" in row.check} == {decides}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_inputs_are_the_same_each_time(tokenizer):
    assert certify(classifier(), tokenizer) == certify(classifier(), tokenizer)


def test_documents_are_as_long_as_the_model_reads_and_a_check_can_afford():
    def lengths(max_length, **fields):
        tokenizer = make_tokenizer(["a", "b"], max_length=max_length)
        model = build(FABertConfig, FABertModel, **fields)
        certificate = certify(model, tokenizer)
        return [row.inputs for row in certificate.rows if row.check.startswith("float32")]

    assert lengths(7) == ["4 documents of 7 tokens"]
    assert lengths(600, position_embedding_type="none") == [
        "4 documents of 64 tokens",
        "2 documents of 512 tokens",
        "1 document of 600 tokens",
    ]
    # 2 heads · N² scores of a softmax layer are 2^25 numbers at 4,096 tokens, and more than that for longer ones.
    assert lengths(5000, position_embedding_type="none", softmax_layers=[0])[-1] == "1 document of 4,096 tokens"
    assert LENGTHS[-1] == 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_that_a_model_is_stored_in_comes_first_and_counts(dtype, tokenizer):
    certificate = certify(classifier().to(dtype), tokenizer)
    assert certificate.failures == []
    checked = [row.check.split()[0] for row in certificate.rows if "beside" in row.check]
    own = str(dtype).removeprefix("torch.")
    assert checked == list(dict.fromkeys([own, "bfloat16", "float16"]))[own == "float64" :]


def read_padding(monkeypatch):
    attend = fa_mixer.unchecked_attention
    monkeypatch.setattr(
        fa_mixer,
        "unchecked_attention",
        lambda query, key, value, mask, documents, **options: attend(query, key, value, None, documents, **options),
    )


def drop_local_terms_in_chunks(monkeypatch):
    cut = fa_chunked._cut
    monkeypatch.setattr(
        fa_chunked, "_cut", lambda tokens, prefix, columns, halo, layout: cut(tokens, prefix, columns, None, layout)
    )


def count_positions_through_a_packed_row(monkeypatch):
    init = PackedDocuments.__init__

    def start_at_zero_once(self, cu_seqlens, num_tokens):
        init(self, cu_seqlens, num_tokens)
        self.positions = torch.arange(num_tokens)

    monkeypatch.setattr(PackedDocuments, "__init__", start_at_zero_once)


def read_the_neighbour(monkeypatch):
    forward = FABertModel.forward

    def mixed(self, *inputs, **options):
        output = forward(self, *inputs, **options)
        output.last_hidden_state = output.last_hidden_state + 1e-6 * output.last_hidden_state[:1].mean()
        return output

    monkeypatch.setattr(FABertModel, "forward", mixed)


def overflow_in_float16(monkeypatch):
    forward = FABertModel.forward

    def scaled(self, *inputs, **options):
        output = forward(self, *inputs, **options)
        output.last_hidden_state = output.last_hidden_state * 1e6 / 1e6
        return output

    monkeypatch.setattr(FABertModel, "forward", scaled)


@pytest.mark.parametrize(
    ("break_code", "found"),
    [
        (read_padding, {"padding", "batch", "chunks", "packed"}),
        (drop_local_terms_in_chunks, {"chunks"}),
        (count_positions_through_a_packed_row, {"packed"}),
        (read_the_neighbour, {"padding", "batch", "packed"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_break_of_the_code_fails_its_rows(break_code, found, monkeypatch, tokenizer):
    model = classifier()
    break_code(monkeypatch)
    certificate = certify(model, tokenizer)
    assert failing(certificate) == found
    assert all(" 1.2e-10 allowed" in line or " raised " in line for line in certificate.failures)


def test_a_precision_that_overflows_is_unfit_and_a_failure_only_where_the_model_is_stored_in_it(monkeypatch, tokenizer):
    overflow_in_float16(monkeypatch)
    certificate = certify(classifier(), tokenizer)
    assert certificate.failures == [] and outcomes(certificate)["float16 beside float64"] == "unfit"
    (row,) = (row for row in certificate.rows if row.outcome == "unfit")
    assert row.note == "not finite" and row.difference is None
    certificate = certify(classifier().half(), tokenizer)
    assert failing(certificate) == {"float16 beside float64"}


def test_nan_in_any_weight_fails(tokenizer):
    model = classifier()
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight[1, 0] = math.nan  # of a segment that no document has
    certificate = certify(model, tokenizer)
    assert failing(certificate) == {"weights are finite"}
    assert "token_type_embeddings" in certificate.failures[0]
    torch.nn.init.constant_(model.classifier.weight, math.nan)
    certificate = certify(model, tokenizer)
    assert failing(certificate) == {*outcomes(certificate)} - {
        "saved and loaded", "bfloat16 beside float64", "float16 beside float64",
    }  # fmt: skip
    json.dumps(certificate.to_list(), allow_nan=False)


def test_a_check_that_raises_is_a_row_that_failed(monkeypatch, tokenizer):
    def refuse(*_):
        raise RuntimeError("no\nchunks")

    monkeypatch.setattr("fa_transformers.models.modeling_fa_bert.embed_text_in_chunks", refuse)
    certificate = certify(classifier(), tokenizer)
    assert failing(certificate) == {"chunks"} and "raised RuntimeError: no chunks" in certificate.failures[0]
    monkeypatch.setattr(FABertModel, "forward", refuse)
    assert failing(certify(classifier(), tokenizer)) >= {"padding", "batch", "chunks", "packed"}
    rows = check_model(classifier(), None, "AutoModelForSequenceClassification")
    assert [row["outcome"] for row in rows] == ["failed"] and "raised AttributeError" in rows[0]["note"]


def test_other_weights_on_disk_fail(monkeypatch, tokenizer):
    model = classifier()
    save = model.save_pretrained

    def save_others(folder, *arguments, **options):
        weight = model.classifier.bias
        kept = weight.detach().clone()
        with torch.no_grad():
            weight += torch.finfo(weight.dtype).eps
            save(folder, *arguments, **options)
            weight.copy_(kept)

    assert digest_weights(model) == digest_weights(model)
    monkeypatch.setattr(model, "save_pretrained", save_others)
    assert failing(certify(model, tokenizer)) == {"saved and loaded"}


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    """A folder with a certificate, which tests copy, and one without."""
    path = tmp_path_factory.mktemp("published")
    publish(classifier(), tokenizer, make_facts(), path / "bare", certified=False)
    shutil.copytree(path / "bare", path / "certified")
    write_certificate(path / "certified", certify(classifier(), tokenizer))
    return path


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published / "certified", tmp_path / "model")


@pytest.fixture
def bare(published, tmp_path):
    return shutil.copytree(published / "bare", tmp_path / "model")


def test_a_published_folder_has_its_certificate_listed_and_on_its_card(folder):
    certificate = Certificate.load(folder / CERTIFICATE_FILE)
    assert read_self_test(folder)["files"][CERTIFICATE_FILE] == compute_sha256(folder / CERTIFICATE_FILE)
    facts = ModelFacts.load(folder / "model_facts.json")
    assert facts == dataclasses.replace(make_facts(), certificate=certificate.rows)
    card = (folder / "README.md").read_text()
    assert card == render_card(facts)
    section = card.split("## Checked on these weights\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(certificate.rows)
    assert re.search(r"\| padding \| 3 documents of 5 to 64 tokens.* \| \S+ \| 1.2e-10 \| passed \|", section)
    assert re.search(r"\| bfloat16 beside float64 \| 4 documents of 64 tokens \|.*same decision in \d of 4 \|", section)
    assert "1.2e-10 is 2^20 rounding units of float64" in section


def test_publishing_without_a_certificate_drops_the_one_of_the_facts(folder, tokenizer, tmp_path):
    facts = ModelFacts.load(folder / "model_facts.json")
    other = publish(classifier(), tokenizer, facts, tmp_path / "other", certified=False)
    assert not (other / CERTIFICATE_FILE).exists()
    assert ModelFacts.load(other / "model_facts.json") == make_facts()
    assert "Checked on these weights" not in (other / "README.md").read_text()


def test_a_model_that_fails_is_written_and_said_to_fail(monkeypatch, tokenizer, tmp_path, caplog):
    read_padding(monkeypatch)
    with caplog.at_level(logging.WARNING):
        folder = publish(classifier(), tokenizer, make_facts(), tmp_path / "model")
    assert "FAILED a check, and push will refuse it: padding on 3 documents" in caplog.text
    assert (folder / "model.safetensors").is_file()
    card = (folder / "README.md").read_text()
    assert re.search(r"\| padding \|.*\| \*\*FAILED\*\*: other tokens as padding \|", card)
    assert failing(Certificate.load(folder / CERTIFICATE_FILE)) == {"padding", "batch", "chunks", "packed"}


@pytest.fixture
def in_this_process(monkeypatch, tokenizer):
    """Let the rows of a folder's check come from this process, where they take a hundredth of the time."""
    find_rows(monkeypatch, lambda: certify(classifier(), tokenizer))


@pytest.fixture
def as_published(monkeypatch, published):
    """Let a check find what the published folder says."""
    find_rows(monkeypatch, lambda: Certificate.load(published / "certified" / CERTIFICATE_FILE))


def find_rows(monkeypatch, find) -> None:
    def check(arguments, environment=None):
        assert arguments[1:] == ["--certificate"]
        return {"model_class": "FABertForSequenceClassification", "files": 3, "certificate": find().to_list()}

    monkeypatch.setattr(publishing, "check_in_fresh_process", check)


@pytest.mark.usefixtures("in_this_process")
def test_push_refuses_what_fails_now_before_anything_is_sent(folder, monkeypatch):
    monkeypatch.setattr("fa_transformers.hub.push.HfApi", None)
    monkeypatch.setattr("fa_transformers.hub.push.check_login", lambda repo_id, token: "tester")
    read_padding(monkeypatch)
    with pytest.raises(SelfTestError, match="padding on 3 documents.*batch.*packed"):
        push(folder, "tester/model")


@pytest.mark.usefixtures("as_published")
def test_push_refuses_a_folder_without_a_certificate_and_says_how_to_make_one(bare, monkeypatch):
    monkeypatch.setattr("fa_transformers.hub.push.HfApi", None)
    monkeypatch.setattr("fa_transformers.hub.push.check_login", lambda repo_id, token: "tester")
    with pytest.raises(SelfTestError, match=r"has no certificate.json; run `fa-transformers check .*model --write`"):
        push(bare, "tester/model")


@pytest.mark.usefixtures("as_published")
def test_push_refuses_a_card_that_says_other_than_the_certificate(folder, monkeypatch):
    monkeypatch.setattr("fa_transformers.hub.push.HfApi", None)
    monkeypatch.setattr("fa_transformers.hub.push.check_login", lambda repo_id, token: "tester")
    facts = ModelFacts.load(folder / "model_facts.json")
    facts = dataclasses.replace(facts, certificate=facts.certificate[:-1])
    facts.save(folder / "model_facts.json")
    (folder / "README.md").write_text(render_card(facts))
    with pytest.raises(FactError, match="fact 'certificate' is not what certificate.json says"):
        push(folder, "tester/model")


def rewrite(folder, change) -> None:
    """Edit a certificate by hand, and its digest in the list of files."""
    rows = json.loads((folder / CERTIFICATE_FILE).read_text())
    changed = change(rows)
    (folder / CERTIFICATE_FILE).write_text(json.dumps(rows if changed is None else changed))
    test = json.loads((folder / "self_test.json").read_text())
    test["files"][CERTIFICATE_FILE] = compute_sha256(folder / CERTIFICATE_FILE)
    (folder / "self_test.json").write_text(json.dumps(test))


HAND_EDITS = {
    "better": (
        lambda rows: rows[-1].update(difference=1e-5),
        "float16 beside float64 on 4 doc.*says passed, 1e-05 off",
    ),
    "more": (lambda rows: rows[-1].update(same=0), "float16 beside float64 .*same decision in 0 of 4"),
    "text": (lambda rows: rows[2].update(inputs=FORGED), "padding on sea.*not among its checks"),
    "gone": (lambda rows: rows.pop(2) and None, "padding on 3 documents.*missing"),
    "tolerance": (lambda rows: rows[2].update(tolerance=0.4), "padding on 3 documents"),
    "twice": (lambda rows: rows.append(rows[2]), "stands there twice"),
    "outcome": (lambda rows: rows[2].update(outcome="unfit"), "padding on 3 documents.*says unfit"),
    "NaN": (
        lambda rows: rows[2].update(difference=math.nan),
        "certificate.json is no certificate: fact 'difference' is nan",
    ),
    "huge": (lambda rows: rows[2].update(difference=10**400), r"is no certificate: fact .*difference' is 1000"),
    "negative": (lambda rows: rows[2].update(difference=-1), "'difference' must not be negative"),
    "too tolerant": (lambda rows: rows[2].update(tolerance=3), "'tolerance' must be at most 0.5"),
    "contradiction": (lambda rows: rows[2].update(difference=0.1), "'difference' is above 'tolerance'"),
    "kind": (lambda rows: rows[2].update(note=["x"]), r"note' must be a str"),
    "unknown": (lambda rows: rows[2].update(x=1), r"x' is unknown"),
    "none": (lambda rows: [], "must be a list of 1 to 64 checks"),
    "many": (lambda rows: rows * 64, "must be a list of 1 to 64 checks"),
    "object": (lambda rows: {"rows": rows}, "must be a list of 1 to 64 checks"),
}


@pytest.mark.usefixtures("as_published")
@pytest.mark.parametrize(("change", "message"), HAND_EDITS.values(), ids=HAND_EDITS)
def test_a_certificate_edited_by_hand_is_refused(change, message, folder):
    rewrite(folder, change)
    with pytest.raises(SelfTestError, match=message):
        check_folder(folder)


@pytest.mark.usefixtures("as_published")
def test_a_folder_as_it_was_published_passes(folder):
    assert check_folder(folder) == {"model_class": "FABertForSequenceClassification", "files": 3}


def test_figures_of_another_machine_may_differ_by_a_factor_of_four():
    def row(difference, **changes):
        values = {"check": "x", "inputs": "y", "outcome": "passed", "tolerance": 0.44, "basis": "112 units"}
        return CheckFacts(**{**values, "difference": difference, **changes})

    def agree(one, other):
        found = [Certificate([a]).disagreements(Certificate([b])) for a, b in ((one, other), (other, one))]
        assert found[0] == found[1] == [] or (found[0] and found[1])
        return not found[0]

    assert agree(row(0.01), row(0.039)) and not agree(row(0.01), row(0.041))
    assert agree(row(0.0), row(0.44 / 256)) and not agree(row(0.0), row(0.44 / 255))
    exact = {"tolerance": 1e-10, "basis": EXACT_BASIS}
    assert agree(row(0.0, **exact), row(9e-11, **exact))
    assert agree(row(0.3), row(0.5, outcome="unfit")) and not agree(row(0.3), row(0.3, outcome="unfit"))
    assert not agree(row(0.43), row(0.45, outcome="failed"))
    counts = {"decisions": 40, "same": 40}
    assert agree(row(0.1, **counts), row(0.1, **counts | {"same": 34}))
    assert not agree(row(0.1, **counts), row(0.1, **counts | {"same": 33}))
    assert not agree(row(0.1, **counts), row(0.1)) and not agree(row(None, tolerance=None), row(0.1))


def test_text_in_a_certificate_is_text_on_the_card_and_in_the_terminal():
    rows = [CheckFacts(check=FORGED, inputs=FORGED, outcome="failed", basis=FORGED, tolerance=0.1, note=FORGED)]
    card = render_card(make_facts(certificate=rows))
    plain = render_card(make_facts(certificate=[CheckFacts(check="x", inputs="y", outcome="passed")]))
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("#")
    ]
    section = card.split("## Checked on these weights\n")[1].split("\n## ")[0]
    for markup in ("<img", "](javascript", "](d)", "\x1b", "\u202e"):
        assert not re.search(r"(?<!\\)" + re.escape(markup), section), markup
    (line,) = (line for line in section.splitlines() if line.startswith("| sea"))
    assert len(re.findall(r"(?<!\\)\|", line)) == 6
    certificate = Certificate(rows)
    for text in (certificate.table(), *certificate.failures):
        assert "\x1b" not in text and "\u202e" not in text
    assert len(certificate.table().splitlines()) == 3


@pytest.mark.usefixtures("as_published")
def test_the_command_prints_the_table_and_writes_the_certificate(bare, capsys):
    main([str(bare)])
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["check", "on", "largest", "difference", "allowed", "result"]
    assert "it has no certificate: --write puts this one there" in printed.splitlines()[-1]
    main([str(bare), "--write", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert Certificate.from_list(json.loads(line)["certificate"]) == Certificate.load(bare / CERTIFICATE_FILE)
    assert "Checked on these weights" in (bare / "README.md").read_text()
    main([str(bare)])
    assert capsys.readouterr().out.splitlines()[-1].endswith("files")


@pytest.mark.usefixtures("in_this_process")
def test_the_command_fails_in_one_line(bare, capsys, monkeypatch):
    with open(bare / "README.md", "a") as file:
        file.write("by hand")
    with pytest.raises(SystemExit, match="^error: .*README.md is not what model_facts.json says"):
        main([str(bare), "--write"])
    assert not (bare / CERTIFICATE_FILE).exists()
    read_padding(monkeypatch)
    with pytest.raises(SystemExit, match="^error: .*model failed its check: padding on 3 documents[^\n]*$"):
        main([str(bare)])
    assert "FAILED" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: .*is not a folder$"):
        main([str(bare / "nowhere")])


def test_a_process_that_ends_without_a_certificate_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(publishing, "check_in_fresh_process", lambda *_: {"certificate": "x"})
    with pytest.raises(SelfTestError, match="a certificate must be a list"):
        examine_folder(folder)
    assert FolderCheck({}, Certificate([]), None).mistakes == []


@pytest.mark.slow
def test_a_fresh_process_finds_what_the_publishing_one_found(folder, tokenizer, tmp_path):
    images = build(FAViTConfig, FAViTModel, **LOCAL)
    changes = {"language": None, "pipeline_tag": "image-feature-extraction", "auto_class": "AutoModel"}
    others = publish(images, processor_for(images, tokenizer), make_facts(**changes), tmp_path / "images")
    for path in (folder, others):
        found = examine_folder(path)
        assert found.mistakes == []
        assert {row.check: row.outcome for row in found.certificate.rows} == {
            row.check: row.outcome for row in found.stated.rows
        }
        (saved,) = (row for row in found.certificate.rows if row.check == "saved and loaded")
        assert saved.outcome == "passed"


@pytest.mark.slow
def test_a_sentence_transformers_model_of_real_size_is_certified_in_reasonable_time(tmp_path):
    conversion = convert_checkpoint("minilm", positions="periodic", max_length=8192, local_window=64)
    started = time.process_time()
    certificate = certify(conversion.model, conversion.processor)
    assert time.process_time() - started < 60.0  # 25 s, so that two idle cores take less than 20 s
    assert certificate.failures == [] and {row.outcome for row in certificate.rows} == {"passed"}
    assert [row.inputs for row in certificate.rows if row.check.startswith("bfloat16")] == [
        "4 documents of 64 tokens",
        "2 documents of 512 tokens",
        "1 document of 4,096 tokens",
    ]
    folder = convert_checkpoint("minilm", output_dir=tmp_path / "minilm", max_length=128).folder
    assert {"modules.json", CERTIFICATE_FILE} <= set(read_self_test(folder)["files"])
    assert Certificate.load(folder / CERTIFICATE_FILE).failures == []
