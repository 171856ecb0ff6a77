"""The recovery of a detector: its encoder learns what its decoder, which stays as it is, reads and makes of it.

The teacher's backbone, decoder and heads are the student's own, so nothing but the encoder has changed, and only what
they read of it has to come back (Detector in Detector, arXiv:2608.22368: match the tensors that a frozen head reads).

Shape letters: B batch, N places of the feature map, C hidden width, Q queries, L classes.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..training.attention_transfer import DistillationOutput, relative_error
from .embeddings import encode_images
from .objectives import head_loss

BOX_WEIGHT = 5.0
"""Factor of the difference of boxes beside that of logits, as of the two costs in DETR's own loss."""


class DetectorDistillation(nn.Module):
    """The encoder's last state and the detections of the whole model, on unlabelled images.

        loss = relative_error(encoder's last state) + difference of the logits + 5 · difference of the boxes

    The first is over real places. Logits are compared by `head_loss`: KL over the classes and "no object" of DETR, or
    of each class's probability in Conditional DETR. The difference of the boxes is the mean absolute one, over queries
    by the teacher's probability that there is an object: others may point anywhere. Without a head on both, the first
    term is all. The encoder alone trains.

    Args:
        trains_all: train all other weights as well.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, *, trains_all: bool = False):
        super().__init__()
        self.student = student.requires_grad_(trains_all)
        student.base_model.encoder.requires_grad_(True)
        self._teacher = (teacher,)

    def train(self, mode: bool = True) -> Self:
        """Keep the student in evaluation mode: the teacher has no dropout, and noise would be learnt."""
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, **batch: Tensor) -> DistillationOutput:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            expected, mask = encode_images(self._teacher[0], inputs, output_hidden_states=True)
        found = self.student(**inputs, output_hidden_states=True)
        pairs = zip(found.encoder_hidden_states[1:], expected.encoder_hidden_states[1:], strict=True)
        layer_errors = torch.stack([relative_error(output, target, mask) for output, target in pairs])
        loss = layer_errors[-1]
        if getattr(expected, "logits", None) is not None:
            is_sigmoid = expected.logits.shape[-1] == self.student.config.num_labels
            problem_type = "multi_label_classification" if is_sigmoid else None
            loss = loss + head_loss(found.logits, expected.logits, None, problem_type)
            loss = loss + BOX_WEIGHT * box_difference(
                found.pred_boxes, expected.pred_boxes, expected.logits, is_sigmoid
            )
        return DistillationOutput(loss=loss, layer_errors=layer_errors.detach())


def box_difference(boxes: Tensor, expected: Tensor, logits: Tensor, is_sigmoid: bool) -> Tensor:
    """Return the mean absolute difference of boxes [B, Q, 4] in fractions of the image, by the teacher's certainty.

    Each query's part is the teacher's largest probability of a class, of its `logits` [B, Q, L], where "no object" is
    the last of L unless `is_sigmoid`.
    """
    probabilities = logits.float().sigmoid() if is_sigmoid else F.softmax(logits.float(), dim=-1)[..., :-1]
    certainty = probabilities.amax(dim=-1)
    differences = (boxes.float() - expected.float()).abs().mean(dim=-1)
    return (certainty * differences).sum() / certainty.sum()
