"""The shipped Metal kernels of connected components and the code that launches them, in the emulator.

Every launch has an order of threads of its own, and of their turns at atomic operations, which are all that they race
for: the result may not depend on it.
"""

import re
from itertools import product
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest
import torch
from masks import adversarial, spiral
from problems import EXACT
from scipy import ndimage
from torch import Tensor

from omniops.backends.mps import connected_components as metal
from omniops.backends.mps._library import library

SOURCE = (Path(metal.__file__).parent / "connected_components.metal").read_text(encoding="utf-8")
DTYPES = tuple(EXACT)

pytestmark = pytest.mark.usefixtures("emulated")

connectivities = pytest.mark.parametrize("connectivity", [4, 8])


def run(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """The Metal kernels' results, every element of which they have written."""
    return emulator.launched(metal.connected_components, mask, connectivity)


def check(mask: Tensor, connectivity: int) -> None:
    labels, counts = run(mask, connectivity)
    assert labels.dtype == counts.dtype == torch.int32
    assert labels.shape == counts.shape == mask.shape
    for n, (image,) in enumerate(mask.numpy() != 0):
        components, count = ndimage.label(image, np.ones((3, 3)) if connectivity == 8 else None)
        first = np.zeros(count + 1, np.int64)
        first[components.ravel()[::-1]] = np.arange(image.size, 0, -1)  # of several, the last assigned stays
        area = np.bincount(components.ravel(), minlength=count + 1)
        first[0] = area[0] = 0
        np.testing.assert_array_equal(labels[n, 0].numpy(), first[components])
        np.testing.assert_array_equal(counts[n, 0].numpy(), area[components])


def meeting() -> Tensor:
    """Two rows of a tile, and the two on either side of a border between tiles: the lower one is full, and the upper
    one has a pixel above each of its words but the first, so that many threads change the parent of its first run."""
    mask = torch.zeros(1, 1, metal.TILE_ROWS + 1, 64 * metal.TILE_WORDS, dtype=torch.bool)
    mask[..., (1, -1), :] = True
    mask[..., 0, 48::32] = mask[..., -2, 48::32] = True
    return mask


def noise(*shape: int, density: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


@connectivities
@pytest.mark.parametrize("name", adversarial(1, 1))
def test_adversarial_masks(name: str, connectivity: int) -> None:
    for h, w in ((37, 71), (64, 96), (130, 33), (67, 135)):
        check(adversarial(h, w)[name][None, None], connectivity)


@connectivities
@pytest.mark.parametrize("density", [0.02, 0.3, 0.41, 0.5, 0.593, 0.7, 0.95])
def test_noise(density: float, connectivity: int) -> None:
    check(noise(3, 1, 41, 135, density=density), connectivity)


@connectivities
@pytest.mark.parametrize(
    ("h", "w"),
    [(1, 1), (1, 2), (1, 31), (1, 32), (1, 200), (97, 1), (2, 33), (3, 64), (4, 65), (5, 63), (70, 3)]
    + [(h, w) for h in (63, 64, 65) for w in (127, 128, 129)],
)
def test_thin_and_odd_shapes(h: int, w: int, connectivity: int) -> None:
    for density in (0.5, 0.8, 1.0):
        check(noise(2, 1, h, w, density=density), connectivity)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_is_not_zero_is_foreground(dtype: torch.dtype) -> None:
    bits = 1 if dtype == torch.bool else torch.iinfo(dtype).bits
    for bit in range(0, bits, 7):
        value = 1 << bit if bit < bits - 1 or dtype in (torch.bool, torch.uint8) else -(1 << bit)
        check(noise(2, 1, 5, 37).to(dtype) * torch.tensor(value, dtype=dtype), 8)


LAYOUTS = {
    "transposed": lambda mask: mask.mT.contiguous().mT,
    "channels_last": lambda mask: mask.contiguous(memory_format=torch.channels_last),
    "sliced": lambda mask: torch.ones(3, 1, 9, 75, dtype=mask.dtype)[1:, :, 1:8, 1:-1:2].copy_(mask),
    "shifted": lambda mask: torch.ones(mask.numel() + 2, dtype=mask.dtype)[1:-1].view(mask.shape).copy_(mask),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.uint16], ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    check(LAYOUTS[layout](noise(2, 1, 7, 37).to(dtype)), 8)


@pytest.mark.slow
@pytest.mark.parametrize("connectivity", [pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("group_size", [64, 1], ids=["within groups", "across groups"])
def test_the_order_of_threads_changes_nothing(
    group_size: int, connectivity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 and of 60 orders. That they are enough to show a race is seen in test_planted_bugs.py."""
    monkeypatch.setattr(metal, "WORD_GROUP", (group_size, 1))
    masks = torch.stack([noise(40, 70), noise(40, 70, density=0.593), spiral(40, 70)])[:, None]
    for _ in range(20):
        check(masks, connectivity)
    for _ in range(60):
        check(meeting(), connectivity)


@pytest.mark.slow
def test_whatever_touches_across_the_borders_of_tiles() -> None:
    """Every pattern of the pixels around a corner where four tiles meet, and around a border of two."""
    height, width = metal.TILE_ROWS, 32 * metal.TILE_WORDS
    masks = []
    for y, x, rows, columns in ((height, width, 2, 2), (height, 40, 2, 3), (height, 32, 2, 3), (20, width, 3, 2)):
        for pattern in product((False, True), repeat=rows * columns):
            mask = torch.zeros(height + 1, width + 1, dtype=torch.bool)
            mask[y - 1 : y - 1 + rows, x - 1 : x - 1 + columns] = torch.tensor(pattern).view(rows, columns)
            masks.append(mask)
    for connectivity in (4, 8):
        check(torch.stack(masks)[:, None], connectivity)


def test_images_begin_beyond_32_bits() -> None:
    beginnings = """
    [[kernel, max_total_threads_per_threadgroup(1)]] void beginnings(
        device long* planes [[buffer(0)]],
        device long* bitmaps [[buffer(1)]],
        constant int* sizes [[buffer(2)]],
        uint image [[thread_position_in_grid]]) {
      planes[image] = plane_of(sizes, image);
      bitmaps[image] = bitmap_of(sizes, image);
    }
    """
    height, width, n = 2**29 + 1, 3, 70
    planes, bitmaps = (torch.empty(n, dtype=torch.int64) for _ in range(2))
    kernel = emulator.compile_shader(SOURCE + beginnings).beginnings
    kernel(planes, bitmaps, [height, width, 1], threads=n, group_size=1, arg_casts={2: "int32"})
    assert planes.tolist() == [image * height * width for image in range(n)]
    assert bitmaps.tolist() == [image * height for image in range(n)]


class Recorder:
    """Stands in for the library and keeps the launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, list[int], tuple[int, ...], tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def launch(*args: Any, threads: tuple[int, ...], group_size: tuple[int, ...], arg_casts: Any) -> None:
            assert arg_casts == {len(args) - 1: "int32"}
            self.launches.append((name, args[-1], threads, group_size))

        return launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(metal, "library", lambda name: recorder)
    return recorder


def test_every_kernel_is_launched_and_their_number_depends_on_the_shape_alone(recorder: Recorder) -> None:
    tile = metal.TILE_ROWS, 32 * metal.TILE_WORDS
    shapes = {tile: 2, (1, 1): 2, (tile[0] + 1, 1): 4, (1, tile[1] + 1): 4, (500, 500): 4}
    for (h, w), number in shapes.items():
        for dtype, connectivity in product(DTYPES, (4, 8)):
            before = len(recorder.launches)
            metal.connected_components(torch.empty((2, 1, h, w), dtype=dtype, device="meta"), connectivity)
            assert len(recorder.launches) - before == number
    assert {launch[0] for launch in recorder.launches} == set(dir(library("connected_components")))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 2**31 - 1),
        (1, 1, 2**31 - 1, 1),
        (1, 1, 2**26, 31),
        (1, 1, 46340, 46340),
        (2**20, 1, 2**15, 2**15),
        (2**31, 1, 1, 1),
    ],
    ids=str,
)
def test_the_largest_sizes_fit_the_grid_and_32_bits(shape: tuple[int, ...], recorder: Recorder) -> None:
    metal.connected_components(torch.empty(shape, dtype=torch.uint8, device="meta"), 8)
    for _, sizes, threads, group_size in recorder.launches:
        assert all(0 < size < 2**31 for size in sizes)
        # Metal counts threads of an axis in 32 bits.
        assert all(-(-axis // group) * group < 2**32 for axis, group in zip(threads, group_size, strict=True))
        assert torch.tensor(group_size).prod() <= 256


def test_the_source_is_ascii() -> None:
    # PyTorch hands it to the compiler as ASCII, and a source that is not becomes nothing.
    assert SOURCE.isascii()


def test_a_group_is_a_tile_of_words() -> None:
    assert metal.PIXEL_GROUP == (32, metal.TILE_WORDS * metal.TILE_ROWS // 32, 1)


@pytest.mark.parametrize("name", ["TILE_WORDS", "TILE_ROWS", "WRITTEN_ROWS"])
def test_the_launch_code_and_the_kernels_agree(name: str) -> None:
    (value,) = re.findall(rf"constant constexpr uint {name} = (\d+);", SOURCE)
    assert int(value) == getattr(metal, name)
