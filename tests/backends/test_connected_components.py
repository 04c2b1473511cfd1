"""The kernels of connected components on every backend of this machine, against SciPy's labels made canonical.

The Metal kernels are here on a Mac; elsewhere tests/metal runs them in the emulator. The Triton kernels run on the GPU
where there is one, else in Triton's interpreter, on small masks.
"""

from importlib import import_module
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import torch
from backend_cases import backend_devices, backends_with, channels_last, interpreted, shifted, sliced, transposed
from cpu_kernels import NEEDS_CPU_KERNELS, assert_same_in_python_threads, assert_same_with_any_number_of_threads
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from masks import adversarial, noise, spiral
from scipy import ndimage

CONNECTIVITIES = pytest.mark.parametrize("connectivity", [4, 8])
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *UNSIGNED)


REFERENCE_ON_A_GPU = [pytest.param("reference", "cuda", id="reference-on-cuda")] if torch.cuda.is_available() else []
BACKENDS = pytest.mark.parametrize(("backend", "device"), [*backend_devices(), *REFERENCE_ON_A_GPU])


def skip_what_mps_lacks(device, dtype):
    if device == "mps" and dtype in UNSIGNED:
        try:
            torch.zeros(1, dtype=dtype).to(device)
        except (RuntimeError, TypeError) as error:
            pytest.skip(f"PyTorch has no {dtype} on MPS: {error}")


def kernel(backend):
    return import_module(f"omniops.backends.{backend}.connected_components").connected_components


def oracle(mask, connectivity):
    """SciPy's labels of each (H, W), renamed to 1 + the first flat index of the component, and its areas."""
    labels, counts = np.zeros(mask.shape, np.int64), np.zeros(mask.shape, np.int64)
    for n, (image,) in enumerate(mask.numpy() != 0):
        components, count = ndimage.label(image, np.ones((3, 3)) if connectivity == 8 else None)
        first = np.zeros(count + 1, np.int64)
        first[components.ravel()[::-1]] = np.arange(image.size, 0, -1)  # of several, the last assigned stays
        area = np.bincount(components.ravel(), minlength=count + 1)
        first[0] = area[0] = 0
        labels[n, 0], counts[n, 0] = first[components], area[components]
    return torch.from_numpy(labels), torch.from_numpy(counts)


def assert_right(backend, device, mask, connectivity, layout=lambda mask: mask):
    results = kernel(backend)(layout(mask.to(device)), connectivity)
    for name, result, expected in zip(("labels", "counts"), results, oracle(mask, connectivity), strict=True):
        assert result.dtype == torch.int32
        assert result.shape == mask.shape
        assert result.is_contiguous()
        wrong = (result.cpu() != expected).nonzero()
        assert not len(wrong), f"{name} are wrong at {wrong[0].tolist()} and {len(wrong) - 1} more"


@pytest.mark.slow
@BACKENDS
@CONNECTIVITIES
def test_adversarial_masks(backend, device, connectivity):
    if interpreted(backend, device):  # which takes the others by make test-all
        masks = list(adversarial(9, 35).values())[connectivity == 8 :: 2]
        assert_right(backend, device, torch.stack(masks)[:, None], connectivity)
        return
    for h, w in ((18, 70), (131, 67), (64, 257)):
        assert_right(backend, device, torch.stack(list(adversarial(h, w).values()))[:, None], connectivity)


@pytest.mark.slow
@CONNECTIVITIES
@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter is not used")
def test_every_adversarial_mask_in_tritons_interpreter(connectivity):
    masks = torch.stack(list(adversarial(9, 35).values()))[:, None]
    assert_right("cuda", "cpu", masks, connectivity)


@BACKENDS
@CONNECTIVITIES
def test_large_adversarial_masks(backend, device, connectivity):
    if interpreted(backend, device):
        pytest.skip("Triton's interpreter would take hours")
    side = 257 if backend == "reference" else 1025
    for name in ("all", "checkerboard", "combs in each other", "spiral", "what the spiral leaves", "41% noise"):
        assert_right(backend, device, adversarial(side, side)[name][None, None], connectivity)


@pytest.mark.slow
@BACKENDS
def test_4096(backend, device):
    if interpreted(backend, device):
        pytest.skip("Triton's interpreter would take days")
    masks = {**adversarial(4096, 4096), "59.3% noise": noise(4096, 4096, 0.593)}
    cases = [("spiral", 8), ("all", 4)]
    if backend != "reference":  # which takes some seconds a mask
        cases += [("none", 8), ("checkerboard", 4), ("checkerboard", 8), ("comb", 4), ("combs in each other", 8)]
        cases += [("59.3% noise", 4), ("41% noise", 8)]
    for name, connectivity in cases:
        assert_right(backend, device, masks[name][None, None], connectivity)


@BACKENDS
@CONNECTIVITIES
@pytest.mark.parametrize(
    ("h", "w"), [(1, 1), (1, 2), (1, 31), (1, 32), (1, 200), (97, 1), (2, 33), (3, 64), (4, 65), (5, 63), (70, 3)]
)
def test_thin_and_odd_shapes(backend, device, connectivity, h, w):
    densities = (0.7,) if interpreted(backend, device) else (0.5, 0.8, 1.0)
    masks = [noise(h, w, density, seed=seed) for seed, density in enumerate(densities)]
    assert_right(backend, device, torch.stack(masks)[:, None], connectivity)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_is_not_zero_is_foreground(backend, device, dtype):
    skip_what_mps_lacks(device, dtype)
    foreground = torch.stack([noise(9, 75, 0.5), noise(9, 75, 0.7)])[:, None]
    if dtype == torch.bool:
        values = [True]
    else:
        info = torch.iinfo(dtype)
        # Each byte of a value on its own.
        values = [1, info.min or info.max, *(1 << bit for bit in range(6, info.bits - 1, 8))]
    # By NumPy: torch.where and indexing are not there for all unsigned dtypes in all versions of PyTorch.
    value = np.resize(torch.tensor(values, dtype=dtype).numpy(), foreground.shape)
    mask = torch.from_numpy(np.where(foreground.numpy(), value, np.zeros((), value.dtype)))
    expected = oracle(foreground, 8)
    for result, right in zip(kernel(backend)(mask.to(device), 8), expected, strict=True):
        assert torch.equal(result.cpu().long(), right)


LAYOUTS = {
    "transposed": transposed,
    "channels_last": channels_last,
    "sliced": sliced,
    "shifted": shifted,
}


@backends_with("dtype", torch.bool, torch.int16, torch.uint16)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout, dtype):
    skip_what_mps_lacks(device, dtype)
    mask = torch.stack([noise(7, 66, 0.5), noise(7, 66, 0.6, seed=1)])[:, None].to(dtype)
    assert_right(backend, device, mask, 8, LAYOUTS[layout])


@BACKENDS
def test_expanded_masks(backend, device):
    mask = noise(7, 40, 0.5)[None, None]
    once, thrice = (kernel(backend)(batch.to(device), 4) for batch in (mask, mask.expand(3, 1, 7, 40)))
    assert all(torch.equal(a.expand_as(b), b) for a, b in zip(once, thrice, strict=True))


@BACKENDS
def test_any_mask(backend, device):
    @hypothesis_settings(max_examples=20 if interpreted(backend, device) else 60)
    @given(data=st.data())
    def is_right(data):
        any_mask(backend, device, data)

    is_right()


def any_mask(backend, device, data):
    small = interpreted(backend, device)
    n = data.draw(st.integers(1, 1 if small else 3))
    h, w = (data.draw(st.integers(1, size)) for size in ((4, 40) if small else (24, 140)))
    # Rows of words rather than pixels, so that what is drawn has structure where words meet.
    rows = data.draw(st.lists(st.integers(0, 2**w - 1), min_size=n * h, max_size=n * h))
    mask = torch.tensor([[row >> x & 1 for x in range(w)] for row in rows], dtype=torch.uint8).view(n, 1, h, w)
    assert_right(backend, device, mask, data.draw(st.sampled_from((4, 8))))


@BACKENDS
def test_the_same_every_run(backend, device):
    mask = noise(10, 90, 0.5)[None, None].to(device)
    first, second = (kernel(backend)(mask, 8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@NEEDS_CPU_KERNELS
@CONNECTIVITIES
@pytest.mark.parametrize("shape", [(1, 1, 2051, 2049), (2, 1, 1500, 1400), (40, 1, 400, 300), (1, 1, 9, 400_001)])
def test_the_number_of_cpu_threads_changes_nothing(shape, connectivity, set_num_threads):
    _, _, h, w = shape
    images = [spiral(h, w), noise(h, w, 0.593 if connectivity == 4 else 0.41), noise(h, w, 0.99)]
    mask = torch.stack([images[i % 3] for i in range(shape[0])])[:, None]
    assert_same_with_any_number_of_threads(lambda: kernel("cpu")(mask, connectivity), set_num_threads)
    assert_right("cpu", "cpu", mask[:1], connectivity)


@NEEDS_CPU_KERNELS
def test_many_python_threads_at_once(set_num_threads):
    set_num_threads(2)
    masks = [noise(1100, 1000, 0.4, seed)[None, None] for seed in range(8)]
    assert_same_in_python_threads(lambda mask: kernel("cpu")(mask, 8), masks)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_cuda
def test_in_a_cuda_graph_without_waiting():
    mask = noise(300, 500, 0.4)[None, None].cuda()
    kernel("cuda")(mask, 8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel("cuda")(mask, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel("cuda")(mask, 8)
    for other in (noise(300, 500, 0.6), spiral(300, 500), noise(300, 500, 0.1)):
        mask.copy_(other[None, None])
        graph.replay()
        for result, expected in zip(captured, oracle(other[None, None], 8), strict=True):
            assert torch.equal(result.cpu().long(), expected)


@needs_cuda
def test_more_than_two_to_the_31_pixels():
    n, h, w = 2049, 1024, 1024
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    mask = torch.zeros(n, 1, h, w, dtype=torch.bool, device="cuda")
    for image in (0, n - 1):
        mask[image, 0] = noise(h, w, 0.41, seed=image).cuda()
    labels, counts = kernel("cuda")(mask, 8)
    for image, (result, of) in product((0, n - 1), ((labels, 0), (counts, 1))):
        assert torch.equal(result[image].cpu().long(), oracle(mask[image : image + 1].cpu(), 8)[of][0])
    assert not labels[1:-1].any()
    assert not counts[1:-1].any()


@needs_cuda
def test_as_many_words_as_fit_32_bits():
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    height, rows = 2**31 - 1, 40
    mask = torch.zeros(1, 1, height, 1, dtype=torch.bool, device="cuda")
    mask[:, :, -rows:] = True
    labels, counts = kernel("cuda")(mask, 8)
    assert (labels[:, :, -rows:] == height - rows + 1).all()
    assert (counts[:, :, -rows:] == rows).all()
    assert not labels[:, :, :-rows].any()
    assert not counts[:, :, :-rows].any()


@BACKENDS
def test_memory_beyond_the_image_is_of_any_value(backend, device):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills what is allocated with the largest integer
    try:
        assert (torch.ones(1).new_empty(5, dtype=torch.int8) == 127).all()
        for width in (35, 61):
            assert_right(backend, device, noise(5, width, 0.5)[None, None], 8)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", [(2**31, 1, 1, 1), (2**24, 1, 2048, 31), (2**19, 1, 256, 8192), (2**30, 1, 1, 1000)])
def test_more_programs_than_a_grid_has_are_refused_by_name(shape):
    from omniops.backends.cuda.connected_components import check_sizes

    n, *rest = shape
    check_sizes((n - 1, *rest))
    with pytest.raises(ValueError, match=r"mask must have N \* ceil\(H \* ceil\(W / 32\) / 16\) below 2\*\*31 on CUDA"):
        kernel("cuda")(torch.empty(shape, dtype=torch.bool, device="meta"), 8)
