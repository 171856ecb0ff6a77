"""The stranger's process of test_remote_code.py: loads published folders without our package and records what it got.

    python -P remote_process.py JOBS.json RESULTS.pt

JOBS.json is a list of {"folder", "auto_class", "base_auto_class", "task", "pipeline_calls", "text", "image"}. One
process serves all of them, because importing transformers takes seconds.
"""

import importlib.abc
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image


class WithoutPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fa_transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def load(auto_class: str, folder: str, trust_remote_code: bool = True, **options):
    loader = getattr(transformers, auto_class)
    if auto_class == "AutoBackbone":  # whose from_pretrained asks the Hub for local folders as well
        config = load("AutoConfig", folder, trust_remote_code)
        loader = type(loader.from_config(config, trust_remote_code=trust_remote_code))
        return loader.from_pretrained(folder, config=config, **options)
    return loader.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)


def make_inputs(processor, job: dict) -> dict[str, torch.Tensor]:
    """The job's text or image as a batch; a batch of one sample with two choices for multiple choice."""
    if job["image"]:
        return dict(processor(images=Image.open(job["image"]), return_tensors="pt"))
    inputs = dict(processor([job["text"], "A short text."], padding=True, return_tensors="pt"))
    if job["auto_class"] == "AutoModelForMultipleChoice":
        inputs = {name: tensor.unsqueeze(0) for name, tensor in inputs.items()}
    return inputs


@torch.no_grad()
def run(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    outputs = dict(model.eval()(**inputs))
    outputs |= {f"feature_maps {index}": maps for index, maps in enumerate(outputs.pop("feature_maps", ()))}
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def call_pipeline(model, processor, job: dict) -> list:
    """What the job's pipeline answers to each of its calls (argument, keyword arguments)."""
    kind = "image_processor" if job["image"] else "tokenizer"
    pipeline = transformers.pipeline(job["task"], model=model, **{kind: processor}, device="cpu")
    return [pipeline(argument, **options) for argument, options in job["pipeline_calls"]]


def process(job: dict) -> dict:
    folder, auto_class = job["folder"], job["auto_class"]
    processor = load("AutoImageProcessor" if job["image"] else "AutoTokenizer", folder)
    inputs = make_inputs(processor, job)
    model, loading = load(auto_class, folder, output_loading_info=True)
    base = model if job["base_auto_class"] == auto_class else load(job["base_auto_class"], folder)
    resaved = folder + "-resaved"
    model.save_pretrained(resaved)
    processor.save_pretrained(resaved)
    again = load(auto_class, resaved)
    pipelines = []
    if job["task"]:
        by_name = transformers.pipeline(job["task"], model=folder, trust_remote_code=True, device="cpu")
        pipelines.append([by_name(argument, **options) for argument, options in job["pipeline_calls"]])
        pipelines.append(call_pipeline(again, processor, job))
    return {
        "class_name": type(model).__name__,
        "module": type(model).__module__,
        "config_class": type(load("AutoConfig", folder)).__name__,
        "base_class_name": type(base).__name__,
        "missing_keys": sorted(loading["missing_keys"]) + sorted(loading["unexpected_keys"]),
        "inputs": inputs,
        "weights": dict(model.state_dict()),
        "outputs": run(model, inputs),
        "resaved_weights": dict(again.state_dict()),
        "resaved_outputs": run(again, inputs),
        "resaved_files": {path.name: path.read_bytes() for path in Path(resaved).iterdir() if path.suffix == ".py"},
        "resaved_config": json.loads((Path(resaved) / "config.json").read_text()),
        "pipelines": pipelines,
    }


def main() -> None:
    sys.meta_path.insert(0, WithoutPackage())
    torch.set_num_threads(2)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = {job["folder"]: process(job) for job in jobs}
    results["package_was_imported"] = any(name.split(".")[0] == "fa_transformers" for name in sys.modules)
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
