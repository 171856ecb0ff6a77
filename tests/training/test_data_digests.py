"""Protects a resumed run from other data: what changed is named, and data that is equal is equal by every route."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from fa_transformers.data.facts import DataFacts
from fa_transformers.data.labelled import LabelledData
from fa_transformers.data.readers.images import load_image_folder
from fa_transformers.studies.from_scratch import ArrayExamples
from fa_transformers.training.checkpointing import CheckpointError, TrainingState, load_checkpoint, save_checkpoint
from fa_transformers.training.data_digests import digest_contents, digest_data, digest_examples, digest_weights

TEXTS, LABELS = ["red sea", "blue law", "green sky"], [0, 1, 0]


def labelled(train: tuple = (TEXTS, LABELS), validation: tuple = (TEXTS, LABELS), names: tuple = ("a", "b")):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    splits = {
        split: datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
        for split, (texts, labels) in (("train", train), ("validation", validation))
    }
    facts = DataFacts(name="d", license="l", attribution="a")
    return LabelledData(datasets.DatasetDict(splits), "single_label_classification", list(names), facts, False)


def resume(tmp_path: Path, before: LabelledData, now: LabelledData) -> None:
    settings = [{"data": digest_data(data)} for data in (before, now)]
    accelerator = Accelerator(cpu=True)
    checkpoint = save_checkpoint(accelerator, tmp_path, TrainingState(settings[0], step=1))
    load_checkpoint(accelerator, checkpoint, settings[1])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": (["red law", "blue sea", "green sky"], LABELS)}, "the documents of train changed"),
        ({"train": (TEXTS, [1, 0, 1])}, "the labels of train changed"),
        ({"validation": (TEXTS, [0, 0, 0])}, "the labels of validation changed"),
        ({"names": ("b", "a")}, "the names of the classes changed"),
        ({"train": (TEXTS[::-1], LABELS)}, "the documents of train changed"),
        ({"train": (["red seab", "lue law", "green sky"], LABELS)}, "the documents of train changed"),
    ],
)
def test_resuming_on_changed_data_is_refused_and_what_changed_is_named(changes, named, tmp_path):
    with pytest.raises(CheckpointError, match=f"was made with other data: {named} since. Resume with the data"):
        resume(tmp_path, labelled(), labelled(**changes))


def test_a_split_that_is_drawn_otherwise_is_refused(tmp_path):
    before, now = labelled(), labelled()
    parts = now.dataset["train"].train_test_split(test_size=1, seed=1)
    now = replace(now, dataset=datasets.DatasetDict({"train": parts["train"], "validation": parts["test"]}))
    with pytest.raises(CheckpointError, match="the documents of train, .*the documents of validation"):
        resume(tmp_path, before, now)


def test_the_same_data_goes_on(tmp_path):
    shuffled = labelled()
    order = shuffled.dataset["train"].select([2, 1, 0]).select([2, 1, 0])  # equal rows, through other indices
    shuffled.dataset["train"] = order
    resume(tmp_path, labelled(), shuffled)


def test_images_that_changed_are_noticed_and_a_folder_that_moved_is_not(tmp_path):
    for label, colour in (("dark", 20), ("light", 220)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(6):
            pixels = np.full((16, 16, 3), colour + index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")

    def digests(folder: Path) -> dict:
        return digest_data(replace(labelled(), dataset=load_image_folder(folder)))

    before = digests(tmp_path / "images")
    (tmp_path / "images").rename(tmp_path / "moved")
    assert digests(tmp_path / "moved") == before
    for path in sorted((tmp_path / "moved" / "dark").iterdir()):
        Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(path)
    after = digests(tmp_path / "moved")
    assert {name for name in after if after[name] != before[name]} & {"the images of train"}


def test_a_change_within_a_large_uncompressed_image_is_noticed(tmp_path):
    pixels = np.zeros((300, 300, 3), np.uint8)  # 270 kB

    def digest() -> str:
        Image.fromarray(pixels).save(tmp_path / "a.bmp")
        rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.bmp")]}).cast_column("image", datasets.Image())
        return digest_contents({"train": rows})["the images of train"]

    before = digest()
    pixels[100:130] = 200
    assert digest() != before


def test_examples_of_a_study_are_told_apart_by_tokens_labels_and_split():
    def digests(tokens: list[int], label: int) -> dict[str, str]:
        examples = ArrayExamples([np.array(tokens), np.array([4])], [label, 0], first_token=1)
        return digest_examples({"train": examples, "validation": ArrayExamples([np.array([7])], [0], 1)})

    before = digests([2, 3], 0)
    assert list(before) == ["the examples of train", "the examples of validation"] and before == digests([2, 3], 0)
    for now in (digests([3, 2], 0), digests([2, 3], 1)):
        assert [name for name in before if before[name] != now[name]] == ["the examples of train"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_told_apart_by_any_bit(dtype):
    model = torch.nn.BatchNorm1d(3).to(dtype)  # with a number that has no axes
    before = digest_weights(model)
    assert digest_weights(model) == before
    with torch.no_grad():
        model.bias[1] = -0.0
    assert digest_weights(model) != before


def test_of_a_stream_the_source_counts():
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "x"}]))
    data = replace(labelled(), stream=stream)
    digests = digest_data(data)
    assert "the documents of train" not in digests and "the stream" in digests
    renamed = replace(data, facts=replace(data.facts, name="other"))
    assert digest_data(renamed)["the stream"] != digests["the stream"]
