"""What runs in the process: it makes the object, and answers the caller's requests until the caller is gone."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import os
import pkgutil
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from omniops.remote.messages import SERVED, can_cross, decode, encode, encode_error


def serve(connection_fd: int, memory_fd: int) -> None:
    """Answer requests until the caller is gone: the process's program.

    Args:
        connection_fd: the descriptor of the process's end of the socket pair.
        memory_fd: the descriptor of the shared memory.
    """
    for fd in (connection_fd, memory_fd):
        os.set_inheritable(fd, False)  # processes that the object starts must not keep the socket open
    del sys.argv[1:]  # a library that reads the arguments of the command would not understand these
    connection = Connection(connection_fd)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # A thread of its own, so that the end of the caller is noticed in the middle of a computation.
    threading.Thread(target=_receive, args=(connection, requests.put), daemon=True).start()
    worker = Worker(open(memory_fd, "r+b", buffering=0))  # noqa: SIM115 it lives as long as the process
    while True:
        answer = worker.answer(requests.get())
        try:
            connection.send_bytes(answer)
        except OSError:
            os._exit(0)


def _receive(connection: Connection, put: Callable[[bytes], None]) -> None:
    try:
        while True:
            put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)  # without waiting for a computation that nobody wants any more


class Worker:
    """The object that is served, and what its methods leave here: by number. It has a method for each request.

    A request is ``(name, *arguments)``. An answer is a pair of its kind and a value: ``value`` and the value itself,
    ``object`` or ``iterator`` and the number of what stays here, ``method`` for an attribute that can be called,
    ``end`` of an iterator, ``error`` and what ``rebuild_error`` takes.
    """

    def __init__(self, memory: io.FileIO) -> None:
        self._memory = memory
        self._objects: dict[int, Any] = {}
        self._numbers = itertools.count(SERVED + 1)

    def answer(self, message: bytes) -> bytes:
        """The encoded answer to an encoded pair: the numbers of objects that nobody holds any more, and a request."""
        try:
            released, (name, *arguments) = decode(message, self._memory, self._objects)
            for number in released:
                self._objects.pop(number, None)
            return encode(getattr(self, name)(*arguments), self._memory, plain=True)
        except BaseException as error:  # an object that calls sys.exit() must not end the process without an answer
            return encode_error(error, self._memory)

    def create(self, target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, Any]:
        """Make the object that is served."""
        self._objects[SERVED] = pkgutil.resolve_name(target)(*args, **kwargs)
        return "value", None

    def attribute(self, number: int, name: str) -> tuple[str, Any]:
        """An attribute of an object; a method stays here."""
        value = getattr(self._objects[number], name)
        return ("method", None) if inspect.isroutine(value) else ("value", value)

    def item(self, number: int, key: Any) -> tuple[str, Any]:
        """The value of a key of a mapping."""
        return "value", self._objects[number][key]

    def keys(self, number: int) -> tuple[str, Any]:
        """The keys of a mapping whose values can cross."""
        mapping = self._objects[number]
        return "value", [key for key in mapping if can_cross(mapping[key], self._memory)]

    def copy(self, number: int) -> tuple[str, Any]:
        """A deep copy of an object."""
        return "object", self._keep(copy.deepcopy(self._objects[number]))

    def call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: bool) -> tuple[str, Any]:
        """Call a method of the object that is served. Its result stays here if it is to be kept, or an iterator."""
        result = getattr(self._objects[SERVED], name)(*args, **kwargs)
        if keep:
            return "object", self._keep(result)
        if isinstance(result, Iterator):
            return "iterator", self._keep(result)
        return "value", result

    def next(self, number: int) -> tuple[str, Any]:
        """The next value of an iterator."""
        try:
            return "value", next(self._objects[number])
        except StopIteration:
            return "end", None

    def _keep(self, value: Any) -> int:
        number = next(self._numbers)
        self._objects[number] = value
        return number
