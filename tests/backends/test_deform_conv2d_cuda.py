"""What is particular to deform_conv2d's Triton kernels, on the GPU where there is one, else in Triton's interpreter."""

from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backend_cases import TOLERANCES, map_tensors
from deform_conv2d_cases import FUSED, UNEVEN, Case, assert_right, in_cuda_chunks, kernels, problem, results

import omniops.ops.deform_conv2d  # noqa: F401  registers the operator
from omniops.backends.reference import deform_conv2d as reference

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


FUSED_CASES = [
    FUSED,
    Case(2, 128, 2, 3, 40, (1, 2), (1, 1), (0, 1), (1, 2), offset_groups=2, masked=False),  # blocks within a run
    Case(1, 64, 3, 2, 12, (2, 1), (2, 1), (1, 0), groups=4, offset_groups=2),
]


def is_fused(x, case):
    problem = kernels("cuda").Problem(x.input, x.offset, x.weight, x.mask, *case.numbers)
    return import_module("omniops.backends.cuda._deform_forward").is_fused(problem, has_tf32=True)


def assert_fused_is_right(case, dtype, tolerance=None):
    module, tensors = kernels("cuda"), problem(case, dtype)
    x = map_tensors(lambda tensor: tensor.to(TRITON_DEVICE), tensors)
    assert is_fused(x, case)
    out = module.deform_conv2d(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    tensors = map_tensors(torch.Tensor.double, tensors)
    expected = reference.deform_conv2d(
        tensors.input, tensors.offset, tensors.weight, tensors.bias, tensors.mask, *case.numbers
    )
    error = (out.cpu() - expected).abs().max() / expected.abs().max()
    assert error <= (tolerance or TOLERANCES[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_the_fused_forward(case, dtype):
    assert_fused_is_right(case, dtype)


@needs_triton
@pytest.mark.parametrize(("n", "positions", "counts"), [(2, 7, [6] * 4), (3, 30, [24, 12])])
def test_the_fused_forward_in_chunks(n, positions, counts, monkeypatch):
    """Of parts of an image, and of images."""
    found = in_cuda_chunks(monkeypatch, positions)
    assert_fused_is_right(FUSED._replace(n=n), torch.float32)
    assert found == counts


@pytest.fixture
def matmul():
    """PyTorch's switches of float32 products, which are afterwards as they were."""
    switches = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    precision = torch.get_float32_matmul_precision()
    before = [getattr(switch, "fp32_precision", None) for switch in switches]
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision(precision)
    for switch, value in zip(switches, before, strict=True):
        if value is not None:
            switch.fp32_precision = value


@needs_triton
def test_pytorchs_switches_of_tf32_are_honoured(matmul, monkeypatch):
    module = kernels("cuda")
    for allowed in (True, False, True):
        matmul.allow_tf32 = allowed
        assert module.is_tf32() == allowed
    for precision, allowed in (("highest", False), ("high", True), ("highest", False), ("medium", True)):
        torch.set_float32_matmul_precision(precision)
        assert module.is_tf32() == allowed
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9
        for precision in ("ieee", "tf32", "none"):
            matmul.fp32_precision = precision
            assert module.is_tf32() == (precision == "tf32")
    for allowed in (True, False):  # before torch 2.9
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert module.is_tf32() == allowed


@pytest.fixture
def precisions(monkeypatch):
    """Whether products are of float32 and not of TF32: for each launch of a kernel that has them, as they come."""
    found = []
    for name in ("_deform_launches", "_float32_products"):
        module = import_module(f"omniops.backends.cuda.{name}")

        class Watched(module.Launch):
            def __call__(self, stream, *tensors):
                if "PRECISE" in self._constants:
                    found.append(self._constants["PRECISE"])
                super().__call__(stream, *tensors)

        monkeypatch.setattr(module, "Launch", Watched)
    return found


@pytest.mark.slow
@needs_triton
def test_the_switch_of_tf32_is_asked_at_each_call(matmul, precisions):
    module, case = kernels("cuda"), FUSED
    x = map_tensors(lambda tensor: tensor.to(TRITON_DEVICE), problem(case, torch.float32))
    numbers = *case.numbers, [True] * 5
    forward = module.deform_conv2d.prepare(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    backward = module.deform_conv2d_backward.prepare(x.grad, x.input, x.offset, x.weight, x.mask, *numbers)
    expected = results(reference, case, map_tensors(torch.Tensor.double, x))
    for allowed, tolerance in ((False, 1e-5), (True, 2e-3), (False, 1e-5)):
        matmul.allow_tf32 = allowed
        precisions.clear()
        out = forward(x.input, x.offset, x.weight, x.bias, x.mask)
        assert precisions == [not allowed]
        gradients = backward(x.grad, x.input, x.offset, x.weight, x.mask)
        assert set(precisions) <= {not allowed}
        for result, wanted in zip((out, *gradients), expected.values(), strict=True):
            assert (result - wanted).abs().max() <= tolerance * wanted.abs().max()


@needs_triton
def test_without_tensor_cores_products_are_pytorchs(precisions, monkeypatch):
    module, case = kernels("cuda"), FUSED._replace(c_out=32)
    monkeypatch.setattr(module, "has_tf32", lambda tensor: False)
    assert_right(module, TRITON_DEVICE, case, problem(case, torch.float32))
    assert not precisions


@needs_triton
def test_the_fused_forward_in_tf32(matmul, precisions):
    matmul.allow_tf32 = True
    assert_fused_is_right(FUSED, torch.float32, tolerance=2e-3)
    assert precisions == [False]


@pytest.mark.slow
@needs_triton
@pytest.mark.filterwarnings("ignore:Deterministic behavior")
@pytest.mark.parametrize(
    ("case", "positions"),
    [
        (UNEVEN._replace(h=3, w=4), None),
        (UNEVEN._replace(h=3, w=4), 4),
        (Case(2, 64, 2, 3, 4, (1, 2), padding=(0, 1), groups=2, offset_groups=2), 5),
        (Case(2, 300, 2, 2, 2, (1, 1), padding=(0, 0)), None),
    ],
    ids=str,
)
def test_deterministic_gradients(case, positions, deterministic, monkeypatch):
    module, tensors = kernels("cuda"), problem(case, torch.float32)
    if positions is not None:
        in_cuda_chunks(monkeypatch, positions)
    first, second = (assert_right(module, TRITON_DEVICE, case, tensors) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@needs_triton
def test_deterministic_algorithms_are_asked_for_at_each_call(deterministic, monkeypatch):
    module, case = kernels("cuda"), UNEVEN._replace(h=3, w=4)
    gathers, gather = [], module.Problem.sort_samples
    monkeypatch.setattr(module.Problem, "sort_samples", lambda *args: gathers.append(1) or gather(*args))
    x = map_tensors(lambda tensor: tensor.to(TRITON_DEVICE), problem(case, torch.float32))
    arguments = x.grad, x.input, x.offset, x.weight, x.mask
    run = module.deform_conv2d_backward.prepare(*arguments, *case.numbers, [True] * 5)
    gathered = run(*arguments)
    assert len(gathers) == 1
    torch.use_deterministic_algorithms(False)
    added = run(*arguments)
    assert len(gathers) == 1
    for one, other in zip(added, gathered, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.fixture
def bounds(monkeypatch):
    """Has Triton's interpreter fail where a kernel reads or writes beside its tensors; it gets their kernels' names."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is what looks at addresses")
    from triton.runtime.interpreter import InterpreterBuilder

    from omniops.backends.cuda._launch import Launch

    names, memory = set(), []
    call = Launch.__call__

    def span(tensor):
        """From the first element to behind the last."""
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return 1 + reach if tensor.numel() > 0 else 0

    def launch(self, stream, *tensors):
        names.add(self._kernel.__name__)
        memory[:] = [(tensor.data_ptr(), tensor.data_ptr() + span(tensor) * tensor.itemsize) for tensor in tensors]
        call(self, stream, *tensors)

    def watched(access):
        def check_bounds(builder, pointers, *rest):
            mask = rest[1] if access.__name__ == "create_masked_store" else rest[0]
            addresses = pointers.data[mask.data.astype(bool)]
            inside = np.zeros(addresses.shape, bool)
            for first, end in memory:
                inside |= (addresses >= first) & (addresses < end)
            assert inside.all(), names
            return access(builder, pointers, *rest)

        return check_bounds

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name)))
    monkeypatch.setattr(Launch, "__call__", launch)
    return names


@needs_triton
@pytest.mark.filterwarnings("ignore:Deterministic behavior")
@pytest.mark.parametrize(
    "case",
    [
        # Maps of one pixel, of which a block of positions has many; one case for each forward.
        Case(3, 6, 1, 1, 2, offset_groups=2),
        Case(3, 32, 1, 1, 2, (1, 2)),
        Case(3, 32, 1, 1, 2, (2, 1), groups=2, offset_groups=16),
        Case(3, 64, 1, 1, 80, (1, 2), masked=False),
    ],
    ids=str,
)
def test_no_kernel_reads_beside_its_tensors(case, bounds, deterministic):
    module, tensors = kernels("cuda"), problem(case, torch.float32)
    x = map_tensors(lambda tensor: tensor.to(TRITON_DEVICE), tensors)
    module.deform_conv2d_backward(x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, [True] + [False] * 4)
    torch.use_deterministic_algorithms(False)
    assert_right(module, TRITON_DEVICE, case, tensors)
    assert {"prepare", "gradients", "gather", "finish"} <= bounds


@needs_triton
@pytest.mark.parametrize("case", [Case(1, 16, 1, 1, 2), Case(1, 16, 1, 1, 2, offset_groups=2)], ids=str)
def test_offsets_far_apart_in_memory(case, bounds):
    """Strides whose double is beyond 32 bits."""
    case = case._replace(kernel_size=(1, 1), padding=(0, 0), masked=False)
    x, far = problem(case, torch.float16), 2**30
    try:
        # Zeros that take address space, but memory only where they are written.
        memory = torch.from_numpy(np.zeros((2 * case.offset_groups - 1) * far + 1, np.float16))
    except MemoryError:
        pytest.skip("the system does not give out memory that it may not have")
    offset = memory.as_strided(x.offset.shape, (far, far, 1, 1))
    x.offset = offset.copy_(x.offset)
    out = kernels("cuda").deform_conv2d(x.input, x.offset, x.weight, x.bias, None, *case.numbers)
    x = map_tensors(torch.Tensor.double, x)
    expected = reference.deform_conv2d(x.input, x.offset, x.weight, x.bias, None, *case.numbers)
    assert (out - expected).abs().max() <= 2e-3 * expected.abs().max()


@needs_triton
def test_a_lone_gradient_of_the_bias_launches_nothing(monkeypatch):
    case = UNEVEN._replace(h=3, w=4)
    x = map_tensors(lambda tensor: tensor.to(TRITON_DEVICE), problem(case, torch.float32))
    module = kernels("cuda")
    launch = import_module("omniops.backends.cuda._launch").Launch
    monkeypatch.setattr(launch, "__call__", lambda *_: pytest.fail("a kernel was launched"))
    wanted = [False, False, False, True, False]
    gradients = module.deform_conv2d_backward(x.grad, x.input, x.offset, x.weight, x.mask, *case.numbers, wanted)
    assert [gradient.numel() for gradient in gradients] == [0, 0, 0, case.c_out, 0]
    torch.testing.assert_close(gradients[3], x.grad.sum((0, 2, 3)))


def on_meta(case):
    """The tensors of a case, without memory."""
    taps, size = case.kernel_size[0] * case.kernel_size[1], case.out_size
    shapes = {
        "input": (case.n, case.c, case.h, case.w),
        "offset": (case.n, case.offset_groups * taps * 2, *size),
        "weight": (case.c_out, case.c // case.groups, *case.kernel_size),
        "bias": (case.c_out,),
        "mask": (case.n, case.offset_groups * taps, *size),
        "grad": (case.n, case.c_out, *size),
    }
    return SimpleNamespace(
        **{name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in shapes.items()}
    )


POINT = Case(1, 1, 1, 1, 1, (1, 1), padding=(0, 0))


@needs_triton
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            POINT._replace(h=2**16 - 2, w=2**15 - 2, stride=(2**16, 1)),
            r"input must have \(H \+ 2\) \* \(W \+ 2\) below 2",
        ),
        (POINT._replace(c=2**20, w=2**11 - 2), r"input must have C \* \(W \+ 2\) below 2\*\*31 on CUDA"),
        (POINT._replace(n=2**16, h=2**15 - 2, stride=(2**15, 1)), r"input must have N \* \(H \+ 2\) below 2\*\*31 on"),
        (
            POINT._replace(n=2, padding=(2**14, 2**14)),
            r"offset must have N \* H_out \* W_out below 2\*\*31 - 4096 on CUDA",
        ),
        (POINT._replace(c=2**22 - 63), r"input must have C below 2\*\*22 - 63 on CUDA"),
        (
            POINT._replace(c=2**20, kernel_size=(64, 32), padding=(32, 16)),
            r"weight must have C \* kh \* kw below 2\*\*31 on CUDA, got C = 1048576 and a kernel of \(64, 32\)",
        ),
        (
            POINT._replace(kernel_size=(256, 256), padding=(128, 128)),
            r"weight must have at most 65535 taps on CUDA, got a kernel of \(256, 256\)",
        ),
        (POINT._replace(c=2**16, offset_groups=2**16), "at most 65535 groups on CUDA, got 65536 offset groups and 1"),
        (POINT._replace(c=2**16, c_out=2**16, groups=2**16), "got 1 offset groups and 65536 weight groups"),
    ],
    ids=str,
)
def test_sizes_that_the_triton_kernels_cannot_index_are_refused_by_name(case, message):
    module, x = kernels("cuda"), on_meta(case)
    with pytest.raises(ValueError, match=message):
        module.deform_conv2d.prepare(x.input, x.offset, x.weight, x.bias, x.mask, *case.numbers)
    numbers = *case.numbers, [True] * 5
    with pytest.raises(ValueError, match=message):
        module.deform_conv2d_backward.prepare(x.grad, x.input, x.offset, x.weight, x.mask, *numbers)


@needs_triton
def test_weights_beyond_32_bits_are_not_for_the_fused_kernel():
    case = POINT._replace(c=2**21, kernel_size=(4, 4), padding=(2, 2), groups=2)
    for per_group, fused in ((127, True), (128, False)):
        case = case._replace(c_out=2 * per_group)
        assert is_fused(on_meta(case), case) == fused
