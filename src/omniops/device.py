"""Devices: choosing one by name, also in a forked process, and what differs between them: autocast, memory, waiting."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from omniops import _torch_private

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

FORCE_CPU = "SAM2_DEMO_FORCE_CPU_DEVICE"
"""The environment variable of SAM 2's web demo that makes ``auto`` the CPU."""
WANTED = "OMNIOPS_DEVICE"
"""The environment variable that names the device that ``auto`` is."""

_AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WITHOUT_MODULE = ("cpu", "meta")  # nothing to wait for, and no cache

# Linux: PF_FORKNOEXEC of include/linux/sched.h. macOS: P_EXEC of sys/proc.h.
_LINUX_FORKED_AND_NO_EXEC = 0x40
_MACOS_EXEC = 0x4000


def found() -> list[torch.device]:
    """The devices of this machine that PyTorch can use in this process: the CPU first, then every accelerator.

    Example:
        >>> found()[0]
        device(type='cpu')
    """
    devices = [torch.device("cpu")]
    if _lost_in_fork() is not None:
        return devices
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices += [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]
    return devices


def pick(name: str | torch.device = "auto") -> torch.device:
    """The device of that name.

    ``auto`` is the first CUDA GPU, else Apple's GPU (MPS), else any other accelerator that PyTorch reports, else the
    CPU. The environment may say otherwise, of ``auto`` alone: SAM2_DEMO_FORCE_CPU_DEVICE=1 makes it the CPU, or else
    OMNIOPS_DEVICE names the device; empty and 0 are as good as not set. In a forked process whose accelerator did not
    survive the fork (see ``in_forked_child``), ``auto`` is the CPU, with one RuntimeWarning in each process.

    Args:
        name: ``auto``, or a device as PyTorch writes it: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...

    Raises:
        ValueError: for a name that is no device's, a device that this machine does not have, or one that did not
            survive the fork. The name in OMNIOPS_DEVICE counts as asked for.

    Example:
        >>> pick("cpu")
        device(type='cpu')
        >>> device = pick()  # the GPU, where there is one
    """
    asked, origin = str(name), ""
    if asked == "auto":
        if _setting(FORCE_CPU):
            return torch.device("cpu")
        if wanted := _setting(WANTED):
            asked, origin = wanted, f"{WANTED}: "
    lost = _lost_in_fork()
    available = found()
    if asked == "auto":
        if lost is not None:
            _warn_once(f"{_why_lost(lost)}; using the CPU. {_ways_out(lost)}")
        # min takes the first of equals: the lowest index.
        return min(available, key=lambda candidate: {"cuda": 0, "mps": 1, "cpu": 3}.get(candidate.type, 2))
    names = ", ".join(map(str, available))
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ValueError(f"{origin}unknown device {asked!r}: found here are {names}") from None
    if device.type == lost:
        raise ValueError(f"{origin}no device {asked!r} in this process: {_why_lost(lost)}. {_ways_out(lost)}")
    matching = [
        candidate
        for candidate in available
        if candidate.type == device.type and device.index in (None, candidate.index or 0)
    ]
    if not matching:
        raise ValueError(
            f"{origin}no device {asked!r} for PyTorch {torch.__version__} on this machine: found here are {names}"
        )
    return matching[0]


def in_forked_child() -> bool:
    """Whether this process was forked from another and has not started a program of its own (exec) since.

    So are the workers of gunicorn and uWSGI, and what multiprocessing starts by fork or forkserver; what subprocess, a
    shell or multiprocessing's spawn starts is not. The accelerator of such a process may be unusable: Metal's is,
    whatever the parent did, and CUDA's if the parent had used it.

    A fork after the import of this module is always known. A fork before it, as of a gunicorn worker without --preload,
    is known where the system tells: Linux in /proc, macOS through ``ps``, which an App Sandbox forbids. Where nothing
    tells, the answer is False.

    Example:
        >>> in_forked_child()  # of a process that was started as programs are
        False
    """
    return _forked_since_import or _forked_without_exec(os.getpid())


def autocast_dtype(device: torch.device | str) -> torch.dtype:
    """What ``autocast`` computes in on the device: float32 means that it is off.

    bfloat16 on CUDA that has it and float16 on older; float16 on MPS; on the CPU bfloat16 if the processor has
    instructions for it that PyTorch uses (AVX512-BF16, AMX, Arm's BF16), else float32; elsewhere PyTorch's own choice,
    float32 if it has none.

    Example:
        >>> autocast_dtype("mps")
        torch.float16
    """
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return torch.float32
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    if torch.amp.is_autocast_available(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def autocast(device: torch.device | str, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """``torch.autocast`` for the device, or a context that does nothing where that is off or the device has none.

    Args:
        device: any; none is an error.
        dtype: float16, bfloat16, or float32 for off; by default that of ``autocast_dtype``.

    Raises:
        ValueError: for another dtype.

    Example:
        >>> with autocast("cpu", torch.bfloat16):
        ...     torch.nn.functional.linear(torch.ones(1, 4), torch.ones(2, 4)).dtype
        torch.bfloat16
    """
    device = torch.device(device)
    if dtype is None:
        dtype = autocast_dtype(device)
    if dtype not in _AUTOCAST_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _AUTOCAST_DTYPES))}, got {dtype}")
    if dtype == torch.float32 or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    try:
        return torch.autocast(device.type, dtype=dtype)
    except (RuntimeError, AssertionError):  # a device of another package, without what autocast asks of it
        return nullcontext()


class Memory(NamedTuple):
    """Bytes of memory; None where neither PyTorch nor the system tells.

    Example:
        >>> Memory(allocated=2**20, reserved=None, limit=2**30, peak=2**21).allocated
        1048576
    """

    allocated: int | None
    """In tensors now; on the CPU everything of this process that is resident."""
    reserved: int | None
    """What PyTorch's allocator holds, tensors and cache; on MPS everything that Metal's driver gave this process. None
    on the CPU, whose allocator keeps nothing."""
    limit: int | None
    """All that the GPU has; on MPS what Metal recommends not to exceed; on the CPU the machine's physical memory, or
    what the control group of the process (a container's) may have, if that is less."""
    peak: int | None
    """The most that ``allocated`` has been. None on MPS before PyTorch counts it there."""


def memory(device: torch.device | str) -> Memory:
    """How much memory of the device this process has and had, and how much there is.

    Example:
        >>> memory("cpu").limit > 0
        True
    """
    device = torch.device(device)
    if device.type == "cpu":
        resident, peak = _resident()
        return Memory(resident, None, _cpu_limit(), peak)
    if device.type == "meta":
        return Memory(None, None, None, None)
    if device.type == "mps":
        return Memory(
            torch.mps.current_allocated_memory(),
            torch.mps.driver_allocated_memory(),
            torch.mps.recommended_max_memory(),
            _mps_peak(device),
        )
    module = torch.get_device_module(device)

    def figure(name: str) -> int | None:
        return int(getattr(module, name)(device)) if hasattr(module, name) else None

    properties = module.get_device_properties(device) if hasattr(module, "get_device_properties") else None
    limit = getattr(properties, "total_memory", None)
    return Memory(figure("memory_allocated"), figure("memory_reserved"), limit, figure("max_memory_allocated"))


def exclusive(device: torch.device | str) -> AbstractContextManager[Any]:
    """A lock around Apple's GPU, which a thread may enter again; on other devices it does nothing.

    Up to 2.14 PyTorch ends the process where two threads use MPS at once (pytorch issue 197805). The predictors of
    ``omniops.sam2``, ``synchronize`` and ``empty_cache`` take it; so should whoever uses tensors there beside them.

    Example:
        >>> with exclusive("mps"):
        ...     pass
    """
    return _mps if torch.device(device).type == "mps" else nullcontext()


def exclusively(method: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """A method of an object that has a ``device``, within ``exclusive``."""

    @functools.wraps(method)
    def within(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with exclusive(args[0].device):  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return within


def without_single_row(rows: Tensor) -> Tensor:
    """What a linear layer is given for ``rows``, (N, ...): themselves, but on MPS a single row twice.

    Before torch 2.14 PyTorch drops the bias of a single row there, on macOS 26 (pytorch issue 188438). The caller takes
    the first N results.
    """
    return torch.cat((rows, rows)) if rows.device.type == "mps" and len(rows) == 1 else rows


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all that was asked of it; the CPU always has.

    Example:
        >>> synchronize(pick())  # before a clock is read
    """
    device = torch.device(device)
    if device.type not in _WITHOUT_MODULE:
        with exclusive(device):
            torch.accelerator.synchronize(device)


def empty_cache(device: torch.device | str) -> None:
    """Give the memory that PyTorch keeps for later tensors of the device back to the system, if it keeps any.

    Example:
        >>> empty_cache(pick())
    """
    device = torch.device(device)
    if device.type in _WITHOUT_MODULE:
        return
    # Not torch.accelerator's: torch 2.7 has none, and some later ones fail on MPS.
    module = torch.get_device_module(device)
    if hasattr(module, "empty_cache"):
        with exclusive(device):
            module.empty_cache()


def manual_seed(device: torch.device | str, seed: int) -> None:
    """Seed the random numbers drawn on the device and others of its kind, and no other's.

    Example:
        >>> manual_seed("cpu", 0)
        >>> torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
        True
    """
    device = torch.device(device)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type not in _WITHOUT_MODULE:
        module = torch.get_device_module(device)
        getattr(module, "manual_seed_all", module.manual_seed)(seed)


def title(device: torch.device) -> str:
    """What the hardware calls itself, as far as PyTorch can say: "NVIDIA H200", "Apple M2", "Apple M2, 8 threads".

    Example:
        >>> title(torch.device("cpu")).endswith("threads" if torch.get_num_threads() > 1 else "thread")
        True
    """
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}"
    if device.type == "mps":
        return _apple_chip() or "Apple GPU"
    return str(torch.get_device_module(device).get_device_name(device))


_forked_since_import = False
_warning = threading.Lock()  # taken by whoever warns, and never given back
_mps = threading.RLock()


def _after_fork() -> None:
    global _forked_since_import, _mps, _warning
    _forked_since_import = True
    _mps, _warning = threading.RLock(), threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _forked_without_exec(pid: int) -> bool:
    """Whether the system says so of this process; cached by its id, so that no child gets its parent's answer."""
    if platform.system() == "Darwin":
        flags = re.fullmatch("[0-9a-fA-F]+", _ps("flags"))
        return flags is not None and not int(flags[0], 16) & _MACOS_EXEC
    fields = _read("/proc/self/stat").rpartition(")")[2].split()  # what stands before may hold spaces
    return len(fields) > 6 and bool(int(fields[6]) & _LINUX_FORKED_AND_NO_EXEC)


def _lost_in_fork() -> str | None:
    """The type of the accelerator that this process cannot use because it was forked."""
    # In a forked process even to ask Metal for its devices may crash, so no question is asked that leads there.
    if torch.backends.mps.is_built() and in_forked_child():
        return "mps"
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    is_lost = _torch_private.is_in_bad_fork(torch.get_device_module(accelerator))
    return accelerator.type if is_lost else None


def _why_lost(lost: str) -> str:
    forked = f"process {os.getpid()} was forked from another, as gunicorn's workers are, and"
    if lost == "mps":
        return f"{forked} Metal does not work in a forked process"
    return f"{forked} {lost.upper()} does not work where the parent used it before the fork"


def _ways_out(lost: str) -> str:
    later = "" if lost == "mps" else f"use {lost.upper()} only after the fork, or "
    return (
        f"To use the GPU {later}run the model in a process of its own (omniops.sam2.remote) or serve without forking "
        f"(waitress, uvicorn); for the CPU without this message ask for 'cpu' or set {FORCE_CPU}=1."
    )


def _warn_once(message: str) -> None:
    if _warning.acquire(blocking=False):
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _setting(variable: str) -> str:
    """Its value, nothing where it is not set."""
    value = os.environ.get(variable, "").strip()
    return "" if value == "0" else value


def _cpu_has_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():  # whose kernels are the ones that use those instructions
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # Not mkldnn's own answer, which is yes where it would have to emulate them.
        return _torch_private.x86_has_bfloat16()
    return _torch_private.mkldnn_has_bfloat16()


def _mps_peak(device: torch.device) -> int | None:
    max_allocated = getattr(torch.accelerator, "max_memory_allocated", None)
    if max_allocated is None:
        return None
    try:
        return int(max_allocated(device))
    except RuntimeError:  # where MPS has no part in it yet
        return None


def _resident() -> tuple[int | None, int | None]:
    """The bytes of this process in memory, and the most there have been."""
    status = dict(line.split(":", 1) for line in _read("/proc/self/status").splitlines() if ":" in line)
    if "VmRSS" in status and "VmHWM" in status:
        # Not getrusage's peak, which on Linux starts from that of the process that started this one.
        now, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    if platform.system() != "Darwin":
        return None, None
    import resource

    now_in_kib = _ps("rss")
    return int(now_in_kib) * 1024 if now_in_kib else None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cpu_limit() -> int | None:
    try:
        physical = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):
        physical = []
    return min([*physical, *_control_group_limits()], default=None)


def _control_group_limits() -> Iterator[int]:
    """Of this process's control group on Linux and of those that it is part of, versions 1 and 2."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(root + path)
        for folder in (group, *group.parents):
            limit = _read(folder / name).strip()
            if limit.isdigit():  # "max" is none
                yield int(limit)


def _read(path: str | Path) -> str:
    """A file of the system, nothing where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or _apple_chip() or platform.processor() or platform.machine()


def _apple_chip() -> str:
    """ "Apple M2", CPU and GPU in one; nothing where the system is no macOS."""
    return _output_of("sysctl", "-n", "machdep.cpu.brand_string")


def _ps(column: str) -> str:
    """What ``ps`` says of this process; nothing where it may not."""
    return _output_of("ps", "-o", f"{column}=", "-p", str(os.getpid()))


def _output_of(*command: str) -> str:
    """What a command prints, nothing where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
