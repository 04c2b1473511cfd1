"""How often Triton compiles as sizes change, as in multi-scale training. It compiles for an H200 without one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

MOST = 6
SIZES = ["58x97", "96x73", "62x63", "24x27", "64x128", "32x33", "128x96", "1x1", "80x16"]
"""Heights and widths: the third is the last with which anything may be compiled."""


def compilations(operator, dtype, folder):
    """The kernels that are compiled after each size."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compilations.py")
    command = [sys.executable, str(script), operator, dtype, *SIZES]
    return [int(line) for line in subprocess.check_output(command, env=environment, text=True).split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        ("carafe", "float32"),
        pytest.param("deform_conv2d", "float32", marks=pytest.mark.slow),
        pytest.param("connected_components", "uint8", marks=pytest.mark.slow),
        pytest.param("multi_scale_deform_attn", "float32", marks=pytest.mark.slow),
        pytest.param("deterministic_multi_scale_deform_attn", "float32", marks=pytest.mark.slow),
        pytest.param("carafe", "float16", marks=pytest.mark.slow),
        pytest.param("deform_conv2d", "float16", marks=pytest.mark.slow),
        pytest.param("connected_components", "int64", marks=pytest.mark.slow),
        pytest.param("multi_scale_deform_attn", "float16", marks=pytest.mark.slow),
        pytest.param("discrete_multi_scale_deform_attn", "float32", marks=pytest.mark.slow),
        pytest.param("deterministic_multi_scale_deform_attn", "float16", marks=pytest.mark.slow),
    ],
)
def test_sizes_are_not_compiled_for(operator, dtype, tmp_path):
    counts = compilations(operator, dtype, tmp_path)
    assert 1 <= counts[-1] <= MOST
    assert counts[2:] == [counts[2]] * len(SIZES[2:])
