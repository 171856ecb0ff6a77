"""Protects the figures of speed on a card: at the lengths that were asked for, cut to what a model can take."""

import pytest
import torch

from fa_transformers import (
    FABertConfig,
    FABertForMultipleChoice,
    FABertForSequenceClassification,
    FAViTConfig,
    FAViTForImageClassification,
)
from fa_transformers.hub import timing
from fa_transformers.hub.timing import describe_hardware, measure_speed, time_by_length, time_image

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def text_model(model_class=FABertForSequenceClassification, **fields):
    return model_class(FABertConfig(vocab_size=50, **SIZES, **fields))


def lengths_of(speed) -> list[int]:
    return [row.length for row in speed]


@pytest.mark.parametrize("is_training", [True, False])
def test_text_is_timed_at_each_length_once_and_the_model_stays_in_its_mode(is_training):
    model = text_model(position_embedding_type="periodic").train(is_training)
    speed = time_by_length(model, (96, 16, 96, 32))
    assert lengths_of(speed) == [16, 32, 96]
    for row in speed:
        assert row.milliseconds >= 0 and row.softmax_milliseconds >= 0
    assert model.training == is_training and model.dropout.training == is_training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lengths_are_cut_to_the_positions_of_the_model_and_on_a_cpu_to_what_softmax_takes_in_seconds(monkeypatch):
    assert lengths_of(time_by_length(text_model(max_position_embeddings=64), (32, 64, 512, 4096))) == [32, 64]
    monkeypatch.setattr(timing, "LONGEST_TIMED_ON_CPU", 128)
    unlimited = text_model(max_position_embeddings=64, position_embedding_type="periodic")
    assert lengths_of(time_by_length(unlimited, (32, 512))) == [32, 128]


def test_memory_grows_linearly_with_the_length():
    short, long = time_by_length(text_model(position_embedding_type="periodic"), (512, 2048))
    assert long.mebibytes == pytest.approx(4 * short.mebibytes, rel=0.25)


def test_multiple_choice_models_are_timed_too():
    assert lengths_of(time_by_length(text_model(FABertForMultipleChoice), [16])) == [16]


@pytest.mark.parametrize(
    ("image_size", "num_patches"), [(32, 16), (33, 25), ((16, 64), 16)], ids=["square", "padded", "oblong"]
)
def test_images_are_timed_with_their_number_of_patches(image_size, num_patches):
    config = FAViTConfig(image_size=32, patch_size=8, num_channels=1, **SIZES)
    model = FAViTForImageClassification(config).to(torch.float64).train()
    speed = time_image(model, image_size)
    assert speed.length == num_patches and speed.milliseconds >= 0
    assert model.training


def test_a_softmax_model_that_runs_out_of_memory_is_left_out(monkeypatch):
    model = text_model(position_embedding_type="periodic").eval()
    forward = type(model).forward

    def fail(self, *args, **kwargs):
        if self.config.softmax_layers:
            raise torch.OutOfMemoryError
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", fail)
    row = measure_speed(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}, 8)
    assert (row.softmax_milliseconds, row.softmax_mebibytes) == (None, None) and row.milliseconds >= 0


def test_the_cpu_is_described_by_its_threads(monkeypatch):
    for number, words in ((1, "1 thread on"), (2, "2 threads on")):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert describe_hardware(torch.device("cpu")).startswith(words)
