"""The sound of videos that are transcoded."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import av


class Sound:
    """Sound as AAC, from the first picture on."""

    def __init__(self, output: Any, begin: float, end: float) -> None:
        self._output, self._begin, self._end = output, begin, end
        self._stream = output.add_stream("aac", rate=48000, layout="stereo")
        self._graph: Any = None
        self._kind: tuple[Any, ...] | None = None

    def packets(self, frame: Any) -> list[Any]:
        """What comes of a frame; of None, the rest."""
        found: list[Any] = []
        if frame is not None:
            if frame.pts is None:
                return found
            kind = (frame.format.name, frame.sample_rate, frame.layout.name)
            if kind != self._kind:
                self._graph, self._kind = self._new_graph(frame), kind
        if self._graph is None:
            return found
        with suppress(av.FFmpegError, EOFError):  # damaged sound is left out
            self._graph.push(frame)
            while True:
                heard = self._graph.pull()
                found += self._stream.encode(heard)
        if frame is None:
            found += self._stream.encode(None)
        return found

    def _new_graph(self, frame: Any) -> Any:
        context = self._stream.codec_context
        graph = av.filter.Graph()
        source = graph.add_abuffer(
            sample_rate=frame.sample_rate, format=frame.format.name, layout=frame.layout.name, time_base=frame.time_base
        )
        span = f"start={max(0.0, self._begin):.6f}" + (f":end={self._end:.6f}" if math.isfinite(self._end) else "")
        nodes = [
            source,
            graph.add("atrim", span),
            graph.add("asetpts", f"PTS-({self._begin:.6f})/TB"),
            graph.add("aformat", f"sample_fmts=fltp:sample_rates={context.sample_rate}:channel_layouts=stereo"),
            graph.add("abuffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        graph.set_audio_frame_size(1024)
        return graph
