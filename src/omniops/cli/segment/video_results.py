"""The files that ``omniops segment`` writes of a video: the video with the masks on it, and their records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omniops.annotations import Annotation, Annotations, group_by_frame, label_image, to_frame
from omniops.cli.common import CommandError
from omniops.cli.outputs import Records, delete_numbered_pictures, writing
from omniops.cli.pipeline import OrderedOutput
from omniops.cli.segment.files import files_of_video, in_words, labels_of
from omniops.cli.segment.options import Save
from omniops.cli.segment.prompts import Prompts
from omniops.cli.segment.records import Record, numbered_masks, record_of_runs, sort_by_area
from omniops.cli.segment.request import Request
from omniops.drawing import VideoWriter, draw_prompts, paint
from omniops.sam2.frames import Frames

_NUM_THREADS = 4
"""That make records and paint."""
_NUM_WAITING = 8
"""Frames between the model and the file."""


@dataclass
class TrackedFrame:
    """What was found on a frame."""

    frame: int
    numbers: Sequence[int]
    """Of the objects."""
    masks: NDArray[np.bool_]
    """(N, H, W)."""
    counts: Sequence[NDArray[np.int64]]
    """The lengths of each mask's runs."""
    predicted_ious: Mapping[int, float]
    time: float | None = None
    """In seconds."""
    more: Mapping[str, Any] | None = None
    """What else the frame's line has."""


@dataclass
class FrameFiles:
    """What is written of a frame."""

    frame: int
    time: float | None
    records: list[Record] | None
    """None where they were written before."""
    line: dict[str, Any] | None
    picture: NDArray[np.uint8] | None


class VideoResults:
    """The files of a video's masks, written as they are found.

    Args:
        request: what is to be written, and where.
        video: whose rate, times and colours the video with the masks has; None of a live one.
        prompts: by frame and object, which are drawn.
        keeps_records: whether the records of all frames are kept in memory, for files that have all of them.
    """

    def __init__(
        self,
        request: Request,
        video: Frames | None,
        prompts: Mapping[tuple[int, int], Prompts],
        keeps_records: bool = True,
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._times = None if video is None else video.times
        path = request.source.path
        sound = path if path is not None and path.is_file() else None
        has_overlay = Save.OVERLAY in request.save
        self._writer = VideoWriter(request.out, like=video, audio=sound) if has_overlay else None
        self._records = Records(request.out.with_suffix(".json"), request.overwrite)
        self._by_frame: dict[int, list[Record]] = {}
        self._keeps_records = keeps_records
        if request.overwrite and Save.LABELS in request.save:
            delete_numbered_pictures(labels_of(request.out))  # of a run before, which may have found more frames
        self.num_frames = 0
        """How many have records."""

    @property
    def names(self) -> str:
        """The files, in words."""
        return in_words(path for save in self._request.save for path in files_of_video(self._request.out, save))

    @property
    def recorded_frames(self) -> list[int]:
        """The frames whose records are kept, in order."""
        return sorted(self._by_frame)

    def recorded_in_threads(self) -> OrderedOutput[TrackedFrame, FrameFiles]:
        """Takes frames in any order, of which only the records are written."""
        return OrderedOutput(self.files_of, self.write, _NUM_THREADS, _NUM_WAITING)

    def painted_in_threads(self, frames: Frames) -> OrderedOutput[TrackedFrame | int, FrameFiles]:
        """Takes frames in order, those by their number whose records are written."""

        def prepare(found: TrackedFrame | int) -> FrameFiles:
            if isinstance(found, int):
                masks = numbered_masks(sort_by_area(self._by_frame[found]))
                return FrameFiles(found, self._time(found), None, None, self._painted(found, frames[found], masks))
            return self.files_of(found, frames[found.frame])

        return OrderedOutput(prepare, self.write, _NUM_THREADS, _NUM_WAITING)

    def files_of(self, found: TrackedFrame, pixels: NDArray[np.uint8] | None = None) -> FrameFiles:
        """What is written of a frame, painted where its pixels, (H, W, 3), are given, which are changed."""
        time = self._time(found.frame) if found.time is None else found.time
        position = {"frame": found.frame} if time is None else {"frame": found.frame, "time": time}
        height, width = found.masks.shape[1:]
        records, objects = [], []
        for number, counts in zip(found.numbers, found.counts, strict=True):
            score = found.predicted_ious.get(number)
            score_of_record = {} if score is None else {"predicted_iou": score}
            records.append({**position, **record_of_runs(number, counts, height, width), **score_of_record})
            objects.append(Annotation(number, {"size": [height, width], "counts": counts}, score=score))
        annotations = Annotations(height, width, objects)
        if Save.LABELS in self._request.save:
            self._write_labels(found.frame, annotations)
        line = {**to_frame(annotations, found.frame, time), **(found.more or {})}
        picture = None
        if pixels is not None:
            largest_first = sorted(range(len(records)), key=lambda i: -int(records[i]["area"]))
            picture = self._painted(found.frame, pixels, [(found.numbers[i], found.masks[i]) for i in largest_first])
        return FrameFiles(found.frame, time, records, line, picture)

    def write(self, files: FrameFiles) -> None:
        """Write what belongs to a frame; with pictures frames come in order."""
        if files.records is not None and files.line is not None:
            if self._request.save:  # what is only shown leaves nothing
                self._records.add([files.line])
            self.num_frames += 1
            if self._keeps_records:
                self._by_frame[files.frame] = files.records
        if files.picture is not None and self._writer is not None:
            self._writer.write(files.picture, files.time)

    def close(self) -> Iterator[BaseException]:
        """End all files; yields what kept them from it."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            yield error
        if not self.num_frames:
            return
        try:
            if not self._keeps_records:
                self._records.keep_lines()
                return
            records = [record for frame in self.recorded_frames for record in self._by_frame[frame]]
            lines = list(group_by_frame(records)) if Save.JSONL in self._request.save else None
            self._records.finish(records if Save.JSON in self._request.save else None, lines)
        except CommandError as error:
            yield error

    def _time(self, frame: int) -> float | None:
        return None if self._times is None else float(self._times[frame])

    def _painted(
        self, frame: int, pixels: NDArray[np.uint8], masks: Iterable[tuple[int, NDArray[np.bool_]]]
    ) -> NDArray[np.uint8] | None:
        if self._writer is None and self._keeps_records:
            return None
        paint(pixels, masks)
        prompts = {number: shown for (prompted, number), shown in self._prompts.items() if prompted == frame}
        if not prompts:
            return pixels
        picture = Image.fromarray(pixels)
        for number, shown in prompts.items():
            draw_prompts(picture, number, shown.points, shown.labels, shown.box)
        return np.array(picture)

    def _write_labels(self, frame: int, annotations: Annotations) -> None:
        path = labels_of(self._request.out) / f"{frame:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path, self._request.overwrite) as temporary:
            label_image(annotations).save(temporary, format="PNG")
