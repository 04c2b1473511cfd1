"""Each operator that has derivatives, on each device."""

import pytest
from differentiable import DEVICES, Problem, carafe, deform_conv2d


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[carafe, deform_conv2d], ids=["carafe", "deform_conv2d"])
def problem(request: pytest.FixtureRequest) -> Problem:
    """On the CPU, in float32."""
    return request.param()
