"""The sound of a video, put into another that was made of its frames.

The file of frames is complete before. Its packets and those of the sound are written to a new file, which replaces it
at the end: until then, and where anything fails, it stays as it is, without sound.
"""

from __future__ import annotations

import heapq
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omniops.sam2.video_container import InputFile

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream, Packet
    from av.container import InputContainer, OutputContainer

_COPIED = {
    "mp4": frozenset(("aac", "ac3", "alac", "eac3", "flac", "mp3", "opus")),
    "webm": frozenset(("opus", "vorbis")),
}
"""By format the codecs that players expect in it, as FFmpeg calls them."""
_ENCODERS = {"mp4": "aac", "webm": "libopus"}
"""By format what others become."""
_SAMPLES_PER_PACKET = {"aac": 1024, "libopus": 960}
_RATES = {"aac": (8000, 16000, 22050, 24000, 32000, 44100, 48000), "libopus": (8000, 16000, 24000, 48000)}
"""Samples a second that the encoders take; of another number they get 48000."""
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
"""By their number the channels that both encoders keep; others become two."""
_BITS_PER_CHANNEL = 80_000


class _Track(Protocol):
    """A track of sound on its way into the new file."""

    is_done: bool
    """Whether the rest is after the end."""

    def packets(self, packet: Packet) -> Iterator[Packet]:
        """What a packet of the source becomes."""

    def rest(self) -> Iterator[Packet]:
        """What is left at the end of the source."""


def add_sound(path: Path, source: Path, start_time: float | None = None, first: float = 0.0) -> None:
    """Put the sound of a source into a video, which is replaced.

    All tracks of sound are taken, from the first frame on and as long as the video lasts. They are copied where the
    video is MP4 and they are AAC, MP3, AC-3, E-AC-3, ALAC, FLAC or Opus, or where it is WebM and they are Opus or
    Vorbis; others are encoded anew, as AAC or Opus. Of a source without sound nothing is done.

    Args:
        path: the video, MP4 or WebM, with times from 0 on.
        source: the file with the sound.
        start_time: what its clock says at the time 0 of frames, in seconds; None for its own beginning.
        first: the time of the video's first frame.

    Warns:
        UserWarning: for a track that cannot be read, and where the new file cannot be written.
    """
    import av

    path = Path(os.path.realpath(path))
    partial: Path | None = None
    try:
        with _open_input(source) as sounds:
            if not sounds.streams.audio:
                return
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem[:50]}-", delete=False) as file:
                partial = Path(file.name)
            if _write_both(path, sounds, start_time, first, partial):
                shutil.copymode(path, partial)
                os.replace(partial, path)
    except (av.FFmpegError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        warnings.warn(f"{path} is without the sound of {source}: {why}", stacklevel=2)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def _open_input(path: Path) -> Iterator[InputContainer]:
    import av

    with closing(InputFile(path)) as file, av.open(file) as container:
        yield container


def _write_both(path: Path, sounds: InputContainer, start_time: float | None, first: float, partial: Path) -> bool:
    """Write the video's packets and those of its sound to a file; False where there are none of sound."""
    import av

    with _open_input(path) as pictures:
        video = pictures.streams.video[0]
        format_name = "webm" if "webm" in pictures.format.name else "mp4"
        start = Fraction(sounds.start_time or 0, 10**6) if start_time is None else Fraction(start_time)
        length = Fraction(pictures.duration or 0, 10**6)
        with av.open(str(partial), "w", format=format_name) as output:
            copied = output.add_stream_from_template(video, opaque=True)
            copied.time_base = video.time_base
            if video.metadata.get("alpha_mode") == "1":  # which the decoder that FFmpeg prefers does not read
                copied.codec_context.pix_fmt = "yuva420p"
            tracks = _tracks(output, format_name, sounds, start + Fraction(first), length)
            of_sound = _sound_packets(sounds, tracks)
            following = next(of_sound, None)
            if following is None:
                return False
            packets = heapq.merge(_video_packets(pictures, copied), _chain(following, of_sound), key=_time)
            for packet in packets:
                output.mux(packet)
    return True


def _time(packet: Packet) -> Fraction:
    """When it is to be decoded, in seconds."""
    ticks = packet.pts if packet.dts is None else packet.dts
    seconds: Fraction = (ticks or 0) * packet.time_base
    return seconds


def _chain(first: Packet, others: Iterator[Packet]) -> Iterator[Packet]:
    yield first
    yield from others


def _video_packets(pictures: InputContainer, stream: Any) -> Iterator[Packet]:
    for packet in pictures.demux(video=0):
        if packet.size:
            packet.stream = stream
            yield packet


def _tracks(
    output: OutputContainer, format_name: str, sounds: InputContainer, begin: Fraction, length: Fraction
) -> dict[int, _Track]:
    """The tracks of the new file, by the index of those of the source."""
    tracks: dict[int, _Track] = {}
    stream: Any  # PyAV's annotations say that it always has a codec
    for stream in sounds.streams.audio:
        if stream.codec_context is None:
            warnings.warn(
                f"track {stream.index} of {sounds.name} is left out: this FFmpeg does not know its codec", stacklevel=4
            )
        elif stream.codec_context.codec.canonical_name in _COPIED[format_name]:
            tracks[stream.index] = _CopiedTrack(output, stream, begin, length, keeps_preroll=format_name == "mp4")
        else:
            tracks[stream.index] = _EncodedTrack(output, stream, begin, length, _ENCODERS[format_name])
    return tracks


def _sound_packets(sounds: InputContainer, tracks: dict[int, _Track]) -> Iterator[Packet]:
    """The packets of all tracks, as the source has them one after the other."""
    import av

    streams = [stream for stream in sounds.streams.audio if stream.index in tracks]
    clocks = {stream.index: _Clock() for stream in streams}
    with suppress(av.FFmpegError):  # where the source breaks off
        for packet in sounds.demux(streams) if streams else ():
            index = packet.stream.index
            if packet.size and not packet.is_corrupt and not tracks[index].is_done:
                clocks[index].set(packet)
                yield from tracks[index].packets(packet)
            if all(track.is_done for track in tracks.values()):
                break
    for track in tracks.values():
        yield from track.rest()


def _description(source: AudioStream) -> dict[str, str]:
    return {key: value for key, value in source.metadata.items() if key in ("language", "title")}


class _Clock:
    """Gives the packets of a track times that go on, where they have none or theirs start again, as in joined files."""

    def __init__(self) -> None:
        self._shift = 0
        self._last: int | None = None
        self._next = 0

    def set(self, packet: Packet) -> None:
        """Set the time of the next packet."""
        own = packet.pts if packet.pts is not None else packet.dts
        time = self._next if own is None else own + self._shift
        if self._last is not None and time <= self._last:
            time = max(self._next, self._last + 1)
            self._shift = time - own if own is not None else self._shift
        packet.pts = packet.dts = time
        self._last, self._next = time, time + (packet.duration or 0)


class _CopiedTrack:
    """Packets as they are, at other times.

    Of MP4 the packet before the first that is heard stays, at a time below 0: decoders begin there, and players leave
    it out.
    """

    def __init__(
        self, output: OutputContainer, source: AudioStream, begin: Fraction, length: Fraction, *, keeps_preroll: bool
    ) -> None:
        self.is_done = False
        self._stream = output.add_stream_from_template(source, opaque=True)
        self._stream.metadata.update(_description(source))
        time_base: Fraction = source.time_base
        self._begin, self._end = round(begin / time_base), round((begin + length) / time_base)
        self._keeps_preroll = keeps_preroll
        self._preroll: Packet | None = None
        self._is_first = True

    def packets(self, packet: Packet) -> Iterator[Packet]:
        """The packet, and the one before where it is the first that is heard."""
        if packet.pts >= self._end:
            self.is_done = True
            return
        end = packet.pts + (packet.duration or 0)
        packet.pts = packet.dts = packet.pts - self._begin
        packet.stream = self._stream
        if packet.pts < 0 and (not self._keeps_preroll or end <= self._begin):
            self._preroll = packet if self._keeps_preroll else None
            return
        if self._is_first and self._preroll is not None:
            yield self._preroll
        self._is_first = False
        yield packet

    def rest(self) -> Iterator[Packet]:
        """None."""
        yield from ()


class _EncodedTrack:
    """Sound that is decoded, and encoded by another codec, silent where the source has none."""

    def __init__(
        self, output: OutputContainer, source: AudioStream, begin: Fraction, length: Fraction, encoder: str
    ) -> None:
        self.is_done = False
        self._source, self._encoder = source, encoder
        self._begin, self._length = begin, length
        context = source.codec_context
        rate = context.sample_rate if context.sample_rate in _RATES[encoder] else 48000
        layout = _LAYOUTS.get(context.channels, "stereo")
        stream: Any = output.add_stream(encoder, rate=rate, layout=layout)
        stream.bit_rate = _BITS_PER_CHANNEL * stream.codec_context.channels
        self._stream = stream
        self._stream.metadata.update(_description(source))
        self._graph: Any = None

    def packets(self, packet: Packet) -> Iterator[Packet]:
        """What is encoded of a packet; nothing of one that is damaged."""
        import av

        self.is_done = packet.pts * packet.time_base >= self._begin + self._length
        frames: Sequence[AudioFrame] = ()
        with suppress(av.FFmpegError):
            frames = self._source.codec_context.decode(packet)
        for frame in frames:
            if frame.pts is not None:
                self._graph = self._graph or self._new_graph(frame)
                yield from self._encoded(frame)

    def rest(self) -> Iterator[Packet]:
        """What decoder, filters and encoder still hold."""
        import av

        frames: Sequence[AudioFrame] = ()
        with suppress(av.FFmpegError):
            frames = self._source.codec_context.decode(None)
        for frame in (*frames, None):
            if self._graph is not None:
                yield from self._encoded(frame)
        if self._graph is None:
            warnings.warn(f"track {self._source.index} of the sound is left out: it cannot be decoded", stacklevel=5)
        else:
            yield from self._stream.encode(None)

    def _encoded(self, frame: AudioFrame | None) -> Iterator[Packet]:
        import av

        heard = []
        with suppress(av.FFmpegError, EOFError):  # also where the filters want more before they give anything
            self._graph.push(frame)
            while True:
                heard.append(self._graph.pull())
        for part in heard:
            yield from self._stream.encode(part)

    def _new_graph(self, frame: AudioFrame) -> Any:
        import av

        context = self._stream.codec_context
        begin, end = float(self._begin), float(self._begin + self._length)
        graph = av.filter.Graph()
        graph.link_nodes(
            graph.add_abuffer(
                sample_rate=frame.sample_rate,
                format=frame.format.name,
                layout=frame.layout.name,
                time_base=frame.time_base,
            ),
            graph.add("atrim", f"start={begin:.6f}:end={end:.6f}"),
            graph.add("asetpts", f"PTS-({begin:.6f})/TB"),
            graph.add("aresample", f"{context.sample_rate}:async=1:first_pts=0"),
            graph.add("aformat", f"sample_fmts={context.format.name}:channel_layouts={context.layout.name}"),
            graph.add("abuffersink"),
        ).configure()
        graph.set_audio_frame_size(_SAMPLES_PER_PACKET[self._encoder])
        return graph
