# mypy: ignore-errors
# (Triton's language, not Python's)
"""Deformable convolution in Triton: what is made of the arguments before the sampling, and of the sums after it.

Each is one launch, whose programs are dealt out to jobs: program ids below the first end do the first job, those below
the second end the second. The forward and the backward launch the same compiled kernel, with other numbers of programs.

Names are those of ``_deform_columns``, and so is what is specialised; of a map's strides it is a constant how it lies
(LAYOUT): 2 channels_last, 1 along its rows, 0 otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omniops.backends.cuda._deform_columns import write_plan
from omniops.backends.cuda._float16_products import split_weights
from omniops.backends.cuda._float32_products import high_half, low_half

PIXELS = 64
CHANNELS = 64
POSITIONS = 512
ZEROS = 4096
"""What a program of a job takes."""


@triton.jit
def map_index(n, c, y, x, height, width, strides, C: tl.constexpr, LAYOUT: tl.constexpr):
    """Indices of elements (n, c, y, x) of a map: n is a number, c along the second axis, y and x along the first."""
    stride_n, stride_c, stride_y, stride_x = strides
    if LAYOUT == 2:
        pixel = (n.to(tl.int64) * height + y) * width + x
        return (pixel * C)[:, None] + c[None, :]
    pixel_index = n.to(tl.int64) * stride_n + y.to(tl.int64) * stride_y
    if LAYOUT == 1:
        pixel_index += x
    else:
        pixel_index += x.to(tl.int64) * stride_x
    return pixel_index[:, None] + (c.to(tl.int64) * stride_c)[None, :]


@triton.jit
def pixels_of(block, pixels, C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """The image, the pixels and the channels of a block of those of maps of so many pixels."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    c = block % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    block = block // BLOCKS
    n = block // tl.cdiv(pixels, PIXELS)
    return n, (block - n * tl.cdiv(pixels, PIXELS)) * PIXELS + tl.arange(0, PIXELS), c


@triton.jit
def border(
    source, image, block, height, width, strides,
    C: tl.constexpr, BORDER: tl.constexpr, LAYOUT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """image[n, y, x, c] = source[n, c, y - BORDER, x - BORDER], zero outside; height and width are the source's."""
    rows = height + 2 * BORDER
    columns = width + 2 * BORDER
    n, pixel, c = pixels_of(block, rows * columns, C, PIXELS, CHANNELS)
    y = pixel // columns - BORDER
    x = pixel - (y + BORDER) * columns - BORDER
    inside = (pixel < rows * columns) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    value = tl.load(
        source + map_index(n, c, y, x, height, width, strides, C, LAYOUT),
        mask=inside[:, None] & (c < C)[None, :],
        other=0,
    )
    image_index = ((n.to(tl.int64) * rows * columns + pixel) * C)[:, None] + c[None, :]
    tl.store(image + image_index, value, mask=(pixel < rows * columns)[:, None] & (c < C)[None, :])


@triton.jit
def along_positions(
    grad, out, block, images, height, width, strides, out_stride,
    C: tl.constexpr, LAYOUT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[c, n * pixels + pixel] = grad[n, c, pixel], and zero behind the last."""
    pixels = height * width
    n, pixel, c = pixels_of(block, pixels + 15, C, PIXELS, CHANNELS)
    y = pixel // width
    x = pixel - y * width
    value = tl.load(
        grad + map_index(n, c, y, x, height, width, strides, C, LAYOUT),
        mask=(pixel < pixels)[:, None] & (c < C)[None, :],
        other=0,
    )
    end = pixels if n < images - 1 else out_stride - n * pixels
    out_index = (n.to(tl.int64) * pixels + pixel)[:, None] + (c.to(tl.int64) * out_stride)[None, :]
    tl.store(out + out_index, value, mask=(pixel < end)[:, None] & (c < C)[None, :])


@triton.jit
def by_tap(
    weight, kernels, kernels_low, block, strides, out_stride_o, out_stride_k, low,
    NG: tl.constexpr, CG: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """kernels[g, o, t * CG + c] = weight[g * NG + o, c, t], with strides out_stride_o and out_stride_k.

    Where ``low`` is not 0, kernels keeps of a float32 what tensor cores do, and kernels_low gets the rest.
    """
    stride_o, stride_c, stride_v, stride_u = strides
    BLOCKS_C: tl.constexpr = (CG + 63) // 64
    BLOCKS_O: tl.constexpr = (NG + 15) // 16
    c = block % BLOCKS_C * 64 + tl.arange(0, 64)
    block = block // BLOCKS_C
    t = block % K
    block = block // K
    o = block % BLOCKS_O * 16 + tl.arange(0, 16)
    g = block // BLOCKS_O
    exists = (o < NG)[:, None] & (c < CG)[None, :]
    tap = (t // KW).to(tl.int64) * stride_v + (t % KW).to(tl.int64) * stride_u
    index = ((g * NG + o).to(tl.int64) * stride_o)[:, None] + (c.to(tl.int64) * stride_c)[None, :] + tap
    value = tl.load(weight + index, mask=exists, other=0)
    out_index = g.to(tl.int64) * (NG * CG * K) + (o.to(tl.int64) * out_stride_o)[:, None]
    out_index += ((t * CG + c).to(tl.int64) * out_stride_k)[None, :]
    if kernels.dtype.element_ty == tl.float32:  # noqa: SIM102  # the types of the inner branch are float32's
        if low != 0:
            high = high_half(value)
            tl.store(kernels_low + out_index, low_half(value, high), mask=exists)
            value = high
    tl.store(kernels + out_index, value, mask=exists)


@triton.jit
def sum_of(grad, by_bias, c, images, height, width, strides, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """by_bias[c] = sum over images and pixels of grad[n, c]."""
    stride_n, stride_c, stride_y, stride_x = strides
    dtype: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK], dtype)
    for n in range(images):
        for start in range(0, height * width, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            y = pixel // width
            if LAYOUT == 1:
                index = y.to(tl.int64) * stride_y + (pixel - y * width)
            else:
                index = y.to(tl.int64) * stride_y + (pixel - y * width).to(tl.int64) * stride_x
            index += tl.cast(n, tl.int64) * stride_n + tl.cast(c, tl.int64) * stride_c
            total += tl.load(grad + index, mask=pixel < height * width, other=0).to(dtype)
    tl.store(by_bias + c, tl.sum(total, 0).to(by_bias.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "end_sums", "end_plan", "end_image", "end_weight", "end_grads", "end_along", "first", "count", "images",
        "height", "width", "rows", "columns", "input_n", "input_c", "input_y", "input_x",
        "offset_n", "offset_c", "offset_y", "offset_x", "mask_n", "mask_c", "mask_y", "mask_x",
        "weight_o", "weight_c", "weight_v", "weight_u", "grad_n", "grad_c", "grad_y", "grad_x",
        "to_o", "to_k", "low", "along",
    ]
)  # fmt: skip
def prepare(
    input, offset, mask, weight, grad, by_bias, pixels, fractions, image, kernels, kernels_low,
    grads, grads_along, by_image,
    end_sums, end_plan, end_image, end_weight, end_grads, end_along, first, count, images, height, width, rows, columns,
    input_n, input_c, input_y, input_x, offset_n, offset_c, offset_y, offset_x, mask_n, mask_c, mask_y, mask_x,
    weight_o, weight_c, weight_v, weight_u, grad_n, grad_c, grad_y, grad_x, to_o, to_k, low, along,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, NG: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, MASKED: tl.constexpr,
    LAYOUT: tl.constexpr, LAYOUT_GRAD: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """By_bias: the sums of grad. Pixels and fractions: the plan of the chunk's samples. Image: the input with a border,
    channels last. Kernels: the weights by tap. Where ``low`` is 2, kernels_low are their halves in float16, and kernels
    the scales. Grads: the gradient of the result, channels last, and along the positions. By_image: zeros.

    Grid: (programs of all jobs).
    """
    block = tl.program_id(0)
    if block < end_sums:
        sum_of(grad, by_bias, block, images, rows, columns, (grad_n, grad_c, grad_y, grad_x), LAYOUT_GRAD, ZEROS)
    elif block < end_plan:
        write_plan(
            offset, mask, pixels, fractions, block - end_sums, first, count, (height, width), (rows, columns),
            (offset_n, offset_c, offset_y, offset_x), (mask_n, mask_c, mask_y, mask_x),
            (KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X), D, K, MASKED, POSITIONS,
        )  # fmt: skip
    elif block < end_image:
        border(
            input, image, block - end_plan, height, width, (input_n, input_c, input_y, input_x),
            C, 1, LAYOUT, PIXELS, CHANNELS,
        )  # fmt: skip
    elif block < end_weight:
        weight_strides = (weight_o, weight_c, weight_v, weight_u)
        if kernels.dtype.element_ty == tl.float32:
            if low == 2:
                split_weights(
                    weight, kernels, kernels_low, block - end_image, weight_strides, G * NG, C // G, K, KW, 1024
                )
            else:
                by_tap(
                    weight, kernels, kernels_low, block - end_image, weight_strides, to_o, to_k, low, NG, C // G, K, KW
                )
        else:
            by_tap(weight, kernels, kernels_low, block - end_image, weight_strides, to_o, to_k, low, NG, C // G, K, KW)
    elif block < end_grads:
        border(
            grad, grads, block - end_weight, rows, columns, (grad_n, grad_c, grad_y, grad_x),
            G * NG, 0, LAYOUT_GRAD, PIXELS, CHANNELS,
        )  # fmt: skip
    elif block < end_along:
        along_positions(
            grad, grads_along, block - end_grads, images, rows, columns, (grad_n, grad_c, grad_y, grad_x), along,
            G * NG, LAYOUT_GRAD, PIXELS, CHANNELS,
        )  # fmt: skip
    else:
        index = (block - end_along).to(tl.int64) * ZEROS + tl.arange(0, ZEROS)
        size = images.to(tl.int64) * (height + 2) * (width + 2) * C
        tl.store(by_image + index, tl.zeros([ZEROS], by_image.dtype.element_ty), mask=index < size)


@triton.jit
def without_border(
    image, target, block, height, width, strides,
    C: tl.constexpr, LAYOUT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """target[n, c, y, x] = image[n, y + 1, x + 1, c]."""
    n, pixel, c = pixels_of(block, height * width, C, PIXELS, CHANNELS)
    y = pixel // width
    x = pixel - y * width
    exists = (pixel < height * width)[:, None] & (c < C)[None, :]
    index = (((n.to(tl.int64) * (height + 2) + y + 1) * (width + 2) + x + 1) * C)[:, None] + c[None, :]
    value = tl.load(image + index, mask=exists, other=0).to(target.dtype.element_ty)
    tl.store(target + map_index(n, c, y, x, height, width, strides, C, LAYOUT), value, mask=exists)


@triton.jit
def by_weight_of(
    total, by_weight, block, splits, strides,
    CG: tl.constexpr, C_OUT: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """by_weight[o, c, t] = sum over splits of total[split, o, t * CG + c]."""
    stride_o, stride_c, stride_v, stride_u = strides
    BLOCKS: tl.constexpr = (K * CG + 511) // 512
    o = block // BLOCKS
    k = (block - o * BLOCKS) * 512 + tl.arange(0, 512)
    exists = k < K * CG
    total += o.to(tl.int64) * (K * CG) + k
    value = tl.load(total, mask=exists, other=0)
    for _ in range(1, splits):
        total += C_OUT * K * CG
        value += tl.load(total, mask=exists, other=0)
    t = k // CG
    out_index = o.to(tl.int64) * stride_o + (k - t * CG).to(tl.int64) * stride_c
    out_index += (t // KW).to(tl.int64) * stride_v + (t % KW).to(tl.int64) * stride_u
    tl.store(by_weight + out_index, value.to(by_weight.dtype.element_ty), mask=exists)


@triton.jit(
    do_not_specialize=[
        "end_image", "height", "width", "input_n", "input_c", "input_y", "input_x",
        "splits", "weight_o", "weight_c", "weight_v", "weight_u",
    ]
)  # fmt: skip
def finish(
    by_image, total, by_input, by_weight,
    end_image, height, width, input_n, input_c, input_y, input_x, splits, weight_o, weight_c, weight_v, weight_u,
    C: tl.constexpr, G: tl.constexpr, C_OUT: tl.constexpr, K: tl.constexpr, KW: tl.constexpr, LAYOUT: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """By_input from by_image, (N, H + 2, W + 2, C); by_weight from total, (splits, C_out, K * CG), which is summed.

    Grid: (programs of both jobs).
    """
    block = tl.program_id(0)
    if block < end_image:
        without_border(
            by_image, by_input, block, height, width, (input_n, input_c, input_y, input_x), C, LAYOUT, PIXELS, CHANNELS
        )
    else:
        by_weight_of(
            total, by_weight, block - end_image, splits, (weight_o, weight_c, weight_v, weight_u),
            C // G, C_OUT, K, KW,
        )  # fmt: skip
