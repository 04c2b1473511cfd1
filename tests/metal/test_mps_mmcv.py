"""mmcv's compiled module as the stand-in has it, on the pretended MPS device: the CPU's results, within the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mps_device import mps_device
from torch import Tensor

pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)

from omniops.dropin import mmcv_ext

generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def boxes(count: int) -> Tensor:
    corners = torch.rand((count, 2), generator=generator) * 12
    return torch.cat([corners, corners + 1 + torch.rand((count, 2), generator=generator) * 8], 1)


BOXES, SCORES = boxes(20), torch.rand(20, generator=generator)
DETS = torch.cat([BOXES, SCORES[:, None]], 1)
ROIS = torch.cat([torch.arange(6).remainder(2)[:, None].float(), boxes(6)], 1)
FEATURES = random(2, 8, 16, 18)
LOGITS, CLASSES = 30 * random(9, 5), torch.arange(9).remainder(6)
SHAPES = torch.tensor([[6, 5], [3, 4]])
VALUE, PLACES, WEIGHTS = random(2, 42, 2, 4), torch.rand((2, 7, 2, 2, 3, 2), generator=generator), random(2, 7, 2, 2, 3)
DCN = random(2, 4, 7, 6), random(2, 18, 7, 6), random(6, 4, 3, 3)
ROTATED = torch.cat([BOXES, 3 * random(20, 1)], 1)
ORDER = SCORES.argsort(descending=True)
LABELLED = torch.cat([ROTATED, torch.arange(20).remainder(2)[:, None].float()], 1)
PSA = (2, 4, 5, 3, 7, 1, 3)
STATISTICS = random(3), random(3).abs(), random(3), random(3), random(3), random(3).abs()
COLUMNS = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 32)
POOLED = (2, 3, 0.5, 0)

# Of each function, by its name and what is special: what it is given, and of that what it fills, given here as shapes.
CALLS: dict[str, tuple[Any, ...]] = {
    "nms": (BOXES, SCORES, 0.4, 0),
    "nms_match": (DETS, 0.4),
    "softnms": (BOXES, SCORES, ("out", 20, 5), 0.3, 0.5, 0.05, 1, 0),
    "bbox_overlaps": (BOXES, BOXES[:7], ("out", 20, 7), 0, False, 0),
    "roi_align_forward": (
        FEATURES,
        ROIS,
        ("out", 6, 8, 2, 3),
        ("out", 6, 8, 2, 3),
        ("out", 6, 8, 2, 3),
        *POOLED,
        0,
        True,
    ),
    "roi_align_backward": (
        random(6, 8, 2, 3),
        ROIS,
        random(6, 8, 2, 3).abs(),
        random(6, 8, 2, 3).abs(),
        ("out", 2, 8, 16, 18),
        *POOLED,
        0,
        True,
    ),
    "roi_pool_forward": (FEATURES, ROIS, ("out", 6, 8, 2, 3), ("int", 6, 8, 2, 3), 2, 3, 0.5),
    "roi_pool_backward": (
        random(6, 8, 2, 3),
        ROIS,
        torch.full((6, 8, 2, 3), 7, dtype=torch.int32),
        ("out", 2, 8, 16, 18),
        2,
        3,
        0.5,
    ),
    "deform_roi_pool_forward": (FEATURES, ROIS, random(6, 2, 2, 3), ("out", 6, 8, 2, 3), *POOLED, 0.1),
    "sigmoid_focal_loss_forward": (LOGITS, CLASSES, torch.ones(5), ("out", 9, 5), 2.0, 0.25),
    "sigmoid_focal_loss_backward": (LOGITS, CLASSES, torch.ones(5), ("out", 9, 5), 2.0, 0.25),
    "softmax_focal_loss_forward": (LOGITS.softmax(1), CLASSES % 5, torch.ones(5), ("out", 9), 2.0, 0.25),
    "softmax_focal_loss_backward": (
        LOGITS.softmax(1),
        CLASSES % 5,
        torch.ones(5),
        ("out", 9),
        ("out", 9, 5),
        2.0,
        0.25,
    ),
    "masked_im2col_forward": (
        random(1, 4, 6, 7),
        torch.tensor([1, 5, 3]),
        torch.tensor([0, 6, 2]),
        ("out", 36, 3),
        3,
        3,
        1,
        1,
    ),
    "masked_col2im_forward": (
        random(4, 3),
        torch.tensor([1, 5, 3]),
        torch.tensor([0, 6, 2]),
        ("out", 1, 4, 6, 7),
        6,
        7,
        4,
    ),
    "ms_deform_attn_forward": (VALUE, SHAPES, torch.tensor([0, 30]), PLACES, WEIGHTS, 64),
    "ms_deform_attn_backward": (
        *(VALUE, SHAPES, torch.tensor([0, 30]), PLACES, WEIGHTS, random(2, 7, 8)),
        *(("out", *VALUE.shape), ("out", *PLACES.shape), ("out", *WEIGHTS.shape), 64),
    ),
    "carafe_naive_forward": (random(2, 8, 5, 6), random(2, 9, 10, 12), ("out", 2, 8, 10, 12), 3, 1, 2),
    "carafe_forward": (
        *(random(2, 8, 5, 6), random(2, 9, 10, 12), ("out", 2, 8, 5, 6), torch.zeros(1), torch.zeros(1)),
        *(("out", 2, 8, 10, 12), 3, 1, 2),
    ),
    "carafe_backward": (
        *(random(2, 8, 10, 12), random(2, 8, 5, 6), random(2, 9, 10, 12), *[torch.zeros(1)] * 4),
        *(("out", 2, 8, 5, 6), ("out", 2, 9, 10, 12), 3, 1, 2),
    ),
    "carafe_naive_backward": (
        *(random(2, 8, 10, 12), random(2, 8, 5, 6), random(2, 9, 10, 12)),
        *(("out", 2, 8, 5, 6), ("out", 2, 9, 10, 12), 3, 1, 2),
    ),
    "deform_conv_backward_parameters": (
        *(DCN[0], DCN[1], random(2, 6, 7, 6), ("out", 6, 4, 3, 3), torch.zeros(1), torch.zeros(1)),
        *(*COLUMNS[:-1], 1.0, 32),
    ),
    "modulated_deform_conv_forward": (
        *(DCN[0], DCN[2], random(6), torch.zeros(1), DCN[1], random(2, 9, 7, 6), ("out", 2, 6, 7, 6), torch.zeros(1)),
        *(*COLUMNS[:-1], True),
    ),
    "modulated_deform_conv_backward": (
        *(DCN[0], DCN[2], random(6), torch.zeros(1), DCN[1], random(2, 9, 7, 6), torch.zeros(1)),
        *(("out", 2, 4, 7, 6), ("out", 6, 4, 3, 3), ("out", 6), ("out", 2, 18, 7, 6), ("out", 2, 9, 7, 6)),
        *(random(2, 6, 7, 6), *COLUMNS[:-1], True),
    ),
    "modulated_deform_conv_forward larger": (
        *(DCN[0], DCN[2], random(6), torch.zeros(1), random(2, 18, 9, 11), random(3, 9, 8, 7), ("out", 2, 6, 7, 6)),
        *(torch.zeros(1), *COLUMNS[:-1], True),
    ),
    "modulated_deform_conv_backward larger": (
        *(DCN[0], DCN[2], random(6), torch.zeros(1), random(2, 18, 9, 11), random(3, 9, 8, 7), torch.zeros(1)),
        *(("out", 2, 4, 7, 6), ("out", 6, 4, 3, 3), ("out", 6), ("out", 2, 18, 9, 11), ("out", 3, 9, 8, 7)),
        *(random(2, 6, 7, 6), *COLUMNS[:-1], True),
    ),
    "box_iou_rotated": (ROTATED, ROTATED[:7], ("out", 140), 0, False),
    "box_iou_rotated aligned": (ROTATED[7:14], ROTATED[:7], ("out", 7), 1, True),
    "nms_rotated": (ROTATED, SCORES, ORDER, ROTATED[ORDER], torch.zeros(0), 0.2, False),
    "nms_rotated labelled": (LABELLED, SCORES, ORDER, LABELLED[ORDER], torch.zeros(20), 0.2, True),
    "psamask_forward": (random(2, 21, 4, 5), ("out", 2, 20, 4, 5), 0, *PSA),
    "psamask_forward distribute": (random(2, 21, 4, 5), ("out", 2, 20, 4, 5), 1, *PSA),
    "psamask_backward": (random(2, 20, 4, 5), ("out", 2, 21, 4, 5), 0, *PSA),
    "psamask_backward distribute": (random(2, 20, 4, 5), ("out", 2, 21, 4, 5), 1, *PSA),
    "sync_bn_forward_mean": (random(2, 3, 7), ("out", 3)),
    "sync_bn_forward_var": (random(2, 3, 7), random(3), ("out", 3)),
    "sync_bn_forward_output": (
        *(random(2, 3, 7), *STATISTICS, ("out", 2, 3, 7), ("out", 3), ("out", 2, 3, 7)),
        *(1e-5, torch.tensor(0.1), 1),
    ),
    "sync_bn_backward_param": (random(2, 3, 7), random(2, 3, 7), ("out", 3), ("out", 3)),
    "sync_bn_backward_data": (
        *(random(2, 3, 7), *STATISTICS[2:5], random(2, 3, 7), STATISTICS[5] + 1, ("out", 2, 3, 7)),
    ),
    "deform_conv_forward": (DCN[0], DCN[2], DCN[1], ("out", 2, 6, 7, 6), torch.zeros(1), torch.zeros(1), *COLUMNS),
    "deform_conv_backward_input": (
        DCN[0],
        DCN[1],
        random(2, 6, 7, 6),
        ("out", 2, 4, 7, 6),
        ("out", 2, 18, 7, 6),
        DCN[2],
        torch.zeros(1),
        *COLUMNS,
    ),
}


def results(function: Callable[..., Any], call: tuple[Any, ...], device: torch.device) -> list[Any]:
    def made(value: Any) -> Any:
        if isinstance(value, tuple):
            return torch.zeros(value[1:], dtype=torch.int32 if value[0] == "int" else torch.float32, device=device)
        return value.to(device) if isinstance(value, Tensor) else value

    args = [made(value) for value in call]
    returned = function(*args)
    filled = [tensor for tensor, value in zip(args, call, strict=True) if isinstance(value, tuple)]
    return [tensor.cpu() if isinstance(tensor, Tensor) else tensor for tensor in (*filled, returned)]


# Autograd, which makes its gradients, does not know the pretended device.
LEFT_OUT = {"deform_roi_pool_backward"}


def test_all_functions_are_called():
    assert {*(name.split()[0] for name in CALLS), *LEFT_OUT} == {
        name for name in mmcv_ext.__all__ if not name.startswith("get_")
    }


@pytest.mark.parametrize("name", CALLS)
def test_the_results_of_the_cpu(name):
    function = getattr(mmcv_ext, name.split()[0])
    expected = results(function, CALLS[name], torch.device("cpu"))
    with mps_device(values=True) as device:
        found = results(function, CALLS[name], device)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        else:
            assert ours == theirs
