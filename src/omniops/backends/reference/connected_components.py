"""Connected components in plain PyTorch; ``omniops.ops.connected_components`` says what they are.

Every pixel points to a pixel of its component that does not come after it, at first to itself; one that points to
itself is a root. A round points each root that has earlier ones beside it to the earliest of them. A root that has none
takes in all roots beside it, or one of these went to an earlier root, beside which it goes itself in the next round: of
a component's roots every two rounds leave half at most.
"""

import torch
from torch import Tensor

from omniops.backends import as_signed


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) -> labels and counts, (N, 1, H, W), int32."""
    n, _, h, w = mask.shape
    foreground = (as_signed(mask) != 0).reshape(n, h, w)
    parent = torch.arange(n * h * w, device=mask.device)
    first, second = _neighbours(foreground, parent.view(n, h, w), connectivity)
    while first.numel() > 0:
        parent.scatter_reduce_(0, torch.maximum(first, second), torch.minimum(first, second), "amin")
        parent = _roots(parent)
        first, second = parent[first], parent[second]
        apart = first != second
        first, second = first[apart], second[apart]
    areas = torch.zeros_like(parent).scatter_add_(0, parent, foreground.flatten().long())
    labels, counts = (
        (labels_or_areas.view(n, h, w) * foreground).to(torch.int32)[:, None]
        for labels_or_areas in (parent % (h * w) + 1, areas[parent])
    )
    return labels, counts


def _neighbours(foreground: Tensor, index: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """The indices of each two neighbouring pixels of the foreground."""
    ahead, behind, all_ = slice(1, None), slice(None, -1), slice(None)
    steps = [(all_, all_, behind, ahead), (behind, ahead, all_, all_)]
    if connectivity == 8:
        steps += [(behind, ahead, behind, ahead), (behind, ahead, ahead, behind)]
    pairs = []
    for from_y, to_y, from_x, to_x in steps:
        connected = foreground[:, from_y, from_x] & foreground[:, to_y, to_x]
        pairs.append((index[:, from_y, from_x][connected], index[:, to_y, to_x][connected]))
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)


def _roots(parent: Tensor) -> Tensor:
    """Point every pixel to its root, halving the distance in each step."""
    while True:
        grandparent = parent[parent]
        if torch.equal(grandparent, parent):
            return parent
        parent = grandparent
