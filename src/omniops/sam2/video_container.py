"""How FFmpeg opens a video file, and what is kept of its packets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omniops.sam2.picture_files import KINDS

if TYPE_CHECKING:
    from av import Packet, VideoStream
    from av.container import InputContainer


class InputFile:
    """The file that FFmpeg reads from. Python opens it, so that FFmpeg never takes its name for a protocol.

    Names that FFmpeg would take for a picture, or for a pattern of pictures' names, are replaced.
    """

    def __init__(self, path: Path) -> None:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close
        is_safe = path.suffix.lower() not in KINDS and not set("%*") & set(path.name)
        self.name = str(path) if is_safe else "video"

    def __del__(self) -> None:
        if hasattr(self, "close"):
            self.close()


class PacketRecord(NamedTuple):
    """What is kept of a packet, its times in ticks of the stream's time base."""

    pts: int | None
    dts: int | None
    duration: int
    is_keyframe: bool
    is_discard: bool

    @classmethod
    def of(cls, packet: Packet) -> PacketRecord:
        """The record of a packet."""
        return cls(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard)


def packet_identity(packet: Packet) -> tuple[object, ...]:
    """What tells a packet from the others of its file."""
    return packet.pos, packet.dts, packet.pts, packet.size


def main_video_stream(container: InputContainer) -> VideoStream:
    """The video of a file that FFmpeg takes for the main one. Cover pictures are none.

    Raises:
        ValueError: where there is none, or FFmpeg does not know its codec.
    """
    from av.stream import Disposition

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        raise ValueError("it has no pictures" if not container.streams.video else "it has a cover and no video")
    best = container.streams.best("video")
    video = best if best in videos else videos[0]
    if video.codec_context is None:
        raise ValueError("it is in a codec that this FFmpeg does not know")
    return video
