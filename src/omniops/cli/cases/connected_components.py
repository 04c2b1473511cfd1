"""Connected components for selftest and bench."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops.backends.reference import connected_components as kernels
from omniops.benchmarking.contenders import FORWARD, OURS, Contender, Shape
from omniops.benchmarking.goals import Goal, TimeGoal
from omniops.benchmarking.timing import HOST
from omniops.cli.cases._check import Check
from omniops.ops._checks import INTEGERS
from omniops.ops.connected_components import connected_components

NAME = "connected_components"
DTYPES = INTEGERS
TIMED_DTYPES = (torch.uint8,)


def checks() -> Iterator[Check]:
    """Both connectivities, odd sizes, one row, one column, from few pixels to nearly all, and a spiral."""
    for connectivity in (4, 8):
        for density in (0.1, 0.4, 0.6, 0.9):
            yield _check(f"(3, 1, 37, 71) {density:.0%} noise", _noise((3, 1, 37, 71), density), connectivity)
        yield _check("(2, 1, 40, 64) 50% noise transposed", _noise((2, 1, 64, 40), 0.5).mT, connectivity)
        yield _check("(1, 1, 1, 100) 70% noise", _noise((1, 1, 1, 100), 0.7), connectivity)
        yield _check("(2, 1, 100, 1) 70% noise", _noise((2, 1, 100, 1), 0.7), connectivity)
        yield _check("(1, 1, 129, 129) spiral", spiral(129, 129)[None, None], connectivity)
        yield _check("(1, 1, 65, 97) all", torch.ones(1, 1, 65, 97, dtype=torch.int64), connectivity)
        yield _check("(1, 1, 9, 33) none", torch.zeros(1, 1, 9, 33, dtype=torch.int64), connectivity)


def _check(label: str, mask: Tensor, connectivity: int) -> Check:
    operator, oracle = (
        partial(function, connectivity=connectivity)
        for function in (connected_components, kernels.connected_components)
    )
    return Check(f"{label}, {connectivity}-connected", operator, oracle, {"mask": mask}, ("labels", "counts"))


def _noise(shape: Shape, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) < density).long() * 2


def spiral(h: int, w: int) -> Tensor:
    """One line a pixel wide, with a gap of as much between its turns, (H, W) in bool: no component is longer."""
    mask = torch.zeros(h, w, dtype=torch.bool)
    for turn in range(0, (min(h, w) + 1) // 2, 2):
        bottom, right = h - 1 - turn, w - 1 - turn
        mask[turn, max(turn - 2, 0) : right + 1] = True
        mask[turn : bottom + 1, right] = True
        mask[bottom, turn : right + 1] = True
        mask[turn + 2 : bottom + 1, turn] = True
    return mask


_IMAGE = (1, 1, 1024, 1024)
_MASKS = (256, 1, 256, 256)
_TINY = (1, 1, 32, 32)

GOALS = (
    Goal("as fast as OpenCV", "cpu", FORWARD, "OpenCV", FORWARD, 1, (_IMAGE,)),
    Goal("at least 5x SAM 2's extension", "cuda", FORWARD, "sam2", FORWARD, 1 / 5, (_MASKS,)),
    TimeGoal("the host's", "cuda", FORWARD, 50, (_TINY,), HOST),
    Goal("the host's at most 3x OpenCV", "cpu", FORWARD, "OpenCV with statistics", FORWARD, 3, (_TINY,), mode=HOST),
)
"""The project's goals; they are for an H200 and two CPU threads, so only benchmarks/ judges them."""


def shapes(device_type: str, quick: bool) -> tuple[Shape, ...]:
    """The masks' shapes: an image, and the masks of SAM 2's mask generator."""
    return ((2, 1, 24, 40),) if quick else (_IMAGE, _MASKS)


def host_shape(device_type: str) -> Shape:
    """A mask so small that its kernels take no time."""
    return _TINY


def traffic(shape: Shape) -> dict[str, int]:
    """Bytes read and written if each were moved once: the mask's one a pixel, and four each of labels and counts."""
    n, _, h, w = shape
    return {FORWARD: n * h * w * (1 + 4 + 4)}


def contenders(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Contender]:
    """omniops, its reference kernels, SAM 2's extension on CUDA, OpenCV and SciPy on the CPU, where installed.

    Of OpenCV's two functions one gives labels alone, the other also the statistics that the counts would be taken from.
    """
    mask = _blobs(shape).to(device, dtype)
    yield Contender(OURS, partial(connected_components, mask))
    yield Contender("reference kernels", partial(kernels.connected_components, mask, 8), on_host=False)
    if device.type == "cuda":
        with suppress(ImportError):
            yield Contender("sam2", partial(import_module("sam2._C").get_connected_componnets, mask))
    if device.type == "cpu":
        images = [image.numpy() for image in mask[:, 0]]
        with suppress(ImportError):
            cv2 = import_module("cv2")
            cv2.setNumThreads(torch.get_num_threads())
            yield Contender("OpenCV", lambda: [cv2.connectedComponents(image) for image in images])
            yield Contender(
                "OpenCV with statistics", lambda: [cv2.connectedComponentsWithStats(image) for image in images]
            )
        with suppress(ImportError):
            label, corners = import_module("scipy.ndimage").label, torch.ones(3, 3).numpy()
            yield Contender("SciPy", lambda: [label(image, corners) for image in images])


def _blobs(shape: Shape) -> Tensor:
    """Masks like those of a segmentation network: smooth shapes, with a speck or a hole at one pixel in a thousand."""
    n, _, h, w = shape
    coarse = torch.randn(n, 1, max(h // 32, 2), max(w // 32, 2))
    smooth = F.interpolate(coarse, (h, w), mode="bicubic") > 0
    return smooth ^ (torch.rand(shape) < 1e-3)
