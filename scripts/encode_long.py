"""Encode one very long document, or one very large image, on a CPU in chunks, and measure time and peak memory.

python scripts/encode_long.py                                 # MiniLM (6 layers x 384), 1,048,576 tokens of licences
python scripts/encode_long.py --model_size bert-base          # 12 layers x 768, random weights, the same tokens
python scripts/encode_long.py --image_size 8192               # FA-ViT-S/16, random weights, 262,144 patches

The result is exact: every token attends to the whole document. Memory is of this process, its peak resident set, with
libraries, weights, inputs and outputs: 1.02, 1.33 and 2.41 GiB at 65,536, 262,144 and 1,048,576 tokens (MiniLM), of
which 0.64 to 0.69 GiB before encoding. Ends with one line of JSON.
"""

import itertools
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from fa_transformers import FABertConfig, FABertModel, FAViTConfig, FAViTModel
from fa_transformers.checks import check_positive
from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.conversion.packaged import resolve_checkpoint
from fa_transformers.cores import choose_threads
from fa_transformers.data.sets.license_documents import load_license_documents
from fa_transformers.options import OptionGroup, option
from fa_transformers.tables import counted

BERT_BASE, MINILM, VIT_SMALL = "bert-base", "minilm", "vit-small"
VIT_SMALL_SIZES = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}


@dataclass(frozen=True)
class EncodeOptions(OptionGroup):
    """The document or image, the model that encodes it, and the chunks that it works on."""

    num_tokens: int = option(2**20, "length of the document", group="encode", common=True)
    model_size: Literal["minilm", "bert-base"] = option(MINILM, "MiniLM has real weights", group="encode", common=True)
    image_size: int | None = option(
        None, "encode a square image of so many pixels a side instead", group="encode", common=True
    )
    chunk_size: int = option(8192, "tokens worked on at a time", group="encode", common=True)
    local_window: int = option(0, "reach of the softmax over neighbours; 0 = off", group="encode", common=True)
    local_kernel_size: int = option(0, "width of the convolution over V; 0 = off", group="encode", common=True)
    num_threads: int = option(choose_threads().count, "CPU threads", group="encode", common=True)


def parse(argv: Sequence[str] | None = None) -> EncodeOptions:
    """Return the options, checked."""
    parser = script_parser("python scripts/encode_long.py", __doc__)
    parser.add_options(EncodeOptions, ("encode",), "encoding")
    parsed = parser.parse(argv)
    try:
        check_positive(parsed[EncodeOptions], "num_tokens", "image_size", "num_threads")
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[EncodeOptions]


def build_model(options: EncodeOptions) -> tuple[str, PreTrainedModel]:
    """Build the model; returns its name, too."""
    local = {"local_window": options.local_window, "local_kernel_size": options.local_kernel_size}
    if options.image_size:
        return VIT_SMALL, FAViTModel(FAViTConfig(**VIT_SMALL_SIZES, **local))
    local["position_embedding_type"] = "periodic"
    if options.model_size == BERT_BASE:
        return BERT_BASE, FABertModel(FABertConfig(**local))
    return MINILM, FABertModel.from_pretrained(resolve_checkpoint(MINILM), **local)


def make_document(num_tokens: int) -> Tensor:
    """Join the licence texts, from the start again if need be, to one document: int [1, num_tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint(MINILM))
    ids: list[int] = []
    for text in itertools.cycle(load_license_documents()["train"]["text"]):
        if len(ids) >= num_tokens:
            break
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([[tokenizer.cls_token_id, *ids[: num_tokens - 2], tokenizer.sep_token_id]])


def make_image(size: int) -> Tensor:
    """Draw interfering waves, another pair in each channel: float [1, 3, size, size]."""
    image, steps = torch.empty(1, 3, size, size), torch.arange(size)
    for channel, (vertical, horizontal) in enumerate([(7, 31), (47, 19), (83, 101)]):
        torch.outer((steps / vertical).sin(), (steps / horizontal).cos(), out=image[0, channel])
    return image


def peak_resident_gib() -> float:
    """Return the peak resident memory of this process in GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(0)
    name, model = build_model(options)
    model.eval()
    inputs = make_image(options.image_size) if options.image_size else make_document(options.num_tokens)
    before = peak_resident_gib()
    patch = model.config.patch_size if options.image_size else None
    num_tokens = (-(-options.image_size // patch)) ** 2 if patch else inputs.shape[1]
    num_layers = model.config.num_hidden_layers
    print(
        f"{name}: {counted(num_tokens, 'token')} through {counted(num_layers, 'layer')}; {before:.2f} GiB before",
        flush=True,
    )
    with tqdm(total=num_layers * num_tokens, unit=" tokens", unit_scale=True, desc="all layers") as progress:

        def note(part, arguments, chunk) -> None:
            progress.update(chunk.shape[1])

        for layer in model.encoder.layer:  # the last part of a layer, called for each of its chunks
            layer.output.register_forward_hook(note)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model(inputs, chunk_size=options.chunk_size)
        seconds = time.perf_counter() - started
    peak = peak_resident_gib()
    if not output.last_hidden_state.mean(dim=1).isfinite().all():
        raise ArithmeticError("The hidden states are not finite.")
    print(f"{seconds:,.1f} s, {num_tokens / seconds:,.0f} tokens/s, peak {peak:.2f} GiB resident", flush=True)
    facts = {"model": name, "num_tokens": num_tokens}
    named = ("chunk_size", "num_threads", "local_window", "local_kernel_size")
    facts |= {field: getattr(options, field) for field in named}
    facts |= {"seconds": round(seconds, 1), "tokens_per_second": round(num_tokens / seconds)}
    facts |= {"peak_resident_gib": round(peak, 2), "resident_before_gib": round(before, 2)}
    print(json.dumps(facts | {"torch": torch.__version__}))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
