"""Training of a stereo network: pairs with disparities in, a scored model in a folder out."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from ..checks import check_card, check_loop
from ..data.facts import DataFacts
from ..data.readers.stereo_folders import check_sizes, find_stereo_pairs
from ..data.readers.tables import DataError
from ..data.sets import stereo_scenes
from ..data.stereo_examples import FolderSamples, Samples, SceneSamples, StereoCollator, StereoExamples
from ..evaluation import evaluating
from ..files import write_json
from ..hub.folder_lock import released
from ..hub.login import check_login
from ..metrics.stereo import score_disparity, total_scores
from ..mistakes import names_arguments
from ..models import FAStereoConfig, FAStereoForDepthEstimation, FAStereoImageProcessor
from ..options import CardOptions, LoopOptions, flat, resolve
from ..redaction import redact
from ..tables import counted
from .calls import RESUME_CALL, describe_call, fill_options
from .checkpointing import TrainingState, choose_resume, prepare_output_dir
from .job import FinetuneResult
from .network import fit_network, plan_network
from .network_card import NetworkRun, describe_start, publish_network, user_data_facts
from .report import draw_course, write_page_of
from .report_page import network_page
from .setup import make_accelerator, start_trackers
from .stereo_pictures import draw_pictures
from .stereo_recipe import StereoDataOptions, StereoModelOptions, recipe_of

logger = logging.getLogger(__name__)

OPTIONS = {"data": StereoDataOptions, "model": StereoModelOptions, "loop": LoopOptions, "card": CardOptions}
"""Arguments of `finetune_stereo` that are options objects, with their classes."""
BEST_METRIC = "epe"
VALIDATION_SHARE = 0.1
SAMPLED_PAIRS = 50
"""Training pairs from which the median disparity, the constant guess, is told."""


@dataclass(frozen=True)
class StereoJob:
    """A stereo run as it was asked for, every option resolved; `command` repeats it, `resume_command` goes on."""

    data: StereoDataOptions
    model: StereoModelOptions
    loop: LoopOptions
    card: CardOptions
    command: str
    resume_command: str


@names_arguments()
def finetune_stereo(
    *,
    data: StereoDataOptions | None = None,
    model: StereoModelOptions | None = None,
    loop: LoopOptions | None = None,
    card: CardOptions | None = None,
    command: str | None = None,
    resume_command: str | None = None,
) -> FinetuneResult:
    """Train a stereo network, score it, and write its folder, which `FAStereoPipeline` loads.

    Options that are left out take the recipe of `training.stereo_recipe`. Under a launcher every process calls this
    with the same arguments.

    Args:
        data: folders to read, crops, and the generated scenes that stand in for folders.
        model: what to start from, and sizes of a new network.
        loop: batches, optimiser, evaluation, checkpoints and `output_dir`.
        card: licence, names and the upload.
        command: how the run is repeated, for the card; None describes this call.
        resume_command: what is printed after a stop by signal; None describes this call.

    Returns:
        `scores` and `baselines` as in `finetune`, with the scores of `StereoScores.compute`.

    Raises:
        ValueError: an option can't be used; the message names it.
        TypeError: an argument or an option is of the wrong type.
        DataError: a folder or a file in it can't be used.
        FileExistsError: `output_dir` holds an earlier run and neither overwriting nor resuming was asked for.
    """
    given = fill_options({"data": data, "model": model, "loop": loop, "card": card}, OPTIONS)
    call = describe_call("finetune_stereo", {}, given, has_rows=False)
    is_pretrained = given["model"].model_name_or_path != "none"
    recipe = recipe_of(is_demo=given["data"].train_folder is None, is_pretrained=is_pretrained)
    data, model, loop, card = (resolve(given[name], recipe) for name in OPTIONS)
    job = StereoJob(data, model, loop, card, command or call, resume_command or RESUME_CALL)
    check_stereo(job)
    with released(loop.output_dir):
        return _run(job)


def check_stereo(job: StereoJob) -> None:
    """Raise ValueError, naming the flag, where an option can't be used or contradicts another one."""
    data = job.data
    check_loop(job.loop)
    check_card(job.card, job.loop)
    for name in ("crop_height", "crop_width"):
        if getattr(data, name) < 16:
            raise ValueError(f"--{name} must be at least 16 pixels, got {getattr(data, name)}.")
    for name in ("num_scenes", "num_eval_scenes", "max_train_pairs", "max_eval_pairs"):
        if getattr(data, name) is not None and getattr(data, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(data, name)}.")
    for name in ("validation_folder", "test_folder"):
        if getattr(data, name) is not None and data.train_folder is None:
            raise ValueError(f"--{name} needs a --train_folder: without one the scenes are generated.")
    if job.model.model_name_or_path != "none" and job.model.config_fields:
        name = next(iter(job.model.config_fields))
        raise ValueError(f"--{name} is of a new network; --model_name_or_path brings its own.")
    if job.loop.sequence_parallel_size > 1:
        raise ValueError("--sequence_parallel_size is for texts: pairs are not shared between processes.")


def build_network(options: StereoModelOptions) -> tuple[FAStereoForDepthEstimation, FAStereoImageProcessor]:
    """Build the network and its image processor, new or from a folder.

    Raises:
        ValueError: a field of the configuration can't be used.
        FileNotFoundError: there is no such folder.
    """
    scale = {} if options.scale_factor is None else {"scale_factor": options.scale_factor}
    if options.model_name_or_path == "none":
        config = FAStereoConfig(**options.config_fields)
        return FAStereoForDepthEstimation(config), FAStereoImageProcessor(**scale)
    folder = Path(options.model_name_or_path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--model_name_or_path {folder}: there is no model folder of that name")
    return (
        # Float32 whatever the folder's type: in half precision an optimizer's small steps are rounded away.
        FAStereoForDepthEstimation.from_pretrained(folder, dtype=torch.float32),
        FAStereoImageProcessor.from_pretrained(folder, **scale),
    )


def read_samples(data: StereoDataOptions, max_disparity: int, seed: int) -> dict[str, Samples]:
    """Return the samples of "train", "validation" and, where there is one, "test".

    Raises:
        DataError: a folder can't be read, sizes in it differ, or it has too few pairs to draw validation from.
    """
    if data.train_folder is None:
        counts = (data.num_scenes, data.num_eval_scenes, data.num_eval_scenes)
        scenes = stereo_scenes.load_stereo_scenes(*counts, (data.scene_height, data.scene_width), max_disparity, seed)
        return {split: SceneSamples(part) for split, part in scenes.items()}
    folders = {"train": data.train_folder, "validation": data.validation_folder, "test": data.test_folder}
    pairs = {split: find_stereo_pairs(folder) for split, folder in folders.items() if folder is not None}
    if "validation" not in pairs:
        count = round(VALIDATION_SHARE * len(pairs["train"])) or 1
        if len(pairs["train"]) < 2:
            raise DataError(f"{data.train_folder}: one pair is too few to draw validation from; give a folder for it")
        order = np.random.default_rng(seed).permutation(len(pairs["train"]))
        pairs["validation"] = [pairs["train"][index] for index in sorted(order[:count])]
        pairs["train"] = [pairs["train"][index] for index in sorted(order[count:])]
        logger.warning(
            "no --validation_folder was given: %s drawn with seed %d",
            counted(count, "training pair", "was", "were"),
            seed,
        )
    limits = {split: data.max_train_pairs if split == "train" else data.max_eval_pairs for split in pairs}
    pairs = {split: part[: limits[split]] for split, part in pairs.items()}
    for part in pairs.values():
        check_sizes(part)
    return {split: FolderSamples(part, data.png_scale) for split, part in pairs.items()}


def _run(job: StereoJob) -> FinetuneResult:
    accelerator = make_accelerator(job.loop)
    if job.card.push_to_hub and accelerator.is_main_process:
        check_login(job.card.hub_model_id or job.loop.output_dir.resolve().name, job.card.hub_token)
    resume = choose_resume(job.loop.resume_from_checkpoint, job.loop.output_dir)
    job = replace(job, loop=replace(job.loop, resume_from_checkpoint=resume))
    loop, data = job.loop, job.data
    set_seed(loop.seed)
    model, processor = build_network(job.model)
    with accelerator.main_process_first():
        samples = read_samples(data, model.config.max_disparity, loop.seed)
        if accelerator.is_main_process and not loop.dry_run:
            prepare_output_dir(loop.output_dir, overwrite=loop.overwrite_output_dir, resume=resume is not None)
    if loop.dry_run:
        plan = plan_network(loop, model, _build_examples(job, samples), StereoCollator(processor), accelerator)
        return FinetuneResult(
            {}, {}, {}, loop.output_dir, model, processor, plan=plan if accelerator.is_main_process else None
        )
    start = describe_start(job.model.model_name_or_path)
    config = flat(data, job.model, loop, job.card) | {"task": "stereo-depth-estimation", "command": job.command}
    start_trackers(accelerator, loop.report_to, "finetune_stereo", config)
    split = "test" if "test" in samples else "validation"
    model, scores, run, state = _fit(job, model, processor, samples, split, accelerator)
    accelerator.end_training()
    baselines: dict[str, dict] = {}
    summary: dict[str, Any] = {}
    pushed = None
    if accelerator.is_main_process:
        baselines["constant"] = score_constant(samples["train"], samples[split])
        summary = _summarise(job, scores, baselines, run, split, model.num_parameters())
        write_json(loop.output_dir / "all_results.json", summary)
        finished = _describe(job, scores, baselines, run, split, start)
        try:
            pushed = publish_network(model, processor, finished, job.card, loop.output_dir)
        finally:
            draw_pictures(model, processor, samples[split], loop.output_dir / "pictures")
            draw_course(loop.output_dir, state)
            write_page_of(
                loop.output_dir,
                lambda: network_page(summary, state, finished.data.name, model.device, loop.output_dir),
            )
    return FinetuneResult(scores, baselines, summary, loop.output_dir, model, processor, pushed)


def _fit(
    job: StereoJob,
    model: FAStereoForDepthEstimation,
    processor: FAStereoImageProcessor,
    samples: dict[str, Samples],
    score_split: str,
    accelerator: Accelerator,
) -> tuple[FAStereoForDepthEstimation, dict[str, Any], dict[str, Any], TrainingState]:
    """Train, and score on `score_split`; returns the plain model, its scores, the run's figures, and how it ended."""
    loop = job.loop
    return fit_network(
        loop,
        model,
        _build_examples(job, samples),
        StereoCollator(processor),
        accelerator,
        evaluate=lambda trained, loader, split: evaluate_stereo(trained, loader, accelerator),
        score_split=score_split,
        best_metric=loop.metric_for_best_model or BEST_METRIC,
        description=f"blocks on {', '.join(model.config.attention_blocks) or 'nothing'}",
        resume_command=job.resume_command,
        digest=lambda: {"the pairs": _describe_pairs(job)},
    )


def _build_examples(job: StereoJob, samples: dict[str, Samples]) -> dict[str, StereoExamples]:
    data, crop = job.data, (job.data.crop_height, job.data.crop_width)
    return {
        split: StereoExamples(part, crop, data.augment, job.loop.seed) if split == "train" else StereoExamples(part)
        for split, part in samples.items()
    }


def _describe_pairs(job: StereoJob) -> str:
    """Return what decides the training pairs, for a resumed run to compare."""
    data = job.data
    names = (
        "train_folder", "validation_folder", "max_train_pairs", "png_scale", "crop_height", "crop_width", "augment",
        "num_scenes", "scene_height", "scene_width",
    )  # fmt: skip
    return ", ".join(f"{name}={getattr(data, name)}" for name in names)


def _summarise(
    job: StereoJob, scores: dict, baselines: Mapping[str, dict], run: dict, split: str, parameters: int
) -> dict[str, Any]:
    source = "generated scenes" if job.data.train_folder is None else str(job.data.train_folder)
    summary = {
        "task": "stereo-depth-estimation",
        "data": source,
        "split": split,
        "num_examples": scores["num_examples"],
        "model": {name: value for name, value in scores.items() if isinstance(value, float)},
        "baselines": dict(baselines),
        "parameters": parameters,
        **run,
        "seed": job.loop.seed,
        "command": job.command,
        "output_dir": str(job.loop.output_dir),
    }
    return redact(summary)


def _describe(
    job: StereoJob,
    scores: dict[str, Any],
    baselines: dict[str, dict],
    run: dict[str, Any],
    split: str,
    start: tuple[str, str],
) -> NetworkRun:
    """Return what the card says of the run."""
    if job.data.train_folder is None:
        facts = DataFacts(
            name="generated stereo scenes",
            license=stereo_scenes.LICENSE,
            attribution=stereo_scenes.ATTRIBUTION,
        )
    else:
        facts = user_data_facts(job.card, job.data.train_folder)
    return NetworkRun(
        summary="It finds the disparities of the left image of a rectified pair, and from them depths.",
        pipeline_tag="depth-estimation",
        start=start,
        data=facts,
        split=split,
        metrics={name: name for name in ("epe", "over_3px")},
        scores=scores,
        baselines=baselines,
        run=run,
        command=job.command,
        seed=job.loop.seed,
        limits=("Disparities from the network's largest one on are not found.",),
    )


def evaluate_stereo(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, Any]:
    """Return the scores over all valid pixels of the loader's pairs, each pair counted once, and the mean loss.

    Disparities from the model's `max_disparity` on count too, as errors: they are part of what a user gets.
    """
    rows = []
    with evaluating(model):
        for batch in loader:
            output = model(**batch)
            predicted = output.predicted_depth.float().cpu().numpy()
            labels, known = batch["labels"].cpu().numpy(), batch["labels_mask"].cpu().numpy()
            parts = zip(predicted, labels, known, strict=True)
            local = [(score_disparity(*part), output.loss.item()) for part in parts]
            rows += accelerator.gather_for_metrics(local, use_gather_object=True)
    scores = total_scores(pair for pair, _ in rows).compute()
    return scores | {"loss": float(np.mean([loss for _, loss in rows])), "num_examples": len(rows)}


def score_constant(train: Samples, scored: Samples) -> dict[str, float]:
    """Return the scores of the same disparity everywhere, the median of some training pairs': what a guess reaches."""
    known = []
    for index in np.linspace(0, len(train) - 1, min(SAMPLED_PAIRS, len(train))).round().astype(int):
        sample = train[int(index)]
        known.append(np.asarray(sample.disparity)[np.asarray(sample.valid)])
    guess = np.float32(np.median(np.concatenate(known)))
    scores = []
    for index in range(len(scored)):
        sample = scored[index]
        true, valid = np.asarray(sample.disparity), np.asarray(sample.valid)
        scores.append(score_disparity(np.full_like(true, guess), true, valid))
    return total_scores(scores).compute()
