"""Protects the table of detectors of real objects: what each started from, what trained, and one set for all."""

import json

import pytest
from repository import ROOT, load_script

from fa_transformers.data.readers.tables import DataError
from fa_transformers.hub.card import FACTS_FILE, FROM_SCRATCH
from fa_transformers.models import FADenseConfig, FAViTConfig

FACTS = json.loads(next((ROOT / "model_cards").glob("*.json")).read_text(encoding="utf-8"))
VIT = FAViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)


def write_run(folder, backbone, base_model, frozen, guess=0.01, ap50=0.5):
    FADenseConfig(backbone, num_labels=6).save_pretrained(folder)
    (folder / FACTS_FILE).write_text(json.dumps(FACTS | {"base_model": base_model}))
    results = {
        "parameters": 100, "frozen_parameters": frozen, "steps": 7, "cpu_seconds": 60.5, "num_examples": 40,
        "model": {"box_ap50": ap50, "box_ap": 0.25}, "baselines": {"a guess": {"box_ap50": guess, "box_ap": 0.0}},
    }  # fmt: skip
    (folder / "all_results.json").write_text(json.dumps(results))
    return str(folder)


def test_runs_of_one_set_are_rows_beside_a_guess_and_others_are_refused(tmp_path):
    script = load_script("real_objects")
    frozen = write_run(tmp_path / "frozen", VIT, "facebook/dinov2-small", 90)
    scratch = write_run(tmp_path / "scratch", None, FROM_SCRATCH, 0)
    page = tmp_path / "page.json"
    first, second, last = script.main([frozen, scratch, "--results", str(page)])
    assert first["backbone"] == "FA-ViT (layer 1), facebook/dinov2-small, frozen" and first["trained"] == 10
    assert second["backbone"] == "FAResNet, new weights" and second["trained"] == 100
    assert last["box_ap50"] == 0.01 and "cpu_seconds" not in last
    table = json.loads(page.read_text())["tables"]["real_objects"]
    assert table["rows"][0][:7] == [first["backbone"], 100, 10, 7, 60.5, 0.5, 0.25] and "40 held-out" in table["title"]
    write_run(tmp_path / "other", None, FROM_SCRATCH, 0, guess=0.2)
    with pytest.raises(DataError, match="other: this run was scored on other pictures than .*frozen"):
        script.compare([tmp_path / "frozen", tmp_path / "other"])
    with pytest.raises(DataError, match="nothing.*there are no results of a finished finetune_dense run"):
        script.compare([tmp_path / "nothing"])
