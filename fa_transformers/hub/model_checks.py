"""Checks of one model's own weights: what must not matter to it does not, and what each precision costs it.

Padding, neighbours, chunks and packing are compared in float64, where a difference is either rounding or a fault. Each
precision is compared with float64 by length. Inputs are drawn from the tokenizer's vocabulary, or are noise for images,
from fixed seeds; which lengths run follows from the model's sizes alone. So the rows are the same on every machine, but
for the last digits of the differences.

`self_check` reads this file by its path, in a process that cannot import our package: it imports torch only.

Shape letters: D documents or images, N tokens, R real tokens of all documents.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

ROUNDINGS = 2**20
"""Rounding units of float64 by which results may differ. A sum of 2^11 terms is off by as many units at most, and some
dozen layers whose norms divide by small deviations make 2^9 of each. It is 1e-10; a leak that matters is far above."""
EXACT_BASIS = "2^20 rounding units of float64"
MOST_OFF = 0.5
"""Share of the largest output above which a precision is of no use, however many layers round."""
LEAST_OFF = 2**-8
"""Share of the largest output that no precision must stay below: the rounding of the output alone to bfloat16."""

DOCUMENT_LENGTHS = (5, 23, 64)
LENGTHS = (64, 512, 4096)
MOST_DOCUMENTS, TOKENS_PER_RUN = 4, 1024
"""Documents of a precision run: as many of the length as these tokens hold."""
CHUNK_SIZE = 7
MORE_PADDING = 9
# Multiplications with weights of one forward pass: 3 s in float64 or float16 on two cores.
MOST_PRODUCTS = 2**36
# Numbers of one activation, 256 MiB in float64.
MOST_NUMBERS = 2**25
TILE = 64
NOTE_CHARACTERS = 200

PASSED, FAILED, UNFIT, NOT_APPLICABLE = "passed", "failed", "unfit", "not applicable"
Outputs = dict[str, Tensor]
Variants = Iterator[tuple[str, Outputs, Outputs]]


def check_model(model: Any, processor: Any, auto_class: str) -> list[dict[str, Any]]:
    """Run every check on a copy of `model`, on the CPU, and return one row for each.

    A row has `check`, `inputs` (what on), `outcome` ("passed", "failed", "unfit" where a precision that the model isn't
    stored in is of no use for it, or "not applicable"), `difference` and `tolerance` (shares of the largest output;
    None where there is no figure), `basis` (where the tolerance comes from), `note`, and `same` of `decisions` that a
    classifier made as in float64. A check that raises is a row that failed.
    """
    exact = copy.deepcopy(model).to("cpu", torch.float64).eval()
    kind: Any = _Texts
    if model.main_input_name == "pixel_values":
        kind = _Images if hasattr(model.config, "patch_shape") else _Maps
    with torch.no_grad():
        try:
            subject = kind(exact, processor, auto_class)
        except Exception as error:
            return [_row("inputs", None, FAILED, note=_describe(error))]
        rows = [_check_weights(model), *subject.properties()]
        runs = subject.runs()
        expected: list[Outputs | Exception] = []
        for run in runs:
            try:
                expected.append(subject.run(exact, **run.inputs))
            except Exception as error:
                expected.append(error)
        del exact, subject.model
        # Of all lengths: one number that happens to be near zero would make any rounding look large.
        largest = largest_outputs(outputs for outputs in expected if isinstance(outputs, dict))
        for dtype in dict.fromkeys([model.dtype, torch.bfloat16, torch.float16]):
            if dtype != torch.float64:
                rounded = copy.deepcopy(model).to("cpu", dtype).eval()
                for run, reference in zip(runs, expected, strict=True):
                    rows.append(_check_precision(subject, rounded, run, reference, largest, dtype == model.dtype))
                del rounded
    return rows


def _row(check: str, inputs: str | None, outcome: str, **values: Any) -> dict[str, Any]:
    row = {"check": check, "inputs": inputs, "outcome": outcome, "difference": None, "tolerance": None}
    return row | {"basis": None, "note": None, "same": None, "decisions": None} | values


def _describe(error: Exception) -> str:
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"[:NOTE_CHARACTERS]


def _check_weights(model: Any) -> dict[str, Any]:
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    note = f"NaN or infinity in {len(broken)}, such as {broken[0]}"[:NOTE_CHARACTERS] if broken else None
    return _row("weights are finite", f"{len(state)} tensors", FAILED if broken else PASSED, note=note)


def digest_weights(model: Any) -> str:
    """Return the SHA-256 of all weights, by name, dtype and shape, bit for bit, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_saved(loaded: Any, weights: str | None) -> dict[str, Any]:
    """The row on a model that was saved and loaded: its weights have the digest that they had before, or not."""
    check, inputs = "saved and loaded", f"{len(loaded.state_dict())} tensors, bit for bit"
    if weights is None:
        return _row(check, inputs, NOT_APPLICABLE, note="the digest of the weights was not written down")
    is_equal = digest_weights(loaded) == weights
    return _row(check, inputs, PASSED if is_equal else FAILED, note=None if is_equal else "the weights are others")


def largest_outputs(several: Iterable[Outputs]) -> dict[str, float]:
    """Return the largest absolute value of each output, by name."""
    largest: dict[str, float] = {}
    for outputs in several:
        for name, value in outputs.items():
            largest[name] = max(largest.get(name, 0.0), value.double().abs().max().item() if value.numel() else 0.0)
    return largest


def relative_difference(actual: Outputs, expected: Outputs, largest: dict[str, float] | None = None) -> float:
    """Return the largest difference as a share of the largest output, of the output where that is most; NaN where a
    value is not finite.

    Args:
        largest: the largest value of each output; None takes it from `expected`.

    Raises:
        ValueError: names or shapes differ.
    """
    if actual.keys() != expected.keys() or any(actual[name].shape != expected[name].shape for name in expected):
        shapes = [{name: tuple(value.shape) for name, value in outputs.items()} for outputs in (actual, expected)]
        raise ValueError(f"it gives {shapes[0]} instead of {shapes[1]}")
    largest = largest or largest_outputs([expected])
    worst = 0.0
    for name, value in expected.items():
        found, exact = actual[name].double(), value.double()
        if not (torch.isfinite(found).all() and torch.isfinite(exact).all()):
            return math.nan
        if exact.numel():
            worst = max(worst, (found - exact).abs().max().item() / (largest[name] or 1.0))
    return worst


def _check_property(check: str, inputs: str, variants: Callable[[], Variants]) -> dict[str, Any]:
    """The row of a check whose variants must give what is expected of them, in float64."""
    tolerance = ROUNDINGS * torch.finfo(torch.float64).eps / 2
    values = {"tolerance": tolerance, "basis": EXACT_BASIS}
    worst = 0.0
    try:
        for what, actual, expected in variants():
            difference = relative_difference(actual, expected)
            if not difference <= tolerance:
                finite = None if math.isnan(difference) else difference
                note = what if finite is not None else f"{what}: not finite"
                return _row(check, inputs, FAILED, difference=finite, note=note, **values)
            worst = max(worst, difference)
    except Exception as error:
        return _row(check, inputs, FAILED, note=_describe(error), **values)
    return _row(check, inputs, PASSED, difference=worst, **values)


class Run:
    """One input of the precision checks: what it is called, and the arguments of `run`."""

    def __init__(self, name: str, **inputs: Any):
        self.name, self.inputs = name, inputs


def _check_precision(
    subject: Any, model: Any, run: Run, expected: Outputs | Exception, largest: dict[str, float], is_own: bool
) -> dict[str, Any]:
    """The row of one precision on one input: its outputs beside those of float64."""
    # Every sub-layer rounds what it adds, each time by a few units, and at worst all in one direction.
    units = 8 * subject.count_steps(model)
    unit = torch.finfo(model.dtype).eps / 2
    tolerance = max(LEAST_OFF, min(MOST_OFF, units * unit))
    name = str(model.dtype).removeprefix("torch.")
    basis = {
        LEAST_OFF: "the output rounded to bfloat16",
        MOST_OFF: "half of the largest output",
    }.get(tolerance, f"{units} rounding units of {name}")
    check, values = f"{name} beside float64", {"tolerance": tolerance, "basis": basis}
    bad = FAILED if is_own else UNFIT
    try:
        if isinstance(expected, Exception):
            raise expected
        actual = subject.run(model, **run.inputs)
        difference = relative_difference(actual, expected, largest)
    except Exception as error:
        return _row(check, run.name, FAILED if is_own else NOT_APPLICABLE, note=_describe(error), **values)
    if math.isnan(difference):
        return _row(check, run.name, bad, note="not finite", **values)
    ours, theirs = (subject.decide(outputs, run) for outputs in (actual, expected))
    if ours is not None:
        values |= {"same": int((ours == theirs).sum()), "decisions": ours.numel()}
    return _row(check, run.name, PASSED if difference <= tolerance else bad, difference=difference, **values)


def _most_tokens(model: Any, auto_class: str) -> int:
    """Tokens of one document above which a forward pass takes too long or too much memory for a check."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.base_model.encoder.parameters())
    widest = [config.intermediate_size]
    if auto_class == "AutoModelForMaskedLM":
        widest.append(config.vocab_size)
    if config.local_window:
        widest.append(config.num_attention_heads * (2 * config.local_window + TILE))
    most = min(MOST_PRODUCTS // max(weights, 1), MOST_NUMBERS // max(widest))
    if config.softmax_layers:
        most = min(most, math.isqrt(MOST_NUMBERS // config.num_attention_heads))
    return max(most, DOCUMENT_LENGTHS[-1])


class _Checks:
    """The model in float64 and its inputs; `run` gives outputs in one order, however the inputs were laid out."""

    def __init__(self, model: Any, auto_class: str):
        self.model, self.auto_class = model, auto_class
        self.config = model.config
        self.per_token = dict(getattr(type(model), "TOKEN_OUTPUTS", {}))
        self.generator = torch.Generator().manual_seed(0)

    def count_steps(self, model: Any) -> int:
        """Return how many sub-layers, one after another, each round."""
        return 2 * self.config.num_hidden_layers + 2

    def decide(self, outputs: Outputs, run: Run) -> Tensor | None:
        """Return a classifier's decisions, or None where the model makes none."""
        if self.auto_class == "AutoModelForQuestionAnswering":
            return torch.stack([outputs[name].view(-1, run.inputs["ids"].shape[1]).argmax(dim=1) for name in outputs])
        if self.auto_class == "AutoModelForMultipleChoice":
            return outputs["logits"].argmax(dim=0)
        if "logits" not in outputs or self.config.problem_type == "regression" or outputs["logits"].shape[-1] == 1:
            return None
        is_multi_label = self.config.problem_type == "multi_label_classification"
        return outputs["logits"] > 0 if is_multi_label else outputs["logits"].argmax(dim=-1)


class _Pictures(_Checks):
    """Images, or pairs of them: `images` has tensors of a size each, with the examples in their first dimension."""

    images: list[Tensor]
    run: Callable[..., Outputs]

    def alone(self) -> Variants:
        for pixels in self.images:
            together = self.run(self.model, pixels)
            parts = [self.run(self.model, pixels[index : index + 1]) for index in range(len(pixels))]
            yield "each alone", {name: torch.cat([part[name] for part in parts]) for name in together}, together


class _Texts(_Checks):
    def __init__(self, model: Any, processor: Any, auto_class: str):
        super().__init__(model, auto_class)
        self.longest_run = _most_tokens(model, auto_class)
        table = self.config.max_position_embeddings
        limits = [processor.model_max_length, *([table] if self.config.position_embedding_type == "absolute" else [])]
        self.longest = int(min(limits))
        special = set(processor.all_special_ids)
        ids = {i for i in processor.get_vocab().values() if i < self.config.vocab_size}
        self.tokens = torch.tensor(sorted(ids - special) or sorted(ids))
        self.ends = processor.cls_token_id, processor.sep_token_id
        self.lengths = sorted({min(length, self.longest) for length in DOCUMENT_LENGTHS})
        self.documents = [self.draw(length) for length in self.lengths]

    def draw(self, *shape: int) -> Tensor:
        """Draw token ids, with the tokens that begin and end a document in their places."""
        ids = self.tokens[torch.randint(len(self.tokens), shape, generator=self.generator)]
        if self.ends[0] is not None:
            ids[..., 0] = self.ends[0]
        if self.ends[1] is not None and shape[-1] > 1:
            ids[..., -1] = self.ends[1]
        return ids

    def in_rows(self, padding: int = 0, on_left: bool = False) -> dict[str, Tensor]:
        """Lay the documents out in rows, with drawn tokens as padding."""
        ids = self.draw(len(self.documents), max(self.lengths) + padding)
        mask = torch.zeros_like(ids)
        for row, document in enumerate(self.documents):
            start = ids.shape[1] - len(document) if on_left else 0
            ids[row, start : start + len(document)] = document
            mask[row, start : start + len(document)] = 1
        return {"ids": ids, "mask": mask}

    def run(self, model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Outputs:
        """Return outputs per document [D, ...] or per real token [R, ...], in the documents' order."""
        inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        is_choice = self.auto_class == "AutoModelForMultipleChoice"
        if is_choice and "cu_seqlens" not in options:
            inputs = {name: value[None] for name, value in inputs.items()}
        outputs = model(**inputs, **options, return_dict=True)
        real = torch.ones_like(ids).bool() if mask is None else mask.bool()
        return {
            name: value.reshape(-1, 1) if is_choice else value[real] if name in self.per_token else value
            for name, value in outputs.items()
            if isinstance(value, Tensor)
        }

    def properties(self) -> Iterator[dict[str, Any]]:
        """Check padding, neighbours, chunks and packing."""
        inputs = f"{len(self.lengths)} documents of {self.lengths[0]} to {self.lengths[-1]} tokens"
        if len(self.lengths) == 1:
            inputs = f"1 document of {self.lengths[0]} tokens"
        yield _check_property("padding", f"{inputs}, other tokens and {MORE_PADDING} more, on either side", self.padded)
        yield _check_property("batch", f"{inputs}, each alone", self.alone)
        yield _check_property("chunks", f"{inputs}, {CHUNK_SIZE} tokens at a time", self.chunked)
        yield _check_property("packed", f"{inputs}, in one row", self.packed)

    def padded(self) -> Variants:
        expected = self.run(self.model, **self.in_rows())
        yield "other tokens as padding", self.run(self.model, **self.in_rows()), expected
        yield "more padding", self.run(self.model, **self.in_rows(MORE_PADDING)), expected
        yield "padding on the left", self.run(self.model, **self.in_rows(MORE_PADDING, on_left=True)), expected

    def alone(self) -> Variants:
        parts = [self.run(self.model, ids=document[None]) for document in self.documents]
        together = self.run(self.model, **self.in_rows())
        yield "each document alone", {name: torch.cat([part[name] for part in parts]) for name in together}, together

    def chunked(self) -> Variants:
        rows = self.in_rows()
        yield "in chunks", self.run(self.model, **rows, chunk_size=CHUNK_SIZE), self.run(self.model, **rows)

    def packed(self) -> Variants:
        bounds = torch.tensor([0, *self.lengths]).cumsum(dim=0)
        options: dict[str, Any] = (
            {"num_choices": len(self.lengths)} if self.auto_class == "AutoModelForMultipleChoice" else {}
        )
        packed = self.run(self.model, ids=torch.cat(self.documents)[None], cu_seqlens=bounds, **options)
        yield "packed", packed, self.run(self.model, **self.in_rows())

    def runs(self) -> list[Run]:
        """Draw documents by length, as long as the model reads and a check can afford."""
        longest = min(self.longest, _most_tokens(self.model, self.auto_class))
        lengths = sorted({length for length in (*LENGTHS, self.longest) if length <= longest} or {longest})
        runs = []
        for length in lengths:
            count = max(1, min(MOST_DOCUMENTS, TOKENS_PER_RUN // length))
            name = f"{count} document{'s' if count > 1 else ''} of {length:,} tokens"
            runs.append(Run(name, ids=self.draw(count, length)))
        return runs


class _Images(_Pictures):
    def __init__(self, model: Any, processor: Any, auto_class: str):
        super().__init__(model, auto_class)
        self.longest_run = _most_tokens(model, auto_class)
        height, width = self.config.patch_shape
        self.num_prefix = 1 + self.config.num_register_tokens
        # Neither square nor whole patches, where a patch has pixels to lose.
        self.grids = ((3, 5), (6, 2))
        self.sizes = [(rows * height - height // 2, columns * width - width // 3) for rows, columns in self.grids]
        self.images = [self.draw(2, *size) for size in self.sizes]

    def draw(self, count: int, *size: int) -> Tensor:
        shape = (count, self.config.num_channels, *size)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def run(self, model: Any, pixels: Tensor, mask: Tensor | None = None, **options: Any) -> Outputs:
        """Return outputs per image [D, ...], or per real token or pixel [R, ...]."""
        inputs = {"pixel_values": pixels.to(model.dtype)} | ({} if mask is None else {"attention_mask": mask})
        outputs = model(**inputs, **options, return_dict=True)
        values = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        if mask is None:
            return values
        real = {1: mask, 2: self.in_pixels(mask, pixels)}
        return {
            name: value.movedim(1, -1)[real[2]]
            if self.per_token.get(name) == 2
            else value[real[1]]
            if name in self.per_token
            else value
            for name, value in values.items()
        }

    def in_pixels(self, mask: Tensor, pixels: Tensor) -> Tensor:
        """Return where pixels are real, bool [D, height, width], of a mask of tokens [D, N]."""
        (height, width), (rows, columns) = self.config.patch_shape, pixels.shape[2:]
        grid = -(-rows // height), -(-columns // width)
        patches = mask[:, self.num_prefix :].unflatten(1, grid)
        return patches.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, :rows, :columns]

    def masks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images with a mask of tokens where every third patch is not real."""
        for pixels, grid in zip(self.images, self.grids, strict=True):
            mask = torch.arange(self.num_prefix + math.prod(grid)) % 3 != 2
            mask[: self.num_prefix] = True
            yield pixels, mask.expand(len(pixels), -1)

    def properties(self) -> Iterator[dict[str, Any]]:
        """Check masked patches, neighbours and chunks."""
        inputs = "2 images each of " + " and ".join(f"{height} x {width} px" for height, width in self.sizes)
        yield _check_property("padding", f"{inputs}, masked patches", self.padded)
        yield _check_property("batch", f"{inputs}, each alone", self.alone)
        yield _check_property("chunks", f"{inputs}, {CHUNK_SIZE} patches at a time", self.chunked)
        yield _row("packed", None, NOT_APPLICABLE, note="images are not packed")

    def padded(self) -> Variants:
        for pixels, mask in self.masks():
            noise = self.draw(len(pixels), *pixels.shape[2:])
            others = torch.where(self.in_pixels(mask, pixels)[:, None], pixels, noise)
            yield "other masked patches", self.run(self.model, others, mask), self.run(self.model, pixels, mask)

    def chunked(self) -> Variants:
        for pixels, mask in self.masks():
            expected = self.run(self.model, pixels, mask)
            yield "in chunks", self.run(self.model, pixels, mask, chunk_size=CHUNK_SIZE), expected

    def runs(self) -> list[Run]:
        """Draw an image of the model's own size and half of one, as large as a check can afford."""
        (rows, columns), (height, width) = self.config.native_grid, self.config.patch_shape
        longest = _most_tokens(self.model, self.auto_class)
        while rows * columns > longest:
            rows, columns = max(1, rows // 2), max(1, columns // 2)
        sizes = dict.fromkeys([(-(-rows // 2) * height, columns * width), (rows * height, columns * width)])
        return [Run(f"2 images of {h:,} x {w:,} px", pixels=self.draw(2, h, w)) for h, w in sizes]


class _Maps(_Pictures):
    """A network that answers for every place of an image, or of a pair, of any size: it has no patches."""

    SIZES = ((56, 88), (72, 40))
    LARGEST = (128, 192)

    def __init__(self, model: Any, processor: Any, auto_class: str):
        super().__init__(model, auto_class)
        self.shape = image_shape(model)
        self.noun = "images" if len(self.shape) == 1 else "pairs"
        self.images = [self.draw(2, *size) for size in self.SIZES]

    def count_steps(self, model: Any) -> int:
        """Return the number of convolutions and linear maps: an upper bound of those one after another."""
        return sum(getattr(getattr(module, "weight", None), "ndim", 0) > 1 for module in model.modules())

    def draw(self, count: int, *size: int) -> Tensor:
        return torch.randn((count, *self.shape, *size), generator=self.generator, dtype=torch.float64)

    def run(self, model: Any, pixels: Tensor, mask: Tensor | None = None, maps_only: bool = False) -> Outputs:
        """Return every output, or with `maps_only` those of `COMPARED_MODULES` where the model names such."""
        inputs = {"pixel_values": pixels.to(model.dtype)} | ({} if mask is None else {"pixel_mask": mask})
        names = getattr(type(model), "COMPARED_MODULES", ()) if maps_only else ()
        maps: Outputs = {}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: maps.update({name: output}))
            for name, module in model.named_modules()
            if name in names
        ]
        outputs = model(**inputs, return_dict=True)
        for hook in hooks:
            hook.remove()
        return maps or {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def decide(self, outputs: Outputs, run: Run) -> Tensor | None:
        return None

    def properties(self) -> Iterator[dict[str, Any]]:
        """Check padding and neighbours."""
        noun, sees = self.noun, getattr(type(self.model), "SEES_PADDING", False)
        sizes = " and ".join(f"{height} x {width} px" for height, width in self.SIZES)
        told = _row("padding", None, NOT_APPLICABLE, note=f"convolutions see {noun} and padding alike")
        inputs = f"2 {noun} of {sizes}, padded to one size, each alone"
        yield told if sees else _check_property("padding", inputs, self.padded)
        yield _check_property("batch", f"2 {noun} each of {sizes}, each alone", self.alone)
        yield _row("chunks", None, NOT_APPLICABLE, note=f"{noun} are not taken in chunks")
        yield _row("packed", None, NOT_APPLICABLE, note=f"{noun} are not packed")

    def padded(self) -> Variants:
        """Lay images of all sizes out in one batch, with noise as padding, and cut the answers to each image's own."""
        height, width = (max(sides) for sides in zip(*self.SIZES, strict=True))
        pixels = self.draw(len(self.images), height, width)
        mask = torch.zeros(len(self.images), height, width, dtype=torch.long)
        for row, (pair, size) in enumerate(zip(self.images, self.SIZES, strict=True)):
            pixels[row, ..., : size[0], : size[1]] = pair[0]
            mask[row, : size[0], : size[1]] = 1
        together = self.run(self.model, pixels, mask)
        for row, pair in enumerate(self.images):
            alone = self.run(self.model, pair[:1])
            cut = {name: value[row : row + 1][tuple(map(slice, alone[name].shape))] for name, value in together.items()}
            yield f"image {row + 1} among others", cut, alone

    def runs(self) -> list[Run]:
        """Draw what has the largest side of a check, and half of it."""
        sizes = (tuple(side // 2 for side in self.LARGEST), self.LARGEST)
        return [Run(f"2 {self.noun} of {h} x {w} px", pixels=self.draw(2, h, w), maps_only=True) for h, w in sizes]


def image_shape(model: Any) -> tuple[int, ...]:
    """Return the dimensions of an example between batch and height: (channels), or (images, channels) of a pair."""
    config = getattr(model.config, "backbone_config", None) or model.config
    together = getattr(type(model), "IMAGES_TOGETHER", 1)
    return (config.num_channels,) if together == 1 else (together, config.num_channels)
