"""Protects newcomers: a mistake in the options is named before anything is trained, most before anything is read."""

import pytest
from tiny_distillation import as_sentence_model, grouped, job_of, run_options

from fa_transformers import CardOptions, DataOptions, LoopOptions, ModelOptions, convert_checkpoint, distill
from fa_transformers.conversion.source import read_source
from fa_transformers.distillation.distill import choose_pooling, resolve_job


def test_the_embedding_is_what_the_sentence_model_makes(stock):
    def choose(**options) -> str:
        return choose_pooling(job_of(**options), read_source(stock))

    assert choose() == "mean"
    as_sentence_model(stock, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert choose() == "cls"
    as_sentence_model(stock, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    with pytest.raises(ValueError, match="--pooling cls: .* makes its embeddings by 'mean'"):
        choose(pooling="cls")
    for modes, named in (
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, "pooling_mode_max_tokens, pooling_mode"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["mean", "max"]}, "mean, max"),
        ({"pooling_mode": []}, "nothing"),
    ):
        as_sentence_model(stock, **modes)
        with pytest.raises(ValueError, match=f"pools by {named}"):
            choose()
    as_sentence_model(stock, pooling_mode="cls")
    assert choose() == "cls"
    with pytest.raises(ValueError, match="--long_length needs mean pooling"):
        choose(long_length=128)
    assert choose_pooling(job_of(task="images"), read_source(stock)) == "cls"


def test_a_wrong_flag_is_named_before_the_teacher_is_looked_for():
    options = grouped(dict(teacher_name_or_path="nobody/absent", transfer_steps=0, end_to_end_steps=0))
    with pytest.raises(ValueError, match="nothing to train"):
        distill(**options)


def test_a_converted_model_needs_its_teacher_named(tmp_path, stock):
    convert_checkpoint(stock, output_dir=tmp_path / "converted", local_window=2)
    options = run_options(tmp_path, tmp_path / "converted", key_feature_size=None, local_kernel_size=None)
    with pytest.raises(ValueError, match="is a factorized model; give .*`teacher_name_or_path`"):
        distill(**options)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(transfer_steps=0, end_to_end_steps=0), "nothing to train"),
        (dict(max_length=16), "`max_length` must be at least 32 tokens"),
        (dict(long_steps=3), "`long_steps` needs a `long_length`"),
        (dict(long_length=512, max_length=512), "`long_length=512` is for text, and must be above"),
        (dict(long_length=128, pooling="cls"), "`long_length` needs mean pooling"),
        (dict(transfer_learning_rate=0.0), "`transfer_learning_rate`"),
        (dict(mixer_learning_rate=-1.0), "`mixer_learning_rate` must be above 0"),
        (dict(end_to_end_steps=-1), "`end_to_end_steps` must not be negative"),
        (dict(max_length=512), "`max_length=512` is above the teacher's"),
        (dict(probe_folder="photos"), "`probe_folder` is not for `task='text'`"),
        (dict(resume_from_checkpoint="out/checkpoint-3"), "`resume_from_checkpoint` must be 'last' or 'auto'"),
        (dict(model_name_or_path="none"), "`model_name_or_path='none'`"),
        (dict(max_length=None), "`max_length` has no value, and `task='text'` needs one"),
        (dict(dataset_name="owner/name"), "`train_file` and `dataset_name` are two sources"),
        (dict(learning_rate=0.0), "`learning_rate` must be above 0"),
    ],
)
def test_newcomers_mistakes_are_named(tmp_path, stock, more, message):
    with pytest.raises(ValueError, match=message):
        distill(**run_options(tmp_path, stock, **more))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(probe_file="rows.csv"), "`probe_file` is not for `task='images'`"),
        (dict(long_length=2048), "`long_length=2048` is for text"),
        (dict(model_name_or_path="none"), "`model_name_or_path='none'` has no teacher"),
        (dict(image_size=None), "`image_size` has no value, and `task='images'` needs one"),
    ],
)
def test_mistakes_of_images_are_named(tmp_path, values, message):
    values = dict(image_folder=tmp_path, output_dir=tmp_path / "out") | values
    with pytest.raises(ValueError, match=message):
        distill(task="images", **grouped(values))


@pytest.mark.parametrize(
    "options",
    [
        dict(loop=LoopOptions(packing=True)),
        dict(loop=LoopOptions(max_steps=7)),
        dict(loop=LoopOptions(num_train_epochs=3.0)),
        dict(loop=LoopOptions(sequence_parallel_size=2)),
        dict(model=ModelOptions(freeze_layers=1)),
        dict(model=ModelOptions(gradient_checkpointing=True)),
        dict(data=DataOptions(test_file="test.csv")),
        dict(data=DataOptions(streaming=True)),
        dict(card=CardOptions(push_to_hub=True)),
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_distillation_does_not_read_is_refused(options):
    with pytest.raises(ValueError, match="has no use in distillation"):
        resolve_job("text", "quick", grouped({}) | options)


def test_rows_and_a_file_are_two_sources(tmp_path, stock):
    with pytest.raises(ValueError, match="rows and `train_file` are two sources of data"):
        distill(["red"], **run_options(tmp_path, stock))


def test_an_unknown_task_or_recipe_is_named():
    with pytest.raises(ValueError, match="`task` must be one of text, images, object-detection, got 'audio'"):
        distill(task="audio")
    with pytest.raises(ValueError, match="`recipe` must be one of quick, full, got 'slow'"):
        distill(recipe="slow")
