"""Training data that is never in memory or on disk as a whole: read, tokenized and batched while training goes on.

Each process reads its own share of the shards, a block of documents at a time. The batches of a block are a pure
function of (its documents, settings, seed, epoch, block), and where its reading began is part of each checkpoint, so a
resumed run reads on from there: of what was trained on, only the block that the run stopped in is read again.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .batching import LengthGroupedBatchSampler, ignore_stop_signals
from .readers.streams import DocumentStream
from .readers.tables import DataError

BLOCK_EXAMPLES = 1024
"""Documents of a block: those among which the order is shuffled and similar lengths are put together."""
BLOCK_CHARACTERS = 2**23
"""Text from which on a block is full earlier; its tokens, as Python integers, take some ten times the memory."""


class Place(NamedTuple):
    """The place where a process goes on: `batch` of block `block` of `epoch`, the block that starts at `position`.

    `position` is the state of the datasets library; None for the start of an epoch.
    """

    epoch: int = 0
    block: int = 0
    batch: int = 0
    position: dict | None = None


class StreamedBatch(NamedTuple):
    """A batch, what it holds, and the place of the batch after it."""

    inputs: dict[str, Tensor]
    num_examples: int
    num_tokens: int
    next_place: Place


class StreamedExamples(IterableDataset):
    """Batches without end of the documents that are this process's share, epoch after epoch, from `place` on.

    Every document is in one batch of one process in each epoch. Where the number of shards is a multiple of the
    processes each reads its own shards, else every process reads all and keeps its documents.

    Args:
        documents: the raw documents and how they are tokenized.
        collate: tokenized documents without "length" -> a batch.
        batching: keyword arguments of `LengthGroupedBatchSampler` that a block is batched by.

    Raises:
        DataError: while they are read, if a document can't be used or this process has none.
    """

    def __init__(
        self,
        documents: DocumentStream,
        collate: Callable[[list[dict]], dict[str, Tensor]],
        batching: dict,
        *,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        super().__init__()
        self.documents, self.collate, self.batching = documents, collate, batching
        self.process_index, self.num_processes = process_index, num_processes
        self.place = Place()

    def __iter__(self) -> Iterator[StreamedBatch]:
        epoch, block, first, position = self.place
        is_found = position is not None
        while True:
            share = split_dataset_by_node(self.documents.rows, self.process_index, self.num_processes)
            share.set_epoch(epoch)
            if position is not None:
                share.load_state_dict(position)
            rows = iter(share)
            while raw := take_block(rows):
                examples = self.documents.encode(raw)
                after = share.state_dict()
                lengths = [example.pop("length") for example in examples]
                # Another seed for each epoch, another epoch for each block.
                settings = self.batching | {"seed": self.batching["seed"] + epoch}
                # A block may be empty, all its rows dropped.
                batches = LengthGroupedBatchSampler(lengths, **settings).batches(block) if examples else []
                for number, indices in enumerate(batches[first:], start=first + 1):
                    is_last = number == len(batches)
                    place = Place(epoch, block + 1, 0, after) if is_last else Place(epoch, block, number, position)
                    yield StreamedBatch(
                        self.collate([examples[index] for index in indices]),
                        len(indices),
                        sum(lengths[index] for index in indices),
                        place,
                    )
                    is_found = True
                block, first, position = block + 1, 0, after
            if not is_found:
                raise DataError(
                    f"{self.documents.source} has no documents for process {self.process_index} of "
                    f"{self.num_processes}: give more documents, or use fewer processes"
                )
            epoch, block, position, is_found = epoch + 1, 0, None, False


def take_block(rows: Iterator[dict]) -> list[dict]:
    """The next documents, up to `BLOCK_EXAMPLES` of them or until they hold `BLOCK_CHARACTERS`; [] at the end."""
    block, characters = [], 0
    for row in itertools.islice(rows, BLOCK_EXAMPLES):
        block.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if characters >= BLOCK_CHARACTERS:
            break
    return block


class StreamedBatches:
    """The batches of a stream, as `run_training` draws them: in the place of a `LengthGroupedBatchSampler`.

    No process knows beforehand how many documents the other processes' batches hold, so the batches of an optimiser
    step are read ahead and the processes tell each other their counts, once per step. There is one epoch, without an
    end.
    """

    def __init__(self, examples: StreamedExamples, accelerator: Accelerator):
        self.examples, self.accelerator = examples, accelerator
        self.place = examples.place
        self._counts = torch.zeros(1, 1, 2, dtype=torch.long)  # [processes, batches of the step, (examples, tokens)]
        self._current = 0
        self._places: list = []
        accelerator.register_for_checkpointing(self)
        # Before anything is written: a write that fails on one process would leave the others waiting in the gather.
        accelerator.register_save_state_pre_hook(lambda *_: self.gather_places())

    @property
    def num_processes(self) -> int:
        return self.examples.num_processes

    @property
    def settings(self) -> dict:
        """The settings that decide the batches, for a resumed run to compare."""
        source = f"{self.extent} of {self.examples.documents.source}"
        # The second says that a resumed run can't have more or fewer, as it can without a stream.
        processes = dict.fromkeys(("num_processes", "processes_of_stream"), self.examples.num_processes)
        return self.examples.batching | processes | {"examples": source}

    def keep_plan(self, planned_processes: int, batches_per_step: int) -> None:
        """Does nothing: a resumed stream must have as many processes as when it started."""

    @property
    def extent(self) -> str:
        return f"a stream of {self.examples.documents.rows.num_shards} shards"

    def count_batches(self, epoch: int) -> None:
        """None: the one epoch has no end."""

    def largest_batch(self) -> tuple[int, int]:
        """Rows and their length, in tokens, of the largest batch that can occur."""
        batching, longest = self.examples.batching, self.examples.documents.max_length
        limit = max(batching["max_tokens"] or longest * batching["batch_size"], longest)
        return (1, limit) if batching["packing"] else (min(batching["batch_size"], limit // longest), longest)

    def epoch_batches(self, loader: DataLoader, epoch: int, num_finished: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of `loader` from where the run stands, on this process's device."""
        self.examples.place = self.place
        batches, device = iter(loader), self.accelerator.device
        while True:
            step = list(itertools.islice(batches, self.accelerator.gradient_accumulation_steps))
            counts = torch.tensor([[[batch.num_examples, batch.num_tokens] for batch in step]], device=device)
            self._counts = self.accelerator.gather(counts).cpu()
            for self._current, batch in enumerate(step):
                self.place = batch.next_place
                yield send_to_device(batch.inputs, device)

    def count_tokens(self, epoch: int, batch: int) -> int:
        """Real tokens of the batches that all processes together have in hand."""
        return int(self._counts[:, self._current, 1].sum())

    def count_examples(self, epoch: int, batch: int) -> int:
        """Examples in the batches that all processes together have in hand."""
        return int(self._counts[:, self._current, 0].sum())

    def loss_weight(self, epoch: int, batch: int, process_index: int, gradient_accumulation_steps: int) -> float:
        """Return the weight of the batch in hand, defined as in `LengthGroupedBatchSampler.loss_weight`."""
        counts = self._counts[..., 0]
        return float(counts[process_index, self._current] * counts.numel() / counts.sum())

    def gather_places(self) -> None:
        """Note the places of all processes, for the checkpoint; each of them must call this."""
        self._places = gather_object([tuple(self.place)])

    def state_dict(self) -> dict:
        return {"places": self._places}

    def load_state_dict(self, state: dict) -> None:
        self.place = Place(*state["places"][self.accelerator.process_index])


def make_stream_loader(examples: StreamedExamples, num_workers: int) -> DataLoader:
    """Return a loader of the stream's batches; of workers it has one at most, which reads ahead (cf. `make_loader`)."""
    return DataLoader(
        examples,
        batch_size=None,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # there is no list of samples without a batch size
        num_workers=min(num_workers, 1),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(examples.batching["seed"]),
        worker_init_fn=ignore_stop_signals,
    )


def _as_it_is(batch: StreamedBatch) -> StreamedBatch:
    return batch
