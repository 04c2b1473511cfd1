"""Choosing a device by name."""

import subprocess

import pytest
import torch

from omniops import device as devices


def test_the_cpu_is_found_first_and_chosen_by_name():
    assert devices.found()[0] == torch.device("cpu")
    assert devices.choose("cpu") == torch.device("cpu")


def test_without_a_name_an_accelerator_comes_before_the_cpu(monkeypatch):
    for here, expected in ((["cpu"], "cpu"), (["cpu", "cuda:0", "cuda:1"], "cuda:0")):
        monkeypatch.setattr(devices, "found", lambda here=here: [torch.device(name) for name in here])
        assert devices.choose() == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "expected"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("mps", "mps:0"), ("cpu:0", "cpu")]
)
def test_a_name_chooses_the_device_found_under_it(monkeypatch, name, expected):
    here = [torch.device(each) for each in ("cpu", "cuda:0", "cuda:1", "mps:0")]
    monkeypatch.setattr(devices, "found", lambda: here)
    assert devices.choose(name) == torch.device(expected)


@pytest.mark.parametrize("name", ["foo", "cuda:x", ""])
def test_a_name_that_is_no_devices_is_refused(name):
    with pytest.raises(ValueError, match=rf"unknown device '{name}': found here are cpu"):
        devices.choose(name)


@pytest.mark.parametrize("name", ["cuda:3", "xla", "meta", "cpu:1"])
def test_a_device_that_is_not_here_is_refused(monkeypatch, name):
    monkeypatch.setattr(devices, "found", lambda: [torch.device("cpu"), torch.device("cuda:0")])
    with pytest.raises(ValueError, match=rf"no device '{name}' .* found here are cpu, cuda:0"):
        devices.choose(name)


def _on_a_mac(monkeypatch, told):
    def read_text(path, **kwargs):
        raise FileNotFoundError(path)

    def run(command, **kwargs):
        assert command == ["sysctl", "-n", "machdep.cpu.brand_string"]
        if told is None:
            raise FileNotFoundError("sysctl")
        return subprocess.CompletedProcess(command, 0 if told else 1, told, "")

    monkeypatch.setattr(devices.Path, "read_text", read_text)
    monkeypatch.setattr(devices.subprocess, "run", run)


def test_the_title_of_a_mac_is_its_chips(monkeypatch):
    _on_a_mac(monkeypatch, "Apple M2 Pro\n")
    assert devices.title(torch.device("cpu")) == f"Apple M2 Pro, {torch.get_num_threads()} threads"
    assert devices.title(torch.device("mps")) == "Apple M2 Pro"


@pytest.mark.parametrize("told", ["", None])
def test_the_title_where_nothing_tells_it(monkeypatch, told):
    _on_a_mac(monkeypatch, told)
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "riscv64")
    assert devices.title(torch.device("cpu")).startswith("riscv64, ")
    assert devices.title(torch.device("mps")) == "Apple GPU"


def test_the_memory_of_a_cpu_is_not_asked_of_any_module(monkeypatch):
    def missing(device):
        raise RuntimeError("no module")

    monkeypatch.setattr(torch, "get_device_module", missing)
    assert devices.memory(torch.device("cpu")) is None


def test_waiting_for_the_cpu_and_its_title():
    cpu = torch.device("cpu")
    devices.synchronize(cpu)
    assert devices.title(cpu).endswith(f"{torch.get_num_threads()} threads")
    assert devices.memory(cpu) is None
