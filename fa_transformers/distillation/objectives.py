"""The objective of a recovery's second stage: what the whole student learns from the model that its weights came from.

`training.attention_transfer` is the first stage, in which only the mixers train. Of detectors
`detectors.DetectorDistillation` takes the place of this one.

Sources: hidden states and logits as in DistilBERT (Sanh et al. 2019, arXiv:1910.01108) and TinyBERT (Jiao et al. 2020,
arXiv:1909.10351).

Shape letters: B batch, N tokens, C hidden width, L layers.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.fa_mixer import SoftmaxMixer
from ..training.attention_transfer import DistillationOutput, relative_error
from .embeddings import Batch, encode_windows, pool


class EndToEndDistillation(nn.Module):
    """Hidden states, embedding and logits of the whole model.

        loss = mean over layers of relative_error(hidden states) + (1 - cosine(embeddings)) + difference of the logits

    Hidden states are compared after each layer, and once more as the encoder returns the last one. The embedding is the
    last state's mean over real tokens ("mean") or its first real token ("cls"). Logits count where both models have a
    head: over classes, over the vocabulary for each real token, or over the real tokens for the start and end of an
    answer; `head_loss` and `divergence` say how far they differ.
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
        # The loss reaches neither of these: processes that train together would wait for their gradients.
        base = student.base_model
        if base is student and base.pooler is not None:
            base.pooler.requires_grad_(False)
        if getattr(base.embeddings, "mask_token", None) is not None:
            base.embeddings.mask_token.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as `nn.Module.train` does, without dropout: the teacher has none, and noise would be learnt."""
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
        """Return the teacher's output for the batch; it reads long documents window by window."""
        (teacher,) = self._teacher
        ids = inputs.get("input_ids")
        if self.teacher_length is None or ids is None or ids.shape[1] <= self.teacher_length:
            return teacher(**inputs, output_hidden_states=True)
        return encode_windows(teacher.base_model, inputs, self.teacher_length, output_hidden_states=True)


def head_loss(logits: Tensor, expected: Tensor, mask: Tensor | None, problem_type: str | None) -> Tensor:
    """Return how far a head's logits are from the teacher's, by what the problem type means.

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

    Logits are over classes [B, L]; over classes for each token [B, N, L], where `mask` [B, N] leaves padding out; or,
    with `over_tokens`, over the tokens themselves [B, N], where padding gets no probability.
    """
    pair = [rows.float() for rows in (logits, expected)]
    if mask is not None and over_tokens:
        pair = [rows.masked_fill(~mask.bool(), torch.finfo(rows.dtype).min) for rows in pair]
    elif mask is not None and logits.ndim == 3:
        pair = [rows[mask.bool()] for rows in pair]
    found, wanted = (F.log_softmax(rows, dim=-1).flatten(0, -2) for rows in pair)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def _hidden_states(output: ModelOutput, encoder: nn.Module) -> tuple[Tensor, ...]:
    """Return the state after each layer and, where it differs, the last state as the encoder returns it."""
    last, states = getattr(output, "last_hidden_state", None), output.hidden_states[1:]
    norm = getattr(encoder, "layernorm", None)
    if last is None and norm is not None:  # the output of a head doesn't have it
        last = norm(states[-1])
    return states if last is None or last is states[-1] else (*states, last)
