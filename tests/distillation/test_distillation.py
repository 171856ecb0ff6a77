"""Protects the recovery of converted models: objectives that see what they should, stages that help, a true receipt."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from repository import SCRIPTS, load_script
from tiny_models import as_float64, build, image_inputs, make_tokenizer, randomize, text_inputs, tiny_config
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ViTImageProcessor,
)

from fa_transformers import (
    FABertConfig,
    FABertForQuestionAnswering,
    FABertForSequenceClassification,
    FABertModel,
    FAViTConfig,
    FAViTForImageClassification,
    FAViTModel,
    convert_checkpoint,
)
from fa_transformers.data.readers.images import find_split_folders
from fa_transformers.data.readers.tables import DataError
from fa_transformers.distillation.objectives import (
    AttentionTransfer,
    EndToEndDistillation,
    _hidden_states,
    embed_batches,
    evaluate_objective,
    group_student_parameters,
    head_loss,
    load_teacher,
    mixers,
    relative_error,
    similarity,
)
from fa_transformers.distillation.pieces import build_image_pieces
from fa_transformers.hub.card import ModelFacts
from fa_transformers.training.checkpointing import CheckpointError

WORDS = ["red", "blue", "green", "one", "two", "three", "alpha", "beta", "gamma", "delta"]
LOCAL = {"local_window": 2, "local_kernel_size": 3, "key_feature_size": 32}
ARCHITECTURES = [(FABertConfig, FABertModel, text_inputs), (FAViTConfig, FAViTModel, image_inputs)]


def pair(config_class, model_class, num_labels: int = 2, **fields):
    """A student, and the softmax model with the same weights."""
    teacher = build(config_class, model_class, num_labels=num_labels, softmax_layers=[0, 1]).double()
    teacher.requires_grad_(False)
    student = build(config_class, model_class, num_labels=num_labels, **fields).double()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(".mixer." in name for name in missing)
    return student, teacher


def inputs_of(make) -> dict:
    return as_float64(make("AutoModel") if make is text_inputs else make())


def test_relative_error_is_zero_for_the_target_and_one_for_its_mean_and_leaves_padding_out():
    target = torch.randn(3, 7, 5, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    real = target[mask]
    constant = real.mean(dim=0).expand_as(target)
    poisoned = target.masked_fill(~mask[:, :, None], 1e6)
    assert relative_error(poisoned, target, mask) == 0.0
    # float32 keeps 24 bits, and sums of 60 terms lose at most six of them.
    assert relative_error(constant, poisoned, mask).item() == pytest.approx(1.0, rel=2.0**-18)
    assert relative_error(target + 1.0, target, None).item() == pytest.approx(
        1.0 / target.flatten(0, 1).var(dim=0, correction=0).mean().item(), rel=2.0**-18
    )


@pytest.mark.parametrize(("config_class", "model_class", "make"), ARCHITECTURES)
def test_transfer_compares_each_layer_with_its_teacher_given_the_teachers_inputs(config_class, model_class, make):
    student, teacher = pair(config_class, model_class, **LOCAL)
    inputs = inputs_of(make)
    output = AttentionTransfer(student, teacher)(**inputs)

    # By hand: run the teacher, and swap the student's mixer in at one layer only.
    base = teacher.base_model
    expected = []
    for index, layer in enumerate(base.encoder.layer):
        seen = {}

        def keep(module, arguments, result, seen=seen):
            seen["result"] = result

        name = "self" if model_class is FABertModel else "attention"
        attention = layer.attention[name]
        handle = attention.register_forward_hook(keep)
        base(**inputs)
        target = layer.attention["output"].dense(seen["result"])
        own, attention.mixer = attention.mixer, mixers(student)[index]
        base(**inputs)
        found = layer.attention["output"].dense(seen["result"])
        attention.mixer = own
        handle.remove()
        expected.append(relative_error(found, target, inputs.get("attention_mask")))
    torch.testing.assert_close(output.layer_errors, torch.stack(expected), rtol=2.0**-18, atol=0.0)
    torch.testing.assert_close(output.loss, torch.stack(expected).mean(), rtol=2.0**-18, atol=0.0)


@pytest.mark.parametrize(("config_class", "model_class", "make"), ARCHITECTURES)
def test_transfer_trains_mixers_only_and_leaves_no_hook_behind(config_class, model_class, make):
    student, teacher = pair(config_class, model_class, **LOCAL)
    objective = AttentionTransfer(student, teacher)
    objective(**inputs_of(make)).loss.backward()
    with_gradient = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in student.named_parameters() if ".mixer." in name}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(mixer._forward_hooks for mixer in mixers(teacher))
    assert not any(name.startswith("_teacher") for name in objective.state_dict())


def test_layers_that_keep_softmax_have_no_error_and_do_not_count():
    student, teacher = pair(FABertConfig, FABertModel, softmax_layers=[1], **LOCAL)
    output = AttentionTransfer(student, teacher)(**inputs_of(text_inputs))
    assert output.layer_errors.isnan().tolist() == [False, True]
    assert output.loss == output.layer_errors[0]


def test_transfer_refuses_a_student_whose_mixers_have_nothing_to_train():
    student, teacher = pair(FABertConfig, FABertModel)
    with pytest.raises(ValueError, match="key_feature_size"):
        AttentionTransfer(student, teacher)


@pytest.mark.parametrize(("config_class", "model_class", "make"), ARCHITECTURES)
def test_a_student_equal_to_its_teacher_has_no_end_to_end_loss(config_class, model_class, make):
    student, teacher = pair(config_class, model_class, softmax_layers=[0, 1])
    output = EndToEndDistillation(student, teacher, "mean")(**inputs_of(make))
    assert output.loss.abs() < 2.0**-20 and output.layer_errors.abs().max() == 0.0
    worse = randomize(pair(config_class, model_class, softmax_layers=[0, 1])[0], seed=5)
    assert EndToEndDistillation(worse, teacher, "cls")(**inputs_of(make)).loss > 0.5


@pytest.mark.parametrize("objective_class", [AttentionTransfer, EndToEndDistillation])
def test_padding_changes_no_objective(objective_class):
    student, teacher = pair(FABertConfig, FABertModel, **LOCAL)
    options = () if objective_class is AttentionTransfer else ("mean",)
    objective = objective_class(student, teacher, *options)
    inputs = inputs_of(text_inputs)
    padded = {name: nn.functional.pad(tensor, (3, 4)) for name, tensor in inputs.items()}
    torch.testing.assert_close(objective(**padded).loss, objective(**inputs).loss, rtol=2.0**-18, atol=0.0)


def test_logits_of_a_head_count_and_labels_are_no_input():
    student, teacher = pair(FABertConfig, FABertForSequenceClassification, softmax_layers=[0, 1])
    inputs = inputs_of(text_inputs) | {"labels": torch.tensor([0, 1])}
    objective = EndToEndDistillation(student, teacher, "mean")
    assert objective(**inputs).loss.abs() < 2.0**-20
    with torch.no_grad():
        student.classifier.weight.neg_()
    assert objective(**inputs).loss > 1e-3


def test_long_documents_reach_the_teacher_in_windows_that_it_reads_as_it_would_alone():
    student, teacher = pair(FABertConfig, FABertModel, max_position_embeddings=64, **LOCAL)
    objective = EndToEndDistillation(student, teacher, "mean", teacher_length=8)
    ids = torch.randint(1, 60, (2, 21))
    mask = torch.arange(21) < torch.tensor([21, 10])[:, None]
    joined = objective.ask_teacher({"input_ids": ids * mask, "attention_mask": mask.long()})
    for row, length in ((0, 21), (1, 10)):
        for start in range(0, length, 8):
            alone = teacher(ids[row : row + 1, start : min(start + 8, length)], output_hidden_states=True)
            stop = min(start + 8, length)
            torch.testing.assert_close(
                joined.hidden_states[1][row, start:stop], alone.hidden_states[1][0], rtol=0.0, atol=2.0**-40
            )
            torch.testing.assert_close(
                joined.last_hidden_state[row, start:stop], alone.last_hidden_state[0], rtol=0.0, atol=2.0**-40
            )


def test_the_embedding_of_a_long_text_is_the_mean_over_the_windows_that_the_teacher_reads():
    _, teacher = pair(FABertConfig, FABertModel, max_position_embeddings=64, **LOCAL)
    ids = torch.randint(1, 60, (1, 21))
    loader = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    accelerator = Accelerator(cpu=True)
    found = embed_batches(teacher, loader, accelerator, "mean", window=8)
    windows = [teacher(part).last_hidden_state[0] for part in ids.split(8, dim=1)]
    torch.testing.assert_close(found[0], torch.cat(windows).mean(dim=0).float(), rtol=0.0, atol=2.0**-20)
    whole = embed_batches(teacher, loader, accelerator, "mean", window=21)
    assert whole.equal(embed_batches(teacher, loader, accelerator, "mean"))
    assert not torch.allclose(whole, found, atol=1e-3)


def test_dropout_is_off_while_the_student_learns_and_layers_still_train():
    student, teacher = pair(FABertConfig, FABertModel, hidden_dropout_prob=0.5, softmax_layers=[1], **LOCAL)
    objective = EndToEndDistillation(student, teacher, "mean").train()
    assert student.encoder.layer[0].training and not student.encoder.layer[0].output.dropout.training
    inputs = inputs_of(text_inputs)
    assert objective(**inputs).loss == objective(**inputs).loss


def test_old_weights_and_mixers_have_rates_of_their_own_and_mixers_no_decay():
    student, teacher = pair(FABertConfig, FABertModel, **LOCAL)
    groups = group_student_parameters(EndToEndDistillation(student, teacher, "mean"), 1e-4, 1e-3, 0.1)
    mixed = {id(p) for name, p in student.named_parameters() if ".mixer." in name}
    for group in groups:
        for parameter in group["params"]:
            assert (group["lr"] == 1e-3) == (id(parameter) in mixed)
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1 and id(parameter) not in mixed)
    # All but the pooler, which the loss does not reach.
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters())) - 2


@pytest.mark.parametrize(("config_class", "model_class", "make"), ARCHITECTURES)
def test_every_weight_that_trains_gets_a_gradient_as_several_processes_need(config_class, model_class, make):
    student, teacher = pair(config_class, model_class, **LOCAL)
    objective = EndToEndDistillation(student, teacher, "cls")
    objective(**inputs_of(make)).loss.backward()
    assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_answers_are_learnt_over_real_tokens_whatever_padding_holds():
    student, teacher = pair(FABertConfig, FABertForQuestionAnswering, softmax_layers=[0, 1])
    objective = EndToEndDistillation(student, teacher, "mean")
    ids, mask = torch.randint(1, 60, (2, 12)), torch.arange(12) < torch.tensor([12, 7])[:, None]
    assert objective(input_ids=ids, attention_mask=mask.long()).loss.abs() < 2.0**-20
    with torch.no_grad():
        student.qa_outputs.weight[0].mul_(-100.0)
    loss = objective(input_ids=ids, attention_mask=mask.long()).loss
    starts = [model(ids, attention_mask=mask.long()).start_logits for model in (teacher, student)]
    expected = 0.0
    for row, length in ((0, 12), (1, 7)):
        wanted, found = (rows[row, :length].float().log_softmax(dim=0) for rows in starts)
        expected += (wanted.exp() * (wanted - found)).sum() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-3
    loss.backward()
    assert student.qa_outputs.weight.grad.abs().sum() > 0


def test_heads_that_tell_numbers_or_several_labels_are_taught_too():
    student, teacher = pair(FABertConfig, FABertForSequenceClassification, num_labels=1, **LOCAL)
    inputs = text_inputs("AutoModel")
    with torch.no_grad():
        student.classifier.bias += 3.0
    EndToEndDistillation(student, teacher, "mean")(**inputs).loss.backward()
    assert student.classifier.bias.grad.item() > 0.0  # back down
    logits, expected = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    p, q = torch.sigmoid(expected), torch.sigmoid(logits)
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    found = head_loss(logits, expected, None, "multi_label_classification")
    torch.testing.assert_close(found, wanted.float(), rtol=2.0**-18, atol=0.0)  # float32
    assert head_loss(expected, expected, None, "multi_label_classification") == 0.0
    assert head_loss(expected + 7, expected, None, "multi_label_classification") > 0.1  # a shift changes every label
    assert head_loss(expected + 7, expected, None, None).abs() < 2.0**-20  # and no class
    assert head_loss(expected + 2, expected, None, "regression") == pytest.approx(4.0)


def test_with_a_head_the_embedding_is_of_the_state_that_the_encoder_returns():
    student, teacher = pair(FAViTConfig, FAViTForImageClassification, **LOCAL)
    inputs = as_float64(image_inputs())
    with torch.no_grad():
        teacher.base_model.layernorm.bias += torch.randn(teacher.config.hidden_size)
        expected = EndToEndDistillation(teacher, teacher, "cls")(**inputs).layer_errors
        last = teacher.base_model(**inputs).last_hidden_state
        states = _hidden_states(teacher(**inputs, output_hidden_states=True), teacher.base_model)
    torch.testing.assert_close(states[-1], last, rtol=0.0, atol=0.0)
    assert len(expected) == teacher.config.num_hidden_layers + 1
    objective = EndToEndDistillation(student, teacher, "cls")
    objective(**inputs).loss.backward()
    assert [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


def test_on_long_texts_the_head_rests_and_all_that_trains_gets_a_gradient():
    student, teacher = pair(FABertConfig, FABertForSequenceClassification, max_position_embeddings=64, **LOCAL)
    objective = EndToEndDistillation(student, teacher, "mean", teacher_length=8)
    for length in (21, 8):
        objective.zero_grad()
        objective(input_ids=torch.randint(1, 60, (2, length))).loss.backward()
        trained = dict(objective.named_parameters())
        assert [name for name, p in trained.items() if p.requires_grad and p.grad is None] == []
        assert trained and not any("classifier" in name for name in trained)
    assert objective.student is student.base_model


@pytest.mark.parametrize("stock_class", [transformers.RobertaModel, transformers.DistilBertModel])
def test_teachers_of_other_architectures_load_as_the_converter_reads_them(stock_class, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if stock_class is transformers.DistilBertModel:
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    stock = stock_class(stock_class.config_class(vocab_size=60, **sizes))
    stock.save_pretrained(tmp_path)
    student = convert_checkpoint(tmp_path, local_window=2, local_kernel_size=3).model
    teacher = load_teacher(str(tmp_path), "AutoModel", student)
    assert teacher.config.softmax_layers == [0, 1] and not any(p.requires_grad for p in teacher.parameters())
    AttentionTransfer(student, teacher)(input_ids=torch.arange(5, 15)[None]).loss.backward()


def test_a_head_that_the_teacher_lacks_is_refused(stock):
    student = build(FABertConfig, FABertForSequenceClassification, vocab_size=15)
    with pytest.raises(ValueError, match="has no classifier"):
        load_teacher(str(stock), "AutoModelForSequenceClassification", student)


def test_similarity_of_equal_embeddings_is_one_and_a_rotation_keeps_only_the_pairs():
    embeddings = torch.randn(20, 8)
    same = similarity(embeddings, embeddings)
    assert same["cosine"] == pytest.approx(1.0) and same["correlation"] == pytest.approx(1.0)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    rotated = similarity(embeddings @ rotation, embeddings)
    assert rotated["correlation"] == pytest.approx(1.0, abs=1e-5) and rotated["cosine"] < 0.9


def test_the_mean_over_batches_is_what_evaluation_reports():
    student, teacher = pair(FABertConfig, FABertModel, softmax_layers=[1], **LOCAL)
    objective = AttentionTransfer(student, teacher)
    batches = [text_inputs("AutoModel", seed=seed) for seed in range(3)]
    AcceleratorState._reset_state(reset_partial_state=True)
    report = evaluate_objective(objective, batches, Accelerator(cpu=True))
    losses = [objective(**batch).loss.item() for batch in batches]
    assert report["loss"] == pytest.approx(sum(losses) / 3)
    assert report["layer_errors"][1] is None and report["layer_errors"][0] == pytest.approx(report["loss"])


@pytest.fixture
def stock(tmp_path, monkeypatch) -> Path:
    """A stock BERT with random weights whose attention is not flat, and a word-level tokenizer."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "stock"
    tokenizer = make_tokenizer(WORDS, max_length=64)
    tokenizer.save_pretrained(folder)
    config = tiny_config(BertConfig, vocab_size=len(tokenizer))
    randomize(BertModel(config)).bfloat16().save_pretrained(folder)
    return folder


def as_sentence_model(folder: Path, **modes: bool | str | list[str]) -> Path:
    """Put the pooling of a sentence-transformers model beside a checkpoint."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    rows = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    return folder


def test_the_embedding_is_what_the_sentence_model_makes(tmp_path, stock):
    distill = load_script("distill")
    args = distill.parse_args(distill_flags(tmp_path, stock, "out"))
    assert distill.choose_pooling(args, str(stock)) == "mean"
    as_sentence_model(stock, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert distill.choose_pooling(args, str(stock)) == "cls"
    as_sentence_model(stock, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    args.pooling = "cls"
    with pytest.raises(ValueError, match="--pooling cls: .* makes its embeddings by 'mean'"):
        distill.choose_pooling(args, str(stock))
    for modes, named in (
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, "pooling_mode_max_tokens, pooling_mode"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["mean", "max"]}, "mean, max"),
        ({"pooling_mode": []}, "nothing"),
    ):
        as_sentence_model(stock, **modes)
        with pytest.raises(ValueError, match=f"pools by {named}"):
            distill.choose_pooling(args, str(stock))
    as_sentence_model(stock, pooling_mode="cls")
    assert distill.choose_pooling(args, str(stock)) == "cls"
    args.long_length = 128
    with pytest.raises(ValueError, match="--long_length needs mean pooling"):
        distill.choose_pooling(args, str(stock))


def test_a_wrong_flag_is_named_before_the_teacher_is_looked_for(tmp_path):
    distill = load_script("distill")
    with pytest.raises(ValueError, match="nothing to train"):
        distill.main(
            distill.parse_args(
                ["--teacher_name_or_path", "nobody/absent", "--transfer_steps", "0", "--end_to_end_steps", "0"]
            )
        )


def test_a_converted_model_needs_its_teacher_named(tmp_path, stock):
    convert_checkpoint(stock, output_dir=tmp_path / "converted", local_window=2)
    distill = load_script("distill")
    flags = distill_flags(tmp_path, tmp_path / "converted", "out", "--key_feature_size", "32")
    flags = [flag for flag in flags if flag not in ("--key_feature_size", "32", "--local_kernel_size", "3")]
    with pytest.raises(ValueError, match="is a factorized model; give .*--teacher_name_or_path"):
        distill.main(distill.parse_args(flags))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.csv", 'text\nred\n""\nblue\ngreen\n', "row 2 of the texts has None"),
        ("texts.tsv", "text\tnumber\nred\t1\nblue\t2\ngreen\t3\n", "no document has 32 tokens"),
        ("texts.xml", "red", "give one of .jsonl"),
    ],
)
def test_unlabelled_files_that_cannot_be_used_are_named(tmp_path, stock, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    distill = load_script("distill")
    flags = distill_flags(tmp_path, stock, "out", "--train_file", path, "--validation_file", path)
    with pytest.raises(DataError, match=message):
        distill.main(distill.parse_args(flags))


def test_images_of_a_named_data_set_are_distilled_on(tmp_path):
    generator = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(200)]
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"photo": pictures, "label": ["x"] * 200}, features=features)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    args = load_script("distill").parse_args(
        ["--task", "images", "--dataset_name", str(tmp_path / "data"), "--image_column_name", "photo"]
    )
    data = build_image_pieces(args, ViTImageProcessor(size={"height": 16, "width": 16}), 16)
    assert len(data.train(0)) == 196 and len(data.validation) == 4
    assert data.collate([data.train(0)[0]])["pixel_values"].shape == (1, 3, 16, 16)
    args.image_column_name = "label"
    with pytest.raises(DataError, match="'label' holds no images"):
        build_image_pieces(args, ViTImageProcessor(), 16)
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "other")
    args.dataset_name = str(tmp_path / "other")
    with pytest.raises(DataError, match=r"no split 'train', only \['test'\]"):
        build_image_pieces(args, ViTImageProcessor(), 16)


def paint(folder: Path, level: int, count: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        PIL.Image.new("L", (16, 16), level + index % 10).save(folder / f"{index:03}.png")


def levels_of(pieces) -> set[int]:
    """The tens of the grey levels of images that `paint` wrote."""
    return {round(float(pieces[index]["pixel_values"].mean() * 255)) // 10 * 10 for index in range(len(pieces))}


def test_images_of_a_folder_are_split_as_fine_tuning_splits_them(tmp_path):
    folder = tmp_path / "photos"
    for level, place in (
        (50, "train/dogs"),
        (60, "train/cats"),
        (200, "test/dogs"),
        (100, "val/dogs"),
        (110, "val/cats"),
    ):
        paint(folder / place, level, 30)
    (folder / "train" / "cats" / "._000.png").write_bytes(b"left by a file manager")
    distill = load_script("distill")
    options = dict(size={"height": 16, "width": 16}, do_normalize=False)
    flags = ["--task", "images", "--image_folder", str(folder), "--max_train_samples", "20", "--max_eval_samples", "10"]
    data = build_image_pieces(distill.parse_args(flags), ViTImageProcessor(**options), 16)
    assert levels_of(data.train(0)) == {50, 60} and len(data.train(0)) == 20  # the first 20 are all cats
    assert levels_of(data.heldout["same kinds"]) == {100, 110}
    (folder / "train").rename(folder / "dogs and cats")
    data = build_image_pieces(distill.parse_args(flags), ViTImageProcessor(**options), 16)
    assert levels_of(data.train(0)) == {50, 60} and levels_of(data.heldout["same kinds"]) == {100, 110}
    (folder / "val").rename(folder / "validation")
    paint(folder / "val", 220, 3)
    assert find_split_folders(folder)["validation"].name == "validation"
    shutil.rmtree(folder / "val")
    (folder / "validation").rename(folder / "val")
    (folder / "val").rename(folder / "birds")
    paint(folder / "frogs", 150, 100)
    data = build_image_pieces(distill.parse_args(flags[:4]), ViTImageProcessor(**options), 16)
    assert levels_of(data.train(0)) == {50, 60, 100, 110, 150} and len(data.train(0)) == 216
    (folder / "birds" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png: no image that Pillow can read"):
        build_image_pieces(distill.parse_args(flags[:4]), ViTImageProcessor(**options), 16)


def write_texts(path: Path, num: int, words: int = 80) -> Path:
    random = torch.Generator().manual_seed(num)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num):
            text = " ".join(WORDS[i] for i in torch.randint(10, (words,), generator=random).tolist())
            file.write(json.dumps({"text": text}) + "\n")
    return path


def distill_flags(tmp_path: Path, stock: Path, output: str, *more) -> list[str]:
    flags = ["--model_name_or_path", stock, "--train_file", write_texts(tmp_path / "texts.jsonl", 60)]
    flags += ["--validation_file", write_texts(tmp_path / "heldout.jsonl", 12)]
    flags += ["--max_length", 64, "--transfer_steps", 6, "--end_to_end_steps", 6, "--max_tokens_per_batch", 256]
    flags += ["--local_window", 2, "--local_kernel_size", 3, "--key_feature_size", 32, "--mixed_precision", "no"]
    flags += ["--report_to", "none", "--use_cpu", "--num_threads", 1, "--logging_steps", 1]
    return [str(flag) for flag in [*flags, "--output_dir", tmp_path / output, *more]]


def test_script_leaves_a_loadable_model_nearer_to_its_teacher_with_a_receipt(tmp_path, stock):
    distill = load_script("distill")
    labelled = tmp_path / "labelled.csv"
    rows = [f"{WORDS[index % 3]} {WORDS[3 + index % 7]},{index % 3}\n" for index in range(21)]
    labelled.write_text("text,label\n" + "".join(rows), encoding="utf-8")
    flags = distill_flags(tmp_path, stock, "out", "--long_steps", 2, "--long_length", 80, "--probe_file", labelled)
    receipt = distill.main(distill.parse_args(flags))
    figures = receipt["similarity"]["same kinds"]
    # Random weights embed all texts nearly alike, so that the cosine says little here; the errors tell.
    assert figures["after"]["cosine"] > 0.99
    assert receipt["similarity"]["same kinds, 65 to 80 tokens"]["after"]["num_samples"] == 12
    assert [stage["stage"] for stage in receipt["stages"]] == ["transfer", "end_to_end", "long"]
    assert all(stage["after"]["loss"] < stage["before"]["loss"] for stage in receipt["stages"][:2])
    assert receipt["tokens"] == sum(stage["train_tokens"] for stage in receipt["stages"]) > 0
    assert json.loads((tmp_path / "out" / "recovery.json").read_text()) == json.loads(json.dumps(receipt))
    assert receipt["pooling"] == "mean"
    downstream = receipt["downstream"]
    assert downstream["num_pieces"] == 21 and downstream["majority"] == pytest.approx(1 / 3)
    assert all(downstream[name] > 0.6 for name in ("teacher", "before", "after"))
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.config.local_window == 2 and loaded.dtype == torch.float32  # the stock weights were bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 80
    assert "recovery.json" in json.loads((tmp_path / "out" / "self_test.json").read_text())["files"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{figures['after']['cosine']:.4g}" in card and "before recovery" in card
    assert " ".join(f"{error:.3f}" for error in receipt["stages"][0]["after"]["layer_errors"]) in card
    assert "compared with its teacher on texts of up to 80 tokens" in card
    assert "labelled.csv" in card and f"{downstream['after']:.4g}" in card
    converted = load_script("distill").main(
        load_script("distill").parse_args(
            distill_flags(tmp_path, tmp_path / "out", "again", "--teacher_name_or_path", str(stock))
        )
    )
    assert converted["similarity"]["same kinds"]["before"]["cosine"] == pytest.approx(figures["after"]["cosine"])


def test_a_run_that_was_cut_between_stages_goes_on_and_ends_as_if_it_had_not_been(tmp_path, stock, monkeypatch):
    distill = load_script("distill")
    whole = distill.main(distill.parse_args(distill_flags(tmp_path, stock, "whole")))
    from fa_transformers.training import loop

    def cut(accelerator, output_dir, state, *rest, saved=loop.save_checkpoint):
        if output_dir.name == "end_to_end" and state.step == 4:
            raise KeyboardInterrupt
        return saved(accelerator, output_dir, state, *rest)

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(loop, "save_checkpoint", cut)
    flags = distill_flags(tmp_path, stock, "cut", "--save_steps", "2")
    with pytest.raises(KeyboardInterrupt):
        distill.main(distill.parse_args(flags))
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = distill.main(distill.parse_args([*flags, "--resume_from_checkpoint", "last"]))
    assert resumed["similarity"] == whole["similarity"]
    assert [stage["after"] for stage in resumed["stages"]] == [stage["after"] for stage in whole["stages"]]


def test_the_trackers_get_a_curve_of_each_stage_and_steps_that_never_go_back(tmp_path, stock, monkeypatch):
    logged: list[tuple[str, int]] = []
    log = Accelerator.log
    monkeypatch.setattr(
        Accelerator,
        "log",
        lambda self, values, step, **options: logged.extend((name, step) for name in values) or log(self, values, step),
    )
    distill = load_script("distill")
    distill.main(distill.parse_args(distill_flags(tmp_path, stock, "run")))
    steps = {stage: [step for name, step in logged if name == f"{stage}/loss"] for stage in ("transfer", "end_to_end")}
    assert steps == {"transfer": list(range(1, 7)), "end_to_end": list(range(7, 13))}
    assert ("end_to_end/eval_loss", 12) in logged


def test_the_encoder_alone_is_distilled_where_the_head_draws_pictures(tmp_path):
    config = tiny_config(transformers.ViTConfig, image_size=16, patch_size=8, encoder_stride=8)
    randomize(transformers.ViTForMaskedImageModeling(config)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    distill = load_script("distill")
    args = distill.parse_args(["--task", "images", "--image_size", "16", "--local_kernel_size", "3"])
    student, auto_class, _ = distill.build_student(args, str(tmp_path))
    assert auto_class == "AutoModel" and type(student) is FAViTModel


def test_the_receipt_of_a_stage_is_of_the_weights_that_are_kept(tmp_path, stock):
    distill = load_script("distill")
    more = ["--load_best_model_at_end", "--eval_steps", "2", "--transfer_steps", "0", "--end_to_end_steps", "8"]
    flags = distill_flags(tmp_path, stock, "best", *more, "--mixer_learning_rate", "1", "--learning_rate", "0.3")
    flags += ["--warmup_steps", "8"]  # so that every step is larger, and worse, than the one before
    (stage,) = distill.main(distill.parse_args(flags))["stages"]
    assert stage["best_step"] < 8
    AcceleratorState._reset_state(reset_partial_state=True)
    (again,) = distill.main(distill.parse_args([*flags, "--resume_from_checkpoint", "last"]))["stages"]
    assert again["after"] == stage["after"]


def test_only_what_was_interrupted_is_gone_on_with(tmp_path, stock):
    distill = load_script("distill")
    flags = distill_flags(tmp_path, stock, "run")
    with pytest.raises(CheckpointError, match="no stage in .* has a checkpoint"):
        distill.main(distill.parse_args([*flags, "--resume_from_checkpoint", "last"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    distill.main(distill.parse_args(flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    more = [*flags, "--resume_from_checkpoint", "last", "--transfer_steps", "9"]
    with pytest.raises(ValueError, match="--transfer_steps 9: .* went on to its next stage after 6"):
        distill.main(distill.parse_args(more))
    transfer = tmp_path / "run" / "transfer"
    (transfer / "checkpoint-6").rename(transfer / "damaged-checkpoint-6")  # the stage had ended, all the same
    (transfer / "checkpoint-4").mkdir()
    distill.check_resumed(distill.parse_args([*flags, "--resume_from_checkpoint", "last"]))


def test_a_sentence_model_with_its_encoder_in_a_subfolder_is_distilled_to_the_end(tmp_path, stock):
    old = tmp_path / "old"
    stock.rename(tmp_path / "encoder")
    old.mkdir()
    (tmp_path / "encoder").rename(old / "0_Transformer")
    as_sentence_model(old, pooling_mode_mean_tokens=True)
    modules = json.loads((old / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(modules))
    distill = load_script("distill")
    flags = distill_flags(tmp_path, old, "run", "--transfer_steps", 0, "--end_to_end_steps", 1)
    distill.main(distill.parse_args(flags))
    assert ModelFacts.load(tmp_path / "run" / "model_facts.json").base_model == "local/old"
    assert AutoModel.from_pretrained(tmp_path / "run").config.recovery == "distilled"


def test_a_tokenizer_without_a_length_gets_that_of_the_positions(tmp_path, stock):
    tokenizer = AutoTokenizer.from_pretrained(stock)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(stock)
    distill = load_script("distill")
    flags = distill_flags(tmp_path, stock, "run", "--position_embedding_type", "absolute", "--transfer_steps", "0")
    distill.main(distill.parse_args([*flags, "--end_to_end_steps", "1"]))
    longest = BertConfig.from_pretrained(stock).max_position_embeddings
    assert AutoTokenizer.from_pretrained(tmp_path / "run").model_max_length == longest
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=f"--long_length 4096 is above the student's {longest} positions"):
        distill.main(distill.parse_args([*flags, "--output_dir", str(tmp_path / "long"), "--long_length", "4096"]))


def test_a_teacher_of_another_shape_is_refused_by_name(tmp_path, stock):
    student = build(FABertConfig, FABertModel, hidden_size=48, num_attention_heads=3)
    with pytest.raises(ValueError, match="hidden_size 32, the student 48"):
        load_teacher(str(stock), "AutoModel", student)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--transfer_steps", "0", "--end_to_end_steps", "0"], "nothing to train"),
        (["--max_length", "16"], "--max_length must be at least 32 tokens"),
        (["--long_steps", "3"], "--long_steps needs a --long_length"),
        (["--long_length", "512", "--max_length", "512"], "--long_length 512 is for text, and must be above"),
        (["--long_length", "128", "--pooling", "cls"], "--long_length needs mean pooling"),
        (["--transfer_learning_rate", "0"], "--transfer_learning_rate"),
        (["--max_length", "512"], "--max_length 512 is above the teacher's"),
        (["--probe_folder", "photos"], "--probe_folder is not for --task text"),
    ],
)
def test_newcomers_mistakes_are_named(tmp_path, stock, more, message):
    distill = load_script("distill")
    with pytest.raises(ValueError, match=message):
        distill.main(distill.parse_args(distill_flags(tmp_path, stock, "out", *more)))


def test_too_little_text_and_fields_other_than_the_converted_ones_are_refused(tmp_path, stock):
    distill = load_script("distill")
    write_texts(tmp_path / "short.jsonl", 20, words=5)
    flags = distill_flags(tmp_path, stock, "out", "--train_file", str(tmp_path / "short.jsonl"))
    with pytest.raises(DataError, match="not enough text"):
        distill.main(distill.parse_args(flags))
    model = build(FABertConfig, FABertModel, local_window=3)
    model.save_pretrained(tmp_path / "converted")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="--key_feature_size 32: .* was converted with None"):
        distill.main(distill.parse_args(distill_flags(tmp_path, tmp_path / "converted", "out")))


def test_too_few_held_out_pieces_are_refused(tmp_path, stock):
    distill = load_script("distill")
    few = write_texts(tmp_path / "few.jsonl", 1, words=60)
    with pytest.raises(DataError, match="1 held-out pieces"):
        distill.main(distill.parse_args(distill_flags(tmp_path, stock, "out", "--validation_file", str(few))))


def test_a_head_is_kept_through_distillation(tmp_path, stock):
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(stock)
    randomize(BertForSequenceClassification(config)).save_pretrained(stock)
    distill = load_script("distill")
    distill.main(distill.parse_args(distill_flags(tmp_path, stock, "out")))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["architectures"] == ["FABertForSequenceClassification"]


@pytest.mark.slow
def test_two_processes_distil_a_model_with_a_head_through_all_stages(tmp_path, stock):
    randomize(BertForMaskedLM(BertConfig.from_pretrained(stock))).save_pretrained(stock)
    long = write_texts(tmp_path / "long.jsonl", 12, words=100)
    flags = distill_flags(tmp_path, stock, "two", "--long_steps", 3, "--long_length", 96, "--train_file", long)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*launcher, SCRIPTS / "distill.py", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    receipt = json.loads((tmp_path / "two" / "recovery.json").read_text())
    assert [stage["steps"] for stage in receipt["stages"]] == [6, 6, 3]
    assert receipt["similarity"]["same kinds, 65 to 96 tokens"]["after"]["num_samples"] == 12
    assert json.loads((tmp_path / "two" / "config.json").read_text())["architectures"] == ["FABertForMaskedLM"]
