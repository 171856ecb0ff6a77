"""Protects scripts/finetune.py as users run it: files in, a folder out that transformers loads; stop, resume."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from PIL import Image
from repository import ROOT, SCRIPTS, read_json_line
from safetensors.torch import load_file
from tiny_models import make_tokenizer, rewrite_config
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from fa_transformers.commands import finetune as command
from fa_transformers.data.examples import crop_randomly
from fa_transformers.data.readers.images import encode_images
from fa_transformers.data.readers.tables import DataError, ReadingOptions
from fa_transformers.training import finetune
from fa_transformers.training.checkpointing import TrainingState, list_checkpoints
from fa_transformers.training.report import describe_lesson

SCRIPT = SCRIPTS / "finetune.py"
SINGLE = "single_label_classification"
WORDS = ["red", "blue", "green", "one", "two", "three", "alpha", "beta", "gamma", "delta"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(autouse=True)
def fresh_accelerate(tmp_path, monkeypatch):
    """Accelerate keeps its settings for the whole process, and each run of the script must choose its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A stock BERT checkpoint with random weights, 16 positions, and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = make_tokenizer(WORDS, max_length=16)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def make_rows(num: int, kind: str) -> list[dict]:
    """Documents whose label can be read off their words, of many lengths."""
    random = np.random.default_rng(num)
    rows = []
    for index in range(num):
        colour = WORDS[index % 3]
        words = [colour] * 3 + random.choice(WORDS[3:], random.integers(1, 20)).tolist()
        label = colour
        if kind == "multi_label_classification":
            label = sorted({colour} | ({"long"} if len(words) > 12 else set()))
        if kind == "regression":
            label = float(index % 3) + 0.5
        rows.append({"text": " ".join(random.permutation(words)), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            for row in rows:
                label = "|".join(row["label"]) if isinstance(row["label"], list) else row["label"]
                writer.writerow(row | {"label": label})
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_flags(tmp_path: Path, tiny_bert: Path, kind: str = SINGLE, ending: str = ".csv") -> list:
    flags = ["--model_name_or_path", tiny_bert, "--max_length", 32]
    flags += ["--report_to", "none", "--use_cpu", "--num_threads", 1]
    for split, num in (("train", 20), ("validation", 7), ("test", 9)):
        path = tmp_path / f"{split}{ending}"
        flags += [f"--{split}_file", path if path.exists() else write_rows(path, make_rows(num, kind))]
    flags += ["--per_device_train_batch_size", 4, "--max_tokens_per_batch", 0, "--output_dir", tmp_path / "out"]
    return flags + ["--local_window", 2, "--position_embedding_type", "absolute"]


def run(*flags) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    return command.main([str(flag) for flag in flags]).summary


@pytest.mark.parametrize(
    ("kind", "ending", "score"),
    [
        (SINGLE, ".csv", "accuracy"),
        pytest.param("multi_label_classification", ".jsonl", "micro_f1", marks=pytest.mark.slow),
        pytest.param("regression", ".parquet", "mse", marks=pytest.mark.slow),
    ],
)
def test_a_file_becomes_a_folder_that_a_pipeline_loads(kind, ending, score, tmp_path, tiny_bert, capsys):
    flags = text_flags(tmp_path, tiny_bert, kind, ending)
    results = run(*flags, "--max_steps", 4, "--classifier_pooling", "mean")
    assert results["split"] == "test" and results["num_examples"] == 9 and results["steps"] == 4
    output = capsys.readouterr().out
    assert read_json_line(output) == results
    estimate = re.search(r"estimated peak memory of each process: (\d\.\d\d) GiB[ ,].* [1-9]\d* tokens", output)
    # Both are of the whole process: what a tiny model adds is a few MiB of libraries that the first step loads.
    assert float(estimate[1]) == pytest.approx(results["peak_memory_gib"], rel=0.25)
    assert "1 process on cpu with 1 thread (from --num_threads); " in output
    assert 0 < results["epochs"] < 4 and results["epochs"] != int(results["epochs"])
    out = tmp_path / "out"
    assert json.loads((out / "all_results.json").read_text()) == results
    assert 0 < results["data_wait_share"] < 1
    assert results["baselines"] and score in results["model"]
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == kind
    assert config["recovery"] == "fine_tuned", "trained since it was converted"
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 32
    lines = output.splitlines()[-3:]
    assert lines[0] == "from transformers import pipeline" and str(out) in lines[1] and "print(classify(" in lines[2]
    text = repr(" ".join(["red"] * 60))
    code = "\n".join(
        [*lines, f"assert classify({text}) == classify({text}, truncation=True)", f"print(classify({text}))"]
    )
    # In a folder of its own, so that the package can't be imported from there.
    environment = ENVIRONMENT | {"PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=out, capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    if kind == "single_label_classification":
        assert set(config["label2id"]) == {"red", "blue", "green"}
        assert any(f"'label': '{name}'" in ran.stdout for name in config["label2id"])
        assert (out / "confusion_matrix.png").stat().st_size > 1000
        assert "precision" in (out / "per_class.txt").read_text()


def test_training_learns_what_the_words_say(tmp_path, tiny_bert):
    write_rows(tmp_path / "train.csv", make_rows(150, "single_label_classification"))
    write_rows(tmp_path / "test.csv", make_rows(30, "single_label_classification"))
    flags = [*text_flags(tmp_path, tiny_bert), "--per_device_train_batch_size", 16, "--no-load_best_model_at_end"]
    rates = ["--learning_rate", 5e-3, "--head_learning_rate", 5e-3, "--classifier_pooling", "mean"]
    results = run(*flags, *rates, "--num_train_epochs", 6, "--eval_steps", 1000)
    assert results["model"]["accuracy"] > 0.9 > results["baselines"]["majority class"]["accuracy"] + 0.5


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("accumulation", "more"),
    [
        (1, []),
        (2, []),
        (1, ["--packing", "--max_tokens_per_batch", 90]),
        (2, ["--streaming", "--save_steps", 2, "--packing", "--max_tokens_per_batch", 90]),
        pytest.param(1, ["--dataloader_num_workers", 2], marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(accumulation, more, tmp_path, tiny_bert):
    flags = [*text_flags(tmp_path, tiny_bert), "--max_steps", 8, "--gradient_accumulation_steps", accumulation, *more]
    flags += ["--save_steps", 2, "--save_total_limit", 0, "--eval_steps", 3, "--no-load_best_model_at_end"]
    run(*flags)
    # 20 examples in batches of 4: checkpoint 2 lies inside the first epoch.
    state = json.loads((tmp_path / "out/checkpoint-2/training_state.json").read_text())
    assert state["epoch"] == 0 and state["batch"] == 2 * accumulation
    resumed = tmp_path / "resumed"
    run(*flags, "--output_dir", resumed, "--resume_from_checkpoint", tmp_path / "out/checkpoint-2")
    expected, got = weights(tmp_path / "out"), weights(resumed)
    course = [TrainingState.load(list_checkpoints(folder)[-1]).curve for folder in (tmp_path / "out", resumed)]
    assert course[0] == course[1] and len(course[0].steps.rows) == 8 and len(course[0].scores.rows) == 3
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_packed_evaluation_gives_the_scores_of_padded_evaluation(tmp_path, tiny_bert):
    flags = [
        *text_flags(tmp_path, tiny_bert),
        "--classifier_pooling",
        "mean",
        "--max_steps",
        1,
        "--learning_rate",
        1e-12,
    ]
    flags += ["--head_learning_rate", 1e-12, "--eval_steps", 10, "--no-load_best_model_at_end"]
    padded = run(*flags)
    # Neither packing nor publishing asks for a padding token.
    nameless = shutil.copytree(tiny_bert, tmp_path / "nameless")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(nameless)
    flags += ["--model_name_or_path", nameless, "--packing", "--max_tokens_per_batch", 60]
    packed = run(*flags, "--output_dir", tmp_path / "packed")
    assert packed["num_examples"] == 9
    for name, score in padded["model"].items():
        # Float32: the order of sums differs; the loss of a batch of 9 is the same mean as those of smaller ones.
        assert packed["model"][name] == pytest.approx(score, rel=1e-5, nan_ok=True), name


def test_images_resume_with_the_same_crops(tmp_path):
    flags = image_flags(tmp_path) + ["--random_crop", "--random_flip", "--max_steps", 5, "--save_steps", 2]
    flags += ["--save_total_limit", 0, "--no-load_best_model_at_end"]
    run(*flags)
    resumed = tmp_path / "resumed"
    run(*flags, "--output_dir", resumed, "--resume_from_checkpoint", tmp_path / "out/checkpoint-4")
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def image_flags(tmp_path: Path) -> list:
    folder = tmp_path / "images"
    if not folder.exists():
        random = np.random.default_rng(0)
        for label, colour in (("dark", 20), ("light", 220)):
            (folder / label).mkdir(parents=True)
            for index in range(8):
                pixels = np.full((20 + index, 24, 3), colour) + random.integers(-20, 20, (20 + index, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{index}.png")
    flags = ["--task", "image-classification", "--image_folder", folder, "--image_size", 32, "--use_cpu"]
    flags += ["--per_device_train_batch_size", 3, "--report_to", "none", "--output_dir", tmp_path / "out"]
    return flags


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    tiny = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=8)
    monkeypatch.setattr(finetune, "SMALL_FAVIT", tiny)


def test_a_folder_of_images_becomes_a_folder_that_a_pipeline_loads(tmp_path):
    results = run(*image_flags(tmp_path), "--num_train_epochs", 4)
    assert results["num_examples"] == 2 and "accuracy" in results["model"]
    classify = pipeline("image-classification", str(tmp_path / "out"), trust_remote_code=True)
    answer = classify(Image.new("RGB", (50, 40), "white"))
    assert {row["label"] for row in answer} == {"dark", "light"}


def image_dataset(labels: list) -> datasets.DatasetDict:
    images = [Image.new("RGB", (24, 24), (25 * index, 0, 0)) for index in range(len(labels))]
    part = Dataset.from_dict({"picture": images, "kind": labels}).cast_column("picture", datasets.Image())
    return datasets.DatasetDict(train=part)


def test_a_data_set_by_name_may_have_other_columns_and_labels_as_words(tmp_path):
    image_dataset(["odd", "even"] * 5).save_to_disk(tmp_path / "named")
    flags = image_flags(tmp_path)
    flags[flags.index("--image_folder") : flags.index("--image_folder") + 2] = ["--dataset_name", tmp_path / "named"]
    run(*flags, "--image_column_name", "picture", "--label_column_name", "kind", "--max_steps", 1)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["label2id"] == {"even": 0, "odd": 1}


def test_image_columns_that_do_not_fit_are_named():
    columns = ReadingOptions(image_column="picture", label_column="kind")
    dataset = image_dataset(["odd", "even"] * 5)
    with pytest.raises(DataError, match="no image column 'image'; the columns are .*--image_column_name"):
        encode_images(dataset)
    with pytest.raises(DataError, match="column 'kind' holds .*, not images"):
        encode_images(dataset, ReadingOptions(image_column="kind", label_column="picture"))
    dataset["test"] = image_dataset(["prime"])["train"]
    with pytest.raises(DataError, match="split 'test'.*\n  row 1: column 'kind': the label 'prime' doesn't"):
        encode_images(dataset, columns)
    with pytest.raises(DataError, match="no split 'train'"):
        encode_images(datasets.DatasetDict(test=dataset["test"]), columns)


def test_crops_stay_inside_the_image_and_keep_most_of_it():
    random = np.random.default_rng(0)
    for width, height in ((1, 1), (7, 300), (640, 480)):
        for _ in range(50):
            crop = crop_randomly(Image.new("RGB", (width, height)), random)
            assert 1 <= crop.width <= width and 1 <= crop.height <= height
            # Each side is rounded to whole pixels.
            assert (crop.width + 0.5) * (crop.height + 0.5) >= 0.6 * width * height


def test_a_stock_vit_checkpoint_is_fine_tuned_at_a_larger_size(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    stock = tmp_path / "stock"
    ViTForImageClassification(config).save_pretrained(stock)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(stock)
    run(*image_flags(tmp_path), "--model_name_or_path", stock, "--max_steps", 2)
    saved = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "FAViTImageProcessor" and saved["image_size"] == 32


@pytest.mark.slow
def test_the_image_demo_prints_full_resolution_beside_low_resolution(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        finetune, "CANVAS", dict(num_train=6, num_validation=4, num_test=5, size_px=512, digits_per_class=20)
    )
    monkeypatch.setattr(finetune, "LOW_RESOLUTION_PX", 32)
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: logged.append((step, values)))
    flags = ["--task", "image-classification", "--image_size", 512, "--max_steps", 2, "--report_to", "none"]
    results = run(*flags, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "out", "--use_cpu")
    assert "the same at 32 px" in results["baselines"]
    assert [(step, any("at_32_px/" in name for name in values)) for step, values in logged] == [
        (2, False), (2, False), (4, True), (4, True),
    ]  # fmt: skip
    assert "the same at 32 px" in capsys.readouterr().out


def test_what_the_demo_teaches_depends_on_which_of_the_two_is_better():
    for model, words, taught in ((0.61, 0.69, "count words first"), (0.7, 0.69, "worth more than counting them")):
        shown, length = describe_lesson(model, words)
        assert f"{words:.3f}" in shown and f"{model:.3f}" in shown and shown.endswith(f"{taught}.")
        assert "needle.py" in length


@pytest.mark.slow
def test_the_text_demo_reads_the_packaged_documents(tmp_path, tiny_bert, capsys):
    pytest.importorskip("licensedcode", reason="the package licensedcode-data holds the documents")
    flags = ["--model_name_or_path", tiny_bert, "--max_length", 64, "--max_steps", 2, "--max_train_samples", 30]
    results = run(*flags, "--max_eval_samples", 12, "--output_dir", tmp_path / "out", "--use_cpu")
    assert results["num_examples"] == 12
    assert len(results["lesson"]) == 2 and all(line in capsys.readouterr().out for line in results["lesson"][:1])
    card = (tmp_path / "out/README.md").read_text()
    assert "CC-BY-4.0" in card and "ScanCode" in card
    assert list((tmp_path / "out").rglob("events.out.tfevents.*")), "tensorboard is the default tracker"


def start_script(*flags, launcher: tuple = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=ENVIRONMENT, start_new_session=True)


def finish(process: subprocess.Popen, timeout: float) -> tuple[str, str]:
    """What the process printed; one that does not end is killed with its workers."""
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the run made no checkpoint: {process.communicate()}")
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_signal_saves_a_checkpoint_that_the_printed_flag_resumes(num_workers, number, tmp_path, tiny_bert):
    flags = [*text_flags(tmp_path, tiny_bert), "--save_steps", 3, "--eval_steps", 10**6]
    flags += ["--dataloader_num_workers", num_workers]
    process = start_script(*flags, "--max_steps", 10**6)
    wait_for_checkpoint(tmp_path / "out", process)
    os.killpg(process.pid, number)  # as a terminal does: its workers are signalled too
    output, errors = finish(process, 60)
    assert process.returncode == 130, errors
    assert "--resume_from_checkpoint last" in output
    assert not list((tmp_path / "out").glob(".checkpoint-*"))
    saved = max(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert f"Stopped at step {saved} of" in output
    results = run(*flags, "--max_steps", saved + 2, "--resume_from_checkpoint", "last")
    assert results["steps"] == saved + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "packing",
    [
        [],
        ["--packing", "--max_tokens_per_batch", 60],
        ["--streaming", "--save_steps", 2, "--gradient_accumulation_steps", 2],
    ],
    ids=["padded", "packed", "streamed"],
)
def test_two_real_processes_train_one_model_and_score_every_example_once(packing, tmp_path, tiny_bert):
    flags = [*text_flags(tmp_path, tiny_bert), "--max_steps", 3, "--classifier_pooling", "mean", *packing]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start_script(*flags, launcher=launcher)
    output, errors = finish(process, 240)
    assert process.returncode == 0, errors
    results = read_json_line(output)
    assert "2 processes" in output, errors
    assert results["num_examples"] == 9 and results["steps"] == 3


@pytest.mark.slow
def test_processes_that_share_sequences_train_to_the_loss_of_one(tmp_path, tiny_bert):
    folder = tmp_path / "no dropout"  # which each process would draw for itself
    shutil.copytree(tiny_bert, folder)
    rewrite_config(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    flags = [*text_flags(tmp_path, folder), "--max_steps", 6, "--gradient_accumulation_steps", 2]
    flags += ["--classifier_pooling", "mean", "--eval_steps", 2]
    expected = run(*flags, "--output_dir", tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    shared = [*flags, "--sequence_parallel_size", 2]
    output, errors = finish(start_script(*shared, launcher=launcher), 240)
    assert "2 processes" in output, errors
    results = read_json_line(output)
    assert results["num_examples"] == expected["num_examples"] == 9
    print(results["model"], expected["model"])
    assert results["model"]["loss"] == pytest.approx(expected["model"]["loss"], abs=1e-5)


def test_a_used_output_folder_is_refused_until_overwritten(tmp_path, tiny_bert):
    flags = [*text_flags(tmp_path, tiny_bert), "--max_steps", 1]
    run(*flags)
    with pytest.raises(FileExistsError, match="--overwrite_output_dir"):
        run(*flags)
    assert run(*flags, "--max_steps", 2, "--overwrite_output_dir")["steps"] == 2
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_early_stopping_ends_with_the_best_weights(tmp_path, tiny_bert):
    flags = [*text_flags(tmp_path, tiny_bert), "--eval_steps", 1, "--early_stopping_patience", 2, "--max_steps", 50]
    results = run(*flags, "--learning_rate", 1e-9, "--head_learning_rate", 1e-9)
    assert results["steps"] == 3 and results["best_step"] == 1
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert "checkpoint-1" in kept
    best = load_file(tmp_path / "out/checkpoint-1/model.safetensors")
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, best[name]), name


def test_long_documents_are_an_error_with_strict_length(tmp_path, tiny_bert):
    with pytest.raises(ValueError, match="row .* tokens, the limit is 8"):
        run(*text_flags(tmp_path, tiny_bert), "--max_length", 8, "--strict_length")


def test_frozen_layers_keep_their_weights(tmp_path, tiny_bert):
    run(*text_flags(tmp_path, tiny_bert), "--max_steps", 2, "--freeze_layers", 1)
    before, after = weights(tiny_bert), weights(tmp_path / "out")
    same = "bert.encoder.layer.0.output.dense.weight"
    changed = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(before[same], after[same]) and not torch.equal(before[changed], after[changed])


def test_mixed_precision_checkpointing_and_a_named_schedule_run(tmp_path, tiny_bert):
    flags = [*text_flags(tmp_path, tiny_bert), "--mixed_precision", "bf16", "--gradient_checkpointing"]
    results = run(*flags, "--lr_scheduler_type", "cosine", "--warmup_steps", 1, "--max_steps", 3)
    assert results["steps"] == 3
