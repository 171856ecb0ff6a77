"""Training of detectors and instance segmenters: pictures with objects in, a scored model in a folder out."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from ..checks import check_card, check_loop, check_positive
from ..conversion.label_heads import label_difference, list_sizes
from ..data.augment import AugmentOptions
from ..data.dense_examples import DenseCollator, DenseExamples
from ..data.facts import DataFacts
from ..data.readers.coco import load_coco_files, load_coco_folder
from ..data.readers.named import load_named
from ..data.readers.object_rows import encode_objects
from ..data.readers.objects import DenseData, ObjectOptions
from ..data.sets import digit_scenes
from ..files import write_json
from ..hub.folder_lock import released
from ..hub.login import check_login
from ..metrics.detection import check_evaluator
from ..mistakes import names_arguments
from ..models import (
    FADenseConfig,
    FADenseForInstanceSegmentation,
    FADenseForObjectDetection,
    FADenseImageProcessor,
)
from ..models.fa_dense_layers import HeatmapOutput
from ..options import CardOptions, LoopOptions, flat, resolve
from ..redaction import redact
from ..tables import counted
from .calls import RESUME_CALL, describe_call, fill_options
from .checkpointing import TrainingState, choose_resume, prepare_output_dir
from .data_digests import digest_objects
from .dense_backbone import build_around_backbone, freeze_backbone, make_config, note_trained
from .dense_pictures import draw_pictures
from .dense_recipe import DATA_SOURCES, DenseDataOptions, DenseModelOptions, DenseTask, recipe_of
from .dense_scores import evaluate_dense, plain_scores, score_guess, without_masks
from .job import FinetuneResult
from .network import fit_network, plan_network
from .network_card import NetworkRun, describe_start, publish_network, user_data_facts
from .report import draw_course, write_page_of
from .report_page import network_page
from .setup import make_accelerator, start_trackers

logger = logging.getLogger(__name__)

OPTIONS = {"data": DenseDataOptions, "model": DenseModelOptions, "loop": LoopOptions, "card": CardOptions}
"""Arguments of `finetune_dense` that are options objects, with their classes."""
MODELS: dict[str, type[FADenseForObjectDetection]] = {
    "object-detection": FADenseForObjectDetection,
    "instance-segmentation": FADenseForInstanceSegmentation,
}
BEST_METRICS = {"object-detection": "box_ap", "instance-segmentation": "mask_ap"}


@dataclass(frozen=True)
class DenseJob:
    """A run as it was asked for, every option resolved; `command` repeats it, `resume_command` goes on."""

    task: DenseTask
    data: DenseDataOptions
    model: DenseModelOptions
    loop: LoopOptions
    card: CardOptions
    command: str
    resume_command: str

    @property
    def has_masks(self) -> bool:
        return self.task == "instance-segmentation"


@names_arguments()
def finetune_dense(
    *,
    task: DenseTask = "instance-segmentation",
    data: DenseDataOptions | None = None,
    model: DenseModelOptions | None = None,
    loop: LoopOptions | None = None,
    card: CardOptions | None = None,
    command: str | None = None,
    resume_command: str | None = None,
) -> FinetuneResult:
    """Train a detector or an instance segmenter, score it on whole pictures, and write its folder.

    Options that are left out take the recipe of `training.dense_recipe`. Under a launcher every process calls this
    with the same arguments.

    Args:
        task: "object-detection" or "instance-segmentation".
        data: pictures with objects to read, the packaged set that stands in for them, and the views to train on.
        model: what to start from, and sizes of a new network.
        loop: batches, optimiser, evaluation, checkpoints and `output_dir`.
        card: licence, names and the upload.
        command: how the run is repeated, for the card; None describes this call.
        resume_command: what is printed after a stop by signal; None describes this call.

    Returns:
        `scores` and `baselines` as in `finetune`, with the scores of `metrics.detection.detection_scores`.

    Raises:
        ValueError: an option can't be used; the message names it.
        TypeError: an argument or an option is of the wrong type.
        DataError: a file, a picture or an object can't be used.
        ImportError: faster-coco-eval (extra `dense`) is not installed.
        FileExistsError: `output_dir` holds an earlier run and neither overwriting nor resuming was asked for.
    """
    given = fill_options({"data": data, "model": model, "loop": loop, "card": card}, OPTIONS)
    call = describe_call("finetune_dense", {"task": task}, given, has_rows=False)
    packaged = given["data"].set if given["data"].source is None else None
    recipe = recipe_of(packaged, is_pretrained=given["model"].model_name_or_path != "none")
    data, model, loop, card = (resolve(given[name], recipe) for name in OPTIONS)
    job = DenseJob(task, data, model, loop, card, command or call, resume_command or RESUME_CALL)
    check_dense(job)
    check_evaluator()  # before hours of training
    with released(loop.output_dir):
        return _run(job)


def check_dense(job: DenseJob) -> None:
    """Raise ValueError, naming the flag, where an option can't be used or contradicts another one."""
    data, model = job.data, job.model
    if job.task not in MODELS:
        raise ValueError(f"--task must be one of {', '.join(MODELS)}, got {job.task!r}.")
    check_loop(job.loop)
    check_card(job.card, job.loop)
    check_positive(data, "num_canvases", "num_eval_canvases", "canvas_size", "max_train_images", "max_eval_images")
    check_positive(model, "shortest_edge", "longest_edge")
    named = [name for name in DATA_SOURCES if getattr(data, name) is not None]
    if len(named) > 1:
        raise ValueError(f"--{named[0]} and --{named[1]} are two sources of data; give one.")
    for name in ("validation_annotations", "test_annotations", "image_folder"):
        if getattr(data, name) is not None and data.train_annotations is None:
            raise ValueError(f"--{name} goes with --train_annotations, which is missing.")
    if data.crop_size and data.crop_size < 32:
        raise ValueError(f"--crop_size must be at least 32 pixels, or 0 for whole pictures, got {data.crop_size}.")
    if len(data.scale) != 2 or not 0 < data.scale[0] <= data.scale[1]:
        raise ValueError(f"--scale must be two factors above 0, the lower first, got {' '.join(map(str, data.scale))}.")
    for name in ("flip", "min_visible", "colour"):
        if not 0 <= getattr(data, name) <= 1:
            raise ValueError(f"--{name} must lie between 0 and 1, got {getattr(data, name)}.")
    new_fields = model.config_fields | model.backbone_fields
    if model.model_name_or_path != "none" and (new_fields or model.backbone_name_or_path):
        name = next(iter(new_fields), "backbone_name_or_path")
        raise ValueError(f"--{name} is of a new network; --model_name_or_path brings its own.")
    if model.backbone_layers is not None and model.backbone_name_or_path is None:
        raise ValueError("--backbone_layers goes with --backbone_name_or_path, which is missing.")
    if model.freeze_backbone and model.model_name_or_path == "none" and model.backbone_name_or_path is None:
        raise ValueError(
            "--freeze_backbone would keep weights that were never trained; give some by --backbone_name_or_path or "
            "--model_name_or_path."
        )
    if model.freeze_pyramid and not (model.freeze_backbone and model.model_name_or_path != "none"):
        raise ValueError(
            "--freeze_pyramid goes with --freeze_backbone and a trained network, which --model_name_or_path names."
        )
    if job.loop.sequence_parallel_size > 1:
        raise ValueError("--sequence_parallel_size is for texts: pictures are not shared between processes.")


def read_data(task: DenseTask, data: DenseDataOptions, seed: int) -> DenseData:
    """Read the pictures of "train", "validation" and "test"; for detection without the masks of files.

    Raises:
        DataError: a file, a picture or an object can't be used.
    """
    options = ObjectOptions(masks=task == "instance-segmentation", drop_bad=data.drop_bad_objects, seed=seed)
    if data.coco_folder is not None:
        found = load_coco_folder(data.coco_folder, options)
    elif data.train_annotations is not None:
        files = {
            "train": data.train_annotations,
            "validation": data.validation_annotations,
            "test": data.test_annotations,
        }
        given = {split: path for split, path in files.items() if path is not None}
        found = load_coco_files(given, options=options, root=data.image_folder)
    elif data.dataset_name is not None:
        dataset = load_named(data.dataset_name, data.dataset_config_name)
        found = encode_objects(dataset, options, data.image_column_name, data.objects_column_name)
    else:
        load = {"digits": digit_scenes.load_digit_scenes, "odd_one_out": digit_scenes.load_odd_one_out}[data.set]
        try:
            found = load(data.num_canvases, data.num_eval_canvases, data.num_eval_canvases, data.canvas_size, seed)
        except ValueError as error:
            raise ValueError(f"--canvas_size {data.canvas_size}: {error}") from error
    limits = {split: data.max_train_images if split == "train" else data.max_eval_images for split in found.splits}
    return replace(found, splits={split: images[: limits[split]] for split, images in found.splits.items()})


def build_network(
    task: DenseTask, options: DenseModelOptions, class_names: list[str]
) -> tuple[FADenseForObjectDetection, FADenseImageProcessor]:
    """Build the network and its image processor, new or from a folder, for these classes.

    Raises:
        ValueError: a field of the configuration can't be used, or the weights of a backbone, or a frozen one has new
            blocks.
        FileNotFoundError: there is no such folder.
    """
    model, processor = _build_network(task, options, class_names)
    if options.freeze_backbone:
        name = options.backbone_name_or_path or options.model_name_or_path
        freeze_backbone(model, name, pyramid=options.freeze_pyramid)
    return model, processor


def _build_network(
    task: DenseTask, options: DenseModelOptions, class_names: list[str]
) -> tuple[FADenseForObjectDetection, FADenseImageProcessor]:
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    size: dict[str, Any] = {} if options.size is None else {"size": options.size}
    model_class = MODELS[task]
    if options.model_name_or_path != "none":
        folder = Path(options.model_name_or_path)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"--model_name_or_path {folder}: there is no model folder of that name")
        # Float32 whatever the folder's type: in half precision an optimizer's small steps are rounded away.
        model = model_class.from_pretrained(folder, ignore_mismatched_sizes=True, dtype=torch.float32, **labels)
        _redraw_classes(model, folder)
        return model, FADenseImageProcessor.from_pretrained(folder, **size)
    if options.backbone_name_or_path is not None:
        model, inputs = build_around_backbone(model_class, options, labels)
        return model, FADenseImageProcessor(**inputs, **size)
    return model_class(make_config(options, labels)), FADenseImageProcessor(**size)


def _redraw_classes(model: FADenseForObjectDetection, folder: Path) -> None:
    """Draw the outputs for classes anew, with a warning, where the network in `folder` was trained on other classes."""
    difference = label_difference(FADenseConfig.from_pretrained(folder), model.config)
    if difference is None:
        return
    drawn = []
    for name, part in model.named_modules():
        if isinstance(part, HeatmapOutput):
            part.reset_parameters()
            drawn += [(f"{name}.{key}", tuple(weight.shape)) for key, weight in part.named_parameters()]
    logger.warning("The head of %s starts fresh: %s. Drawn anew: %s.", folder, difference, list_sizes(drawn))


def _run(job: DenseJob) -> FinetuneResult:
    accelerator = make_accelerator(job.loop)
    if job.card.push_to_hub and accelerator.is_main_process:
        check_login(job.card.hub_model_id or job.loop.output_dir.resolve().name, job.card.hub_token)
    resume = choose_resume(job.loop.resume_from_checkpoint, job.loop.output_dir)
    job = replace(job, loop=replace(job.loop, resume_from_checkpoint=resume))
    loop = job.loop
    with accelerator.main_process_first():
        data = read_data(job.task, job.data, loop.seed)
    set_seed(loop.seed)
    model, processor = build_network(job.task, job.model, data.class_names)
    if loop.dry_run:
        examples = _build_examples(job, processor, data)
        plan = plan_network(loop, model, examples, DenseCollator(processor, job.has_masks), accelerator)
        return FinetuneResult(
            {}, {}, {}, loop.output_dir, model, processor, plan=plan if accelerator.is_main_process else None
        )
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            prepare_output_dir(loop.output_dir, overwrite=loop.overwrite_output_dir, resume=resume is not None)
    start = describe_start(job.model.model_name_or_path, job.model.backbone_name_or_path)
    config = flat(job.data, job.model, loop, job.card) | {"task": job.task, "command": job.command}
    start_trackers(accelerator, loop.report_to, "finetune_dense", config)
    model, scores, run, state = _fit(job, model, processor, data, accelerator)
    accelerator.end_training()
    note_trained(model)
    baselines: dict[str, dict] = {}
    summary: dict[str, Any] = {}
    pushed = None
    if accelerator.is_main_process:
        truths = data.splits["test"] if job.has_masks else without_masks(data.splits["test"])
        baselines["a guess"] = score_guess(data.splits["train"], truths, data.class_names)
        summary = _summarise(job, scores, baselines, run, model)
        write_json(loop.output_dir / "all_results.json", summary)
        finished = _describe(job, data, scores, baselines, run, model.config.num_queries, start)
        try:
            pushed = publish_network(model, processor, finished, job.card, loop.output_dir)
        finally:
            draw_pictures(model, processor, truths, data.class_names, loop.output_dir / "pictures")
            draw_course(loop.output_dir, state)
            write_page_of(
                loop.output_dir,
                lambda: network_page(summary, state, finished.data.name, model.device, loop.output_dir),
            )
    return FinetuneResult(scores, baselines, summary, loop.output_dir, model, processor, pushed)


def _fit(
    job: DenseJob,
    model: FADenseForObjectDetection,
    processor: FADenseImageProcessor,
    data: DenseData,
    accelerator: Accelerator,
) -> tuple[FADenseForObjectDetection, dict[str, Any], dict[str, Any], TrainingState]:
    """Train, and score on "test"; returns the plain model, its scores, the figures of the run, and how it ended."""
    truths = _truths(job, data)

    def evaluate(trained: Any, loader: DataLoader, split: str) -> dict[str, Any]:
        return evaluate_dense(trained, processor, loader, truths[split], data.class_names, accelerator)

    trained, scores, run, state = fit_network(
        job.loop,
        model,
        _build_examples(job, processor, data),
        DenseCollator(processor, job.has_masks),
        accelerator,
        evaluate=evaluate,
        score_split="test",
        best_metric=job.loop.metric_for_best_model or BEST_METRICS[job.task],
        description=f"{model.config.attention_kind} blocks at {', '.join(model.config.places) or 'no place'}",
        resume_command=job.resume_command,
        digest=lambda: digest_objects(data.splits) | {"the views": str(_views(job.data))},
    )
    if job.model.freeze_backbone:  # a new model where the weights were sharded
        trained.freeze_backbone(pyramid=job.model.freeze_pyramid)
    return trained, scores, run, state


def _views(options: DenseDataOptions) -> AugmentOptions:
    return AugmentOptions(
        crop_size=options.crop_size or None,
        scale=(options.scale[0], options.scale[1]),
        flip=options.flip,
        min_visible=options.min_visible,
        colour=options.colour,
        swap_colours=options.swap_colours,
    )


def _truths(job: DenseJob, data: DenseData) -> dict[str, Any]:
    """The pictures of the splits that are scored, for detection without masks."""
    scored = {split: images for split, images in data.splits.items() if split != "train"}
    return {split: images if job.has_masks else without_masks(images) for split, images in scored.items()}


def _build_examples(job: DenseJob, processor: FADenseImageProcessor, data: DenseData) -> dict[str, DenseExamples]:
    examples = {"train": DenseExamples(data.splits["train"], processor.size, _views(job.data), job.loop.seed)}
    return examples | {split: DenseExamples(images, processor.size) for split, images in _truths(job, data).items()}


def _summarise(
    job: DenseJob, scores: dict, baselines: dict[str, dict], run: dict, model: FADenseForObjectDetection
) -> dict[str, Any]:
    source = job.data.source
    summary = {
        "task": job.task,
        "data": job.data.set if source is None else str(getattr(job.data, source)),
        "split": "test",
        "num_examples": scores["num_examples"],
        "model": plain_scores(scores) | {"loss": scores["loss"]},
        "per_class": scores["per_class"],
        "baselines": baselines,
        "parameters": model.num_parameters(),
        "frozen_parameters": model.num_parameters() - model.num_parameters(True),
        **run,
        "seed": job.loop.seed,
        "command": job.command,
        "output_dir": str(job.loop.output_dir),
    }
    return redact(summary)


def _describe(
    job: DenseJob,
    data: DenseData,
    scores: dict[str, Any],
    baselines: dict[str, dict],
    run: dict[str, Any],
    num_queries: int,
    start: tuple[str, str],
) -> NetworkRun:
    """Return what the card says of the run."""
    source, names = job.data.source, ", ".join(data.class_names[:20]) + (", …" if len(data.class_names) > 20 else "")
    if source is None:
        facts = DataFacts(
            name=f"{job.data.set.replace('_', ' ')} on canvases of {job.data.canvas_size} px",
            license=digit_scenes.LICENSE,
            attribution=digit_scenes.ATTRIBUTION,
        )
    else:
        facts = user_data_facts(job.card, getattr(job.data, source))
    kinds = ("box", "mask") if job.has_masks else ("box",)
    return NetworkRun(
        summary=f"It finds {'the masks and boxes' if job.has_masks else 'the boxes'} of objects of "
        f"{counted(len(data.class_names), 'class')}: {names}.",
        pipeline_tag="image-segmentation" if job.has_masks else "object-detection",
        start=start,
        data=facts,
        split="test",
        metrics={f"{kind}_{name}": f"{kind}_{name}" for kind in kinds for name in ("ap", "ap50")},
        scores=scores,
        baselines=baselines,
        run=run,
        command=job.command,
        seed=job.loop.seed,
        limits=(f"At most {counted(num_queries, 'object')} of an image can be found.",),
        kept=_describe_kept(job.model),
    )


def _describe_kept(options: DenseModelOptions) -> str:
    """Say which part of the network was not trained, for the card; empty where all of it was."""
    if options.freeze_pyramid:
        return "its backbone and pyramid kept as they were, but for attention blocks of the pyramid"
    return "its backbone kept as it was" if options.freeze_backbone else ""
