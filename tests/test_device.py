"""Devices: chosen by name and by the environment; autocast, waiting, seeding."""

import contextlib
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
    devices_found = [torch.device(name) for name in names]
    monkeypatch.setattr(devices, "found", lambda: devices_found)


def test_the_cpu_is_found_first_and_picked_by_name():
    assert devices.found()[0] == CPU
    assert devices.pick("cpu") == CPU
    assert devices.pick(CPU) == CPU


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (["cpu"], "cpu"),
        (["cpu", "cuda:0", "cuda:1"], "cuda:0"),
        (["cpu", "mps:0"], "mps:0"),
        (["cpu", "xpu:0", "mps:0", "cuda:0"], "cuda:0"),
        (["cpu", "xpu:0", "mps:0"], "mps:0"),
        (["cpu", "xpu:0", "xpu:1"], "xpu:0"),
    ],
)
def test_auto_is_cuda_then_mps_then_any_other_accelerator_then_the_cpu(monkeypatch, available, expected):
    _have(monkeypatch, *available)
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
def test_the_error_says_that_a_wrong_name_is_from_the_environment(monkeypatch, wanted, message):
    _have(monkeypatch, "cpu", "cuda:0")
    monkeypatch.setenv("OMNIOPS_DEVICE", wanted)
    with pytest.raises(ValueError, match=f"^OMNIOPS_DEVICE: {message}"):
        devices.pick()


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
    all_devices = SimpleNamespace(manual_seed_all=lambda seed: seeded.append(("all", seed)), **vars(one))
    for module in (one, all_devices):
        monkeypatch.setattr(torch, "get_device_module", lambda device, module=module: module)
        before = torch.get_rng_state()
        devices.manual_seed("mps", 5)
        assert torch.equal(torch.get_rng_state(), before)
    assert seeded == [("one", 5), ("all", 5)]
