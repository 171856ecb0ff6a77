"""Recovery of a converted model: the factorized student learns from the softmax model that its weights came from.

Two objectives, each a module whose `forward(**batch).loss` the training loop minimises:

`AttentionTransfer`     every layer's mixer learns to reproduce its teacher layer's attention output, all layers at
                        once, each from the teacher's own queries, keys and values; only the mixers train.
`EndToEndDistillation`  the student reads the batch on its own and learns the teacher's hidden states, its embedding
                        and, where both have a head, its logits; all weights train.

Sources: attention transfer as in LoLCATs (Zhang et al. 2024, arXiv:2410.10254), hidden states and logits as in
DistilBERT (Sanh et al. 2019, arXiv:1910.01108) and TinyBERT (Jiao et al. 2020, arXiv:1909.10351).

Teacher and student are models of this package with equal parameter names, the teacher with all layers in
`softmax_layers`, which computes what the stock model does (`load_teacher`). The teacher is no sub-module: it is neither
trained, nor saved, nor moved with the student.

Shape letters: B batch, N tokens, C hidden width, L layers.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..conversion.convert import Conversion, convert_checkpoint
from ..conversion.source import read_source
from ..conversion.stock_checkpoints import translate_fields
from ..models.configuration_fa import FactorizedConfig
from ..models.fa_mixer import FactorizedMixer, SoftmaxMixer
from ..models.modeling_fa import first_real_token, mean_over_real

Batch = Mapping[str, Tensor]


@dataclasses.dataclass
class DistillationOutput(ModelOutput):
    """`loss` is what is minimised; `layer_errors` [L] one error per layer, NaN at softmax layers, without gradients."""

    loss: Tensor | None = None
    layer_errors: Tensor | None = None


def load_teacher(model_name_or_path: str, auto_class: str, student: PreTrainedModel) -> PreTrainedModel:
    """The softmax model that `student` came from, in evaluation mode and frozen.

    Longformer and LSG teachers attend to everything here, not as they did.

    Raises:
        ValueError: it is a factorized model, or has another architecture, other widths or another number of layers than
            the student, or not its head.
    """
    stock = read_source(model_name_or_path).config
    if isinstance(stock, FactorizedConfig):
        raise ValueError(
            f"The teacher {model_name_or_path!r} is a factorized model; give the softmax checkpoint that the student "
            "was converted from (--teacher_name_or_path)."
        )
    fields = translate_fields(stock.to_dict(), stock.model_type)
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        found, wanted = fields.get(name), getattr(student.config, name, None)
        if found != wanted:
            raise ValueError(
                f"The teacher {model_name_or_path!r} has {name} {found}, the student {wanted}; the teacher must be the "
                "checkpoint that the student was converted from, or one of the same shape."
            )
    # It keeps its own positions: the student's table may be longer, or absent.
    layers = list(range(fields["num_hidden_layers"]))
    conversion = convert_checkpoint(model_name_or_path, auto_class=auto_class, softmax_layers=layers)
    if fresh := fresh_head(conversion):
        raise ValueError(
            f"The teacher {model_name_or_path!r} has no {fresh[0]}, which the student's head needs: convert it again "
            'with auto_class="AutoModel", and distil the encoder.'
        )
    return conversion.model.float().eval().requires_grad_(False)


def fresh_head(conversion: Conversion) -> list[str]:
    """The weights of a converted model's head that its checkpoint did not have."""
    model = conversion.model
    if model.base_model is model:
        return []
    new = [change.result for change in conversion.report if change.action == "new" and change.result]
    return [name for name in new if not name.startswith(f"{model.base_model_prefix}.")]


def mixers(model: nn.Module) -> list[nn.Module]:
    """The token mixers of a model's layers, in order."""
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


class AttentionTransfer(nn.Module):
    """Attention output of each layer: mean over layers of `relative_error` after the output projection.

    The student's mixers get what the teacher's got; its other weights, equal to the teacher's at the start, are frozen.
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
        """While the teacher runs inside the block, a list that gets the error of each layer in turn."""
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
                    errors.append(relative_error(output, target, mask))

            return hook

        triples = zip(teacher.base_model.encoder.layer, mixers(teacher), mixers(self.student), strict=True)
        handles = [
            teacher_mixer.register_forward_hook(hook_of(layer.attention["output"].dense, mixer), with_kwargs=True)
            for layer, teacher_mixer, mixer in triples
        ]
        try:
            yield errors
        finally:
            for handle in handles:
                handle.remove()


class EndToEndDistillation(nn.Module):
    """Hidden states, embedding and logits of the whole model.

        loss = mean over layers of relative_error(hidden states) + (1 - cosine(embeddings)) + difference of the logits

    The hidden states are those after each layer and the last one as the encoder returns it; the embedding is the last
    one's mean over real tokens ("mean") or its first real token ("cls"); the logits are those of the models' head, if
    they have one: over classes, over the vocabulary for each real token, or over the real tokens for the start and end
    of an answer. They differ by `divergence`, or as `head_loss` has it.
    With `teacher_length`, longer documents reach the teacher in windows of so many tokens, whose hidden states the
    student learns while it reads the document whole; a head is left as it is then.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, pooling: str, teacher_length: int | None = None
    ):
        super().__init__()
        if teacher_length is not None:  # the teacher's windows have no logits of the whole text
            student, teacher = student.base_model, teacher.base_model
        self.student = student
        self.pooling, self.teacher_length = pooling, teacher_length
        self._teacher = (teacher,)
        # What the loss does not reach: processes that train together would wait for its gradients.
        base = student.base_model
        if base is student and base.pooler is not None:
            base.pooler.requires_grad_(False)
        if getattr(base.embeddings, "mask_token", None) is not None:
            base.embeddings.mask_token.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but without dropout: the teacher has none, so its noise would be learnt against."""
        super().train(mode)
        for module in self.student.modules():
            if isinstance(module, (nn.Dropout, SoftmaxMixer)):
                module.eval()
        return self

    def forward(self, **batch: Tensor) -> DistillationOutput:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        mask = inputs.get("attention_mask")
        with torch.no_grad():
            expected = self.ask_teacher(inputs)
        found = self.student(**inputs, output_hidden_states=True)
        states = (
            _hidden_states(output, model.base_model)
            for output, model in ((found, self.student), (expected, self._teacher[0]))
        )
        pairs = list(zip(*states, strict=True))
        layer_errors = torch.stack([relative_error(output, target, mask) for output, target in pairs])
        output, target = (pool(tensor, mask, self.pooling).float() for tensor in pairs[-1])
        loss = layer_errors.mean() + 1.0 - F.cosine_similarity(output, target).mean()
        if getattr(expected, "logits", None) is not None:
            loss = loss + head_loss(found.logits, expected.logits, mask, self.student.config.problem_type)
        for name in ("start_logits", "end_logits"):
            if getattr(expected, name, None) is not None:
                loss = loss + divergence(getattr(found, name), getattr(expected, name), mask, over_tokens=True)
        return DistillationOutput(loss=loss, layer_errors=layer_errors.detach())

    def ask_teacher(self, inputs: Batch) -> ModelOutput:
        """What the teacher makes of the batch, of long documents window by window."""
        (teacher,) = self._teacher
        ids = inputs.get("input_ids")
        if self.teacher_length is None or ids is None or ids.shape[1] <= self.teacher_length:
            return teacher(**inputs, output_hidden_states=True)
        return encode_windows(teacher.base_model, inputs, self.teacher_length, output_hidden_states=True)


def head_loss(logits: Tensor, expected: Tensor, mask: Tensor | None, problem_type: str | None) -> Tensor:
    """How far a head's logits are from the teacher's, as its problem means them.

    Numbers ("regression", or one logit): mean squared difference, in the square of the labels' unit. Labels that don't
    exclude each other ("multi_label_classification"): KL of sigmoid(expected) and sigmoid(found), mean over labels.
    Classes: `divergence`.
    """
    if problem_type == "regression" or logits.shape[-1] == 1:
        return F.mse_loss(logits.float(), expected.float())
    if problem_type == "multi_label_classification":
        # "No" and "yes" of each label are two classes: softmax of (0, x) is (sigmoid(-x), sigmoid(x)).
        found, wanted = (torch.stack([torch.zeros_like(rows), rows], dim=-1) for rows in (logits, expected))
        return divergence(found, wanted, None, over_tokens=False)
    return divergence(logits, expected, mask, over_tokens=False)


def divergence(logits: Tensor, expected: Tensor, mask: Tensor | None, *, over_tokens: bool) -> Tensor:
    """KL(expected ‖ found) of the distributions over the last axis, mean over all others, in nats.

    Logits of classes [B, L], of classes for each token [B, N, L], of which `mask` [B, N] leaves padding out, or of the
    tokens themselves [B, N] (`over_tokens`), among which it has no share.
    """
    pair = [rows.float() for rows in (logits, expected)]
    if mask is not None and over_tokens:
        pair = [rows.masked_fill(~mask.bool(), torch.finfo(rows.dtype).min) for rows in pair]
    elif mask is not None and logits.ndim == 3:
        pair = [rows[mask.bool()] for rows in pair]
    found, wanted = (F.log_softmax(rows, dim=-1).flatten(0, -2) for rows in pair)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def encode_windows(encoder: nn.Module, inputs: Batch, window: int, **options: bool) -> ModelOutput:
    """The hidden states of texts [B, N, C], read in windows of `window` tokens that don't see each other.

    `hidden_states` are those of all layers with `output_hidden_states=True`, else the last one alone.
    """
    batch, length = inputs["input_ids"].shape
    windows = {name: _cut(tensor, window) for name, tensor in inputs.items()}
    if "attention_mask" not in windows:
        windows["attention_mask"] = _cut(torch.ones_like(inputs["input_ids"]), window)
    encoded = encoder(**windows, **options)
    states = tuple(
        tensor.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]
        for tensor in encoded.hidden_states or (encoded.last_hidden_state,)
    )
    return ModelOutput(last_hidden_state=states[-1], hidden_states=states)


def _cut(tensor: Tensor, window: int) -> Tensor:
    """Rows cut into windows, the last one filled up with zeros: [B, N] -> [B · ceil(N / window), window]."""
    return F.pad(tensor, (0, -tensor.shape[1] % window)).unflatten(1, (-1, window)).flatten(0, 1)


def _hidden_states(output: ModelOutput, encoder: nn.Module) -> tuple[Tensor, ...]:
    """The state after each layer and, where it is another one, the last state as the encoder returns it."""
    last, states = getattr(output, "last_hidden_state", None), output.hidden_states[1:]
    norm = getattr(encoder, "layernorm", None)
    if last is None and norm is not None:  # the output of a head doesn't have it
        last = norm(states[-1])
    return states if last is None or last is states[-1] else (*states, last)


def pool(hidden_states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One vector per sample, by "mean" or "cls": [B, N, C] -> [B, C]."""
    mask = None if mask is None else mask.bool()
    return mean_over_real(hidden_states, mask) if pooling == "mean" else first_real_token(hidden_states, mask)


def group_student_parameters(
    module: nn.Module, learning_rate: float, mixer_learning_rate: float, weight_decay: float
) -> list[dict]:
    """AdamW parameter groups: old weights and mixers apart, with and without decay; frozen ones are left out."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((".mixer." in name, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": mixer_learning_rate if is_mixer else learning_rate,
            # Mixers hold departures from the plain operator: decay would pull them back to it.
            "weight_decay": weight_decay if decays and not is_mixer else 0.0,
        }
        for (is_mixer, decays), parameters in groups.items()
    ]


@torch.no_grad()
def evaluate_objective(module: nn.Module, loader: Iterable[Batch], accelerator: Accelerator) -> dict:
    """Mean loss and mean error of every layer over the batches of `loader`, on every process the same."""
    was_training = module.training
    module.eval()
    rows = []
    for batch in loader:
        output = module(**batch)
        rows.append([output.loss.item(), *output.layer_errors.tolist()])
    module.train(was_training)
    rows = accelerator.gather_for_metrics(rows, use_gather_object=True)
    means = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    return {"loss": means[0], "layer_errors": [None if math.isnan(error) else error for error in means[1:]]}


@torch.inference_mode()
def embed_batches(
    model: nn.Module,
    loader: Iterable[Batch],
    accelerator: Accelerator,
    pooling: str,
    window: int | None = None,
) -> Tensor:
    """The embeddings of all samples of `loader`, in its order, on every process the same: float32 [samples, C].

    With `window`, texts longer than so many tokens are read in windows, and pooled over all of them.
    """
    was_training = model.training
    model.eval()
    rows: list[Tensor] = []
    for batch in loader:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        encoder = getattr(accelerator.unwrap_model(model), "base_model", model)
        if window is not None and "input_ids" in inputs and inputs["input_ids"].shape[1] > window:
            hidden_states = encode_windows(encoder, inputs, window).last_hidden_state
        else:
            hidden_states = encoder(**inputs).last_hidden_state
        pooled = pool(hidden_states, inputs.get("attention_mask"), pooling).float().cpu()
        rows += accelerator.gather_for_metrics(list(pooled), use_gather_object=True)
    model.train(was_training)
    return torch.stack(rows)


def similarity(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """How alike the embeddings of the same samples are: [samples, C] twice.

    `cosine` is the mean cosine of student and teacher, `cosine_p5` its 5th percentile, and `correlation` that of the
    cosines of all pairs of samples among the student's embeddings with those among the teacher's (Pearson).
    """
    cosines = F.cosine_similarity(student, teacher)
    above = torch.triu_indices(len(student), len(student), offset=1)
    pairs = [(F.normalize(rows) @ F.normalize(rows).T)[above[0], above[1]] for rows in (student, teacher)]
    return {
        "cosine": cosines.mean().item(),
        "cosine_p5": cosines.quantile(0.05).item(),
        "correlation": torch.corrcoef(torch.stack(pairs))[0, 1].item(),
        "num_samples": len(student),
    }
