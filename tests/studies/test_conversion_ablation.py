"""Protects the ablation of conversions: variants side by side learn as if alone, and its flags are checked first."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from repository import load_script
from tiny_distillation import WORDS, write_texts
from tiny_models import make_tokenizer
from transformers import BertConfig, BertModel

from fa_transformers.studies import conversion_ablation
from fa_transformers.studies.conversion_ablation import VARIANTS, fields_of

script = load_script("ablate_conversion")
PURE, LOCAL, LAST = "pure: maps D", "convolution small", list(VARIANTS)[-1]


@pytest.fixture
def flags(tmp_path, monkeypatch) -> list[str]:
    """A tiny stock checkpoint and texts to learn from, and few short inputs to time."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(conversion_ablation, "LENGTHS_TIMED", {"text": (16, 32)})
    folder = tmp_path / "bert"
    tokenizer = make_tokenizer(WORDS, 64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    texts, heldout = write_texts(tmp_path / "texts.jsonl", 40), write_texts(tmp_path / "heldout.jsonl", 9)
    flags = [
        "--model_name_or_path",
        folder,
        "--train_file",
        texts,
        "--validation_file",
        heldout,
        "--max_length",
        48,
        "--max_tokens_per_batch",
        96,
    ]
    flags += ["--steps", 3, "--mixed_precision", "no", "--num_threads", 1, "--use_cpu", "--max_eval_samples", 3]
    return [str(flag) for flag in [*flags, "--output_dir", tmp_path / "out"]]


def test_variants_side_by_side_learn_as_if_each_were_alone(flags, tmp_path, capsys):
    together = script.main([*flags, "--variants", PURE, LOCAL])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == together
    assert json.loads((tmp_path / "out" / "ablation.json").read_text()) == together
    table = (tmp_path / "out" / "ablation.txt").read_text().splitlines()
    assert [line[:17].strip() for line in table[2:]] == [PURE, LOCAL]
    for row in together["rows"]:
        (alone,) = script.main([*flags, "--variants", row["variant"]])["rows"]
        errors = [name for name in row if name.startswith(("error", "cosine"))]
        assert len(errors) >= 3 and row["new parameters"] == alone["new parameters"] > 0
        assert [row[name] for name in errors] == [alone[name] for name in errors]
        assert {"ms at 16", "ms at 32"} < set(row)


def test_learning_lowers_the_errors_of_the_layers(flags):
    errors = []
    for steps in ("1", "24"):
        (row,) = script.main([*flags, "--variants", PURE, "--steps", steps, "--max_tokens_per_batch", "384"])["rows"]
        errors.append(row["error 0"] + row["error 1"])
    print(f"errors of the layers after 1 and 24 steps: {errors}")
    assert errors[1] < 0.9 * errors[0]


def test_fields_of_a_variant_follow_from_the_sizes_of_the_model():
    config = BertConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=3)
    assert fields_of("pure: maps 2D", "text", config) == {"key_feature_size": 24}
    assert fields_of(LAST, "images", config) == {
        "key_feature_size": 24, "local_kernel_size": 5, "local_window": 3, "softmax_layers": [2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--variants", "pure"], "--variants 'pure' is unknown; choose from 'operator, temperatures'"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16"),
        (["--image_folder", "photos"], "--image_folder is for images"),
        (["--test_file", "a.csv"], "unknown flag --test_file"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_read(wrong, message, capsys):
    with pytest.raises(SystemExit):
        script.parse(wrong)
    assert message in capsys.readouterr().err


def test_every_option_that_is_read_has_a_value():
    job = script.parse([])
    assert job.loop.output_dir == Path("outputs/ablation") and job.data.max_eval_samples == 64
    assert (job.model.max_length, job.model.image_size, job.loop.warmup_ratio) == (256, 224, 0.05)
