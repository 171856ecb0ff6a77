"""Protects the recovery of detectors: what their objectives compare and train, and a run from images to a folder."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_detectors import every_detector, images, sizes
from tiny_distillation import grouped, run_values
from tiny_models import randomize
from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, DetrImageProcessor

from fa_transformers import FAConditionalDetrForObjectDetection, convert_checkpoint, distill
from fa_transformers.data.collators import DetectorCollator
from fa_transformers.distillation.detectors import DetectorDistillation, box_difference
from fa_transformers.training.attention_transfer import AttentionTransfer, mixers, relative_error


def make_pair(stock_config, stock_class, **fields):
    """A student and its teacher, in float64."""
    stock = randomize(stock_class(stock_config(**sizes())))
    teacher = convert_checkpoint(stock, softmax_layers=[0, 1]).model.double().eval().requires_grad_(False)
    return convert_checkpoint(stock, **fields).model.double().eval(), teacher


@every_detector
def test_a_student_equal_to_its_teacher_has_no_loss_and_the_encoder_alone_trains(
    stock_config, stock_class, config_class, model_class
):
    same, teacher = make_pair(stock_config, stock_class, softmax_layers=[0, 1])
    output = DetectorDistillation(same, teacher)(**images())
    assert output.loss.abs() < 2.0**-20 and output.layer_errors.abs().max() == 0.0
    student, teacher = make_pair(stock_config, stock_class, key_feature_size=16, local_kernel_size=3)
    objective = DetectorDistillation(student, teacher).train()
    loss = objective(**images()).loss
    loss.backward()
    assert loss > 1e-3 and objective(**images()).loss == loss  # no dropout
    trained = {name for name, weight in student.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in student.named_parameters() if name.startswith("model.encoder.")}


@every_detector
def test_the_loss_is_of_the_last_state_the_logits_and_the_boxes(stock_config, stock_class, config_class, model_class):
    student, teacher = make_pair(stock_config, stock_class, softmax_layers=[0, 1])
    objective = DetectorDistillation(student, teacher)
    for part in (student.class_labels_classifier, student.bbox_predictor, student.model.encoder.layers[1]):
        before = {name: weight.clone() for name, weight in part.state_dict().items()}
        with torch.no_grad():
            randomize(part, seed=7)
            assert objective(**images()).loss > 1e-3
            part.load_state_dict(before)
    assert objective(**images()).loss.abs() < 2.0**-20


@every_detector
def test_transfer_compares_each_layer_on_the_teachers_inputs_over_real_places(
    stock_config, stock_class, config_class, model_class
):
    student, teacher = make_pair(stock_config, stock_class, key_feature_size=16, local_kernel_size=3)
    output = AttentionTransfer(student, teacher)(**images())
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[1, 2:] = False  # the last row of places is padding
    expected = []
    for index, layer in enumerate(teacher.model.encoder.layers):
        seen = []
        handle = layer.self_attn.register_forward_hook(lambda module, inputs, result, seen=seen: seen.append(result[0]))
        teacher(**images())
        own, layer.self_attn.mixer = layer.self_attn.mixer, mixers(student)[index]
        teacher(**images())
        layer.self_attn.mixer = own
        handle.remove()
        expected.append(relative_error(seen[1], seen[0], mask.flatten(1)))
    torch.testing.assert_close(output.layer_errors, torch.stack(expected), rtol=2.0**-18, atol=0.0)
    output.loss.backward()
    assert all(".mixer." in name for name, weight in student.named_parameters() if weight.grad is not None)


def test_boxes_of_queries_without_an_object_do_not_count():
    logits = torch.tensor([[[20.0, -20.0], [-20.0, 20.0]]])  # an object, and none
    boxes = torch.zeros(1, 2, 4)
    wrong = torch.tensor([[[0.5] * 4, [0.0] * 4]]), torch.tensor([[[0.0] * 4, [0.5] * 4]])
    assert box_difference(wrong[0], boxes, logits, False) == pytest.approx(0.5)
    assert box_difference(wrong[1], boxes, logits, False) < 1e-6
    assert box_difference(wrong[1], boxes, logits, True) == pytest.approx(0.25)  # the second class is one of its own


def test_images_of_a_batch_are_padded_right_and_bottom_and_the_mask_says_so():
    examples = [{"pixel_values": torch.ones(3, 2, 4)}, {"pixel_values": torch.ones(3, 3, 1)}]
    batch = DetectorCollator()(examples)
    assert batch["pixel_values"].shape == (2, 3, 3, 4)
    assert batch["pixel_mask"].tolist()[1] == [[1, 0, 0, 0]] * 3
    assert (batch["pixel_values"] == batch["pixel_mask"][:, None]).all()


@pytest.fixture
def detector(tmp_path):
    """The arguments of `distill` for a stock detector and images of several sizes, in a folder."""
    stock = randomize(ConditionalDetrForObjectDetection(ConditionalDetrConfig(**sizes())))
    stock.save_pretrained(tmp_path / "stock")
    DetrImageProcessor(do_resize=False).save_pretrained(tmp_path / "stock")
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for index in range(24):
        pixels = random.integers(256, size=(64 + 32 * (index % 2), 96, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "validation").mkdir()
    for index in range(4):
        (tmp_path / "photos" / f"{index}.png").rename(tmp_path / "photos" / "validation" / f"{index}.png")
    values = run_values(tmp_path, tmp_path / "stock", image_folder=tmp_path / "photos", transfer_steps=4)
    left_out = ("train_file", "validation_file", "max_length", "local_window", "max_tokens_per_batch")
    return {name: value for name, value in values.items() if name not in left_out}


def test_detectors_are_distilled_on_images_of_any_size_to_a_folder_with_receipt_and_card(detector, tmp_path):
    result = distill(task="object-detection", **grouped(detector | {"end_to_end_steps": 4, "license": "mit"}))
    assert type(result.model) is FAConditionalDetrForObjectDetection
    assert [stage["stage"] for stage in result.stages] == ["transfer", "end_to_end"]
    assert all(stage["after"]["loss"] < stage["before"]["loss"] for stage in result.stages)
    assert result.similarity["same kinds"]["after"]["num_samples"] == 4
    loaded = FAConditionalDetrForObjectDetection.from_pretrained(tmp_path / "out")
    assert loaded.config.recovery == "distilled" and loaded.config.local_kernel_size == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "FA-DETR (stock) distilled" in card and "pipeline_tag: object-detection" in card
    seen = json.loads((tmp_path / "out" / "recovery.json").read_text())["tokens"]
    assert seen == 2 * (8 + 8 + 4 + 8) and f"; {seen} images, seed" in card
    # What the decoder, the heads and the backbone are was not touched.
    before = convert_checkpoint(tmp_path / "stock").model.state_dict()
    changed = [name for name, value in loaded.state_dict().items() if name in before and not value.equal(before[name])]
    assert changed and all(name.startswith("model.encoder.") for name in changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "needs a `model_name_or_path`"),
        ({"image_size": 64}, "`image_size=64`"),
        ({"pooling": "cls"}, "`pooling='cls'`"),
        ({"probe_folder": "photos"}, "`probe_folder` is not for"),
    ],
)
def test_what_detectors_have_no_use_for_is_refused(detector, changes, message):
    with pytest.raises(ValueError, match=message):
        distill(task="object-detection", **grouped(detector | changes))


def test_a_detector_needs_its_own_task(detector):
    with pytest.raises(ValueError, match="`task='images'`: .* is of type 'conditional_detr'"):
        distill(task="images", **grouped(detector))
