"""What an installed wheel must do, without pytest: python tests/smoke.py"""

import subprocess

import torch

import omniops
from omniops.backends import cpu, mps
from omniops.backends.reference import carafe as reference_carafe
from omniops.backends.reference import deform_conv2d as reference_deform_conv2d
from omniops.backends.reference import multi_scale_deform_attn as reference_multi_scale_deform_attn


def carafe(features, masks):
    """The operator on the inputs' device."""
    return omniops.carafe(features, masks.softmax(1), 5, 1, 2)


def carafe_reference(features, masks):
    """In plain PyTorch."""
    return reference_carafe.carafe(features, masks.softmax(1), 5, 1, 2, 1)


def deform_conv2d(input, offset, weight, bias, mask):
    """The operator on the inputs' device."""
    return omniops.deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)


def deform_conv2d_reference(input, offset, weight, bias, mask):
    """In plain PyTorch."""
    return reference_deform_conv2d.deform_conv2d(input, offset, weight, bias, mask, (1, 1), (1, 1), (1, 1))


def multi_scale_deform_attn(value, locations, weights):
    """The operator on the inputs' device."""
    return omniops.multi_scale_deform_attn(value, [(4, 5), (2, 3)], locations.sigmoid(), weights)


def multi_scale_deform_attn_reference(value, locations, weights):
    """In plain PyTorch."""
    points = locations.sigmoid().flatten(3, 4), weights.flatten(3, 4), [3, 3], False
    return reference_multi_scale_deform_attn.multi_scale_deform_attn(value, [4, 5, 2, 3], *points)


def compare(operator, reference, shapes, device):
    """Results and gradients of float32 on the device against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs_on_device = [x.to(device).requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    result, expected = operator(*inputs_on_device), reference(*exact)
    assert result.device.type == torch.device(device).type
    pairs = [(result, expected)]
    pairs += zip(
        torch.autograd.grad(result.square().sum(), inputs_on_device),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    )
    for found, right in pairs:
        error = (found.detach().cpu().double() - right.detach()).abs().max() / right.detach().abs().max()
        assert error < 1e-5, f"{operator.__name__} on {device}: an error of {error:.1e}"


def check(device):
    """Each operator."""
    compare(carafe, carafe_reference, [(1, 8, 5, 6), (1, 25, 10, 12)], device)
    shapes = [(1, 4, 6, 7), (1, 18, 6, 7), (6, 4, 3, 3), (6,), (1, 9, 6, 7)]
    compare(deform_conv2d, deform_conv2d_reference, shapes, device)
    shapes = [(1, 26, 2, 8), (1, 5, 2, 2, 3, 2), (1, 5, 2, 2, 3)]
    compare(multi_scale_deform_attn, multi_scale_deform_attn_reference, shapes, device)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 0, 1, 0, 0]], dtype=torch.uint8)[None, None]
    labels, counts = omniops.connected_components(mask.to(device))
    assert labels.cpu().flatten().tolist() == [1, 1, 0, 0, 5, 0, 0, 0, 0, 5, 11, 0, 13, 0, 0]
    assert counts.cpu().flatten().tolist() == [2, 2, 0, 0, 2, 0, 0, 0, 0, 2, 1, 0, 1, 0, 0]
    print(f"omniops works with torch {torch.__version__} on {device}")


def offers_metal():
    """Whether PyTorch can use a GPU of Apple's, which a virtual machine may offer and then have no memory for."""
    if not torch.backends.mps.is_available():
        return False
    try:
        torch.ones(2, device="mps").add(1).cpu()
    except RuntimeError as error:
        print(f"not tested on {metal()}: {error}")
        return False
    return True


def metal():
    """The name of Apple's GPU: what fails on the virtual one of a virtual machine may be right on a Mac."""
    try:
        sysctl = subprocess.run(["sysctl", "-n", "kern.hv_vmm_present"], capture_output=True, text=True, check=False)
    except OSError:
        return "mps"
    return "mps, a virtual GPU" if sysctl.stdout.strip() == "1" else "mps"


def check_metal():
    """Each operator on Apple's GPU, if there is one; RuntimeError says which GPU it was."""
    if not offers_metal():
        return
    try:
        assert mps.AVAILABLE, mps.REMEDY
        check("mps")
    except Exception as error:
        raise RuntimeError(f"omniops fails on {metal()}: {error}") from error


if __name__ == "__main__":
    assert cpu.AVAILABLE, "the wheel holds no compiled module"
    check("cpu")
    check_metal()
