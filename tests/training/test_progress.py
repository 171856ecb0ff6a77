"""Protects the figures of a run: operations against PyTorch's counter, the split of a step, the profiler's trace."""

import json

import pytest
import torch
import train_in_processes as worker
from accelerate import Accelerator
from tiny_models import build, image_inputs, text_inputs
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.utils.flop_counter import FlopCounterMode

from fa_transformers.models import (
    FABertConfig,
    FABertForMaskedLM,
    FABertForSequenceClassification,
    FAViTConfig,
    FAViTForImageClassification,
)
from fa_transformers.models.fa_attention_blocked import NAMESPACE
from fa_transformers.training import progress
from fa_transformers.training.flops import peak_flops, training_flops_per_token
from fa_transformers.training.progress import STEP_PARTS, communication_us

LENGTH = 40


@pytest.mark.parametrize(
    ("config_class", "model_class", "fields"),
    [
        (FABertConfig, FABertForSequenceClassification, {}),
        (FABertConfig, FABertForMaskedLM, {"key_feature_size": 37}),
        (FABertConfig, FABertForSequenceClassification, {"softmax_layers": [0, 1]}),
        (FAViTConfig, FAViTForImageClassification, {"classifier_pooling": "mean"}),
    ],
    ids=["factorized", "features and decoder", "softmax", "image"],
)
def test_operations_are_those_that_pytorch_counts_in_products(config_class, model_class, fields, monkeypatch):
    model = build(config_class, model_class, **fields)
    # The counter knows plain products only, so the operator runs as the reference, and softmax layers unfused.
    monkeypatch.setattr("fa_transformers.models.fa_attention._choose", lambda *_: "reference")
    model.set_attn_implementation("eager")
    is_text = config_class is FABertConfig
    inputs = text_inputs("AutoModel", (LENGTH,)) if is_text else image_inputs(32, 32, batch=1)
    num_tokens = LENGTH if is_text else (32 // 8) ** 2 + 1
    with FlopCounterMode(display=False) as counter:
        model(**inputs).logits.square().sum().backward()
    fixed, by_length = training_flops_per_token(model)
    ours = num_tokens * (fixed + by_length * num_tokens)
    # Left out: pooler and classifier of one token a document. Counted but not done: the gradient of the patches, and
    # for the class token the patch projection.
    print(f"{ours / counter.get_total_flops():.4f}")
    assert training_flops_per_token(torch.nn.Linear(2, 2)) is None
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.03 if is_text else 0.15)


def test_peaks_are_found_by_the_names_that_devices_have():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("Tesla T4") is None


def test_a_run_tells_where_its_time_went_and_its_trace_names_the_operator(tmp_path):
    _, figures = worker.train(torch.float32, accumulation=2, profile=True, output_dir=tmp_path)
    shares = figures["step_shares"]
    assert list(shares) == list(STEP_PARTS) and all(0 < share < 1 for share in shares.values())
    # What is left is the counting and the display.
    assert 0.5 < sum(shares.values()) <= 1
    assert 0.1 < figures["peak_memory_gib"] < 64 and figures["model_tflops_per_second"] > 0
    assert figures["mfu"] is None and "communication_ms_per_step" not in figures
    trace = json.loads((tmp_path / "profile/rank-0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"{NAMESPACE}::forward", f"{NAMESPACE}::backward"} <= names
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank-0.json"]


def test_a_run_too_short_for_a_trace_ends_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "STEPS", 2)
    _, figures = worker.train(torch.float32, accumulation=2, profile=True, output_dir=tmp_path)
    assert figures["step_shares"] and not (tmp_path / "profile").exists()


def test_communication_on_a_gpu_is_counted_once():
    def event(name, device, microseconds, is_user_annotation=False):
        return FunctionEvent(0, name, 0, 0, microseconds, device_type=device, is_user_annotation=is_user_annotation)

    same = [
        event("nccl:all_reduce", DeviceType.CPU, 5),
        event("nccl:all_reduce", DeviceType.CUDA, 7, is_user_annotation=True),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", DeviceType.CUDA, 7),
    ]
    assert communication_us(same) == 7
    assert communication_us([event("gloo:all_reduce", DeviceType.CPU, 3), event("aten::mm", DeviceType.CPU, 9)]) == 3


def test_memory_is_told_as_an_upper_end_where_few_parameters_train():
    model = build(FABertConfig, FABertForSequenceClassification)
    told = [progress.describe_memory(model.config, (2, 8), Accelerator(cpu=True), trained=model)]
    for frozen in (model.classifier, model.bert):
        frozen.requires_grad_(False)
        told.append(progress.describe_memory(model.config, (2, 8), Accelerator(cpu=True), trained=model))
    assert ["counted as if all parameters trained, which is an upper end" in one for one in told] == [
        False,
        False,
        True,
    ]
