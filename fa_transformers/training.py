"""What a training loop needs besides the loop: loaders, parameter groups, freezing, trackers."""

import argparse
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .batching import BatchSource, LengthGroupedBatchSampler, make_loader
from .data.files import count_cores
from .data.streams import DocumentStream
from .processes import meet_after_restart
from .streaming import StreamedBatches, StreamedExamples, make_stream_loader


def choose_mixed_precision(name: str | None, on_cpu: bool) -> str | None:
    """`name`, or for "auto" bf16 where the device multiplies matrices faster in it, else "no".

    Of CPUs, those with AMX or AVX512-BF16 do.
    """
    if name != "auto":
        return name
    if not on_cpu:
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "no"
    # torch has told what the processor can do since 2.12.
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator that the training flags ask for, on the CPU where there is nothing faster.

    The schedule is stepped by the loop, once per optimiser step whatever the number of processes.
    """
    on_cpu = args.use_cpu or not torch.accelerator.is_available()
    timeout = timedelta(seconds=args.ddp_timeout)
    meet_after_restart(timeout)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=choose_mixed_precision(args.mixed_precision, on_cpu),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    use_cpu_threads(accelerator, args.num_threads)
    return accelerator


def group_parameters(
    model: PreTrainedModel,
    learning_rate: float,
    head_learning_rate: float,
    weight_decay: float,
    mixers_are_new: bool = False,
) -> list[dict]:
    """AdamW parameter groups of a transformers model: encoder and head apart, with and without weight decay.

    The head is every parameter outside `model.base_model`; where `mixers_are_new`, the feature maps, convolutions and
    gates of FA layers count as head, because a stock checkpoint has no values for them. Biases, norms and every other
    vector get no decay. Frozen parameters are left out.
    """
    prefix = f"{model.base_model_prefix}."
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = not name.startswith(prefix) or (mixers_are_new and ".mixer." in name)
            decays = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault((is_head, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": head_learning_rate if is_head else learning_rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_head, decays), parameters in groups.items()
    ]


def freeze_bottom_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Stop training of the embeddings and the lowest `num_layers` encoder layers; 0 freezes nothing.

    Raises:
        ValueError: the encoder has fewer layers, or `num_layers` is negative.
    """
    if num_layers == 0:
        return
    layers = model.base_model.encoder.layer
    if not 0 < num_layers <= len(layers):
        raise ValueError(f"--freeze_layers must be from 0 to {len(layers)}, the number of layers, got {num_layers}.")
    for module in (model.base_model.embeddings, *layers[:num_layers]):
        module.requires_grad_(False)


def use_cpu_threads(accelerator: Accelerator, num_threads: int) -> None:
    """Let this process compute with `num_threads` CPU threads; 0 = the usable cores, shared by the local processes.

    Launchers start processes with one thread, whatever the machine has.
    """
    torch.set_num_threads(num_threads or max(1, count_cores() // count_local_processes(accelerator)))


def count_local_processes(accelerator: Accelerator) -> int:
    """Training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def choose_num_workers(num_workers: int | None, accelerator: Accelerator) -> int:
    """`num_workers`, or for None the processes that load data best: none on the CPU, where they would take cores from
    the training; beside an accelerator up to 4 of this process's share of the cores.
    """
    if num_workers is not None:
        return num_workers
    if accelerator.device.type == "cpu":
        return 0
    return min(4, max(1, count_cores() // count_local_processes(accelerator) - 1))


def build_loaders(
    args: argparse.Namespace, examples: dict, collate: Callable, accelerator: Accelerator
) -> tuple[dict[str, DataLoader], BatchSource]:
    """A prepared loader for each split, and what decides the batches of the train split."""
    loaders: dict[str, DataLoader] = {}
    samplers: dict[str, BatchSource] = {}
    num_workers = choose_num_workers(args.dataloader_num_workers, accelerator)
    for split, part in examples.items():
        if isinstance(part, DocumentStream):
            batching = {"batch_size": args.per_device_train_batch_size, "max_tokens": args.max_tokens_per_batch or None}
            batching |= {"group_by_length": args.group_by_length and not args.packing, "packing": args.packing}
            stream = StreamedExamples(
                part,
                collate,
                batching | {"seed": args.seed},
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            )
            loaders[split], samplers[split] = (
                make_stream_loader(stream, num_workers),
                StreamedBatches(stream, accelerator),
            )
            continue
        is_train = split == "train"
        sampler = LengthGroupedBatchSampler(
            part.lengths,
            args.per_device_train_batch_size if is_train else args.per_device_eval_batch_size,
            max_tokens=args.max_tokens_per_batch or None,
            group_by_length=(args.group_by_length or not is_train) and not args.packing,
            packing=args.packing,
            shuffle=is_train,
            seed=args.seed,
            num_processes=accelerator.num_processes,
            short_epochs=args.short_epochs if is_train else 0,
            short_length=args.short_length,
        )
        samplers[split] = sampler
        loaders[split] = accelerator.prepare(make_loader(part, sampler, collate, num_workers))
    return loaders, samplers["train"]


def start_trackers(accelerator: Accelerator, report_to: str, name: str, config: dict) -> None:
    """Start the trackers that the accelerator was made with, with the run's flags as their config.

    Raises:
        ValueError: `report_to` names a tracker that is not installed.
    """
    if report_to == "none":
        return
    if not accelerator.log_with:
        raise ValueError(f"--report_to {report_to}: that tracker is not installed; install it, or use none.")
    plain = {key: value for key, value in config.items() if isinstance(value, (int, float, str, bool))}
    plain.pop("hub_token", None)
    accelerator.init_trackers(name, config=plain)
