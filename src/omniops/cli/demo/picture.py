"""The picture of ``omniops demo``: the photo, the three results, a detail of each, and CARAFE's learned kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from omniops.cli.demo.training import Box, Contestant, centred
from omniops.nn import CARAFEPack

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.gridspec import SubplotSpec

_ACCENT = "#ff3d7f"
_MIN_DISTANCE = 7
"""Pixels between two marked points, at least."""


def draw(
    picture: Tensor, held_out: Box, truth: Tensor, contestants: list[Contestant], device: torch.device, path: Path
) -> None:
    """Write the picture to ``path``."""
    detail = _busiest(truth)
    points = _points(detail.cut(truth), margin=4)
    kernels = _kernels(contestants[-1], truth, device)

    figure = Figure(figsize=(13, 13.2), dpi=120, facecolor="white")
    figure.suptitle(
        "Rebuilt from features at a quarter of the resolution: only the upsampling differs", size=18, y=0.982
    )
    rows = figure.add_gridspec(
        3, 1, height_ratios=(3.8, 3.15, 3.7), left=0.02, right=0.98, top=0.925, bottom=0.02, hspace=0.16
    )

    # The photo is wider than the results beside it: as wide as it must be to stand as high as they do.
    widths = [truth.shape[1] / picture.shape[1] * picture.shape[2], *[truth.shape[2]] * 3]
    panels = rows[0].subgridspec(1, 4, wspace=0.04, width_ratios=widths).subplots(squeeze=False)[0]
    _show(panels[0], picture, "the photo; framed: held out")
    _frame(panels[0], held_out, "white")
    best = max(contestant.psnr for contestant in contestants)
    for axis, contestant in zip(panels[1:], contestants, strict=True):
        _show(
            axis,
            contestant.rebuilt,
            f"{contestant.name}: {contestant.psnr:.2f} dB",
            weight="bold" if contestant.psnr == best else "normal",
        )
        _frame(axis, detail, _ACCENT)

    panels = rows[1].subgridspec(1, 4, wspace=0.04).subplots(squeeze=False)[0]
    _show(panels[0], detail.cut(truth), "the truth")
    for axis, contestant in zip(panels[1:], contestants, strict=True):
        _show(axis, detail.cut(contestant.rebuilt), contestant.name)

    marked = rows[2].subgridspec(1, 2, width_ratios=(1, 2.05), wspace=0.03)
    axis = figure.add_subplot(marked[0])
    _show(axis, detail.cut(contestants[-1].rebuilt), "six places, marked")
    for number, (y, x, _) in enumerate(points, 1):
        axis.plot(x, y, "o", ms=15, mfc="white", mec=_ACCENT, mew=1.5)
        axis.annotate(str(number), (x, y), ha="center", va="center_baseline", size=10, weight="bold")
    _draw_kernels(figure, marked[1], [(label, kernels[:, detail.top + y, detail.left + x]) for y, x, label in points])
    figure.savefig(path)


def _show(axis: Axes, picture: Tensor, title: str, weight: str = "normal") -> None:
    axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, size=13, weight=weight)
    axis.set_axis_off()


def _frame(axis: Axes, box: Box, colour: str) -> None:
    corner = (box.left - 0.5, box.top - 0.5)
    axis.add_patch(Rectangle(corner, box.right - box.left, box.bottom - box.top, fill=False, ec=colour, lw=2))


def _draw_kernels(figure: Figure, subplot: SubplotSpec, kernels: list[tuple[str, Tensor]]) -> None:
    """Heat maps: a column for each place, a row for each group of channels."""
    groups = kernels[0][1].shape[0]
    panels = subplot.subgridspec(groups, len(kernels), wspace=0.12, hspace=0.12).subplots(squeeze=False)
    highest = max(float(kernel.max()) for _, kernel in kernels)
    for column, (label, kernel) in enumerate(kernels):
        panels[0][column].set_title(f"{column + 1}  {label}", size=11)
        for group in range(groups):
            axis = panels[group][column]
            axis.imshow(kernel[group].numpy(), cmap="magma", vmin=0, vmax=highest)
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(f"group {group + 1}", size=10)
    box = subplot.get_position(figure)
    figure.text(
        (box.x0 + box.x1) / 2, box.y1 + 0.022, "CARAFE's kernels there, for each group of channels",
        size=13, ha="center", va="bottom",
    )  # fmt: skip


def _kernels(contestant: Contestant, truth: Tensor, device: torch.device) -> Tensor:
    """(G, H, W, k, k): the weights with which the last upsampling made each pixel of the held-out part."""
    pack = contestant.network.to_full
    assert isinstance(pack, CARAFEPack)
    pack_inputs: list[Tensor] = []
    with torch.no_grad(), pack.register_forward_pre_hook(lambda _, inputs: pack_inputs.append(inputs[0])):
        contestant.network(centred(truth)[None].to(device))
        masks = pack.kernel_normalizer(pack.content_encoder(pack.channel_compressor(pack_inputs[0])))[0]
    return masks.cpu().view(pack.up_group, pack.up_kernel, pack.up_kernel, *masks.shape[1:]).permute(0, 3, 4, 1, 2)


def _slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    """The brightness's slope down and across, (H, W) each, by Sobel's kernels."""
    sobel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])
    grey = F.pad(picture.mean(0)[None, None], (1, 1, 1, 1), mode="replicate")
    down, across = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])[0]
    return down, across


def _busiest(picture: Tensor) -> Box:
    """The square, a third of the picture wide and off its borders, with the most edges."""
    side = min(picture.shape[1:]) // 3
    down, across = _slopes(picture)
    edges = F.avg_pool2d((down**2 + across**2).sqrt()[None, None], side, stride=1)[0, 0]
    border = side // 2
    inner = edges[border:-border, border:-border]
    top, left = (border + index for index in divmod(int(inner.argmax()), inner.shape[1]))
    return Box(top, top + side, left, left + side)


def _points(picture: Tensor, margin: int) -> list[tuple[int, int, str]]:
    """Six places (row, column, what is there), the best of each kind that is not too near to another."""
    down, across = _slopes(picture)
    steepness = F.avg_pool2d((down**2 + across**2)[None, None], 5, stride=1, padding=2, count_include_pad=False)[0, 0]
    kinds = (
        ("upright edge", across.abs() - 2 * down.abs()),
        ("level edge", down.abs() - 2 * across.abs()),
        ("edge like /", torch.minimum(across.abs(), down.abs()) * (across * down).sign()),
        ("edge like \\", -torch.minimum(across.abs(), down.abs()) * (across * down).sign()),
        ("flat", -steepness),
        ("busy", steepness),
    )
    free = torch.zeros_like(down, dtype=torch.bool)
    free[margin:-margin, margin:-margin] = True
    points = []
    for label, score in kinds:
        y, x = divmod(int(score.masked_fill(~free, float("-inf")).argmax()), score.shape[1])
        points.append((y, x, label))
        free[max(0, y - _MIN_DISTANCE) : y + _MIN_DISTANCE + 1, max(0, x - _MIN_DISTANCE) : x + _MIN_DISTANCE + 1] = (
            False
        )
    return points
