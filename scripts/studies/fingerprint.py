"""Print SHA-256 sums of outputs, gradients and a 20-step training run, to hold one commit against another.

python scripts/studies/fingerprint.py > after.json    # the same at the other commit, then: diff before.json after.json

A refactoring must leave every sum as it was: the encoders with every head under several options, packed,
in chunks and in training, the operator's block, and `scripts/finetune.py` on generated documents. One thread, seed 0.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import fa_transformers
from fa_transformers.models import ENCODERS

ROOT = Path(__file__).parents[2] if Path(__file__).parent.name == "studies" else Path.cwd()
SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=64, hidden_dropout_prob=0.1, image_size=32, patch_size=8, encoder_stride=8,
)  # fmt: skip
OPTIONS = {
    "plain": {},
    "scaling": dict(attention_normalization="scaling", key_feature_size=20, position_embedding_type="none"),
    "all": dict(
        learned_temperatures=True, key_feature_size=37, local_kernel_size=5, local_window=2, softmax_layers=[1],
        position_embedding_type="periodic", classifier_pooling="mean",
    ),
}  # fmt: skip


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def build(config_class, model_class, options: dict):
    """Build a tiny model in evaluation mode with every parameter drawn."""
    default = config_class()
    config = config_class(**{name: value for name, value in (SIZES | options).items() if hasattr(default, name)})
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def make_inputs(model, auto_class: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 40, 19, generator=generator)}
        if auto_class == "AutoModelForMaskedImageModeling":
            inputs["bool_masked_pos"] = torch.arange(2 * 15).view(2, -1) % 3 == 0
        return inputs
    shape = (2, 3, 11) if auto_class == "AutoModelForMultipleChoice" else (2, 11)
    mask = (torch.arange(11) < torch.tensor([11, 7]).view(2, *(1 for _ in shape[2:]), 1)).expand(shape).long()
    return {"input_ids": torch.randint(1, 60, shape, generator=generator) * mask, "attention_mask": mask}


def tensors_of(output) -> dict[str, Tensor]:
    """Return the tensors of a model's output by name, a backbone's maps with their number."""
    tensors = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    return tensors | {f"map {number}": value for number, value in enumerate(output.get("feature_maps") or ())}


def total_of(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.float().pow(2).mean() for value in tensors.values()]).sum()


def fingerprint_model(model, auto_class: str) -> dict[str, str]:
    """Return the sums of outputs and gradients in evaluation, and of gradients in training with dropout."""
    inputs = make_inputs(model, auto_class)
    sums = {}
    for mode in ("eval", "train"):
        model.train(mode == "train").zero_grad()
        torch.manual_seed(2)
        output = tensors_of(model(**inputs))
        total_of(output).backward()
        sums[f"{mode} outputs"] = digest(output)
        sums[f"{mode} gradients"] = digest({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    model.eval()
    if auto_class == "AutoModel":
        with torch.inference_mode():
            sums["chunked"] = digest(tensors_of(model(**inputs, chunk_size=5)))
            if "input_ids" in inputs:
                ids, ends = inputs["input_ids"][:1], torch.tensor([0, 4, 4, 11])
                sums["packed"] = digest(tensors_of(model(input_ids=ids, cu_seqlens=ends)))
    return sums


def fingerprint_block() -> str:
    torch.manual_seed(0)
    block = fa_transformers.FactorizedAttentionBlock(8, 4, 8, num_heads=2)
    image = torch.randn(2, 8, 7, 9, requires_grad=True)
    output = block(image)
    output.pow(2).mean().backward()
    return digest({"output": output, "image": image.grad} | {k: p.grad for k, p in block.named_parameters()})


def fingerprint_training() -> dict:
    """Run `scripts/finetune.py` for 20 steps on generated documents, with everything that a layer can have."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [f'"{" ".join(f"word{(i * k) % 97}" for k in range(3, 20 + i % 40))}",{"ab"[i % 2]}' for i in range(160)]
        Path(scratch, "train.csv").write_text("\n".join(["text,label", *rows]))
        flags = (
            f"--train_file {scratch}/train.csv --output_dir {scratch}/out --max_steps 20 --max_tokens_per_batch 512 "
            "--local_window 8 --local_kernel_size 3 --key_feature_size 32 --num_threads 1 --use_cpu --report_to none "
            "--eval_steps 10 --max_length 128 --license apache-2.0"
        )
        command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), *flags.split()]
        subprocess.run(command, check=True, capture_output=True, cwd=scratch)
        weights = hashlib.sha256(Path(scratch, "out", "model.safetensors").read_bytes()).hexdigest()[:16]
        results = json.loads(Path(scratch, "out", "all_results.json").read_text())
        return {"weights": weights} | {name: results[name] for name in ("model", "baselines", "steps", "train_tokens")}


def main() -> None:
    torch.set_num_threads(1)
    sums: dict = {"block": fingerprint_block()}
    for config_class, heads in ENCODERS.items():
        for auto_class, model_class in heads.items():
            for name, options in OPTIONS.items():
                model = build(config_class, model_class, options)
                sums[f"{model_class.__name__}, {name}"] = fingerprint_model(model, auto_class)
    sums["20 steps of finetune.py"] = fingerprint_training()
    print(json.dumps(sums, indent=1))


if __name__ == "__main__":
    main()
