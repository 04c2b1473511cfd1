"""Devices: chosen by name, by the environment and in forked processes; autocast, memory, waiting."""

import contextlib
import mmap
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import traceback
import warnings
from types import SimpleNamespace

import pytest
import torch

from omniops import device as devices

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch):
    monkeypatch.delenv("OMNIOPS_DEVICE", raising=False)
    monkeypatch.delenv("SAM2_DEMO_FORCE_CPU_DEVICE", raising=False)


def _have(monkeypatch, *names):
    here = [torch.device(name) for name in names]
    monkeypatch.setattr(devices, "found", lambda: here)


def test_the_cpu_is_found_first_and_picked_by_name():
    assert devices.found()[0] == CPU
    assert devices.pick("cpu") == CPU
    assert devices.pick(CPU) == CPU


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (["cpu"], "cpu"),
        (["cpu", "cuda:0", "cuda:1"], "cuda:0"),
        (["cpu", "mps:0"], "mps:0"),
        (["cpu", "xpu:0", "mps:0", "cuda:0"], "cuda:0"),
        (["cpu", "xpu:0", "mps:0"], "mps:0"),
        (["cpu", "xpu:0", "xpu:1"], "xpu:0"),
    ],
)
def test_auto_is_cuda_then_mps_then_any_other_accelerator_then_the_cpu(monkeypatch, here, expected):
    _have(monkeypatch, *here)
    assert devices.pick() == devices.pick("auto") == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "expected"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("mps", "mps:0"), ("cpu:0", "cpu")]
)
def test_a_name_picks_the_device_found_under_it(monkeypatch, name, expected):
    _have(monkeypatch, "cpu", "cuda:0", "cuda:1", "mps:0")
    assert devices.pick(name) == devices.pick(torch.device(name)) == torch.device(expected)


@pytest.mark.parametrize("name", ["foo", "cuda:x", "", "Auto"])
def test_a_name_that_is_no_devices_is_refused(name):
    with pytest.raises(ValueError, match=rf"^unknown device '{name}': found here are cpu"):
        devices.pick(name)


@pytest.mark.parametrize("name", ["cuda:3", "xla", "meta", "cpu:1"])
def test_a_device_that_is_not_here_is_refused(monkeypatch, name):
    _have(monkeypatch, "cpu", "cuda:0")
    with pytest.raises(ValueError, match=rf"^no device '{name}' .* found here are cpu, cuda:0"):
        devices.pick(name)


@pytest.mark.parametrize(
    ("wanted", "forced", "expected"),
    [
        ("cuda:1", "", "cuda:1"),
        ("cpu", "0", "cpu"),
        ("auto", "", "cuda:0"),
        ("", "", "cuda:0"),
        ("0", "0", "cuda:0"),
        ("", "1", "cpu"),
        ("cuda:1", "1", "cpu"),
    ],
)
def test_the_environment_says_what_auto_is_and_no_more(monkeypatch, wanted, forced, expected):
    _have(monkeypatch, "cpu", "cuda:0", "cuda:1", "mps:0")
    monkeypatch.setenv("OMNIOPS_DEVICE", wanted)
    monkeypatch.setenv("SAM2_DEMO_FORCE_CPU_DEVICE", forced)
    assert devices.pick("auto") == torch.device(expected)
    assert devices.pick("mps") == torch.device("mps:0")


@pytest.mark.parametrize(("wanted", "message"), [("foo", "unknown device 'foo'"), ("cuda:3", "no device 'cuda:3'")])
def test_a_wrong_name_in_the_environment_is_told_apart(monkeypatch, wanted, message):
    _have(monkeypatch, "cpu", "cuda:0")
    monkeypatch.setenv("OMNIOPS_DEVICE", wanted)
    with pytest.raises(ValueError, match=f"^OMNIOPS_DEVICE: {message}"):
        devices.pick()


# Forked processes. Each test's last lines run in one.


def _forked(function):
    """What the function returns in a forked process, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = str(function())
        except BaseException:
            told = traceback.format_exc()
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


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
    told = []
    thread = threading.Thread(target=lambda: told.append(devices.in_forked_child()))
    thread.start()
    thread.join()
    assert told == [False]
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
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        picked = devices.pick(name)
    return picked, [(each.category.__name__, each.filename, str(each.message)) for each in caught]


def test_auto_in_a_forked_process_on_a_mac_is_the_cpu_with_one_warning(monkeypatch):
    _mac(monkeypatch)
    assert devices.found() == [CPU, torch.device("mps:0")]
    assert _picked() == (torch.device("mps:0"), [])

    def seen():
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

    assert _forked(seen) == "as expected"
    # A process warns of itself, whatever its parent has warned of.
    assert _forked(lambda: (_picked(), _forked(seen))[1]) == "as expected"


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

    def seen():
        with pytest.raises(
            ValueError, match=f"^{start} device 'mps(:0)?' in this process: process {os.getpid()} was forked"
        ) as caught:
            devices.pick(name)
        return caught.value

    message = _forked(seen)
    for way in ("omniops.sam2.remote", "waitress, uvicorn", "'cpu'", "SAM2_DEMO_FORCE_CPU_DEVICE=1"):
        assert way in message


@pytest.mark.parametrize("is_bad", [True, False])
def test_cuda_is_lost_where_the_parent_used_it_and_nowhere_else(monkeypatch, is_bad):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: is_bad)

    def seen():
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

    assert _forked(seen) == "as expected"


# Autocast.


def _bfloat16_of(monkeypatch, machine, mkldnn, **names):
    monkeypatch.setattr(devices.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn is not None)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: mkldnn))
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**{name: (lambda yes=yes: yes) for name, yes in names.items()}))


@pytest.mark.parametrize(
    ("machine", "mkldnn", "names", "expected"),
    [
        ("x86_64", True, {"_is_avx512_bf16_supported": True, "_is_amx_tile_supported": False}, True),
        ("AMD64", True, {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}, True),
        ("x86_64", True, {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": False}, False),
        ("x86_64", True, {}, False),  # a torch that has renamed them
        ("x86_64", None, {"_is_avx512_bf16_supported": True}, False),
        ("aarch64", True, {}, True),
        ("aarch64", False, {}, False),
        ("arm64", None, {}, False),  # macOS
    ],
)
def test_autocast_on_the_cpu_is_for_processors_with_bfloat16(monkeypatch, machine, mkldnn, names, expected):
    _bfloat16_of(monkeypatch, machine, mkldnn, **names)
    assert devices.autocast_dtype("cpu") == (torch.bfloat16 if expected else torch.float32)
    with devices.autocast("cpu"):
        assert torch.is_autocast_enabled("cpu") is expected


def test_autocast_on_this_cpu_computes_in_what_it_says():
    x = torch.randn(3, 3)
    with devices.autocast("cpu"):
        assert (x @ x).dtype == devices.autocast_dtype(CPU)
    with devices.autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16), devices.autocast("cpu", torch.float32):
        assert (x @ x).dtype == torch.bfloat16  # off means nothing done, not another's undone
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_autocast_on_cuda(monkeypatch, has_bfloat16, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device)))

    def supported(including_emulation=True):
        return has_bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert devices.autocast_dtype("cuda:1") == expected
    assert asked == [torch.device("cuda:1")]


def test_autocast_on_mps_is_float16():
    assert devices.autocast_dtype("mps") == torch.float16
    with devices.autocast("mps"):
        assert torch.is_autocast_enabled("mps")
        assert torch.get_autocast_dtype("mps") == torch.float16


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("device", ["cuda", "mps", "xpu", "hpu", "mtia", "meta", "vulkan", "privateuseone"])
def test_autocast_is_never_an_error(device):
    dtype = devices.autocast_dtype(device)
    assert dtype in (torch.float32, torch.float16, torch.bfloat16)
    with devices.autocast(device):
        x = torch.ones(2, 2)
        assert (x @ x).dtype == torch.float32  # the CPU is not meant
    if device in ("meta", "vulkan"):
        assert dtype == torch.float32
        with devices.autocast(device, torch.float16):
            pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_autocast_refuses_other_dtypes(dtype):
    with pytest.raises(ValueError, match=f"dtype must be one of torch.float32, .*, got {dtype}"):
        devices.autocast("cpu", dtype)


# Memory, and the rest that differs between devices.


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
    told = {"memory_allocated": 1, "memory_reserved": 2, "max_memory_allocated": 4}
    module = {name: (lambda device, value=value: value + 10 * device.index) for name, value in told.items()}
    module["get_device_properties"] = lambda device: SimpleNamespace(total_memory=3 + 10 * device.index)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**module))
    assert devices.memory("cuda:1") == devices.Memory(allocated=11, reserved=12, limit=13, peak=14)


def test_the_memory_of_mps(monkeypatch):
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 1)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3)

    def fails(device):
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    for most, peak in ((lambda device: 4, 4), (fails, None)):
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", most, raising=False)
        assert devices.memory("mps") == (1, 2, 3, peak)
    monkeypatch.delattr(torch.accelerator, "max_memory_allocated")
    assert devices.memory("mps").peak is None


def test_the_memory_of_devices_that_do_not_tell(monkeypatch):
    assert devices.memory("meta") == (None, None, None, None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert devices.memory("mtia") == (None, None, None, None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_there_is_nothing_to_wait_for_and_no_cache(device):
    devices.synchronize(device)
    devices.empty_cache(device)


def test_waiting_and_giving_memory_back(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "synchronize", done.append)
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(empty_cache=lambda: done.append("emptied"))
    )
    devices.synchronize("mps")
    devices.empty_cache("mps")
    assert done == [torch.device("mps"), "emptied"]
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    devices.empty_cache("mtia")


def test_seeding(monkeypatch):
    devices.manual_seed("cpu", 3)
    first = torch.rand(4)
    devices.manual_seed(CPU, 3)
    assert torch.equal(torch.rand(4), first)
    devices.manual_seed("meta", 3)
    seeded = []
    one = SimpleNamespace(manual_seed=lambda seed: seeded.append(("one", seed)))
    both = SimpleNamespace(manual_seed_all=lambda seed: seeded.append(("all", seed)), **vars(one))
    for module in (one, both):
        monkeypatch.setattr(torch, "get_device_module", lambda device, module=module: module)
        before = torch.get_rng_state()
        devices.manual_seed("mps", 5)
        assert torch.equal(torch.get_rng_state(), before)
    assert seeded == [("one", 5), ("all", 5)]


def _on_a_mac(monkeypatch, told):
    def run(command, **kwargs):
        assert command == ("sysctl", "-n", "machdep.cpu.brand_string")
        if told is None:
            raise FileNotFoundError("sysctl")
        return subprocess.CompletedProcess(command, 0 if told else 1, told, "")

    _files(monkeypatch, {})
    monkeypatch.setattr(devices.subprocess, "run", run)


def test_the_title_of_a_mac_is_its_chips(monkeypatch):
    _on_a_mac(monkeypatch, "Apple M2 Pro\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert devices.title(CPU) == "Apple M2 Pro, 8 threads"
    assert devices.title(torch.device("mps")) == "Apple M2 Pro"


@pytest.mark.parametrize("told", ["", None])
def test_the_title_where_nothing_tells_it(monkeypatch, told):
    _on_a_mac(monkeypatch, told)
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "riscv64")
    assert devices.title(CPU).startswith("riscv64, ")
    assert devices.title(torch.device("mps")) == "Apple GPU"


@pytest.mark.parametrize(("threads", "words"), [(1, ", 1 thread"), (2, ", 2 threads"), (8, ", 8 threads")])
def test_the_title_of_this_cpu(monkeypatch, threads, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert devices.title(CPU).endswith(words)
