"""The loaders of a run: batches by length, packed or streamed, shared out to its processes."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..cores import count_cores
from ..data.batching import BatchSource, LengthGroupedBatchSampler, make_loader
from ..data.readers.streams import DocumentStream
from ..data.streaming import StreamedBatches, StreamedExamples, make_stream_loader
from ..options import LoopOptions
from .setup import count_local_processes, count_replicas


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
    loop: LoopOptions, examples: dict, collate: Callable, accelerator: Accelerator
) -> tuple[dict[str, DataLoader], BatchSource]:
    """A prepared loader for each split, and what decides the batches of the train split."""
    loaders: dict[str, DataLoader] = {}
    samplers: dict[str, BatchSource] = {}
    num_workers = choose_num_workers(loop.dataloader_num_workers, accelerator)
    replicas = count_replicas(loop, accelerator)
    for split, part in examples.items():
        if isinstance(part, DocumentStream):
            loaders[split], samplers[split] = _stream_loader(loop, part, collate, accelerator, num_workers)
            continue
        is_train = split == "train"
        sampler = LengthGroupedBatchSampler(
            part.lengths,
            loop.per_device_train_batch_size if is_train else loop.per_device_eval_batch_size,
            max_tokens=loop.max_tokens_per_batch or None,
            group_by_length=(loop.group_by_length or not is_train) and not loop.packing,
            packing=loop.packing,
            shuffle=is_train,
            seed=loop.seed,
            num_processes=replicas,
            short_epochs=loop.short_epochs if is_train else 0,
            short_length=loop.short_length,
            kinds=getattr(part, "kinds", None),
        )
        loader = make_loader(part, sampler, collate, num_workers)
        loaders[split] = _prepare(loop, loader, replicas, accelerator)
        samplers[split] = sampler
    return loaders, samplers["train"]


def _stream_loader(
    loop: LoopOptions, documents: DocumentStream, collate: Callable, accelerator: Accelerator, num_workers: int
) -> tuple[DataLoader, BatchSource]:
    batching = {
        "batch_size": loop.per_device_train_batch_size,
        "max_tokens": loop.max_tokens_per_batch or None,
        "group_by_length": loop.group_by_length and not loop.packing,
        "packing": loop.packing,
        "seed": loop.seed,
    }
    stream = StreamedExamples(
        documents,
        collate,
        batching,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    return make_stream_loader(stream, num_workers), StreamedBatches(stream, accelerator)


def _prepare(loop: LoopOptions, loader: DataLoader, replicas: int, accelerator: Accelerator) -> DataLoader:
    """The loader of this process; processes that share a sequence get the same batches."""
    if loop.sequence_parallel_size == 1:
        return accelerator.prepare(loader)
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=replicas,
        process_index=accelerator.process_index // loop.sequence_parallel_size,
        put_on_device=True,
        rng_types=list(accelerator.rng_types),
    )
