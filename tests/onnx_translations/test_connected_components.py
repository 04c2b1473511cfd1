"""Connected components in ONNX, and what rests on them: fill_holes and remove_small_components."""

import pytest
import torch
from torch import nn

import omniops

DYNAMIC = torch.export.Dim.DYNAMIC
MASKS = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}


class Components(nn.Module):
    def __init__(self, connectivity):
        super().__init__()
        self.connectivity = connectivity

    def forward(self, mask):
        return omniops.connected_components(mask, self.connectivity)


class Cleaned(nn.Module):
    def forward(self, logits):
        return (
            omniops.fill_holes(logits, max_area=4),
            omniops.remove_small_components(logits, min_area=5),
            omniops.remove_small_components(logits > 0, min_area=5),
        )


def spiral(size):
    """One component as long as can be, which ends in the middle."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    y, x, dy, dx = 0, -1, 0, 1
    steps = [size] + [length for length in range(size - 1, 0, -2) for _ in range(2)]
    for length in steps:
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
        dy, dx = dx, -dy
    return mask[None, None]


def stairs(size):
    """A diagonal, which is one component by corners alone."""
    return torch.eye(size, dtype=torch.bool)[None, None]


def loops(program):
    return sum(node.op_type == "Loop" for node in program.model_proto.graph.node)


def test_nodes(export):
    assert loops(export(Components(8), stairs(5))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("connectivity", "opset_version"), [(4, 20), (8, 18), (8, 25)])
def test_runs(assert_runs_alike, randn, connectivity, opset_version):
    cases = [spiral(33), spiral(64).flip(2, 3), spiral(31).mT, stairs(20), stairs(20).flip(3)]
    cases += [randn(3, 1, 40, 57) > level for level in (-0.3, 0, 0.3)]
    cases += [
        torch.zeros(2, 1, 3, 4, dtype=torch.bool),
        torch.ones(2, 1, 3, 4, dtype=torch.bool),
        randn(1, 1, 1, 9) > 0,
    ]
    options = {"dynamic_shapes": (MASKS,), "opset_version": opset_version}
    # Integers: 1e-9 of the largest is less than one half.
    assert_runs_alike(Components(connectivity), *[(case,) for case in cases], tolerance=1e-9, **options)


@pytest.mark.slow
def test_integers_run(assert_runs_alike, randn):
    case = (3 * randn(2, 1, 9, 8)).to(torch.int16)
    assert_runs_alike(Components(8), (case,), tolerance=1e-9, dynamic_shapes=(MASKS,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cleaned_runs(assert_runs_alike, randn, dtype):
    cases = [(randn(n, 2, h, w, dtype=dtype),) for n, h, w in ((2, 9, 8), (1, 40, 31))]
    with torch.no_grad():
        filled, removed, _ = Cleaned()(*cases[1])
    assert (filled != cases[1][0]).any()
    assert (removed != cases[1][0]).any()
    assert_runs_alike(Cleaned(), *cases, tolerance=1e-6, dynamic_shapes=(MASKS,))
