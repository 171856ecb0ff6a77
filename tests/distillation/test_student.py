"""Protects the two models of a distillation: each made of its checkpoint, or refused by name."""

import pytest
import torch
import transformers
from PIL import Image
from tiny_models import build, randomize, tiny_config
from transformers import BertConfig, DistilBertConfig, FunnelConfig, ViTConfig, ViTImageProcessor

from fa_transformers import (
    FABertConfig,
    FABertForSequenceClassification,
    FABertModel,
    FAViTModel,
    convert_checkpoint,
)
from fa_transformers.conversion.source import read_source
from fa_transformers.conversion.student_fields import double_maps
from fa_transformers.conversion.teacher import load_teacher
from fa_transformers.distillation.student import build_student
from fa_transformers.training.attention_transfer import AttentionTransfer


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


def test_a_teacher_of_another_shape_is_refused_by_name(tmp_path, stock):
    student = build(FABertConfig, FABertModel, hidden_size=48, num_attention_heads=3)
    with pytest.raises(ValueError, match="hidden_size 32, the student 48"):
        load_teacher(str(stock), "AutoModel", student)


def test_the_encoder_alone_is_distilled_where_the_head_draws_pictures(tmp_path, capsys):
    config = tiny_config(transformers.ViTConfig, image_size=16, patch_size=8, encoder_stride=8)
    randomize(transformers.ViTForMaskedImageModeling(config)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    fields = {"local_kernel_size": 3}
    student, auto_class, processor = build_student(read_source(tmp_path), "images", fields, image_size=24)
    assert auto_class == "AutoModel" and type(student) is FAViTModel
    assert "its encoder alone is" in capsys.readouterr().out
    assert student.config.local_kernel_size == 3 and student.config.key_feature_size == 32  # twice the head width
    pixels = processor(Image.new("RGB", (40, 40)), return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (24, 24)


def test_one_source_makes_a_student_and_a_teacher_whose_weights_are_their_own(stock):
    source = read_source(stock)
    student, auto_class, _ = build_student(source, "text", {"softmax_layers": [0, 1]})
    teacher = load_teacher(source, auto_class, student)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())
    again = load_teacher(source, auto_class, student)
    assert all(tensor.equal(before[name]) for name, tensor in again.state_dict().items())


def test_maps_are_twice_the_head_width_of_what_is_converted():
    assert double_maps(BertConfig(hidden_size=384, num_attention_heads=12)) == {"key_feature_size": 64}
    assert double_maps(DistilBertConfig(dim=768, n_heads=12)) == {"key_feature_size": 128}
    assert double_maps(ViTConfig(hidden_size=384, num_attention_heads=6)) == {"key_feature_size": 128}
    with pytest.raises(ValueError, match="type 'funnel', which has no FA model"):
        double_maps(FunnelConfig())


def test_fields_other_than_the_converted_ones_are_refused(tmp_path):
    build(FABertConfig, FABertModel, local_window=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--key_feature_size 32: .* was converted with None"):
        build_student(read_source(tmp_path), "text", {"local_window": 3, "key_feature_size": 32})
