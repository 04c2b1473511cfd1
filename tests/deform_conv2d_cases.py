"""Arguments of deform_conv2d's kernels, and how they are held against the reference: for the tests of all backends."""

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import backend_cases
import pytest
import torch
from backend_cases import TOLERANCES, assert_near, interpreted, map_tensors, shifted, sliced
from operator_sizes import DeformConv2d as Case

import omniops.ops.deform_conv2d  # noqa: F401  registers the operator
from omniops.backends import prepared
from omniops.backends.columns import Columns
from omniops.backends.reference import deform_conv2d as reference

GRADIENTS = ("by_input", "by_offset", "by_weight", "by_bias", "by_mask")


def kernels(backend):
    return import_module(f"omniops.backends.{backend}.deform_conv2d")


def problem(case, dtype, seed=0, offsets=None):
    """The tensors of a case. Offsets are odd sixteenths: exact in every dtype, and no sample lies on a pixel, where the
    last digit of its position would decide on its derivative."""
    generator = torch.Generator().manual_seed(seed)
    taps, size = case.kernel_size[0] * case.kernel_size[1], case.out_size

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    if offsets is None:
        moves = torch.randint(-40, 40, (case.n, case.offset_groups * taps * 2, *size), generator=generator)
        offsets = (2 * moves + 1) / 16
    return SimpleNamespace(
        input=normal(case.n, case.c, case.h, case.w),
        offset=offsets.to(dtype),
        weight=normal(case.c_out, case.c // case.groups, *case.kernel_size),
        bias=normal(case.c_out),
        mask=normal(case.n, case.offset_groups * taps, *size) if case.masked else None,
        grad=normal(case.n, case.c_out, *size),
    )


def results(module, case, x):
    """What both operators of a backend return."""
    wanted = [True, True, True, True, x.mask is not None]
    gradients = module.deform_conv2d_backward(x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, wanted)
    return {
        "out": module.deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers),
        **dict(zip(GRADIENTS, gradients, strict=True)),
    }


def assert_right(module, device, case, tensors, layout=lambda tensor: tensor):
    """Returns the results. Errors are relative to the scale of the result, which leaves out what is not finite: that
    must be the same."""
    dtype = tensors.input.dtype
    expected = results(reference, case, map_tensors(torch.Tensor.double, tensors))
    found = results(module, case, map_tensors(lambda tensor: layout(tensor.to(device)), tensors))
    for name, wanted in expected.items():
        result = found[name]
        assert result.dtype == dtype, name
        assert_near(name, result, wanted, TOLERANCES[dtype])
    return found


def channels_last(tensor):
    return backend_cases.channels_last(tensor) if tensor.dim() == 4 else tensor


def shifted_channels_last(tensor):
    return shifted(tensor.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


def transposed(tensor):
    return backend_cases.transposed(tensor) if tensor.dim() == 4 else tensor


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels_last": channels_last,
    "shifted": shifted,
    "shifted_channels_last": shifted_channels_last,
    "sliced": sliced,
    "transposed": transposed,
}


# Groups and offset groups of which neither divides the other; a stride, padding and dilation of its own for each axis.
UNEVEN = Case(2, 12, 6, 7, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, offset_groups=3)


# The same for channels in runs of 16, as the fused kernel of CUDA takes them: a run begins in each offset group, not in
# each weight group.
FUSED = Case(2, 96, 3, 3, 20, (2, 3), groups=2, offset_groups=3)


def uneven(backend, device):
    return UNEVEN._replace(h=3, w=4) if interpreted(backend, device) else UNEVEN


def in_chunks(module, max_bytes):
    """The operators of a backend with columns of so many bytes; they fail where memory for more is taken."""
    found = [value for value in vars(module).values() if isinstance(value, Columns)]
    if not found:
        pytest.skip(f"{module.__name__} has no columns")

    def bounded(kernel, columns_at):
        def call(*args):
            columns = args[columns_at]
            assert columns.shape[1] == 1 or columns.untyped_storage().nbytes() <= max_bytes
            kernel(*args)

        return call

    columns = replace(
        found[0],
        max_bytes=max_bytes,
        sample=bounded(found[0].sample, 5),
        gradients=bounded(found[0].gradients, 0),
    )
    return SimpleNamespace(deform_conv2d=prepared(columns.forward), deform_conv2d_backward=prepared(columns.backward))


def in_cuda_chunks(patch, positions):
    """Limits chunks to the bytes of so many positions; the operators fail where columns and plan take more.

    Returns a list that gets the number of positions of each chunk.
    """
    kernels("cuda")
    launches, counts = import_module("omniops.backends.cuda._deform_launches"), []
    max_positions_of, prepare_of = launches.Problem.max_positions, launches.Problem.prepare
    # Where these kernels have the plan and the columns among their tensors.
    workspaces = {"prepare": (6, 7), "sample": (5,), "gradients": (0, 9)}

    def max_positions(problem, size):
        patch.setattr(launches, "MAX_CHUNK_BYTES", positions * size)
        return max_positions_of(problem, size)

    def prepare(problem, first, count, **more):
        counts.append(count)
        return prepare_of(problem, first, count, **more)

    class Watched(launches.Launch):
        def __call__(self, stream, *tensors):
            indices = workspaces.get(self._kernel.__name__, ())
            # Each is rounded up to 512 bytes.
            taken = {tensors[i].data_ptr(): tensors[i].nbytes - 511 for i in indices}
            assert counts[-1] == 1 or sum(taken.values()) <= launches.MAX_CHUNK_BYTES
            super().__call__(stream, *tensors)

    patch.setattr(launches.Problem, "max_positions", max_positions)
    patch.setattr(launches.Problem, "prepare", prepare)
    patch.setattr(launches, "Launch", Watched)
    return counts
