"""FA models in training: optimisation, mixed precision, torch.compile, the stock Trainer and PEFT work unchanged."""

import pytest
import torch
from tiny_models import (
    HEAD_IDS,
    HEADS,
    OPTION_SETS,
    as_float64,
    build,
    image_inputs,
    inputs_of,
    labels_of,
    loss_of,
    outputs_of,
    text_inputs,
    tiny_config,
)
from transformers import Trainer, TrainingArguments

from fa_transformers.models import (
    ENCODERS,
    FABertConfig,
    FABertForSequenceClassification,
    FABertModel,
    FAViTConfig,
)

every_head = pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS, ids=HEAD_IDS)
CLASSIFIERS = [
    head for head in HEADS if head[1] in ("AutoModelForSequenceClassification", "AutoModelForImageClassification")
]
every_classifier = pytest.mark.parametrize(
    ("config_class", "auto_class", "model_class"), CLASSIFIERS, ids=[head[2].__name__ for head in CLASSIFIERS]
)


@every_head
def test_loss_drops_on_one_batch(config_class, auto_class, model_class):
    model = model_class(tiny_config(config_class, **OPTION_SETS["all"])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs = inputs_of(model, auto_class)
    losses = []
    for _ in range(12):
        loss = loss_of(model, auto_class, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@every_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32_forward_and_backward(config_class, auto_class, model_class, dtype):
    model = model_class(tiny_config(config_class, **OPTION_SETS["all"])).train()
    inputs = inputs_of(model, auto_class)
    expected = loss_of(model, auto_class, inputs)
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(model, auto_class, inputs)
    loss.backward()
    # Each of two layers rounds about eight tensors on the way; the losses are of order one.
    budget = 16 * torch.finfo(dtype).eps * max(1.0, expected.item())
    assert abs(loss.item() - expected.item()) <= budget, (loss.item(), expected.item(), budget)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def _lengths_compile(backend: str, config_class, auto_class: str, model_class, masked: bool) -> None:
    """Compile once without graph breaks, run three lengths, compare with the plain model."""
    torch._dynamo.reset()
    model = build(config_class, model_class, **OPTION_SETS["all"]).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in (17, 23, 40):
        if model.main_input_name == "input_ids":
            inputs = text_inputs(auto_class, lengths=(size, size - 4))
        else:
            inputs = as_float64(image_inputs(height=size * 2, width=size + 37))
        if not masked:
            inputs.pop("attention_mask", None)
        actual, expected = outputs_of(compiled, inputs), outputs_of(model, inputs)
        for name, value in expected.items():
            # Graphs may reorder sums; in float64 that stays below 2^-30 of values of order one to ten.
            torch.testing.assert_close(actual[name], value, rtol=0.0, atol=2.0**-27)


@every_classifier
def test_one_graph_without_breaks_serves_several_lengths(config_class, auto_class, model_class):
    _lengths_compile("eager", config_class, auto_class, model_class, masked=True)


def test_periodic_positions_take_lengths_beyond_their_table_in_the_same_graph():
    torch._dynamo.reset()
    model = build(FABertConfig, FABertModel, position_embedding_type="periodic", max_position_embeddings=16)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for stance, length in (("default", 11), ("fail_on_recompile", 40)):
        with torch.compiler.set_stance(stance):
            compiled(torch.randint(5, 20, (1, length)))


@pytest.mark.slow
@every_classifier
def test_one_graph_serves_several_lengths_without_a_mask(config_class, auto_class, model_class):
    _lengths_compile("eager", config_class, auto_class, model_class, masked=False)


@pytest.mark.slow
@every_head
def test_every_head_compiles_without_breaks(config_class, auto_class, model_class):
    _lengths_compile("eager", config_class, auto_class, model_class, masked=True)


@pytest.mark.slow
@every_classifier
def test_generated_code_gives_the_same_answer_at_several_lengths(config_class, auto_class, model_class):
    _lengths_compile("inductor", config_class, auto_class, model_class, masked=True)


@pytest.mark.slow
@every_classifier
def test_compiled_training_gives_the_gradients_of_plain_training(config_class, auto_class, model_class):
    torch._dynamo.reset()
    model = build(config_class, model_class, **OPTION_SETS["all"]).double().train()
    inputs = as_float64(inputs_of(model, auto_class))
    loss_of(model, auto_class, inputs).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(**inputs, **labels_of(auto_class, inputs)).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.0, atol=2.0**-27)


def _samples(auto_class: str, model) -> list[dict]:
    inputs = inputs_of(model, auto_class)
    inputs |= labels_of(auto_class, inputs)
    return [{name: value[row] for name, value in inputs.items()} for row in range(2)] * 4


@every_classifier
def test_stock_trainer_trains_evaluates_and_saves(config_class, auto_class, model_class, tmp_path):
    model = model_class(tiny_config(config_class, **OPTION_SETS["all"]))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    samples = _samples(auto_class, model)
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, eval_dataset=samples)
    result = trainer.train()
    assert result.global_step == 2 and result.training_loss > 0
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("local_convolution" in name for name in changed) and any("classifier" in name for name in changed)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "final"))
    loaded = model_class.from_pretrained(tmp_path / "final").eval()
    inputs = inputs_of(model, auto_class)
    assert torch.equal(outputs_of(loaded, inputs)["logits"], outputs_of(model.eval(), inputs)["logits"])


@every_classifier
def test_lora_trains_and_merges(config_class, auto_class, model_class):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = build(config_class, model_class, **OPTION_SETS["all"]).double()
    inputs = as_float64(inputs_of(model, auto_class))
    targets = ["query", "key", "value", "dense"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double()
    adapted.train()
    loss_of(adapted, auto_class, inputs).backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    layers = model.config.num_hidden_layers
    for target in targets:
        assert sum(f".{target}.lora_A" in name for name in trained) >= layers, target
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.eval()
    expected = outputs_of(adapted, inputs)["logits"]
    merged = adapted.merge_and_unload()
    assert type(merged) is model_class
    # Merging adds the low-rank product to the weight: one more rounding per weight, in float64.
    torch.testing.assert_close(outputs_of(merged, inputs)["logits"], expected, rtol=0.0, atol=2.0**-30)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type"),
    [
        (torch.tensor([0, 2]), 3, "single_label_classification"),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), 3, "multi_label_classification"),
        (torch.tensor([0.5, -1.5]), 1, "regression"),
        (torch.tensor([[0.5], [-1.5]]), 1, "regression"),
    ],
    ids=["single label", "multi label", "regression", "regression column"],
)
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "inferred"])
@every_classifier
def test_problem_types_compute_their_losses(
    config_class, auto_class, model_class, labels, num_labels, problem_type, stated
):
    fields = {"num_labels": num_labels, "problem_type": problem_type if stated else None}
    model = build(config_class, model_class, **fields)
    output = model(**inputs_of(model, auto_class), labels=labels)
    logits = output.logits.double()
    if problem_type == "single_label_classification":
        expected = -logits.log_softmax(dim=1)[torch.arange(2), labels].mean()
    elif problem_type == "multi_label_classification":
        positive = labels.bool()
        expected = -torch.where(positive, logits.sigmoid(), (-logits).sigmoid()).log().mean()
    else:
        expected = (logits - labels.double().view_as(logits)).pow(2).mean()
    assert model.config.problem_type == problem_type
    # A mean over at most six float32 terms of order one to ten.
    torch.testing.assert_close(output.loss.double(), expected, rtol=2.0**-20, atol=2.0**-20)


@every_classifier
def test_several_targets_are_regressed_where_the_problem_type_says_so(config_class, auto_class, model_class):
    model = build(config_class, model_class, num_labels=3, problem_type="regression")
    labels = torch.tensor([[0.5, 1.0, 2.0], [-1.5, 0.0, 3.0]])
    output = model(**inputs_of(model, auto_class), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits - labels).pow(2).mean(), rtol=2.0**-20, atol=0.0)


def test_dropout_acts_in_training_only():
    config = tiny_config(FABertConfig, hidden_dropout_prob=0.5)
    model = FABertForSequenceClassification(config)
    inputs = text_inputs("AutoModelForSequenceClassification")
    assert not torch.equal(model.train()(**inputs).logits, model(**inputs).logits)
    assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)


def test_attention_dropout_acts_in_softmax_layers_only():
    for config_class in (FABertConfig, FAViTConfig):
        base_class = ENCODERS[config_class]["AutoModel"]
        for implementation in ("eager", "sdpa"):
            for softmax_layers, acts in (([], False), ([0], True)):
                fields = {"attention_probs_dropout_prob": 0.5, "softmax_layers": softmax_layers}
                model = build(config_class, base_class, **fields).train()
                model.set_attn_implementation(implementation)
                inputs = inputs_of(model, "AutoModel")
                first, second = (outputs_of(model, inputs)["last_hidden_state"] for _ in range(2))
                assert torch.equal(first, second) is not acts
