"""The operators on tensors that several processes have parts of."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed"
)


def test_one_process_computes_what_it_would_without_dtensors(tmp_path):
    from sharded_operators import check

    check(0, 1, str(tmp_path / "store"), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))],
)
def test_processes_compute_parts_of_the_batch(device, tmp_path):
    script = Path(__file__).parents[1] / "sharded_operators.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", tmp_path / "store", device],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
