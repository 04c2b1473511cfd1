"""What a device tells of itself: its memory, the limit of that, and its title."""

import mmap
import os
import resource
import subprocess
from types import SimpleNamespace

import pytest
import torch

from omniops import device as devices

CPU = torch.device("cpu")


def test_the_memory_of_the_cpu_is_that_of_the_process():
    size = 2**26
    before = devices.memory("cpu")
    some = mmap.mmap(-1, size)  # not from what the allocator has kept of tests before
    torch.frombuffer(some, dtype=torch.uint8).fill_(1)
    after = devices.memory(CPU)
    assert after.allocated - before.allocated > 0.9 * size
    some.close()
    assert devices.memory("cpu").peak - before.allocated > 0.9 * size
    assert after.reserved is None
    assert after.allocated < after.limit <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _files(monkeypatch, files):
    def read_text(path, **kwargs):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(devices.Path, "read_text", read_text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "1000\n"}, 1000),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/memory.max": "max\n",
                "/sys/fs/cgroup/a/memory.max": "2000\n",
            },
            2000,
        ),
        (
            {"/proc/self/cgroup": "3:cpu:/\n5:foo,memory:/x\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "3000"},
            3000,
        ),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "max\n"}, None),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": f"{2**62}\n"}, None),
        ({}, None),
    ],
)
def test_the_limit_of_the_cpus_memory_is_also_its_control_groups(monkeypatch, files, expected):
    _files(monkeypatch, files)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert devices.memory("cpu").limit == (expected or physical)


def test_the_memory_of_a_process_on_a_mac_and_where_nothing_tells(monkeypatch):
    _files(monkeypatch, {})
    monkeypatch.setattr(devices.platform, "system", lambda: "Haiku")
    assert devices.memory("cpu")[0::3] == (None, None)
    monkeypatch.setattr(devices.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(devices, "_ps", {"rss": "1024"}.get)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert devices.memory("cpu").allocated == 2**20
    assert devices.memory("cpu").peak >= peak
    monkeypatch.setattr(devices, "_ps", {"rss": ""}.get)
    assert devices.memory("cpu").allocated is None


def test_the_memory_of_cuda(monkeypatch):
    values = {"memory_allocated": 1, "memory_reserved": 2, "max_memory_allocated": 4}
    module = {name: (lambda device, value=value: value + 10 * device.index) for name, value in values.items()}
    module["get_device_properties"] = lambda device: SimpleNamespace(total_memory=3 + 10 * device.index)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**module))
    assert devices.memory("cuda:1") == devices.Memory(allocated=11, reserved=12, limit=13, peak=14)


def test_the_memory_of_mps(monkeypatch):
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 1)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3)

    def fails(device):
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    for max_memory_allocated, peak in ((lambda device: 4, 4), (fails, None)):
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", max_memory_allocated, raising=False)
        assert devices.memory("mps") == (1, 2, 3, peak)
    monkeypatch.delattr(torch.accelerator, "max_memory_allocated")
    assert devices.memory("mps").peak is None


def test_the_memory_of_devices_that_do_not_tell(monkeypatch):
    assert devices.memory("meta") == (None, None, None, None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert devices.memory("mtia") == (None, None, None, None)


def _on_a_mac(monkeypatch, output):
    def run(command, **kwargs):
        assert command == ("sysctl", "-n", "machdep.cpu.brand_string")
        if output is None:
            raise FileNotFoundError("sysctl")
        return subprocess.CompletedProcess(command, 0 if output else 1, output, "")

    _files(monkeypatch, {})
    monkeypatch.setattr(devices.subprocess, "run", run)


def test_the_title_of_a_mac_is_its_chips(monkeypatch):
    _on_a_mac(monkeypatch, "Apple M2 Pro\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert devices.title(CPU) == "Apple M2 Pro, 8 threads"
    assert devices.title(torch.device("mps")) == "Apple M2 Pro"


@pytest.mark.parametrize("output", ["", None])
def test_the_title_where_nothing_tells_it(monkeypatch, output):
    _on_a_mac(monkeypatch, output)
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "riscv64")
    assert devices.title(CPU).startswith("riscv64, ")
    assert devices.title(torch.device("mps")) == "Apple GPU"


@pytest.mark.parametrize(("threads", "words"), [(1, ", 1 thread"), (2, ", 2 threads"), (8, ", 8 threads")])
def test_the_title_of_this_cpu(monkeypatch, threads, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert devices.title(CPU).endswith(words)
