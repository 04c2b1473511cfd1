"""A predictor in a process of its own, for processes that cannot use the GPU themselves: web workers that were forked.

The process is a new interpreter, as multiprocessing's spawn starts, but one that does not import the caller's
``__main__``: a script needs no guard. Request and answer take turns on a socket pair. Arrays and tensors lie in memory
that both processes have open and that has no name, so that nothing of it is left in the system, however the two end.
The process ends when the socket pair says that nobody holds the other end any more, also if the caller was killed.

What is trusted: the caller started the process, from its own interpreter, search path and user, and nobody else can
write to the socket pair. So the process unpickles whatever it is sent. The caller unpickles less: plain data (numbers,
strings, and tuples, lists, dicts and sets of them), nothing that would import or call anything; arrays and tensors are
rebuilt from their bytes. The one exception is an exception: its class is imported by name, and called with such data.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import itertools
import operator
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable
from os import PathLike, fspath
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PREDICTORS = {
    "image": "omniops.sam2.image_predictor:SAM2ImagePredictor",
    "video": "omniops.sam2.video_predictor:SAM2VideoPredictor",
    "masks": "omniops.sam2.mask_generator:SAM2AutomaticMaskGenerator",
}

_GRACE = 5.0  # seconds that a process has to end by itself
_GLANCE = 1.0  # seconds between looks at whether the process still lives, if a child of its own keeps the socket open
_KEPT_BYTES = 2**26  # of shared memory, between calls
_TAIL_BYTES = 4000  # of what the process last wrote, in errors

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from omniops.sam2.remote_predictor import _serve; _serve(int(sys.argv[1]), int(sys.argv[2]))"
)


class RemoteError(RuntimeError):
    """The process of a remote predictor died or did not answer, or what was set in it is gone."""


def remote(
    model: str | PathLike[str],
    *,
    predictor: str | type = "image",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    start_timeout: float = 300.0,
    **options: Any,
) -> Remote:
    """A predictor that runs in a process of its own, which can use the GPU where this one cannot.

    The process starts with the first call, or with ``start()``, and loads the model there. In a process that is forked
    later, the object starts another of its own, so it may be made before gunicorn forks its workers (``--preload``).
    Each such process holds its own model on the device. Where Python is embedded in another program, as in uWSGI, tell
    ``multiprocessing.set_executable`` which interpreter to start.

    Args:
        model, device, dtype: as ``omniops.sam2.load`` takes them.
        predictor: ``image`` for SAM2ImagePredictor, ``video`` for SAM2VideoPredictor, ``masks`` for
            SAM2AutomaticMaskGenerator; or a class that is constructed as they are, from a model, or its import path
            (``package.module:Class``).
        start_timeout: the seconds that the process may take to start and to load the model, with the model's download
            where it has to be fetched.
        options: of ``load`` (image_size, ...) and of the predictor.

    Returns:
        What has the predictor's public methods and attributes; see ``Remote``.

    Raises:
        ValueError: for a predictor that no other process can import.
        OSError: on Windows, which has no descriptors to inherit.
    """
    if os.name != "posix":
        raise OSError("omniops.sam2.remote needs a POSIX system: Linux or macOS")
    path = _import_path(predictor)
    source = fspath(model)
    if os.path.exists(source):
        source = os.path.abspath(source)  # the process may start when the working directory is another
    return Remote(path, (source, str(device), dtype, options), start_timeout)


class Remote:
    """A predictor in another process; made by ``remote``.

    Has the predictor's public methods and attributes: ``set_image``, ``predict``, ``init_state``, ``generate``, ...
    They take and return what the predictor's do, but for these:

    - A tensor comes back on the CPU, without its history.
    - ``init_state`` returns a ``State``, which stands for the video's state in the other process.
    - A generator, as of ``propagate_in_video``, computes its next value when it is asked for it.

    An exception of the predictor is raised with its type and the other process's traceback as its cause.
    If the process dies, the call in progress raises ``RemoteError`` and the next one starts a new process. What was set
    in the old one is gone: if that was an image, every method but ``set_image`` and ``set_image_batch`` raises
    ``RemoteError`` until one is set again, and so does every use of a state that was made there. To break a call off,
    by Ctrl-C, ends the process too.

    Threads may share it: their calls take turns. A picture that one thread sets is set for all of them, so hold a lock
    of your own around ``set_image`` and ``predict``. ``close()``, the end of a ``with`` block, garbage collection and
    the end of this process, however it ends, end the other one.
    """

    # Slots, so that an attribute cannot be set here in the belief that it is set on the predictor.
    __slots__ = (
        "__weakref__",
        "_child",
        "_gone",
        "_is_closed",
        "_lock",
        "_make",
        "_methods",
        "_path",
        "_start_timeout",
    )

    def __init__(self, path: str, make: tuple[Any, ...], start_timeout: float) -> None:
        self._path = path
        self._make = make
        self._start_timeout = start_timeout
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._gone = ""
        self._is_closed = False
        self._methods: set[str] = set()
        _remotes.add(self)

    def start(self) -> Remote:
        """Start the process and load the model now, if that has not been done.

        Raises:
            RemoteError: if the process dies or does not answer within start_timeout.
            Exception: whatever loading the model and constructing the predictor raise.
        """
        with self._lock:
            self._check_open()
            self._running()
        return self

    def close(self) -> None:
        """End the process, after the call that is in progress in another thread. Later calls raise RemoteError."""
        with self._lock:
            self._is_closed = True
            if self._child is not None:
                self._child.stop()
                self._child = None

    def __enter__(self) -> Remote:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        process = "not started" if self._child is None else f"process {self._child.pid}"
        return f"<remote {self._name}, {'closed' if self._is_closed else process}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"a remote {self._name} has no attribute {name!r}")
        if name not in self._methods:
            _, kind, value = self._ask([], "attribute", name)
            if kind != "method":
                return value
            self._methods.add(name)
        return functools.partial(self._call, name)

    @property
    def _name(self) -> str:
        return self._path.rpartition(":")[2]

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        owners = [each._child for each in (*args, *kwargs.values()) if isinstance(each, State)]
        child, kind, value = self._ask(owners, "call", name, args, kwargs)
        if kind == "state":
            return State(self, child, value)
        if kind == "stream":
            stream = self._stream(child, value)
            # Not in a finally clause, which a generator that was never begun does not run.
            weakref.finalize(stream, child.dropped.append, value).atexit = False
            return stream
        return value

    def _stream(self, child: _Child, number: int) -> Iterator[Any]:
        while True:
            _, kind, value = self._ask([child], "next", number)
            if kind == "end":
                return
            yield value

    def _ask(self, owners: Sequence[_Child], what: str, *arguments: Any) -> tuple[_Child, str, Any]:
        """Who answered a request, what kind of answer it is, and a value."""
        with self._lock:
            self._check_open()
            for owner in owners:
                if owner is not self._child:
                    raise RemoteError(
                        f"this state or generator of a remote {self._name} is gone with its process, which "
                        f"{owner.ended}: call init_state again"
                    )
            name = str(arguments[0])
            sets = what == "call" and name.startswith(("set_", "reset"))
            if self._gone and what == "call" and not sets:
                raise RemoteError(self._gone)
            child = self._running()
            doing = {
                "call": f"{name}()",
                "next": "the next value of a generator",
                "keys": "reading the keys of a state",
                "copy": "copying a state",
            }.get(what, f"reading an {what}")
            kind, value = self._exchange(child, doing, (what, *arguments))
            if sets and kind != "error":
                child.is_set, self._gone = name.startswith("set_"), ""
        if kind == "error":
            _raise(*value)
        return child, kind, value

    def _check_open(self) -> None:
        if self._is_closed:
            raise RemoteError(f"this remote {self._name} is closed: make another")

    def _running(self) -> _Child:
        if self._child is None:
            child = self._child = _Child()
            try:
                deadline = time.monotonic() + self._start_timeout
                kind, value = self._exchange(child, "its start", ("make", self._path, *self._make), deadline)
                if kind == "error":
                    _raise(*value)
            except BaseException:
                child.stop()
                self._child = None
                raise
        return self._child

    def _exchange(
        self, child: _Child, doing: str, request: tuple[Any, ...], deadline: float | None = None
    ) -> tuple[str, Any]:
        body = child.encoded(request)
        try:
            return child.exchange(body, deadline)
        except _LateError:
            child.kill()
            how = f"did not answer within {self._start_timeout:g} s of its start and was stopped"
        except (EOFError, OSError):
            how = child.died()
        except BaseException as error:  # half an exchange would be taken for the answer to the next request
            child.kill()
            self._lose(f"was stopped when {type(error).__name__} broke off a call")
            raise
        self._lose(how)
        gone = "; the image that was set in this one is gone" if child.is_set else ""
        said = child.said()
        raise RemoteError(
            f"the process {child.pid} of a remote {self._name} {how}, at: {doing}. "
            f"The next call starts a new process{gone}." + (f" It last wrote:\n{said}" if said else "")
        )

    def _lose(self, how: str) -> None:
        """Forget the process, but not what was set in it."""
        child, self._child = self._child, None
        if child is not None:
            child.ended = how
            if child.is_set:
                self._gone = (
                    f"the image of this remote {self._name} is gone with its process, which {how}: call set_image again"
                )

    def _after_fork(self) -> None:
        """In a forked process: leave the parent's process to the parent."""
        self._lock = threading.Lock()  # another thread of the parent may have held the old one
        if self._child is not None:
            self._child.disown()
            self._lose("belongs to the process that this one was forked from")


class State(Mapping[str, Any]):
    """The state of a video in another process: to be passed to the methods of the remote predictor that made it.

    What can be read of the state there, by key or as an attribute, can be read here, if it is plain data or arrays:
    ``state["num_frames"]``, ``"num_frames" in state``, ``state.items()``. ``copy.deepcopy(state)`` is a state of its
    own, in the same process.
    """

    __slots__ = ("__weakref__", "_child", "_number", "_remote")

    def __init__(self, remote: Remote, child: _Child, number: int) -> None:
        self._remote, self._child, self._number = remote, child, number
        weakref.finalize(self, child.dropped.append, number).atexit = False

    def __getitem__(self, key: Any) -> Any:
        return self._remote._ask([self._child], "item", self._number, key)[2]

    def __iter__(self) -> Iterator[str]:
        return iter(self._remote._ask([self._child], "keys", self._number)[2])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in list(self)  # without the value, which may be large

    # A state is itself alone, and may be a key or in a set.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __copy__(self) -> State:
        return self  # a second one would not know when the first has the state there dropped

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        child, _, number = self._remote._ask([self._child], "copy", self._number)
        return State(self._remote, child, number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"a state has no attribute {name!r}")
        _, kind, value = self._remote._ask([self._child], "attribute", name, self._number)
        if kind == "method":
            raise AttributeError(f"the method {name} of a state stays in its process")
        return value


# The caller's side.


class _LateError(Exception):
    """There was no answer in time."""


class _TracebackError(Exception):
    """The cause of an exception from the other process: its traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Child:
    """The process: how it is started, asked and ended. Whoever asks sees to it that nobody else does meanwhile."""

    def __init__(self) -> None:
        self.ended = ""
        """How, for the errors of who comes later."""
        self.is_set = False
        """Whether there is an image in it."""
        self.dropped: deque[int] = deque()
        """The numbers of what nobody here holds any more."""
        self._memory = _shared_memory()
        self._connection, theirs = Pipe()
        errors, written = os.pipe()
        program = [get_executable(), "-u", "-c", _PROGRAM, str(theirs.fileno()), str(self._memory.fileno())]
        try:
            self._process = subprocess.Popen(
                [*program, *map(str, sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=written,  # what the predictor prints must not get among what the caller prints
                stderr=written,
                pass_fds=(theirs.fileno(), self._memory.fileno()),
                start_new_session=True,  # Ctrl-C is the caller's to answer
            )
        except BaseException:
            os.close(errors)
            raise
        finally:
            theirs.close()
            os.close(written)
        self.pid = self._process.pid
        self._errors = open(errors, "rb", buffering=0)  # noqa: SIM115 closed by the thread that reads it
        self._tail: deque[bytes] = deque(maxlen=64)
        self._reader = threading.Thread(target=_forward, args=(self._errors, self._tail), daemon=True)
        self._reader.start()
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection, self._memory)

    def encoded(self, request: tuple[Any, ...]) -> bytes:
        dropped = list(self.dropped)
        body = _encode((dropped, request), self._memory)
        for _ in dropped:
            self.dropped.popleft()
        return body

    def exchange(self, body: bytes, deadline: float | None) -> tuple[str, Any]:
        """Raises EOFError or OSError where the process is dead, _LateError where there is no answer at the deadline."""
        self._connection.send_bytes(body)
        while not self._connection.poll(_GLANCE):
            if self._process.poll() is not None and not self._connection.poll():
                raise EOFError
            if deadline is not None and time.monotonic() > deadline:
                raise _LateError
        answer: tuple[str, Any] = _decode(self._connection.recv_bytes(), self._memory)
        if os.fstat(self._memory.fileno()).st_size > _KEPT_BYTES:
            self._memory.truncate(0)
        return answer

    def stop(self) -> None:
        """End the process, with its own will if it has one."""
        self._finalizer()

    def kill(self) -> None:
        self._process.kill()
        self._finalizer()

    def died(self) -> str:
        """How the process ended, which no longer answers."""
        self._finalizer()
        code = self._process.returncode
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

    def said(self) -> str:
        """The end of what the process wrote, once it has ended."""
        self._reader.join(_GLANCE)
        return b"".join(self._tail)[-_TAIL_BYTES:].decode(errors="replace").strip()

    def disown(self) -> None:
        """In a forked process: close the descriptors, so that the process sees its caller end, and leave it alone."""
        self._process.returncode = 0  # of what is no child of this process: nothing to wait for, and nothing to kill
        self._finalizer()
        self._errors.close()


def _end(process: subprocess.Popen[bytes], connection: Connection, memory: io.FileIO) -> None:
    connection.close()
    memory.close()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _forward(errors: io.FileIO, tail: deque[bytes]) -> None:
    """Pass what the process writes on to the caller's stderr, and remember the end of it."""
    with errors:
        while chunk := errors.read(2**16):
            tail.append(chunk)
            with suppress(OSError):
                os.write(2, chunk)


def _raise(module: str, name: str, args: tuple[Any, ...], message: str, trace: str) -> NoReturn:
    """Raise an exception of the other process here."""
    error: Exception = RemoteError(f"{module}.{name}: {message}")
    with suppress(Exception):
        cls = operator.attrgetter(name)(importlib.import_module(module))
        if isinstance(cls, type) and issubclass(cls, Exception):
            error = cls(*args)
    raise error from _TracebackError(trace)


def _import_path(predictor: str | type) -> str:
    if isinstance(predictor, type):
        predictor = f"{predictor.__module__}:{predictor.__qualname__}"
    path = PREDICTORS.get(predictor, predictor)
    module, _, name = path.partition(":")
    if module == "__main__" or not module or not name.replace(".", "").isidentifier():
        raise ValueError(
            f"predictor must be one of {', '.join(PREDICTORS)}, or a class in a module that another process can import "
            f"(package.module:Class), got {path!r}"
        )
    return path


_remotes: weakref.WeakSet[Remote] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_remotes):
        each._after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


# Both sides' way of writing: pickle for plain data, shared memory for what is large.


def _shared_memory() -> io.FileIO:
    """A file in memory without a name, for two processes that take turns."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("omniops"), "r+b", buffering=0)
    # macOS has no such thing. Of a file that is short-lived and has no name the disk sees little.
    return tempfile.TemporaryFile(buffering=0)


def _encode(value: Any, memory: io.FileIO, *, plain: bool = False) -> bytes:
    target = io.BytesIO()
    (_PlainWriter if plain else _Writer)(target, memory).dump(value)
    return target.getvalue()


def _decode(body: bytes, memory: io.FileIO, kept: Mapping[int, Any] | None = None) -> Any:
    """What was encoded: by the other process, where the mapping of what is kept for it is not given."""
    return _Reader(io.BytesIO(body), memory, kept).load()


class _Writer(pickle.Pickler):
    """Writes arrays and tensors to shared memory, one after the other, and the rest to the pickle."""

    def __init__(self, target: io.BytesIO, memory: io.FileIO) -> None:
        super().__init__(target, protocol=5)
        self._memory = memory
        self._end = memory.seek(0)

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            return "tensor", _dtype_name(value.dtype), tuple(value.shape), self._put(flat.view(torch.uint8).numpy())
        if type(value) is np.ndarray or isinstance(value, np.generic):
            array = np.asarray(value)
            if array.dtype.hasobject or array.dtype.kind == "V":
                raise TypeError(f"an array of {array.dtype} does not pass between processes")
            kind = "array" if type(value) is np.ndarray else "scalar"
            start = self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            return kind, array.dtype.str, array.shape, start
        if isinstance(value, torch.dtype):
            return "dtype", _dtype_name(value)
        if isinstance(value, torch.device):
            return "device", str(value)
        if isinstance(value, State):
            return "kept", value._number
        return None

    def _put(self, data: NDArray[np.uint8]) -> int:
        start = self._end
        left = data.data
        while left:  # a system writes 2 GiB at most at once
            left = left[self._memory.write(left) :]
        self._end += len(data)
        return start


class _PlainWriter(_Writer):
    """Refuses what the caller would not read."""

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        raise TypeError(
            f"a {kind.__module__}.{kind.__qualname__} stays in the process of the predictor: only arrays, tensors and "
            "plain data pass"
        )


class _Reader(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, memory: io.FileIO, kept: Mapping[int, Any] | None) -> None:
        super().__init__(source)
        self._memory = memory
        self._kept = kept

    def find_class(self, module: str, name: str) -> Any:
        if self._kept is None:
            raise pickle.UnpicklingError(f"expected plain data from the process of the predictor, got {module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, persistent: tuple[Any, ...]) -> Any:
        kind, what, *where = persistent
        if kind == "tensor":
            shape, start = where
            tensor = torch.empty(shape, dtype=getattr(torch, what))
            self._get(tensor.reshape(-1).view(torch.uint8).numpy(), start)
            return tensor
        if kind in ("array", "scalar"):
            shape, start = where
            array = np.empty(shape, what)
            self._get(array.reshape(-1).view(np.uint8), start)
            return array if kind == "array" else array[()]
        if kind == "dtype":
            return getattr(torch, what)
        if kind == "device":
            return torch.device(what)
        return (self._kept or {})[what]

    def _get(self, data: NDArray[np.uint8], start: int) -> None:
        self._memory.seek(start)
        left = data.data
        while left:
            count = self._memory.readinto(left)
            if not count:
                raise EOFError("the shared memory ends early")
            left = left[count:]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The process's side.


def _serve(connection_fd: int, memory_fd: int) -> None:
    """Answer requests until the caller is gone."""
    for each in (connection_fd, memory_fd):
        os.set_inheritable(each, False)
    del sys.argv[1:]  # what started this process means nothing to anybody else
    connection = Connection(connection_fd)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # A thread, so that the end of the caller is seen in the middle of a computation.
    threading.Thread(target=_listen, args=(connection, requests.put), daemon=True).start()
    server = _Server(open(memory_fd, "r+b", buffering=0))  # noqa: SIM115 it lives as long as the process
    while True:
        answer = server.answer(requests.get())
        try:
            connection.send_bytes(answer)
        except OSError:
            os._exit(0)


def _listen(connection: Connection, put: Callable[[bytes], None]) -> None:
    try:
        while True:
            put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


class _Server:
    """The predictor, and what is kept for the caller: states and generators, by number. A method for each request."""

    def __init__(self, memory: io.FileIO) -> None:
        self._memory = memory
        self._predictor: Any = None
        self._kept: dict[int, Any] = {}
        self._numbers = itertools.count()

    def answer(self, body: bytes) -> bytes:
        try:
            dropped, (what, *arguments) = _decode(body, self._memory, self._kept)
            for number in dropped:
                self._kept.pop(number, None)
            return self._encoded(*getattr(self, what)(*arguments))
        except BaseException as error:  # also what would end this process, as sys.exit()
            return self._failed(error)

    def make(self, path: str, model: str, device: str, dtype: str | torch.dtype, options: dict[str, Any]) -> Any:
        from omniops.sam2 import checkpoints

        module, _, name = path.partition(":")
        predictor = operator.attrgetter(name)(importlib.import_module(module))
        loaded = checkpoints.load(model, device, dtype, **checkpoints.load_options(options))
        self._predictor = predictor(loaded, **options)
        return "value", None

    def attribute(self, name: str, number: int | None = None) -> Any:
        value = getattr(self._predictor if number is None else self._kept[number], name)
        return ("method", None) if inspect.isroutine(value) else ("value", value)

    def item(self, number: int, key: Any) -> Any:
        return "value", self._kept[number][key]

    def keys(self, number: int) -> Any:
        """Those of what can pass."""
        state = self._kept[number]
        return "value", [key for key in state if self._passes(state[key])]

    def _passes(self, value: Any) -> bool:
        try:
            _encode(value, self._memory, plain=True)
        except TypeError:
            return False
        return True

    def copy(self, number: int) -> Any:
        made = next(self._numbers)
        self._kept[made] = copy.deepcopy(self._kept[number])
        return "state", made

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = getattr(self._predictor, name)(*args, **kwargs)
        kind = "state" if name == "init_state" else "stream" if isinstance(result, Iterator) else "value"
        if kind == "value":
            return kind, result
        number = next(self._numbers)
        self._kept[number] = result
        return kind, number

    def next(self, number: int) -> Any:
        try:
            return "value", next(self._kept[number])
        except StopIteration:
            return "end", None

    def _encoded(self, kind: str, value: Any) -> bytes:
        return _encode((kind, value), self._memory, plain=True)

    def _failed(self, error: BaseException) -> bytes:
        kind = type(error)
        message, trace = str(error), "".join(traceback.format_exception(error))
        try:
            # Not error.args, in which an OSError has no file's name.
            args = error.__reduce__()[1]
            return self._encoded("error", (kind.__module__, kind.__qualname__, args, message, trace))
        except Exception:  # its arguments are no plain data
            return self._encoded("error", (kind.__module__, kind.__qualname__, (message,), message, trace))
