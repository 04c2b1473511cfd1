"""Imported, it gives a process a GPU of Metal's that fails as Metal does: who asks for it after a fork is killed."""

import os

import torch

from omniops import device


def _accelerator(check_available=False):
    if check_available and device.in_forked_child():
        os.abort()
    return torch.device("mps")


torch.backends.mps.is_built = lambda: True
torch.accelerator.current_accelerator = _accelerator
torch.accelerator.device_count = lambda: 1
