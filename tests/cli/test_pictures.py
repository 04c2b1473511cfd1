"""Pictures of folders: read, or named."""

from __future__ import annotations

import pytest

pytest.importorskip("typer", reason="the extra cli")
pytest.importorskip("PIL", reason="the extra pictures")

from PIL import Image

from omniops.cli.common import CommandError
from omniops.cli.pictures import find_pictures, read_picture


def test_pictures_that_are_not_read_are_named(tmp_path, capsys):
    for name in ("a.png", "b.dng", "c.heic", "d.WEBP", "e.txt", "._f.png"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_pictures([tmp_path])] == ["a.png", "c.heic", "d.WEBP"]
    assert (
        capsys.readouterr().err == f"omniops: {tmp_path / 'b.dng'} is left out: a picture of a kind that is not read\n"
    )
    for name in ("a.png", "c.heic", "d.WEBP"):
        (tmp_path / name).unlink()
    with pytest.raises(CommandError, match=r"no file ends with .*, and .*b\.dng is of a kind that is not read"):
        find_pictures([tmp_path])


def test_animations_are_refused_by_name(tmp_path):
    first, second = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    with pytest.raises(CommandError, match=r"a\.gif is an animation or has several pages, not one picture"):
        read_picture(tmp_path / "a.gif")
    first.save(tmp_path / "b.gif")
    assert read_picture(tmp_path / "b.gif").size == (8, 6)
