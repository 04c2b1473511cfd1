"""Deformable convolution in Triton: launches the kernels; ``omniops.ops.deform_conv2d`` has the formula.

The forward with few output channels is one kernel that makes no columns (``_deform_fused``). Elsewhere columns in
memory and a matrix product after them were measured to be faster (docs/benchmarks.md): the weights are then read fewer
times. Positions are taken in chunks, so that the workspace has a bound whatever the batch.

The gradient of the input is a gather: the samples are sorted by the pixels that they lie between, and each pixel sums
what it gave to the samples around it. No atomics, the same bits every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniops.backends import accumulator, empty, finish
from omniops.backends.columns import Geometry, by_tap, chunks, geometry_of
from omniops.backends.cuda import _deform_columns, _deform_fused, _float32_products
from omniops.backends.cuda._grid import cdiv, next_power_of_2

MOST_BYTES = 2**29
"""What columns and plan of a chunk of positions take at most, if they are those of more than one position.

Beside it stand the input with a border; in the backward the gradient in another order, and for the gradient of the
input one in float32, 24 to 32 bytes a sample of the chunk and 8 to 16 a pixel of its images and offset group.
"""

# Up to so many output channels of a group, the fused forward kernel is the faster one.
_FUSED_CHANNELS = 128


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """(N, C, H, W) -> (N, C_out, H_out, W_out)."""
    geometry = geometry_of(offset, weight.shape[2:], input.shape[1] // weight.shape[1], stride, padding, dilation)
    out = empty((input.shape[0], weight.shape[0], *offset.shape[2:]), like=input)
    kernels = by_tap(weight, geometry.groups, weight.dtype)
    with torch.cuda.device_of(input):
        samples = _Samples.of(input, offset, mask, geometry, weight.shape[0])
        if _is_fused(input, weight, geometry):
            kernels, bias = kernels.contiguous(), None if bias is None else bias.contiguous()
            high, low = _float32_products.split(kernels) if _is_precise(input) else (kernels, kernels)
            for chunk in samples.chunks(0):
                _fused(chunk, high, low, bias, out)
            return out
        for chunk in samples.chunks(geometry.taps * input.shape[1] * input.element_size()):
            columns = chunk.columns().flatten(2)
            for g, target in enumerate(chunk.matrices(out)):
                rows = columns[g].unflatten(0, (len(target), -1)).mT
                # Up to 256 channels ours is the faster product in TF32, too.
                if _is_precise(input) or (input.dtype == torch.float32 and target.shape[1] <= 256 and _has_tf32(input)):
                    _float32_products.batched(kernels[g].expand(len(target), -1, -1), rows, target, _is_precise(input))
                else:
                    torch.bmm(kernels[g].expand(len(target), -1, -1), rows, out=target)
    return out if bias is None else out.add_(bias[:, None, None])


def deform_conv2d_backward_data(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C_out, H_out, W_out) -> the gradients of input, offset and mask."""
    geometry = geometry_of(offset, weight.shape[2:], input.shape[1] // weight.shape[1], stride, padding, dilation)
    n, c, height, width = input.shape
    with torch.cuda.device_of(input):
        samples = _Samples.of(input, offset, mask, geometry, weight.shape[0])
        # Both factors lie along the axis that is summed over.
        kernels = by_tap(weight, geometry.groups, weight.dtype).mT.contiguous().mT
        grads = grad.new_empty((n, *grad.shape[2:], geometry.groups, grad.shape[1] // geometry.groups))
        _relayout(grad, grads.flatten(3).permute(0, 3, 1, 2))
        grads = grads.flatten(0, 2).transpose(0, 1)
        by_image = torch.zeros((n, height, width, c), dtype=accumulator(input), device=input.device)
        by_offset = torch.empty_like(samples.offset)
        by_mask = None if samples.mask is None else torch.empty_like(samples.mask)
        for chunk in samples.chunks(geometry.taps * c * input.element_size()):
            by_columns = chunk.empty_columns()
            _product(grads[:, chunk.first : chunk.first + chunk.count], kernels, by_columns.flatten(2))
            chunk.gradients_of_place(by_columns, by_offset, by_mask)
            chunk.gather(by_columns, by_image)
        by_input = empty(input.shape, like=input)
        _relayout(by_image.permute(0, 3, 1, 2), by_input)
    return (
        by_input,
        finish(by_offset, offset),
        offset.new_empty(0) if by_mask is None or mask is None else finish(by_mask, mask),
    )


def deform_conv2d_backward_weight(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """(N, C_out, H_out, W_out) -> (C_out, C / groups, kh, kw)."""
    shape = (grad.shape[1], input.shape[1] // groups, *kernel_size)
    geometry = geometry_of(offset, kernel_size, groups, stride, padding, dilation)
    with torch.cuda.device_of(input):
        samples = _Samples.of(input, offset, mask, geometry, shape[0])
        # Both factors lie along the axis that is summed over, the positions.
        grads = grad.new_empty((grad.shape[1], len(input), *grad.shape[2:]))
        _relayout(grad, grads.transpose(0, 1))
        grads = grads.view(groups, shape[0] // groups, -1)
        total = grad.new_zeros((groups, shape[0] // groups, geometry.taps * shape[1]), dtype=accumulator(grad))
        product = torch.empty_like(total, dtype=grad.dtype)
        for chunk in samples.chunks(geometry.taps * input.shape[1] * input.element_size()):
            columns = chunk.columns(along_positions=_is_precise(grad)).flatten(2)
            _product(grads[:, :, chunk.first : chunk.first + chunk.count], columns, product)
            total += product
        return finish(total.view(shape[0], geometry.taps, shape[1]).mT.unflatten(2, shape[2:]), grad)


def deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, offset, weight, bias and mask, of no elements where ``output_mask`` is false."""
    by_input, by_offset, by_weight, by_bias, by_mask = (grad.new_empty(0) for _ in range(5))
    if output_mask[0] or output_mask[1] or output_mask[4]:
        by_input, by_offset, by_mask = deform_conv2d_backward_data(
            grad, input, offset, weight, mask, stride, padding, dilation
        )
    if output_mask[2]:
        groups = input.shape[1] // weight.shape[1]
        by_weight = deform_conv2d_backward_weight(
            grad, input, offset, mask, weight.shape[2:], groups, stride, padding, dilation
        )
    if output_mask[3]:
        by_bias = grad.sum((0, 2, 3))
    return by_input, by_offset, by_weight, by_bias, by_mask


def check_sizes(input: Sequence[int], offset: Sequence[int], out_channels: int, geometry: Geometry) -> None:
    """Raise ValueError for sizes that 32 bits or the axes of a grid of programs do not reach."""
    n, c, height, width = input
    for meaning, size in (
        ("H * W", height * width),
        ("C * (W + 2)", c * (width + 2)),
        ("N * (H + 2)", n * (height + 2)),
    ):
        if size >= 2**31:
            raise ValueError(f"input must have {meaning} below 2**31 on CUDA, got shape {tuple(input)}")
    if n * offset[2] * offset[3] >= 2**31:
        raise ValueError(f"offset must have N * H_out * W_out below 2**31 on CUDA, got shape {tuple(offset)}")
    if c * geometry.taps >= 2**31:
        raise ValueError(
            f"weight must have C * kh * kw below 2**31 on CUDA, got C = {c} and a kernel of {geometry.kernel_size}"
        )
    # The second and the third axis of a grid.
    for name, shape, meaning, size in (
        ("input", input, "W + 2", cdiv(width + 2, 64)),
        ("input", input, "C", cdiv(c, 64)),
        ("offset", offset, "W_out", cdiv(offset[3], 64)),
    ):
        if size >= 2**16:
            raise ValueError(f"{name} must have {meaning} of at most 64 * 65535 on CUDA, got shape {tuple(shape)}")
    if cdiv(out_channels, 64) >= 2**16:
        raise ValueError(f"weight must have C_out of at most 64 * 65535 on CUDA, got {out_channels}")
    if geometry.taps >= 2**16:
        raise ValueError(f"weight must have at most 65535 taps on CUDA, got a kernel of {geometry.kernel_size}")
    if max(geometry.groups, geometry.offset_groups) >= 2**16:
        raise ValueError(
            f"offset and weight must have at most 65535 groups on CUDA, got {geometry.offset_groups} offset groups and "
            f"{geometry.groups} weight groups"
        )


@dataclass(frozen=True)
class _Samples:
    """What is sampled, and where: all that the plans of chunks of positions are made from."""

    image: Tensor
    """(N, H + 2, W + 2, C) with a border of zeros."""
    offset: Tensor
    mask: Tensor | None
    geometry: Geometry

    @classmethod
    def of(cls, input: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry, out_channels: int) -> _Samples:
        n, c, height, width = input.shape
        check_sizes(input.shape, offset.shape, out_channels, geometry)
        image = input.new_empty((n, height + 2, width + 2, c))
        _relayout(input, image.permute(0, 3, 1, 2), border=1)
        return cls(image, offset.contiguous(), None if mask is None else mask.contiguous(), geometry)

    def chunks(self, bytes_of_columns: int) -> Iterator[_Chunk]:
        """Chunks of positions, of whole images or of a part of one."""
        n, positions = len(self.offset), self.offset[0, 0].numel()
        sum_bytes = accumulator(self.image).itemsize
        samples = self.geometry.offset_groups * self.geometry.taps
        most = max(1, MOST_BYTES // (bytes_of_columns + samples * (8 + 3 * sum_bytes)))
        # Images are the second axis of the products' grid.
        for first, count in chunks(n, positions, min(most, (2**16 - 1) * positions)):
            yield _Chunk.of(self, first, count)


@dataclass(frozen=True)
class _Chunk:
    """The samples of the positions first ... first + count - 1, and their plan."""

    samples: _Samples
    first: int
    count: int
    pixels: Tensor
    places: Tensor
    """(3, samples): ly, lx and, with a mask, the factors."""

    @classmethod
    def of(cls, samples: _Samples, first: int, count: int) -> _Chunk:
        image, geometry = samples.image, samples.geometry
        units = geometry.offset_groups * geometry.taps
        index = torch.int32 if image[..., 0].numel() < 2**31 else torch.int64
        pixels = torch.empty(units * count, dtype=index, device=image.device)
        places = torch.empty((3, units * count), dtype=accumulator(image), device=image.device)
        _deform_columns.plan[(units * cdiv(count, 512),)](
            samples.offset, samples.offset if samples.mask is None else samples.mask, pixels, *places,
            first, count, image.shape[1] - 2, image.shape[2] - 2, *samples.offset.shape[2:], geometry.offset_groups,
            K=geometry.taps, KW=geometry.kernel_size[1],
            STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1],
            PAD_Y=geometry.padding[0], PAD_X=geometry.padding[1],
            STEP_Y=geometry.dilation[0], STEP_X=geometry.dilation[1],
            MASKED=samples.mask is not None, BLOCK=512, num_warps=4,
        )  # fmt: skip
        return cls(samples, first, count, pixels, places)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """C, D, C / D, C / G."""
        c, geometry = self.samples.image.shape[3], self.samples.geometry
        return c, geometry.offset_groups, c // geometry.offset_groups, c // geometry.groups

    @property
    def masked(self) -> bool:
        return self.samples.mask is not None

    def empty_columns(self) -> Tensor:
        """(G, P, K, C / G)."""
        geometry, image = self.samples.geometry, self.samples.image
        return image.new_empty((geometry.groups, self.count, geometry.taps, image.shape[3] // geometry.groups))

    def matrices(self, out: Tensor) -> list[Tensor]:
        """For each weight group, what the chunk makes of (N, C_out, H_out, W_out): (matrices, C_out / G, P)."""
        flat = out.flatten(2)
        first_image, start = divmod(self.first, flat.shape[2])
        images = -(-self.count // flat.shape[2])
        own = flat[first_image : first_image + images, :, start : start + self.count // images]
        if own.stride(1) == 1:  # channels_last: the images are one matrix
            own = own.permute(1, 0, 2).flatten(1)[None]
        return list(own.unflatten(1, (self.samples.geometry.groups, -1)).unbind(1))

    def columns(self, along_positions: bool = False) -> Tensor:
        """(G, P, K, C / G), lying in memory as that or along the positions."""
        c, d, per_offset_group, per_group = self.sizes
        image, geometry = self.samples.image, self.samples.geometry
        if along_positions:
            out = image.new_empty((geometry.groups, geometry.taps, per_group, self.count)).permute(0, 3, 1, 2)
        else:
            out = self.empty_columns()
        half = image.element_size() == 2
        block_c = _power_of_two(c, 128 if half else 256)
        block_p = 512 // block_c if half else 4
        _deform_columns.sample[(cdiv(self.count, block_p), cdiv(c, block_c))](
            image, self.pixels, *self.places, out,
            self.count, image.shape[2] - 2, c, per_offset_group, per_group, *out.stride(),
            K=geometry.taps, MASKED=self.masked,
            ONE_D=d == 1 or per_offset_group % block_c == 0, ONE_G=_one_group(geometry, per_group, block_c),
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=1 if half else max(1, block_c // 64),
        )  # fmt: skip
        return out

    def gradients_of_place(self, by_columns: Tensor, by_offset: Tensor, by_mask: Tensor | None) -> None:
        """Write the chunk's part of the gradients of offset and mask."""
        c, d, per_offset_group, per_group = self.sizes
        image, geometry = self.samples.image, self.samples.geometry
        half = image.element_size() == 2
        block_c = _power_of_two(per_offset_group, 64)
        # With many channels the taps of a position are walked by one program, as they share pixels.
        many = block_c == 64
        block_p, warps = (8, 1) if many else (512 // block_c, 4)
        taps = (3 if half else geometry.taps) if many else 1
        _deform_columns.gradients_of_place[(cdiv(self.count, block_p), cdiv(geometry.taps, taps), d)](
            by_columns, image, self.pixels, *self.places, by_offset, by_offset if by_mask is None else by_mask,
            self.first, self.count, image.shape[2] - 2, *by_offset.shape[2:], c, d, per_offset_group, per_group,
            by_columns.stride(0), K=geometry.taps, MASKED=self.masked,
            ONE_G=_one_group(geometry, math.gcd(per_group, per_offset_group), block_c),
            TAPS=taps, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip

    def gather(self, by_columns: Tensor, by_image: Tensor) -> None:
        """Add the chunk's part of the gradient of the image, (N, H, W, C)."""
        c, d, per_offset_group, per_group = self.sizes
        _, height, width, _ = by_image.shape
        geometry = self.samples.geometry
        positions = self.samples.offset[0, 0].numel()
        first_image = self.first // positions
        images = -(-self.count // positions)
        cells = images * (height + 2) * (width + 2)
        # Numbered through the groups; int64 where int32 does not reach.
        index = torch.int32 if d * cells < 2**31 else torch.int64
        keys = self.pixels.view(d, -1)
        if first_image > 0:
            keys = keys - first_image * (height + 2) * (width + 2)
        keys = keys.to(index)
        if d > 1:
            keys = keys + torch.arange(0, d * cells, cells, dtype=index, device=keys.device)[:, None]
        in_order, order = torch.sort(keys.flatten(), stable=True)
        every_cell = torch.arange(d * cells + 1, dtype=index, device=keys.device)
        starts = torch.searchsorted(in_order, every_cell, out_int32=len(in_order) < 2**31)
        block_c = _power_of_two(per_offset_group, 512)
        block_x = 1 if block_c >= 256 else min(32, 512 // block_c)
        grid = (images * cdiv(height * width, block_x), d, cdiv(per_offset_group, block_c))
        _deform_columns.gather[grid](
            by_columns, order, starts, *self.places, by_image,
            self.count, first_image, height, width, c, d, per_offset_group, per_group, by_columns.stride(0),
            K=geometry.taps, MASKED=self.masked,
            ONE_G=_one_group(geometry, math.gcd(per_group, per_offset_group), block_c),
            BLOCK_X=block_x, BLOCK_E=2 if block_c >= 256 else 8, BLOCK_C=block_c, num_warps=1 if block_c >= 256 else 2,
        )  # fmt: skip


def _fused(chunk: _Chunk, high: Tensor, low: Tensor, bias: Tensor | None, out: Tensor) -> None:
    c, _, per_offset_group, per_group = chunk.sizes
    image, geometry = chunk.samples.image, chunk.samples.geometry
    precise = _is_precise(image)
    per_output_group = high.shape[1]
    segment = math.gcd(per_offset_group, per_group)
    block_n = max(16, _power_of_two(per_output_group, 128))
    half = image.element_size() == 2
    block_m = 128 if half or (precise and block_n <= 64) else 64
    block_k = math.gcd(segment, 64 if half else 32)
    blocks = cdiv(chunk.count, block_m) * cdiv(per_output_group, block_n)
    _deform_fused.forward[(blocks, geometry.groups)](
        image, chunk.pixels, *chunk.places, high, low, out if bias is None else bias, out,
        chunk.first, chunk.count, image.shape[2] - 2, out.shape[2] * out.shape[3], c, per_output_group,
        out.stride(0), out.stride(1), out.stride(3),
        CD=per_offset_group, CG=per_group, SEGMENT=segment, K=geometry.taps,
        MASKED=chunk.masked, BIASED=bias is not None, PRECISE=precise,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip


def _is_fused(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether ``_fused`` serves, and is the faster: tensor cores take 16 channels of one offset group at a time, and
    its offsets within the weights of a group are 32 bits."""
    segment = math.gcd(input.shape[1] // geometry.offset_groups, weight.shape[1])
    return (
        segment % 16 == 0
        and weight.shape[0] // geometry.groups <= _FUSED_CHANNELS
        and weight.numel() // geometry.groups < 2**31
        and input.dtype != torch.float64
        and (input.dtype != torch.float32 or _has_tf32(input))
    )


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b for each of a batch."""
    if _is_precise(a):
        _float32_products.batched(a, b, out, precise=True)
    else:
        torch.bmm(a, b, out=out)


def _is_precise(tensor: Tensor) -> bool:
    """Whether products are float32 and shall be, and the GPU has tensor cores to take them on in three parts."""
    return tensor.dtype == torch.float32 and not _is_tf32() and _has_tf32(tensor)


def _has_tf32(tensor: Tensor) -> bool:
    # A tensor that is on no GPU is one for Triton's interpreter.
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _is_tf32() -> bool:
    """Whether PyTorch's matrix products of float32 may round their factors to TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since torch 2.9
    return bool(torch.backends.cuda.matmul.allow_tf32) if precision is None else precision == "tf32"


def _relayout(source: Tensor, target: Tensor, border: int = 0) -> None:
    """Copy (N, C, H, W) between memory layouts and dtypes, into a target that has a border of zeros."""
    n, c, height, width = target.shape
    block_c, block_x = _power_of_two(c, 64), _power_of_two(width, 64)
    _deform_columns.relayout[(n * height, cdiv(width, block_x), cdiv(c, block_c))](
        source, target, height, width, c, *source.stride(), *target.stride(),
        BORDER=border, BLOCK_X=block_x, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def _one_group(geometry: Geometry, per_group: int, block_c: int) -> bool:
    return geometry.groups == 1 or per_group % block_c == 0


def _power_of_two(size: int, most: int) -> int:
    return min(most, next_power_of_2(size))
