"""What a run leaves behind: its table, JSON line and figures, and the facts for the model card."""

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from ..charts import new_figure, save_figure
from ..conversion.packaged import resolve_checkpoint
from ..conversion.source import describe_folder, locate_encoder
from ..data.collators import label_tensor
from ..data.examples import count_patches
from ..data.labelled import LabelledData
from ..data.word_counts import tfidf_baseline
from ..files import write_json, write_text
from ..hub.card import FROM_SCRATCH, ModelFacts, ScoreFacts, SpeedFacts, describe_replacement
from ..hub.timing import describe_hardware, measure_speed
from ..metrics import load_metric
from ..tables import format_table
from .checkpointing import TrainingState

# Name in our scores -> the Hub's name of the metric, for the model card.
CARD_METRICS = {
    "single_label_classification": {"accuracy": "accuracy", "macro_f1": "f1"},
    "multi_label_classification": {"micro_f1": "f1", "accuracy": "exact_match"},
    "regression": {"mse": "mse", "mae": "mae"},
}
TABLE_COLUMNS = ("accuracy", "macro_f1", "micro_f1", "mse", "mae", "pearson", "spearman")
# Softmax attention at more tokens would take minutes on a CPU, only to fill a row of the card.
LONGEST_TIMED_ON_CPU = 4096


def constant_scores(data: LabelledData) -> dict:
    """Scores of the best constant answer: the majority class, each label that most rows have, or the mean number."""
    labels = list(data.dataset["train"]["label"])
    references = list(data.dataset[data.score_split]["label"])
    names = {"label_names": data.label_names}
    if data.problem_type == "single_label_classification":
        answer = Counter(labels).most_common(1)[0][0]
    elif data.problem_type == "multi_label_classification":
        rows = label_tensor(labels, data.problem_type, data.num_labels)
        answer = (rows.mean(dim=0) > 0.5).int().tolist()
        references = label_tensor(references, data.problem_type, data.num_labels).int().tolist()
    else:
        answer, names = statistics.fmean(labels), {}
    return load_metric(data.problem_type).compute(
        predictions=[answer] * len(references), references=references, **names
    )


def score_baselines(data: LabelledData) -> dict[str, dict]:
    """Scores of what needs no network: a constant answer, and for single-label text TF-IDF + logistic regression.

    Nobody has all rows of a stream at once: its constant answer is that of the validation data, and there is no second.
    """
    part = "training" if data.stream is None else "validation"
    constant = f"mean of the {part} labels" if data.problem_type == "regression" else "majority class"
    if data.stream is not None:
        return {constant: constant_scores(data)}
    scores = {constant: constant_scores(data)}
    if data.problem_type == "single_label_classification" and "text" in data.dataset["train"].column_names:
        scores["TF-IDF + logistic regression"] = tfidf_baseline(data.dataset, data.score_split)
    return scores


def summarise(args: argparse.Namespace, data: LabelledData, fitted: dict, rivals: dict[str, dict]) -> dict:
    """The content of `all_results.json` and of the JSON line: scores, those of the rivals, figures of the run."""
    kept = (*TABLE_COLUMNS, "loss")
    return {
        "task": args.task,
        "data": data.facts.name,
        "split": data.score_split,
        "num_examples": fitted["scores"]["num_examples"],
        "model": {name: fitted["scores"][name] for name in kept if name in fitted["scores"]},
        "baselines": {name: {key: scores[key] for key in kept if key in scores} for name, scores in rivals.items()},
        "parameters": fitted["model"].num_parameters(),
        **fitted["run"],
        "seed": args.seed,
        "command": args.command,
        "output_dir": str(args.output_dir),
    }


def describe_run(state: TrainingState) -> dict:
    """The figures of a run: steps, whole epochs, tokens, seconds without evaluation and checkpoints."""
    return {
        "steps": state.step,
        "epochs": state.epoch,
        "best_step": state.best_step,
        "train_tokens": state.tokens,
        "train_seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
        "data_wait_share": round(state.data_wait_share, 4),
    }


def print_results(results: dict) -> None:
    """Print the table of the model beside the baselines, then everything as one line of JSON, without NaN."""
    scored = {"this model": results["model"], **results["baselines"]}
    columns = [name for name in TABLE_COLUMNS if name in results["model"]]
    rows = [{"model": name, **scores} for name, scores in scored.items()]
    print(f"\n{results['data']}, {results['split']} split, {results['num_examples']} examples:\n")
    print(format_table(rows, ["model", *columns]))
    print(json.dumps(results, ensure_ascii=False, allow_nan=False))


def build_facts(args: argparse.Namespace, data: LabelledData, fitted: dict, rivals: dict[str, dict]) -> ModelFacts:
    """The facts of the model card, all from this run's flags and figures."""
    model, run = fitted["model"], fitted["run"]
    is_text = args.task == "text-classification"
    base_model, revision = describe_base_model(args)
    what = f"documents of up to {args.max_length:,} tokens" if is_text else f"images of {args.image_size} px a side"
    names = data.label_names or []
    number = "any" if data.problem_type == "multi_label_classification" else "one"
    answer = f"{number} of {len(names)} labels: {', '.join(names[:20])}" if names else "one number"
    minutes = run["train_seconds"] / 60
    return ModelFacts(
        repo_id=args.hub_model_id or args.output_dir.resolve().name,
        summary=f"A factorized encoder that gives {what} {answer}.",
        pipeline_tag=args.task,
        auto_class="AutoModelForSequenceClassification" if is_text else "AutoModelForImageClassification",
        language=args.language,
        license=args.license,
        base_model=base_model,
        base_model_revision=revision,
        replaced=describe_replacement(model),
        trained_after=f"{run['steps']:,} steps, {run['train_tokens']:,} tokens of {data.facts.name}, seed {args.seed}.",
        data=[data.facts],
        command=args.command,
        hardware=f"{describe_hardware(model.device)}; trained for {minutes:.1f} minutes",
        scores=[
            ScoreFacts(
                dataset=data.facts.name,
                split=data.score_split,
                metric=hub_name,
                value=fitted["scores"][name],
                baselines={rival: scores[name] for rival, scores in rivals.items()},
            )
            for name, hub_name in CARD_METRICS[data.problem_type].items()
        ],
        speed=time_by_length(model, args),
        limits=describe_limits(args, data, fitted),
    )


def describe_base_model(args: argparse.Namespace) -> tuple[str, str]:
    """Hub name and revision of what the run started from, where it was local as `describe_folder` has them."""
    if args.model_name_or_path == "none":
        return FROM_SCRATCH, FROM_SCRATCH
    source = resolve_checkpoint(args.model_name_or_path)
    if not Path(source).is_dir():
        # The cache keeps each revision in a folder that is named by its commit.
        cached = try_to_load_from_cache(source, "config.json")
        return args.base_model or source, Path(cached).parent.name if isinstance(cached, str) else "not recorded"
    name, revision = describe_folder(args.model_name_or_path, locate_encoder(source))
    return args.base_model or name, revision


def describe_limits(args: argparse.Namespace, data: LabelledData, fitted: dict) -> list[str]:
    num_examples = fitted["scores"]["num_examples"]
    limits = [f"Scores are from one run with one seed on {num_examples} examples of the {data.score_split} split."]
    if "accuracy" in fitted["scores"]:
        half_width = 1.96 * math.sqrt(fitted["scores"]["accuracy"] * (1 - fitted["scores"]["accuracy"]) / num_examples)
        limits.append(f"The 95 % interval of its accuracy is about ±{half_width:.3f}.")
    if args.task == "text-classification":
        limits.append(f"Tokens after the first {args.max_length:,} of a document are cut off.")
    else:
        limits.append(f"Images are resized to {args.image_size} x {args.image_size} px, whatever their shape.")
    limits.append("The same model with softmax attention was not trained for comparison.")
    limits.append("It was tested neither on other data nor for bias, and it answers unlike input too.")
    return limits


def time_by_length(model: PreTrainedModel, args: argparse.Namespace) -> list[SpeedFacts]:
    """Time and memory of one document or image, beside softmax attention, at the lengths that the card shows."""
    generator = torch.Generator().manual_seed(0)
    if args.task == "image-classification":
        shape = (1, model.config.num_channels, args.image_size, args.image_size)
        pixel_values = torch.rand(shape, generator=generator).to(model.device, model.dtype)
        return [measure_speed(model, {"pixel_values": pixel_values}, count_patches(args.image_size, model.config))]
    longest = args.max_length if model.device.type != "cpu" else min(args.max_length, LONGEST_TIMED_ON_CPU)
    speed = []
    for length in sorted({min(512, longest), longest}):
        tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
        speed.append(measure_speed(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, length))
    return speed


def plot_confusion_matrix(matrix: Sequence[Sequence[int]], label_names: Sequence[str], path: Path) -> None:
    """Write a PNG of a confusion matrix: rows are true classes, colour is the share of the row, figures are counts."""
    counts = torch.tensor(matrix, dtype=torch.float64)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    side = 2.5 + 0.55 * len(label_names)
    figure, axes = new_figure(size=(side, side))
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    positions = range(len(label_names))
    axes.set_xticks(positions, label_names, rotation=45, ha="right")
    axes.set_yticks(positions, label_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(label_names) <= 30:
        for row in positions:
            for column in positions:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(matrix[row][column]), ha="center", va="center", color=colour)
    save_figure(figure, path)


def write_report(folder: Path, results: dict, scores: dict, label_names: Sequence[str]) -> None:
    """Write `all_results.json`, and for classification `per_class.txt` and `confusion_matrix.png`, to `folder`."""
    write_json(folder / "all_results.json", results)
    if "per_class" in scores:
        table = format_table(scores["per_class"], ["label", "precision", "recall", "f1", "support"])
        write_text(folder / "per_class.txt", table + "\n")
    if "confusion_matrix" in scores:
        plot_confusion_matrix(scores["confusion_matrix"], label_names, folder / "confusion_matrix.png")
