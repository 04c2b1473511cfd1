"""Core ML: an .mlpackage, made on any system, which runs on Apple's.

Operators of PyTorch that coremltools does not know are decomposed here, or get the name of one that does the same.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from omniops.export.errors import ExportError
from omniops.export.program import decompose, require_known_sizes
from omniops.export.request import Request

_MOST_AXES = 5


def write(program: ExportedProgram, request: Request, path: Path) -> None:
    """Write the folder ``path``; it computes in float16 in half, else in float32, and takes and gives float32."""
    require_known_sizes(program, "Core ML")
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every PyTorch that it was not tested with
    try:
        import coremltools

        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            model = coremltools.convert(
                _translated(decompose(program)),
                minimum_deployment_target=coremltools.target.iOS15,  # from the next on inputs in half are float16
                compute_precision=coremltools.precision.FLOAT16 if request.half else coremltools.precision.FLOAT32,
                skip_model_load=True,
            )
            spec = model.get_spec()
            _require_ranks(spec)
            _name(coremltools, spec, spec.description.input, request.input_names)
            _name(coremltools, spec, spec.description.output, request.output_names)
            coremltools.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True).save(str(path))
    finally:
        logger.setLevel(level)


def _translated(program: ExportedProgram) -> ExportedProgram:
    """The program in operators that coremltools knows, as far as PyTorch has decompositions into them."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    aten = torch.ops.aten
    unknown_overloads = (aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf)
    known = set(_TORCH_OPS_REGISTRY.name_to_func_mapping)
    table = {
        operator: function
        for operator, function in torch.export.default_decompositions().items()
        if operator.name().partition("::")[2].partition(".")[0] not in known or operator in unknown_overloads
    }
    program = program.run_decompositions(table)
    _rename(program)
    return program


def _rename(program: ExportedProgram) -> None:
    aten = torch.ops.aten
    of_booleans = {
        aten.bitwise_and.Tensor: aten.logical_and.default,
        aten.bitwise_or.Tensor: aten.logical_or.default,
        aten.bitwise_not.default: aten.logical_not.default,
    }
    for node in list(program.graph.nodes):
        value = node.meta.get("val")
        if node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
        elif node.op == "call_function" and getattr(value, "dtype", None) is torch.bool:
            node.target = of_booleans.get(node.target, node.target)


def _require_ranks(spec: Any) -> None:
    """Raise for tensors that coremltools writes and Core ML does not read."""
    (function,) = spec.mlProgram.functions.values()
    values = [*function.inputs]
    for block in function.block_specializations.values():
        values += [output for operation in block.operations for output in operation.outputs]
    for value in values:
        if value.type.tensorType.rank > _MOST_AXES:
            raise ExportError(
                f"Core ML takes tensors of at most {_MOST_AXES} axes, and {value.name} has "
                f"{value.type.tensorType.rank}: reshape it in the model, and give it in fewer axes"
            )


def _name(coremltools: Any, spec: Any, features: Any, names: Sequence[str]) -> None:
    before = [feature.name for feature in features]
    # By other names between, as one may be called as another was.
    for number, name in enumerate(before):
        coremltools.utils.rename_feature(spec, name, f"omniops_{number}")
    for number, name in enumerate(names):
        coremltools.utils.rename_feature(spec, f"omniops_{number}", name)
