"""Devices in forked processes. The last lines of each test run in one."""

import multiprocessing
import os
import subprocess
import sys
import threading
import traceback
import warnings

import pytest
import torch

from omniops import device as devices

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch):
    monkeypatch.delenv("OMNIOPS_DEVICE", raising=False)
    monkeypatch.delenv("SAM2_DEMO_FORCE_CPU_DEVICE", raising=False)


def _forked(function):
    """What the function returns in a forked process, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            result = str(function())
        except BaseException:
            result = traceback.format_exc()
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return result


def test_a_forked_process_knows_that_it_is_one():
    assert devices.in_forked_child() is False
    assert _forked(devices.in_forked_child) == "True"
    assert _forked(lambda: _forked(devices.in_forked_child)) == "True"
    assert devices.in_forked_child() is False


def test_a_fork_after_the_import_is_known_whatever_the_system_tells(monkeypatch):
    monkeypatch.setattr(devices, "_forked_without_exec", lambda pid: False)
    assert _forked(devices.in_forked_child) == "True"
    assert devices.in_forked_child() is False


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the system does not tell")
def test_a_process_knows_of_a_fork_before_the_import(monkeypatch):
    def known():
        # As where the module is imported now: no hook of its own has run.
        devices._forked_since_import = False
        return devices.in_forked_child()

    assert _forked(known) == "True"
    # A thread other than the first is no forked process.
    answers = []
    thread = threading.Thread(target=lambda: answers.append(devices.in_forked_child()))
    thread.start()
    thread.join()
    assert answers == [False]
    # Nor is one that has started a program since; and it makes no difference to be forked from a forked process.
    program = "import sys; sys.path[:] = sys.argv[1:]; import omniops.device as d; print(d.in_forked_child())"
    command = [sys.executable, "-c", program, *sys.path]
    assert _forked(lambda: subprocess.run(command, capture_output=True, text=True, check=True).stdout) == "False\n"


def test_multiprocessing_forks_or_does_not():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(devices.in_forked_child) is True


@pytest.mark.parametrize(
    ("printed", "expected"),
    [("4004\n", False), ("    4006\n", False), ("4\n", True), ("2004004", False), ("", False), ("ps: no\n", False)],
)
def test_on_a_mac_ps_tells_whether_a_program_was_started(monkeypatch, printed, expected):
    def run(command, **kwargs):
        assert command == ("ps", "-o", "flags=", "-p", str(os.getpid()))
        return subprocess.CompletedProcess(command, 0, printed, "")

    monkeypatch.setattr(devices.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(devices.subprocess, "run", run)
    assert devices._forked_without_exec.__wrapped__(os.getpid()) is expected


def _mac(monkeypatch):
    """A Mac whose Metal must not be touched in a forked process."""

    def accelerator(check_available=False):
        assert not devices.in_forked_child(), "Metal was asked for its devices in a forked process"
        return torch.device("mps")

    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)


def _picked(name="auto"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=devices.pick, args=(name,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        picked = devices.pick(name)
    return picked, [(warning.category.__name__, warning.filename, str(warning.message)) for warning in caught]


def test_auto_in_a_forked_process_on_a_mac_is_the_cpu_with_one_warning(monkeypatch):
    _mac(monkeypatch)
    assert devices.found() == [CPU, torch.device("mps:0")]
    assert _picked() == (torch.device("mps:0"), [])

    def in_child():
        assert devices.found() == [CPU]
        picked, ((category, filename, message),) = _picked()
        assert picked == CPU
        assert category == "RuntimeWarning"
        assert filename != devices.__file__
        assert f"process {os.getpid()} was forked" in message
        for way in (
            "Metal does not work in a forked process; using the CPU",
            "omniops.sam2.remote",
            "waitress",
            "'cpu'",
        ):
            assert way in message
        assert _picked() == (CPU, [])
        assert _picked("cpu") == (CPU, [])
        return "as expected"

    assert _forked(in_child) == "as expected"
    # A process warns of itself, whatever its parent has warned of.
    assert _forked(lambda: (_picked(), _forked(in_child))[1]) == "as expected"


def test_the_environment_that_forces_the_cpu_leaves_nothing_to_warn_of(monkeypatch):
    _mac(monkeypatch)
    monkeypatch.setenv("SAM2_DEMO_FORCE_CPU_DEVICE", "1")
    assert _forked(_picked) == "(device(type='cpu'), [])"


@pytest.mark.parametrize(
    ("name", "wanted", "start"), [("mps", "", "no"), ("mps:0", "", "no"), ("auto", "mps", "OMNIOPS_DEVICE: no")]
)
def test_mps_by_name_in_a_forked_process_is_an_error(monkeypatch, name, wanted, start):
    _mac(monkeypatch)
    monkeypatch.setenv("OMNIOPS_DEVICE", wanted)
    assert devices.pick(name) == torch.device("mps:0")

    def in_child():
        with pytest.raises(
            ValueError, match=f"^{start} device 'mps(:0)?' in this process: process {os.getpid()} was forked"
        ) as caught:
            devices.pick(name)
        return caught.value

    message = _forked(in_child)
    for way in ("omniops.sam2.remote", "waitress, uvicorn", "'cpu'", "SAM2_DEMO_FORCE_CPU_DEVICE=1"):
        assert way in message


@pytest.mark.parametrize("is_bad", [True, False])
def test_cuda_is_lost_where_the_parent_used_it_and_nowhere_else(monkeypatch, is_bad):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: is_bad)

    def in_child():
        picked, caught = _picked()
        if not is_bad:
            assert (picked, caught) == (torch.device("cuda:0"), [])
            assert devices.pick("cuda:1") == torch.device("cuda:1")
            return "as expected"
        ((_, _, message),) = caught
        assert picked == CPU
        assert "CUDA does not work where the parent used it before the fork; using the CPU" in message
        assert "use CUDA only after the fork" in message
        with pytest.raises(ValueError, match=r"^no device 'cuda:1' in this process: .* was forked"):
            devices.pick("cuda:1")
        with pytest.raises(ValueError, match=r"^no device 'mps' for PyTorch"):
            devices.pick("mps")
        return "as expected"

    assert _forked(in_child) == "as expected"


# Autocast.
