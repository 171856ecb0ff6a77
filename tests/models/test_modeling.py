"""The contract of every FA model: each row of `ARCHITECTURES` with each set of options that it has.

Protects shapes, losses, gradients, saving, loading and copying of all rows, and of encoders also the library's switches
and that loading never alters a weight.
"""

import copy
import pickle
from collections import defaultdict

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import (
    EXACT,
    HEAD_IDS,
    HEADS,
    MODEL_IDS,
    MODEL_ROW_IDS,
    MODEL_ROWS,
    MODELS,
    OPTION_SETS,
    as_float64,
    assert_equal_outputs,
    build,
    inputs_of,
    loss_of,
    outputs_of,
    randomize,
    shapes_of,
    tiny_config,
)

from fa_transformers.models import ARCHITECTURES, ENCODERS, fa_layers

every_row = pytest.mark.parametrize(
    ("config_class", "auto_class", "model_class", "options"), MODEL_ROWS, ids=MODEL_ROW_IDS
)
every_model = pytest.mark.parametrize(("config_class", "auto_class", "model_class"), MODELS, ids=MODEL_IDS)
every_head = pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS, ids=HEAD_IDS)
every_config = pytest.mark.parametrize("config_class", ARCHITECTURES, ids=lambda config_class: config_class.model_type)
every_encoder = pytest.mark.parametrize("config_class", ENCODERS, ids=lambda config_class: config_class.model_type)


def is_removed_by_softmax(name: str, auto_class: str) -> bool:
    """What shifts all keys, or the logits of all choices, alike: the softmax over them makes its gradient zero. Queries
    of DETR's first decoder layer have no content yet, so that its self-attention mixes equal values."""
    return (
        name.endswith(("key.bias", "keys.bias", "k_proj.bias", "k_content_proj.bias", "k_pos_proj.bias"))
        or (auto_class == "AutoModelForMultipleChoice" and name == "classifier.bias")
        or (".layers.0.self_attn." in name and "decoder" in name and not name.endswith(("v_proj.bias", "o_proj.bias")))
    )


@every_row
def test_outputs_are_finite_and_have_the_documented_shapes(config_class, auto_class, model_class, options):
    model = build(config_class, model_class, **OPTION_SETS[options])
    inputs = inputs_of(model, auto_class)
    outputs = outputs_of(model, inputs)
    expected = shapes_of(model, auto_class, inputs)
    assert {name: tuple(value.shape) for name, value in outputs.items() if name != "loss"} == expected
    assert all(value.isfinite().all() for value in outputs.values())


@every_row
def test_loss_is_finite_and_every_parameter_gets_a_gradient(config_class, auto_class, model_class, options):
    model = build(config_class, model_class, **OPTION_SETS[options]).train()
    loss = loss_of(model, auto_class, inputs_of(model, auto_class))
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert "backbone" in name, name  # DETR freezes parts of it
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert is_removed_by_softmax(name, auto_class) or parameter.grad.abs().max() > 0, (
            f"{name} does not influence the loss"
        )


@every_row
def test_saved_model_loads_with_identical_outputs(config_class, auto_class, model_class, options, tmp_path):
    model = build(config_class, model_class, **OPTION_SETS[options])
    model.save_pretrained(tmp_path)
    inputs = inputs_of(model, auto_class)
    expected = outputs_of(model, inputs)
    auto_classes = [
        getattr(transformers, name) for name, cls in ARCHITECTURES[config_class].items() if cls is model_class
    ]
    # AutoBackbone.from_pretrained asks the Hub for local folders as well.
    for loader in [model_class, *([] if auto_class == "AutoBackbone" else auto_classes)]:
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is model_class
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert_equal_outputs(outputs_of(loaded.eval(), inputs), expected)
    assert all(type(loader.from_config(model.config)) is model_class for loader in auto_classes)


@every_model
def test_copied_and_pickled_model_has_identical_outputs(config_class, auto_class, model_class):
    model = build(config_class, model_class)
    inputs = inputs_of(model, auto_class)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_outputs(outputs_of(other, inputs), outputs_of(model, inputs))


@every_head
def test_base_checkpoint_in_a_head_keeps_every_loaded_weight(config_class, auto_class, model_class, tmp_path):
    base_class = ENCODERS[config_class]["AutoModel"]
    saved = build(config_class, base_class, **OPTION_SETS["all"])
    saved.save_pretrained(tmp_path)
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    shared = dict(saved.named_parameters())
    loaded = dict(model.base_model.named_parameters())
    missing = {name.removeprefix(f"{model.base_model_prefix}.") for name in report["missing_keys"]}
    assert set(loaded) - missing == set(loaded) & set(shared)
    for name in set(loaded) & set(shared):
        assert torch.equal(loaded[name], shared[name]), name


@every_encoder
@pytest.mark.parametrize("index", range(4))
def test_module_partly_in_the_checkpoint_keeps_the_part_that_is_there(config_class, index, tmp_path):
    base_class = ENCODERS[config_class]["AutoModel"]
    fields = {**OPTION_SETS["all"], "num_register_tokens": 3, "layerscale_value": 1.0}
    build(config_class, base_class, **fields).save_pretrained(tmp_path)
    # Cloned: the file stays mapped into memory, and is written again below.
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    # Of every module with several tensors one is left out: initialising it must spare its siblings.
    siblings = defaultdict(list)
    for name in sorted(state):
        siblings[name.rpartition(".")[0]].append(name)
    dropped = {names[index % len(names)] for names in siblings.values() if len(names) > 1}
    assert any("feature_map" in name for name in dropped)
    save_file({n: v for n, v in state.items() if n not in dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = base_class.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == dropped
    for name, parameter in loaded.named_parameters():
        if name in dropped:
            assert parameter.isfinite().all() and not torch.equal(parameter, state[name]), name
        else:
            assert torch.equal(parameter, state[name]), name


@every_encoder
def test_other_label_count_replaces_only_the_classifier(config_class, tmp_path):
    heads = ENCODERS[config_class]
    name = next(
        name for name in heads if name in ("AutoModelForSequenceClassification", "AutoModelForImageClassification")
    )
    saved = build(config_class, heads[name], **OPTION_SETS["all"])
    saved.save_pretrained(tmp_path)
    loaded = heads[name].from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.config.num_labels == 5 and loaded.classifier.weight.shape == (5, 32)
    expected = dict(saved.named_parameters())
    for parameter_name, parameter in loaded.named_parameters():
        if not parameter_name.startswith("classifier."):
            assert torch.equal(parameter, expected[parameter_name]), parameter_name
    loaded.save_pretrained(tmp_path / "again")
    again = heads[name].from_pretrained(tmp_path / "again")
    inputs = inputs_of(saved, name)
    assert_equal_outputs(outputs_of(again.eval(), inputs), outputs_of(loaded.eval(), inputs))


@every_row
def test_sample_alone_gives_what_it_gives_in_a_batch(config_class, auto_class, model_class, options):
    model = build(config_class, model_class, **OPTION_SETS[options]).double()
    inputs = as_float64(inputs_of(model, auto_class))
    together = outputs_of(model, inputs)
    for row in range(2):
        alone = outputs_of(model, {name: value[row : row + 1] for name, value in inputs.items()})
        for name in set(together) - {"loss", "reference_points"}:  # these are the same for every image
            torch.testing.assert_close(alone[name], together[name][row : row + 1], **EXACT)


@every_head
def test_gradient_checkpointing_gives_equal_gradients(config_class, auto_class, model_class):
    model = build(config_class, model_class, **OPTION_SETS["all"]).train()
    inputs = inputs_of(model, auto_class)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
            layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
            assert len(layers) == model.config.num_hidden_layers
            assert all(layer._gradient_checkpointing_func.keywords["use_reentrant"] is False for layer in layers)
        model.zero_grad()
        loss_of(model, auto_class, inputs).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert_equal_outputs(gradients[1], gradients[0])


@every_model
def test_return_dict_false_gives_the_same_values_as_a_tuple(config_class, auto_class, model_class):
    model = build(config_class, model_class)
    inputs = inputs_of(model, auto_class)
    if (config_class, auto_class, model_class) in HEADS:
        inputs["output_hidden_states"] = True
    expected = model(**inputs).to_tuple()
    calls = [model(**inputs, return_dict=False)]
    if not hasattr(model.config, "encoder_layers"):  # DETR, stock's too, fails with the field in its configuration
        calls.append(_with_config(model, return_dict=False)(**inputs))
    for values in calls:
        assert isinstance(values, tuple) and len(values) == len(expected)
        for value, other in zip(values, expected, strict=True):
            for tensor, other_tensor in zip(_tensors(value), _tensors(other), strict=True):
                assert torch.equal(tensor, other_tensor)


def _with_config(model, **fields):
    model = copy.deepcopy(model)
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


def _tensors(value):
    return value if isinstance(value, tuple) else (value,)


@every_head
def test_hidden_states_are_the_embeddings_and_every_layers_output(config_class, auto_class, model_class):
    model = build(config_class, model_class)
    inputs = inputs_of(model, auto_class)
    assert model(**inputs).hidden_states is None
    hidden_states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 1 + model.config.num_hidden_layers
    by_config = _with_config(model, output_hidden_states=True)(**inputs).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(hidden_states, by_config, strict=True))
    recorded = []
    for layer in model.base_model.encoder.layer:
        layer.register_forward_hook(lambda module, arguments, output: recorded.append((arguments[0], output)))
    model(**inputs)
    for index, (layer_input, layer_output) in enumerate(recorded):
        assert torch.equal(hidden_states[index], layer_input) and torch.equal(hidden_states[index + 1], layer_output)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_load_in_the_requested_dtype_and_run(config_class, auto_class, model_class, dtype, tmp_path):
    model_class(tiny_config(config_class, **OPTION_SETS["all"])).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for value in outputs_of(model, inputs_of(model, auto_class)).values():
        assert value.isfinite().all()


@every_encoder
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map_loads_the_same_weights(config_class, device_map, tmp_path):
    base_class = ENCODERS[config_class]["AutoModel"]
    saved = build(config_class, base_class, **OPTION_SETS["all"])
    saved.save_pretrained(tmp_path)
    loaded = base_class.from_pretrained(tmp_path, device_map=device_map)
    inputs = {name: value.to(loaded.device) for name, value in inputs_of(saved, "AutoModel").items()}
    outputs = {name: value.cpu() for name, value in outputs_of(loaded.eval(), inputs).items()}
    if loaded.device.type == "cpu":
        assert_equal_outputs(outputs, outputs_of(saved, inputs))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))


@every_encoder
def test_device_map_never_splits_a_layer(config_class):
    base_class = ENCODERS[config_class]["AutoModel"]
    model = build(config_class, base_class, **OPTION_SETS["all"])
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
    assert type(model.encoder.layer[0]).__name__ in model._no_split_modules


@every_encoder
def test_attention_implementation_changes_nothing_but_how_softmax_layers_run(config_class):
    base_class = ENCODERS[config_class]["AutoModel"]
    for softmax_layers in ([], [0, 1]):
        outputs = []
        for name in (None, "eager", "sdpa"):
            config = tiny_config(config_class, softmax_layers=softmax_layers)
            model = randomize(base_class._from_config(config, attn_implementation=name).eval()).double()
            outputs.append(outputs_of(model, as_float64(inputs_of(model, "AutoModel"))))
        for other in outputs[1:]:
            for value, reference in zip(other.values(), outputs[0].values(), strict=True):
                tolerance = EXACT if softmax_layers else {"rtol": 0.0, "atol": 0.0}
                torch.testing.assert_close(value, reference, **tolerance)


@every_encoder
def test_softmax_layers_differ_from_factorized_ones(config_class):
    base_class = ENCODERS[config_class]["AutoModel"]
    inputs = inputs_of(base_class, "AutoModel")
    factorized, softmax = (
        outputs_of(build(config_class, base_class, softmax_layers=layers), inputs)["last_hidden_state"]
        for layers in ([], [0, 1])
    )
    assert (factorized - softmax).abs().max() > 2.0**-12


@every_config
def test_config_survives_saving_copying_and_pickling(config_class, tmp_path):
    fields = {**OPTION_SETS["all"], "num_labels": 3} if config_class in ENCODERS else {"num_labels": 3}
    config = tiny_config(config_class, **fields)
    config.save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path)
    for other in (loaded, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        for name, value in {**fields, "auto_map": config_class.AUTO_MAP}.items():
            assert getattr(other, name) == value, name
        assert other.to_dict() == config.to_dict()
    assert loaded.to_json_string() == config_class.from_dict(loaded.to_dict()).to_json_string()


@every_config
def test_auto_map_names_every_head(config_class):
    named = {name: reference.split(".")[-1] for name, reference in config_class.AUTO_MAP.items()}
    heads = {name: model_class.__name__ for name, model_class in ARCHITECTURES[config_class].items()}
    assert named == {"AutoConfig": config_class.__name__, **heads}


@every_encoder
def test_chunked_feed_forward_gives_the_same_answer(config_class):
    base_class = ENCODERS[config_class]["AutoModel"]
    inputs = as_float64(inputs_of(base_class, "AutoModel"))
    num_tokens = build(config_class, base_class)(**inputs_of(base_class, "AutoModel")).last_hidden_state.shape[1]
    whole, chunked = (
        outputs_of(build(config_class, base_class, chunk_size_feed_forward=size).double(), inputs)
        for size in (0, num_tokens if num_tokens % 4 else 4)
    )
    torch.testing.assert_close(chunked["last_hidden_state"], whole["last_hidden_state"], **EXACT)


@every_encoder
def test_dropout_falls_alike_with_and_without_gradients(config_class, monkeypatch):
    # A layer under reentrant checkpointing runs once without them and once with them, from the same random state.
    monkeypatch.setattr(fa_layers, "INFERENCE_PIECE", 3)
    base_class = ENCODERS[config_class]["AutoModel"]
    model = build(config_class, base_class, hidden_dropout_prob=0.5).train()
    outputs = []
    for wants_gradients in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(wants_gradients):
            outputs.append(model(**inputs_of(base_class, "AutoModel")).last_hidden_state)
    torch.testing.assert_close(*outputs)
