"""What a training loop needs besides the loop: loaders, parameter groups, freezing, trackers."""

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data.batching import BatchSource, LengthGroupedBatchSampler, make_loader
from ..data.readers.streams import DocumentStream
from ..data.streaming import StreamedBatches, StreamedExamples, make_stream_loader
from ..files import count_cores
from ..models import ARCHITECTURES
from ..models.fa_sequence_parallel import open_context, sequence_parallel
from .processes import meet_after_restart


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
            decays = parameter.ndim > 1 and not name.endswith(("bias", "log_sharpness"))
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


def gather_model(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """The plain FA model inside a prepared one, in float32; every process must call this.

    Where FSDP or DeepSpeed shard the weights it is a new model, which has them on the main process alone.
    """
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the card times it as users load it
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return plain
    weights = accelerator.get_state_dict(model)
    # FSDP derives a class of its own from the model's.
    known = [model_class for heads in ARCHITECTURES.values() for model_class in heads.values()]
    whole = next(model_class for model_class in known if isinstance(plain, model_class))(plain.config)
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    return whole.eval()


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


def count_replicas(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Groups of `sequence_parallel_size` processes, each of which works on batches of its own.

    Raises:
        ValueError: the processes cannot be grouped so.
    """
    replicas, rest = divmod(accelerator.num_processes, args.sequence_parallel_size)
    if rest:
        raise ValueError(
            f"--sequence_parallel_size {args.sequence_parallel_size} must divide the number of processes, "
            f"{accelerator.num_processes}."
        )
    return replicas


def share_sequences(args: argparse.Namespace, accelerator: Accelerator) -> AbstractContextManager:
    """The context for `sequence_parallel_size` neighbouring processes to share the tokens of each batch."""
    if args.sequence_parallel_size == 1:
        return nullcontext()
    shape = (count_replicas(args, accelerator), args.sequence_parallel_size)
    return sequence_parallel(init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("dp", "sp")))


def reports_examples() -> bool:
    """Whether this process is the one of those sharing an example that its score is taken from."""
    context = open_context()
    return context is None or dist.get_rank(context.group) == 0


def build_loaders(
    args: argparse.Namespace, examples: dict, collate: Callable, accelerator: Accelerator
) -> tuple[dict[str, DataLoader], BatchSource]:
    """A prepared loader for each split, and what decides the batches of the train split."""
    loaders: dict[str, DataLoader] = {}
    samplers: dict[str, BatchSource] = {}
    num_workers = choose_num_workers(args.dataloader_num_workers, accelerator)
    replicas = count_replicas(args, accelerator)
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
            num_processes=replicas,
            short_epochs=args.short_epochs if is_train else 0,
            short_length=args.short_length,
        )
        loader = make_loader(part, sampler, collate, num_workers)
        # Accelerate itself would give each process batches of its own.
        loaders[split] = (
            accelerator.prepare(loader)
            if args.sequence_parallel_size == 1
            else prepare_data_loader(
                loader,
                accelerator.device,
                num_processes=replicas,
                process_index=accelerator.process_index // args.sequence_parallel_size,
                put_on_device=True,
                rng_types=list(accelerator.rng_types),
            )
        )
        samplers[split] = sampler
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
