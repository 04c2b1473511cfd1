"""The operators in training over two processes, and in workers that were forked in the middle."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from differentiable import PROBLEMS
from torch import distributed
from torch.utils.data import DataLoader, Dataset


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    command = [sys.executable, Path(__file__).with_name("data_parallel.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), tmp_path / "store"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs


class Augmented(Dataset):
    """What a loader's workers make by the operators."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return [problem().function(*(x + index for x in problem().tensors)) for problem in PROBLEMS]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a loader's workers are not forked")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_the_workers_of_a_loader_compute_what_their_parent_does():
    """It has called both operators before, on this kind of tensors, and does so while they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's own pool of threads need not survive a fork
    try:
        expected = [Augmented()[i] for i in range(len(Augmented()))]
        loader = DataLoader(Augmented(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        for found, wanted in zip(loader, expected, strict=True):
            assert all(map(torch.equal, found, wanted))
            PROBLEMS[0]().gradients()
    finally:
        torch.set_num_threads(before)
