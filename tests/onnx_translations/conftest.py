"""Modules exported with omniops' translations, their files checked, and run in onnxruntime beside omniops.

This folder is not named onnx: where that package is not installed, ``import onnx`` would find the folder.
"""

from functools import wraps

import pytest
import torch


@pytest.fixture(scope="session")
def export():
    pytest.importorskip("onnxscript", reason="onnxscript makes the graphs: pip install 'omniops[export]'")
    import onnx

    import omniops

    def export(model, *inputs, **options):
        """The ONNX program of a module, of standard operators alone."""
        table = omniops.onnx.translations()
        program = torch.onnx.export(
            model.eval(), inputs, dynamo=True, verbose=False, custom_translation_table=table, **options
        )
        assert {node.domain for node in program.model.graph.all_nodes()} == {""}
        assert not program.model.functions
        onnx.checker.check_model(program.model_proto, full_check=True)
        return program

    return export


@pytest.fixture(scope="session")
def has_deform_conv():
    """Whether translations are made for the opset asked for: PyTorch 2.7 makes all for 18, and converts them."""
    pytest.importorskip("onnxscript", reason="onnxscript makes the graphs: pip install 'omniops[export]'")
    from onnxscript import evaluator

    import omniops
    from omniops._torch_private import opset_of

    table, operator, seen = omniops.onnx.translations(), torch.ops.omniops.carafe.default, []
    translation = table[operator]

    @wraps(translation)
    def recording(*arguments):
        seen.append(opset_of(evaluator.default()))
        return translation(*arguments)

    model, inputs = omniops.CARAFE(1, 1, 1).eval(), (torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    options = {"dynamo": True, "verbose": False, "opset_version": 20}
    torch.onnx.export(model, inputs, custom_translation_table={operator: recording}, **options)
    return seen == [20]


@pytest.fixture(scope="session")
def run():
    onnxruntime = pytest.importorskip("onnxruntime", reason="make test-all installs onnxruntime")

    def run(program):
        """What runs a program: of tensors, or lists of them, a list of its results."""
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )

        def call(*inputs):
            flat = [tensor for item in inputs for tensor in (item if isinstance(item, list) else [item])]
            names = [value.name for value in session.get_inputs()]
            feed = {name: tensor.numpy() for name, tensor in zip(names, flat, strict=True)}
            return [torch.from_numpy(result) for result in session.run(None, feed)]

        return call

    return run


@pytest.fixture(scope="session")
def assert_runs_alike(export, run):
    def assert_runs_alike(model, *cases, tolerance=1e-4, **options):
        """Exports a module by the inputs of the first case, and runs that file with those of all."""
        program = export(model, *cases[0], **options)
        call = run(program)
        for inputs in cases:
            with torch.no_grad():
                wanted = model(*inputs)
            results = call(*inputs)
            wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
            for result, want in zip(results, wanted, strict=True):
                assert result.dtype == want.dtype
                assert result.shape == want.shape
                scale = want.double().abs().max().item()
                torch.testing.assert_close(result.double(), want.double(), rtol=0, atol=tolerance * scale)
        return program

    return assert_runs_alike


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    return randn
