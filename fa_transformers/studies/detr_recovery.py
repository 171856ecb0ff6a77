"""A softmax detector, the same with a factorized encoder, and that one recovered without labels: their AP.

The detector is transformers' own DETR or Conditional DETR, trained here on frames whose class stands elsewhere in the
picture (`shapes`): first its backbone, by what is seen at every place, then its encoder, by the class of every place,
then the whole with its own loss. The recovery is `distill(task="object-detection")` on the pictures alone.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    PreTrainedModel,
    ResNetBackbone,
    ResNetConfig,
)

from ..checks import check_positive
from ..conversion.convert import convert_checkpoint
from ..conversion.student_fields import STUDENT_FIELDS
from ..distillation.detectors import DetectorDistillation
from ..distillation.distill import distill
from ..evaluation import evaluating
from ..files import write_json
from ..metrics.detection import Detections, detection_scores
from ..options import DataOptions, DistillationOptions, LoopOptions, ModelOptions, OptionGroup, option
from ..training.attention_transfer import AttentionTransfer, relative_error
from .shapes import (
    CLASS_NAMES,
    NUM_APPEARANCES,
    SIDE_PX,
    ShapePicture,
    appearance_map,
    class_map,
    detr_labels,
    draw_pictures,
)

STRIDE = 8
BATCH = 16
CLIP_NORM = 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DETECTORS: dict[str, tuple[str, Any, Any, Any]] = {
    "conditional_detr": (
        "Conditional DETR", ConditionalDetrConfig, ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
    ),
    "detr": ("DETR", DetrConfig, DetrForObjectDetection, DetrImageProcessor),
}  # fmt: skip
"""Name, configuration, model and image processor of the detectors, by model type."""
TRAINING_FIELDS = ("detector", "num_train", "backbone_steps", "encoder_steps", "steps", "learning_rate", "seed")
"""Fields of `DetectorPlan` that the softmax detector depends on."""


@dataclass(frozen=True)
class DetectorPlan(OptionGroup):
    """The steps of the study, all of `BATCH` pictures."""

    detector: Literal["conditional_detr", "detr"] = option(
        "conditional_detr", "which of transformers' detectors", group="run"
    )
    num_train: int = option(3000, "pictures to train on; the recovery reads them without labels", group="study")
    num_test: int = option(300, "pictures that all rows are scored on", group="study")
    backbone_steps: int = option(200, "steps of the backbone alone, by what is seen at every place", group="study")
    encoder_steps: int = option(
        2000, "steps of the encoder on it, by the class of every place", group="study", common=True
    )
    steps: int = option(2500, "steps of the softmax detector", group="study", common=True)
    transfer_steps: int = option(100, "steps of attention transfer", group="study", common=True)
    end_to_end_steps: int = option(300, "steps of the recovery's second stage", group="study", common=True)
    learning_rate: float = option(
        1e-3, "peak rate of the softmax detector; its backbone's is a third of it", group="study"
    )
    seed: int = option(0, "seed of pictures, weights and order", group="run")
    output_dir: Path = option(
        Path("outputs/detr_recovery"),
        "folder for a folder of every detector and seed; a softmax detector that is there already is taken",
        group="study",
        common=True,
    )

    @property
    def settings(self) -> dict[str, str]:
        """All of it but the folder, for a result to tell what it is of."""
        return {name: str(value) for name, value in vars(self).items() if name != "output_dir"}

    @property
    def folder(self) -> Path:
        """Folder of this detector and seed."""
        return self.output_dir / f"{self.detector}_{self.seed}"

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a number that is not above zero."""
        steps = [part.name for part in fields(self) if part.name.endswith("steps")]
        check_positive(self, "num_train", "num_test", *steps, "learning_rate")

    def pictures(self, split: Literal["train", "test"]) -> list[ShapePicture]:
        """Draw the pictures of a split."""
        is_test = split == "test"
        return draw_pictures(self.num_test if is_test else self.num_train, 2 * self.seed + is_test)


def as_pixel_values(pictures: Sequence[ShapePicture]) -> Tensor:
    """Return the pictures as `ConditionalDetrImageProcessor` gives them, float32 [B, 3, SIDE_PX, SIDE_PX]."""
    pixels = torch.stack([torch.from_numpy(picture.pixels) for picture in pictures]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def build_detector(kind: str) -> PreTrainedModel:
    """Build a small softmax detector of 0.3 M weights, whose encoder sees a map at a stride of `STRIDE` pixels."""
    _, config_class, model_class, _ = DETECTORS[kind]
    config = config_class(
        backbone_config=backbone_config(), d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_queries=8, dropout=0.0, init_std=0.125,
        auxiliary_loss=True, id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: index for index, name in enumerate(CLASS_NAMES)},
    )  # fmt: skip
    model = model_class(config)
    # As in DETR's own code: queries that start alike take long to part.
    nn.init.normal_(model.model.query_position_embeddings.weight)
    return model


def backbone_config() -> ResNetConfig:
    """Return the configuration of its backbone."""
    return ResNetConfig(
        embedding_size=16, hidden_sizes=[24, 48], depths=[1, 2], layer_type="basic", out_features=["stage2"]
    )


def train_detector(plan: DetectorPlan, folder: Path) -> None:
    """Train the softmax detector and save it with its image processor, as any stock checkpoint."""
    torch.manual_seed(plan.seed)
    pictures = plan.pictures("train")
    pixel_values = as_pixel_values(pictures)
    backbone = _train_backbone(plan, ResNetBackbone(backbone_config()), pixel_values, pictures)
    model = build_detector(plan.detector).train()
    # Its batch norms are frozen copies there; all other weights learn on.
    model.model.backbone.model.load_state_dict(backbone.state_dict(), strict=False)
    model.model.unfreeze_backbone()
    classes = torch.stack([class_map(picture, STRIDE) for picture in pictures]).flatten(1)
    head = nn.Linear(model.config.d_model, len(CLASS_NAMES))
    _train_encoder(plan, model, head, pixel_values, classes)
    _train_detection(plan, model, head, pixel_values, classes, pictures)
    model.save_pretrained(folder)
    DETECTORS[plan.detector][3](do_resize=False, do_pad=False).save_pretrained(folder)


def _train_encoder(
    plan: DetectorPlan, model: PreTrainedModel, head: nn.Module, pixel_values: Tensor, classes: Tensor
) -> None:
    """Teach the encoder to look up the class of the frame over every place, which a loss of boxes alone finds late.

    The backbone rests meanwhile, so that its maps are made once.
    """
    detector = model.model
    with torch.no_grad():
        maps = torch.cat([detector.backbone.model(part).feature_maps[0] for part in pixel_values.split(100)])
    everywhere = torch.ones(BATCH, *maps.shape[2:], dtype=torch.bool)
    shape = torch.Size((BATCH, *maps.shape[1:]))
    positions = detector.position_embedding(shape=shape, device="cpu", dtype=maps.dtype, mask=everywhere)
    positions = positions.flatten(2).transpose(1, 2)
    weights = [weight for part in (detector.input_projection, detector.encoder, head) for weight in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=plan.learning_rate, weight_decay=1e-4)
    for step, rows in _steps(optimizer, plan.encoder_steps, len(maps), plan.seed + 1):
        projected = detector.input_projection(maps[rows]).flatten(2).transpose(1, 2)
        encoded = detector.encoder(
            inputs_embeds=projected, attention_mask=everywhere.flatten(1), spatial_position_embeddings=positions
        ).last_hidden_state
        loss = F.cross_entropy(head(encoded).flatten(0, 1), classes[rows].flatten())
        _update(optimizer, loss, model)
        _print_loss("encoder", step, loss)


def _train_detection(
    plan: DetectorPlan,
    model: PreTrainedModel,
    head: nn.Module,
    pixel_values: Tensor,
    classes: Tensor,
    pictures: Sequence[ShapePicture],
) -> None:
    """Train a detector by its own loss, its backbone at a third of the rate.

    The encoder's own loss goes on beside it: without it the look-up was lost before the decoder had found the frames.
    """
    groups = [
        {"params": [weight for name, weight in model.named_parameters() if ("backbone" in name) == is_backbone]}
        | {"lr": plan.learning_rate * (1 / 3 if is_backbone else 1)}
        for is_backbone in (False, True)
    ]
    labels = [detr_labels(picture) for picture in pictures]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    for step, rows in _steps(optimizer, plan.steps, len(pictures), plan.seed + 2):
        output = model(pixel_values=pixel_values[rows], labels=[labels[row] for row in rows.tolist()])
        looked_up = head(output.encoder_last_hidden_state)
        loss = output.loss + F.cross_entropy(looked_up.flatten(0, 1), classes[rows].flatten())
        _update(optimizer, loss, model)
        _print_loss("detector", step, loss)


def _train_backbone(
    plan: DetectorPlan, backbone: ResNetBackbone, pixel_values: Tensor, pictures: Sequence[ShapePicture]
) -> ResNetBackbone:
    """Teach a backbone what is seen at every place, as detectors start from networks that know images."""
    head = nn.Conv2d(backbone.channels[-1], NUM_APPEARANCES + 1, kernel_size=1)
    maps = torch.stack([appearance_map(picture, STRIDE) for picture in pictures])
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=2e-3, weight_decay=1e-4)
    for step, rows in _steps(optimizer, plan.backbone_steps, len(pictures), plan.seed):
        loss = F.cross_entropy(head(backbone(pixel_values[rows]).feature_maps[0]), maps[rows])
        _update(optimizer, loss, backbone)
        _print_loss("backbone", step, loss)
    return backbone


def _steps(optimizer: torch.optim.Optimizer, steps: int, num_rows: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each step's number from 1 on and its rows, after setting the rates: 50 steps up, then a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(1, steps + 1):
        factor = min(1.0, step / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = factor * peak
        yield step, torch.randint(num_rows, (BATCH,), generator=generator)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, module: nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
    optimizer.step()


def _print_loss(part: str, step: int, loss: Tensor) -> None:
    if step % 100 == 0:
        print(f"{part}, step {step}: loss {loss.item():.3f}", flush=True)


def score_detector(model: PreTrainedModel, pictures: Sequence[ShapePicture]) -> dict[str, float]:
    """Return COCO's `box_ap`, `box_ap50` and `box_ap75` of a DETR or Conditional DETR on pictures, from 0 to 1."""
    found = []
    names = list(model.config.id2label.values())
    with evaluating(model):
        for start in range(0, len(pictures), 50):
            batch = pictures[start : start + 50]
            output = model(as_pixel_values(batch))
            # DETR has a last class, "no object"; Conditional DETR has a probability of each class.
            has_none = output.logits.shape[-1] == len(names) + 1
            shares = output.logits.softmax(dim=-1)[..., :-1] if has_none else output.logits.sigmoid()
            scores, labels = shares.max(dim=-1)
            centres, sides = output.pred_boxes.split(2, dim=-1)
            boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1) * SIDE_PX
            rows = zip(batch, scores.numpy(), labels.numpy(), boxes.numpy(), strict=True)
            found += [Detections(picture.image_id, *values) for picture, *values in rows]
    scored = detection_scores(found, pictures, names)
    return {name: scored[name] for name in ("box_ap", "box_ap50", "box_ap75")}


def encoder_error(model: PreTrainedModel, teacher: PreTrainedModel, pictures: Sequence[ShapePicture]) -> float:
    """Return the `relative_error` of the encoder's last state beside the teacher's, over all places of the pictures."""
    pixel_values = as_pixel_values(pictures)
    states = []
    for one in (model, teacher):
        with evaluating(one):
            states.append(one(pixel_values).encoder_last_hidden_state)
    return relative_error(states[0], states[1], None).item()


def write_pictures(pictures: Sequence[ShapePicture], folder: Path) -> None:
    """Write the pictures as PNG files, without labels, for a recovery to read."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.fromarray(picture.pixels).save(folder / f"{picture.image_id:05}.png")


def run_study(plan: DetectorPlan) -> dict[str, Any]:
    """Train a softmax detector, exchange its encoder's attention, recover it, and score each on the same pictures.

    Returns:
        "rows": the detector, the seed, the state of its encoder, its AP, `encoder_error` and CPU seconds of training;
        "plan": what was asked for.
    """
    stock = plan.folder / "softmax"
    test = plan.pictures("test")
    rows: list[dict[str, Any]] = []

    def add(state: str, model: PreTrainedModel, seconds: float) -> None:
        row = {"detector": DETECTORS[plan.detector][0], "seed": plan.seed, "state": state}
        row |= score_detector(model, test)
        rows.append(row | {"encoder_error": encoder_error(model, softmax, test), "cpu_seconds": round(seconds, 1)})
        print(rows[-1], flush=True)

    seconds = _train_once(plan, stock)
    softmax = DETECTORS[plan.detector][2].from_pretrained(stock)
    add("softmax, as trained", softmax, seconds)
    add("factorized encoder, untrained", convert_checkpoint(stock).model, 0.0)
    for state, recover in (
        ("after distill.py, its encoder trained", _recover),
        ("after the same steps, all weights trained", _recover_all_weights),
    ):
        started = time.process_time()
        model = recover(plan, stock)
        add(state, model, time.process_time() - started)
    return {"rows": rows, "plan": plan.settings}


def _train_once(plan: DetectorPlan, folder: Path) -> float:
    """Train the softmax detector unless an earlier run with the same settings did; return the CPU seconds."""
    receipt = folder.with_suffix(".json")
    settings = {name: plan.settings[name] for name in TRAINING_FIELDS}
    earlier = json.loads(receipt.read_text(encoding="utf-8")) if receipt.is_file() else {}
    if earlier.get("plan") != settings:
        started = time.process_time()
        train_detector(plan, folder)
        earlier = {"plan": settings, "cpu_seconds": time.process_time() - started}
        write_json(receipt, earlier)  # last: an interrupted run leaves none
    return earlier["cpu_seconds"]


def _recover(plan: DetectorPlan, stock: Path) -> PreTrainedModel:
    """The softmax detector's student after `distill`, on pictures without labels."""
    photos = plan.folder / "pictures"
    write_pictures(plan.pictures("train"), photos)
    result = distill(
        task="object-detection",
        data=DataOptions(image_folder=photos),
        model=ModelOptions(model_name_or_path=str(stock)),
        loop=LoopOptions(
            per_device_train_batch_size=BATCH, use_cpu=True, num_threads=1, mixed_precision="no", report_to="none",
            seed=plan.seed, output_dir=plan.folder / "distilled", overwrite_output_dir=True,
        ),
        distillation=DistillationOptions(
            transfer_steps=plan.transfer_steps, end_to_end_steps=plan.end_to_end_steps
        ),
    )  # fmt: skip
    return result.model


def _recover_all_weights(plan: DetectorPlan, stock: Path) -> PreTrainedModel:
    """The student after the same two stages at the same rates, where the second one trains decoder and backbone too."""
    torch.manual_seed(plan.seed)
    teacher = convert_checkpoint(stock, softmax_layers=list(range(2))).model.eval().requires_grad_(False)
    width = teacher.config.hidden_size // teacher.config.num_attention_heads
    fields = STUDENT_FIELDS["object-detection"] | {"key_feature_size": 2 * width}
    student = convert_checkpoint(stock, **fields).model
    pixel_values = as_pixel_values(plan.pictures("train"))
    pixel_mask = torch.ones(BATCH, SIDE_PX, SIDE_PX, dtype=torch.long)
    stages = (
        (lambda: AttentionTransfer(student, teacher), plan.transfer_steps, 1e-2),
        (lambda: DetectorDistillation(student, teacher, trains_all=True), plan.end_to_end_steps, 1e-3),
    )
    for build, steps, mixer_rate in stages:
        objective = build().train()
        trained = {name: weight for name, weight in objective.named_parameters() if weight.requires_grad}
        groups = [
            {"params": [weight for name, weight in trained.items() if (".mixer." in name) == is_mixer], "lr": rate}
            for is_mixer, rate in ((True, mixer_rate), (False, 1e-4))
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        for _, rows in _steps(optimizer, steps, len(pixel_values), plan.seed):
            _update(optimizer, objective(pixel_values=pixel_values[rows], pixel_mask=pixel_mask).loss, objective)
    return student
