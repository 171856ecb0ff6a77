"""Protects the conversion of detectors: DETR and Conditional DETR with softmax layers compute what stock does, of both
generations of names, whole or without a head; a folder of one is published, checked elsewhere and tells what it is."""

import json

import pytest
import torch
from tiny_detectors import detections, every_detector, images, sizes
from tiny_models import EXACT, randomize
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, DetrModel

from fa_transformers import FADetrForObjectDetection, certify, check_folder, convert_checkpoint


@every_detector
@pytest.mark.parametrize("layout", ["memory", "transformers 4", "transformers 5"])
def test_detectors_convert_whole_and_equal_stock_with_softmax_layers(
    stock_config, stock_class, config_class, model_class, layout, tmp_path
):
    stock = randomize(stock_class(stock_config(**sizes())))
    if layout != "memory":
        stock.save_pretrained(tmp_path, save_original_format=layout == "transformers 4")
    conversion = convert_checkpoint(stock if layout == "memory" else tmp_path, softmax_layers=[0, 1])
    assert type(conversion.model) is model_class and conversion.model.config.recovery is None
    assert conversion.counts == {"kept": len(stock.state_dict()), "resized": 0, "new": 0, "dropped": 0}
    expected = detections(stock, images())
    for name, value in detections(conversion.model, images()).items():
        torch.testing.assert_close(value, expected[name], **EXACT)


@every_detector
def test_mixers_and_heads_that_a_detector_lacks_are_reported_as_new(
    stock_config, stock_class, config_class, model_class
):
    stock = stock_class(stock_config(**sizes()))
    conversion = convert_checkpoint(stock, key_feature_size=16, local_kernel_size=3)
    new = [change for change in conversion.report if change.action == "new"]
    assert conversion.model.config.recovery == "pending" and len(new) == 2 * 4
    assert all(".encoder.layers." in change.result and ".mixer." in change.result for change in new)
    other = convert_checkpoint(stock, num_labels=5)
    assert {change.source for change in other.report if change.action == "dropped"} == {
        f"class_labels_classifier.{name}" for name in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="was trained with encoder_layers=2"):
        convert_checkpoint(stock, encoder_layers=1)
    with pytest.raises(ValueError, match="images of any size run"):
        convert_checkpoint(stock, image_size=64)


def test_a_detector_without_heads_gets_fresh_ones_and_its_own_folder_converts_again(tmp_path):
    stock = randomize(DetrModel(DetrConfig(**sizes())))
    stock.save_pretrained(tmp_path / "stock")
    conversion = convert_checkpoint(tmp_path / "stock", auto_class="AutoModelForObjectDetection")
    fresh = {change.result.split(".")[0] for change in conversion.report if change.action == "new"}
    assert fresh == {"class_labels_classifier", "bbox_predictor"}
    conversion.model.save_pretrained(tmp_path / "ours")
    again = convert_checkpoint(tmp_path / "ours")
    assert again.counts["kept"] == len(conversion.model.state_dict()) and again.counts["new"] == 0


@pytest.fixture
def folder(tmp_path):
    """A published folder of a DETR that was converted and not trained."""
    stock = DetrForObjectDetection(DetrConfig(**sizes()))
    stock.save_pretrained(tmp_path / "stock")
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / "stock")
    convert_checkpoint(tmp_path / "stock", output_dir=tmp_path / "ours", facts={"license": "mit"})
    return tmp_path / "ours"


@pytest.mark.certified
def test_a_converted_detector_is_published_with_its_processor_and_tells_what_it_is(folder):
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and "AutoImageProcessor" in card
    assert "FA-DETR (stock), converted and not trained" in card
    test = json.loads((folder / "self_test.json").read_text())
    assert {"logits", "pred_boxes"} <= set(test["outputs"])
    model, processor = FADetrForObjectDetection.from_pretrained(folder), DetrImageProcessor.from_pretrained(folder)
    certificate = certify(model, processor)
    assert not certificate.failures
    outcomes = {row["check"]: row["outcome"] for row in certificate.to_list()}
    assert outcomes["batch"] == outcomes["float32 beside float64"] == "passed"
    assert outcomes["padding"] == "not applicable"


@pytest.mark.slow
def test_a_published_detector_passes_its_checks_in_a_process_without_the_package(folder):
    assert check_folder(folder)["model_class"] == "FADetrForObjectDetection"
