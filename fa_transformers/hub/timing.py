"""Time and peak memory of one forward pass: a factorized model beside itself with softmax attention.

Only `time_by_length` and `time_image` choose the inputs; what is in them changes neither figure.
"""

import copy
import math
import os
import platform
import statistics
import time
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from ..evaluation import evaluating
from ..tables import counted
from .card import SpeedFacts
from .model_checks import image_shape

LONGEST_TIMED_ON_CPU = 4096
"""Tokens above which softmax attention would take minutes on a CPU, only to fill a row of a card."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operators make inside a `with` block; `peak_bytes` is the largest total alive.

    Weights and inputs are left out, and so is the scratch space inside an operator. For devices whose allocator keeps
    no such count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._known.update(tensor.untyped_storage() for tensor in inputs)
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage)
                self._live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._live_bytes)
                weakref.finalize(storage, self._release, storage.nbytes())
        return output

    def _release(self, num_bytes: int) -> None:
        self._live_bytes -= num_bytes


@torch.inference_mode()
def measure_forward(model: PreTrainedModel, inputs: Mapping[str, Tensor], repeats: int = 3) -> tuple[float, float]:
    """Return median milliseconds and peak mebibytes (weights left out) of `model(**inputs)` in inference mode."""
    on_gpu = inputs[next(iter(inputs))].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(**inputs)
        peak_bytes = torch.cuda.max_memory_allocated() - before
    else:
        with PeakMemory() as meter:
            model(**inputs)
        peak_bytes = meter.peak_bytes
    milliseconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        model(**inputs)
        if on_gpu:
            torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - started) * 1000)
    return statistics.median(milliseconds), peak_bytes / 2**20


def measure_speed(model: PreTrainedModel, inputs: Mapping[str, Tensor], length: int) -> SpeedFacts:
    """Measure `model` and the same model with softmax layers only, on `inputs` of `length` tokens.

    The softmax model has fresh weights, which change neither figure; its figures are None where it runs out of memory.
    `model` is left in the mode that it was in.
    """
    with evaluating(model):
        milliseconds, mebibytes = measure_forward(model, inputs)
    config = softmax_config(model.config)
    softmax_milliseconds = softmax_mebibytes = None
    try:
        softmax_model = type(model)(config).to(model.device, model.dtype).eval()
        softmax_milliseconds, softmax_mebibytes = measure_forward(softmax_model, inputs)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return SpeedFacts(
        length=length,
        milliseconds=round(milliseconds, 1),
        mebibytes=round(mebibytes, 1),
        softmax_milliseconds=None if softmax_milliseconds is None else round(softmax_milliseconds, 1),
        softmax_mebibytes=None if softmax_mebibytes is None else round(softmax_mebibytes, 1),
    )


def softmax_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a configuration of ours with softmax attention in every layer or block."""
    config = copy.deepcopy(config)
    if hasattr(config, "softmax_layers"):
        config.softmax_layers = list(range(config.num_hidden_layers))
        return config
    for part in (config, getattr(config, "backbone_config", None)):
        if hasattr(part, "attention_kind"):
            part.attention_kind = "softmax"
    return config


def time_by_length(model: PreTrainedModel, lengths: Iterable[int]) -> list[SpeedFacts]:
    """Measure a text model on one document of each length in tokens, shortest first, each length once.

    A length is cut to the positions that the model has, and on a CPU to `LONGEST_TIMED_ON_CPU`.
    """
    config = model.config
    limits = [config.max_position_embeddings] if config.position_embedding_type == "absolute" else []
    limits += [LONGEST_TIMED_ON_CPU] if model.device.type == "cpu" else []
    generator = torch.Generator().manual_seed(0)
    speed = []
    for length in sorted({min([length, *limits]) for length in lengths}):
        tokens = torch.randint(config.vocab_size, (1, length), generator=generator).to(model.device)
        if type(model).__name__.endswith("ForMultipleChoice"):
            tokens = tokens[None]
        speed.append(measure_speed(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, length))
    return speed


def time_image(model: PreTrainedModel, image_size: int | tuple[int, int]) -> SpeedFacts:
    """Measure an image model on one image; `image_size` is its side, or (height, width), in pixels."""
    config = model.config
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixel_values = torch.rand((1, config.num_channels, *sides), generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixel_values.to(model.device, model.dtype)}
    if hasattr(config, "patch_shape"):
        num_tokens = math.prod(-(-side // patch) for side, patch in zip(sides, config.patch_shape, strict=True))
    else:  # of a detector: the places of its feature map
        with evaluating(model):
            num_tokens = model.base_model(**inputs).encoder_last_hidden_state.shape[1]
    return measure_speed(model, inputs, num_tokens)


def time_maps(model: PreTrainedModel, size: tuple[int, int], num_places: int) -> SpeedFacts:
    """Measure a network without patches on one image, or pair, of a (height, width) in pixels.

    Args:
        num_places: places of its largest map with an attention block, or a map where one may stand.
    """
    pixel_values = torch.rand((1, *image_shape(model), *size), generator=torch.Generator().manual_seed(0))
    return measure_speed(model, {"pixel_values": pixel_values.to(model.device, model.dtype)}, num_places)


def describe_hardware(device: torch.device) -> str:
    """Return the GPU's name, or threads and cores of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads, cores = counted(torch.get_num_threads(), "thread"), counted(os.cpu_count() or 1, "CPU core")
    return f"{threads} on {platform.machine()} with {cores}"
