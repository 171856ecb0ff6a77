"""Time of a training epoch on the licence documents: padded in random order, grouped by length, and packed.

python scripts/studies/measure_packing.py                    # a whole epoch each way
python scripts/studies/measure_packing.py --max_steps 8      # 8 batches each way, spread over the epoch

All three have the same tokens per step, padding included: --max_tokens_per_batch. A step is forward, backward and AdamW
of a MiniLM classifier in float32. The ways take turns, so that a busy machine slows all of them down. Of a part of an
epoch, its time is that of the measured real tokens times their share. Ends with one line of JSON.
"""

import argparse
import json
import os
import time
from types import SimpleNamespace

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from fa_transformers import load_factorized
from fa_transformers.conversion.packaged import resolve_checkpoint
from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.data.collators import TextCollator
from fa_transformers.data.examples import TextExamples
from fa_transformers.data.readers.files import encode_dataset
from fa_transformers.data.readers.labels import label_names
from fa_transformers.data.sets.license_documents import load_license_documents
from fa_transformers.data.tokenizing import tokenize_documents

WAYS = {
    "padded": {"group_by_length": False},
    "length-grouped": {"group_by_length": True},
    "packed": {"group_by_length": False, "packing": True},
}


def spread(batches: list, num: int) -> list:
    """`num` of the batches at equal distances; all of them for 0."""
    if num == 0 or num >= len(batches):
        return batches
    return [batches[index * len(batches) // num] for index in range(num)]


def take_step(model, optimizer, batch: dict) -> float:
    """Seconds of one training step."""
    started = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_length", type=int, default=4096, help="tokens that longer documents are cut to")
    parser.add_argument("--max_tokens_per_batch", type=int, default=16384, help="tokens of a step, padding included")
    parser.add_argument("--max_steps", type=int, default=0, help="batches measured of each way; 0 = the whole epoch")
    parser.add_argument("--local_window", type=int, default=0, help="reach of the softmax window; 0 = none")
    parser.add_argument("--num_threads", type=int, default=0, help="CPU threads; 0 = all cores")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads or os.cpu_count() or 1)
    torch.manual_seed(0)
    source = resolve_checkpoint("minilm")
    tokenizer = AutoTokenizer.from_pretrained(source)
    dataset = encode_dataset(load_license_documents())
    names = label_names(dataset)
    data = SimpleNamespace(problem_type="single_label_classification", num_labels=len(names))
    fields = {"num_labels": len(names), "problem_type": data.problem_type, "local_window": args.local_window}
    fields |= {"position_embedding_type": "periodic", "classifier_pooling": "mean"}
    model = load_factorized(source, "AutoModelForSequenceClassification", max_length=args.max_length, **fields).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    examples = TextExamples(tokenize_documents(dataset, tokenizer, args.max_length)["train"])

    measured, plans = {}, {}
    for way, settings in WAYS.items():
        sampler = LengthGroupedBatchSampler(
            examples.lengths, len(examples), max_tokens=args.max_tokens_per_batch, **settings
        )
        measured[way] = {"steps": len(sampler), "tokens": 0, "real_tokens": 0, "seconds": 0.0}
        plans[way] = (TextCollator(tokenizer, data, "packing" in settings), spread(sampler.batches(0), args.max_steps))
    turns = sorted((turn / len(plan), way, turn) for way, (_, plan) in plans.items() for turn in range(len(plan)))
    warm = set()
    for _, way, turn in tqdm(turns):
        collate, plan = plans[way]
        batch = collate([examples[index] for index in plan[turn]])
        if way not in warm:
            warm.add(way)
            take_step(model, optimizer, batch)
        row = measured[way]
        row["seconds"] += take_step(model, optimizer, batch)
        row["tokens"] += batch["input_ids"].numel()
        row["real_tokens"] += int(sum(examples.lengths[index] for index in plan[turn]))

    total = int(sum(examples.lengths))
    print(f"{len(examples):,} documents, {total:,} tokens, {args.max_tokens_per_batch:,} tokens a step at most")
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
    print(json.dumps(vars(args) | {"threads": torch.get_num_threads(), "ways": measured}))


if __name__ == "__main__":
    main()
