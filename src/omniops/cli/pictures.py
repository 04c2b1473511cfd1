"""Pictures, found in folders and read whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniops.cli.common import CommandError
from omniops.cli.errors import reason, say
from omniops.sam2.picture_files import (
    KINDS,
    UNREADABLE,
    is_animated,
    missing_decoder,
    open_picture,
    readable_endings,
    register_heif,
)

if TYPE_CHECKING:
    from PIL.Image import Image


def find_pictures(sources: Sequence[Path]) -> list[Path]:
    """The files named, and those of the folders named that end as pictures do; each once.

    Pictures of a folder that are of a kind that is not read are named on stderr.
    """
    found: dict[Path, Path] = {}
    unread: list[Path] = []
    for source in sources:
        try:
            if source.is_dir():
                files = [file for file in source.iterdir() if not file.name.startswith("._") and not file.is_dir()]
                pictures = [file for file in files if file.suffix.lower() in KINDS]
                unread += sorted(file for file in files if file.suffix.lower() in UNREADABLE)
            else:
                source.stat()
                pictures = [source]
        except OSError as error:
            raise CommandError(f"cannot read {source}: {error.strerror}") from None
        for path in sorted(pictures):
            found.setdefault(path.resolve(), path)
    if not found:
        of_others = f", and {unread[0]} is of a kind that is not read" if unread else ""
        raise CommandError(
            f"no pictures in {', '.join(map(str, sources))}: no file ends with {readable_endings()}{of_others}"
        )
    for path in unread:
        say(f"{path} is left out: a picture of a kind that is not read", "warning")
    return list(found.values())


def is_picture(path: Path) -> bool:
    """Whether Pillow takes the file for one picture, whatever it is called; an animation is a video."""
    from PIL import Image, UnidentifiedImageError

    register_heif()
    try:
        with Image.open(path) as picture:
            # Pillow knows MPEG, and cannot read it.
            return bool(picture.format != "MPEG" and not is_animated(picture))
    except UnidentifiedImageError:
        # HEIF without pillow-heif: what reads pictures says what is missing.
        return bool(missing_decoder(path))
    except Exception:  # Pillow's decoders raise what they like on damaged files
        return True


def read_picture(path: Path, size: tuple[int, int] | None = None, data: bytes | None = None) -> Image:
    """The picture in RGB as its EXIF data turns it, without transparency.

    With a size, (width, height), it is turned or left as it is stored, whichever has that size. With ``data`` these are
    read in place of the file, whose name is in errors alone.
    """
    from PIL import ImageOps

    try:
        try:
            picture = open_picture(path) if data is None else _open_bytes(data)
        except ValueError:
            missing = missing_decoder(path) if data is None else ""
            raise CommandError(f"not a picture that Pillow can read: {path}{missing}") from None
        with picture as stored:
            if is_animated(stored):
                raise CommandError(f"{path} is an animation or has several pages, not one picture")
            oriented = ImageOps.exif_transpose(stored)
            if size is not None and oriented.size != size:
                if stored.size != size:
                    raise CommandError(
                        f"{path} has {oriented.width} x {oriented.height} pixels, its annotations {size[0]} x {size[1]}"
                    )
                oriented = stored
            return _to_rgb(oriented)
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except CommandError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like on damaged files
        raise CommandError(f"cannot read {path}: {reason(error)}") from None


def _open_bytes(data: bytes) -> Image:
    from PIL import Image

    register_heif()
    try:
        return Image.open(BytesIO(data))
    except OSError as error:  # of which UnidentifiedImageError is one
        raise ValueError(str(error)) from None


def _to_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode[0] in "IF":  # converting these would cut off at 255, not scale
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are neither of 8 nor of 16 bits")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # where its transparent colours stay colours
    return picture.convert("RGB")
