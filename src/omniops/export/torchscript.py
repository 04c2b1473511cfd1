"""TorchScript: a .pt that LibTorch and Python load without omniops.

It is the decomposed program, compiled by ``torch.jit.script``, so that sizes stay what they are in the program: a trace
would keep those of the example. A module with omniops' own kernels in it is scripted or traced by ``torch.jit`` itself,
and then whoever loads the file imports omniops first. torchvision's operators stay, and need torchvision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from omniops.export.program import decompose
from omniops.export.request import Request

_OF_PYTHON = {torch.sym_min: min, torch.sym_max: max, torch.sym_float: float, torch.sym_int: int}
"""What TorchScript calls functions of sizes."""
_CHECKS = (
    "aten::_assert_scalar",
    "aten::_assert_tensor_metadata",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
)


def write(program: ExportedProgram, request: Request, path: Path) -> None:
    """Write ``path``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated, which is what was asked for
        torch.jit.script(_scriptable(decompose(program))).save(str(path))


def load(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(path))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            found = module(*inputs)
        return [found] if isinstance(found, Tensor) else list(found)

    return run


def _scriptable(program: ExportedProgram) -> torch.fx.GraphModule:
    """The program as a module that takes and returns its tensors one by one, and that TorchScript compiles."""
    module = program.module()
    graph = module.graph
    for node in reversed(list(graph.nodes)):
        if _is_check(node) and not node.users:
            graph.erase_node(node)
        elif node.op == "call_function":
            # TorchScript finds the overload itself.
            node.target = _OF_PYTHON.get(node.target, getattr(node.target, "overloadpacket", node.target))
            if node.target is torch.ops.aten.item and isinstance(node.meta.get("val"), torch.SymInt):
                _make_integer(graph, node)
    graph.eliminate_dead_code()
    (output,) = (node for node in graph.nodes if node.op == "output")
    (values,) = output.args
    output.args = (values[0] if len(values) == 1 else tuple(values),)
    graph.set_codegen(torch.fx.graph.CodeGen())  # flat inputs and outputs
    return torch.fx.GraphModule(module, graph)


def _is_check(node: torch.fx.Node) -> bool:
    """Whether it checks sizes or dtypes, and is no part of the computation."""
    if node.op == "call_module":
        return node.target == "_guards_fn"
    name = getattr(node.target, "name", None)
    return node.op == "call_function" and callable(name) and name().partition(".")[0] in _CHECKS


def _make_integer(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """An element of a tensor is of no type in TorchScript until it is made an integer."""
    with graph.inserting_after(node):
        integer = graph.call_function(int, (node,))
    node.replace_all_uses_with(integer, delete_user_cb=lambda user: user is not integer)
