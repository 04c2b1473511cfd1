"""Memory that nothing wrote: kernels and operators that read it, and launch code that returns it."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import emulator
import pytest
import torch
from emulator import KernelError
from problems import DeformConv2d, arguments, doubled, error
from test_emulator import COPY, compiled
from torch import Tensor

from omniops.backends import prepared
from omniops.backends.mps import deform_conv2d as metal
from omniops.backends.reference import deform_conv2d as reference

SOME = """kernel void some(device float* out, uint i [[thread_position_in_grid]]) { if (i != 3) out[i] = 1; }
kernel void twice(device float* out, uint i [[thread_position_in_grid]]) { out[i] *= 2; }"""


def test_what_nothing_wrote() -> None:
    library = compiled(COPY + SOME)
    with emulator.poisoned():
        unwritten, out = torch.empty(4, 5), torch.empty(20)
        with pytest.raises(KernelError, match="reads memory that nothing wrote: argument 0"):
            library.copy(unwritten, out)
        library.some(unwritten)
        with pytest.raises(AssertionError, match=re.escape("nothing wrote 1 of 20 elements, first [0, 3]")):
            emulator.assert_written(unwritten)
        with pytest.raises(KernelError, match="reads memory that nothing wrote"):
            library.copy(unwritten, out)
        unwritten[0, 3] = 2  # PyTorch's operators write too
        library.copy(unwritten, out)
        emulator.assert_written(out)
        assert out.sum().item() == 21
    library.copy(unwritten, out)


def partly() -> Tensor:
    """Four elements, of which nothing wrote the last."""
    out = torch.empty(4)
    compiled(COPY + SOME).some(out)
    return out


@pytest.mark.parametrize(
    "read",
    [
        lambda out: out + 1,
        lambda out: out.add_(1),
        lambda out: out.clone(),
        lambda out: out.half(),
        lambda out: out[2:].sum(),
        lambda out: torch.cat([out[:2], out[3:]]),
        lambda out: torch.zeros(4).copy_(out),
        lambda out: torch.baddbmm(out.view(1, 2, 2), *[torch.zeros(1, 2, 2)] * 2, out=out.view(1, 2, 2)),
        lambda out: compiled(COPY + SOME).twice(out),
    ],
)
def test_what_reads_memory_that_nothing_wrote(read: Callable[[Tensor], object]) -> None:
    with (
        emulator.poisoned(),
        pytest.raises((AssertionError, KernelError), match="nothing wrote"),
    ):
        read(partly())


def test_what_reads_what_is_written_only_or_nothing() -> None:
    with emulator.poisoned():
        for use in (
            lambda out: out[:3] + 1,
            lambda out: out.view(2, 2)[0].clone(),
            lambda out: torch.zeros_like(out) + torch.ones_like(out),
            lambda out: out.new_zeros(3).sum(),
            lambda out: out.fill_(1).sum(),
            lambda out: out.copy_(torch.ones(4)).sum(),
            lambda out: torch.add(torch.ones(4), 1, out=out).sum(),
            lambda out: torch.bmm(torch.ones(1, 2, 2), torch.ones(1, 2, 2), out=out.view(1, 2, 2)).sum(),
        ):
            assert not use(partly()).isnan().any()


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda: partly(), "result 0: nothing wrote 1 of 4 elements, first [3]"),
        (lambda: (torch.ones(3), partly().view(2, 2)), "result 1: nothing wrote 1 of 4 elements, first [1, 1]"),
        (lambda: partly().view(2, 2).t().contiguous(), "aten.clone.default reads what nothing"),
        (lambda: torch.empty(2, 0, 3).sum() + torch.empty(1, dtype=torch.int32), "reads what nothing wrote"),
    ],
)
def test_launch_code_that_returns_what_nothing_wrote(launch: Callable[[], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        emulator.launched(launch)


def test_launch_code_that_writes_all_of_its_results() -> None:
    kernels = compiled(COPY)

    def copied(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor, None]:
        out, none = torch.empty(x.shape), torch.empty(0, 4)
        kernels.copy(x, out)
        return out.contiguous(memory_format=torch.channels_last) if channels_last else out, none, None

    x = torch.randn(2, 3, 4, 5)
    for channels_last in (False, True):
        out, none, nothing = emulator.launched(copied, x, channels_last=channels_last)
        assert torch.equal(out, x)
        assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert none.shape == (0, 4)
        assert nothing is None


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("into_views", [False, True], ids=["shipped", "planted"])
def test_a_matrix_product_that_does_not_write_into_a_view(
    into_views: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``torch.bmm`` on macOS 14, for an ``out`` that begins within its storage."""
    product = torch.bmm

    def bmm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None or out.storage_offset() == 0:
            return product(a, b, out=out)
        product(a, b)
        return out

    monkeypatch.setattr(torch, "bmm", bmm)
    args = arguments("deform_conv2d", DeformConv2d(3, 8, 4, 5, 8), torch.float32)
    args[0] = args[0].contiguous(memory_format=torch.channels_last)
    if not bias:
        args[3] = None
    forward = prepared(replace(metal._COLUMNS, max_bytes=1, products_of_views=into_views).forward)
    if into_views:
        with pytest.raises(AssertionError, match=r"nothing wrote:? \d+ of \d+ elements"):
            emulator.launched(forward, *args)
    else:
        result = emulator.launched(forward, *args)
        assert error(result, reference.deform_conv2d(*doubled(args))) < 1e-5
