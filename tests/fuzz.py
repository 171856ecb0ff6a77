"""Draw random models and batches and check that what must not matter doesn't: padding, neighbours, packing, chunks.

    python tests/fuzz.py --seed 0 --num 200
    python tests/fuzz.py --case '{"family": "text", "local_kernel_size": 1, "chunk_size": 3}'

A case is a dictionary of the options that differ from `DEFAULTS`; model, batch and noise follow from it and its `seed`.
Where a check fails, options go back to their defaults and documents become shorter as long as it fails still, and the
command that repeats what is left is printed. `check_ranks` is for processes of a group, see tests/models/test_fuzz.py.
"""

import argparse
import json
import math
import random
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from tiny_models import PATCH_SIZE, VOCAB_SIZE, randomize

from fa_transformers import sequence_parallel
from fa_transformers.models import FABertConfig, FABertModel, FAViTConfig, FAViTModel

Case = dict[str, Any]

CONFIG_DEFAULTS: Case = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_act": "gelu",
    "attention_normalization": "softmax",
    "key_feature_size": None,
    "key_features": "copies",
    "learned_temperatures": False,
    "local_kernel_size": 0,
    "local_window": 0,
    "softmax_layers": [],
    "position_embedding_type": "none",
    "classifier_pooling": "cls",
    "chunk_size_feed_forward": 0,
    "num_register_tokens": 0,
    "layerscale_value": None,
    "qkv_bias": True,
}
DEFAULTS: Case = {
    "family": "text",
    **CONFIG_DEFAULTS,
    "seed": 0,
    "dtype": "float64",
    "attn_implementation": "sdpa",
    "lengths": [5, 3],  # tokens of each document
    "sides": [0.0, 0.0],  # share of a document's padding that stands on its left
    "padding": 0,  # more tokens of padding
    "image": [24, 16],  # height and width in pixels
    "holes": 0.0,  # share of patches, or of tokens inside documents, that are masked
    "chunk_size": 4,
    "saves": False,
}
EDGES = (1, 1, 1, 1, 2, 2, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100)  # lengths around tiles

ROUNDINGS = 2**20
"""Rounding units of the largest output by which float64 results may differ. A sum of n <= 2^11 terms is off by n units
at most; through three layers of random weights, whose norms divide by deviations down to 1/8, this grows by less than
2^9. It is 2e-10 of the largest output; a leak moves it by 1e-4 or more."""

LOW_PRECISION_FACTOR = 8
"""Types shorter than float64 are held against what they are off from float64: both results round alike, so each is
about as far from the exact one. Of the few numbers here the largest error may be this many times another's."""


@dataclass(frozen=True)
class Failure:
    """A check that found a difference `error` above `tolerance`, or raised what `message` says."""

    check: str
    error: float = math.nan
    tolerance: float = 0.0
    message: str = ""

    def __str__(self) -> str:
        return f"{self.check}: {self.message or f'{self.error:.1e} off, {self.tolerance:.1e} allowed'}"


def draw(seed: int, index: int) -> Case:
    """Draw a case: the same one for the same numbers."""
    chance = random.Random(f"{seed} {index}")
    choose = chance.choice
    heads, width = choose([1, 2, 3]), choose([4, 8, 16])
    layers = choose([1, 2, 2, 3])
    is_softmax = chance.random() < 0.65
    key_feature_size = choose([None, None, width, width + 1, 2 * width, 2 * width + 5])
    case = {
        "family": choose(["text", "text", "image"]),
        "seed": chance.randrange(1000),
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": choose([8, 24]),
        "hidden_act": choose(["gelu", "relu", "gelu_new"]),
        "attention_normalization": "softmax" if is_softmax else "scaling",
        "key_feature_size": key_feature_size,
        "key_features": choose(["copies", "sign_pairs"]) if is_softmax and key_feature_size else "copies",
        "learned_temperatures": chance.random() < 0.4,
        "local_kernel_size": choose([0, 0, 1, 1, 3, 5, 9]),
        "local_window": choose([0, 0, 0, 0, 1, 2, 5, 16, 40, 10_000]),
        "softmax_layers": sorted(chance.sample(range(layers), choose([0, 0, 0, 1, 1, layers]))),
        "position_embedding_type": choose(["absolute", "periodic", "none"]),
        "classifier_pooling": choose(["cls", "mean"]),
        "chunk_size_feed_forward": choose([0, 0, 1, 7]),
        "dtype": choose(["float64"] * 5 + ["float32", "bfloat16", "float16"]),
        "attn_implementation": choose(["sdpa", "eager"]),
        "lengths": [
            choose(EDGES) if chance.random() < 0.4 else chance.randint(1, 40) for _ in range(choose([1, 2, 3]))
        ],
        "padding": choose([0, 1, 6, 20]),
        "chunk_size": choose([1, 3, 7, 16, 33, 1000]),
        "saves": chance.random() < 0.15,
    }
    case["sides"] = [choose([0.0, 1.0, 0.5]) for _ in case["lengths"]]
    if case["family"] == "image":
        case |= {
            "num_register_tokens": choose([0, 0, 1, 4]),
            "layerscale_value": choose([None, 0.5]),
            "qkv_bias": choose([True, False]),
            "image": [chance.randint(1, 90), chance.randint(1, 90)],
            "holes": choose([0.0, 0.1, 0.6]),
        }
    else:
        case["holes"] = choose([0.0, 0.0, 0.1, 0.6])
    return {name: value for name, value in case.items() if value != DEFAULTS[name]}


class Subject:
    """The model and the batch of a case, and the checks on them: those whose name starts with `check_`."""

    def __init__(self, case: Case):
        self.case = {**DEFAULTS, **case}
        if unknown := case.keys() - DEFAULTS.keys():
            raise ValueError(f"The case has unknown options: {sorted(unknown)}.")
        self.is_text = self.case["family"] == "text"
        self.dtype = getattr(torch, self.case["dtype"])
        self.generator = torch.Generator().manual_seed(self.case["seed"])
        config_class, model_class = (FABertConfig, FABertModel) if self.is_text else (FAViTConfig, FAViTModel)
        default = config_class()
        fields = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, "image_size": 32, "patch_size": PATCH_SIZE}
        if self.case["position_embedding_type"] == "periodic":
            fields["max_position_embeddings"] = 9
        fields |= {name: self.case[name] for name in CONFIG_DEFAULTS}
        config = config_class(**{name: value for name, value in fields.items() if hasattr(default, name)})
        self.model = randomize(model_class(config).eval(), self.case["seed"]).to(self.dtype)
        self.model.set_attn_implementation(self.case["attn_implementation"])

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def run(self, model=None, **inputs) -> dict[str, Tensor]:
        with torch.inference_mode():
            output = (model or self.model)(**inputs)
        return {"tokens": output.last_hidden_state, "pooled": output.pooler_output}

    def failures(self, ranks: Any = None) -> Iterator[Failure]:
        """Run all checks; with `ranks`, a process group that every rank of it runs the same case in, that one alone."""
        prefixes = ("check_text_" if self.is_text else "check_image_", "check_any_")
        names = [name for name in dir(self) if name.startswith(prefixes)] if ranks is None else ["check_ranks"]
        self.batch, self.real = self.text_batch() if self.is_text else self.image_batch()
        self.expected = self.run(**self.batch)
        self.tolerances = self.rounding()
        for name in names:
            check = name.split("_", 2)[-1].replace("_", " ")
            for what, actual, expected in getattr(self, name)(*([ranks] if ranks else [])):
                yield from self.compare(f"{check}, {what}", actual, expected, self.tolerances[what[:6]])

    def compare(self, check: str, actual: Tensor, expected: Tensor, tolerance: float) -> Iterator[Failure]:
        if actual.shape != expected.shape:
            yield Failure(check, message=f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
        elif actual.numel():
            error = float((actual.double() - expected.double()).abs().max())
            if not error <= tolerance:
                yield Failure(check, error, tolerance)

    def rounding(self) -> dict[str, float]:
        """The difference that rounding explains, of tokens and of pooled vectors."""
        real = {"tokens": self.expected["tokens"][self.real], "pooled": self.expected["pooled"]}
        sizes = {name: float(value.double().abs().max()) if value.numel() else 1.0 for name, value in real.items()}
        unit = torch.finfo(self.dtype).eps / 2
        if self.dtype == torch.float64:
            return {name: ROUNDINGS * unit * size for name, size in sizes.items()}
        self.model.double()
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in self.batch.items()}
        exact = self.run(**inputs)
        self.model.to(self.dtype)
        exact["tokens"] = exact["tokens"][self.real]
        errors = {name: float((exact[name] - value.double()).abs().max()) for name, value in real.items()}
        # Pooling reads tokens, and a few of them may by chance be off by less than others.
        worst = max(errors["tokens"] / sizes["tokens"], errors["pooled"] / max(sizes["pooled"], unit))
        return {name: LOW_PRECISION_FACTOR * (worst + 2 * unit) * size for name, size in sizes.items()}

    # Text

    def text_batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Embeddings of each document, so that padding may hold anything, in rows with noise as padding."""
        width = self.case["hidden_size"]
        self.documents = [self.noise(1, length, width) for length in self.case["lengths"]]
        self.marks = [
            torch.rand(1, length, generator=self.generator) >= self.case["holes"] for length in self.case["lengths"]
        ]
        for marks in self.marks:
            marks[:, [0, -1]] = True  # a hole is inside
        return self.in_rows(self.case["padding"], self.case["sides"])

    def in_rows(
        self, padding: int, sides: list[float], filler: float | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Lay the documents out with padding, and return the inputs and where they are real."""
        longest = max(self.case["lengths"]) + padding
        rows = self.noise(len(self.documents), longest, self.case["hidden_size"])
        rows = rows if filler is None else torch.full_like(rows, filler)
        mask = torch.zeros(rows.shape[:2], dtype=torch.bool)
        for index, (document, side) in enumerate(zip(self.documents, sides, strict=False)):
            start = int(side * (longest - document.shape[1]))
            rows[index, start : start + document.shape[1]] = document[0]
            mask[index, start : start + document.shape[1]] = self.marks[index]
            if filler is not None:
                rows[index].masked_fill_(~mask[index, :, None], filler)
        return {"inputs_embeds": rows, "attention_mask": mask}, mask

    def check_text_padding(self):
        """Content, amount and side of padding change nothing."""
        for name, padding, filler in (("other noise", 0, None), ("huge", 3, 1e4), ("NaN", 11, math.nan)):
            sides = [1.0 - side for side in self.case["sides"]]
            inputs, real = self.in_rows(padding, sides, filler)
            output = self.run(**inputs)
            yield f"tokens with {name}", output["tokens"][real], self.expected["tokens"][self.real]
            yield f"pooled with {name}", output["pooled"], self.expected["pooled"]

    def check_text_alone(self):
        """A row of a batch equals its document alone, without a mask where it has no holes."""
        for index, (document, marks) in enumerate(zip(self.documents, self.marks, strict=True)):
            output = self.run(inputs_embeds=document, attention_mask=None if marks.all() else marks)
            yield f"tokens of {index}", output["tokens"][marks], self.expected["tokens"][index][self.real[index]]
            yield f"pooled of {index}", output["pooled"][0], self.expected["pooled"][index]

    def check_text_packed(self):
        """Packed documents equal padded ones, also where one of them holds NaN."""
        bounds = torch.tensor([0, *self.case["lengths"]]).cumsum(dim=0)
        row = torch.cat(self.documents, dim=1)
        marks = torch.cat(self.marks, dim=1)
        inputs = {"cu_seqlens": bounds, "attention_mask": None if marks.all() else marks}
        output = self.run(inputs_embeds=row.masked_fill(~marks[:, :, None], math.nan), **inputs)
        yield "tokens", output["tokens"][marks], self.expected["tokens"][self.real]
        yield "pooled", output["pooled"], self.expected["pooled"]
        if len(self.documents) > 1:
            row[:, : bounds[1]] = math.nan
            output = self.run(inputs_embeds=row, **inputs)
            others = self.expected["tokens"][1:][self.real[1:]]
            yield "tokens beside NaN", output["tokens"][:, bounds[1] :][marks[:, bounds[1] :]], others

    def check_text_ids(self):
        """Token ids with segments, padded on either side, equal the document alone."""
        length = self.case["lengths"][0]
        ids, segments = (torch.randint(0, high, (1, length), generator=self.generator) for high in (VOCAB_SIZE, 2))
        expected = self.run(input_ids=ids, token_type_ids=segments)
        mask = torch.ones_like(ids)
        for name, sides in (("left", (3, 0)), ("right", (0, 3))):
            inputs = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}
            inputs = {key: torch.nn.functional.pad(value, sides) for key, value in inputs.items()}
            for chunk_size in (None, self.case["chunk_size"]):
                output = self.run(**inputs, chunk_size=chunk_size)
                tokens = output["tokens"][:, sides[0] : sides[0] + length]
                yield f"tokens padded on the {name}, chunk_size {chunk_size}", tokens, expected["tokens"]

    # Images

    def image_batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Two images with some patches masked, at least one of each real."""
        height, width = self.case["image"]
        self.grid = -(-height // PATCH_SIZE), -(-width // PATCH_SIZE)
        self.num_prefix = 1 + self.case["num_register_tokens"]
        shape = 2, self.num_prefix + math.prod(self.grid)
        mask = torch.rand(*shape, generator=self.generator) >= self.case["holes"]
        mask[:, : self.num_prefix + 1] = True
        return {"pixel_values": self.noise(2, 3, height, width), "attention_mask": mask}, mask

    def in_pixels(self, patches: Tensor) -> Tensor:
        """Marks of patches, bool [2, P], as those of their pixels, [2, 1, height, width]."""
        height, width = self.case["image"]
        marks = patches.unflatten(1, self.grid)[:, None]
        return marks.repeat_interleave(PATCH_SIZE, 2).repeat_interleave(PATCH_SIZE, 3)[:, :, :height, :width]

    def check_image_padding(self):
        """What masked patches hold changes nothing."""
        holes = self.in_pixels(~self.real[:, self.num_prefix :])
        for name, filler in (("zeros", 0.0), ("huge", 1e3), ("NaN", math.nan)):
            pixels = self.batch["pixel_values"].masked_fill(holes, filler)
            output = self.run(pixel_values=pixels, attention_mask=self.real)
            yield f"tokens with {name}", output["tokens"][self.real], self.expected["tokens"][self.real]
            yield f"pooled with {name}", output["pooled"], self.expected["pooled"]

    def check_image_alone(self):
        """An image of a batch equals itself alone, and beside NaN."""
        for index in range(2):
            alone = {name: value[index : index + 1] for name, value in self.batch.items()}
            beside = dict(self.batch, pixel_values=self.batch["pixel_values"].clone())
            beside["pixel_values"][1 - index] = math.nan
            real = self.real[index]
            for name, output, at in (("alone", self.run(**alone), 0), ("beside NaN", self.run(**beside), index)):
                yield f"tokens {name}", output["tokens"][at][real], self.expected["tokens"][index][real]
                yield f"pooled {name}", output["pooled"][at], self.expected["pooled"][index]

    # Both

    def check_any_chunks(self):
        """Chunks give what the whole gives."""
        output = self.run(**self.batch, chunk_size=self.case["chunk_size"])
        yield "tokens", output["tokens"][self.real], self.expected["tokens"][self.real]
        yield "pooled", output["pooled"], self.expected["pooled"]

    def check_any_neighbour(self):
        """A row that is NaN leaves the others alone, at once and in chunks."""
        name = next(iter(self.batch))
        poisoned = self.batch[name].clone()
        poisoned[0] = math.nan
        for chunk_size in (None, self.case["chunk_size"]):
            output = self.run(**{**self.batch, name: poisoned}, chunk_size=chunk_size)
            real = self.real[1:]
            yield f"tokens, chunk_size {chunk_size}", output["tokens"][1:][real], self.expected["tokens"][1:][real]

    def check_any_saved(self):
        """A saved and loaded model gives the same."""
        if self.case["saves"]:
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)
                loaded = type(self.model).from_pretrained(folder, dtype=self.dtype).eval()
            loaded.set_attn_implementation(self.case["attn_implementation"])
            output = self.run(loaded, **self.batch)
            yield "tokens", output["tokens"][self.real], self.expected["tokens"][self.real]

    def check_any_gradients(self):
        """What padding holds, NaN and numbers that overflow included, changes no gradient."""
        padding = ~self.real[:, :, None] if self.is_text else self.in_pixels(~self.real[:, self.num_prefix :])
        if self.dtype == torch.float64 and padding.any():
            filler = (math.nan, -math.inf, 1e300)[self.case["seed"] % 3]
            yield f"tokens with {filler}", self.gradients(padding, filler), self.gradients(padding, 0.0)

    def gradients(self, padding: Tensor, filler: float) -> Tensor:
        """The gradients of all weights and inputs, of a weighted sum of what the model gives at real tokens."""
        name = next(iter(self.batch))
        values = self.batch[name].masked_fill(padding, filler).requires_grad_()
        output = self.model(**{**self.batch, name: values})
        tokens = output.last_hidden_state[self.real]
        outcome = torch.cat([tokens.flatten(), output.pooler_output.flatten()])
        weights = torch.linspace(-1.0, 1.0, len(outcome), dtype=self.dtype)
        wanted = [weight for weight in self.model.parameters() if weight.requires_grad]
        found = torch.autograd.grad((outcome * weights).sum(), [*wanted, values], allow_unused=True)
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None])

    def check_ranks(self, group: Any):
        """The processes of a group give what one gives, at once and in chunks."""
        for chunk_size in (None, self.case["chunk_size"]):
            with sequence_parallel(group, gather_outputs=True):
                output = self.run(**self.batch, chunk_size=chunk_size)
            yield f"tokens, chunk_size {chunk_size}", output["tokens"][self.real], self.expected["tokens"][self.real]
            yield f"pooled, chunk_size {chunk_size}", output["pooled"], self.expected["pooled"]
        with sequence_parallel(group, gather_outputs=True):
            yield from self.check_any_gradients()


def find_failure(case: Case, ranks: Any = None) -> Failure | None:
    """Return the first check of a case that fails, or None."""
    try:
        return next(Subject(case).failures(ranks), None)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(
            "raised", message=f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
        )


def shrink(case: Case, failure: Failure, find: Callable[[Case], Failure | None] = find_failure) -> Case:
    """Drop options and shorten documents and images as long as that check fails: nothing that is left can go alone."""

    def fails(smaller: Case) -> bool:
        found = find(smaller)
        return found is not None and found.check.split(",")[0] == failure.check.split(",")[0]

    has_changed = True
    while has_changed:
        has_changed = False
        for smaller in _smaller(case):
            if fails(smaller):
                case, has_changed = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    for name in case:
        yield {key: value for key, value in case.items() if key != name}
    lengths, sides = case.get("lengths", []), case.get("sides", DEFAULTS["sides"])
    for index, length in enumerate(lengths):
        if len(lengths) > 1:
            yield {
                **case,
                "lengths": lengths[:index] + lengths[index + 1 :],
                "sides": sides[:index] + sides[index + 1 :],
            }
        if length > 1:
            yield {**case, "lengths": [*lengths[:index], length // 2, *lengths[index + 1 :]]}
    for index, size in enumerate(case.get("image", [])):
        if size > PATCH_SIZE:
            yield {**case, "image": [size // 2 if axis == index else other for axis, other in enumerate(case["image"])]}


def command(case: Case) -> str:
    """Return the command that repeats a case."""
    return f"python tests/fuzz.py --case {shlex.quote(json.dumps(case))}"


def fuzz(seed: int, indices: range) -> list[tuple[Case, Failure]]:
    """Check cases, and return those that fail, shrunk, with what fails."""
    found = []
    for index in indices:
        case = draw(seed, index)
        failure = find_failure(case)
        if failure is not None:
            case = shrink(case, failure)
            found.append((case, find_failure(case) or failure))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="number that all cases follow from")
    parser.add_argument("--num", type=int, default=200, help="cases to draw")
    parser.add_argument("--case", type=json.loads, help="one case as JSON, instead of drawn ones")
    args = parser.parse_args()
    if args.case is None:
        found = fuzz(args.seed, range(args.num))
    else:
        failure = find_failure(args.case)
        found = [] if failure is None else [(args.case, failure)]
    for case, failure in found:
        print(f"{failure}\n    {command(case)}")
    print(f"{1 if args.case else args.num} cases, {len(found)} failures")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
