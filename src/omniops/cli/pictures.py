"""Pictures, found in folders and read whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniops.cli.common import CommandError
from omniops.cli.errors import reason, say
from omniops.sam2.picture_files import KINDS, UNREADABLE, animated, endings, needed, opened

if TYPE_CHECKING:
    from PIL.Image import Image


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """The files named, and those of the folders named that end as pictures do; each once.

    Pictures of a folder that are of a kind that is not read are named on stderr.
    """
    found: dict[Path, Path] = {}
    unread: list[Path] = []
    for place in places:
        try:
            if place.is_dir():
                files = [each for each in place.iterdir() if not each.name.startswith("._") and not each.is_dir()]
                inside = [each for each in files if each.suffix.lower() in KINDS]
                unread += sorted(each for each in files if each.suffix.lower() in UNREADABLE)
            else:
                place.stat()
                inside = [place]
        except OSError as error:
            raise CommandError(f"cannot read {place}: {error.strerror}") from None
        for each in sorted(inside):
            found.setdefault(each.resolve(), each)
    if not found:
        of_others = f", and {unread[0]} is of a kind that is not read" if unread else ""
        raise CommandError(f"no pictures in {', '.join(map(str, places))}: no file ends with {endings()}{of_others}")
    for each in unread:
        say(f"{each} is left out: a picture of a kind that is not read")
    return list(found.values())


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Image:
    """The picture in RGB as its EXIF data turns it, without transparency.

    With a size, (width, height), it is turned or left as it is stored, whichever has that size.
    """
    from PIL import ImageOps

    try:
        try:
            picture = opened(path)
        except ValueError:
            raise CommandError(f"not a picture that Pillow can read: {path}{needed(path)}") from None
        with picture as stored:
            if animated(stored):
                raise CommandError(f"{path} is an animation or has several pages, not one picture")
            turned = ImageOps.exif_transpose(stored)
            if size is not None and turned.size != size:
                if stored.size != size:
                    raise CommandError(
                        f"{path} has {turned.width} x {turned.height} pixels, its annotations {size[0]} x {size[1]}"
                    )
                turned = stored
            return _to_rgb(turned)
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except CommandError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like on damaged files
        raise CommandError(f"cannot read {path}: {reason(error)}") from None


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
