"""The shipped Metal kernels of connected components and the code that launches them, in the emulator.

Every launch has an order of threads of its own, and of their turns at atomic operations, which are all that they race
for: the result may not depend on it.
"""

from collections.abc import Iterator
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

connectivities = pytest.mark.parametrize("connectivity", [4, 8])


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.mps, "compile_shader", emulator.compile_shader)
        library.cache_clear()
        yield
    library.cache_clear()


def run(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """The Metal kernels' results, every element of which they have written."""
    with emulator.poisoned():
        results = metal.connected_components(mask, connectivity)
        for result in results:
            emulator.assert_written(result)
        labels, counts = (result.clone() for result in results)
    return labels, counts


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


def noise(*shape: int, density: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


@connectivities
@pytest.mark.parametrize("name", adversarial(1, 1))
def test_adversarial_masks(name: str, connectivity: int) -> None:
    for h, w in ((37, 71), (64, 96), (130, 33)):
        check(adversarial(h, w)[name][None, None], connectivity)


@connectivities
@pytest.mark.parametrize("density", [0.02, 0.3, 0.41, 0.5, 0.593, 0.7, 0.95])
def test_noise(density: float, connectivity: int) -> None:
    check(noise(3, 1, 41, 135, density=density), connectivity)


@connectivities
@pytest.mark.parametrize(
    ("h", "w"), [(1, 1), (1, 2), (1, 31), (1, 32), (1, 200), (97, 1), (2, 33), (3, 64), (4, 65), (5, 63), (70, 3)]
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


@connectivities
@pytest.mark.parametrize("group_size", [64, 1], ids=["within groups", "across groups"])
def test_the_order_of_threads_changes_nothing(
    group_size: int, connectivity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 and of 60 orders. That they are enough to show a race is seen in test_planted_bugs.py."""
    monkeypatch.setattr(metal, "WORD_GROUP", (group_size, 1))
    masks = torch.stack([noise(40, 70), noise(40, 70, density=0.593), spiral(40, 70)])[:, None]
    for _ in range(20):
        check(masks, connectivity)
    # A row, and a pixel above each of its words but the first: their threads all change the parent of its first run.
    meeting = torch.zeros(1, 1, 2, 512, dtype=torch.bool)
    meeting[..., 1, :] = meeting[..., 0, 48::32] = True
    for _ in range(60):
        check(meeting, connectivity)


def test_images_begin_beyond_32_bits() -> None:
    beginnings = """
    kernel void beginnings(
        device long* planes [[buffer(0)]],
        device long* bitmaps [[buffer(1)]],
        device const uint* bits [[buffer(2)]],
        device long* words [[buffer(3)]],
        constant int* sizes [[buffer(4)]],
        uint image [[thread_position_in_grid]]) {
      planes[image] = plane_of(sizes, image);
      bitmaps[image] = bitmap_of(sizes, image);
      words[image] = Place(sizes, bits, uint2(0u, image)).here - bits;
    }
    """
    height, width, n = 2**29 + 1, 3, 70
    planes, bitmaps, words = (torch.empty(n, dtype=torch.int64) for _ in range(3))
    bits = torch.empty(1, dtype=torch.int32)
    kernel = emulator.compile_shader(SOURCE + beginnings).beginnings
    kernel(planes, bitmaps, bits, words, [height, width, 1], threads=n, arg_casts={4: "int32"})
    assert planes.tolist() == [image * height * width for image in range(n)]
    assert bitmaps.tolist() == words.tolist() == [image * height for image in range(n)]


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


def test_every_kernel_is_launched_and_their_number_is_fixed(recorder: Recorder) -> None:
    for dtype in DTYPES:
        for connectivity in (4, 8):
            metal.connected_components(torch.empty((2, 1, 5, 37), dtype=dtype, device="meta"), connectivity)
    assert {launch[0] for launch in recorder.launches} == set(dir(library("connected_components")))
    assert len(recorder.launches) == 6 * 2 * len(DTYPES)


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


def test_a_word_of_pixels_is_a_simdgroup() -> None:
    assert metal.PIXEL_GROUP[0] == 32
