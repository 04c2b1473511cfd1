"""What the caller holds: the remote object, what its methods leave in its process, and their iterators."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from omniops.remote.errors import RemoteError
from omniops.remote.messages import SERVED, Reference, rebuild_error
from omniops.remote.process import Answer, Process, ProcessEndedError, require_posix


class Remote:
    """An object in a process of its own, for processes that cannot use the GPU: web workers that were forked.

    Has the object's public methods and attributes. They take and return what the object's do, but for these:

    - What passes is plain data (numbers, strings, and tuples, lists, dicts and sets of them), arrays and tensors; a
      tensor comes back on the CPU, without its history. An argument may be whatever can be pickled.
    - A method of ``handles`` returns a ``Handle``, which stands for its result in the process.
    - An iterator, as of a generator, stays there too, and computes its next value when it is asked for it.

    An exception of the object is raised with its type, and the process's traceback as its cause. If the process dies,
    the call in progress raises ``RemoteError`` and the next one starts a new process. What was in the old one is gone:
    each use of a handle or an iterator of it raises ``RemoteError``, and where one of ``setters`` had been called, so
    does every method until one is called again. To break a call off, by Ctrl-C, ends the process too.

    The process starts with the first call, or with ``start()``. In a process that is forked later, the remote object
    starts another of its own, so it may be made before gunicorn forks its workers (``--preload``). Where Python is
    embedded in another program, as in uWSGI, tell ``multiprocessing.set_executable`` which interpreter to start.

    Threads may share it: their calls take turns. What one thread sets is set for all of them, so hold a lock of your
    own around what belongs together. ``close()``, the end of a ``with`` block, garbage collection and the end of this
    process, however it ends, end the other one.

    Args:
        target: what makes the object, called in the process with ``args`` and ``kwargs``: a class or a function, or its
            import path (``package.module:name``).
        args, kwargs: whatever can be pickled.
        name: of the object in messages; that of the target by default.
        start_timeout: the seconds that the process may take to start and to make the object.
        setters: the names of methods without which others mean nothing, as ``set_image``: they set what the process's
            death loses.
        resetters: the names of methods that take back what the setters set.
        handles: the names of methods whose results stay in the process.

    Raises:
        ValueError: for a target that no other process can import.
        OSError: on Windows, where a process cannot be given open file descriptors.

    Example:
        >>> from omniops.remote import Remote
        >>> with Remote("collections:Counter", args=("abracadabra",)) as counter:
        ...     counter.most_common(2)
        [('a', 5), ('b', 2)]
    """

    # Slots, so that an attribute cannot be set here in the belief that it is set on the object.
    __slots__ = (
        "__weakref__",
        "_args",
        "_handles",
        "_is_closed",
        "_kwargs",
        "_lock",
        "_lost",
        "_methods",
        "_name",
        "_process",
        "_resetters",
        "_setter",
        "_setters",
        "_start_timeout",
        "_target",
    )

    def __init__(
        self,
        target: str | Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        start_timeout: float = 300.0,
        setters: Collection[str] = (),
        resetters: Collection[str] = (),
        handles: Collection[str] = (),
    ) -> None:
        require_posix()
        self._target = import_path(target)
        if not is_import_path(self._target):
            raise ValueError(
                f"target must be a class or a function in a module that another process can import "
                f"(package.module:name), got {self._target!r}"
            )
        self._args, self._kwargs = tuple(args), dict(kwargs or {})
        self._name = name or self._target.rpartition(":")[2]
        self._start_timeout = start_timeout
        self._setters, self._resetters, self._handles = frozenset(setters), frozenset(resetters), frozenset(handles)
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._setter = ""  # which was called last in the process
        self._lost = ""  # the message for whoever needs what was set in a process that has ended
        self._is_closed = False
        self._methods: set[str] = set()
        _remotes.add(self)

    def start(self) -> Remote:
        """Start the process and make the object now, if that has not been done.

        Raises:
            RemoteError: if the process dies or does not answer within start_timeout.
            Exception: whatever the target raises.
        """
        with self._turn():
            self._running_process()
        return self

    def close(self) -> None:
        """End the process, after the call that is in progress in another thread. Later calls raise RemoteError."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.stop()
                self._process = None

    def __enter__(self) -> Remote:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        process = "not started" if self._process is None else f"process {self._process.pid}"
        return f"<remote {self._name}, {'closed' if self._is_closed else process}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"a remote {self._name} has no attribute {name!r}")
        if name not in self._methods:
            with self._turn():
                answer = self._ask("reading an attribute", "attribute", SERVED, name)
            if answer.kind != "method":
                return answer.value
            self._methods.add(name)
        return functools.partial(self._call, name)

    def _call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        with self._turn():
            for value in (*args, *kwargs.values()):
                if isinstance(value, Handle):
                    self._require_origin(value._origin)
            is_setter, is_resetter = name in self._setters, name in self._resetters
            if self._lost and not (is_setter or is_resetter):
                raise RemoteError(self._lost)
            answer = self._ask(f"{name}()", "call", name, args, kwargs, name in self._handles)
            if is_setter or is_resetter:
                self._setter, self._lost = name if is_setter else "", ""
            origin = _Origin(self._running_process(), name)
        if answer.kind == "object":
            return Handle(self, origin, answer.value)
        if answer.kind == "iterator":
            iterator = self._iterate(origin, answer.value)
            # Not in a finally clause, which a generator that was never begun does not run.
            _release_with(iterator, origin, answer.value)
            return iterator
        return answer.value

    def _iterate(self, origin: _Origin, number: int) -> Iterator[Any]:
        while True:
            answer = self._ask_about(origin, "the next value of an iterator", "next", number)
            if answer.kind == "end":
                return
            yield answer.value

    def _ask_about(self, origin: _Origin, action: str, *request: Any) -> Answer:
        """Ask for something of what stays in the process."""
        with self._turn():
            self._require_origin(origin)
            return self._ask(action, *request)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock around a request, if this is open."""
        with self._lock:
            if self._is_closed:
                raise RemoteError(f"this remote {self._name} is closed: make another")
            yield

    def _ask(self, action: str, *request: Any) -> Answer:
        """Have a request answered, within a turn. ``action`` is what errors call it."""
        answer = self._exchange(self._running_process(), action, request)
        if answer.kind == "error":
            raise rebuild_error(*answer.value)
        return answer

    def _require_origin(self, origin: _Origin) -> None:
        """Raise for what is in a process that has ended, or in that of another remote object."""
        if origin.process is self._process:
            return
        if not origin.process.ending:
            raise RemoteError(f"what {origin.method}() returned is in another process than that of this {self!r}")
        raise RemoteError(
            f"what {origin.method}() of this remote {self._name} returned is gone with its process, which "
            f"{origin.process.ending}: call {origin.method} again"
        )

    def _running_process(self) -> Process:
        if self._process is None:
            process = self._process = Process()
            try:
                request = ("create", self._target, self._args, self._kwargs)
                answer = self._exchange(process, "its start", request, self._start_timeout)
                if answer.kind == "error":
                    raise rebuild_error(*answer.value)
            except BaseException:
                process.stop()
                self._process = None
                raise
        return self._process

    def _exchange(
        self, process: Process, action: str, request: tuple[Any, ...], timeout: float | None = None
    ) -> Answer:
        message = process.encode(request)
        try:
            return process.exchange(message, timeout)
        except ProcessEndedError:
            lost = f"; what {self._setter}() set in this one is gone" if self._setter else ""
            output = process.last_output()
            raise RemoteError(
                f"the process {process.pid} of a remote {self._name} {process.ending}, at: {action}. "
                f"The next call starts a new process{lost}." + (f" It last wrote:\n{output}" if output else "")
            ) from None
        finally:
            if process.ending:
                self._forget(process)

    def _forget(self, process: Process) -> None:
        """Let go of a process that has ended, but not of that something was set in it."""
        self._process = None
        if self._setter:
            self._lost = (
                f"what {self._setter}() set in this remote {self._name} is gone with its process, which "
                f"{process.ending}: call {self._setter} again"
            )
            self._setter = ""

    def _after_fork(self) -> None:
        """In a forked process: leave the parent's process to the parent."""
        self._lock = threading.Lock()  # another thread of the parent may have held the old one
        if self._process is not None:
            self._process.disown()
            self._forget(self._process)


class Handle(Reference, Mapping[str, Any]):
    """Stands for what a method of a remote object left in its process: to be passed to other methods of that object.

    What can be read of it there, by key or as an attribute, can be read here, if it can pass between processes:
    ``handle["key"]``, ``"key" in handle``, ``handle.items()``, ``handle.attribute``. ``copy.deepcopy(handle)`` stands
    for a copy, in the same process. When nobody holds the handle any more, the process drops the object.
    """

    __slots__ = ("__weakref__", "_origin", "_remote")

    def __init__(self, remote: Remote, origin: _Origin, number: int) -> None:
        super().__init__(number)
        self._remote, self._origin = remote, origin
        _release_with(self, origin, number)

    def __getitem__(self, key: Any) -> Any:
        return self._remote._ask_about(self._origin, "reading an item", "item", self._number, key).value

    def __iter__(self) -> Iterator[str]:
        return iter(self._remote._ask_about(self._origin, "reading keys", "keys", self._number).value)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in list(self)  # without the value, which may be large

    # A handle is equal to itself alone, and may be a key or in a set.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __copy__(self) -> Handle:
        return self  # a second one would not know when the first has the object dropped

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        answer = self._remote._ask_about(self._origin, "copying an object", "copy", self._number)
        return Handle(self._remote, self._origin, answer.value)

    def __getattr__(self, name: str) -> Any:
        method = self._origin.method
        if name.startswith("_"):
            raise AttributeError(f"what {method}() returned has no attribute {name!r}")
        answer = self._remote._ask_about(self._origin, "reading an attribute", "attribute", self._number, name)
        if answer.kind == "method":
            raise AttributeError(f"the method {name} of what {method}() returned stays in its process")
        return answer.value


class _Origin(NamedTuple):
    """Where something is that stays in a process, and the method that made it."""

    process: Process
    method: str


def _release_with(holder: object, origin: _Origin, number: int) -> None:
    """Have the process drop an object when what stands for it here is garbage."""
    weakref.finalize(holder, origin.process.released.append, number).atexit = False


# Functions, because a method of that name would hide one of the object.


def call(remote: Remote, method: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a remote object by name: also ``start`` and ``close``, which ``Remote`` has itself."""
    return remote._call(method, *args, **kwargs)


def process_id(remote: Remote) -> int | None:
    """The id of the process in which the object is now, None where it does not run."""
    process = remote._process
    return None if process is None else process.pid


def kill(remote: Remote) -> None:
    """Kill the process, whatever it is doing: the call in progress in another thread raises RemoteError."""
    process = remote._process
    if process is not None:
        process.kill()


def import_path(target: str | Callable[..., Any]) -> str:
    """The import path of a class or a function, ``package.module:name``; a string is taken as one."""
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


def is_import_path(path: str) -> bool:
    """Whether another process can import what a path names: nothing of ``__main__`` or of a function's locals."""
    module, _, name = path.partition(":")
    return module not in ("", "__main__") and name.replace(".", "").isidentifier()


_remotes: weakref.WeakSet[Remote] = weakref.WeakSet()


def _after_fork() -> None:
    for remote in list(_remotes):
        remote._after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
