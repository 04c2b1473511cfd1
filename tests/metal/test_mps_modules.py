"""omniops.nn.MultiScaleDeformableAttention on the pretended MPS device: the CPU's results, within the rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mps_device import mps_device
from torch import Tensor

from omniops.nn import MultiScaleDeformableAttention

SHAPES = [(6, 5), (3, 4)]


def problem(dtype: torch.dtype, last: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    query, value, query_pos = (torch.randn(2, size, 16, generator=generator).to(dtype) for size in (7, 42, 7))
    mask = torch.rand(2, 42, generator=generator) > 0.7
    points = torch.rand(2, 7, 2, last, generator=generator)  # of float32 beside half precision too
    return {
        "query": query,
        "value": value,
        "query_pos": query_pos,
        "key_padding_mask": mask,
        "reference_points": points,
        "spatial_shapes": SHAPES,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("last", [2, 4])
@pytest.mark.parametrize("shapes", ["list", "tensor", "tensor of the CPU"])
def test_the_results_of_the_cpu(dtype: torch.dtype, last: int, shapes: str) -> None:
    torch.manual_seed(0)
    attention = MultiScaleDeformableAttention(16, 2, 2, 3, batch_first=True).to(dtype).eval()
    for parameter in attention.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
        parameter.requires_grad_(False)
    inputs = problem(dtype, last)
    expected = attention(**inputs)
    with mps_device(values=True) as device:
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        if shapes != "list":
            moved["spatial_shapes"] = torch.tensor(SHAPES).to(device if shapes == "tensor" else "cpu")
        found = copy.deepcopy(attention).to(device)(**moved).cpu()
    assert found.dtype == dtype
    tolerance = (1e-5 if dtype == torch.float32 else 2e-3) * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_training_keeps_the_rules(dtype: torch.dtype, batch_first: bool) -> None:
    """At the size of Deformable DETR's encoder, of one image.

    Of more pixels than 32767 the gradient of a Linear's weight is a product that PyTorch gets wrong on M1 and M2.
    """
    shapes = [(100, 134), (50, 67), (25, 34), (13, 17)]
    pixels = sum(height * width for height, width in shapes)
    with mps_device(values=False):
        attention = MultiScaleDeformableAttention(batch_first=batch_first).to("meta", dtype).train()
        size = (1, pixels, 256) if batch_first else (pixels, 1, 256)
        query = torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
        points = torch.empty(1, pixels, 4, 2, device="meta")
        mask = torch.empty(1, pixels, dtype=torch.bool, device="meta")
        result = attention(
            query, query_pos=query, key_padding_mask=mask, reference_points=points, spatial_shapes=shapes
        )
        gradients = torch.autograd.grad(result, [query, *attention.parameters()], torch.empty_like(result))
    assert result.shape == query.shape
    assert [tensor.shape for tensor in gradients] == [tensor.shape for tensor in (query, *attention.parameters())]
