"""What a user can get wrong with models and configurations ends in an error that names the field or argument."""

import pytest
import torch
from tiny_models import (
    HEAD_IDS,
    HEADS,
    OPTION_SETS,
    build,
    image_inputs,
    inputs_of,
    rewrite_config,
    text_inputs,
    tiny_config,
)
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PretrainedConfig,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from fa_transformers import estimate_memory, load_factorized
from fa_transformers.conversion.stock_checkpoints import FAMILIES
from fa_transformers.models import (
    ENCODERS,
    FABertConfig,
    FABertForMaskedLM,
    FABertForMultipleChoice,
    FABertForQuestionAnswering,
    FABertForTokenClassification,
    FABertModel,
    FADetrConfig,
    FAViTConfig,
    FAViTForMaskedImageModeling,
    FAViTModel,
    configuration_fa,
)

COUNTS = (0, -1, 1.5, "2", None, True)
SHARED_BAD_VALUES = {
    "hidden_size": COUNTS,
    "num_hidden_layers": COUNTS,
    "num_attention_heads": (*COUNTS, 3),
    "intermediate_size": COUNTS,
    "hidden_act": ("nope", None, 3),
    "hidden_dropout_prob": (-0.1, 1.5, "0.1", None, float("nan")),
    "attention_probs_dropout_prob": (-0.1, 1.5, "0.1", None, float("nan")),
    "initializer_range": (-0.1, "0.1", None, float("inf")),
    "layer_norm_eps": (-1e-6, "x", None, float("nan")),
    "chunk_size_feed_forward": (-1, 1.5, "2", None),
    "problem_type": ("classification", 1),
    "attention_normalization": ("Softmax", None, 1, ["softmax"]),
    "key_feature_size": (0, -1, 15, 16.0, "32", True),
    "key_features": ("nope", "sign_pairs", None, 1),
    "learned_temperatures": ("yes", None, 1),
    "local_kernel_size": (-1, 2, 3.0, "3", None, True),
    "local_window": (-1, 1.5, "2", None, True),
    "softmax_layers": ([2], [-1], ["0"], [0.0], [True], 0, "0", None),
    "position_embedding_type": ("relative_key", None, 0),
    "classifier_pooling": ("max", None, 0),
    "recovery": ("none", True, 0),
    "is_decoder": (True,),
    "add_cross_attention": (True,),
}
# What transformers itself stumbles over, without a word on the field, where a file has it.
SHARED_BAD_CONTENT = {
    "id2label": (["a"], {"x": "a"}, 3),
    "label2id": (3,),
    "task_specific_params": ([1],),
    "quantization_config": ("x",),
    "dtype": ("evil", "os", 3),
    "torch_dtype": ("evil",),
    "architectures": (5, "FABertModel", [1]),
    "num_labels": ("x", 1.5, True, 10**9),
    "check_fields": (1,),
    "to_dict": (1,),
    "__class__": (1,),
    "key_feature_size": (10**9,),
    "local_kernel_size": (10**9 + 1,),
    "local_window": (10**9,),
    "hidden_size": (10**12,),
}
OWN_BAD_VALUES = {
    FABertConfig: {
        "vocab_size": COUNTS,
        "max_position_embeddings": COUNTS,
        "type_vocab_size": COUNTS,
        "classifier_dropout": (-0.1, 1.5, "0.1"),
        "pad_token_id": (-1, 60, 1.5, "0", True),
        "tie_word_embeddings": ("yes", None, 1),
    },
    FAViTConfig: {
        "image_size": (0, -8, 32.0, "32", None, True, [32], [32, 32, 32], [32, 0], [32, True], 4),
        "patch_size": (0, -8, 8.0, "8", None, True, [8], [8, 8, 8], [8, 0], 64),
        "num_channels": COUNTS,
        "encoder_stride": COUNTS,
        "qkv_bias": ("yes", None, 1),
        "pooler_output_size": (0, -1, 1.5, "2"),
        "pooler_act": ("nope", None),
        "layerscale_value": ("x", True, float("nan")),
        "num_register_tokens": (-1, 1.5, "2", None, True),
        "position_embedding_antialias": ("yes", None, 1),
        "out_features": (["stage3"], ["stage2", "stage1"], ["stem", "stem"], "stem", 1),
        "out_indices": ([3], [-4], [2, 1], [1, 1], 1, "1"),
        "apply_layernorm": ("yes", None, 1),
        "reshape_hidden_states": ("yes", None, 1),
    },
}
BAD_FIELDS = [
    pytest.param(config_class, name, values, id=f"{config_class.model_type}-{name}")
    for config_class in ENCODERS
    for name, values in {**SHARED_BAD_VALUES, **OWN_BAD_VALUES[config_class]}.items()
]
every_config = pytest.mark.parametrize("config_class", ENCODERS, ids=lambda config_class: config_class.model_type)
every_head = pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS, ids=HEAD_IDS)


@pytest.fixture(scope="module")
def saved_folders(tmp_path_factory):
    folders = {}
    for config_class, heads in ENCODERS.items():
        folders[config_class] = tmp_path_factory.mktemp(config_class.model_type)
        build(config_class, heads["AutoModel"]).save_pretrained(folders[config_class])
    return folders


def build_with(base_class, config, field, value):
    setattr(config, field, value)
    return base_class(config)


@pytest.mark.parametrize(("config_class", "field", "values"), BAD_FIELDS)
def test_bad_value_of_a_field_is_an_error_that_names_it(config_class, field, values, saved_folders):
    base_class = ENCODERS[config_class]["AutoModel"]
    valid = tiny_config(config_class).to_dict()
    for value in values:
        with pytest.raises(ValueError, match=f"`{field}`"):
            config_class(**{**valid, field: value})
        if value is not None:  # None as an override means "not given" to some loaders
            with pytest.raises(ValueError, match=f"`{field}`"):
                base_class.from_pretrained(saved_folders[config_class], **{field: value})
            with pytest.raises(ValueError, match=f"`{field}`"):
                config_class.from_pretrained(saved_folders[config_class], **{field: value})
        config = tiny_config(config_class)
        with pytest.raises(ValueError, match=f"`{field}`"):
            build_with(base_class, config, field, value)


@every_config
def test_every_field_of_a_configuration_has_bad_values_in_this_file(config_class):
    fields = set(config_class().to_dict()) - set(PretrainedConfig().to_dict()) - {"auto_map"}
    assert fields <= set(SHARED_BAD_VALUES) | set(OWN_BAD_VALUES[config_class])


@every_config
def test_bad_value_in_a_saved_configuration_is_an_error_that_names_it(config_class, tmp_path):
    base_class = ENCODERS[config_class]["AutoModel"]
    build(config_class, base_class).save_pretrained(tmp_path)
    rewrite_config(tmp_path, local_window=-3)
    with pytest.raises(ValueError, match="`local_window`"):
        base_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("num_labels", [0, -1])
def test_number_of_labels_must_be_positive(num_labels):
    with pytest.raises(ValueError, match="`num_labels`"):
        tiny_config(FABertConfig, num_labels=num_labels)


@every_config
def test_decoder_fields_that_are_off_are_accepted(config_class):
    config = config_class(is_decoder=False, add_cross_attention=False)
    assert not getattr(config, "is_decoder", False)


def test_heads_refuse_configurations_they_cannot_serve():
    with pytest.raises(ValueError, match="`num_labels` must be 2"):
        FABertForQuestionAnswering(tiny_config(FABertConfig, num_labels=3))
    for fields in ({"encoder_stride": 4}, {"patch_size": [8, 4]}):
        with pytest.raises(ValueError, match="`encoder_stride`"):
            FAViTForMaskedImageModeling(tiny_config(FAViTConfig, **fields))


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flex_attention", "nope", {"": "sdpa", "backbone_config": "nope"}]
)
@every_config
def test_other_attention_implementations_are_refused_everywhere_without_a_trace(config_class, name, saved_folders):
    base_class = ENCODERS[config_class]["AutoModel"]
    model = build(config_class, base_class)
    config = tiny_config(config_class)
    config._attn_implementation = "eager"
    attempts = [
        lambda: base_class(config_class(attn_implementation=name)),
        lambda: base_class._from_config(config, attn_implementation=name),
        lambda: AutoModel.from_config(config, attn_implementation=name),
        lambda: base_class.from_pretrained(saved_folders[config_class], attn_implementation=name),
        lambda: base_class.from_pretrained(saved_folders[config_class], config=config, attn_implementation=name),
        lambda: model.set_attn_implementation(name),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="`attn_implementation` must be None, 'eager' or 'sdpa'"):
            attempt()
        assert config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    assert type(AutoModel.from_config(config)) is base_class
    assert estimate_memory(config, 8).total > 0


@pytest.mark.parametrize(
    ("field", "meant"),
    [("local_windw", "local_window"), ("key_feature_sizes", "key_feature_size"), ("softmax_layer", "softmax_layers")],
)
def test_a_field_that_is_nearly_one_of_ours_is_a_warning_that_names_it(field, meant, caplog, monkeypatch):
    for config_class in (FABertConfig, FAViTConfig, FADetrConfig):
        caplog.clear()
        monkeypatch.setattr(configuration_fa.logger, "propagate", True)
        config_class(**{field: 4})
        assert f"`{field}` is no field" in caplog.text and f"did you mean `{meant}`" in caplog.text


def test_fields_of_stock_configurations_are_no_warning(caplog, monkeypatch):
    monkeypatch.setattr(configuration_fa.logger, "propagate", True)
    fields = ("focal_windows", "feature_size", "last_kernel_size", "sliding_window", "use_cache", "classifier_dropout")
    FABertConfig(**{**BertConfig().to_dict(), **dict.fromkeys(fields, 0)})
    assert "did you mean" not in caplog.text


@every_config
def test_factorized_is_taken_for_what_our_models_do_anyway(config_class, saved_folders):
    """So that a helper may set it for stock models and ours alike."""
    base_class = ENCODERS[config_class]["AutoModel"]
    for name, kept in ((None, "sdpa"), ("eager", "eager")):
        config = config_class(attn_implementation=name)
        config._attn_implementation = "factorized"
        assert config._attn_implementation == name
        model = AutoModel.from_config(tiny_config(config_class, softmax_layers=[1]), attn_implementation=name)
        model.set_attn_implementation("factorized")
        assert model.config._attn_implementation == kept
    for model in (
        base_class(tiny_config(config_class)),
        base_class.from_pretrained(saved_folders[config_class], attn_implementation="factorized"),
        AutoModel.from_config(tiny_config(config_class), attn_implementation="factorized"),
    ):
        assert model.config._attn_implementation == "sdpa"
    assert config_class(attn_implementation="factorized")._attn_implementation is None


@every_head
def test_attention_maps_are_refused_by_argument_and_by_configuration(config_class, auto_class, model_class):
    model = build(config_class, model_class)
    inputs = inputs_of(model, auto_class)
    with pytest.raises(ValueError, match="`output_attentions`.*N×N.*`fa_transformers.attention_rows"):
        model(**inputs, output_attentions=True)
    model(**inputs, output_attentions=False)
    config = tiny_config(config_class)
    config._attn_implementation = "eager"
    config.output_attentions = True
    with pytest.raises(ValueError, match="`output_attentions`.*N×N.*`fa_transformers.attention_rows"):
        model_class(config)(**inputs)


def test_configuration_of_another_class_is_refused():
    for config in (BertConfig(), FAViTConfig(), ViTConfig()):
        with pytest.raises(TypeError, match="`config` must be a FABertConfig"):
            FABertModel(config)
    with pytest.raises(TypeError, match="`config` must be a FAViTConfig"):
        FAViTModel(FABertConfig())


STRANGERS = {
    "gpt2": lambda: GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)),
    "roberta": lambda: RobertaModel(
        RobertaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_checkpoint_of_another_architecture_is_refused_by_name(kind, tmp_path):
    STRANGERS[kind]().save_pretrained(tmp_path)
    for config_class, heads in ENCODERS.items():
        for model_class in heads.values():
            with pytest.raises(ValueError, match=f"'{kind}'.*cannot be loaded as '{config_class.model_type}'"):
                model_class.from_pretrained(tmp_path)
    if kind not in FAMILIES:  # which conversion can read
        with pytest.raises(ValueError, match=f"'{kind}', which has no FA model"):
            load_factorized(str(tmp_path), "AutoModel")


def test_text_and_image_checkpoints_are_not_exchanged(saved_folders, tmp_path):
    with pytest.raises(ValueError, match="'fa_vit'.*cannot be loaded as 'fa_bert'"):
        FABertModel.from_pretrained(saved_folders[FAViTConfig])
    with pytest.raises(ValueError, match="'fa_bert'.*cannot be loaded as 'fa_vit'"):
        FAViTModel.from_pretrained(saved_folders[FABertConfig])
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "bert")
    ViTModel(ViTConfig(image_size=32, **sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="'bert'.*cannot be loaded as 'fa_vit'"):
        FAViTModel.from_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="'vit'.*cannot be loaded as 'fa_bert'"):
        FABertModel.from_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="`auto_class`"):
        load_factorized(str(tmp_path / "bert"), "AutoModelForImageClassification")


@pytest.mark.parametrize("field", ["use_swiglu_ffn", "drop_path_rate"])
def test_dinov2_variants_without_a_counterpart_are_refused_by_field(field, tmp_path):
    tiny_config(FAViTConfig).save_pretrained(tmp_path)
    rewrite_config(tmp_path, model_type="dinov2", **{field: 1})
    with pytest.raises(ValueError, match=f"`{field}`"):
        FAViTConfig.from_pretrained(tmp_path)


TEXT_HEADS = [head for head in HEADS if head[0] is FABertConfig]


@pytest.mark.parametrize(
    ("config_class", "auto_class", "model_class"), TEXT_HEADS, ids=[head[2].__name__ for head in TEXT_HEADS]
)
def test_masks_of_wrong_kind_are_refused(config_class, auto_class, model_class):
    model = build(config_class, model_class, **OPTION_SETS["all"])
    inputs = text_inputs(auto_class)
    mask = inputs["attention_mask"]
    with pytest.raises(ValueError, match="`attention_mask`.*torch.float32"):
        model(**{**inputs, "attention_mask": (1.0 - mask) * torch.finfo(torch.float32).min})
    with pytest.raises(ValueError, match="`attention_mask` must be .* got"):
        model(**{**inputs, "attention_mask": mask[..., :-1]})
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(**{**inputs, "attention_mask": mask[:1]})


def test_masks_that_differ_between_queries_are_refused_with_the_reason():
    model = build(FABertConfig, FABertModel)
    with pytest.raises(ValueError, match="`attention_mask`.*differ between queries"):
        model(input_ids=torch.ones(2, 5, dtype=torch.long), attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.long))


@pytest.mark.parametrize("model_class", [FABertModel, FABertForMaskedLM, FABertForMultipleChoice])
def test_ids_and_embeddings_are_alternatives(model_class):
    model = build(FABertConfig, model_class)
    ids = text_inputs("AutoModelForMultipleChoice" if model_class is FABertForMultipleChoice else "AutoModel")[
        "input_ids"
    ]
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
        model(input_ids=ids, inputs_embeds=torch.zeros(*ids.shape, 32))


def test_base_model_takes_no_labels():
    with pytest.raises(TypeError, match="labels"):
        build(FABertConfig, FABertModel)(input_ids=torch.ones(1, 2, dtype=torch.long), labels=torch.ones(1))


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32), (2, 3, 0, 32), (2, 3, 32, 0)], ids=str)
def test_images_of_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="`pixel_values`"):
        build(FAViTConfig, FAViTModel)(torch.zeros(shape))


def test_masks_of_patches_are_checked():
    inputs = image_inputs(32, 32)
    plain, masked = build(FAViTConfig, FAViTModel), build(FAViTConfig, FAViTForMaskedImageModeling)
    with pytest.raises(ValueError, match="`bool_masked_pos` needs"):
        plain(**inputs, bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`bool_masked_pos` must be .*\(2, 16\)"):
        masked(**inputs, bool_masked_pos=torch.zeros(2, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`attention_mask` must be .*\(2, 17\)"):
        plain(**inputs, attention_mask=torch.ones(2, 16, dtype=torch.long))


def test_token_classification_labels_of_wrong_length_are_refused():
    model = build(FABertConfig, FABertForTokenClassification)
    with pytest.raises(ValueError, match="batch_size"):
        model(**text_inputs("AutoModelForTokenClassification"), labels=torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("config_class", [FABertConfig, FAViTConfig])
def test_a_broken_field_of_a_configurations_file_is_named(config_class, tmp_path):
    tiny_config(config_class).save_pretrained(tmp_path)
    content = (tmp_path / "config.json").read_text()
    for name, values in SHARED_BAD_CONTENT.items():
        for value in values:
            rewrite_config(tmp_path, **{name: value})
            with pytest.raises(ValueError, match=f"`{name}`") as refused:
                AutoConfig.from_pretrained(tmp_path)
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
            (tmp_path / "config.json").write_text(content)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    loaded = AutoConfig.from_pretrained(tmp_path, dtype=torch.bfloat16, id2label={0: "a", 1: "b", 2: "c"})
    assert loaded.num_labels == 3 and config_class.from_dict(loaded.to_dict()).num_labels == 3
