"""Deformable convolution as matrix products over columns: what backends share whose matrix products are PyTorch's.

A column holds the samples that one position of the result sees; ``omniops.ops.deform_conv2d`` has the formula. The
positions of a batch are numbered through, p = (n * H_out + i) * W_out + j, and taken in chunks, of whole images or of a
part of one, so that the workspace has a bound whatever the batch. A backend brings two kernels:

``sample(image, offset, mask, geometry, first, columns)`` fills columns, (G, P, K, C / G), with the samples of the
positions first ... first + P - 1.

``gradients(by_columns, image, offset, mask, geometry, first, by_image, by_offset, by_mask)`` takes the gradient of
those columns, writes their part of by_offset and by_mask, and adds their part to by_image.

There image is (N, H, W, C), as channels that lie together are sampled at one position; by_image is (N, H, W, C) in the
dtype that sums are kept in, columns are in one that the backend chooses, all else is in the input's; offset, mask and
their gradients are (N, ..., H_out, W_out); mask and by_mask may be None. All are contiguous. ``gradients`` is called
for one chunk after another.

Beside the columns of a chunk stand copies of what is not in that order: of the whole input, offset and mask, and in the
backward of the whole gradient of the result; what the product makes of the chunk; and by_image, which the gradient of
the input is copied from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniops.backends import accumulator, empty, finish, memory_format

Sample = Callable[[Tensor, Tensor, "Tensor | None", "Geometry", int, Tensor], None]
Gradients = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Geometry", int, Tensor, Tensor, "Tensor | None"], None]


@dataclass(frozen=True)
class Geometry:
    """Where the taps lie and which channels go together; pairs are (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_groups: int

    @property
    def taps(self) -> int:
        """K, the number of samples of one position and channel."""
        return self.kernel_size[0] * self.kernel_size[1]


def _transpose(matrices: Tensor) -> Tensor:
    return matrices.mT.contiguous()


@dataclass(frozen=True)
class Columns:
    """The operator on one backend."""

    sample: Sample
    gradients: Gradients
    most_bytes: int
    """What the columns of a chunk take at most, if they are those of more than one position."""
    columns_dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    """What the columns are in, and the products with them, for each dtype of the input."""
    transpose: Callable[[Tensor], Tensor] = _transpose
    """(N, A, B) -> (N, B, A), contiguous."""
    check: Callable[[Sequence[int], Sequence[int], int, Geometry], None] = lambda *_: None
    """Raises ValueError for an input, offsets, channels of the result and a geometry that the kernels cannot take."""
    longest_sum: int | None = None
    """The most terms of a sum, and the most positions, that PyTorch's matrix products are right with."""
    products_into_views: bool = True
    """Whether these write into a tensor that begins within its storage."""

    def forward(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        """The kernel of ``deform_conv2d``."""
        groups = input.shape[1] // weight.shape[1]
        geometry = geometry_of(offset, weight.shape[2:], groups, stride, padding, dilation)
        self.check(input.shape, offset.shape, len(weight), geometry)
        image, offset, mask = self._dense(input, offset, mask)
        kernels = by_tap(weight, groups, self.columns_dtype(input.dtype))
        out = empty((input.shape[0], weight.shape[0], *offset.shape[2:]), like=input)
        by_group = out.view(len(out), *kernels.shape[:2], -1)
        bias = None if bias is None else bias.view(groups, 1, -1)
        for first, columns in self._chunks(offset, image, geometry):
            self.sample(image, offset, mask, geometry, first, columns)
            first_image, start = divmod(first, by_group.shape[3])
            images = -(-columns.shape[1] // by_group.shape[3])
            part = by_group[first_image : first_image + images, ..., start : start + columns.shape[1] // images]
            part = part.permute(1, 0, 3, 2)  # (G, images, positions of each, C_out / G), as the product is
            writable = self.products_into_views or part.storage_offset() == 0
            direct = writable and part.is_contiguous() and part.dtype == columns.dtype
            product = self._product(columns.flatten(2), kernels.mT, part.flatten(1, 2) if direct else None)
            if bias is not None:
                product += bias
            if not direct:
                part.copy_(product.view(part.shape))
        return out

    def backward(
        self,
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
        """The kernel of ``deform_conv2d_backward``."""
        groups = input.shape[1] // weight.shape[1]
        geometry = geometry_of(offset, weight.shape[2:], groups, stride, padding, dilation)
        self.check(input.shape, offset.shape, len(weight), geometry)
        image, moves, factors = self._dense(input, offset, mask)
        grads = self._by_channel(grad).view(-1, groups, grad.shape[1] // groups)
        of_samples, of_weight = output_mask[0] or output_mask[1] or output_mask[4], output_mask[2]
        by_image = by_offset = by_mask = kernels = total = None
        if of_samples:
            kernels = by_tap(weight, groups, self.columns_dtype(input.dtype))
            by_image = torch.zeros_like(image, dtype=accumulator(image))
            by_offset, by_mask = torch.empty_like(moves), None if factors is None else torch.empty_like(factors)
        if of_weight:
            shape = (groups, grads.shape[2], geometry.taps * input.shape[1] // groups)
            total = grads.new_zeros(shape, dtype=accumulator(grad))
        for first, columns in self._chunks(offset, image, geometry) if of_samples or of_weight else ():
            part = grads[first : first + columns.shape[1]].to(columns.dtype)
            if total is not None:
                self.sample(image, moves, factors, geometry, first, columns)
                if total.dtype == columns.dtype:
                    torch.baddbmm(total, part.permute(1, 2, 0), columns.flatten(2), out=total)
                else:
                    total += torch.bmm(part.permute(1, 2, 0), columns.flatten(2))
            if by_image is not None and by_offset is not None and kernels is not None:
                self._product(part.transpose(0, 1), kernels, columns.flatten(2))
                self.gradients(columns, image, moves, factors, geometry, first, by_image, by_offset, by_mask)
        none = grad.new_empty(0)
        return (
            self._by_position(by_image, input) if by_image is not None and output_mask[0] else none,
            finish(by_offset, offset) if by_offset is not None and output_mask[1] else none,
            none if total is None else finish(by_position(total, weight), weight),
            grad.sum((0, 2, 3)) if output_mask[3] else none,
            finish(by_mask, mask) if by_mask is not None and mask is not None and output_mask[4] else none,
        )

    def backward_data(
        self,
        grad: Tensor,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel of ``deform_conv2d_backward_data``."""
        groups = input.shape[1] // weight.shape[1]
        geometry = geometry_of(offset, weight.shape[2:], groups, stride, padding, dilation)
        self.check(input.shape, offset.shape, len(weight), geometry)
        image, moves, factors = self._dense(input, offset, mask)
        kernels = by_tap(weight, groups, self.columns_dtype(input.dtype))
        grads = self._by_channel(grad).view(-1, groups, grad.shape[1] // groups)
        by_image = torch.zeros_like(image, dtype=accumulator(image))
        by_offset, by_mask = torch.empty_like(moves), None if factors is None else torch.empty_like(factors)
        for first, columns in self._chunks(offset, image, geometry):
            part = grads[first : first + columns.shape[1]].transpose(0, 1).to(columns.dtype)
            self._product(part, kernels, columns.flatten(2))
            self.gradients(columns, image, moves, factors, geometry, first, by_image, by_offset, by_mask)
        return (
            self._by_position(by_image, input),
            finish(by_offset, offset),
            offset.new_empty(0) if mask is None or by_mask is None else finish(by_mask, mask),
        )

    def backward_weight(
        self,
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
        """The kernel of ``deform_conv2d_backward_weight``."""
        geometry = geometry_of(offset, kernel_size, groups, stride, padding, dilation)
        self.check(input.shape, offset.shape, grad.shape[1], geometry)
        image, offset, mask = self._dense(input, offset, mask)
        per_group = grad.shape[1] // groups
        grads = self._by_channel(grad).view(-1, groups, per_group)
        total = grads.new_zeros(
            (groups, per_group, geometry.taps * input.shape[1] // groups),
            dtype=accumulator(grad),
        )
        for first, columns in self._chunks(offset, image, geometry):
            self.sample(image, offset, mask, geometry, first, columns)
            part = grads[first : first + columns.shape[1]].permute(1, 2, 0).to(columns.dtype)
            if total.dtype == columns.dtype:
                torch.baddbmm(total, part, columns.flatten(2), out=total)
            else:
                total += torch.bmm(part, columns.flatten(2))
        by_weight: Tensor = total.view(groups * per_group, geometry.taps, -1).mT.unflatten(2, geometry.kernel_size)
        return finish(by_weight, grad)

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """(G, P, K) times (G, K, M), its sums in parts that are not too long."""
        longest = a.shape[2] if self.longest_sum is None else self.longest_sum
        (first, second), *others = zip(a.split(longest, 2), b.split(longest, 1), strict=True)
        if not others:
            return torch.bmm(a, b, out=out)
        product = torch.bmm(first.contiguous(), second.contiguous(), out=out)
        for left, right in others:
            product += torch.bmm(left.contiguous(), right.contiguous())
        return product

    def _dense(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the kernels take for them."""
        return self._by_channel(input), offset.contiguous(), None if mask is None else mask.contiguous()

    def _by_channel(self, tensor: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, H, W, C), contiguous."""
        if tensor.is_contiguous(memory_format=torch.channels_last):
            return tensor.permute(0, 2, 3, 1).contiguous()
        transposed: Tensor = self.transpose(tensor.flatten(2)).unflatten(1, tensor.shape[2:])
        return transposed

    def _by_position(self, tensor: Tensor, like: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, C, H, W), in the dtype and memory format of ``like``."""
        tensor = tensor.to(like.dtype)
        if memory_format(like) == torch.channels_last:
            return finish(tensor.permute(0, 3, 1, 2), like)
        return finish(self.transpose(tensor.flatten(1, 2)).unflatten(2, tensor.shape[1:3]), like)

    def _chunks(self, offset: Tensor, image: Tensor, geometry: Geometry) -> Iterator[tuple[int, Tensor]]:
        """The first position of each chunk, and memory for its columns, the same for all."""
        shape = (geometry.taps, image.shape[3] // geometry.groups)
        dtype = self.columns_dtype(image.dtype)
        most = self.most_bytes // (geometry.taps * image.shape[3] * dtype.itemsize)
        most = most if self.longest_sum is None else min(most, self.longest_sum)
        found = list(chunks(len(offset), offset[0, 0].numel(), max(1, most)))
        memory = image.new_empty((geometry.groups * found[0][1], *shape), dtype=dtype)
        for first, count in found:
            yield first, memory[: geometry.groups * count].view(geometry.groups, count, *shape)


def chunks(images: int, positions: int, most: int) -> Iterator[tuple[int, int]]:
    """(first position, number of positions) of chunks of at most ``most``: whole images, or parts of one.

    None is larger than the first, nor much smaller: a short one at the end would keep the device half idle.
    """
    if most >= positions:
        size = -(-images // -(-images // (most // positions))) * positions
        for first in range(0, images * positions, size):
            yield first, min(size, images * positions - first)
    else:
        size = -(-positions // -(-positions // most))
        for image in range(images):
            for start in range(0, positions, size):
                yield image * positions + start, min(size, positions - start)


def geometry_of(
    offset: Tensor,
    kernel_size: Sequence[int],
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    """The geometry, from what an operator is given."""
    rows, columns = kernel_size
    return Geometry(
        (rows, columns),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        groups,
        offset.shape[1] // (2 * rows * columns),
    )


def by_tap(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(C_out, C / G, kh, kw) -> (G, C_out / G, K * C / G), in the order of the columns."""
    return weight.flatten(2).mT.to(dtype).reshape(groups, weight.shape[0] // groups, -1)


def by_position(kernels: Tensor, weight: Tensor) -> Tensor:
    """What ``by_tap`` makes of a weight, in the shape of the weight again."""
    by_weight: Tensor = kernels.view(weight.shape[0], -1, weight.shape[1]).mT.unflatten(2, weight.shape[2:])
    return by_weight
