"""What is particular to multi_scale_deform_attn's Triton kernels: on a GPU where there is one, else in the interpreter.

test_multi_scale_deform_attn.py holds them against the reference.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from multi_scale_attention import DISCRETE, Case, assert_right
from triton_accesses import within

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter does not run")
NOWHERE = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30)


@pytest.fixture
def module():
    from omniops.backends.cuda import multi_scale_deform_attn

    return multi_scale_deform_attn


@pytest.fixture
def launches():
    from omniops.backends.cuda import _multi_scale_deform_launches

    return _multi_scale_deform_launches


def problem(shapes, points, n=1, queries=5, m=2, d=4, dtype=torch.float32, discrete=False):
    """Arguments of the forward, and a gradient of its result; some locations are far outside, infinite and none."""
    generator = torch.Generator().manual_seed(0)
    pixels, k = sum(h * w for h, w in shapes), sum(points)
    locations = torch.rand(n, queries, m, k, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    locations.view(-1)[: len(NOWHERE)] = torch.tensor(NOWHERE)
    tensors = (
        torch.randn(n, pixels, m, d, generator=generator).to(dtype),
        [side for shape in shapes for side in shape],
        locations.to(dtype),
        torch.randn(n, queries, m, k, generator=generator).to(dtype),
        list(points),
        discrete,
    )
    return tensors, torch.randn(n, queries, m * d, generator=generator).to(dtype)


def on(device, arguments):
    return [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in arguments]


def assert_like_the_reference(module, arguments, grad):
    """Returns the result and the gradients."""
    value, sizes, locations, weights, points, discrete = arguments
    shapes = tuple(zip(sizes[::2], sizes[1::2], strict=True))
    case = Case(len(value), grad.shape[1], *value.shape[2:], shapes, tuple(points), discrete)
    tensors = SimpleNamespace(value=value, locations=locations, weights=weights, grad=grad)
    return list(assert_right(module, DEVICE, case, tensors).values())


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
@DISCRETE
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.float64, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_deterministic(module, dtype, discrete):
    """Levels without pixels and without points among others, more samples of a pixel than a step takes."""
    shapes, points = ((4, 5), (0, 3), (1, 1), (3, 2)), (3, 1, 5, 0)
    arguments, grad = problem(shapes, points, n=2, queries=6, m=3, d=9, dtype=dtype, discrete=discrete)
    first = assert_like_the_reference(module, arguments, grad)[1:]
    again = module.multi_scale_deform_attn_backward(grad.to(DEVICE), *on(DEVICE, arguments), [True] * 3)
    for result, same in zip(again, first, strict=True):
        # Not by torch.equal, for which what is not a number is no equal.
        assert torch.equal(result.nan_to_num(7), same.nan_to_num(7))


@pytest.mark.usefixtures("deterministic")
def test_deterministic_adds_nothing_by_atomics(module, launches, monkeypatch):
    ran = []

    def launch_of(kernel, *args, **constants):
        return lambda *tensors: ran.append((kernel.__name__, constants.get("BY_VALUE")))

    monkeypatch.setattr(launches, "Launch", launch_of)
    monkeypatch.setattr(torch, "searchsorted", lambda order, every, out_int32: every)
    arguments, grad = problem(((3, 2),), (2,))
    module.multi_scale_deform_attn_backward(grad, *arguments, [True] * 3)
    assert ("gather", None) in ran
    assert ("backward", False) in ran
    assert ("backward", True) not in ran


@DISCRETE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_levels_than_a_kernel_knows(module, dtype, discrete):
    shapes = ((2, 3), (0, 0), *((1, 2),) * 15)
    points = (2, 1, *(1,) * 15)
    arguments, grad = problem(shapes, points, queries=2, dtype=dtype, discrete=discrete)
    assert len(shapes) > 2 * module.MAX_LEVELS
    results = assert_like_the_reference(module, arguments, grad)
    by_value, nothing, by_weights = module.multi_scale_deform_attn_backward(
        grad.to(DEVICE), *on(DEVICE, arguments), [True, False, True]
    )
    assert nothing.shape == (0,)
    torch.testing.assert_close(by_value, results[1])
    assert torch.equal(by_weights.nan_to_num(7), results[3].nan_to_num(7))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.bfloat16))],
    ids=str,
)
def test_many_queries(module, launches, monkeypatch, dtype):
    """The kernels for many rows, on few. In half precision sums of the last levels, as far as small, have copies."""
    monkeypatch.setattr(launches, "FEW", 1)
    monkeypatch.setattr(launches, "SMALL", 6)
    shapes, points = ((1, 2), (15, 16), (0, 4), (2, 3), (1, 1)), (2, 4, 1, 4, 1)
    arguments, grad = problem(shapes, points, 2, 9, m=2, d=32, dtype=dtype)
    found = launches.Problem(arguments[0], arguments[1], arguments[3], arguments[4], False)
    small, copies = (242, launches.COPIES) if dtype != torch.float32 else (found.pixels, 1)
    assert (found.first_small, found.copies) == (small, copies)
    assert_like_the_reference(module, arguments, grad)


def test_copies_are_a_small_part_of_the_sums(launches, monkeypatch):
    monkeypatch.setattr(launches, "FEW", 1)
    for shapes, first_small in (
        (((20, 20), (4, 4), (2, 2)), 416),
        (((8, 8), (8, 8)), 128),
        (((100, 100), (25, 25)), 10625),  # not small
        (((100, 100), (25, 25), (12, 13)), 10625),
    ):
        arguments, _ = problem(shapes, (1,) * len(shapes), dtype=torch.float16)
        found = launches.Problem(arguments[0], arguments[1], arguments[3], arguments[4], False)
        assert found.first_small == first_small
        assert 32 * (found.pixels - found.first_small) <= found.pixels
        assert found.sum_shape[1] == (found.pixels + (found.copies - 1) * (found.pixels - first_small)) * 8


@pytest.mark.usefixtures("deterministic")
def test_samples_that_cannot_be_sorted_are_refused(launches):
    arguments, grad = problem(((3, 4),), (3,))
    value, sizes, locations, weights, points, _ = arguments
    many = torch.empty((2, 2**28, 2, 3), device="meta")
    gather = launches.Problem(value.new_empty((2, 12, 2, 4), device="meta"), sizes, many, points, False).gathered()
    with pytest.raises(
        ValueError, match=r"attention_weights must have fewer than 2\*\*31 elements on CUDA under torch"
    ):
        gather(0, grad, value, locations, weights)


def test_copies_are_summed_in_blocks_with_and_without_any(launches):
    from omniops.backends.cuda._launch import on_device

    n, pixels, small, pitch, copies = 2, 200, 30, 8, 3
    totals = torch.randn(n, (pixels + (copies - 1) * small) * pitch, device=DEVICE)
    arguments, _ = problem(((pixels - small, 1), (small, 1)), (1, 1), n=n, m=2, d=4, dtype=torch.float16)
    found = launches.Problem(arguments[0], arguments[1], arguments[3], arguments[4], False)
    found.first_small, found.copies = pixels - small, copies
    out = torch.empty_like(arguments[0], device=DEVICE)
    with on_device(out) as stream:
        found.finish()(stream, totals, out)
    expected = totals[:, : pixels * pitch].clone()
    for copy in range(1, copies):
        first = (pixels + (copy - 1) * small) * pitch
        expected[:, -small * pitch :] += totals[:, first : first + small * pitch]
    torch.testing.assert_close(out.flatten(1), expected.half())


@pytest.mark.parametrize("d", [1, 5, 24, 36, 64, 136, 300])
def test_channels_of_any_number(module, d):
    for dtype in (torch.float32, torch.float16):
        arguments, grad = problem(((3, 4),), (3,), queries=2, m=1, d=d, dtype=dtype)
        assert_like_the_reference(module, arguments, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_gradients_have_the_strides_of_new_tensors(module, dtype, is_deterministic):
    """Also those of tensors that are contiguous with other strides, as of one image whose pixels come first."""
    arguments, grad = problem(((3, 4),), (3,), queries=2, m=1, dtype=dtype)
    like_new = {"memory_format": torch.contiguous_format}
    arguments = [
        arg.transpose(0, 1).clone(**like_new).transpose(0, 1) if isinstance(arg, torch.Tensor) else arg
        for arg in on(DEVICE, arguments)
    ]
    assert arguments[0].is_contiguous()
    assert arguments[0].stride() != torch.empty(arguments[0].shape).stride()
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        gradients = module.multi_scale_deform_attn_backward(grad.to(DEVICE), *arguments, [True] * 3)
    finally:
        torch.use_deterministic_algorithms(False)
    for gradient in gradients:
        assert gradient.stride() == torch.empty(gradient.shape).stride()


def test_offsets_of_all_corners_have_32_bits_or_are_wide(launches):
    """The last corner of a sample above a map of one row is a row and a pixel from the first."""
    for width, wide in ((2**23 - 2, False), (2**23 - 1, True)):
        value, weights = torch.empty((1, width, 1, 256), device="meta"), torch.empty((1, 1, 1, 1), device="meta")
        assert launches.Problem(value, [1, width], weights, [1], False).wide == wide


def test_samples_of_no_cell_come_last_where_cells_take_64_bits(launches):
    from omniops.backends.cuda import _multi_scale_deform_gather as kernels
    from omniops.backends.cuda._launch import Launch, on_device

    (value, sizes, _, weights, points, _), _ = problem(((3, 4),), (3,), n=2, queries=2, m=2)
    constants = launches.Problem(value, sizes, weights, points, False).constants
    cells, rows = 2**30, 8
    locations = torch.full((*weights.shape, 2), 5.0, device=DEVICE)
    keys = torch.zeros(weights.shape, dtype=torch.int64, device=DEVICE)
    launch = Launch(kernels.cells_of, (1,), rows, 2, cells, *sizes, *(0,) * 14, **constants, BLOCK=8, BLOCK_P=4)
    with on_device(keys) as stream:
        launch(stream, locations, keys)
    assert (keys == 4 * cells).all()


def test_what_begins_within_vectors_is_copied(module):
    arguments, _ = problem(((3, 4),), (3,))
    value = arguments[0].to(DEVICE)
    apart = torch.cat((value.flatten()[:1], value.flatten()))[1:].view(value.shape)
    assert not module._is_dense(apart)
    assert torch.equal(module._dense(apart), apart)
    assert module._is_dense(module._dense(apart))
    assert module._dense(value) is value


def test_the_sums_of_half_precision_are_float32(module):
    """2049 samples of a pixel: in half precision the sum would stay at 2048."""
    arguments, _ = problem(((1, 1),), (1,), queries=2049, m=1, d=1, dtype=torch.float16)
    value, shapes, locations, weights, points, discrete = arguments
    arguments = value, shapes, torch.full_like(locations, 0.5), torch.ones_like(weights), points, discrete
    grad = torch.ones(1, 2049, 1, dtype=torch.float16)
    grad[0, 0] = 3
    by_value, *_ = module.multi_scale_deform_attn_backward(
        grad.to(DEVICE), *on(DEVICE, arguments), [True, False, False]
    )
    assert by_value.item() == 2048 + 3 + 1  # rounded to even


@pytest.mark.parametrize(
    ("value", "shapes", "weights", "points", "message"),
    [
        ((1, 2**31 - 2**14, 1, 1), [2**14, 2**17 - 1], (1, 1, 1, 1), [1], r"must have S below 2\*\*31 - 2\*\*14"),
        ((1, 1, 1, 2**22), [1, 1], (1, 1, 1, 1), [1], r"and D below 2\*\*22 on CUDA, got shape"),
        ((1, 1, 2**15, 2**16), [1, 1], (1, 1, 2**15, 1), [1], r"value must have .* M \* D below 2\*\*31"),
        ((1, 2**30, 1, 1), [2**30, 1], (1, 1, 1, 1), [1], r"spatial_shapes must have sides below 2\*\*30"),
        ((2, 1, 4, 1), [1, 1], (2, 2**28, 4, 1), [1], r"attention_weights must have N \* \(Q \+ 128\) \* M below"),
        ((1, 1, 1, 1), [1, 1], (1, 1, 1, 2**16), [2**16], r"points_per_level must be below 2\*\*16"),
    ],
)
@pytest.mark.parametrize("more_levels", [0, 8])
def test_limits(module, value, shapes, weights, points, message, more_levels):
    def meta(*shape):
        return torch.empty(shape, device="meta")

    shapes, points = shapes + [0, 0] * more_levels, points + [0] * more_levels
    inputs = meta(*value), shapes, meta(*weights, 2), meta(*weights), points, False
    grad = meta(*weights[:2], value[2] * value[3])
    with pytest.raises(ValueError, match=message):
        module.multi_scale_deform_attn.prepare(*inputs)
    with pytest.raises(ValueError, match=message):
        module.multi_scale_deform_attn_backward.prepare(grad, *inputs, [True] * 3)


def test_an_image_of_more_than_two_to_the_31_elements(module):
    """Its last pixels are sampled, where an offset of 32 bits would wrap."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    height, width, d = 2**10, 2**10, 2**11 + 1
    elements = height * width * d
    assert elements > 2**31
    if torch.cuda.is_available():
        memory = torch.zeros(elements, dtype=torch.float16, device="cuda")
    else:
        # Address space alone: nothing but the rows that are sampled is ever touched.
        memory = torch.from_numpy(np.zeros(elements, dtype=np.float16))
    value = memory.view(1, height * width, 1, d)
    value[0, -2], value[0, -1] = 1, 2
    x = torch.tensor([(width - 1) / width, 1 - 0.5 / width, 1 + 0.5 / width], device=DEVICE)  # between, on, and outside
    locations = torch.stack((x, torch.full_like(x, 1 - 0.5 / height)), -1).view(1, 3, 1, 1, 2)
    weights = torch.ones(1, 3, 1, 1, device=DEVICE)
    sizes = [height, width]
    out = module.multi_scale_deform_attn(value, sizes, locations, weights, [1], False)
    assert out[0, :, [0, -1]].tolist() == [[1.5, 1.5], [2, 2], [0, 0]]
    grad = torch.ones_like(out)
    _, by_locations, by_weights = module.multi_scale_deform_attn_backward(
        grad, value, sizes, locations, weights, [1], False, [False, True, True]
    )
    assert by_weights.flatten().tolist() == [1.5 * d, 2 * d, 0]
    assert by_locations[0, 0, 0, 0].tolist() == [width * d, -1.5 * height * d]


@IS_INTERPRETED
@DISCRETE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("few", [1, 2**15], ids=["many", "few"])
def test_it_stays_within_its_tensors(module, launches, accesses, dtype, few, discrete, monkeypatch):
    """Locations on every border, far outside, infinite and none; points, queries and channels that fill no block."""
    made = []
    monkeypatch.setattr(launches, "FEW", few)
    for name in ("new_zeros", "new_empty"):
        own = getattr(torch.Tensor, name)

        def kept(*args, own=own, **kwargs):
            made.append(own(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(torch.Tensor, name, kept)
    shapes, points = ((1, 1), (0, 2), (2, 3)), (3, 1, 5)
    arguments, grad = problem(shapes, points, queries=9, m=1, d=3, dtype=dtype, discrete=discrete)
    locations = arguments[2]
    borders = torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, *NOWHERE])
    pairs = torch.cartesian_prod(borders, borders)[: locations.numel() // 2]
    locations.view(-1, 2)[: len(pairs)] = pairs.to(dtype)
    results = module.multi_scale_deform_attn(*arguments)
    gradients = module.multi_scale_deform_attn_backward(grad, *arguments, [True] * 3)
    assert accesses.read
    assert accesses.written
    assert accesses.added
    value, _, locations, weights, *_ = arguments
    inputs = value, locations, weights, grad
    # The interpreter makes views of what it gets in the same way.
    first = [tensor.data_ptr() for tensor in inputs]
    made = [tensor for tensor in made if tensor.data_ptr() not in first]
    assert within(accesses.read, *inputs, *made)
    assert within(accesses.written, results, *gradients, *made)
    assert within(accesses.added, *made)


@IS_INTERPRETED
@pytest.mark.usefixtures("deterministic")
@DISCRETE
def test_it_stays_within_its_tensors_without_atomics(module, accesses, discrete, monkeypatch):
    made = []
    for name in ("sort", "searchsorted", "empty"):
        own = getattr(torch, name)

        def kept(*args, own=own, **kwargs):
            found = own(*args, **kwargs)
            made.extend([found] if isinstance(found, torch.Tensor) else found)
            return found

        monkeypatch.setattr(torch, name, kept)
    arguments, grad = problem(((1, 1), (0, 2), (2, 3)), (3, 1, 5), n=2, queries=4, m=2, d=3, discrete=discrete)
    gradients = module.multi_scale_deform_attn_backward(grad, *arguments, [True, False, False])
    value, _, locations, weights, *_ = arguments
    assert accesses.read
    assert accesses.written
    assert not accesses.added
    assert within(accesses.read, value, locations, weights, grad, *made)
    assert within(accesses.written, gradients[0], *made)
