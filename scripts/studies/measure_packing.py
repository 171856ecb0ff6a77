"""Time of a training epoch on the licence documents: padded in random order, grouped by length, and packed.

python scripts/studies/measure_packing.py                    # a whole epoch each way
python scripts/studies/measure_packing.py --max_steps 8      # 8 batches each way, spread over the epoch

All three have the same tokens per step, padding included: --max_tokens_per_batch. A step is forward, backward and AdamW
of a MiniLM classifier in float32. The ways take turns, so that a busy machine slows all of them down. Where only
some batches are measured, the time of an epoch is that of their real tokens, scaled to all. Ends with one line of JSON.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm
from transformers import AutoTokenizer

from fa_transformers import load_factorized
from fa_transformers.checks import check_positive
from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.conversion.source import read_source
from fa_transformers.cores import choose_threads
from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.data.collators import TextCollator
from fa_transformers.data.examples import TextExamples
from fa_transformers.data.labelled import load_data
from fa_transformers.data.tokenizing import tokenize_documents
from fa_transformers.options import CardOptions, DataOptions, OptionGroup, option

WAYS = {
    "padded": {"group_by_length": False},
    "length-grouped": {"group_by_length": True},
    "packed": {"group_by_length": False, "packing": True},
}


@dataclass(frozen=True)
class PackingOptions(OptionGroup):
    """Lengths and batches to measure."""

    max_length: int = option(4096, "tokens that longer documents are cut to", group="packing", common=True)
    max_tokens_per_batch: int = option(16384, "tokens of a step, padding included", group="packing", common=True)
    max_steps: int = option(0, "batches measured of each way; 0 = the whole epoch", group="packing", common=True)
    local_window: int = option(0, "reach of the softmax window; 0 = none", group="packing", common=True)
    num_threads: int = option(
        0, "CPU threads; 0 = OMP_NUM_THREADS, or else the usable cores", group="packing", common=True
    )


def parse(argv: Sequence[str] | None = None) -> PackingOptions:
    """Return the options, checked."""
    parser = script_parser("python scripts/studies/measure_packing.py", __doc__)
    parser.add_options(PackingOptions, ("packing",), "measurement")
    parsed = parser.parse(argv)
    try:
        check_positive(parsed[PackingOptions], "max_length", "max_tokens_per_batch")
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[PackingOptions]


def spread(batches: list, num: int) -> list:
    """Return `num` of the batches at equal distances; all of them for 0."""
    if num == 0 or num >= len(batches):
        return batches
    return [batches[index * len(batches) // num] for index in range(num)]


def take_step(model: nn.Module, optimizer: Optimizer, batch: dict) -> float:
    """Take one training step and return its seconds."""
    started = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def measure(
    options: PackingOptions, model: nn.Module, examples: TextExamples, collators: dict[str, TextCollator]
) -> dict[str, dict]:
    """Return for each way the steps of an epoch, and the tokens and seconds of the batches that were measured."""
    optimizer = AdamW(model.parameters(), lr=1e-5)
    measured, plans = {}, {}
    for way, settings in WAYS.items():
        sampler = LengthGroupedBatchSampler(
            examples.lengths, len(examples), max_tokens=options.max_tokens_per_batch, **settings
        )
        measured[way] = {"steps": len(sampler), "tokens": 0, "real_tokens": 0, "seconds": 0.0}
        plans[way] = spread(sampler.batches(0), options.max_steps)
    turns = sorted((turn / len(plan), way, turn) for way, plan in plans.items() for turn in range(len(plan)))
    warm = set()
    for _, way, turn in tqdm(turns):
        chosen = plans[way][turn]
        batch = collators[way]([examples[index] for index in chosen])
        if way not in warm:
            warm.add(way)
            take_step(model, optimizer, batch)
        row = measured[way]
        row["seconds"] += take_step(model, optimizer, batch)
        row["tokens"] += batch["input_ids"].numel()
        row["real_tokens"] += int(sum(examples.lengths[index] for index in chosen))
    return measured


def print_table(measured: dict[str, dict], total: int) -> None:
    """Add to each way's figures those of a whole epoch of `total` real tokens, and print them as a Markdown table."""
    print("| way | steps an epoch | padding | seconds an epoch | of padded | tokens/s, padding included |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, row in measured.items():
        row["epoch_seconds"] = row["seconds"] * total / row["real_tokens"]
        row["of_padded"] = row["epoch_seconds"] / measured["padded"]["epoch_seconds"]
        row["padding"] = 1.0 - row["real_tokens"] / row["tokens"]
        print(
            f"| {way} | {row['steps']} | {row['padding']:.0%} | {row['epoch_seconds']:,.0f} | {row['of_padded']:.2f} "
            f"| {row['tokens'] / row['seconds']:,.0f} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(choose_threads(options.num_threads).count)
    torch.manual_seed(0)
    source = read_source("minilm")
    tokenizer = AutoTokenizer.from_pretrained(source.model_folder)
    data = load_data("text-classification", DataOptions(max_eval_samples=None), CardOptions(), seed=0)
    fields = {"position_embedding_type": "periodic", "classifier_pooling": "mean", "local_window": options.local_window}
    model = load_factorized(
        source, "AutoModelForSequenceClassification", max_length=options.max_length, **data.config_fields, **fields
    )
    examples = TextExamples(tokenize_documents(data.dataset, tokenizer, options.max_length)["train"])
    collators = {way: TextCollator(tokenizer, data, "packing" in settings) for way, settings in WAYS.items()}
    measured = measure(options, model.train(), examples, collators)
    total = int(sum(examples.lengths))
    print(f"{len(examples):,} documents, {total:,} tokens, {options.max_tokens_per_batch:,} tokens a step at most")
    print_table(measured, total)
    print(json.dumps(asdict(options) | {"threads": torch.get_num_threads(), "ways": measured}))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
