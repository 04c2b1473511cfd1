"""The frames of a folder of pictures."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from omniops.sam2 import picture_files
from omniops.sam2.frame_reader import FrameError
from omniops.sam2.picture_files import require_same_size

if TYPE_CHECKING:
    from PIL.Image import Image


class PictureFolder:
    """A ``FrameReader`` of a folder's pictures.

    Raises:
        ValueError: for a folder without pictures, or pictures that cannot be read or differ in size or kind.
    """

    fps = None
    times = None
    time_base = None
    start_time = None
    colour = None
    sample_aspect_ratio = Fraction(1)

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(_find_frames(folder), key=_natural_order)
        sizes = []
        for path in self._paths:
            try:
                with picture_files.open_picture(path) as picture:
                    is_animation = picture_files.is_animated(picture)
                    sizes.append(picture_files.upright_size(picture))
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
            if is_animation:
                raise ValueError(f"{path} is an animation or has several pages, not one frame: give it by itself")
            require_same_size(sizes[-1], path, sizes[0], self._paths[0])
        self.width, self.height = sizes[0]

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def nbytes(self) -> int:
        """Bytes of decoded frames in memory: none are kept."""
        return 0

    def frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3), RGB, as it is shown."""
        return np.array(self._picture(index))

    def resized(self, index: int, image_size: int) -> NDArray[np.uint8]:
        """(S, S, 3), RGB, for the network."""
        return np.array(self._picture(index).resize((image_size, image_size)))

    def _picture(self, index: int) -> Image:
        path = self._paths[index]
        try:
            with picture_files.open_picture(path) as picture:
                orientation = picture_files.exif_orientation(picture)
                return picture_files.upright(picture_files.to_rgb8(picture), orientation)
        except Exception as error:  # Pillow's decoders raise what they like on damaged files
            raise FrameError(f"{path} cannot be read: {error}") from None


def _find_frames(folder: Path) -> list[Path]:
    """The pictures of a folder that are its frames, which are of one kind."""
    kinds: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        ending = path.suffix.lower()
        kind = ending if ending in picture_files.UNREADABLE else picture_files.KINDS.get(ending)
        is_broken_link = path.is_symlink() and not path.exists()  # an error that names it comes when it is read
        if kind and not path.name.startswith(".") and (path.is_file() or is_broken_link):
            kinds.setdefault(kind, []).append(path)
    if not kinds:
        raise ValueError(f"{folder} has no pictures: no file ends with {picture_files.readable_endings()}")
    frames = kinds.get("JPEG")
    if frames:
        names = {path.stem for path in frames}
        others = [path for kind in kinds if kind != "JPEG" for path in kinds[kind] if path.stem not in names]
    else:
        frames, *rest = kinds.values()
        others = [path for paths in rest for path in paths]
    if others:
        found = Counter(path.suffix.lower() for path in frames + others)
        listed = ", ".join(f"{count} {ending}" for ending, count in sorted(found.items()))
        raise ValueError(
            f"{folder} has pictures of several kinds, {listed} ({min(others).name} and {min(frames).name} are two): "
            "give the frames, of one kind, a folder of their own"
        )
    if frames[0].suffix.lower() in picture_files.UNREADABLE:
        raise ValueError(
            f"{min(frames)} is a picture of a kind that is not read: only {picture_files.readable_endings()} are"
        )
    return frames


def _natural_order(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """A sort key with numbers in names by their value, 2 before 10, and before letters."""
    runs = re.findall(r"\d+|\D+", path.stem)
    return [(False, int(run), "") if run.isdecimal() else (True, 0, run) for run in runs], path.name
