"""Files of pictures: which there are, and what Pillow, with pillow-heif where it is there, makes of them."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

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
"""The kind of the pictures that end so."""
UNREADABLE = {
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),  # of cameras
    *(".exr", ".hdr", ".jxl", ".psd", ".svg"),
}
"""The endings of pictures that are not read."""
_ANIMATED = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
"""What may hold a sequence, as Pillow calls it. Others hold smaller versions of one picture, depth and the like."""
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What makes a picture upright, by its orientation in EXIF."""
_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112


def endings() -> str:
    """Those of pictures that are read, for errors."""
    return ", ".join(sorted(KINDS))


def has_pictures_signature(path: Path) -> bool:
    """Whether a file begins as those do that Pillow reads better than FFmpeg: it may be a picture or a sequence.

    A JPEG is one by its name, too: videos may be JPEGs one behind the other.
    """
    with path.open("rb") as file:
        start = file.read(12)
    return (
        start.startswith((b"GIF8", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))
        or (start.startswith(b"RIFF") and start.endswith(b"WEBP"))
        or _brand(start) in ("AVIF", "HEIF")
        or (start.startswith(b"\xff\xd8\xff") and KINDS.get(path.suffix.lower()) == "JPEG")
    )


def is_animation(path: Path) -> bool:
    """Whether a file is a GIF, PNG, WebP, AVIF or TIFF of several pictures, which ``Frames`` takes for a video.

    Raises:
        OSError: where the file cannot be read; no picture at all is none.
    """
    if not has_pictures_signature(path):
        return False
    try:
        with opened(path) as picture:
            return animated(picture)
    except ValueError:
        return False


def animated(picture: Image) -> bool:
    """Whether an opened picture is the first of several."""
    return picture.format in _ANIMATED and bool(getattr(picture, "is_animated", False))


def opened(path: Path) -> Image:
    """The picture, its pixels not read yet.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no picture, or of a kind that needs another library, which is named.
    """
    from PIL import Image, UnidentifiedImageError

    register_heif()
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(f"{path} cannot be read as a picture{needed(path)}") from None
    except OSError as error:
        if error.errno:
            raise
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    except Exception as error:  # Pillow's decoders raise what they like on damaged files
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


@cache
def register_heif() -> bool:
    """Let Pillow read HEIF; False where pillow-heif is not there."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return False
    register_heif_opener()
    return True


def orientation(picture: Image) -> int:
    """Of EXIF, 1 to 8, without reading the pixels; 1 is upright, and where nothing is said.

    Pillow turns TIFF itself when it reads the pixels, so that of TIFF is 1.
    """
    from PIL import Image

    if picture.format == "TIFF":
        return 1
    if picture.format == "PNG" and "exif" not in picture.info:
        if _has_exif_behind(picture):
            picture.load()
        exif = Image.Image.getexif(picture)  # PNG's own reads all pixels, for EXIF may come after them
    else:
        exif = picture.getexif()
    number = exif.get(_ORIENTATION, 1)
    return number if number in _TURNS else 1


def size_of(picture: Image) -> tuple[int, int]:
    """Width and height of the picture upright."""
    if picture.format == "TIFF":  # of which Pillow has told one size or the other, by its version
        tags = picture.tag_v2  # type: ignore[attr-defined]
        width, height = int(tags[_WIDTH]), int(tags[_HEIGHT])
        return (height, width) if tags.get(_ORIENTATION, 1) in range(5, 9) else (width, height)
    width, height = picture.size
    return (height, width) if orientation(picture) >= 5 else (width, height)


def upright(picture: Image, turn: int) -> Image:
    """A picture whose orientation is ``turn`` as it is to be seen."""
    from PIL import Image

    return picture if turn == 1 else picture.transpose(Image.Transpose[_TURNS[turn]])


def _has_exif_behind(picture: Image) -> bool:
    """Whether a PNG file has EXIF data anywhere, as its chunks say."""
    file = picture.fp  # type: ignore[attr-defined]
    if file is None:  # read already
        return False
    here = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name in (b"eXIf", b"IEND"):
                return bool(name == b"eXIf")
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(here)


def _brand(start: bytes) -> str | None:
    """HEIF or AVIF, by the first twelve bytes of a file."""
    if start[4:8] != b"ftyp":
        return None
    brands = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"heim": "HEIF", b"heis": "HEIF"}
    return (brands | {b"mif1": "HEIF", b"msf1": "HEIF", b"hevc": "HEIF", b"hevx": "HEIF"}).get(start[8:12])


def needed(path: Path) -> str:
    """What is missing to read a picture that Pillow does not know."""
    with path.open("rb") as file:
        start = file.read(12)
    if _brand(start) == "HEIF" and not register_heif():
        return ", for HEIF needs pillow-heif: pip install 'omniops[heif]'"
    if _brand(start) == "AVIF":
        return ", for AVIF needs Pillow 11.3 or newer"
    return ""
