"""A predictor for each device: the process that it runs in, its turns, and how it is started again when it died."""

from __future__ import annotations

import atexit
import functools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from omniops.remote import Remote, RemoteError, call, kill
from omniops.sam2 import remote
from omniops.server.errors import Busy, ServerError
from omniops.server.settings import Settings
from omniops.server.turns import Turns

_INFERENCE = "omniops.server.inference:Inference"
_MEMORY_AGE = 1.0  # seconds that figures of memory are not asked for again
_CLOSING = 5.0  # seconds that close() waits for what the predictor is doing
_STOPPING = "The server is stopping."
_SEE_LOG = "Whoever runs this server finds more in its log."

_log = logging.getLogger(__name__)


class StartError(Busy):
    """The model could not be loaded, or its process did not start; the next call tries again."""


class DiedError(Busy):
    """The process that had what is asked for is gone, with all of its sessions."""

    def __init__(self) -> None:
        super().__init__("The process of the model died, and its sessions with it: start again.")


class Predictor:
    """The ``Inference`` of one device, started with its first use, and again with the next use after it died.

    Args:
        make: returns an ``Inference``, or what has its methods. ``shutdown()`` of it is called where it has one.
        device: its name in figures and in the log.
        patience: the seconds that a turn may take; a process that hangs for longer is killed, as if it had died.

    Every use is a turn: ``with predictor.turn("click") as inference: ...``. Nothing starts before, so a predictor may
    be made in a process that is forked later, each of whose children then starts its own.
    """

    def __init__(self, make: Callable[[], Any], device: str = "auto", patience: float = math.inf) -> None:
        self.device = device
        self.patience = patience
        self.turns = Turns()
        self.searching = threading.Lock()
        """Held by who looks for everything, over many turns: what is found until the end takes memory on the device."""
        self.starts = 0
        """How often it was started: the number of the start that sessions belong to."""
        self.restarts = 0
        """How often it was started after its process had died."""
        self.description: dict[str, Any] | None = None
        """What ``Inference.describe()`` said at the last start."""
        self.memory = _no_memory()
        """What ``Inference.memory()`` said last."""
        self.failure: ServerError | None = None
        """Why the last start failed; None if it did not."""
        self.on_death: Callable[[int], None] = lambda start: None
        """Called with the number of the start whose process died, while the turn is held: it must not take another."""
        self._make = make
        self._inference: Any = None
        self._is_closed = False
        self._has_died = False
        self._attempts = 0
        self._busy_since: float | None = None  # of the turn in progress
        self._memory_time = -_MEMORY_AGE
        _predictors.add(self)

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return self._inference is not None

    @contextmanager
    def turn(self, kind: Literal["click", "frame"], start: int | None = None) -> Iterator[Any]:
        """The ``Inference``, for one exchange or a few short ones.

        Args:
            kind: what ``Turns`` has: ``click`` for what a person waits for, ``frame`` for what may wait.
            start: the number of the start that what is asked for belongs to; any will do if None, and one is made if
                there is none.

        Raises:
            StartError: if the model cannot be loaded.
            DiedError: if the process is not that of ``start`` any more, or dies within the turn.
            ServerError: instead of a ValueError, and where the device has no memory left.
        """
        attempts = self._attempts
        with self.turns.click() if kind == "click" else self.turns.frame(), self._timed():
            if self._is_closed:
                raise Busy(_STOPPING)
            if start is None:
                self._ensure(attempts)
            elif self._inference is None or start != self.starts:
                raise DiedError
            self._busy_since = time.monotonic()  # not when a start began, which may take longer
            try:
                yield self._inference
            except ServerError:
                raise
            except ValueError as error:
                raise ServerError(str(error)) from error
            except Exception as error:
                if isinstance(error, RemoteError) or _is_fatal(error):
                    self._lose(error)
                    raise DiedError from error
                if _is_out_of_memory(error):
                    raise Busy("The device has no memory left for this: close other videos, or try later.") from error
                raise
            except BaseException as error:  # as of Ctrl-C, which breaks an exchange off
                self._lose(error)
                raise

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def hangs(self, inference: Any) -> bool:
        """Whether that inference has not answered for longer than it may."""
        since = self._busy_since
        return self._inference is inference and since is not None and time.monotonic() - since > self.patience

    def describe(self) -> dict[str, Any]:
        """What ``Inference.describe()`` says; starts the predictor if it never ran."""
        if self.description is None:
            with self.turn("click"):
                pass
        assert self.description is not None
        return self.description

    def note_memory(self, inference: Any, *, now: bool = False) -> None:
        """Within a turn: ask for the figures of memory, if those there are are older than a second."""
        if now or time.monotonic() - self._memory_time >= _MEMORY_AGE:
            self.memory = inference.memory()
            self._memory_time = time.monotonic()

    def warm(self) -> None:
        """Start the predictor in the background. If that fails, ``failure`` and the log say why."""

        def start() -> None:
            with suppress(ServerError), self.turn("click"):
                pass

        threading.Thread(target=start, name=f"warm {self.device}", daemon=True).start()

    def close(self, timeout: float = _CLOSING) -> None:
        """End the process, after the call that is in progress or at the end of this process. Later uses are refused."""
        self._is_closed = True
        with suppress(TimeoutError), self.turns.click(timeout):
            self._shut_down()

    def _ensure(self, attempts: int) -> None:
        """In a turn: have it run. ``attempts``: those that had been made when the caller began to wait."""
        if self._inference is not None:
            try:
                self._inference.describe()  # it may have died since its last use, which is nobody's fault who asks now
            except Exception as error:
                self._lose(error)
        if self._inference is not None:
            return
        if self.failure is not None and self._attempts > attempts:
            raise StartError(self.failure.message)  # that of an attempt that the caller waited for, too
        try:
            self._start()
        except ServerError:
            raise
        except Exception as error:
            _log.error("The predictor on %s cannot start", self.device, exc_info=error)
            self.failure = StartError(f"{_start_failure(error)} {_SEE_LOG}")
            raise self.failure from error
        finally:
            self._attempts += 1

    def _start(self) -> None:
        inference = self._make()
        try:
            description = inference.describe()
            if self._is_closed:
                raise Busy(_STOPPING)
        except BaseException:
            _shut_down(inference)
            raise
        self._inference = inference
        self.description = description
        self.failure = None
        self.starts += 1
        self.restarts += self._has_died
        if math.isfinite(self.patience) and isinstance(inference, _Process):
            arguments = weakref.ref(self), inference, self.patience / 10
            threading.Thread(target=_watch, args=arguments, name=f"watch {self.device}", daemon=True).start()
        self.note_memory(inference, now=True)

    def _lose(self, error: BaseException) -> None:
        _log.error("The predictor on %s died, and its sessions with it", self.device, exc_info=error)
        self._has_died = True
        self._shut_down()
        self.on_death(self.starts)

    def _shut_down(self) -> None:
        inference, self._inference = self._inference, None
        self.memory = _no_memory()
        if inference is not None:
            _shut_down(inference)

    def _after_fork(self) -> None:
        """In a forked process: leave the parent's process to the parent. ``Remote`` did so with its own before."""
        self.turns = Turns()
        self.searching = threading.Lock()
        self._busy_since = None
        self._inference = None
        self._has_died = False
        self.restarts = 0
        self.memory = _no_memory()


def make_predictors(settings: Settings) -> list[Predictor]:
    """One for each of the devices; nothing starts yet."""
    return [
        Predictor(functools.partial(make_inference, settings, device), device, settings.predictor_timeout)
        for device in settings.devices
    ]


def has_processes() -> bool:
    """Whether predictors run in processes of their own. Windows has no ``remote``: there they run in this one."""
    return os.name == "posix"


def make_inference(settings: Settings, device: str) -> Any:
    """The ``Inference`` on a device, in a process of its own where the system has them; see ``has_processes``."""
    # Random weights are asked for by size, whose official name has an underscore.
    model = settings.model.replace("_", "-") if settings.random_weights else settings.model
    options: dict[str, Any] = {"random_weights": settings.random_weights}
    if settings.image_size is not None:
        options["image_size"] = settings.image_size
    if has_processes():
        return _Process(remote(model, predictor=_INFERENCE, device=device, **options))
    from omniops.sam2 import load
    from omniops.server.inference import Inference

    return Inference(load(model, device, **options))


def _no_memory() -> dict[str, Any]:
    return {"allocated": None, "total": None, "sessions": {}}


class _Process:
    """The ``Inference`` in a process of its own."""

    def __init__(self, process: Remote) -> None:
        self._remote = process

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    def close(self, session: str) -> None:
        """Close a session. ``Remote`` has a method of that name, which ends the process."""
        call(self._remote, "close", session)

    def shutdown(self) -> None:
        """End the process."""
        self._remote.close()

    def abort(self) -> None:
        """Kill the process, whatever it is doing: the call in progress raises RemoteError."""
        kill(self._remote)


def _watch(reference: weakref.ref[Predictor], inference: _Process, interval: float) -> None:
    """Kill a process that hangs: nobody else could, since who asks it waits for its answer, and has the turn."""
    while True:
        time.sleep(interval)
        predictor = reference()
        if predictor is None or predictor._inference is not inference:
            return
        if predictor.hangs(inference):
            _log.error("The predictor on %s does not answer, and is killed", predictor.device)
            inference.abort()
            return
        del predictor  # which would keep it alive while this sleeps


def _shut_down(inference: Any) -> None:
    end = getattr(type(inference), "shutdown", None)
    if end is not None:
        with suppress(Exception):
            end(inference)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in f"{type(error).__name__} {error}".lower().replace(
        "outofmemory", "out of memory"
    )


def _is_fatal(error: BaseException) -> bool:
    """Whether the device answers nothing any more, so that only another process helps."""
    is_device = type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
    return is_device and not _is_out_of_memory(error)


def _start_failure(error: BaseException) -> str:
    """Why a model did not load, in words that give away nothing of the server's disk."""
    if _is_out_of_memory(error):
        return "The model cannot be loaded: its device has not enough memory."
    if isinstance(error, FileNotFoundError):
        return "The model cannot be loaded: its checkpoint is not there."
    if isinstance(error, ConnectionError):
        return "The model cannot be loaded: it could not be downloaded."
    if isinstance(error, ImportError):
        return "The model cannot be loaded: a package that it needs is not installed."
    if isinstance(error, RemoteError):
        return "The process of the model ended while it started."
    if isinstance(error, ValueError):
        return "The model cannot be loaded: its checkpoint or its device does not fit."
    return "The model cannot be loaded."


_predictors: weakref.WeakSet[Predictor] = weakref.WeakSet()


def _after_fork() -> None:
    for predictor in list(_predictors):
        predictor._after_fork()


def _close_all() -> None:
    for predictor in list(_predictors):
        predictor.close(timeout=0)  # a process that computes ends by itself when this one is gone


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)
