"""torchvision.ops.deform_conv2d after omniops.enable: on devices that were named, and on those that lack it."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.testing import assert_close

import omniops
from omniops.dropin import _torchvision

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)

OPERATORS = ("deform_conv2d", "_deform_conv2d_backward")
# Of every pair two numbers that differ.
NUMBERS = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}
FLAT_NUMBERS = [number for pair in NUMBERS.values() for number in pair]
GROUPS, OFFSET_GROUPS = 2, 2


def problem(dtype=torch.float32, masked=True, h=7, w=6):
    """input, offset, weight, bias, mask. Offsets are odd sixteenths: no sample is at an integer position."""
    generator = torch.Generator().manual_seed(0)
    size = ((h + 2 * 2 - 3) // 2 + 1, (w + 2 * 1 - 3) // 1 + 1)
    taps = OFFSET_GROUPS * 3 * 2
    shapes = (2, 4, h, w), (2, 2 * taps, *size), (6, 4 // GROUPS, 3, 2), (6,), (2, taps, *size)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1] = (2 * torch.randint(-24, 24, shapes[1], generator=generator) + 1) / 16
    return [tensor.to(dtype).requires_grad_() for tensor in tensors[: 5 if masked else 4]]


def call(input, offset, weight, bias, mask=None):
    return torchvision.ops.deform_conv2d(input, offset, weight, bias, **NUMBERS, mask=mask)


def result_and_gradients(tensors):
    result = call(*tensors)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, tensors, grad)]


def arguments(tensors):
    """Those of the operator behind torchvision's function, without autograd."""
    input, offset, weight, bias, mask = (tensor.detach() for tensor in tensors)
    return input, weight, offset, mask, bias, *FLAT_NUMBERS, GROUPS, OFFSET_GROUPS, True


def kernels():
    """Who serves torchvision's operators, key by key, as the dispatcher says."""
    return [torch._C._dispatch_dump_table(f"torchvision::{operator}") for operator in OPERATORS]


def ours(key):
    """For both operators, whether what the dispatcher calls for that key was registered where enable() registers."""
    tables = [dict(line.split(": ", 1) for line in table.splitlines()) for table in kernels()]
    # By the place in the code and not by our file: the oldest PyTorch names a line of no file.
    registrations = [{name: entry.split(" [")[0] for name, entry in table.items()} for table in tables]
    own = "Undefined"  # where what fills gaps serves
    return tuple(_torchvision.enabled() and table.get(key) == table[own] for table in registrations)


def lacks(key):
    """For both operators, whether torchvision has no kernel for that key."""
    return tuple(
        not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{operator}", key) for operator in OPERATORS
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_named_devices_get_our_kernels_with_the_same_results(dtype, masked):
    expected = result_and_gradients(problem(dtype, masked))
    omniops.enable("torchvision", devices=("cpu",))
    assert ours("CPU") == (True, True)
    assert_close(result_and_gradients(problem(dtype, masked)), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16():
    expected = result_and_gradients([x.detach().bfloat16().double().requires_grad_() for x in problem()])
    with pytest.raises(RuntimeError, match="not implemented for"):
        result_and_gradients(problem(torch.bfloat16))
    omniops.enable("torchvision", devices=("cpu",))
    for found, wanted in zip(result_and_gradients(problem(torch.bfloat16)), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())


def test_a_model_trains_with_the_module():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = torch.nn.Conv2d(3, 2 * 9, 3, padding=1)
            self.convolution = torchvision.ops.DeformConv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.convolution(x, self.offset(x))

    def losses():
        torch.manual_seed(0)
        model, x = Block(), torch.randn(2, 3, 6, 5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found = []
        for _ in range(3):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses()
    omniops.enable("torchvision", devices=("cpu",))
    assert losses() == pytest.approx(expected, rel=1e-5)


def test_by_default_what_torchvision_has_stays_and_the_rest_is_filled():
    before = kernels()
    devices = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU", "privateuseone": "PrivateUse1"}
    lacking = {key: lacks(key) for key in devices.values()}
    assert (lacking["CPU"], lacking["PrivateUse1"]) == ((False, False), (True, True))
    omniops.enable("torchvision")
    assert _torchvision.enabled()
    for key in devices.values():
        assert ours(key) == lacking[key]
        assert ours(f"Autograd{key}") == (False, False)
        assert ours(f"Autocast{key}") == (lacking[key][0], False)
    assert ours("Meta") == (False, False)
    words = {
        (False, False): "torchvision",
        (False, True): "forward torchvision, backward omniops",
        (True, True): "omniops",
    }
    serving = _torchvision.serving()
    assert serving["any other"] == "omniops"
    for device_type in ("cpu", "cuda", "mps"):
        assert serving[device_type] == words[lacking[devices[device_type]]]
    omniops.disable()
    assert not _torchvision.enabled()
    assert kernels() == before


def test_a_device_that_has_the_forward_alone_gets_the_backward():
    forward = torch.library.Library("torchvision", "IMPL")
    # As torchvision's wheels for macOS have it: not known to be Python's, which the oldest PyTorch lets nobody replace.
    forward.m.impl("deform_conv2d", "MPS", lambda *args: args[0])
    try:
        omniops.enable("torchvision")
        assert ours("MPS") == (False, True)
        assert ours("AutocastMPS") == (False, False)
        assert _torchvision.serving()["mps"] == "forward torchvision, backward omniops"
        omniops.enable("torchvision", devices=("mps",))
        assert ours("MPS") == (True, True)
        assert ours("AutocastMPS") == (True, False)
        assert _torchvision.serving()["mps"] == "omniops"
    finally:
        omniops.disable()
        forward._destroy()


def test_the_kernels_of_another_device_compute_the_same():
    """As a tensor of that device would reach them; the tensors here are the CPU's, for lack of another."""
    tensors = problem(torch.float64)
    result, by_input, by_offset, by_weight, by_bias, by_mask = result_and_gradients(tensors)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).double()
    forward, backward = (getattr(torch.ops.torchvision, operator).default for operator in OPERATORS)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    omniops.enable("torchvision")
    assert_close(forward.redispatch(key, *arguments(tensors)), result)
    gradients = backward.redispatch(key, grad, *arguments(tensors))
    assert_close(list(gradients), [by_input, by_weight, by_offset, by_mask, by_bias])


def test_naming_devices_replaces_there_alone_and_the_last_call_counts():
    before, lacking = kernels(), lacks("CUDA")
    omniops.enable("torchvision", devices=("cuda", "mps"))
    assert (ours("CUDA"), ours("AutocastCUDA"), ours("CPU")) == ((True, True), (True, False), (False, False))
    omniops.enable("torchvision", devices=("cpu",))
    assert (ours("CUDA"), ours("CPU"), ours("AutocastCPU")) == (lacking, (True, True), (True, False))
    assert _torchvision.serving()["cpu"] == "omniops"
    twice = kernels()
    omniops.enable("torchvision", devices=("cpu",))
    assert kernels() == twice
    omniops.enable("torchvision")
    assert ours("CPU") == (False, False)
    expected = result_and_gradients(problem())
    omniops.disable()
    omniops.disable()
    assert kernels() == before
    for found, wanted in zip(result_and_gradients(problem()), expected, strict=True):
        assert torch.equal(found, wanted)


def test_autocast_casts_all_inputs_where_ours_serve():
    tensors = problem()
    with torch.autocast("cpu"):
        assert call(*tensors).dtype == torch.float32
        with pytest.raises(RuntimeError):
            call(tensors[0].bfloat16(), *tensors[1:])
        omniops.enable("torchvision", devices=("cpu",))
        result = call(tensors[0].bfloat16(), *tensors[1:])
        expected = omniops.deform_conv2d(*tensors[:4], **NUMBERS, mask=tensors[4])
        assert call(*problem(torch.float64)).dtype == torch.float64
        assert call(*problem(masked=False)).dtype == torch.bfloat16
    assert result.dtype == torch.bfloat16
    assert_close(result, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(result.float().sum(), tensors)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert_close(gradients, torch.autograd.grad(expected.float().sum(), tensors), rtol=1e-2, atol=1e-2)


def test_gradients_of_second_order_are_refused_as_torchvision_does():
    omniops.enable("torchvision", devices=("cpu",))
    tensors = problem()
    (gradient,) = torch.autograd.grad(call(*tensors).sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backwards on deform_conv2d not supported"):
        torch.autograd.grad(gradient.square().sum(), tensors[2])


def test_wrong_arguments_are_named():
    omniops.enable("torchvision", devices=("cpu",))
    input, offset, weight, bias, mask = problem()
    with pytest.raises(ValueError, match="offset must have shape"):
        call(input, offset[:, :, 1:], weight, bias, mask)
    with pytest.raises(TypeError, match="weight must have the dtype of input, float32, got float64"):
        call(input, offset, weight.double(), bias, mask)
    with pytest.raises(ValueError, match="bias must have shape"):
        call(input, offset, weight, bias[1:], mask)
    numbers = list(arguments(problem()))
    numbers[11] = 4
    with pytest.raises(ValueError, match="groups must be 2, which the shapes say, got 4"):
        torch.ops.torchvision.deform_conv2d(*numbers)


def test_empty_batches():
    omniops.enable("torchvision", devices=("cpu",))
    tensors = [x.detach()[:0] if x.dim() == 4 and x.shape[0] == 2 else x.detach() for x in problem()]
    tensors = [x.requires_grad_() for x in tensors]
    result, *gradients = result_and_gradients(tensors)
    assert result.shape == (0, 6, 5, 6)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in tensors]
    assert not gradients[2].any()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "masked"), [("inductor", True), ("aot_eager", False)])
def test_compile_without_a_graph_break(backend, masked):
    omniops.enable("torchvision", devices=("cpu",))

    def function(input, *others):
        return call(input * 2, *others).sin()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for h in (7, 9):  # the second shape recompiles with dynamic sizes
        tensors = problem(h=h, masked=masked)
        # Our kernels keep channels_last, which torchvision's fake ones do not.
        tensors[0] = tensors[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        result, expected = compiled(*tensors), function(*tensors)
        assert result.stride() == expected.stride()
        assert_close(result, expected, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(x.square().sum(), tensors) for x in (result, expected)]
        assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_opcheck():
    omniops.enable("torchvision", devices=("cpu",))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.torchvision.deform_conv2d.default, arguments(problem()))


def test_enabling_warns_of_nothing_and_leaves_warnings_as_they_were():
    torch.set_warn_always(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for devices in (("cpu", "cuda"), None, ("cpu",)):
            omniops.enable("torchvision", devices=devices)
        omniops.disable()
    assert [str(warning.message) for warning in caught] == []
    assert not torch.is_warn_always_enabled()


BEFORE_THE_IMPORT = """
import sys
import omniops

assert "torchvision" not in sys.modules
omniops.enable("torchvision", devices=["cpu"])
import torch
from torchvision.ops import deform_conv2d

torch.set_default_dtype(torch.bfloat16)  # which torchvision's own kernel refuses
result = deform_conv2d(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(4, 2, 1, 1))
assert torch.equal(result, torch.full((1, 4, 3, 3), 2.0))
"""


@pytest.mark.slow
def test_it_may_come_before_the_import_of_torchvision():
    run = subprocess.run([sys.executable, "-c", BEFORE_THE_IMPORT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_a_torchvision_that_cannot_be_imported(monkeypatch):
    def refuse(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(_torchvision, "import_module", refuse)
    with pytest.raises(
        RuntimeError, match=r"torchvision is installed but cannot be imported: operator torchvision::nms"
    ):
        omniops.enable("torchvision")
    assert not _torchvision.enabled()
