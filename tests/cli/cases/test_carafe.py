"""CARAFE's case, and what holds for every one."""

import pytest
import torch

from omniops.benchmarking.contenders import BOTH, FORWARD, OURS, bare_function
from omniops.benchmarking.operators import timed_dtypes
from omniops.cli.cases import CASES
from omniops.cli.cases import carafe as case
from omniops.environment import serving

CPU = torch.device("cpu")


@pytest.mark.parametrize("operator", CASES, ids=lambda operator: operator.NAME)
def test_the_host_is_timed_without_the_reference_kernels(operator):
    shape = operator.host_shape("cpu")
    made = list(operator.contenders(shape, timed_dtypes(operator, serving(operator.NAME, "cpu"))[0], CPU))
    assert [contender.name for contender in made if not contender.on_host] == ["reference kernels"]
    assert shape not in operator.shapes("cpu", quick=True) + operator.shapes("cpu", quick=False)


def test_a_forward_that_is_timed_records_no_gradient():
    for contender in (*case.contenders((1, 4, 6, 5), torch.float32, CPU), bare_function(CPU)):
        if contender.on_host:
            assert not contender.forward().requires_grad
            assert all(gradient is not None for gradient in contender.forward_backward())


def test_the_byte_floor_counts_each_element_once():
    n, c, h, w = 2, 256, 100, 152
    traffic = case.traffic((n, c, h, w))
    assert traffic[FORWARD] * 4 / 4.25e12 * 1e3 == pytest.approx(0.040, rel=0.02)
    assert traffic[BOTH] > 2 * traffic[FORWARD]


def test_every_contender_computes_the_same():
    torch.manual_seed(0)
    made = {contender.name: contender for contender in case.contenders((1, 16, 12, 16), torch.float64, CPU)}
    exact = made["reference kernels"].forward()
    for name in (OURS, "unfold + einsum"):
        torch.testing.assert_close(made[name].forward(), exact)
        gradients = made[name].forward_backward()
        assert [tuple(gradient.shape) for gradient in gradients] == [(1, 16, 12, 16), (1, 25, 24, 32)]
