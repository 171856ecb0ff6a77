"""Attention transfer: the mixers of a converted model learn what their softmax layers gave, all layers at once.

Every layer's mixer learns to reproduce its teacher layer's attention output, each from the teacher's own queries, keys
and values, so that no layer waits for those below; only the mixers train. As in LoLCATs (Zhang et al. 2024,
arXiv:2410.10254).

Student and teacher are models of this package with equal parameter names. The teacher has all layers in
`softmax_layers` and so computes what the stock model does (`conversion.teacher`). It is held outside the module tree:
neither trained, nor saved, nor moved with the student.

Shape letters: B batch, N tokens, C hidden width, L layers.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..evaluation import evaluating
from ..models.fa_mixer import FactorizedMixer, SoftmaxMixer


@dataclasses.dataclass
class DistillationOutput(ModelOutput):
    """`loss` is minimised; `layer_errors` [L] has one error per layer, NaN at softmax layers, without gradients."""

    loss: Tensor | None = None
    layer_errors: Tensor | None = None


def mixers(model: nn.Module) -> list[nn.Module]:
    """Return the token mixers of a model's layers, in order."""
    return [module for module in model.modules() if isinstance(module, (FactorizedMixer, SoftmaxMixer))]


def relative_error(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference over real tokens, divided by the target's variance over them: [B, N, C] twice -> [].

        mean (output - target)² / mean (target - mean over tokens of target)²

    1 is what the best constant vector reaches. Computed in float32.
    """
    output, target = output.float(), target.float()
    if mask is None:
        output, target = output.flatten(0, 1), target.flatten(0, 1)
    else:
        output, target = output[mask.bool()], target[mask.bool()]
    return (output - target).square().mean() / target.var(dim=0, correction=0).mean()


def projections(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers' output projections, which read what the mixers give, in order."""
    encoder = model.base_model.encoder
    if hasattr(encoder, "layer"):
        return [layer.attention["output"].dense for layer in encoder.layer]
    return [layer.self_attn.o_proj for layer in encoder.layers]


class AttentionTransfer(nn.Module):
    """Attention output of each layer: mean over layers of `relative_error` after the output projection.

    The student's mixers read the inputs of the teacher's mixers. Its other weights are frozen, the teacher's at
    the start.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        super().__init__()
        self.student = student.requires_grad_(False)
        for mixer in mixers(student):
            mixer.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise ValueError(
                "The student's mixers have nothing to train: set `key_feature_size`, `local_kernel_size`, "
                "`local_window` or `learned_temperatures` in its config, or leave attention transfer out."
            )
        self._teacher = (teacher,)

    def forward(self, **batch: Tensor) -> DistillationOutput:
        (teacher,) = self._teacher
        with torch.no_grad(), self.watching(batch.get("attention_mask")) as errors:
            teacher(**{name: value for name, value in batch.items() if name != "labels"})
        layer_errors = torch.stack(errors)
        return DistillationOutput(loss=layer_errors.nanmean(), layer_errors=layer_errors.detach())

    @contextlib.contextmanager
    def watching(self, mask: Tensor | None) -> Iterator[list[Tensor]]:
        """Yield a list that gets the error of each layer in turn while the teacher runs inside the block."""
        (teacher,) = self._teacher
        errors: list[Tensor] = []

        def hook_of(project: nn.Module, mixer: nn.Module) -> Callable:
            def hook(module: nn.Module, arguments: tuple, options: dict, target: Tensor) -> None:
                if isinstance(mixer, SoftmaxMixer):
                    errors.append(target.new_tensor(math.nan, dtype=torch.float32))
                    return
                with torch.enable_grad():
                    both = (mixer(*arguments, **options), target)
                    output, target = (project(mixed.transpose(1, 2).flatten(2)) for mixed in both)
                    # Of a detector the places are those of its feature map, which the layout knows, not the batch.
                    errors.append(relative_error(output, target, arguments[3].mask if mask is None else mask))

            return hook

        triples = zip(projections(teacher), mixers(teacher), mixers(self.student), strict=True)
        handles = [
            teacher_mixer.register_forward_hook(hook_of(project, mixer), with_kwargs=True)
            for project, teacher_mixer, mixer in triples
        ]
        try:
            yield errors
        finally:
            for handle in handles:
                handle.remove()


def evaluate_objective(module: nn.Module, loader: Iterable[Mapping[str, Tensor]], accelerator: Accelerator) -> dict:
    """Return the mean loss and the mean error of every layer over the batches of `loader`, on every process the same.

    The error of a softmax layer is None.
    """
    rows = []
    with evaluating(module):
        for batch in loader:
            output = module(**batch)
            rows.append([output.loss.item(), *output.layer_errors.tolist()])
    rows = accelerator.gather_for_metrics(rows, use_gather_object=True)
    means = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    return {"loss": means[0], "layer_errors": [None if math.isnan(error) else error for error in means[1:]]}
