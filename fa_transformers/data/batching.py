"""Batches under a token budget, of similar length or packed, the same on every run, and where an epoch resumes.

The batches of an epoch are a pure function of (lengths, settings, seed, epoch), so a resumed run sees the same ones.
"""

import math
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from accelerate import skip_first_batches
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..tables import counted


class BatchSource(Protocol):
    """A source of batches for `run_training`: a `LengthGroupedBatchSampler`, or `streaming.StreamedBatches`.

    `batch` counts batches of all processes together within `epoch`. A stream ignores `epoch` and `batch` and answers
    for the batch that was drawn last.
    """

    @property
    def num_processes(self) -> int: ...

    @property
    def settings(self) -> dict: ...

    @property
    def extent(self) -> str: ...

    def epoch_batches(self, loader: DataLoader, epoch: int, num_finished: int = 0) -> Iterable[dict]: ...

    def keep_plan(self, planned_processes: int, batches_per_step: int) -> None: ...

    def count_tokens(self, epoch: int, batch: int) -> int: ...

    def count_examples(self, epoch: int, batch: int) -> int: ...

    def loss_weight(self, epoch: int, batch: int, process_index: int, gradient_accumulation_steps: int) -> float: ...

    def largest_batch(self) -> tuple[int, int]: ...

    def count_batches(self, epoch: int) -> int | None: ...


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Batches of example indices; every example occurs exactly once per epoch.

    Args:
        lengths: length of each example, in tokens.
        batch_size: largest number of examples in a batch.
        short_epochs, short_length: in this many first epochs examples count as cut to `short_length`; the examples must
            then cut themselves, as `TextExamples` do.
        max_tokens: largest number of tokens in a batch, padding included: examples x longest. A single example longer
            than this gets a batch of its own. None = no budget.
        group_by_length: put examples of similar length together, to save padding.
        packing: examples are packed: `max_tokens` then limits the sum of their lengths.
        kinds: number of each example's kind, such as the grid of an image's patches: examples of different kinds are
            never in one batch. None: all are alike.
        shuffle: a new order for each epoch, drawn from (seed, epoch); else the order is always the same.
        num_processes: the number of batches is made a multiple of this, by halving the batches with most examples
            (where there are too few examples for that, by joining the shortest batches of a kind, over the limits), so
            that Accelerate's shards are equally many without repeating an example. Batches of one step (consecutive
            ones) have similar cost.

    Raises:
        ValueError: there are no examples or fewer than processes, or batch_size or max_tokens is below 1; and once the
            batches are made, too few of a kind to share them out.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        max_tokens: int | None = None,
        group_by_length: bool = True,
        packing: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        num_processes: int = 1,
        short_epochs: int = 0,
        short_length: int = 0,
        kinds: Sequence[int] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {max_tokens}.")
        if len(lengths) < max(1, num_processes):
            processes = counted(num_processes, "process", "needs", "need")
            raise ValueError(f"{processes} at least one example each, got {len(lengths)}.")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.kinds = None if kinds is None else np.asarray(kinds, dtype=np.int64)
        self.max_examples = batch_size
        self.max_tokens = max_tokens
        self.group_by_length = group_by_length
        self.packing = packing
        self.shuffle = shuffle
        self.seed = seed
        self.num_processes = num_processes
        self._planned_processes = num_processes
        self._batches_per_step = num_processes
        self.short_epochs = short_epochs
        self.short_length = short_length
        self.epoch = 0
        self._cached: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def keep_plan(self, planned_processes: int, batches_per_step: int) -> None:
        """Make the batches that a run on `planned_processes` has, for this sampler's processes to share.

        Where the last step of an epoch holds too few batches for all processes, its largest ones are halved; where it
        holds fewer examples than processes, one is repeated, for batches already trained on can't change any more.

        Args:
            batches_per_step: batches of all processes in an optimiser step, a multiple of both numbers of processes.
        """
        self._planned_processes, self._batches_per_step = planned_processes, batches_per_step
        self._cached = None

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches(self.epoch)

    def __len__(self) -> int:
        return len(self.batches(self.epoch))

    @property
    def settings(self) -> dict:
        """The settings that decide the batches, for a resumed run to compare; a checksum stands for the lengths."""
        names = ["max_examples", "max_tokens", "group_by_length", "shuffle", "seed", "num_processes"]
        names += ["packing", "short_epochs", "short_length"]
        content = self.lengths.tobytes() + (b"" if self.kinds is None else self.kinds.tobytes())
        examples = f"{len(self.lengths)} examples, checksum {zlib.crc32(content):08x}"
        return {name: getattr(self, name) for name in names} | {"examples": examples}

    @property
    def extent(self) -> str:
        """The amount of data, in words for a message."""
        batches = counted(len(self) // self.num_processes, "batch")
        return f"{counted(len(self.lengths), 'example')}, {batches} an epoch"

    def epoch_batches(self, loader: DataLoader, epoch: int, num_finished: int = 0) -> DataLoader:
        """The prepared `loader`, set to `epoch`, after the `num_finished` first batches of all processes together.

        Those batches are left out of the sampler's list of indices: no example of theirs is loaded.
        """
        if num_finished:
            # A new loader, which counts its epochs from 0.
            loader = skip_first_batches(loader, num_finished // self.num_processes)
        # Both: Accelerate forwards the epoch to our sampler only when one process runs, and overwrites it then.
        loader.set_epoch(epoch)  # type: ignore[attr-defined]  # Accelerate's loaders have it
        self.set_epoch(epoch)
        return loader

    def count_tokens(self, epoch: int, batch: int) -> int:
        """Real tokens of the batches that all processes hold at once, the first of them being number `batch`."""
        together = self.batches(epoch)[batch : batch + self.num_processes]
        lengths = self.lengths_in(epoch)
        return int(sum(lengths[indices].sum() for indices in together))

    def count_examples(self, epoch: int, batch: int) -> int:
        """Examples in the batches that all processes hold at once, the first of them being number `batch`."""
        return sum(map(len, self.batches(epoch)[batch : batch + self.num_processes]))

    def loss_weight(self, epoch: int, batch: int, process_index: int, gradient_accumulation_steps: int) -> float:
        """Factor for the mean loss of this process's batch that makes every example of an optimiser step count alike.

        A step adds up the gradients of its batches and divides by gradient_accumulation_steps x processes. That is the
        mean over the step's examples only where all batches hold equally many and the step is complete, so each loss is
        multiplied by examples of the batch x gradient_accumulation_steps x processes / examples of the step.
        """
        batches, per_step = self.batches(epoch), self.num_processes * gradient_accumulation_steps
        start = batch - batch % per_step
        in_step = sum(map(len, batches[start : start + per_step]))
        return len(batches[batch + process_index]) * per_step / in_step

    def lengths_in(self, epoch: int) -> np.ndarray:
        """Length of each example in `epoch`, in tokens."""
        return np.minimum(self.lengths, self.short_length) if epoch < self.short_epochs else self.lengths

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of `epoch`, of all processes together, in order."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._build(epoch))
        return self._cached[1]

    def count_batches(self, epoch: int) -> int:
        """Batches of an epoch, of all processes together."""
        return len(self.batches(epoch))

    def largest_batch(self) -> tuple[int, int]:
        """Rows and their length, in tokens, of the batch with most tokens of a full epoch, padding included."""
        lengths = self.lengths_in(self.short_epochs)
        if self.packing:
            return 1, max(int(lengths[batch].sum()) for batch in self.batches(self.short_epochs))
        shapes = ((len(batch), int(lengths[batch].max())) for batch in self.batches(self.short_epochs))
        return max(shapes, key=math.prod)

    def _build(self, epoch: int) -> list[list[int]]:
        random, lengths = np.random.default_rng([self.seed, epoch]), self.lengths_in(epoch)
        order = random.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        if self.group_by_length:
            # 10 % of jitter: without it a small set would give the same neighbours in every epoch.
            jitter = random.uniform(1.0, 1.1, size=len(order)) if self.shuffle else 1.0
            order = order[np.argsort(lengths[order] * jitter, kind="stable")]
        if self.kinds is not None:
            order = order[np.argsort(self.kinds[order], kind="stable")]
        batches = self._pack(order, lengths)
        self._even_out(batches, lengths)
        if self.shuffle:
            together = self._planned_processes
            steps = [batches[start : start + together] for start in range(0, len(batches), together)]
            batches = [batch for step in random.permutation(len(steps)) for batch in steps[step]]
        self._share_last_step(batches)
        return batches

    def _share_last_step(self, batches: list[list[int]]) -> None:
        """Let each process have a batch of the last step, in place, where the plan is one for fewer processes."""
        while len(batches) % self.num_processes:
            start = len(batches) // self._batches_per_step * self._batches_per_step
            largest = max(range(start, len(batches)), key=lambda index: len(batches[index]))
            batch = batches[largest]
            # A step's gradient is a mean, which a repeated example leaves near to what it was.
            halves = [batch[: len(batch) // 2], batch[len(batch) // 2 :]] if len(batch) > 1 else [batch, batch]
            batches[largest : largest + 1] = halves

    def _even_out(self, batches: list[list[int]], lengths: np.ndarray) -> None:
        """Make the number of batches a multiple of the planned processes, in place."""
        planned = self._planned_processes
        remainder = len(batches) % planned
        can_split = len(batches) - remainder + planned <= len(self.lengths)
        while len(batches) % planned:
            if can_split:
                largest = max(range(len(batches)), key=lambda index: len(batches[index]))
                batch = batches[largest]
                batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            else:  # nearly all hold one example: better one over the limit than one repeated or left out
                first, second = self._shortest_pair(batches, lengths)
                batches[first] = batches[first] + batches[second]
                del batches[second]

    def _shortest_pair(self, batches: list[list[int]], lengths: np.ndarray) -> tuple[int, int]:
        """The places of the two batches of one kind that have fewest tokens together."""
        shortest: dict[int, int] = {}
        pairs = []
        for place in sorted(range(len(batches)), key=lambda index: lengths[batches[index]].sum()):
            kind = 0 if self.kinds is None else int(self.kinds[batches[place][0]])
            if kind in shortest:
                pairs.append((shortest[kind], place))
            shortest.setdefault(kind, place)
        if not pairs:
            raise ValueError(
                f"{len(batches)} batches can't be shared by {self._planned_processes} processes: each has one example, "
                "of a shape of its own. Use fewer processes, or --square for images."
            )
        return min(pairs, key=lambda pair: sum(lengths[batches[place]].sum() for place in pair))

    def _pack(self, order: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = [[]]
        longest = total = 0
        for index in order.tolist():
            length = int(lengths[index])
            longest, total = max(longest, length), total + length
            num_tokens = total if self.packing else (len(batches[-1]) + 1) * longest
            over_budget = self.max_tokens is not None and num_tokens > self.max_tokens
            is_other = batches[-1] and self.kinds is not None and self.kinds[batches[-1][0]] != self.kinds[index]
            if batches[-1] and (len(batches[-1]) == self.max_examples or over_budget or is_other):
                batches.append([])
                longest = total = length
            batches[-1].append(index)
        return batches


def make_loader(
    examples: Dataset, sampler: LengthGroupedBatchSampler, collate: Callable, num_workers: int
) -> DataLoader:
    """Return a loader of the sampler's batches that leaves the global random generator alone.

    A loader without its own generator draws a seed from the global one whenever it starts, and dropout of a resumed
    run, which starts in the middle of an epoch, would differ.

    Workers start anew in each epoch, with the examples as `set_epoch` left them. Beside a GPU the batches lie in pinned
    memory.
    """
    return DataLoader(
        examples,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(sampler.seed),
        worker_init_fn=ignore_stop_signals,
    )


def grouped_batches(
    examples: Dataset, collate: Callable, batch_size: int, max_tokens: int | None, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield every example once, in batches of similar `lengths`, on one process: the indices and the batch."""
    kinds = getattr(examples, "kinds", None)
    sampler = LengthGroupedBatchSampler(examples.lengths, batch_size, max_tokens=max_tokens, shuffle=False, kinds=kinds)  # type: ignore[attr-defined]
    for indices in sampler.batches(0):
        yield indices, send_to_device(collate([examples[index] for index in indices]), device)


def ignore_stop_signals(worker_index: int) -> None:
    """Ignore Ctrl-C in a loader's worker: the training process decides when it needs no more data."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def count_update_steps(
    sampler: LengthGroupedBatchSampler, num_epochs: float, gradient_accumulation_steps: int = 1
) -> int:
    """Optimiser steps in `num_epochs` epochs, the last of which may be a fraction; at least 1.

    The number of batches can differ from one epoch to the next, so they are counted; the last step of an epoch may hold
    fewer than `gradient_accumulation_steps` batches.
    """
    steps = 0.0
    for epoch in range(math.ceil(num_epochs)):
        micro_batches = len(sampler.batches(epoch)) // sampler.num_processes
        steps += math.ceil(micro_batches / gradient_accumulation_steps) * min(1.0, num_epochs - epoch)
    return max(1, math.ceil(steps))
