"""An operator beside its oracle: the errors of its results and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from omniops.cli.cases._check import Check
from omniops.cli.selftest.outcomes import raised_by_cpu

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The largest error of an operator of this package, relative to the largest value of the right result. Results of
integers are exact. Those of models are ``STAGE_TOLERANCES`` and ``RESULT_TOLERANCES``."""


def tolerance(dtype: torch.dtype) -> float:
    """The largest error that is right; 0 where results are exact."""
    return TOLERANCES.get(dtype, 0.0)


class OracleError(Exception):
    """The CPU's own run, which an operator is compared with, raised something."""


@contextmanager
def _errors_of_oracle() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OracleError(raised_by_cpu(error)) from error


def relative_errors(check: Check, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The largest error of each result and of each gradient, relative to the largest right value.

    Raises what the operator raises, and OracleError for what the oracle does.
    """
    differentiable = dtype.is_floating_point
    inputs = [tensor.to(dtype).to(device).requires_grad_(differentiable) for tensor in check.inputs.values()]
    exact_inputs = [tensor.detach().cpu() for tensor in inputs]
    if differentiable:
        exact_inputs = [tensor.double().requires_grad_() for tensor in exact_inputs]
    results = _as_tuple(check.operator(*inputs))
    with _errors_of_oracle():
        exact_results = _as_tuple(check.oracle(*exact_inputs))
    pairs = list(zip(results, exact_results, strict=True))
    if differentiable:
        generator = torch.Generator().manual_seed(0)
        grads = [
            torch.randn(exact.shape, dtype=torch.float64, generator=generator).to(dtype) for exact in exact_results
        ]
        gradients = torch.autograd.grad(results, inputs, [grad.to(device) for grad in grads])
        with _errors_of_oracle():
            exact_gradients = torch.autograd.grad(exact_results, exact_inputs, [grad.double() for grad in grads])
        pairs += zip(gradients, exact_gradients, strict=True)
    names = quantities(check, dtype)
    return {name: _error(*pair, dtype, device) for name, pair in zip(names, pairs, strict=True)}


def quantities(check: Check, dtype: torch.dtype) -> list[str]:
    """The names of what is compared: results, then gradients."""
    gradients = check.inputs if dtype.is_floating_point else ()
    return [*check.results, *(f"gradient of {name}" for name in gradients)]


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _error(result: Tensor, exact: Tensor, dtype: torch.dtype, device: torch.device) -> float:
    expected = dtype if exact.is_floating_point() else exact.dtype
    if (result.shape, result.dtype, result.device) != (exact.shape, expected, device):
        return float("inf")
    exact = exact.detach().double()
    difference = (result.detach().cpu().double() - exact).abs().max()
    return float(difference / exact.abs().max()) if difference else 0.0
