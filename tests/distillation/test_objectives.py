"""Protects the objectives: each sees what it should, leaves padding out, and trains what it may."""

import pytest
import torch
from accelerate import Accelerator
from tiny_distillation import LOCAL, make_pair
from tiny_models import as_float64, image_inputs, randomize, text_inputs
from torch import nn

from fa_transformers import (
    FABertConfig,
    FABertForQuestionAnswering,
    FABertForSequenceClassification,
    FABertModel,
    FAViTConfig,
    FAViTForImageClassification,
    FAViTModel,
)
from fa_transformers.distillation.objectives import EndToEndDistillation, _hidden_states, head_loss
from fa_transformers.training.attention_transfer import AttentionTransfer, evaluate_objective, mixers, relative_error

ARCHITECTURES = [(FABertConfig, FABertModel, text_inputs), (FAViTConfig, FAViTModel, image_inputs)]


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
    student, teacher = make_pair(config_class, model_class, **LOCAL)
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
    student, teacher = make_pair(config_class, model_class, **LOCAL)
    objective = AttentionTransfer(student, teacher)
    objective(**inputs_of(make)).loss.backward()
    with_gradient = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in student.named_parameters() if ".mixer." in name}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(mixer._forward_hooks for mixer in mixers(teacher))
    assert not any(name.startswith("_teacher") for name in objective.state_dict())


def test_layers_that_keep_softmax_have_no_error_and_do_not_count():
    student, teacher = make_pair(FABertConfig, FABertModel, softmax_layers=[1], **LOCAL)
    output = AttentionTransfer(student, teacher)(**inputs_of(text_inputs))
    assert output.layer_errors.isnan().tolist() == [False, True]
    assert output.loss == output.layer_errors[0]


def test_transfer_refuses_a_student_whose_mixers_have_nothing_to_train():
    student, teacher = make_pair(FABertConfig, FABertModel)
    with pytest.raises(ValueError, match="key_feature_size"):
        AttentionTransfer(student, teacher)


@pytest.mark.parametrize(("config_class", "model_class", "make"), ARCHITECTURES)
def test_a_student_equal_to_its_teacher_has_no_end_to_end_loss(config_class, model_class, make):
    student, teacher = make_pair(config_class, model_class, softmax_layers=[0, 1])
    output = EndToEndDistillation(student, teacher, "mean")(**inputs_of(make))
    assert output.loss.abs() < 2.0**-20 and output.layer_errors.abs().max() == 0.0
    worse = randomize(make_pair(config_class, model_class, softmax_layers=[0, 1])[0], seed=5)
    assert EndToEndDistillation(worse, teacher, "cls")(**inputs_of(make)).loss > 0.5


@pytest.mark.parametrize("objective_class", [AttentionTransfer, EndToEndDistillation])
def test_padding_changes_no_objective(objective_class):
    student, teacher = make_pair(FABertConfig, FABertModel, **LOCAL)
    options = () if objective_class is AttentionTransfer else ("mean",)
    objective = objective_class(student, teacher, *options)
    inputs = inputs_of(text_inputs)
    padded = {name: nn.functional.pad(tensor, (3, 4)) for name, tensor in inputs.items()}
    torch.testing.assert_close(objective(**padded).loss, objective(**inputs).loss, rtol=2.0**-18, atol=0.0)


def test_logits_of_a_head_count_and_labels_are_no_input():
    student, teacher = make_pair(FABertConfig, FABertForSequenceClassification, softmax_layers=[0, 1])
    inputs = inputs_of(text_inputs) | {"labels": torch.tensor([0, 1])}
    objective = EndToEndDistillation(student, teacher, "mean")
    assert objective(**inputs).loss.abs() < 2.0**-20
    with torch.no_grad():
        student.classifier.weight.neg_()
    assert objective(**inputs).loss > 1e-3


def test_long_documents_reach_the_teacher_in_windows_that_it_reads_as_it_would_alone():
    student, teacher = make_pair(FABertConfig, FABertModel, max_position_embeddings=64, **LOCAL)
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


def test_dropout_is_off_while_the_student_learns_and_layers_still_train():
    student, teacher = make_pair(FABertConfig, FABertModel, hidden_dropout_prob=0.5, softmax_layers=[1], **LOCAL)
    objective = EndToEndDistillation(student, teacher, "mean").train()
    assert student.encoder.layer[0].training and not student.encoder.layer[0].output.dropout.training
    inputs = inputs_of(text_inputs)
    assert objective(**inputs).loss == objective(**inputs).loss


@pytest.mark.parametrize(("config_class", "model_class", "make"), ARCHITECTURES)
def test_every_weight_that_trains_gets_a_gradient_as_several_processes_need(config_class, model_class, make):
    student, teacher = make_pair(config_class, model_class, **LOCAL)
    objective = EndToEndDistillation(student, teacher, "cls")
    objective(**inputs_of(make)).loss.backward()
    assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_answers_are_learnt_over_real_tokens_whatever_padding_holds():
    student, teacher = make_pair(FABertConfig, FABertForQuestionAnswering, softmax_layers=[0, 1])
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
    student, teacher = make_pair(FABertConfig, FABertForSequenceClassification, num_labels=1, **LOCAL)
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
    student, teacher = make_pair(FAViTConfig, FAViTForImageClassification, **LOCAL)
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
    student, teacher = make_pair(FABertConfig, FABertForSequenceClassification, max_position_embeddings=64, **LOCAL)
    objective = EndToEndDistillation(student, teacher, "mean", teacher_length=8)
    for length in (21, 8):
        objective.zero_grad()
        objective(input_ids=torch.randint(1, 60, (2, length))).loss.backward()
        trained = dict(objective.named_parameters())
        assert [name for name, p in trained.items() if p.requires_grad and p.grad is None] == []
        assert trained and not any("classifier" in name for name in trained)
    assert objective.student is student.base_model


def test_the_mean_over_batches_is_what_evaluation_reports():
    student, teacher = make_pair(FABertConfig, FABertModel, softmax_layers=[1], **LOCAL)
    objective = AttentionTransfer(student, teacher)
    batches = [text_inputs("AutoModel", seed=seed) for seed in range(3)]
    report = evaluate_objective(objective, batches, Accelerator(cpu=True))
    losses = [objective(**batch).loss.item() for batch in batches]
    assert report["loss"] == pytest.approx(sum(losses) / 3)
    assert report["layer_errors"][1] is None and report["layer_errors"][0] == pytest.approx(report["loss"])
