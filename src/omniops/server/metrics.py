"""Figures of the server as Prometheus reads them: text format 0.0.4."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_WINDOW = 10.0  # seconds that frames a second are counted over
_KEPT_CLICKS = 1000  # whose times the quantiles are taken of
_QUANTILES = (0.5, 0.95)

Sample = tuple[str, Mapping[str, str], float]


class Metrics:
    """What is counted while the server runs. Every method may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._frames = 0
        self._frame_times: deque[float] = deque()
        self._clicks = 0
        self._click_seconds = 0.0
        self._recent_clicks: deque[float] = deque(maxlen=_KEPT_CLICKS)

    def frame(self) -> None:
        """Count a frame of a propagation."""
        with self._lock:
            self._frames += 1
            self._frame_times.append(self._clock())
            self._forget()

    def click(self, seconds: float) -> None:
        """Count a click that was answered after so long, its wait for the predictor included."""
        with self._lock:
            self._clicks += 1
            self._click_seconds += seconds
            self._recent_clicks.append(seconds)

    def frames_per_second(self) -> float:
        """Over the last 10 seconds, of all sessions together."""
        with self._lock:
            self._forget()
            return len(self._frame_times) / _WINDOW

    def _forget(self) -> None:
        oldest = self._clock() - _WINDOW
        while self._frame_times and self._frame_times[0] <= oldest:
            self._frame_times.popleft()

    def text(
        self,
        *,
        sessions: int,
        session_bytes: int,
        queue: int,
        restarts: int,
        device_memory: Mapping[str, int],
    ) -> str:
        """All figures in Prometheus' text format.

        Args:
            sessions: how many there are.
            session_bytes: what they hold together.
            queue: how many calls wait for a predictor.
            restarts: how often a predictor was started after its process had died.
            device_memory: allocated bytes of each device that reports them.
        """
        rate = self.frames_per_second()
        with self._lock:
            recent = sorted(self._recent_clicks)
            clicks, seconds, frames = self._clicks, self._click_seconds, self._frames
        summary: list[Sample] = [
            ("omniops_click_seconds", {"quantile": f"{q:g}"}, _quantile(recent, q)) for q in _QUANTILES
        ]
        summary += [("omniops_click_seconds_sum", {}, seconds), ("omniops_click_seconds_count", {}, clicks)]
        memory = [("omniops_device_memory_bytes", {"device": name}, used) for name, used in device_memory.items()]
        families: list[tuple[str, str, str, Sequence[Sample]]] = [
            _single("omniops_sessions", "gauge", "Sessions that are open.", sessions),
            _single("omniops_session_bytes", "gauge", "Bytes that open sessions hold.", session_bytes),
            _single("omniops_queue", "gauge", "Calls that wait for a predictor.", queue),
            _single("omniops_frames_total", "counter", "Frames that objects were tracked through.", frames),
            _single("omniops_frames_per_second", "gauge", "Tracked frames a second, over the last 10 seconds.", rate),
            _single("omniops_clicks_total", "counter", "Prompts and other changes that were answered.", clicks),
            ("omniops_click_seconds", "summary", "Seconds from a click's arrival to its answer.", summary),
            ("omniops_device_memory_bytes", "gauge", "Bytes that a predictor allocated on its device.", memory),
            _single(
                "omniops_predictor_restarts_total",
                "counter",
                "Starts of a predictor after its process had died.",
                restarts,
            ),
        ]
        return "".join(line for family in families for line in _lines(*family))


def _single(name: str, kind: str, help_text: str, value: float) -> tuple[str, str, str, Sequence[Sample]]:
    return name, kind, help_text, [(name, {}, value)]


def _quantile(ordered: Sequence[float], q: float) -> float:
    """The smallest value that a share ``q`` of all is not above; NaN of none, as Prometheus wants it."""
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)] if ordered else math.nan


def _lines(name: str, kind: str, help_text: str, samples: Iterable[Sample]) -> Iterable[str]:
    yield f"# HELP {name} {help_text}\n"
    yield f"# TYPE {name} {kind}\n"
    for sample, labels, value in samples:
        within = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"{sample}{f'{{{within}}}' if within else ''} {_number(value)}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return str(value) if isinstance(value, int) else repr(float(value))
