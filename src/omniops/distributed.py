"""Work that torchrun shares among processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


class Processes:
    """The processes that torchrun started, or this one alone."""

    def __init__(self) -> None:
        self.are_several = dist.is_available() and dist.is_torchelastic_launched()
        self.rank = int(os.environ["RANK"]) if self.are_several else 0
        """The number of this process, from 0."""
        self.local_rank = int(os.environ["LOCAL_RANK"]) if self.are_several else 0
        """Its number among those on this machine, from 0."""
        self.count = int(os.environ["WORLD_SIZE"]) if self.are_several else 1
        """How many they are, on all machines."""

    def start(self, gpus: bool = False) -> None:
        """Make the process group, which the other methods use; with ``gpus`` also for tensors on NVIDIA's."""
        if self.are_several:
            # gloo, as what they exchange is on the CPU on every device. A fast process may wait long for a slow one.
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=1))

    def share(self, work: Sequence[_T]) -> Sequence[_T]:
        """The share of the work that is this process's."""
        return work[dist.get_rank() :: dist.get_world_size()] if self.are_several else work

    @contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        """One process of each machine does what follows, then the others: so that files are fetched once."""
        if self.are_several and self.local_rank > 0:
            dist.barrier()
        yield
        if self.are_several and self.local_rank == 0:
            dist.barrier()

    def gather(self, value: _T) -> list[_T] | None:
        """The values of all processes, in the first one; in the others None."""
        if not self.are_several:
            return [value]
        values: list[Any] | None = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def end(self) -> None:
        """End the process group."""
        if self.are_several:
            # PyTorch 2.7 ends the group's threads with Python's lock, which one wants that still drops what was sent.
            dist.barrier()
            dist.destroy_process_group()
