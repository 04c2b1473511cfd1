"""Files of pictures: their kinds, and how Pillow reads them, with pillow-heif where it is installed."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_ENDINGS = {
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG 2000": (".j2k", ".jp2", ".jpx"),
    "Netpbm": (".pbm", ".pgm", ".pnm", ".ppm"),
    "PNG": (".apng", ".png"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WebP": (".webp",),
}
KINDS = {ending: kind for kind, endings in _ENDINGS.items() for ending in endings}
"""The kind of picture of each ending."""
UNREADABLE = {
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),  # of cameras
    *(".exr", ".hdr", ".jxl", ".psd", ".svg"),
}
"""The endings of pictures that cannot be read."""
_ANIMATED_FORMATS = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
"""The formats of sequences, as Pillow calls them. Others hold several versions of one picture, its depth, and so on."""
_TRANSPOSES = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""Pillow's transposition that makes a picture upright, by its EXIF orientation."""
_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112
"""Tags of EXIF and TIFF."""
_JPEG = b"\xff\xd8\xff"
"""How a JPEG begins."""


class SizeError(ValueError):
    """A picture of another size than the first of its video."""


def readable_endings() -> str:
    """The endings of pictures that can be read, as a list for error messages."""
    return ", ".join(sorted(KINDS))


def has_picture_signature(path: Path) -> bool:
    """Whether a file begins like those that Pillow reads better than FFmpeg, pictures or animations.

    A JPEG must have the ending of one, too: some videos are JPEGs one after another.
    """
    with path.open("rb") as file:
        start = file.read(12)
    return begins_like_picture(start) and (not start.startswith(_JPEG) or KINDS.get(path.suffix.lower()) == "JPEG")


def begins_like_picture(start: bytes) -> bool:
    """Whether these are the first bytes, 12 or more, of a picture or an animation of a kind that Pillow reads."""
    return (
        start.startswith((b"GIF8", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", _JPEG))
        or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")
        or _isobmff_kind(start[:12]) in ("AVIF", "HEIF")
    )


def is_animation(path: Path) -> bool:
    """Whether a file is a GIF, PNG, WebP, AVIF or TIFF of several pictures, which ``Frames`` takes for a video.

    False for files that are no pictures.

    Raises:
        OSError: where the file cannot be read.
    """
    if not has_picture_signature(path):
        return False
    try:
        with open_picture(path) as picture:
            return is_animated(picture)
    except ValueError:
        return False


def is_animated(picture: Image) -> bool:
    """Whether an open picture is the first of several."""
    return picture.format in _ANIMATED_FORMATS and bool(getattr(picture, "is_animated", False))


def open_picture(path: Path) -> Image:
    """Open a picture; its pixels are not read yet.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no picture, or of a kind that needs another library, by its name.
    """
    from PIL import Image, UnidentifiedImageError

    register_heif()
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(f"{path} cannot be read as a picture{missing_decoder(path)}") from None
    except OSError as error:
        if error.errno:
            raise
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    except Exception as error:  # Pillow's decoders raise what they like on damaged files
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


@cache
def register_heif() -> bool:
    """Let Pillow read HEIF; False where pillow-heif is not installed."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return False
    register_heif_opener()
    return True


def exif_orientation(picture: Image) -> int:
    """The EXIF orientation, 1 to 8, without reading the pixels; 1 is upright, and the default.

    Of TIFF it is 1: Pillow rotates TIFF itself when it reads the pixels.
    """
    from PIL import Image

    if picture.format == "TIFF":
        return 1
    if picture.format == "PNG" and "exif" not in picture.info:
        if _has_exif_chunk(picture):
            picture.load()
        exif = Image.Image.getexif(picture)  # PNG's own method reads all pixels, because EXIF data may come after them
    else:
        exif = picture.getexif()
    number = exif.get(_ORIENTATION, 1)
    return number if number in _TRANSPOSES else 1


def upright_size(picture: Image) -> tuple[int, int]:
    """Width and height of the picture upright."""
    if picture.format == "TIFF":  # whose size Pillow's versions give before or after the rotation
        tags = picture.tag_v2  # type: ignore[attr-defined]
        width, height = int(tags[_WIDTH]), int(tags[_HEIGHT])
        return (height, width) if tags.get(_ORIENTATION, 1) in range(5, 9) else (width, height)
    width, height = picture.size
    return (height, width) if exif_orientation(picture) >= 5 else (width, height)


def upright(picture: Image, orientation: int) -> Image:
    """A picture of that EXIF orientation, rotated and flipped as it is to be shown."""
    from PIL import Image

    return picture if orientation == 1 else picture.transpose(Image.Transpose[_TRANSPOSES[orientation]])


def to_rgb8(picture: Image) -> Image:
    """An open picture in RGB, 8 bits a channel, its pixels read."""
    from PIL import Image

    from omniops.sam2.transforms import to_rgb

    if picture.mode == "RGB":
        picture.load()
        return picture  # not a copy, which would hold Python's lock while other threads decode
    rgb = to_rgb(picture)
    if rgb.dtype != np.uint8:
        white = np.iinfo(rgb.dtype).max if rgb.dtype.kind == "u" else 1
        rgb = np.rint(rgb * (255 / white)).astype(np.uint8)
    return Image.fromarray(rgb)


def require_same_size(size: tuple[int, int], name: Path | str, expected: tuple[int, int], first: Path | str) -> None:
    """Raise ``SizeError`` where a picture of that name has another width or height than the first one."""
    if size != expected:
        raise SizeError(
            f"the pictures of a video must be of one size, got {'x'.join(map(str, size))} in {name} "
            f"and {'x'.join(map(str, expected))} in {first}"
        )


def _has_exif_chunk(picture: Image) -> bool:
    """Whether a PNG file has EXIF data, before the pixels or after them."""
    file = picture.fp  # type: ignore[attr-defined]
    if file is None:  # Pillow has read all of it
        return False
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name in (b"eXIf", b"IEND"):
                return bool(name == b"eXIf")
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(position)


def _isobmff_kind(start: bytes) -> str | None:
    """HEIF or AVIF, by the first twelve bytes of a file."""
    if start[4:8] != b"ftyp":
        return None
    brands = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"heim": "HEIF", b"heis": "HEIF"}
    return (brands | {b"mif1": "HEIF", b"msf1": "HEIF", b"hevc": "HEIF", b"hevx": "HEIF"}).get(start[8:12])


def missing_decoder(path: Path) -> str:
    """For an error message of a picture that Pillow does not know: the library that could read it, or nothing."""
    with path.open("rb") as file:
        start = file.read(12)
    if _isobmff_kind(start) == "HEIF" and not register_heif():
        return ", for HEIF needs pillow-heif: pip install 'omniops[heif]'"
    if _isobmff_kind(start) == "AVIF":
        return ", for AVIF needs Pillow 11.3 or newer"
    return ""
