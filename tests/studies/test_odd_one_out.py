"""Protects the study of odd one out: kinds of blocks that start as one function, runs that are taken or go on."""

import json
from dataclasses import replace

import pytest
import torch

from fa_transformers.models import FADenseConfig, FADenseForObjectDetection, FADenseImageProcessor
from fa_transformers.studies import odd_one_out
from fa_transformers.studies.odd_one_out import KINDS, OddOneOutOptions, keep_settings, put_blocks, summarise, train

SIZES = dict(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1], embedding_size=8, layer_type="basic")


def write_detector(folder, **fields) -> FADenseForObjectDetection:
    torch.manual_seed(3)
    backbone = {"model_type": "fa_resnet", "out_features": ["stage1", "stage2", "stage3", "stage4"], **SIZES}
    config = FADenseConfig(backbone, pyramid_channels=16, mask_channels=8, num_queries=10, num_labels=10, **fields)
    model = FADenseForObjectDetection(config).eval()
    model.save_pretrained(folder)
    FADenseImageProcessor().save_pretrained(folder)
    return model


@pytest.fixture(autouse=True)
def few_small_canvases(monkeypatch):
    monkeypatch.setattr(odd_one_out, "NUM_DRAWN", 2)
    monkeypatch.setattr(odd_one_out, "CANVAS_PX", 128)
    monkeypatch.setattr(odd_one_out, "ODD_DIGIT_PX", (12, 16))


def test_all_kinds_start_as_the_detector_they_are_put_into(tmp_path):
    source = write_detector(tmp_path / "digits", attention_places=[])
    images = torch.rand(1, 3, 64, 96)
    expected = source(images)
    options = OddOneOutOptions(attention_places=("fp3", "fp5"), attention_heads=2, key_channels=8)
    for kind in KINDS:
        put_blocks(tmp_path / "digits", kind, options, tmp_path / kind)
        model = FADenseForObjectDetection.from_pretrained(tmp_path / kind).eval()
        assert model.config.places == ([] if kind == "none" else ["fp3", "fp5"])
        assert kind == "none" or model.config.attention_kind == kind
        assert kind == "none" or model.config.attention_heads == {"factorized": 2, "softmax": 1}[kind]
        output = model(images)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.pred_boxes, expected.pred_boxes)


def test_queries_of_new_blocks_start_as_their_keys_and_both_larger(tmp_path):
    write_detector(tmp_path / "digits", attention_places=[])
    blocks = []
    for key_gain, query_gain in ((1.0, 1.0), (3.0, 6.0)):
        options = OddOneOutOptions(attention_heads=2, key_channels=8, key_gain=key_gain, query_gain=query_gain)
        put_blocks(tmp_path / "digits", "factorized", options, tmp_path / f"start-{key_gain}")
        model = FADenseForObjectDetection.from_pretrained(tmp_path / f"start-{key_gain}")
        blocks.append(model.pyramid.attention_blocks["fp3"])
    torch.testing.assert_close(blocks[1].keys.weight, 3 * blocks[0].keys.weight)
    torch.testing.assert_close(blocks[1].queries.weight, 6 * blocks[0].keys.weight)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_new_blocks_attend_to_is_scaled_by_training_canvases(tmp_path, kind):
    write_detector(tmp_path / "digits", attention_places=[])
    options = OddOneOutOptions(attention_places=("fp3", "fp5"), attention_heads=2, key_channels=8)
    put_blocks(tmp_path / "digits", kind, options, tmp_path / "start")
    model = FADenseForObjectDetection.from_pretrained(tmp_path / "start").eval()
    for block in model.pyramid.attention_blocks.values():
        values = odd_one_out.collect_attended(model, FADenseImageProcessor(), block)
        # What rounding is of values of a mean of 1 and a deviation of 0.01, which were scaled to 0 and 1.
        assert values.mean(dim=(0, 2)).abs().max() < 1e-3 and (values.std(dim=(0, 2)) - 1).abs().max() < 1e-3


def test_a_detector_that_has_blocks_or_is_not_there_is_refused(tmp_path):
    write_detector(tmp_path / "blocks", attention_places=["fp5"])
    with pytest.raises(ValueError, match="has attention blocks already"):
        put_blocks(tmp_path / "blocks", "none", OddOneOutOptions(), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        put_blocks(tmp_path / "none", "none", OddOneOutOptions(), tmp_path / "out")


def test_a_finished_run_is_taken_and_a_kind_is_the_row_of_its_seeds(tmp_path):
    runs = {}
    for seed, ap in enumerate((0.25, 0.75)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "all_results.json").write_text(json.dumps({"model": {"box_ap": ap, "box_ap50": 0.9}}))
        (folder / "receipt.json").write_text(json.dumps({"cpu_seconds": 60.0 * seed, "peak_bytes": 10**9 * (seed + 1)}))
        runs[seed] = train(tmp_path / "start", seed, OddOneOutOptions(), folder)
    row = summarise("softmax", runs)
    assert row == {
        "blocks": "softmax", "box_ap_0": 0.25, "box_ap_1": 0.75, "box_ap50_0": 0.9, "box_ap50_1": 0.9, "mean_ap": 0.5,
        "cpu_seconds": 30.0, "peak_gb": 2.0,
    }  # fmt: skip


def test_runs_of_other_settings_are_not_taken(tmp_path):
    options = OddOneOutOptions(output_dir=tmp_path / "runs")
    keep_settings(tmp_path / "digits", options)
    keep_settings(tmp_path / "digits", replace(options, seeds=(4,), kinds=("none",)))
    with pytest.raises(ValueError, match=r"runs holds runs with num_canvases 3000, not 7: give another folder"):
        keep_settings(tmp_path / "digits", replace(options, num_canvases=7))
    with pytest.raises(ValueError, match="holds runs with source"):
        keep_settings(tmp_path / "others", options)


def test_places_in_the_frozen_backbone_are_refused():
    OddOneOutOptions(attention_places=("fp3", "fp5")).check()
    with pytest.raises(ValueError, match="--attention_places res3 is in the backbone, which is frozen"):
        OddOneOutOptions(attention_places=("fp3", "res3")).check()


@pytest.mark.slow
def test_a_run_is_a_process_with_a_receipt(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_detector(tmp_path / "digits", attention_places=[])
    options = OddOneOutOptions(num_canvases=4, num_eval_canvases=1, extra="--max_steps 2 --use_cpu")
    put_blocks(tmp_path / "digits", "softmax", options, tmp_path / "start")
    found = train(tmp_path / "start", 0, options, tmp_path / "run")
    assert found["steps"] == 2 and found["cpu_seconds"] > 0 and found["peak_bytes"] > 10**8
    assert found["per_class"][0]["label"] == "single" and not found["resumed"]
