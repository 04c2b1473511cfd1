"""All sessions: how many there may be, when they end, and on which predictor they are."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import uuid
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from omniops.server.errors import Busy, NotFound, ServerError, TooLarge
from omniops.server.metrics import Metrics
from omniops.server.predictors import DiedError, Predictor, StartError
from omniops.server.session import Session, missing
from omniops.server.settings import Settings

_IDLE = 60.0  # seconds after which a session may have to make room for another
_LEFT = 60.0  # seconds that a session stays whose page was left: it may only have been loaded again
_KEPT_REASONS = 1000  # sessions that ended
_SWEEP = 10.0  # seconds between looks for what has expired

_CLOSED = "was closed"
_LEFT_BEHIND = "was given back when its page was left"
_EVICTED = "made room for another session"
_DIED = "ended when the process of its model died"
_UNKNOWN = "might have expired"

_log = logging.getLogger(__name__)


class Sessions:
    """The sessions of all predictors. Every method may be called from any thread.

    There are at most ``settings.max_sessions``, which hold at most ``settings.max_session_bytes`` together: one more
    ends the one that was idle longest, if that was for a minute, and is refused otherwise. One that is idle for
    ``settings.session_timeout`` seconds ends. A later use of one that ended says why it did.
    """

    def __init__(
        self, settings: Settings, predictors: Sequence[Predictor], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.predictors = list(predictors)
        self.clock = clock
        self._settings = settings
        for predictor in self.predictors:
            predictor.on_death = _death_notice(self, predictor)
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self.metrics = Metrics(self.clock)
        # Of what follows. A turn of a predictor may be held when it is taken, but is never taken while it is held.
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._opening: Counter[Predictor] = Counter()
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def names(self) -> set[str]:
        """The paths that the API has for what is open."""
        with self._lock:
            return {session.name for session in self._sessions.values()}

    @property
    def nbytes(self) -> int:
        """What all sessions hold together."""
        with self._lock:
            return self._nbytes()

    @property
    def tracking(self) -> int:
        """How many sessions are being propagated."""
        with self._lock:
            return sum(session.tracking for session in self._sessions.values())

    def start(self, path: Path, name: str, guided: bool = False) -> Session:
        """Open a video or picture, on the predictor that has the fewest sessions.

        Args:
            path: of the file on the disk.
            name: the path that the API has for it.
            guided: whether its masks are upsampled with the picture as a guide.

        Raises:
            Busy: if there are as many sessions as there may be, and all are in use, or if the model cannot be loaded.
            TooLarge: if it alone needs more memory than all sessions may have.
            ServerError: for a file that cannot be read.
        """
        tried: list[Predictor] = []
        while True:
            predictor = self._reserve(tried)
            try:
                session = self._open(predictor, path, name, guided)
                break
            except StartError:  # another device may do
                tried.append(predictor)
                if len(tried) == len(self.predictors):
                    raise
        self._sweep_in_background()
        try:
            if session.nbytes > self._settings.max_session_bytes:
                raise TooLarge("This needs more memory than all sessions together may have: try a shorter one.")
            self.make_room(session)
        except ServerError:
            self._end(session, _EVICTED)
            self._give_back(session)
            raise
        return session

    def get(self, id: str) -> Session:
        """A session, which this counts as a use of.

        Raises:
            NotFound: if there is none, with the reason.
        """
        with self._lock:
            session = self._sessions.get(id)
            reason = self._due(session) if session is not None else None
            if session is not None and reason is None:
                session.last_used = self.clock()
                session.leaves_at = None
                return session
        if session is not None and reason is not None and self._end(session, reason):
            ended = session
            self.later(lambda: self._give_back(ended))
        raise missing(self._ended.get(id, _UNKNOWN))

    def close(self, id: str) -> bool:
        """End a session; whether there was one."""
        with self._lock:
            session = self._sessions.get(id)
        if session is None or not self._end(session, _CLOSED, is_quiet=True):
            return False
        self._give_back(session)
        return True

    def leave(self, id: str) -> None:
        """End a session in a minute, unless it is used again: its page was left, or loaded again."""
        with self._lock:
            session = self._sessions.get(id)
            if session is not None:
                session.leaves_at = self.clock() + _LEFT

    def sweep(self) -> None:
        """End what has expired, and see which predictors have died. A thread of its own does so now and then."""
        with self._lock:
            due = [(session, reason) for session in self._sessions.values() if (reason := self._due(session))]
        for session, reason in due:
            if self._end(session, reason, if_due=True):
                self._give_back(session)
        with suppress(Busy):
            self.make_room()
        with self._lock:
            used = {(session.predictor, session.predictor_start) for session in self._sessions.values()}
        for predictor, start in used:
            with suppress(ServerError), predictor.turn("frame", start) as inference:
                predictor.note_memory(inference)

    def metrics_text(self) -> str:
        """The figures as Prometheus reads them. Asks no predictor, so it does not wait for one."""
        memory: Counter[str] = Counter()
        for predictor in self.predictors:
            allocated = predictor.memory["allocated"]
            if allocated is not None:
                memory[predictor.device] += allocated
        return self.metrics.text(
            sessions=len(self),
            session_bytes=self.nbytes,
            queue=sum(predictor.turns.waiting for predictor in self.predictors),
            restarts=sum(predictor.restarts for predictor in self.predictors),
            device_memory=memory,
        )

    def shutdown(self) -> None:
        """End all sessions and all predictors. Later starts are refused."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            self._end(session, _CLOSED, is_quiet=True)
        for predictor in self.predictors:
            predictor.close()
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self.later(_END)

    # For Session.

    def later(self, job: Callable[[], None]) -> None:
        """Have something done by another thread. Takes no lock."""
        self._jobs.put(job)

    def make_room(self, newest: Session | None = None) -> None:
        """End idle sessions until all together hold no more than they may, but for ``newest``.

        Raises:
            Busy: if that is not enough.
        """
        while True:
            with self._lock:
                if self._nbytes() <= self._settings.max_session_bytes:
                    return
                idle = self._idle(newest)
            if idle is None:
                raise Busy("The open sessions need all the memory that they may have: close one, or try later.")
            if self._end(idle, _EVICTED):
                self._give_back(idle)

    def lose(self, session: Session) -> None:
        """End a session that its predictor does not know any more."""
        self._end(session, _DIED)

    def _reserve(self, tried: Sequence[Predictor]) -> Predictor:
        """The predictor for one more session, which counts from now on."""
        while True:
            with self._lock:
                if len(self._sessions) + self._opening.total() < self._settings.max_sessions:
                    counts = Counter(session.predictor for session in self._sessions.values())
                    chosen = min(
                        (predictor for predictor in self.predictors if predictor not in tried),
                        key=lambda p: (p.failure is not None, counts[p] + self._opening[p]),
                    )
                    self._opening[chosen] += 1
                    return chosen
                idle = self._idle()
            if idle is None:
                raise Busy(
                    f"All {self._settings.max_sessions} sessions that this server has are in use: close one, or try "
                    "again in a minute."
                )
            if self._end(idle, _EVICTED):
                self._give_back(idle)

    def _open(self, predictor: Predictor, path: Path, name: str, guided: bool) -> Session:
        """A session, for which ``_reserve`` counted one already; that count is taken back if this fails."""
        id = str(uuid.uuid4())
        session: Session | None = None
        try:
            with predictor.turn("click") as inference:
                try:
                    opened = inference.open(id, str(path), guided)
                except OSError as error:
                    _log.error("%s cannot be opened", name, exc_info=error)
                    raise NotFound("This file cannot be read.") from error
                session = Session(self, predictor, id, path, name, guided, opened)
                with self._lock:  # within the turn: if the process dies in the next, this session is known
                    self._sessions[id] = session
                    self._opening[predictor] -= 1
                predictor.note_memory(inference, now=True)
        except DiedError as error:
            raise Busy("The process of the model died while it opened this: try another file, or later.") from error
        finally:
            if session is None:
                with self._lock:
                    self._opening[predictor] -= 1
        return session

    def _end(self, session: Session, reason: str, *, is_quiet: bool = False, if_due: bool = False) -> bool:
        """Whether this ended it. ``is_quiet``: its propagation ends as if it had been cancelled."""
        with self._lock:
            if self._sessions.get(session.id) is not session or (if_due and not self._due(session)):
                return False
            del self._sessions[session.id]
            session.ended = reason
            self._ended[session.id] = reason
            while len(self._ended) > _KEPT_REASONS:
                self._ended.popitem(last=False)
        session.end(None if is_quiet else missing(reason))
        return True

    def _give_back(self, session: Session) -> None:
        """Free what the predictor holds for a session that ended."""
        predictor = session.predictor
        with suppress(ServerError), predictor.turn("click", session.predictor_start) as inference:
            inference.close(session.id)
            predictor.note_memory(inference, now=True)

    def _died(self, predictor: Predictor, start: int) -> None:
        with self._lock:
            gone = [
                session
                for session in self._sessions.values()
                if session.predictor is predictor and session.predictor_start == start
            ]
        for session in gone:
            self._end(session, _DIED)

    # The lock is held in what follows.

    def _nbytes(self) -> int:
        return sum(session.nbytes for session in self._sessions.values())

    def _due(self, session: Session) -> str | None:
        """Why it has to end now."""
        now = self.clock()
        if session.leaves_at is not None and now >= session.leaves_at:
            return _LEFT_BEHIND
        if not session.is_busy and now - session.last_used > self._settings.session_timeout:
            return f"expired after {_span(self._settings.session_timeout)} without use"
        return None

    def _idle(self, newest: Session | None = None) -> Session | None:
        """The session that makes room: one whose page was left, or the one that was idle longest, if long enough."""
        others = [session for session in self._sessions.values() if session is not newest]
        left = [session for session in others if session.leaves_at is not None]
        idle = left or [session for session in others if not session.is_busy]
        oldest = min(idle, key=lambda session: session.last_used, default=None)
        if oldest is not None and (left or self.clock() - oldest.last_used > _IDLE):
            return oldest
        return None

    # The thread for what nobody waits for. It starts with the first session, in the process that has it.

    def _sweep_in_background(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_work, args=(weakref.ref(self), self._jobs), name="sessions", daemon=True
                )
                self._thread.start()


def _work(sessions: weakref.ref[Sessions], jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
    next_sweep = time.monotonic() + _SWEEP
    while True:
        job: Callable[[], None] | None = None
        with suppress(queue.Empty):
            job = jobs.get(timeout=max(next_sweep - time.monotonic(), 0))
        owner = sessions()
        if owner is None or job is _END:
            return
        try:
            if job is not None:
                job()
            else:
                next_sweep = time.monotonic() + _SWEEP
                owner.sweep()
        except Exception:
            _log.exception("What is done in the background failed")
        del owner, job  # which would keep it alive while this waits


def _END() -> None:  # noqa: N802  # a constant
    """The job that ends the thread."""


def _death_notice(sessions: Sessions, predictor: Predictor) -> Callable[[int], None]:
    reference = weakref.ref(sessions)

    def died(start: int) -> None:
        owner = reference()
        if owner is not None:
            owner._died(predictor, start)

    return died


def _span(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


_all: weakref.WeakSet[Sessions] = weakref.WeakSet()


def _after_fork() -> None:
    for sessions in list(_all):
        sessions._reset()  # the sessions are those of the process that this one was forked from


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
