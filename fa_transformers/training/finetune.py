"""Fine-tuning of a factorized encoder: data in, a scored model in a folder that is ready to publish out."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from ..checks import check_run
from ..conversion.convert import load_factorized
from ..conversion.image_processors import fit_image_processor, native_side
from ..conversion.source import CheckpointSource, read_pooling, read_source
from ..data.batching import BatchSource
from ..data.examples import build_examples, count_patches
from ..data.labelled import LabelledData, load_data
from ..data.tokenizing import load_tokenizer
from ..hub.folder_lock import released
from ..hub.login import check_login
from ..hub.publish import publish
from ..hub.push import push
from ..lora import require_peft, set_location
from ..memory import return_freed_memory
from ..metrics import BEST_METRICS
from ..mistakes import names_arguments
from ..models import FAViTConfig, FAViTForImageClassification, FAViTImageProcessor
from ..models.configuration_fa import FactorizedConfig
from ..options import UNSET, CardOptions, DataOptions, LoopOptions, ModelOptions, flat, resolve
from ..prediction.lengths import score_at_lengths
from ..prediction.predictor import MAX_TOKENS_PER_BATCH, Predictor
from ..redaction import redact
from .adapters import BASE_FOLDER, add_adapter, remove_adapter, save_adapter
from .baselines import score_baselines
from .calls import RESUME_CALL, describe_call, fill_options
from .card_facts import build_facts, describe_cut, describe_shape
from .checkpointing import choose_resume, list_checkpoints, prepare_output_dir, read_settings
from .data_digests import digest_data, digest_once
from .job import Built, FinetuneJob, FinetuneResult, Fitted
from .loaders import build_loaders
from .loop import plan_steps, run_training
from .optimizer import build_optimizer, freeze_bottom_layers, group_parameters
from .plan import make_plan
from .predictions import Predictions
from .progress import describe_memory
from .recipes import STOCK_TEXT_LAYERS, Task, count_short_epochs, recipe_of
from .recovery import (
    Recovery,
    describe_exchange,
    describe_recovery,
    forget_transfer,
    plan_recovery,
    recover,
    time_transfer,
)
from .report import (
    describe_labels,
    describe_run,
    draw_course,
    draw_report,
    summarise,
    write_page_of,
    write_predictions,
    write_report,
)
from .report_page import classifier_page
from .scoring import evaluate, predict
from .setup import (
    SHARDING,
    count_replicas,
    describe_processes,
    gather_model,
    log_after,
    make_accelerator,
    share_sequences,
    start_trackers,
)

CANVAS = dict(num_train=800, num_validation=100, num_test=200, size_px=1024)
SMALL_FAVIT = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, patch_size=16,
    initializer_range=0.1,
)  # fmt: skip
LOW_RESOLUTION_PX = 224
OPTIONS = {"data": DataOptions, "model": ModelOptions, "loop": LoopOptions, "card": CardOptions}
"""Arguments of `finetune` that are options objects, with their classes."""


@names_arguments()
def finetune(
    rows: Mapping | datasets.Dataset | datasets.DatasetDict | None = None,
    *,
    task: Task = "text-classification",
    data: DataOptions | None = None,
    model: ModelOptions | None = None,
    loop: LoopOptions | None = None,
    card: CardOptions | None = None,
    full_recipe: bool = False,
    command: str | None = None,
    resume_command: str | None = None,
) -> FinetuneResult:
    """Fine-tune a factorized classifier or regressor, score it, and write a folder ready to publish.

    Options that are left out take the task's recipe (`training.recipes`). Under a launcher every process calls this
    with the same arguments.

    Args:
        rows: data given in Python: a mapping of columns such as {"text": [...], "label": [...]}, a Dataset, or a
            DatasetDict with the split "train"; None reads what `data` names, or else the built-in demo.
        task: "text-classification" or "image-classification".
        data: files or data sets to read, and the columns in them.
        model: what to start from, lengths and sizes, and fields of the config.
        loop: batches, optimiser, evaluation, checkpoints and `output_dir`.
        card: licence, names and the upload.
        full_recipe: the demo's long recipe.
        command: how the run is repeated, for the card; None describes this call.
        resume_command: what is printed after a stop by signal; None describes this call.

    Raises:
        ValueError: an option can't be used or contradicts another one; the message names it.
        ModuleNotFoundError: `lora_rank` is given and peft is not installed.
        TypeError: `rows`, an argument or an option is of the wrong type.
        DataError: a row, column or label can't be used.
        FileExistsError: `output_dir` holds an earlier run and neither overwriting nor resuming was asked for.
    """
    given = fill_options({"data": data, "model": model, "loop": loop, "card": card}, OPTIONS)
    call = describe_call("finetune", {"task": task}, given, has_rows=rows is not None)
    data, model, loop, card = given["data"], given["model"], given["loop"], given["card"]
    is_demo = rows is None and data.is_demo
    if full_recipe and not is_demo:
        named = f"--{data.sources[0]}" if data.sources else "`rows`"
        raise ValueError(f"--full_recipe is of the built-in demo data; {named} has its own flags.")
    recipe = recipe_of(task, is_demo=is_demo, model_name_or_path=model.model_name_or_path or None, full=full_recipe)
    data, model = resolve(data, recipe), resolve(model, recipe)
    loop, card = resolve(loop, recipe), resolve(card, recipe)
    check_run(data, model, loop, card, is_text=task == "text-classification")
    if model.lora_rank:
        require_peft("--lora_rank")
    job = FinetuneJob(task, data, model, loop, card, command or call, resume_command or RESUME_CALL)
    with released(loop.output_dir):
        return _run(job, rows)


def _run(job: FinetuneJob, rows: Any) -> FinetuneResult:
    """Read the data, train and score, and on the main process compare, write and upload."""
    if job.model.gradient_checkpointing:  # memory for time, here too: 1.5 s of system time on 8 s of CPU time
        return_freed_memory()
    accelerator = make_accelerator(job.loop)
    count_replicas(job.loop, accelerator)  # which refuses a group of processes that does not come out even
    if job.model.lora_rank and accelerator.distributed_type in SHARDING:
        raise ValueError("--lora_rank needs whole weights on every process, which FSDP and DeepSpeed shard: use DDP.")
    if job.card.push_to_hub and accelerator.is_main_process:
        check_login(job.card.hub_model_id or job.loop.output_dir.resolve().name, job.card.hub_token)
    job = replace(job, loop=_with_resume(job.loop))
    output_dir = job.loop.output_dir
    # First: a mistyped checkpoint or file must not cost the checkpoints that are overwritten.
    name = job.model.model_name_or_path
    source = None if name == "none" else read_source(name)
    job = replace(job, loop=_with_short_epochs(job.loop, source))
    with accelerator.main_process_first():
        canvas = CANVAS | {"seed": job.loop.seed}
        data = load_data(job.task, job.data, job.card, job.loop.seed, canvas, rows)
        if accelerator.is_main_process and not job.loop.dry_run:
            is_resumed = job.loop.resume_from_checkpoint is not None
            prepare_output_dir(output_dir, overwrite=job.loop.overwrite_output_dir, resume=is_resumed)
            if not is_resumed:
                remove_adapter(output_dir, source.model_folder if source else None)
    if job.loop.dry_run:
        return _plan(job, source, data, accelerator)
    config = flat(job.data, job.model, job.loop, job.card) | {"task": job.task, "command": job.command}
    start_trackers(accelerator, job.loop.report_to, "finetune", config)
    fitted = fit(job, source, data, accelerator, output_dir)
    baselines: dict[str, dict] = {}
    if data.is_demo and not job.is_text:
        small = _fit_at_low_resolution(job, source, data, accelerator, fitted.state.step)
        baselines[f"the same at {LOW_RESOLUTION_PX} px"] = small.scores
    accelerator.end_training()  # and with it the process group: the others may end while the main process publishes
    summary: dict[str, Any] = {}
    pushed = None
    if accelerator.is_main_process:
        baselines |= score_baselines(data)
        summary = summarise(job, data, fitted, baselines)
        publish(fitted.model, fitted.processor, build_facts(job, data, fitted, baselines), output_dir, overwrite=True)
        if job.loop.report_lengths:
            summary["by_length"] = _score_by_length(job, data, fitted)
        write_report(output_dir, summary, fitted.scores)
        write_predictions(output_dir, fitted)
        try:
            if job.card.push_to_hub:
                repo_id = job.card.hub_model_id or output_dir.resolve().name
                pushed = push(output_dir, repo_id, private=job.card.hub_private, token=job.card.hub_token)
        finally:
            draw_report(output_dir, fitted.scores, data.label_names or [])
            draw_course(output_dir, fitted.state)
            write_page_of(output_dir, lambda: classifier_page(job, data, fitted, summary, output_dir))
    return FinetuneResult(fitted.scores, baselines, summary, output_dir, fitted.model, fitted.processor, pushed)


def _score_by_length(job: FinetuneJob, data: LabelledData, fitted: Fitted) -> list[dict[str, Any]]:
    """The scores on the score split when only the first tokens of each document are read."""
    max_tokens = job.loop.max_tokens_per_batch or MAX_TOKENS_PER_BATCH
    predictor = Predictor(fitted.model, fitted.processor, max_tokens_per_batch=max_tokens)
    rows = data.dataset[data.score_split]
    return score_at_lengths(predictor, rows["text"], rows["label"][:], job.loop.report_lengths or ())


def _with_resume(loop: LoopOptions) -> LoopOptions:
    """The loop's options with the checkpoint that this start goes on from, which a restart by torchrun decides."""
    return replace(loop, resume_from_checkpoint=choose_resume(loop.resume_from_checkpoint, loop.output_dir))


def _with_short_epochs(loop: LoopOptions, source: CheckpointSource | None) -> LoopOptions:
    """The loop's options with the number of short epochs, where none was given: a resumed run's own, or what a stock
    checkpoint gets, whose new layers have to be learnt."""
    if loop.short_epochs is not UNSET:
        return loop
    saved = read_settings(loop.resume_from_checkpoint, loop.output_dir) if loop.resume_from_checkpoint else {}
    is_stock = source is not None and not isinstance(source.config, FactorizedConfig)
    default = count_short_epochs(loop.num_train_epochs, loop.max_steps) if is_stock else 0
    return replace(loop, short_epochs=saved.get("short_epochs", default))


def _fit_at_low_resolution(
    job: FinetuneJob, source: CheckpointSource | None, data: LabelledData, accelerator: Accelerator, steps_before: int
) -> Fitted:
    """The demo's comparison: the same architecture and steps on small images."""
    accelerator.print(f"The same architecture, as many steps, on the images at {LOW_RESOLUTION_PX} px:")
    name = f"at_{LOW_RESOLUTION_PX}_px"
    folder = job.loop.output_dir / name
    resume = "last" if job.loop.resume_from_checkpoint and list_checkpoints(folder) else None
    small = replace(
        job,
        model=replace(job.model, image_size=LOW_RESOLUTION_PX),
        loop=replace(job.loop, resume_from_checkpoint=resume),
    )
    return fit(small, source, data, accelerator, folder, log_after(steps_before, accelerator, name))


def build_model(job: FinetuneJob, source: CheckpointSource | None, data: LabelledData) -> Built:
    """Build the model with a head for the data's labels, and its tokenizer or image processor.

    `source` None starts from new weights, which are for images.
    """
    options = job.model
    overrides = redact(data.config_fields) | options.config_fields
    if source is None:
        if options.image_size is None:
            raise ValueError("--model_name_or_path none needs an --image_size: no processor says one.")
        config = FAViTConfig(**SMALL_FAVIT | {"image_size": options.image_size} | overrides)
        processor = FAViTImageProcessor(resample=2, **data.image_statistics)  # bilinear, as a new ViT has it
        return _with_images(FAViTForImageClassification(config), processor, options)
    is_stock = not isinstance(source.config, FactorizedConfig)
    if job.is_text:
        if is_stock:
            overrides = STOCK_TEXT_LAYERS | overrides
            if "classifier_pooling" not in overrides and (pooling := read_pooling_of(source)):
                overrides["classifier_pooling"] = pooling
        length = options.max_length
        model = load_factorized(source, "AutoModelForSequenceClassification", max_length=length, **overrides)
        tokenizer = load_tokenizer(source.model_folder, model.config, packing=job.loop.packing)
        tokenizer.model_max_length = length
        return Built(model, tokenizer, length, None, source, is_stock)
    model = load_factorized(source, "AutoModelForImageClassification", **overrides)
    processor = AutoImageProcessor.from_pretrained(source.model_folder)
    return replace(_with_images(model, processor, options), source=source, mixers_are_new=is_stock)


def read_pooling_of(source: CheckpointSource) -> str | None:
    """Return how a stock checkpoint was trained to make one vector of a text; None where it has a classifier, or none.

    Raises:
        ValueError: it pools in a way that is unknown here.
    """
    has_classifier = (source.architecture or "").endswith("ForSequenceClassification")
    return None if has_classifier or source.folder is None else read_pooling(source.folder)


def _with_images(model: PreTrainedModel, processor: BaseImageProcessor, options: ModelOptions) -> Built:
    """The model with the image processor that the options ask for, made of the checkpoint's."""
    side = options.image_size or native_side(processor)
    fitted = fit_image_processor(processor, model.config, side, square=options.square)
    return Built(model, fitted, count_patches(side, model.config), side)


def fit(
    job: FinetuneJob,
    source: CheckpointSource | None,
    data: LabelledData,
    accelerator: Accelerator,
    output_dir: Path,
    log: Callable[[dict, int], None] | None = None,
) -> Fitted:
    """Build, train and score one model, which starts from `source`, or without one from new weights.

    `log` takes values by name, and their step; unset = it logs them after the steps of the attention transfer.
    """
    loop = job.loop
    built, recovery = _begin(job, source, data, accelerator, output_dir)
    model, adapted = built.model, None
    recovered: dict[str, Any] = {}
    if recovery.steps:
        recovered = recover(job, recovery, built, data, accelerator, output_dir)
        model.config.recovery = "transferred"
    if recovery.resume:  # the loop below has no checkpoint yet
        loop = replace(loop, resume_from_checkpoint=None)
    if job.model.lora_rank:
        is_saved = bool(loop.resume_from_checkpoint) and (output_dir / BASE_FOLDER / "config.json").is_file()
        saves_base = accelerator.is_main_process and not is_saved
        adapted = add_adapter(model, built.processor, job.model, output_dir, saves_base=saves_base)
    examples, collate = _set_up(job, built, data, accelerator)
    loaders, sampler = build_loaders(loop, examples, collate, accelerator)
    _announce(job, built, sampler, accelerator, data)
    steps = plan_steps(loop, sampler, output_dir)
    head_rate = loop.head_learning_rate or loop.learning_rate * (1 if built.source is None else 10)
    mixers_are_new = built.mixers_are_new and not recovery.steps
    groups = group_parameters(model, loop.learning_rate, head_rate, loop.weight_decay, mixers_are_new)
    if loop.sequence_parallel_size > 1:
        set_seed(loop.seed, device_specific=True)  # else every rank would drop the same places of its own tokens
    with share_sequences(loop, accelerator):
        trained, state, figures = run_training(
            loop,
            model,
            *build_optimizer(groups, loop, steps),
            loaders["train"],
            sampler,
            accelerator,
            evaluate=lambda trained: evaluate(trained, loaders["validation"], accelerator, data),
            best_metric=loop.metric_for_best_model or BEST_METRICS[data.problem_type],
            max_steps=steps,
            output_dir=output_dir,
            resume_command=job.resume_command,
            data_digests=digest_once(accelerator, lambda: digest_data(data)),
            log=log or log_after(recovery.steps, accelerator),
        )
        scores, scored, unlabelled = _score(trained, loaders, accelerator, data)
    if recovery.steps and loop.save_total_limit and accelerator.is_main_process:
        forget_transfer(output_dir)
    model = gather_model(accelerator, trained)
    if adapted is not None:
        if accelerator.is_main_process:
            save_adapter(adapted, built.processor, output_dir, accelerator.print)
        model = adapted.merge_and_unload()
    model.config.recovery = describe_recovery(model.config, built.mixers_are_new, recovery.steps)
    accelerator.free_memory()
    run = describe_run(state) | figures | ({"recovery": recovered} if recovered else {})
    return Fitted(model, built.processor, built.image_size, built.source, scores, run, state, scored, unlabelled)


def _begin(
    job: FinetuneJob, source: CheckpointSource | None, data: LabelledData, accelerator: Accelerator, output_dir: Path
) -> tuple[Built, Recovery]:
    """Build the model, plan its attention transfer, and print what was replaced in a stock checkpoint."""
    set_seed(job.loop.seed)
    built = build_model(job, source, data)
    recovery = plan_recovery(job, built, data, output_dir)
    if built.mixers_are_new:
        accelerator.print(f"{describe_exchange(job, built, recovery.steps)}\n")
    return built, recovery


def _set_up(job: FinetuneJob, built: Built, data: LabelledData, accelerator: Accelerator) -> tuple[dict, Any]:
    """Freeze what is not to train, and return the examples of each split and the collator of their batches."""
    freeze_bottom_layers(built.model, job.model.freeze_layers)
    if job.model.gradient_checkpointing:
        built.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with accelerator.main_process_first():
        return build_examples(data, built.processor, built.num_tokens, job.task, job.data, job.model, job.loop)


def _plan(
    job: FinetuneJob, source: CheckpointSource | None, data: LabelledData, accelerator: Accelerator
) -> FinetuneResult:
    """Do all that comes before training, and tell what would follow."""
    loop, output_dir = job.loop, job.loop.output_dir
    built, recovery = _begin(job, source, data, accelerator, output_dir)
    model, location, num_added = built.model, built.model.name_or_path, 0
    transfer: tuple[float | None, float] = (None, 0.0)
    if recovery.steps:
        transfer = time_transfer(job, recovery, built, data, accelerator)
    adapted = None
    if job.model.lora_rank:
        num_added = 0 if location else model.num_parameters()  # of the base that the adapter names
        adapted = add_adapter(model, built.processor, job.model, output_dir, saves_base=False)
    examples, collate = _set_up(job, built, data, accelerator)
    loaders, sampler = build_loaders(loop, examples, collate, accelerator)
    plan = make_plan(
        loop, model, examples, collate, loaders["train"], sampler, accelerator,
        steps=plan_steps(loop, sampler, output_dir),
        data=f"{describe_labels(data)}\n\n{describe_sizes(job, built)}",
        memory=_describe_memory(job, model, sampler, accelerator),
        limit=built.num_tokens if job.is_text else None,
        transfer=transfer,
        num_added=num_added + (model.num_parameters(True) if adapted else 0),
    )  # fmt: skip
    accelerator.end_training()
    if adapted is not None:
        model = adapted.unload()
        set_location(model, location)
    return FinetuneResult(
        {}, {}, {}, output_dir, model, built.processor, plan=plan if accelerator.is_main_process else None
    )


def _score(
    model: torch.nn.Module, loaders: dict[str, DataLoader], accelerator: Accelerator, data: LabelledData
) -> tuple[dict, Predictions, Predictions | None]:
    """The scores on the score split, the answers to its examples, and those to the examples without labels."""
    loader = loaders[data.score_split]
    rows = data.dataset[data.score_split]
    scored = Predictions(data, loader, rows, labels=rows["label"][:])
    scores = evaluate(model, loader, accelerator, data, scored)
    if data.unlabelled is None:
        return scores, scored, None
    unlabelled = Predictions(data, loaders["unlabelled"], data.unlabelled, data.unlabelled["row"][:])
    predict(model, loaders["unlabelled"], accelerator, unlabelled)
    return scores, scored, unlabelled


def describe_sizes(job: FinetuneJob, built: Built) -> str:
    """Return a sentence on how much of an example is read, here and by the saved model."""
    return describe_cut(job, built.model) if job.is_text else f"{describe_shape(job, built.image_size)}."


def _announce(
    job: FinetuneJob, built: Built, sampler: BatchSource, accelerator: Accelerator, data: LabelledData
) -> None:
    """Print the labels of each split, what is read of an example, the sizes of the run and the memory it may take."""
    model = built.model
    accelerator.print(f"{describe_labels(data)}\n\n{describe_sizes(job, built)}")
    accelerator.print(
        f"{type(model).__name__}: {model.num_parameters():,} parameters, {model.num_parameters(True):,} of them train; "
        f"{describe_processes(accelerator, job.loop.num_threads)}; {sampler.extent}"
    )
    accelerator.print(_describe_memory(job, model, sampler, accelerator))


def _describe_memory(job: FinetuneJob, model: PreTrainedModel, sampler: BatchSource, accelerator: Accelerator) -> str:
    """Return a sentence on the memory that a step on the largest batch may take."""
    return describe_memory(
        model.config,
        sampler.largest_batch(),
        accelerator,
        trained=model,
        gradient_checkpointing=job.model.gradient_checkpointing,
        num_sharing=job.loop.sequence_parallel_size,
    )
