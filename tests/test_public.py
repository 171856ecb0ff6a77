"""Protects what the package offers by name: every name loads, is listed everywhere, and brings what it needs along."""

import ast
import builtins
import inspect
import re
import subprocess
import sys
import typing
from dataclasses import is_dataclass
from types import UnionType

import pytest
from repository import ROOT
from transformers import PretrainedConfig

import fa_transformers

SOURCE = ROOT / "fa_transformers" / "__init__.py"


def test_the_three_lists_of_names_agree():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    homes = {
        alias.name: f".{node.module}" for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert homes == fa_transformers._HOME_OF
    assert set(fa_transformers.__all__) == {*homes, "__version__"}
    assert len(fa_transformers.__all__) == len(set(fa_transformers.__all__))


@pytest.mark.parametrize("name", fa_transformers.__all__)
def test_every_name_loads_and_is_documented(name):
    value = getattr(fa_transformers, name)
    assert name == "__version__" or inspect.getdoc(value)


def own_types(annotation: object) -> set[type]:
    """Classes of ours inside an annotation."""
    if isinstance(annotation, type) and annotation.__module__.startswith("fa_transformers."):
        return {annotation}
    parts = typing.get_args(annotation) if typing.get_origin(annotation) or isinstance(annotation, UnionType) else ()
    return {found for part in parts for found in own_types(part)}


def annotations_of(value: object) -> dict:
    """Type hints of a function or a dataclass of ours; transformers' configurations name types that are not there."""
    is_own = inspect.isfunction(value) or (is_dataclass(value) and not issubclass(value, PretrainedConfig))
    return typing.get_type_hints(value) if is_own else {}


@pytest.mark.parametrize("name", fa_transformers.__all__)
def test_what_an_exported_thing_takes_gives_or_raises_is_exported(name):
    value = getattr(fa_transformers, name)
    needed = {found.__name__ for hint in annotations_of(value).values() for found in own_types(hint)}
    raised = re.findall(r"^\s*(\w+(?:Error|Exception)):", (inspect.getdoc(value) or "").partition("Raises:")[2], re.M)
    needed |= {error for error in raised if not hasattr(builtins, error)}
    assert needed <= set(fa_transformers.__all__), f"{name} needs {sorted(needed)}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fine_tune'"):
        _ = fa_transformers.fine_tune


def test_importing_the_package_registers_its_models():
    code = (
        "import fa_transformers\nfrom transformers import AutoConfig, AutoModel\n"
        "sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)\n"
        "print(type(AutoModel.from_config(AutoConfig.for_model('fa_bert', **sizes))).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.split() == ["FABertModel"] and not ran.stderr
