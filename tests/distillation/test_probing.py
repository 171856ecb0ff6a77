"""Protects downstream scores: each piece's own embedding, folds that keep families together, both models alike."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from repository import load_script
from tiny_models import build, make_tokenizer, randomize, tiny_config
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from fa_transformers import FABertConfig, FABertModel
from fa_transformers.conversion.convert import convert_checkpoint
from fa_transformers.data.collators import TextCollator
from fa_transformers.data.examples import TokenizedRows
from fa_transformers.data.facts import DataFacts
from fa_transformers.data.readers.tables import DataError
from fa_transformers.distillation.probing import LabelledPieces, embed_pieces, load_labelled_images, probe

FACTS = DataFacts(name="data", license="unknown", attribution="nobody")
WORDS = ["red", "blue", "green", "one"]


def labelled_by(labels: np.ndarray, groups: np.ndarray | None = None) -> LabelledPieces:
    return LabelledPieces(FACTS, [], labels, ["no", "yes"], groups)


def test_embeddings_stand_in_the_order_of_the_pieces_and_are_what_each_has_alone():
    tokenizer = make_tokenizer(WORDS, max_length=64)
    model = build(FABertConfig, FABertModel, vocab_size=len(tokenizer)).train()
    lengths = [9, 3, 20, 5, 3, 14]
    rows = [torch.randint(5, len(tokenizer), (length,)).tolist() for length in lengths]
    pieces = TokenizedRows(datasets.Dataset.from_dict({"input_ids": rows, "length": lengths}))
    found = embed_pieces(model, pieces, TextCollator(tokenizer), batch_size=2, pooling="mean")
    assert model.training
    with torch.inference_mode():
        alone = [model.eval()(torch.tensor([row])).last_hidden_state[0].mean(dim=0) for row in rows]
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=0)


def test_probe_finds_what_is_there_and_nothing_where_labels_are_random():
    random = np.random.default_rng(0)
    labels = random.integers(2, size=200)
    noise = torch.randn(200, 8)
    assert probe(noise + 6 * torch.from_numpy(labels)[:, None], labelled_by(labels), seed=0) > 0.95
    assert abs(probe(noise, labelled_by(labels), seed=0) - 0.5) < 0.12


def test_what_belongs_together_is_never_divided_between_folds():
    # Twenty copies of each of ten vectors, whose labels say nothing to the others: only a copy tells a copy's label.
    groups = np.repeat(np.arange(10), 20)
    labels = (groups % 2).astype(int)
    embeddings = torch.randn(10, 32)[groups]
    assert probe(embeddings, labelled_by(labels), seed=0) == 1.0
    assert probe(embeddings, labelled_by(labels, groups), seed=0) < 0.8


def test_too_few_classes_and_too_few_pieces_of_one_are_named():
    with pytest.raises(DataError, match="one class, 'no'"):
        LabelledPieces(FACTS, [], np.zeros(9, dtype=int), ["no"])
    with pytest.raises(DataError, match="'yes' has 4 pieces; a probe needs 5"):
        labelled_by(np.array([0] * 9 + [1] * 4))


@pytest.fixture
def colours(tmp_path) -> Path:
    """Six reddish and six bluish pictures, and a file that is no picture."""
    random = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for index in range(6):
            pixels = random.integers(0, 90, (20, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "colours" / name / f"{index}.png")
    (tmp_path / "colours" / "red" / "notes.pdf").write_bytes(b"%PDF-1.4")
    return tmp_path / "colours"


def test_images_are_found_by_class_and_files_that_cannot_be_read_are_none(colours):
    labelled = load_labelled_images(colours, ViTImageProcessor(size={"height": 16, "width": 16}), 16)
    assert labelled.label_names == ["blue", "red"] and labelled.labels.tolist() == [0] * 6 + [1] * 6
    assert labelled.majority == 0.5
    with pytest.raises(DataError, match="has 1 class folders"):
        load_labelled_images(colours, ViTImageProcessor(), 16, ["red"])


def test_script_scores_teacher_and_student_at_every_size(tmp_path, colours):
    stock, student = tmp_path / "stock", tmp_path / "student"
    randomize(ViTModel(tiny_config(ViTConfig, image_size=16, patch_size=4), add_pooling_layer=False)).save_pretrained(
        stock
    )
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(stock)
    convert_checkpoint(stock, softmax_layers=[0, 1]).model.save_pretrained(student)
    script = load_script("linear_probe")
    flags = ["--image_folder", colours, "--teacher", stock, "--student", student, "--image_sizes", 16, 24]
    result = script.main([*map(str, flags), "--output_dir", str(tmp_path / "probe")])
    assert [row["image size"] for row in result["rows"]] == [16, 24] and result["num_images"] == 12
    for row in result["rows"]:
        assert row["student"] == row["teacher"] and row["cosine"] == pytest.approx(1.0, abs=1e-5)
