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
    from omniops.backends.cuda import _carafe_launches

    return _carafe_launches


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="Triton is not installed")
    from omniops.backends.cuda import carafe

    return carafe


def test_pairs_serve_what_is_stored_row_by_row(launches):
    def served(features, masks, result):
        tensors = {"fine": features, "coarse": (masks, result)}
        if not launches._in_pairs(launches.Settings(5, 1, 2, 1), **tensors):
            return "by others"
        return "in vectors" if launches._in_vectors(**tensors) else "in pairs"

    def problem(width):
        return [torch.zeros(shape) for shape in ((1, 4, 3, width), (1, 25, 6, 2 * width), (1, 4, 6, 2 * width))]

    even = problem(6)
    assert served(*even) == "in vectors"
    assert served(*problem(7)) == "in pairs"
    for i, tensor in enumerate(even):
        *shape, width = tensor.shape
        for reason, other, kernels in (
            (
                "rows that start within vectors",
                torch.zeros(*shape, width + 2)[..., :-2],
                ("in vectors", "in pairs")[i > 0],
            ),
            (
                "rows that start within pairs",
                torch.zeros(*shape, width + 1)[..., :-1],
                ("in pairs", "by others")[i > 0],
            ),
            ("rows that are not contiguous", torch.zeros(*shape[:2], width, shape[2]).mT, "by others"),
        ):
            assert served(*even[:i], other, *even[i + 1 :]) == kernels, reason
    assert not launches._in_pairs(launches.Settings(5, 1, 2, 2), fine=even[0], coarse=even[1:])
    assert not launches._in_pairs(launches.Settings(5, 1, 3, 1), fine=even[0], coarse=even[1:])
    assert not launches._in_pairs(launches.Settings(9, 1, 2, 1), fine=even[0], coarse=even[1:])


def test_a_row_beyond_32_bits_is_copied(kernels):
    # Address space alone: nothing but the two elements is ever touched.
    memory = torch.from_numpy(np.zeros(2**30 + 1, dtype=np.float16))
    memory[0], memory[-1] = 1, 2
    apart = memory.as_strided((1, 1, 1, 2), (1, 1, 1, 2**30))
    copied = kernels._dense(apart)
    assert copied.stride(3) == 1
    assert torch.equal(copied, apart)
    near = memory.as_strided((1, 1, 1, 2), (1, 1, 1, 2**30 - 1))
    assert kernels._dense(near) is near


def test_the_gradient_of_a_sum_is_copied(kernels):
    """It repeats one element, for which other kernels would be compiled."""
    expanded = torch.ones(()).expand(1, 2, 3, 4)
    assert kernels._dense(expanded).is_contiguous()
    one_column = torch.ones(1, 2, 3, 1).as_strided((1, 2, 3, 1), (6, 3, 1, 0))
    assert kernels._dense(one_column) is one_column


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 40), (1, 33)])
def test_pairs_in_tiles_of_any_shape(kernels, size):
    """A tile of 32 pairs is as wide as the map, up to a limit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h, w = size
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 3, h, w), (1, 9, 2 * h, 2 * w), (1, 3, 2 * h, 2 * w)
    features, masks, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    inputs = [tensor.to(device) for tensor in (features, masks, grad)]
    out = kernels.carafe(*inputs[:2], 3, 1, 2, 1)
    torch.testing.assert_close(out.cpu(), reference.carafe(features, masks, 3, 1, 2, 1))
    by_features, by_masks = kernels.carafe_backward(inputs[2], *inputs[:2], h, w, 3, 1, 2, 1)
    torch.testing.assert_close(by_features.cpu(), reference.carafe_backward_features(grad, masks, h, w, 3, 1, 2, 1))
    torch.testing.assert_close(by_masks.cpu(), reference.carafe_backward_masks(grad, features, 3, 1, 2, 1))


def test_only_the_gradients_that_are_wanted(kernels):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = (1, 2, 2, 4), (1, 9, 4, 8), (1, 2, 4, 8)
    features, masks, grad = (torch.randn(shape, device=device) for shape in shapes)
    gradients = kernels.carafe_backward(grad, features, masks, 2, 4, 3, 1, 2, 1)
    by_features, nothing = kernels.carafe_backward(grad, None, masks, 2, 4, 3, 1, 2, 1)
    assert torch.equal(by_features, gradients[0])
    assert nothing.shape == (0,)
    nothing, by_masks = kernels.carafe_backward(grad, features, None, 2, 4, 3, 1, 2, 1)
    assert torch.equal(by_masks, gradients[1])
    assert nothing.shape == (0,)


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
    by_features, _ = torch.ops.omniops.carafe_backward(result, None, masks, height, width, 3, 1, 2, 1)
    torch.testing.assert_close(by_features[:, :, -2:], end[:, :, -2:], rtol=1e-2, atol=0.1)
    del by_features, masks
    end = reference.carafe_backward_masks(result[:, :, -2 * rows :], features[:, :, -rows:], 3, 1, 2, 1)
    _, by_masks = torch.ops.omniops.carafe_backward(result, features, None, height, width, 3, 1, 2, 1)
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
    from omniops.backends.cuda._launch import on_device

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(batch, m, k, generator=generator)
    b = torch.randn(batch, n, k, generator=generator).mT
    right = a.double() @ b.double()
    # Between others' elements, and with a stride: what is not the product's stays as it was.
    storage = torch.full((batch, m, 2 * n + 1), 7.0, device=device)
    out = storage[..., 1::2]
    a, b = a.to(device), b.mT.to(device).mT
    run = _float32_products.Product(*a.shape, n, a.stride(), b.stride(), out.stride(), precise=precise)
    with on_device(out) as stream:
        run(stream, a, b, out)
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


DEFORMED = {
    # n, c, c_out, kernel, groups, offset_groups, stride, masked, biased, memory format
    "narrow": (
        (2, 64, 20, (2, 2), 1, 16, (1, 1), True, True, torch.contiguous_format),
        (1, 64, 6, (2, 2), 2, 8, (2, 1), False, True, torch.channels_last),  # eight channels a group, blocks within one
        (1, 16, 4, (3, 3), 1, 16, (1, 2), True, False, torch.contiguous_format),
        (1, 32, 40, (1, 2), 2, 16, (1, 1), True, True, torch.contiguous_format),
    ),
    "split_columns": (
        (2, 128, 140, (2, 1), 1, 1, (1, 1), True, True, torch.contiguous_format),
        (1, 128, 260, (1, 2), 2, 1, (2, 1), False, True, torch.channels_last),  # blocks end with weight groups,
        (1, 128, 130, (2, 1), 1, 2, (1, 2), True, False, torch.contiguous_format),  # and with offset groups
    ),
}


def deformed(case, dtype):
    """Arguments of deform_conv2d, with positions that are far away, infinite and none."""
    n, c, c_out, kernel, groups, offset_groups, stride, masked, biased, layout = case
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    rows, columns = (7 - kernel[0]) // stride[0] + 1, (9 - kernel[1]) // stride[1] + 1
    samples = kernel[0] * kernel[1] * offset_groups
    offset = random(n, 2 * samples, rows, columns)
    offset[0, :3, 0, 0] = torch.tensor([float("inf"), -float("inf"), 1e4])
    tensors = (
        random(n, c, 5, 7).to(memory_format=layout),
        offset,
        random(c_out, c // groups, *kernel),
        random(c_out) if biased else None,
        random(n, samples, rows, columns) if masked else None,
    )
    return tensors, (list(stride), [1, 1], [1, 1])


def assert_deformed(name, case, tensors, numbers, tolerance, monkeypatch, tf32=False):
    from omniops.backends.cuda import _deform_forward
    from omniops.backends.cuda import deform_conv2d as module
    from omniops.backends.reference import deform_conv2d as reference

    called = []
    served = getattr(_deform_forward, name)
    monkeypatch.setattr(_deform_forward, name, lambda *arguments: called.append(name) or served(*arguments))
    monkeypatch.setattr(_deform_forward, "is_tf32", lambda: tf32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    out = module.deform_conv2d(*moved, *numbers)
    assert called == [name]
    assert out.is_contiguous(memory_format=case[-1])
    right = reference.deform_conv2d(*(None if tensor is None else tensor.double() for tensor in tensors), *numbers)
    # An infinite factor may give a NaN where an infinity was due.
    finite = right.abs() <= torch.finfo(out.dtype).max
    assert torch.equal(out.isfinite().cpu(), finite)
    scale = right.where(finite, 0).abs().amax((0, 2, 3), keepdim=True)
    assert ((out.cpu() - right).abs() <= tolerance * scale)[finite].all()


@pytest.mark.parametrize(
    ("name", "case", "dtype", "tf32", "tolerance"),
    [
        (name, case, dtype, tf32, tolerance)
        for name, cases in DEFORMED.items()
        for case in cases
        for dtype, tf32, tolerance in (
            (torch.float32, False, 1e-5),
            (torch.float32, True, 2e-3),
            (torch.float16, False, 2e-3),
            (torch.bfloat16, False, 2e-2),
        )
        if name == "narrow" or dtype == torch.float32
    ],
    ids=str,
)
def test_other_forwards_of_deform_conv2d(name, case, dtype, tf32, tolerance, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_deformed(name, case, *deformed(case, dtype), tolerance, monkeypatch, tf32)


@pytest.mark.parametrize("name", DEFORMED)
@pytest.mark.parametrize("scale", [1e-30, 1, 1e30])
def test_parts_of_float16_have_the_range_of_float32(name, scale, monkeypatch):
    """Images, output channels and positions of very different sizes, each right to its own scale; and zeros."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = DEFORMED[name][0]
    (input, offset, weight, _, mask), numbers = deformed(case, torch.float32)
    mask[0] *= 1e-6
    mask[1, :, :, 0] = 0
    weight *= torch.logspace(-4, 4, len(weight))[:, None, None, None]
    weight[0] = 0
    input = torch.stack((input[0] * 0, input[1] * scale))
    assert_deformed(name, case, (input, offset, weight, None, mask), numbers, 1e-5, monkeypatch)


@pytest.mark.parametrize("name", DEFORMED)
@pytest.mark.parametrize("scales", [(1e36, 1), (1, 1e36), (1e36, 1e-40), (1e-30, 1e30), (1e-37, 1)], ids=str)
def test_parts_of_float16_at_the_ends_of_the_range(name, scales, monkeypatch):
    """Factors near the largest and the smallest float32, and weights that are subnormal numbers."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = DEFORMED[name][0]
    (input, offset, weight, _, mask), numbers = deformed(case, torch.float32)
    tensors = input * scales[0], offset, weight * scales[1], None, mask
    assert_deformed(name, case, tensors, numbers, 1e-5, monkeypatch)


@pytest.mark.parametrize("name", DEFORMED)
def test_parts_of_float16_leave_what_is_not_finite_where_it_is_sampled(name, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    case = DEFORMED[name][0]
    (input, offset, weight, bias, mask), numbers = deformed(case, torch.float32)
    input[0, 3, 2, 2], input[1, -2, -1, -1] = float("inf"), float("nan")
    # The infinities of 1e30 * 1e30, beside numbers that stay.
    input[1, 5, 1, 1], weight[2] = 1e30, weight[2] * 1e30
    assert_deformed(name, case, (input, offset, weight, bias, mask), numbers, 1e-5, monkeypatch)


def test_chunks_of_columns_in_parts(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from omniops.backends.cuda import _deform_launches

    case = DEFORMED["split_columns"][0]
    monkeypatch.setattr(_deform_launches, "MAX_CHUNK_BYTES", 20 * 2 * 128 * 4 + 200)  # 20 of 54 positions
    assert_deformed("split_columns", case, *deformed(case, torch.float32), 1e-5, monkeypatch)
