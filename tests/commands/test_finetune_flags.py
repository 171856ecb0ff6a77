"""Protects the flags of fine-tuning: defaults of the task and the data, no token in what is shown, help for all."""

import pytest

from fa_transformers.commands import finetune as command
from fa_transformers.options import CardOptions, DataOptions, LoopOptions, ModelOptions, unset_fields
from fa_transformers.training.recipes import COMMON


def test_defaults_are_those_of_the_task_and_the_data():
    demo = command.parse([])
    own = command.parse(["--train_file", "a.csv", "--model_name_or_path", "b"])
    image = command.parse(["--task", "image-classification"])
    assert demo.model.model_name_or_path == "minilm" and demo.model.max_length == 512 and own.model.max_length == 4096
    assert own.loop.num_train_epochs == COMMON["num_train_epochs"]
    assert image.model.image_size == 1024 and image.loop.learning_rate != demo.loop.learning_rate
    assert command.parse(["--full_recipe"]).loop.num_train_epochs > demo.loop.num_train_epochs
    assert command.parse(["--num_train_epochs", "9"]).loop.num_train_epochs == 9


@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
@pytest.mark.parametrize("data", [[], ["--dataset_name", "a"]])
def test_a_recipe_sets_every_field_but_those_that_are_the_checkpoints(task, data):
    run = command.parse(["--task", task, *data])
    unset = [part for options in (run.data, run.model, run.loop, run.card) for part in unset_fields(options)]
    late = {"short_epochs"} if data and task == "text-classification" else set()  # by the checkpoint, once it is read
    assert {part.name for part in unset if part.metadata["group"] not in ("layer", "positions")} == late


def test_pretrained_image_models_have_settings_of_their_own():
    image = ["--task", "image-classification", "--image_folder", "photos"]
    scratch, pretrained = command.parse(image), command.parse([*image, "--model_name_or_path", "vit/"])
    assert scratch.model.image_size == 1024 and pretrained.model.image_size is None
    assert pretrained.loop.learning_rate < scratch.loop.learning_rate
    demo = command.parse([*image[:2], "--model_name_or_path", "vit/"])
    assert demo.model.image_size == 1024  # at 224 px nothing of it can be read


def test_a_token_is_in_no_command_that_is_shown_or_stored():
    run = command.parse(["--seed", "1", "--hub_token", "hf_secret", "--push_to_hub", "--hub_token=hf_secret"])
    assert run.card.hub_token == "hf_secret"
    assert run.command == "accelerate launch scripts/finetune.py --seed 1 --push_to_hub"
    assert "secret" not in run.resume_command


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--help-all"])
    text = capsys.readouterr().out
    assert "(default: 512)" in text
    for options_class in (DataOptions, ModelOptions, LoopOptions, CardOptions):
        for name, part in options_class.__dataclass_fields__.items():
            assert f"--{name}" in text and part.metadata["help"][:20] in " ".join(text.split()), name


def test_help_shows_the_flags_that_most_people_need_and_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse(["--train_file", "my.csv", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    shown = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
    assert len(shown - {"--help-all"}) == 25
    assert "example:\n  accelerate launch scripts/finetune.py --train_file my.csv" in text
    assert "(default: 3.0)" in text  # the epochs of users' data, not the demo's


def test_the_task_follows_from_the_source_of_the_data_unless_it_is_typed():
    assert command.parse(["--image_folder", "photos"]).task == "image-classification"
    assert command.parse(["--train_file", "my.csv"]).task == command.parse([]).task == "text-classification"
    assert command.parse(["--image_folder", "a", "--task", "text-classification"]).task == "text-classification"
    images = command.parse(["--image_folder", "photos"])
    assert images.loop == command.parse(["--image_folder", "photos", "--task", "image-classification"]).loop


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "0"], "--learning_rate must be above 0"),
        (["--max_steps", "0"], "--max_steps must be at least 1"),
        (["--warmup_ratio", "1"], "--warmup_ratio must be at least 0 and below 1"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers must not be negative"),
        (["--preprocessing_num_workers", "0"], "--preprocessing_num_workers must be above 0"),
        (["--train_file", "a.csv", "--dataset_name", "b"], "two sources of data"),
        (["--test_file", "a.csv"], "go with --train_file"),
        (
            ["--image_folder", "a", "--task", "text-classification"],
            "--image_folder is for images, and the task is text: give --task image-classification",
        ),
        (
            ["--task", "image-classification", "--train_file", "a.csv"],
            "--train_file is for text, and the task is images: leave --task out",
        ),
        (["--packing", "--max_tokens_per_batch", "0"], "--packing is for text and needs a --max_tokens_per_batch"),
        (["--packing", "--task", "image-classification"], "--packing is for text"),
        (["--square"], "--square is for images; leave it out"),
        (["--streaming"], "--streaming is for text from --train_file or --dataset_name"),
        (["--streaming", "--train_file", "a.csv"], "--streaming needs a --validation_file"),
        (["--streaming", "--dataset_name", "a"], "--streaming needs --max_steps"),
        (["--streaming", "--dataset_name", "a", "--max_steps", "2"], "--streaming needs --save_steps"),
        (
            ["--streaming", "--dataset_name", "a", "--max_steps", "2", "--save_steps", "2", "--short_epochs", "1"],
            "--short_epochs is not for --streaming",
        ),
        (["--resume_from_checkpoint", "last", "--overwrite_output_dir"], "contradict each other"),
    ],
)
def test_flags_that_no_run_can_use_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        command.main(flags)
