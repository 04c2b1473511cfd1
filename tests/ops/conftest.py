"""Each operator that has derivatives, on each device."""

import pytest
from differentiable import DEVICES, PROBLEMS, Problem


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=PROBLEMS, ids=lambda problem: problem.__name__)
def problem(request: pytest.FixtureRequest) -> Problem:
    """On the CPU, in float32."""
    return request.param()
