"""What the tests of the C++ kernels share: instruction sets, numbers of threads, and forked processes."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from omniops.backends import cpu

NEEDS_CPU_KERNELS = pytest.mark.skipif(not cpu.AVAILABLE, reason="the C++ module is not built")
NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def run_with(instruction_set, program):
    """Runs a test file as a program whose kernels take no more than these instructions; the file prints their name."""
    available = import_module("omniops._C").instruction_set()
    if INSTRUCTION_SETS.index(instruction_set) > INSTRUCTION_SETS.index(available):
        pytest.skip(f"this processor or build has no {instruction_set}")
    environment = {
        **os.environ,
        "OMNIOPS_CPU_CAPABILITY": instruction_set,
        "PYTHONPATH": str(Path(__file__).parent),
    }
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [instruction_set]


def assert_same_with_any_number_of_threads(compute, set_num_threads):
    """``compute`` returns tensors, and the same bits whatever PyTorch's number of threads. Returns them."""
    set_num_threads(1)
    expected = compute()
    for threads in (2, 3, 5, 16):
        set_num_threads(threads)
        assert all(map(torch.equal, compute(), expected)), f"other bits by {threads} threads"
    return expected


def assert_same_in_python_threads(compute, work):
    """``compute`` returns tensors for an item of the work, and the same where eight threads call it at once."""
    expected = [compute(item) for item in work]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(compute, work))
    for tensors, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, tensors, wanted))


def assert_same_in_a_forked_child(compute, occupy):
    """``compute`` returns tensors, and the same in a process that is forked while another thread is within ``occupy``.

    NumPy compares, for PyTorch's own thread pool need not survive a fork.
    """
    expected = compute()
    forked = threading.Event()

    def keep_occupied():
        while not forked.is_set():
            occupy()

    other = threading.Thread(target=keep_occupied)
    other.start()
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a child that hangs ends as a failure
            pairs = zip(compute(), expected, strict=True)
            os._exit(0 if all(np.array_equal(one.numpy(), two.numpy()) for one, two in pairs) else 1)
    finally:
        forked.set()
        other.join()
    assert os.waitpid(child, 0)[1] == 0
