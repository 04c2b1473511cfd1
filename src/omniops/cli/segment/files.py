"""Which files ``omniops segment`` writes, and that none of them is in the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from omniops.annotations.formats import Format
from omniops.cli.common import CommandError
from omniops.cli.outputs import lines_of, require_ending, require_new, unique_stems
from omniops.cli.segment.options import Save
from omniops.cli.segment.sources import Kind, Source, Sources

DEFAULT_FOLDER = Path("omniops-masks")
"""Of the results of many sources."""
DATASET = "data.yaml"
"""The classes of many pictures, for YOLO."""
SETS = (Save.COCO, Save.COCO_POLYGONS)
"""What has one file for many pictures."""

_DEFAULT_OUT = {
    Kind.PICTURE: Path("omniops-mask.png"),
    Kind.VIDEO: Path("omniops-video.mp4"),
    Kind.LIVE: Path("omniops-live.mp4"),
}
_DEFAULT_SAVE = {
    Kind.PICTURE: (Save.MASK, Save.OVERLAY, Save.JSON),
    Kind.VIDEO: (Save.OVERLAY, Save.JSON),
    Kind.LIVE: (Save.OVERLAY, Save.JSONL),
}
_POSSIBLE_SAVE = {
    Kind.PICTURE: tuple(save for save in Save if save is not Save.JSONL),
    Kind.VIDEO: (Save.OVERLAY, Save.JSON, Save.JSONL, Save.LABELS),
    Kind.LIVE: (Save.OVERLAY, Save.JSONL, Save.LABELS),
}


def chosen_save(source: Source, save: Sequence[Save] | None, out: Path | None) -> tuple[Save, ...]:
    """What is written of a source, in the order of ``Save``; nothing of a live video that is only shown."""
    if save is None:
        return () if source.kind is Kind.LIVE and out is None else _DEFAULT_SAVE[source.kind]
    for kind in save:
        if kind not in _POSSIBLE_SAVE[source.kind]:
            possible = ", ".join(other.value for other in _POSSIBLE_SAVE[source.kind])
            raise CommandError(f"--save {kind.value}: of a {source.kind.value}, {source.name}, one can save {possible}")
    return tuple(kind for kind in Save if kind in save)


def choose_targets(sources: Sources, out: Path | None) -> list[Path]:
    """Of each source the .png or .mp4 of which its files have their names."""
    if not sources.are_many:
        (source,) = sources.all
        target = out or _DEFAULT_OUT[source.kind]
        is_known = source.kind is not Kind.VIDEO or source.path is None or source.path.is_dir()
        kind = "" if is_known else ", which is no picture that Pillow can read,"
        require_ending("--out", target, _ending(source), f"what is made of {source.name}{kind}")
        return [target]
    folder = out or DEFAULT_FOLDER
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out {folder} must be a folder, for what is made of several goes there, and it is a file")
    if folder.suffix in (".png", ".mp4") and not folder.exists():
        raise CommandError(f"--out {folder} must be a folder, for what is made of several goes there")
    sets = [file_of_set(folder, save).stem for save in SETS]  # which no picture's JSON may be called
    stems = unique_stems([*sets, *(source.name for source in sources.all)])[len(sets) :]
    return [folder / f"{stem}{_ending(source)}" for stem, source in zip(stems, sources.all, strict=True)]


class Job(NamedTuple):
    """A source, and what is written of it."""

    source: Source
    target: Path
    """The .png or .mp4 of which its files have their names."""
    save: tuple[Save, ...]

    @property
    def files(self) -> list[Path]:
        """The files, or folders of them, that are written of it by itself."""
        of_one = files_of_picture if self.source.kind is Kind.PICTURE else files_of_video
        return [path for save in self.save for path in of_one(self.target, save)]


def without_done(jobs: Sequence[Job], *, are_many: bool) -> list[Job]:
    """The jobs that an earlier run of the same command has not finished."""
    sets = [save.value for job in jobs for save in job.save if save in SETS]
    if sets and are_many:
        raise CommandError(f"--resume cannot add to a file of all pictures: leave out it or --save {sets[0]}")
    return [job for job in jobs if state_of(job.target).exists() or not all(path.exists() for path in job.files)]


def require_outputs(jobs: Sequence[Job], sources: Sequence[Source], folder: Path | None, overwrite: bool) -> None:
    """Raise where what is to be written is there, could not be written, or is what is read; make the folders.

    Args:
        jobs: what is to be done.
        sources: all that were named, done already or not.
        folder: of the results of many sources; None of one.
        overwrite: whether what is there is replaced.
    """
    files: list[Path] = []
    folders: list[Path] = []
    for source, target, what in jobs:
        is_picture = source.kind is Kind.PICTURE
        for save in what:
            paths = files_of_picture(target, save) if is_picture else files_of_video(target, save)
            if folder is not None and is_picture:
                paths = _files_of_one_of_many(folder, paths, save)
            is_folder = save in (Save.MASKS, Save.CUTOUTS) or (save is Save.LABELS and not is_picture)
            (folders if is_folder else files).extend(paths)
        if what and not is_picture:
            files += [lines_of(target), *([state_of(target)] if source.kind is Kind.VIDEO else [])]
    states = [state for job in jobs if job.source.kind is Kind.VIDEO and (state := state_of(job.target)).exists()]
    if states and not overwrite:
        raise CommandError(
            f"{in_words(states)} is there already, of an interrupted run: --resume goes on, --overwrite begins anew"
        )
    read = [source.path for source in sources if source.path is not None]
    require_new(dict.fromkeys(files), overwrite, read)
    _require_new_folders(folders, overwrite)


def format_of(save: Save) -> Format | None:
    """The format of ``omniops.annotations``; None of the command's own."""
    return Format(save.value) if save.value in {format.value for format in Format} else None


def files_of_picture(out: Path, save: Save) -> list[Path]:
    """The files, or the folder of them, that are written of a picture by itself."""
    own = {Save.MASK: out, Save.OVERLAY: overlay_of(out), Save.JSON: out.with_suffix(".json")}
    format = format_of(save)
    return [own[save]] if format is None else format.paths(out.with_suffix(""))


def files_of_video(out: Path, save: Save) -> list[Path]:
    """The file, or the folder of them, that is written of a video."""
    files = {
        Save.OVERLAY: out,
        Save.JSON: out.with_suffix(".json"),
        Save.JSONL: lines_of(out),
        Save.LABELS: labels_of(out),
    }
    return [files[save]]


def file_of_set(folder: Path, save: Save) -> Path:
    """COCO's file of many pictures."""
    return folder / f"{save.value}.json"


def overlay_of(out: Path) -> Path:
    """Where the masks are shown on a picture, beside what they are written to."""
    return out.with_name(f"{out.stem}-overlay.jpg")


def state_of(out: Path) -> Path:
    """Where the state of a video is until the end."""
    return out.with_name(f"{out.stem}.state.safetensors")


def labels_of(out: Path) -> Path:
    """The folder of the labelled pictures of a video's frames."""
    return out.with_name(f"{out.stem}-labels")


def in_words(paths: Iterable[Path]) -> str:
    """a, b and c."""
    *others, last = map(str, paths)
    return f"{', '.join(others)} and {last}" if others else last


def _ending(source: Source) -> str:
    return ".png" if source.kind is Kind.PICTURE else ".mp4"


def _files_of_one_of_many(folder: Path, files: list[Path], save: Save) -> list[Path]:
    if save in SETS:
        return [file_of_set(folder, save)]
    return [files[0], folder / DATASET] if save is Save.YOLO else files


def _require_new_folders(paths: Iterable[Path], overwrite: bool) -> None:
    for path in paths:
        if path.exists() and not path.is_dir():
            raise CommandError(f"cannot write {path}: it is a file")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise CommandError(f"{path} is there already: --overwrite replaces what is there")
