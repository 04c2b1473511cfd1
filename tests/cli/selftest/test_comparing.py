"""What the comparison of operators does by itself: copies, arguments, and the dtype that is compared in."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from omniops.cli.selftest.stages import _CheckingMode, _RunningModules, check_operators


def _found(function):
    with check_operators(nn.Identity()) as found, torch.inference_mode():
        function()
    return found


def _compared(found):
    return [stage.operator for stage in found.stages.values() if stage.calls]


class _Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class _Two(tuple):
    """Is made of two, so not as a tuple is."""

    __slots__ = ()

    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


@pytest.mark.parametrize("in_place", [False, True])
def test_arguments_may_be_in_named_tuples(in_place):
    x = torch.randn(2, 4)
    found = _found(lambda: torch.cat(_Pair(x, x), **({"out": torch.empty(4, 4)} if in_place else {})))
    assert (_compared(found), found.unchecked, found.first_wrong) == (["cat"], {}, None)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_comparison_that_raises_is_counted_and_not_blamed_on_the_model(in_place):
    x = torch.randn(2, 4)
    found = _found(lambda: torch.cat(_Two(x, x), **({"out": torch.empty(4, 4)} if in_place else {})).exp())
    assert (_compared(found), found.raising, found.first_wrong) == (["exp"], None, None)
    ((why, count),) = found.unchecked.items()
    assert why.startswith("cat: comparing it raised TypeError: ")
    assert count == 1


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_copies_have_the_strides_and_other_memory(dtype):
    memory = torch.arange(60).reshape(5, 12).remainder(7).to(dtype)
    views = memory, memory[1:, 1::3].T, memory[:, :1].expand(5, 3), memory[:0], nn.Parameter(memory.float())
    mode = _CheckingMode(_RunningModules(nn.Identity()))
    for view in views:
        for wanted in (None, torch.float64):
            copy = mode._copy(view, wanted)
            expected = view.to(wanted) if wanted and view.is_floating_point() else view
            assert copy.dtype == expected.dtype
            assert (copy.stride(), copy.storage_offset()) == (view.stride(), view.storage_offset())
            assert torch.equal(copy, expected)
            assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


def _compared_only_in_its_own_dtype(function, *tensors):
    """Whether float64 gives something else, and the operator still counts as right."""
    results = function(*tensors), function(*(tensor.double() for tensor in tensors))
    assert results[0].shape != results[1].shape or not torch.allclose(results[0].double(), results[1], rtol=0.01)
    found = _found(lambda: function(*tensors))
    assert (found.first_wrong, found.unchecked) == (None, {})
    return _compared(found)


def test_boxes_at_the_threshold_of_nms():
    ops = pytest.importorskip("torchvision", reason="needs torchvision").ops
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6]]), torch.tensor([0.9, 0.8])
    # 0.6 of float32 is more than 0.6.
    assert _compared_only_in_its_own_dtype(lambda *x: ops.nms(*x, 0.6), boxes, scores) == ["nms"]


def test_boxes_that_one_more_sample_fits_into_where_roi_align_rounds():
    ops = pytest.importorskip("torchvision", reason="needs torchvision").ops
    maps = torch.arange(1600.0).cos().reshape(1, 1, 40, 40)
    # 28 / 7 samples, or one more: 31.6 - 3.6 is 28 in float32 alone, of these numbers.
    boxes = torch.tensor([[0, 3.6, 3.6, 31.6, 31.6]])
    assert _compared_only_in_its_own_dtype(lambda *x: ops.roi_align(*x, 7), maps, boxes) == ["roi_align"]
