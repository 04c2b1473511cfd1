"""PyTorch's private interface is used in one file alone."""

import ast
from pathlib import Path

import pytest

import omniops

SOURCE = Path(omniops.__file__).parent
FILE = "_torch_private.py"


def private(name):
    return name.startswith("_") and not name.startswith("__")


def roots_of(tree):
    """The names that a file calls PyTorch's modules and what it imports of them by, and private names it imports."""
    roots, stray = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torch":
                    roots.add(alias.asname or "torch")
                    stray += filter(private, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            roots |= {alias.asname or alias.name for alias in node.names}
            stray += filter(private, [*node.module.split("."), *(alias.name for alias in node.names)])
    return roots, stray


def uses(code):
    """The private names of PyTorch that a file uses, as attributes, by import or by getattr."""
    tree = ast.parse(code)
    roots, stray = roots_of(tree)

    def of_torch(node):
        while isinstance(node, ast.Attribute | ast.Call):
            # torchvision's own operators are not PyTorch's.
            if isinstance(node, ast.Attribute) and node.attr == "torchvision":
                return False
            node = node.value if isinstance(node, ast.Attribute) else node.func
        return isinstance(node, ast.Name) and node.id in roots

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if of_torch(node.value) or node.attr in {"_schema", "_destroy", "_is_in_bad_fork", "_version"}:
                stray.append(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"getattr", "hasattr"}:
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(name.value) and of_torch(node.args[0]):
                stray.append(name.value)
    return stray


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch._C._are_functorch_transforms_active()", ["_are_functorch_transforms_active", "_C"]),
        ("from torch.autograd import forward_ad\nforward_ad._current_level", ["_current_level"]),
        ("import torch._dynamo", ["_dynamo"]),
        ("from torch._C import _after_autograd_keyset", ["_C", "_after_autograd_keyset"]),
        ("import torch\ngetattr(torch.cpu, '_is_amx_tile_supported', bool)()", ["_is_amx_tile_supported"]),
        ("tensor._version", ["_version"]),
        ("import torch\ngetattr(torch.mps, 'empty_cache')\ntorch.__version__", []),
        ("import torch\ntorch.ops.torchvision._roi_align_backward(1)\nself._weight", []),
    ],
)
def test_uses_are_found(code, found):
    assert uses(code) == found


def test_private_names_of_pytorch_are_used_in_one_file():
    strays = {}
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        if name != FILE and (stray := uses(path.read_text())):
            strays[name] = stray
    assert strays == {}
    assert uses((SOURCE / FILE).read_text())


def test_the_file_imports_nothing_of_ours():
    tree = ast.parse((SOURCE / FILE).read_text())
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(module.startswith("omniops") for module in modules)
