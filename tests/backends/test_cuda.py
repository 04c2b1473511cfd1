"""What is particular to NVIDIA GPUs; most of it needs one. The tests of the operators hold kernels against oracles."""

import numpy as np
import pytest
import torch

import omniops
from omniops.backends.reference import carafe as reference

NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def launches():
    pytest.importorskip("triton", reason="Triton is not installed")
    from omniops.backends.cuda import carafe

    return carafe


def test_pairs_serve_only_what_is_aligned(launches):
    def pairs(features, masks, result):
        return launches._in_pairs(5, 2, 1, fine=(features,), coarse=(masks, result))

    shapes = (1, 4, 3, 6), (1, 25, 6, 12), (1, 4, 6, 12)
    aligned = [torch.zeros(shape) for shape in shapes]
    assert pairs(*aligned)
    for i, shape in enumerate(shapes):
        one_off = torch.zeros(aligned[i].numel() + 1)[1:].view(shape)
        others = {
            "the first element lies between vectors": one_off,
            "the rows end within a vector": torch.zeros(*shape[:3], shape[3] - 1),
            "the rows start within vectors": torch.zeros(*shape[:3], shape[3] + 1)[..., :-1],
            "a row is not contiguous": torch.zeros(*shape[:2], shape[3], shape[2]).mT,
        }
        for reason, other in others.items():
            assert not pairs(*aligned[:i], other, *aligned[i + 1 :]), reason
    assert not launches._in_pairs(5, 2, 2, fine=aligned[:1], coarse=aligned[1:])
    assert not launches._in_pairs(5, 3, 1, fine=aligned[:1], coarse=aligned[1:])
    assert not launches._in_pairs(9, 2, 1, fine=aligned[:1], coarse=aligned[1:])


def test_a_row_beyond_32_bits_is_copied(launches):
    # Address space alone: nothing but the two elements is ever touched.
    memory = torch.from_numpy(np.zeros(2**30 + 1, dtype=np.float16))
    memory[0], memory[-1] = 1, 2
    apart = memory.as_strided((1, 1, 1, 2), (1, 1, 1, 2**30))
    copied = launches._addressable(apart)
    assert copied.stride(3) == 1
    assert torch.equal(copied, apart)
    near = memory.as_strided((1, 1, 1, 2), (1, 1, 1, 2**30 - 1))
    assert launches._addressable(near) is near


@NEEDS_A_GPU
def test_in_a_cuda_graph():
    features = torch.randn(1, 32, 10, 12, device="cuda", requires_grad=True)
    masks = torch.randn(1, 25, 20, 24, device="cuda", requires_grad=True)

    def step():
        result = omniops.carafe(features, masks, 5, 1, 2)
        return result, *torch.autograd.grad(result.square().sum(), (features, masks))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        features.normal_()
        masks.normal_()
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


@NEEDS_A_GPU
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [8192, 8193])
def test_more_than_two_to_the_31_elements(layout, width):
    """Masks and results of more than 2**31 elements; the last rows are compared, where wrapping would show."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    height, rows = 8192, 6
    features = torch.randn(1, 9, height, width, device="cuda", dtype=torch.float16).to(memory_format=layout)
    masks = torch.randn(1, 9, 2 * height, 2 * width, device="cuda", dtype=torch.float16).to(memory_format=layout)
    assert masks.numel() > 2**31
    result = omniops.carafe(features, masks, 3, 1, 2)
    end = reference.carafe(features[:, :, -rows:], masks[:, :, -2 * rows :], 3, 1, 2, 1)
    torch.testing.assert_close(result[:, :, -2:], end[:, :, -2:], rtol=2e-3, atol=2e-3)
    end = reference.carafe_backward_features(
        result[:, :, -2 * rows :], masks[:, :, -2 * rows :], rows, width, 3, 1, 2, 1
    )
    by_features = torch.ops.omniops.carafe_backward_features(result, masks, height, width, 3, 1, 2, 1)
    torch.testing.assert_close(by_features[:, :, -2:], end[:, :, -2:], rtol=1e-2, atol=0.1)
    del by_features, masks
    end = reference.carafe_backward_masks(result[:, :, -2 * rows :], features[:, :, -rows:], 3, 1, 2, 1)
    by_masks = torch.ops.omniops.carafe_backward_masks(result, features, 3, 1, 2, 1)
    torch.testing.assert_close(by_masks[:, :, -2:], end[:, :, -2:], rtol=1e-2, atol=0.1)


@NEEDS_A_GPU
def test_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    features, masks = torch.randn(1, 8, 4, 4, device="cuda:1"), torch.randn(1, 9, 8, 8, device="cuda:1")
    expected = reference.carafe(features, masks, 3, 1, 2, 1)
    torch.testing.assert_close(omniops.carafe(features, masks, 3, 1, 2), expected)


PRODUCTS = (
    # batch, M, K, N: one tile, ragged tiles, K in splits that are summed, and what cuBLAS is left with
    (2, 5, 16, 7),
    (1, 70, 528, 130),
    (3, 65, 48, 129),
    (1, 3, 4128, 9),
    (2, 5, 17, 7),
)


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("shape", PRODUCTS)
def test_float32_products_on_tensor_cores(shape, precise):
    pytest.importorskip("triton", reason="Triton is not installed")
    from omniops.backends.cuda import _float32_products

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(batch, m, k, generator=generator)
    b = torch.randn(batch, n, k, generator=generator).mT
    right = a.double() @ b.double()
    # Between others' elements, and with a stride: what is not the product's stays as it was.
    storage = torch.full((batch, m, 2 * n + 1), 7.0, device=device)
    out = storage[..., 1::2]
    _float32_products.batched(a.to(device), b.to(device), out, precise)
    error = (out.cpu() - right).abs().max() / right.abs().max()
    assert error < (1e-6 if precise else 2e-3)
    assert torch.equal(storage[..., ::2].cpu(), torch.full((batch, m, n + 1), 7.0))


@pytest.mark.parametrize("n", [48, 40])
def test_float32_products_with_a_bias(n):
    """In rows of multiples of 16 and others, of one part and of several."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from omniops.backends.cuda import _float32_products
    from omniops.backends.cuda._launch import on_device

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(5, generator=generator)
    for k in (32, 4128, 40):
        a, b = torch.randn(2, 5, k, generator=generator), torch.randn(2, n, k, generator=generator).mT
        out = torch.empty(2, 5, n, device=device)
        run = _float32_products.Product(
            2, 5, k, n, a.stride(), b.stride(), out.stride(), precise=True, biased=True, aligned=n % 16 == 0
        )
        with on_device(out) as stream:
            run(stream, a.to(device), b.mT.to(device).mT, out, bias.to(device))
        right = a.double() @ b.double() + bias[:, None]
        assert (out.cpu() - right).abs().max() <= 1e-6 * right.abs().max()
