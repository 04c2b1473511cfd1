"""Deformable convolution as matrix products over columns: what backends share whose matrix products are PyTorch's.

A column holds the samples that one position of the result sees; ``omniops.ops.deform_conv2d`` has the formula. The
positions of a batch are numbered through, p = (n * H_out + i) * W_out + j, and taken in chunks, of whole images or of a
part of one, so that the workspace has a bound whatever the batch. A backend brings two kernels:

``sample(image, offset, mask, call, first, columns)`` fills columns, (G, P, K * C / G), with the samples of the
positions first ... first + P - 1, by taps.

``gradients(by_columns, image, offset, mask, call, first, by_image, by_offset, by_mask)`` takes the gradient of
those columns, writes their part of by_offset and by_mask, and adds their part to by_image.

There image is (N, H, W, C), as channels that lie together are sampled at one position; by_image is (N, H, W, C) in the
dtype that sums are kept in, columns are in one that the backend chooses, all else is in the input's; offset, mask and
their gradients are (N, ..., H_out, W_out); mask and by_mask may be None. All are contiguous. ``call`` is the geometry,
or what the backend makes of it once for a kind of call. ``gradients`` is called for one chunk after another.

Beside the columns of a chunk stand copies of what is not in that order: of the whole input, offset and mask, and in the
backward of the whole gradient of the result, where the products cannot take it as it is; what the product makes of the
chunk; and by_image, which the gradient of the input is copied from.

The operators are in two steps, for ``omniops.backends.prepared``: what depends on shapes and layouts is found once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from omniops.backends import accumulator, memory_format, strides

Call = Callable[["Geometry", Sequence[int], Sequence[int], torch.dtype, torch.dtype], Any]
Sample = Callable[[Tensor, Tensor, "Tensor | None", Any, int, Tensor], None]
Gradients = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Any, int, Tensor, Tensor, "Tensor | None"], None]

MAX_KEPT_CHUNKS = 8
"""How many chunks are kept for a kind of call; more are made anew each time, which is short beside their work."""


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


def _transpose(sizes: tuple[int, int, int], shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.view(sizes).mT.contiguous().view(shape)


@dataclass(frozen=True)
class Columns:
    """The operator on one backend."""

    sample: Sample
    gradients: Gradients
    max_bytes: int
    """What the columns of a chunk take at most, if they are those of more than one position."""
    call: Call = lambda geometry, *_: geometry
    """What the kernels get of a geometry, the shapes of image and offset, and the dtypes of these and of columns."""
    columns_dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    """What the columns are in, and the products with them, for each dtype of the input."""
    transpose: Callable[[tuple[int, int, int], tuple[int, ...]], Callable[[Tensor], Tensor]] = _transpose
    """What makes of contiguous tensors of sizes (N, A, B) such of (N, B, A), in another shape of as many elements."""
    check: Callable[[Sequence[int], Sequence[int], int, Geometry], None] = lambda *_: None
    """Raises ValueError for an input, offsets, channels of the result and a geometry that the kernels cannot take."""
    longest_sum: int | None = None
    """The most terms of a sum, and the most positions, that PyTorch's matrix products are right with."""
    products_of_views: bool = True
    """Whether these read and write views of any strides, from anywhere in their storage on."""

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
    ) -> Callable[..., Tensor]:
        """The kernel of ``deform_conv2d``, prepared."""
        plan = self._plan(input, offset, weight, stride, padding, dilation)
        channels_last = memory_format(input) == torch.channels_last
        out_strides = strides(plan.out, memory_format(input))
        to_image, to_kernels = self._by_channel(input, plan.image), self._by_channel(weight, plan.kernels, plan.dtype)
        groups = plan.kernels[0]
        chunks = plan.chunks(channels_last)
        same_dtype = input.dtype == plan.dtype
        fused_bias = same_dtype and plan.of_views and self.longest_sum is None

        def run(
            input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *_: Any
        ) -> Tensor:
            image, kernels = to_image(input), to_kernels(weight).mT
            offset, mask = offset.contiguous(), None if mask is None else mask.contiguous()
            out = input.new_empty_strided(plan.out, out_strides)
            bias = bias if bias is None or groups == 1 else bias.view(groups, 1, -1)
            memory = plan.memory(image)
            for first, count, view in chunks:
                columns = plan.columns_of(memory, count)
                self.sample(image, offset, mask, plan.call, first, columns)
                target = view.of(out)
                product_out = target if same_dtype and self._writes_into(plan, view, target) else None
                if bias is not None and fused_bias:
                    product = torch.baddbmm(bias, columns, kernels, out=product_out)
                else:
                    product = self._product(columns, kernels, product_out)
                    if bias is not None:
                        product += bias
                if product_out is None:
                    target.copy_(product.view(view.size))
            return out

        return run

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
    ) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The kernel of ``deform_conv2d_backward``, prepared."""
        plan = self._plan(input, offset, weight, stride, padding, dilation)
        to_image, to_kernels = self._by_channel(input, plan.image), self._by_channel(weight, plan.kernels, plan.dtype)
        to_grads, chunks = self._grad_views(grad, plan)
        sums, same_dtype = accumulator(input), grad.dtype == plan.dtype
        to_input, to_weight = self._by_position(input, sums), self._by_position(weight, sums)
        offset_format, mask_format = memory_format(offset), memory_format(offset if mask is None else mask)
        # Those of a contiguous tensor may differ where a dimension is 1.
        offset_strides, mask_strides = strides(offset.shape), () if mask is None else strides(mask.shape)
        for_input, for_offset, for_weight, for_bias, for_mask = output_mask
        for_samples = for_input or for_offset or for_mask

        def run(
            grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *_: Any
        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            image, kernels, grads = to_image(input), to_kernels(weight), to_grads(grad)
            dense_offset, dense_mask = offset.contiguous(), None if mask is None else mask.contiguous()
            by_image, total = image.new_zeros(plan.image if for_samples else (0,), dtype=sums), None
            by_offset = offset.new_empty_strided(offset.shape, offset_strides)
            by_mask = None if mask is None else mask.new_empty_strided(mask.shape, mask_strides)
            memory = plan.memory(image)
            for first, count, view in chunks if for_samples or for_weight else ():
                columns = plan.columns_of(memory, count)
                chunk_grads = view.of(grads) if same_dtype else view.of(grads).to(plan.dtype)
                if for_weight:
                    self.sample(image, dense_offset, dense_mask, plan.call, first, columns)
                    total = _plus_product(total, chunk_grads.mT, columns, sums)
                if for_samples:
                    self._product(chunk_grads, kernels, columns)
                    self.gradients(
                        columns, image, dense_offset, dense_mask, plan.call, first, by_image, by_offset, by_mask
                    )
            return (
                to_input(by_image) if for_input else grad.new_empty(0),
                by_offset.contiguous(memory_format=offset_format) if for_offset else grad.new_empty(0),
                grad.new_empty(0) if total is None else to_weight(total),
                grad.sum((0, 2, 3)) if for_bias else grad.new_empty(0),
                by_mask.contiguous(memory_format=mask_format)
                if for_mask and by_mask is not None
                else grad.new_empty(0),
            )

        return run

    def _plan(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> _Plan:
        (n, c, h, w), c_out = input.shape, weight.shape[0]
        groups = c // weight.shape[1]
        geometry = geometry_of(offset, weight.shape[2:], groups, stride, padding, dilation)
        self.check(input.shape, offset.shape, c_out, geometry)
        dtype = self.columns_dtype(input.dtype)
        max_positions = self.max_bytes // (geometry.taps * c * dtype.itemsize)
        max_positions = max_positions if self.longest_sum is None else min(max_positions, self.longest_sum)
        _, largest = next(chunks(n, offset.shape[2] * offset.shape[3], max(1, max_positions)))
        length = geometry.taps * weight.shape[1]
        return _Plan(
            self.call(geometry, (n, h, w, c), offset.shape, input.dtype, dtype),
            dtype,
            # Those of bfloat16 go element by element through views that are not contiguous.
            self.products_of_views and dtype != torch.bfloat16,
            max(1, max_positions),
            image=(n, h, w, c),
            kernels=(groups, c_out // groups, length),
            columns=(groups, largest, length),
            out=(n, c_out, offset.shape[2], offset.shape[3]),
        )

    def _grad_views(
        self, grad: Tensor, plan: _Plan
    ) -> tuple[Callable[[Tensor], Tensor], Iterable[tuple[int, int, _View]]]:
        """What makes a dense tensor of the gradient of the result, and the chunks with their views of it.

        A view is (G, P, C_out / G): the gradient stays as it is if it has such strides, else it is copied before.
        """
        channels_last = memory_format(grad) == torch.channels_last
        if plan.of_views and grad.dtype == plan.dtype and (channels_last or grad.is_contiguous()):
            views = plan.chunks(channels_last)
            if all(len(view.size) == 3 for *_, view in views):
                return lambda grad: grad, views
        n, c, h, w = plan.out
        return self._by_channel(grad, (n, h, w, c)), plan.chunks(True)

    def _writes_into(self, plan: _Plan, view: _View, target: Tensor) -> bool:
        """Whether a product writes its result there."""
        if plan.of_views:
            return view.dense
        begins = self.products_of_views or target.storage_offset() == 0
        return bool(begins and target.is_contiguous() and len(view.size) == 3)

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """(G, P, K) times (G, K, M), its sums in parts that are not too long."""
        longest = self.longest_sum
        if longest is None or longest >= a.shape[2]:
            return torch.bmm(a, b, out=out)
        (first, second), *others = zip(a.split(longest, 2), b.split(longest, 1), strict=True)
        product = torch.bmm(first.contiguous(), second.contiguous(), out=out)
        for left, right in others:
            product += torch.bmm(left.contiguous(), right.contiguous())
        return product

    def _by_channel(
        self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Callable[[Tensor], Tensor]:
        """What makes (N, H, W, C), contiguous and in another shape and dtype, of tensors (N, C, H, W) like this one."""
        if dtype is not None and like.dtype != dtype:
            same_dtype = self._by_channel(like, shape)
            return lambda tensor: same_dtype(tensor.to(dtype))
        if like.is_contiguous(memory_format=torch.channels_last):
            return lambda tensor: tensor.permute(0, 2, 3, 1).contiguous().view(shape)
        n, c, h, w = like.shape
        transpose = self.transpose((n, c, h * w), shape)
        return lambda tensor: transpose(tensor.contiguous())

    def _by_position(self, like: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """What makes a tensor like this one, (N, C, H, W), of contiguous (N, H, W, C) elements of a dtype."""
        n, c, h, w = like.shape
        channels_last, final = memory_format(like) == torch.channels_last, like.dtype
        transpose = self.transpose((n, h * w, c), (n, c, h, w))

        def run(tensor: Tensor) -> Tensor:
            tensor = tensor if dtype == final else tensor.to(final)
            return tensor.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else transpose(tensor)

        return run


@dataclass(frozen=True)
class _Plan:
    """What all calls with tensors of these shapes have in common."""

    call: Any
    """What the kernels take."""
    dtype: torch.dtype
    """Of the columns and of the products with them."""
    of_views: bool
    """Whether these products read and write views of any strides as fast as contiguous tensors."""
    max_positions: int
    """How many positions a chunk has at most."""
    image: tuple[int, int, int, int]
    """The shape (N, H, W, C)."""
    kernels: tuple[int, int, int]
    """The shape (G, C_out / G, K * C / G) of the weight."""
    columns: tuple[int, int, int]
    """The shape (G, P, K * C / G) of the largest chunk's."""
    out: tuple[int, int, int, int]
    """The shape (N, C_out, H_out, W_out)."""

    def memory(self, like: Tensor) -> Tensor:
        """New, for the columns of the largest chunk."""
        _, max_positions, length = self.columns
        return like.new_empty_strided(self.columns, (max_positions * length, length, 1), dtype=self.dtype)

    def columns_of(self, memory: Tensor, count: int) -> Tensor:
        """Columns for so many positions, in the memory of the largest chunk's."""
        groups, max_positions, length = self.columns
        if count == max_positions:
            return memory
        return memory.view(-1, length)[: groups * count].view(groups, count, length)

    def chunks(self, channels_last: bool) -> Iterable[tuple[int, int, _View]]:
        """Each chunk's first position, number of positions and view of a tensor of the shape ``out``."""
        views = _Chunks(self, channels_last)
        kept = list(islice(views, MAX_KEPT_CHUNKS + 1))
        return kept if len(kept) <= MAX_KEPT_CHUNKS else views

    def chunk_view(self, first: int, count: int, channels_last: bool) -> _View:
        """The view of a chunk in a tensor of the shape ``out``."""
        groups, channels, area = self.kernels[0], self.kernels[1], self.out[2] * self.out[3]
        image, position = divmod(first, area)
        images = -(-count // area)
        by_position, by_channel = (groups * channels, 1) if channels_last else (1, area)
        by_image, by_group = groups * channels * area, channels * by_channel
        start, dense = image * by_image + position * by_position, channels_last or count % area == 0
        if images == 1 or by_image == area * by_position:
            return _View((groups, count, channels), (by_group, by_position, by_channel), start, dense)
        size = (groups, images, count // images, channels)
        return _View(size, (by_group, by_image, by_position, by_channel), start, False)


@dataclass(frozen=True)
class _Chunks:
    """The chunks of a plan, made anew each time."""

    plan: _Plan
    channels_last: bool

    def __iter__(self) -> Iterator[tuple[int, int, _View]]:
        n, _, height, width = self.plan.out
        for first, count in chunks(n, height * width, self.plan.max_positions):
            yield first, count, self.plan.chunk_view(first, count, self.channels_last)


@dataclass(frozen=True)
class _View:
    """A view of a chunk of a dense tensor (N, C_out, H_out, W_out): (G, P, C_out / G) where it has such strides.

    Else it is (G, images, P / images, C_out / G).
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    dense: bool
    """Whether it is of that shape and has whole images or pixels; into others products write slower than a copy is."""

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.start)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b, in this dtype; ``total`` itself where there is one."""
    if total is None:
        return torch.bmm(a, b).to(dtype)
    if dtype == a.dtype:
        return torch.baddbmm(total, a, b, out=total)
    total += torch.bmm(a, b)
    return total


def chunks(images: int, positions: int, max_positions: int) -> Iterator[tuple[int, int]]:
    """(first position, number of positions) of chunks of at most ``max_positions``: whole images, or parts of one.

    None is larger than the first, nor much smaller: a short one at the end would keep the device half idle.
    """
    if max_positions >= positions:
        size = -(-images // -(-images // (max_positions // positions))) * positions
        for first in range(0, images * positions, size):
            yield first, min(size, images * positions - first)
    else:
        size = -(-positions // -(-positions // max_positions))
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
