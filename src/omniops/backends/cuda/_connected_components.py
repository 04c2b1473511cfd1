# mypy: ignore-errors
# (Triton's language, not Python's)
"""The Triton kernels of connected components: union-find over the runs of a bitmap.

A mask becomes a bitmap with 32 pixels of a row in a word. A run is a maximal row of foreground pixels *within a word*;
it is known by the node of its first pixel, 1 + y * W + x, which is what its label would be. While the kernels work,
``labels`` at a run's first pixel holds the node of its parent, an earlier run of the same component or itself, and
``counts`` there its length; the other pixels are not touched before the end. So there is no memory besides the results
and the bitmap, 4 bytes for up to 32 pixels of a row. The kernels, each over all words of all images:

    link_runs     the bitmap, and each run's parent: the run that it continues from the word on the left, else the first
                  run that it touches above, else itself. No two threads write one parent, so there are no atomics; most
                  links are made here
    merge_runs    the other touching runs: the later of two roots is pointed to the earlier one by atomic_min. If that
                  one had got another parent meanwhile, this parent is merged too (Komura 2015, Playne and Hawick 2018).
                  On the way to a root the parent of where it began becomes each run that it passes; as all runs do so
                  at once, a chain of length n takes about log n steps
    count_runs    each run's parent becomes the root, and each run adds its length to the count of its root
    write_result  labels and counts of every pixel

Parents only ever become smaller, and those of a component are of that component: a value read late, from whatever
cache, costs a step and nothing else. A parent that such a value replaces may be one that atomic_min has just put there,
but never the only link: whoever put it there saw by what it replaced that this was no root, and goes on from that. The
roots are the first nodes of the components, so the result is canonical.

A program owns BLOCK words of one image, in the last kernel their pixels. A lane is a word, and works through its runs
one after the other. Bits are in int64, so that neither a run's carry nor a shift leaves the number.

The mask is of bytes, in rows of a multiple of 8 that begin at a multiple of 8, so that 8 pixels are loaded at once.
``stride`` is the number of such eights in a row. pad_rows makes such a mask of any other, a byte for each pixel.
``diagonals`` is 1 where pixels that touch at a corner are connected, else 0. Triton compiles a kernel anew neither for
these numbers nor for the sizes or the mask's alignment. All kernels have the same parameters, used or not, as Triton
before 3.7 has a C compiler make a launcher for each list of types.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def _log2(x):
    """floor(log2(x)) from the exponent of a float, -127 for 0. x has no bit below its highest, so none rounds it up."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _first_of_run(word, column):
    """The column of the first pixel of the run that has ``column`` in it."""
    gaps = ~word & ((tl.full(column.shape, 1, word.dtype) << column) - 1)
    return tl.maximum(_log2(gaps & ~(gaps >> 1)), -1) + 1


@triton.jit
def _words(height, width, BLOCK: tl.constexpr):
    """This program's image as its first row in the batch; the words of a row; the program's words, their rows and
    columns of the rows, and whether they exist."""
    words = (width - 1) // 32 + 1  # tl.cdiv's sums may be beyond 32 bits
    blocks = (height * words - 1) // BLOCK + 1
    program = tl.program_id(0)
    first_row = (program // blocks).to(tl.int64) * height
    word = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return first_row, words, word, word // words, word % words, (word >= 0) & (word < height * words)


@triton.jit
def _load(bits, exists):
    return tl.load(bits, mask=exists, other=0).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def _parent(labels, node, active):
    return tl.load(labels + node, mask=active, other=0, cache_modifier=".cg")


@triton.jit
def _unite(labels, a, b, active, b_is_alone):
    """Make one component of the runs a and b.

    The ways to both roots are one loop, so that their loads are in flight together. Where b is the parent of a, they
    are one already, and the way is gone for the sake of those that lead through a; that from b is left to the lane that
    has b below another run, unless ``b_is_alone``: there may be no such lane.
    """
    while _any(active):
        root_of_a = _parent(labels, a, active)
        apart = active & ((root_of_a != b) | b_is_alone)
        root_of_b = _parent(labels, b, apart)
        above_a = _parent(labels, root_of_a, active)
        above_b = _parent(labels, root_of_b, apart)
        a_moves = active & (above_a != root_of_a)
        b_moves = apart & (above_b != root_of_b)
        while _any(a_moves | b_moves):
            root_of_a = tl.where(a_moves, above_a, root_of_a)
            root_of_b = tl.where(b_moves, above_b, root_of_b)
            tl.store(labels + a, root_of_a, mask=a_moves)
            tl.store(labels + b, root_of_b, mask=b_moves)
            above_a = _parent(labels, root_of_a, a_moves)
            above_b = _parent(labels, root_of_b, b_moves)
            a_moves = a_moves & (above_a != root_of_a)
            b_moves = b_moves & (above_b != root_of_b)
        active = apart & (root_of_a != root_of_b)
        later = tl.maximum(root_of_a, root_of_b)
        b = tl.minimum(root_of_a, root_of_b)
        a = tl.atomic_min(labels + later, b, mask=active, sem="relaxed")
        active = active & (a != later)


@triton.jit
def _packed(eights, row, k, stride, exists):
    """Word k of a row of the batch."""
    word = tl.zeros(k.shape, tl.int64)
    for i in tl.static_range(4):
        index = k * 4 + i
        pixels = tl.load(eights + row * stride + index, mask=exists & (index < stride), other=0)
        # The highest bit of each byte that is not 0; then these 8 side by side.
        pixels = (((pixels & 0x7F7F7F7F7F7F7F7F) + 0x7F7F7F7F7F7F7F7F) | pixels) >> 7 & 0x0101010101010101
        word |= ((pixels * 0x0102040810204080) >> 56 & 0xFF) << (8 * i)
    return word


_NOT_COMPILED_FOR = ("height", "width", "stride", "diagonals")


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=("mask",))
def pad_rows(mask, rows, labels, counts, height, width, stride, diagonals, BLOCK: tl.constexpr):
    first_row, _, _, y, k, exists = _words(height, width, BLOCK)
    row = (first_row + y)[:, None]
    x = k[:, None] * 32 + tl.arange(0, 32)[None, :]
    exists = exists[:, None]
    value = tl.load(mask + row * width + x, mask=exists & (x < width), other=0)
    length = stride * 8
    # Beyond the image too, where link_runs looks for no end of the row.
    tl.store(rows + row * length + x, (value != 0).to(tl.int8), mask=exists & (x < length))


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=("mask",))
def link_runs(mask, bits, labels, counts, height, width, stride, diagonals, BLOCK: tl.constexpr):
    first_row, words, word, y, k, exists = _words(height, width, BLOCK)
    bits += first_row * words + word
    labels += first_row * width - 1
    counts += first_row * width - 1
    row = first_row + y
    has_left = exists & (k > 0)
    has_above = exists & (y > 0)
    eights = mask.to(tl.pointer_type(tl.int64))
    rest = _packed(eights, row, k, stride, exists)
    left = _packed(eights, row, k - 1, stride, has_left)
    above = _packed(eights, row - 1, k, stride, has_above)
    above_left = _packed(eights, row - 1, k - 1, stride, has_above & has_left)
    right = k * 32 + 32
    above_right = tl.load(mask + ((row - 1) * stride * 8 + right), mask=has_above & (right < width), other=0) != 0
    tl.store(bits, rest.to(tl.int32), mask=exists)
    # Bit c + 1: column c of the row above, from -1 to 32.
    around = above_left >> 31 | above << 1 | above_right.to(tl.int64) << 33
    last = tl.full((BLOCK,), 31, tl.int64)
    left_first = _first_of_run(left, last) - 32
    above_left_first = _first_of_run(above_left, last) - 32
    one = tl.full((BLOCK,), 1, tl.int64)
    origin = y * width + k * 32 + 1
    while _any(rest != 0):
        active = rest != 0
        low = tl.where(active, rest & -rest, 1)
        past = rest + low  # carries through the run to the bit after it
        first = _log2(low)
        end = _log2(past & -past)
        touching = around & ((one << (end + 1 + diagonals)) - (one << (first + 1 - diagonals)))
        column = _log2(tl.where(touching != 0, touching & -touching, 2)) - 1
        touched = _first_of_run(above, tl.minimum(tl.maximum(column, 0), 31).to(tl.int64))
        touched = tl.where(column < 0, above_left_first, tl.where(column > 31, 32, touched))
        parent = tl.where(touching != 0, touched - width, first)
        parent = tl.where((first == 0) & (left >> 31 != 0), left_first, parent)
        tl.store(labels + (origin + first), origin + parent, mask=active)
        tl.store(counts + (origin + first), end - first, mask=active)
        rest = past & (past - 1)


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=("mask",))
def count_runs(mask, bits, labels, counts, height, width, stride, diagonals, BLOCK: tl.constexpr):
    first_row, words, word, y, k, exists = _words(height, width, BLOCK)
    labels += first_row * width - 1
    counts += first_row * width - 1
    rest = _load(bits + first_row * words + word, exists)
    origin = y * width + k * 32 + 1
    while _any(rest != 0):
        active = rest != 0
        low = tl.where(active, rest & -rest, 1)
        past = rest + low
        first = _log2(low)
        node = origin + first
        root = _parent(labels, node, active)
        above = _parent(labels, root, active)
        moving = active & (above != root)
        while _any(moving):
            root = tl.where(moving, above, root)
            tl.store(labels + node, root, mask=moving)  # at once, for those whose way leads through here
            above = _parent(labels, root, moving)
            moving = moving & (above != root)
        counted = active & (root != node)
        length = tl.where(counted, _log2(past & -past) - first, 0)
        lowest = tl.min(tl.where(counted, root, 2147483647), axis=0)
        if lowest == tl.max(tl.where(counted, root, 0), axis=0):
            # One component, as inside of a large one, whose pixels would else all add to one address.
            tl.atomic_add(counts + lowest, tl.sum(length, axis=0), sem="relaxed")
        else:
            tl.atomic_add(counts + root, length, mask=counted, sem="relaxed")
        rest = past & (past - 1)


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=("mask",))
def merge_runs(mask, bits, labels, counts, height, width, stride, diagonals, BLOCK: tl.constexpr):
    """Each two runs that touch meet here once, at the first column where they do.

    Not those where that is the corner at which the upper one ends and the lower one begins: link_runs has joined them.
    """
    first_row, words, word, y, k, exists = _words(height, width, BLOCK)
    bits += first_row * words + word
    labels += first_row * width - 1
    has_above = exists & (y > 0)
    has_right = has_above & (k + 1 < words)
    current = _load(bits, has_above)
    left = _load(bits - 1, has_above & (k > 0))
    right = _load(bits + 1, has_right)
    above = _load(bits - words, has_above)
    above_left = _load(bits - words - 1, has_above & (k > 0))
    above_right = _load(bits - words + 1, has_right)
    overlap = current & above
    # Above on the right: the run above begins there.
    corners = current & ~above & (above >> 1 | (above_right & 1) << 31) & ~(current >> 1 | (right & 1) << 31)
    corners *= diagonals
    meetings = overlap & ~(overlap << 1 | (left & above_left) >> 31) | corners
    origin = y * width + k * 32 + 1
    while _any(meetings != 0):
        active = meetings != 0
        lowest = tl.where(active, meetings & -meetings, 1)
        column = _log2(lowest)
        below_first = _first_of_run(current, column.to(tl.int64))
        above_first = _first_of_run(above, column.to(tl.int64))
        above_first = tl.where((corners & lowest) != 0, column + 1, above_first)
        # It continues a run on the left, and may touch nothing above.
        continues = (above_first == 0) & (above_left >> 31 != 0)
        _unite(labels, origin + below_first, origin - width + above_first, active, continues)
        meetings &= meetings - 1


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=("mask",))
def write_result(mask, bits, labels, counts, height, width, stride, diagonals, BLOCK: tl.constexpr):
    first_row, words, word, y, k, exists = _words(height, width, BLOCK)
    bitmap = tl.load(bits + first_row * words + word, mask=exists, other=0)
    column = tl.arange(0, 32)[None, :]
    bitmap, columns = tl.broadcast(bitmap[:, None], column)
    foreground = (bitmap >> columns) & 1 != 0
    y = y[:, None]
    x = k[:, None] * 32
    image = first_row * width
    first = y * width + x + _first_of_run(bitmap, columns)
    # Others read what is at a run's first pixel while its own lane writes it anew: the same label, the same count.
    label = tl.load(labels + image + first, mask=foreground, other=0)
    count = tl.load(counts + image - 1 + label, mask=foreground, other=0)
    if width % 4 == 0:
        fours = width // 4 * 4  # which tells the compiler that rows are aligned: it stores several pixels at once
        pixel = first_row * fours + (y * fours + x + column)
        inside = exists[:, None] & (x + column < fours)
        tl.store(labels + pixel, label, mask=inside)
        tl.store(counts + pixel, count, mask=inside)
    else:
        pixel = image + (y * width + x + column)
        inside = exists[:, None] & (x + column < width)
        tl.store(labels + pixel, label, mask=inside)
        tl.store(counts + pixel, count, mask=inside)
