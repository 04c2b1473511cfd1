"""Masks as polygons that give back the mask, pixel for pixel, when they are filled.

There are two ways of filling a polygon, and so there are two kinds of outline:

- ``edges``: along the edges of the pixels, where the pixel in column x reaches from x to x + 1. What lies inside is
  the mask. So pycocotools and faster-coco-eval fill the polygons of COCO.
- ``centres``: through the centres of the outermost pixels, x + 0.5. What lies inside or is passed is the mask. So
  OpenCV and Pillow (from 11.3 on) fill polygons whose fractions are cut off, and with them ultralytics and LabelMe.

Pixels that touch at a corner are of one part, and of a hole where they touch along an edge, as in OpenCV. A polygon has
one line around it, so a hole is reached from the outline above it by a seam: down the column, around the hole, and up
again. Polygons are filled by the even-odd rule, where the two lines of a seam cancel each other; they run over pixels
of the mask alone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Polygon = NDArray[np.float64]
"""(P, 2), x and y of its points; the last is joined to the first."""
_Points = NDArray[np.int64]

_KINDS = ("edges", "centres")
_ENDS_OF_A_LINK = 32
"""How many points of a part a line to another part may start from."""
_COMPARED_POINTS = 2048
"""How many points of all parts are compared to find which are near each other, or one of each part."""


class _Lines(NamedTuple):
    """The horizontal lines of the rings around parts and holes, row by row, from left to right."""

    y: NDArray[np.int64]
    start: NDArray[np.int64]
    """The x where each begins; the mask is on the right-hand side of who walks along the ring."""
    end: NDArray[np.int64]
    """The x where each ends, from where the ring goes on up or down."""
    following: NDArray[np.int64]
    """The line that the ring comes to next."""


class _Insert(NamedTuple):
    """A detour of a ring."""

    after: int
    """The index of the point of the ring at which it begins."""
    order: int
    """Of those after one point the lowest comes first."""
    points: NDArray[Any]


def mask_to_polygons(mask: ArrayLike, kind: str = "edges") -> list[Polygon]:
    """The polygons of a mask, one for each of its parts.

    Args:
        mask: (H, W), foreground where it is not zero.
        kind: ``edges``, along the edges of pixels, as COCO's polygons are filled; or ``centres``, through the centres
            of the outermost pixels, as Pillow and OpenCV fill polygons.

    Returns:
        (P, 2) in float64 for each part, x and y in pixels from the top left corner of the picture; in the order of
        their first pixels, row by row. Of ``edges`` at least 4 points; of ``centres`` at least 3, some of them twice
        where a part is a pixel or a line. An empty list for an empty mask.

    Raises:
        ValueError: for another number of dimensions, or another kind.

    Example:
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> mask_to_polygons(mask)[0].tolist()
        [[1.0, 1.0], [4.0, 1.0], [4.0, 3.0], [1.0, 3.0]]
        >>> mask_to_polygons(mask, "centres")[0].tolist()
        [[1.5, 1.5], [3.5, 1.5], [3.5, 2.5], [1.5, 2.5]]
    """
    values = np.asarray(mask)
    if values.ndim != 2:
        raise ValueError(f"mask must be (H, W), got {values.shape}")
    if kind not in _KINDS:
        raise ValueError(f"kind must be edges or centres, got {kind!r}")
    binary = values != 0
    rows, columns = np.flatnonzero(binary.any(1)), np.flatnonzero(binary.any(0))
    if not len(rows):
        return []
    corner = np.array([columns[0], rows[0]])
    rings = _rings(binary[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], is_centres=kind == "centres")
    if kind == "edges":
        return [(ring + corner).astype(np.float64) for ring in rings]
    return [_with_three_points(_without_straight_points(ring)) + corner + 0.5 for ring in rings]


def join_polygons(polygons: list[Polygon]) -> Polygon:
    """One polygon of several, joined by short lines there and back, for formats with one polygon for each object.

    Of two parts that are joined both keep all their pixels. Who fills the result colours the lines as well where
    outlines are coloured, one pixel wide.

    Args:
        polygons: (P, 2) each, one or more, of ``mask_to_polygons``.

    Returns:
        (P, 2).

    Raises:
        ValueError: for no polygon.

    Example:
        >>> join_polygons([np.array([[0.5, 0.5]] * 3), np.array([[4.5, 0.5]] * 3)]).tolist()
        [[0.5, 0.5], [4.5, 0.5], [4.5, 0.5], [4.5, 0.5], [4.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    if not polygons:
        raise ValueError("polygons must be one or more, got an empty list: an empty mask has none")
    detours: dict[int, list[_Insert]] = defaultdict(list)
    for order, (part, start, other, end) in reversed(list(enumerate(_links(polygons)))):
        around = _splice(polygons[part], detours[part], start)
        detour = np.concatenate([around, polygons[part][[start]], polygons[other][[end]]])
        detours[other].append(_Insert(end, order, detour))
    return _splice(polygons[0], detours[0])


def _links(polygons: list[Polygon]) -> list[tuple[int, int, int, int]]:
    """A line to each part but the first from the nearest before it: part, index of its point, other part, index.

    By Prim's algorithm, so that every part is linked to one that is linked earlier. It compares all points that stand
    for parts, of many parts a few of each.
    """
    if len(polygons) == 1:
        return []
    indices = [_spread(polygon, _COMPARED_POINTS // len(polygons)) for polygon in polygons]
    points = np.concatenate([polygon[i] for polygon, i in zip(polygons, indices, strict=True)])
    parts = np.repeat(np.arange(len(polygons)), [len(i) for i in indices])
    distances = np.full(len(points), np.inf)
    nearest_part = np.zeros(len(points), np.int64)
    links = []
    part = 0
    for _ in range(len(polygons) - 1):
        own = parts == part
        distances[own] = np.nan  # linked
        to_own = ((points[:, None] - points[own]) ** 2).sum(-1).min(1)
        is_nearer = to_own < distances
        distances[is_nearer] = to_own[is_nearer]
        nearest_part[is_nearer] = part
        best = int(np.nanargmin(distances))
        part, other = int(parts[best]), int(nearest_part[best])
        links.append((part, *_nearest_points(polygons[part], polygons[other], other)))
    return links


def _nearest_points(polygon: Polygon, other: Polygon, number: int) -> tuple[int, int, int]:
    """The index of a point of a polygon, the number of the other, and the index of its point that is nearest to it."""
    own, others = _spread(polygon, _ENDS_OF_A_LINK), _spread(other, _ENDS_OF_A_LINK)
    distances = ((polygon[own][:, None] - other[others]) ** 2).sum(-1)
    start, end = np.unravel_index(int(distances.argmin()), distances.shape)
    return int(own[start]), number, int(others[end])


def _spread(polygon: Polygon, count: int) -> NDArray[np.int64]:
    """The indices of at most so many of its points, one or more, at even distances."""
    count = min(len(polygon), max(1, min(count, _ENDS_OF_A_LINK)))
    indices: NDArray[np.int64] = np.arange(count) * len(polygon) // count
    return indices


def _rings(mask: NDArray[np.bool_], *, is_centres: bool) -> list[_Points]:
    """The ring around each part of a mask (H, W), its holes joined to it."""
    lines = _horizontal_lines(mask)
    width = mask.shape[1] + 1
    keys = lines.y * width + np.minimum(lines.start, lines.end)
    rings, ring_of, position_of = _follow(lines.following)
    is_hole = [bool(lines.start[ring[0]] > lines.end[ring[0]]) for ring in rings]
    points_of, per_line = (_border_pixels, 4) if is_centres else (_corners, 2)
    detours: dict[int, list[_Insert]] = defaultdict(list)
    outer: list[_Points] = []
    # A hole is joined to a ring that begins above it, so that from the last to the first each is complete.
    for number in range(len(rings) - 1, -1, -1):
        points = points_of(lines, np.array(rings[number]))
        if not is_hole[number]:
            outer.append(_splice(points, detours[number]))
            continue
        points = np.roll(points, -1, 0)
        points = _splice(np.concatenate([points, points[:1]]), detours[number])
        x, y = int(lines.end[rings[number][0]]), int(lines.y[rings[number][0]])
        above = mask[:y, x][::-1]
        top = y - (len(above) if above.all() else int(above.argmin()))
        line = int(np.searchsorted(keys, top * width + x, "right")) - 1
        parent = int(ring_of[line])
        joint = np.array([[x, top]])
        index = per_line * int(position_of[line]) - is_hole[parent]
        detours[parent].append(_Insert(index, x, np.concatenate([joint, points, joint])))
    return outer[::-1]


def _horizontal_lines(mask: NDArray[np.bool_]) -> _Lines:
    """The horizontal lines of all rings: to the right above pixels of the mask, to the left below them."""
    width = mask.shape[1] + 1
    y, left, right, is_rightward = _runs(mask)
    start, end = np.where(is_rightward, left, right), np.where(is_rightward, right, left)
    x, top, bottom, is_upward = _runs(mask.T)
    first, last = np.where(is_upward, bottom, top), np.where(is_upward, top, bottom)
    # Where pixels touch at a corner four lines meet: who comes from the left turns up there, who comes from above to
    # the right, so that the ring goes on along the other pixel.
    vertical = _line_from(first * width + x, is_upward, y * width + end, is_rightward)
    ends = (last * width + x)[vertical]
    return _Lines(y, start, end, _line_from(y * width + start, is_rightward, ends, ~is_upward[vertical]))


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """The straight lines between the mask and what is not, along the rows: their y, the x where they begin and end, and
    whether the mask is below."""
    padded = np.pad(mask, 1).astype(np.int8)
    changes = padded[1:] - padded[:-1]
    inner = changes[:, 1:-1]
    y, first = np.nonzero((inner != 0) & (inner != changes[:, :-2]))
    _, last = np.nonzero((inner != 0) & (inner != changes[:, 2:]))
    return y, first, last + 1, inner[y, first] > 0


def _line_from(
    starts: NDArray[np.int64], directions: NDArray[np.bool_], places: NDArray[np.int64], wanted: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The line that starts at each of the places; where two do, that of the wanted direction."""
    keys = 2 * starts + directions
    order = np.argsort(keys)
    keys = keys[order]
    found = np.searchsorted(keys, 2 * places + wanted)
    is_beyond = (found == len(keys)) | (keys[np.minimum(found, len(keys) - 1)] > 2 * places + 1)
    lines: NDArray[np.int64] = order[found - is_beyond]
    return lines


def _follow(following: NDArray[np.int64]) -> tuple[list[list[int]], NDArray[np.int64], NDArray[np.int64]]:
    """The lines of each ring in order; and of each line its ring, and its position there."""
    successors = following.tolist()
    ring_of, position_of = [-1] * len(successors), [0] * len(successors)
    rings: list[list[int]] = []
    for first in range(len(successors)):
        if ring_of[first] >= 0:
            continue
        ring: list[int] = []
        line = first
        while ring_of[line] < 0:
            ring_of[line], position_of[line] = len(rings), len(ring)
            ring.append(line)
            line = successors[line]
        rings.append(ring)
    return rings, np.array(ring_of), np.array(position_of)


def _corners(lines: _Lines, ring: NDArray[np.int64]) -> _Points:
    """Both ends of each horizontal line of a ring, and so those of the vertical ones."""
    y = lines.y[ring]
    return np.stack([lines.start[ring], y, lines.end[ring], y], 1).reshape(-1, 2)


def _border_pixels(lines: _Lines, ring: NDArray[np.int64]) -> _Points:
    """The first and the last pixel of the mask along each line of a ring, of horizontal and vertical ones by turns."""
    corners = _corners(lines, ring)
    # To the right of who walks from one corner to the next: half a pixel ahead, and half a pixel to the side.
    ahead = np.sign(np.roll(corners, -1, 0) - corners)
    aside = np.stack([-ahead[:, 1], ahead[:, 0]], 1)
    first = (2 * corners + ahead + aside - 1) // 2
    last = (2 * np.roll(corners, -1, 0) - ahead + aside - 1) // 2
    return np.stack([first, last], 1).reshape(-1, 2)


def _splice(points: NDArray[Any], inserts: list[_Insert], start: int = 0) -> NDArray[Any]:
    """A ring with its detours, from one of its points on."""
    pieces, begin = [], 0
    rotated = np.roll(points, -start, 0)
    for insert in sorted(inserts, key=lambda insert: ((insert.after - start) % len(points), insert.order)):
        end = (insert.after - start) % len(points) + 1
        pieces += [rotated[begin:end], insert.points]
        begin = end
    return np.concatenate([*pieces, rotated[begin:]])


def _without_straight_points(points: _Points) -> _Points:
    """A ring without the points between which it goes straight on, or that are there twice."""
    if (points == points[0]).all():  # a pixel
        return points[:1]
    points = points[(points != np.roll(points, -1, 0)).any(1)]
    directions = np.sign(np.roll(points, -1, 0) - points)
    turns: _Points = points[(directions != np.roll(directions, 1, 0)).any(1)]
    return turns


def _with_three_points(points: _Points) -> _Points:
    """A ring of a pixel or of a line, with as many points as readers ask of a polygon."""
    return points[np.arange(max(3, len(points))) % len(points)]
