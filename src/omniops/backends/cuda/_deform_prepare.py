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

from omniops.backends.cuda._deform_columns import plan
from omniops.backends.cuda._float16_products import split_weights
from omniops.backends.cuda._float32_products import high_part, low_part

PIXELS = 64
CHANNELS = 64
POSITIONS = 512
ZEROS = 4096
"""What a program of a job takes."""


@triton.jit
def place_of(n, c, y, x, height, width, C: tl.constexpr, at_n, at_c, at_y, at_x, LAYOUT: tl.constexpr):
    """Where elements (n, c, y, x) of a map lie: n is a number, c along the second axis, y and x along the first."""
    if LAYOUT == 2:
        pixel = (n.to(tl.int64) * height + y) * width + x
        return (pixel * C)[:, None] + c[None, :]
    of_pixel = n.to(tl.int64) * at_n + y.to(tl.int64) * at_y
    if LAYOUT == 1:
        of_pixel += x
    else:
        of_pixel += x.to(tl.int64) * at_x
    return of_pixel[:, None] + (c.to(tl.int64) * at_c)[None, :]


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
    source, image, block, height, width, at_n, at_c, at_y, at_x,
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
        source + place_of(n, c, y, x, height, width, C, at_n, at_c, at_y, at_x, LAYOUT),
        mask=inside[:, None] & (c < C)[None, :],
        other=0,
    )
    to = ((n.to(tl.int64) * rows * columns + pixel) * C)[:, None] + c[None, :]
    tl.store(image + to, value, mask=(pixel < rows * columns)[:, None] & (c < C)[None, :])


@triton.jit
def along_positions(
    grad, out, block, images, height, width, at_n, at_c, at_y, at_x, stride,
    C: tl.constexpr, LAYOUT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[c, n * pixels + pixel] = grad[n, c, pixel], and zero behind the last."""
    pixels = height * width
    n, pixel, c = pixels_of(block, pixels + 15, C, PIXELS, CHANNELS)
    y = pixel // width
    x = pixel - y * width
    value = tl.load(
        grad + place_of(n, c, y, x, height, width, C, at_n, at_c, at_y, at_x, LAYOUT),
        mask=(pixel < pixels)[:, None] & (c < C)[None, :],
        other=0,
    )
    end = pixels if n < images - 1 else stride - n * pixels
    to = (n.to(tl.int64) * pixels + pixel)[:, None] + (c.to(tl.int64) * stride)[None, :]
    tl.store(out + to, value, mask=(pixel < end)[:, None] & (c < C)[None, :])


@triton.jit
def by_tap(
    weight, kernels, kernels_low, block, at_o, at_c, at_v, at_u, to_o, to_k, low,
    G: tl.constexpr, NG: tl.constexpr, CG: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """kernels[g, o, t * CG + c] = weight[g * NG + o, c, t], with strides to_o and to_k.

    Where ``low`` is not 0, kernels keeps of a float32 what tensor cores do, and kernels_low gets the rest.
    """
    BLOCKS_C: tl.constexpr = (CG + 63) // 64
    BLOCKS_O: tl.constexpr = (NG + 15) // 16
    c = block % BLOCKS_C * 64 + tl.arange(0, 64)
    block = block // BLOCKS_C
    t = block % K
    block = block // K
    o = block % BLOCKS_O * 16 + tl.arange(0, 16)
    g = block // BLOCKS_O
    some = (o < NG)[:, None] & (c < CG)[None, :]
    tap = (t // KW).to(tl.int64) * at_v + (t % KW).to(tl.int64) * at_u
    at = ((g * NG + o).to(tl.int64) * at_o)[:, None] + (c.to(tl.int64) * at_c)[None, :] + tap
    value = tl.load(weight + at, mask=some, other=0)
    to = g.to(tl.int64) * (NG * CG * K) + (o.to(tl.int64) * to_o)[:, None] + ((t * CG + c).to(tl.int64) * to_k)[None, :]
    if kernels.dtype.element_ty == tl.float32:  # noqa: SIM102  # the types of the inner branch are float32's
        if low != 0:
            high = high_part(value)
            tl.store(kernels_low + to, low_part(value, high), mask=some)
            value = high
    tl.store(kernels + to, value, mask=some)


@triton.jit
def sum_of(grad, by_bias, c, images, height, width, at_n, at_c, at_y, at_x, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """by_bias[c] = sum over images and pixels of grad[n, c]."""
    dtype: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK], dtype)
    for n in range(images):
        for start in range(0, height * width, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            y = pixel // width
            if LAYOUT == 1:
                at = y.to(tl.int64) * at_y + (pixel - y * width)
            else:
                at = y.to(tl.int64) * at_y + (pixel - y * width).to(tl.int64) * at_x
            at += tl.cast(n, tl.int64) * at_n + tl.cast(c, tl.int64) * at_c
            total += tl.load(grad + at, mask=pixel < height * width, other=0).to(dtype)
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
    input, offset, mask, weight, grad, by_bias, pixels, places, image, kernels, kernels_low,
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
    """By_bias: the sums of grad. Pixels and places: the plan of the chunk's samples. Image: the input with a border,
    channels last. Kernels: the weights by tap. Where ``low`` is 2, kernels_low are their parts of float16, and kernels
    the scales. Grads: the gradient of the result, channels last, and along the positions. By_image: zeros.

    Grid: (programs of all jobs).
    """
    block = tl.program_id(0)
    if block < end_sums:
        sum_of(grad, by_bias, block, images, rows, columns, grad_n, grad_c, grad_y, grad_x, LAYOUT_GRAD, ZEROS)
    elif block < end_plan:
        plan(
            offset, mask, pixels, places, block - end_sums, first, count, height, width, rows, columns,
            offset_n, offset_c, offset_y, offset_x, mask_n, mask_c, mask_y, mask_x,
            D, K, KW, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, STEP_Y, STEP_X, MASKED, POSITIONS,
        )  # fmt: skip
    elif block < end_image:
        border(
            input, image, block - end_plan, height, width, input_n, input_c, input_y, input_x,
            C, 1, LAYOUT, PIXELS, CHANNELS,
        )  # fmt: skip
    elif block < end_weight:
        if kernels.dtype.element_ty == tl.float32:
            if low == 2:
                split_weights(
                    weight, kernels, kernels_low, block - end_image, weight_o, weight_c, weight_v, weight_u,
                    G * NG, C // G, K, KW, 1024,
                )  # fmt: skip
            else:
                by_tap(
                    weight, kernels, kernels_low, block - end_image, weight_o, weight_c, weight_v, weight_u,
                    to_o, to_k, low, G, NG, C // G, K, KW,
                )  # fmt: skip
        else:
            by_tap(
                weight, kernels, kernels_low, block - end_image, weight_o, weight_c, weight_v, weight_u,
                to_o, to_k, low, G, NG, C // G, K, KW,
            )  # fmt: skip
    elif block < end_grads:
        border(
            grad, grads, block - end_weight, rows, columns, grad_n, grad_c, grad_y, grad_x,
            G * NG, 0, LAYOUT_GRAD, PIXELS, CHANNELS,
        )  # fmt: skip
    elif block < end_along:
        along_positions(
            grad, grads_along, block - end_grads, images, rows, columns, grad_n, grad_c, grad_y, grad_x, along,
            G * NG, LAYOUT_GRAD, PIXELS, CHANNELS,
        )  # fmt: skip
    else:
        at = (block - end_along).to(tl.int64) * ZEROS + tl.arange(0, ZEROS)
        size = images.to(tl.int64) * (height + 2) * (width + 2) * C
        tl.store(by_image + at, tl.zeros([ZEROS], by_image.dtype.element_ty), mask=at < size)


@triton.jit
def without_border(
    image, target, block, height, width, at_n, at_c, at_y, at_x,
    C: tl.constexpr, LAYOUT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """target[n, c, y, x] = image[n, y + 1, x + 1, c]."""
    n, pixel, c = pixels_of(block, height * width, C, PIXELS, CHANNELS)
    y = pixel // width
    x = pixel - y * width
    some = (pixel < height * width)[:, None] & (c < C)[None, :]
    at = (((n.to(tl.int64) * (height + 2) + y + 1) * (width + 2) + x + 1) * C)[:, None] + c[None, :]
    value = tl.load(image + at, mask=some, other=0).to(target.dtype.element_ty)
    tl.store(target + place_of(n, c, y, x, height, width, C, at_n, at_c, at_y, at_x, LAYOUT), value, mask=some)


@triton.jit
def by_weight_of(
    total, by_weight, block, splits, at_o, at_c, at_v, at_u,
    CG: tl.constexpr, C_OUT: tl.constexpr, K: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """by_weight[o, c, t] = sum over splits of total[split, o, t * CG + c]."""
    BLOCKS: tl.constexpr = (K * CG + 511) // 512
    o = block // BLOCKS
    k = (block - o * BLOCKS) * 512 + tl.arange(0, 512)
    some = k < K * CG
    total += o.to(tl.int64) * (K * CG) + k
    value = tl.load(total, mask=some, other=0)
    for _ in range(1, splits):
        total += C_OUT * K * CG
        value += tl.load(total, mask=some, other=0)
    t = k // CG
    to = o.to(tl.int64) * at_o + (k - t * CG).to(tl.int64) * at_c
    to += (t // KW).to(tl.int64) * at_v + (t % KW).to(tl.int64) * at_u
    tl.store(by_weight + to, value.to(by_weight.dtype.element_ty), mask=some)


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
            by_image, by_input, block, height, width, input_n, input_c, input_y, input_x, C, LAYOUT, PIXELS, CHANNELS
        )
    else:
        by_weight_of(
            total, by_weight, block - end_image, splits, weight_o, weight_c, weight_v, weight_u,
            C // G, C_OUT, K, KW,
        )  # fmt: skip
