"""Time, memory and test accuracy of a published classifier of licence documents, by length, as a Markdown table.

python scripts/studies/score_by_length.py outputs/demo        # 2 CPU cores: about 4 minutes

Times and memory are of one forward pass at batch 1 in float32, beside the same model with softmax attention (SDPA);
accuracy is on the test split of the licence documents, each cut to that many tokens. Ends with one line of JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fa_transformers  # noqa: F401 - registers the FA models
from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.data.sets.license_documents import load_license_documents
from fa_transformers.files import count_cores
from fa_transformers.hub.timing import measure_speed


@torch.inference_mode()
def accuracy_at(model, documents: list[list[int]], labels: list[int], length: int) -> float:
    """Return the share of right answers when documents are cut to `length` tokens, the closing one kept."""
    right = 0
    for tokens, label in tqdm(list(zip(documents, labels, strict=True)), desc=f"{length} tokens"):
        cut = tokens if len(tokens) <= length else tokens[: length - 1] + tokens[-1:]
        right += int(model(torch.tensor([cut])).logits.argmax()) == label
    return right / len(documents)


def show(number: float | None) -> str:
    """Return a figure as it stands in the table."""
    return "out of memory" if number is None else f"{number:,.0f}"


def parse(argv: Sequence[str] | None = None) -> tuple[Path, list[int]]:
    """Return the model's folder and the lengths."""
    parser = script_parser("python scripts/studies/score_by_length.py FOLDER", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="model folder, as scripts/finetune.py leaves it")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens (default: 512 2048 8192)")
    given = parser.parse(argv).given
    return given["folder"], given.get("lengths", [512, 2048, 8192])


def main(argv: Sequence[str] | None = None) -> None:
    folder, lengths = parse(argv)
    torch.set_num_threads(count_cores())
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test = load_license_documents()["test"]
    documents = tokenizer(list(test["text"]), verbose=False)["input_ids"]
    labels = [model.config.label2id[name] for name in test["label"]]
    rows = []
    print("| tokens | accuracy | ms | ms, softmax | MiB | MiB, softmax |\n| --- | --- | --- | --- | --- | --- |")
    for length in lengths:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)
        speed = measure_speed(model, {"input_ids": tokens}, length)
        score = accuracy_at(model, documents, labels, length)
        rows.append(vars(speed) | {"accuracy": round(score, 4)})
        print(
            f"| {length:,} | {score:.3f} | {show(speed.milliseconds)} | {show(speed.softmax_milliseconds)} "
            f"| {show(speed.mebibytes)} | {show(speed.softmax_mebibytes)} |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
