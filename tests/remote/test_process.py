"""How a process starts and ends, and what its death means to who holds an object in it."""

import ast
import doctest
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from remote.processes import is_gone

from omniops.remote import RemoteError, call, kill, process, process_id, proxy
from omniops.remote.messages import decode
from omniops.remote.process import MAX_IDLE_MEMORY, Process, ProcessEndedError

# Answers all that it is asked, without the seconds that PyTorch takes to be imported.
AGREEABLE = """
import pickle, sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
while connection.recv_bytes():
    connection.send_bytes(pickle.dumps(("value", None)))
"""


@pytest.fixture
def agreeable(monkeypatch):
    monkeypatch.setattr(process, "PROGRAM", AGREEABLE)


def test_a_request_passes_on_what_is_released(agreeable):
    asked = Process()
    asked.released.extend([3, 4])
    with pytest.raises(TypeError, match="does not pass"):
        asked.encode(("call", np.array([None])))
    released, request = decode(asked.encode(("call", "echo")), asked._memory)
    assert (released, request) == ([3, 4], ("call", "echo"))
    assert not asked.released
    asked.stop()


def test_much_memory_is_given_back(agreeable):
    asked = Process()
    assert asked.exchange(asked.encode(("call", np.ones(5)))) == ("value", None)
    assert asked.memory_size == 40
    message = asked.encode(("call", np.ones(MAX_IDLE_MEMORY // 8 + 1)))
    assert asked.memory_size == MAX_IDLE_MEMORY + 8
    asked.exchange(message)
    assert asked.memory_size == 0
    assert asked.ending == ""
    asked.stop()


@pytest.mark.parametrize(
    ("program", "ending"),
    [
        ("print('last words'); raise SystemExit(3)", "ended with exit code 3"),
        ("import os; print('last words'); os.abort()", "was killed by SIGABRT"),
    ],
)
def test_a_process_that_ends_says_how(monkeypatch, program, ending):
    monkeypatch.setattr(process, "PROGRAM", program)
    asked = Process()
    for _ in range(2):
        with pytest.raises(ProcessEndedError):
            asked.exchange(b"")
        assert asked.ending == ending
    assert asked.last_output() == "last words"


def _in_forked_process(remote, opened):
    messages = []
    for use in (lambda: remote.scaled(), lambda: opened["items"]):
        with pytest.raises(RemoteError) as caught:
            use()
        messages.append(str(caught.value))
    remote.set_value([4.0])
    return [*messages, remote.process(), remote.scaled().item()]


@pytest.mark.slow
def test_a_forked_process_starts_one_of_its_own_and_leaves_the_parents_alone(shared):
    shared.set_value([1.0])
    opened = shared.open([1])
    pid = process_id(shared)
    reading, writing = os.pipe()
    sleeper = threading.Thread(target=shared.sleep, args=(0.5,))
    sleeper.start()
    time.sleep(0.2)  # so that it forks in the middle of another thread's call
    child = os.fork()
    if not child:
        try:
            result = repr(_in_forked_process(shared, opened))
        except BaseException:
            result = traceback.format_exc()
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    sleeper.join()
    assert result.startswith("["), result
    nothing_set, nothing_open, (own, parent), value = ast.literal_eval(result)
    assert nothing_set.endswith("which belongs to the process that this one was forked from: call set_value again")
    assert nothing_open.endswith("which belongs to the process that this one was forked from: call open again")
    assert own != pid
    assert parent == child
    assert value == 8.0
    assert is_gone(own)
    assert shared.process()[0] == pid
    assert shared.scaled().item() == 2.0


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_and_the_next_call_starts_another(make):
    remote = make()
    assert repr(remote) == "<remote StandIn, not started>"
    remote.set_value([1.0])
    with pytest.raises(TypeError, match="value must be"):
        remote.set_value(None)
    opened = remote.open([1, 2])
    assert remote.lengthen(opened, by=[3]) == 3
    values = remote.walk(opened)
    next(values)
    pid, _ = remote.process()

    started = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        remote.end(signal.SIGKILL, heir_lives=20)
    assert time.monotonic() - started < 10
    assert str(caught.value) == (
        f"the process {pid} of a remote StandIn was killed by SIGKILL, at: end(). The next call starts a new "
        "process; what set_value() set in this one is gone. It last wrote:\nfamous last words"
    )
    assert is_gone(pid)
    for use, method in (
        (lambda: remote.lengthen(opened, by=[]), "open"),
        (lambda: opened["items"], "open"),
        (lambda: next(values), "walk"),
    ):
        with pytest.raises(
            RemoteError,
            match=rf"what {method}\(\) of .* is gone with its process, which was killed by SIGKILL: call {method} ag",
        ):
            use()
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"what set_value\(\) set .* was killed by SIGKILL: call set_value again"):
            remote.process()
    assert repr(remote) == "<remote StandIn, not started>"
    remote.set_value([3.0])
    assert remote.scaled() == [3.0]
    second, _ = remote.process()
    assert second != pid
    _break_off_a_call(remote)
    assert is_gone(second)
    with pytest.raises(RemoteError, match="which was stopped when KeyboardInterrupt broke off a call"):
        remote.scaled()


def _break_off_a_call(remote):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            remote.sleep(60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_process_that_hangs_can_be_killed_by_another_thread(make, monkeypatch):
    monkeypatch.setattr(process, "PROGRAM", "import time; time.sleep(60)")
    remote = make()
    kill(remote)  # which has no process yet
    watcher = threading.Timer(0.3, kill, (remote,))
    watcher.start()
    with pytest.raises(RemoteError, match="was killed by SIGKILL, at: its start"):
        remote.start()
    watcher.join()
    assert process_id(remote) is None


def test_what_was_taken_back_is_not_missed(make, agreeable):
    remote = make().start()
    call(remote, "set_value", 1)
    call(remote, "reset")
    kill(remote)
    with pytest.raises(RemoteError, match=r"The next call starts a new process\.$"):
        call(remote, "scaled")
    assert call(remote, "scaled") is None
    call(remote, "set_value", 1)
    kill(remote)
    with pytest.raises(RemoteError, match=r"new process; what set_value\(\) set in this one is gone\.$"):
        call(remote, "scaled")
    call(remote, "reset")
    assert call(remote, "scaled") is None
    remote.close()


def test_a_start_that_takes_too_long_is_an_error(make, monkeypatch):
    monkeypatch.setattr(process, "PROGRAM", "import time; print('still here'); time.sleep(60)")
    monkeypatch.setattr(process, "POLL_INTERVAL", 0.1)
    remote = make(start_timeout=0.5)
    started = time.monotonic()
    with pytest.raises(
        RemoteError, match=r"(?s)did not answer within 0.5 s of its start and was stopped.*still here"
    ) as caught:
        remote.start()
    assert time.monotonic() - started < 5
    assert is_gone(int(str(caught.value).split()[2]))


def test_a_start_that_fails_says_why(make, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        make(args=("missing.pt",)).start()
    assert caught.value.filename == "missing.pt"
    monkeypatch.setattr(process, "PROGRAM", "import no_such_module")
    with pytest.raises(
        RemoteError, match=r"(?s)ended with exit code 1, at: its start.*No module named 'no_such_module'"
    ):
        make().start()


def test_closing_and_forgetting_end_the_process(make, agreeable):
    with make() as closed:
        pid = process_id(closed)
    assert is_gone(pid)
    closed.close()
    assert repr(closed) == "<remote StandIn, closed>"
    for use in (closed.start, lambda: closed.scaled):
        with pytest.raises(RemoteError, match="this remote StandIn is closed"):
            use()
    remote = make().start()
    pid = process_id(remote)
    del remote
    gc.collect()
    assert is_gone(pid)


# No main guard, and a forked process that lives on when the caller is killed in the middle of a call.
SCRIPT = """
import os, threading, time
from omniops.remote import Remote
remote = Remote("remote.standin:StandIn", handles=["open"])
pid = remote.process()[0]
opened = remote.open([1])
heir = os.fork()
if not heir:
    time.sleep(60)
    os._exit(0)
threading.Thread(target=remote.sleep, args=(60,)).start()
print(pid, heir, flush=True)
"""


@pytest.mark.slow
def test_a_script_needs_no_guard_and_when_it_is_killed_nothing_is_left(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    script = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        pid, heir = map(int, script.stdout.readline().split())
        time.sleep(0.5)
        os.kill(pid, 0)
    finally:
        script.kill()
        script.wait()
        script.stdout.close()
    try:
        assert is_gone(pid)
    finally:
        os.kill(heir, signal.SIGKILL)


def test_the_example_runs_as_printed(make):
    results = doctest.testmod(proxy)
    assert results.attempted == 2
    assert results.failed == 0
