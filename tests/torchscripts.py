"""What TorchScript's results are held against, for tests/ops and tests/nn."""

import io

import torch
from torch import Tensor

IGNORED = (
    "error",
    r"ignore:`?torch\.jit\.\w+`? is (deprecated|not supported):FutureWarning",
    r"ignore:`?torch\.jit\.\w+`? is (deprecated|not supported):DeprecationWarning",
)
"""All warnings are errors, those of a trace too, but that TorchScript itself is old."""


def reloaded(compiled):
    """Saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(compiled, file)
    file.seek(0)
    return torch.jit.load(file)


def assert_as_eager(compiled, eager, calls, parameters=None):
    """The same results and gradients, as compiled and as loaded from its file."""
    assert_alike([compiled, reloaded(compiled)], eager, calls, parameters)


def assert_alike(functions, eager, calls, parameters=None):
    """The same results and gradients at the sizes of each of several calls.

    What is called first is profiled, and what comes later runs as PyTorch optimised it for that: each is called again.

    Args:
        parameters: those of eager, by name.
    """
    parameters = parameters or {}
    expected = [_results_and_gradients(eager, args, parameters.values()) for args in calls]
    for function in functions:
        own = dict(function.named_parameters()) if parameters else {}
        assert own.keys() == parameters.keys()
        for args, results in (*zip(calls, expected, strict=True), *zip(calls, expected, strict=True)):
            found = _results_and_gradients(function, args, [own[name] for name in parameters])
            torch.testing.assert_close(found, results, rtol=0, atol=0, equal_nan=True)


def _results_and_gradients(function, args, parameters):
    results = tensors_of(function(*args))
    losses = [(x.double() * torch.linspace(0.5, 1, x.numel()).view_as(x)).sum() for x in results if x.requires_grad]
    inputs = [tensor for tensor in (*tensors_of(args), *parameters) if tensor.requires_grad]
    gradients = torch.autograd.grad(sum(losses), inputs, allow_unused=True) if losses else ()
    return [*results, *(gradient for gradient in gradients if gradient is not None)]


def tensors_of(value):
    """The tensors in what a function takes or gives, one after another."""
    if isinstance(value, Tensor):
        return (value,)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return tuple(tensor for one in values for tensor in tensors_of(one))
