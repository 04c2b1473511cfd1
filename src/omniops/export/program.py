"""A module as a program of PyTorch's exporter, which the formats are written of."""

from __future__ import annotations

import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

from omniops.decomposed import decompositions
from omniops.export.errors import ExportError, line_of_model, shorten
from omniops.formatting import dtype_name

_NAMESPACE = "omniops"


@dataclass(frozen=True)
class TensorSpec:
    """An input or an output of a file.

    Example:
        >>> from omniops.export import TensorSpec
        >>> print(TensorSpec("image", "float32", (None, 3, 64, 64)))
        image float32 (*, 3, 64, 64)
    """

    name: str
    dtype: str
    """As PyTorch calls it, without "torch."."""
    shape: tuple[int | None, ...]
    """None where it may be any, or depends on what the inputs hold."""

    def __str__(self) -> str:
        sizes = ", ".join("*" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} ({sizes}{',' if len(self.shape) == 1 else ''})"


def trace(module: nn.Module, args: Sequence[Any], dynamic_shapes: Any, name: str) -> ExportedProgram:
    """The module in evaluation mode as a program with omniops' operators in it; ``name`` is what errors call it.

    Raises:
        ExportError: where ``torch.export`` cannot trace it.
    """
    with (
        evaluating(module),
        torch.no_grad(),
        quiet("torch.fx.experimental.symbolic_shapes"),
        without_torchvisions_warning(),
    ):
        said = io.StringIO()
        try:
            with redirect_stderr(said):  # where it prints the graph so far before it raises
                program: ExportedProgram = torch.export.export(
                    module, tuple(args), dynamic_shapes=dynamic_shapes, strict=False
                )
        except Exception as error:
            line = line_of_model(error)
            advice = ""
            if isinstance(error, GuardOnDataDependentSymNode):
                advice = ", where it decides by what a tensor holds: compute both ways and choose by torch.where"
            raise ExportError(
                f"torch.export cannot trace {name}, which every format needs{f', at {line}' if line else ''}{advice}; "
                f"PyTorch says: {shorten(error)}"
            ) from error
    print(said.getvalue(), end="", file=sys.stderr)
    return program


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program without omniops' operators; PyTorch's own stay as they are, as converters know many of them.

    Raises:
        ExportError: for one with connected components.
    """
    _require_expressible(program)
    table = {operator: function for operator, function in decompositions().items() if operator.namespace == _NAMESPACE}
    decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


def _require_expressible(program: ExportedProgram) -> None:
    """Raise ExportError for a program with an operator of omniops that is none of PyTorch's."""
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    if torch.ops.omniops.connected_components.default in operators:
        raise ExportError(
            "the model calls omniops::connected_components (fill_holes and remove_small_components do), which takes as "
            "many steps as the mask needs: ONNX has a loop for it, other formats have none. Export the model without "
            "it, up to its logits for example, and call omniops.fill_holes on what the file returns"
        )


def has_computed_sizes(value: Any) -> bool:
    """Whether a size of the tensor depends on what the inputs hold."""
    return isinstance(value, Tensor) and bool(free_unbacked_symbols(value))


def require_known_sizes(program: ExportedProgram, title: str) -> None:
    """Raise ExportError for a program with such a tensor, in a format that has no place for it."""
    if any(has_computed_sizes(node.meta.get("val")) for node in program.graph.nodes):
        raise ExportError(
            f"{title} takes no tensors whose size depends on what the inputs hold, as on how many objects a detector "
            "finds: write the model as ONNX, OpenVINO or TorchScript, or what comes before that (a detector's "
            "backbone, for example) by itself"
        )


def inputs_of(program: ExportedProgram, names: Sequence[str] | None = None) -> tuple[TensorSpec, ...]:
    """The tensors that the program takes, by the names given or its own."""
    wanted = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    return _specs([node for node in nodes if isinstance(node.meta["val"], Tensor)], names, "input_names")


def outputs_of(program: ExportedProgram, names: Sequence[str] | None = None) -> tuple[TensorSpec, ...]:
    """The tensors that the program returns, by the names given, or output, or output_0, output_1, ..."""
    by_name = {node.name: node for node in program.graph.nodes}
    nodes = [by_name[name] for name in program.graph_signature.user_outputs if isinstance(name, str)]
    nodes = [node for node in nodes if isinstance(node.meta["val"], Tensor)]
    if names is None:
        names = ["output"] if len(nodes) == 1 else [f"output_{number}" for number in range(len(nodes))]
    return _specs(nodes, names, "output_names")


def parameter_names(module: nn.Module, args: Sequence[Any]) -> list[str] | None:
    """What ``forward`` calls the tensors among ``args``; None where they have no names of their own there."""
    try:
        bound = inspect.signature(module.forward).bind(*args).arguments
    except (TypeError, ValueError):
        return None
    values = list(bound.values())
    if len(values) != len(args) or any(value is not arg for value, arg in zip(values, args, strict=True)):
        return None
    if not all(isinstance(value, Tensor | bool | int | float | str | None) for value in values):
        return None
    return [name for name, value in bound.items() if isinstance(value, Tensor)]


def _specs(nodes: Sequence[Any], names: Sequence[str] | None, argument: str) -> tuple[TensorSpec, ...]:
    if names is None:
        names = [node.name for node in nodes]
    if len(names) != len(nodes):
        raise ValueError(f"{argument} must name {len(nodes)} tensors, got {len(names)} names: {', '.join(names)}")
    if len(set(names)) != len(names):
        raise ValueError(f"{argument} must be different names, got {', '.join(names)}")
    return tuple(
        TensorSpec(
            name,
            dtype_name(node.meta["val"].dtype),
            tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape),
        )
        for name, node in zip(names, nodes, strict=True)
    )


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Without its warnings: they say again what is raised, or nothing that the caller could change."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextmanager
def without_torchvisions_warning() -> Iterator[None]:
    """torchvision says how many boxes are left by a function that PyTorch 2.15 calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`create_unbacked_symint` is deprecated", category=FutureWarning)
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile, and then of each part the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
