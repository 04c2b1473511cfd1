"""Pictures as they come: read without trusting them, turned as their EXIF data say, written as browsers show them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from omniops.sam2 import picture_files
from omniops.server.errors import ServerError, TooLarge

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PPM")
"""Pillow's names of those that it reads by itself: others call programs, or are no pictures."""
_NO_PICTURE = "This is not a picture that can be read. JPEG, PNG, WebP, GIF, TIFF and BMP are."
MAX_PIXELS = 2**28


class Picture(NamedTuple):
    """What a file of a picture is; width and height as it is shown."""

    width: int
    height: int
    is_plain: bool
    """Whether all browsers show it as it is, and as the model sees it."""


def look(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """What a picture is, by its header.

    Raises:
        ServerError: for what is no picture.
        TooLarge: where it has too many pixels.
    """
    with _opened(path, max_pixels) as picture:
        width, height = picture_files.upright_size(picture)
        simple = (
            picture.format in ("JPEG", "PNG") and picture.mode in ("RGB", "L") and "transparency" not in picture.info
        )
        plain = simple and not picture_files.is_animated(picture) and picture_files.exif_orientation(picture) == 1
        return Picture(width, height, plain)


def read(path: Path, max_pixels: int = MAX_PIXELS) -> Any:
    """Pillow's picture, in RGB and upright; of several, the first.

    Raises:
        ServerError, TooLarge: as ``look``.
    """
    with _opened(path, max_pixels) as picture:
        return picture_files.upright(picture_files.to_rgb8(picture), picture_files.exif_orientation(picture))


def write(source: Path, folder: Path, stem: str, max_pixels: int = MAX_PIXELS) -> Path:
    """Write a picture as PNG, or as JPEG where it came so, into the folder; upright, without what else it carries.

    Its colour profile stays with it.

    Raises:
        ServerError, TooLarge: as ``look``.
    """
    with _opened(source, max_pixels) as picture:
        lossy, mode, profile = picture.format in ("JPEG", "MPO"), picture.mode, picture.info.get("icc_profile")
    upright = read(source, max_pixels)
    out = folder / f"{stem}.{'jpg' if lossy else 'png'}"
    unfinished = folder / f".{out.name}"
    try:
        keep = {"icc_profile": profile} if profile and mode in ("RGB", "RGBA", "P") else {}
        if lossy:
            upright.save(unfinished, format="JPEG", quality=95, subsampling=0, **keep)
        else:
            upright.save(unfinished, format="PNG", **keep)
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
    return out


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Any]:
    from PIL import Image

    picture_files.register_heif()
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(path, formats=formats) as picture:
            if picture.width * picture.height > max_pixels:
                limit = f"{max_pixels / 1e6:.0f} million"
                raise TooLarge(
                    f"It has {picture.width} x {picture.height} pixels, more than the {limit} that are taken."
                )
            yield picture
    except ServerError:
        raise
    except Image.DecompressionBombError:
        raise TooLarge("It has more pixels than are taken.") from None
    except Exception:  # Pillow's decoders raise what they like on damaged files
        raise ServerError(_NO_PICTURE) from None
