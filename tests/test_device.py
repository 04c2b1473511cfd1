"""Choosing a device by name."""

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


def test_waiting_for_the_cpu_and_its_title():
    cpu = torch.device("cpu")
    devices.synchronize(cpu)
    assert devices.title(cpu).endswith(f"{torch.get_num_threads()} threads")
    assert devices.memory(cpu) is None
