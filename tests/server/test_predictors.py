"""A predictor's life, without a model: most tests have the Inference in this process, some in one of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from remote.processes import is_gone
from server.fake_inference import FakeInference
from server.waiting import wait_until

from omniops.remote import RemoteError, process_id
from omniops.sam2 import remote
from omniops.server import predictors
from omniops.server.errors import Busy, NotFound, ServerError
from omniops.server.predictors import DiedError, Predictor, StartError, make_inference, make_predictors
from omniops.server.settings import Settings

FAKE = "server.fake_inference:FakeInference"
TESTS = str(Path(__file__).parents[1])


class Maker:
    """Makes FakeInferences, and raises the errors that it is given first."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.made = []
        self.calls = 0

    def __call__(self):
        self.calls += 1
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.made.append(FakeInference())
        return self.made[-1]


@pytest.fixture
def maker():
    return Maker()


@pytest.fixture
def predictor(maker):
    predictor = Predictor(maker, "cuda:0")
    yield predictor
    predictor.close()


def use(predictor, start=None):
    with predictor.turn("click", start) as inference:
        return inference.describe()


def test_nothing_starts_before_the_first_use_and_then_once(predictor, maker):
    assert maker.calls == 0
    assert not predictor.is_ready
    assert predictor.description is None
    assert predictor.describe()["device"] == "Fake device"
    use(predictor)
    with predictor.turn("frame") as inference:
        assert inference is maker.made[0]
    predictor.describe()
    assert maker.calls == 1
    assert predictor.is_ready
    assert (predictor.starts, predictor.restarts) == (1, 0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("there is no checkpoint at /secret/tiny.pt"), "its checkpoint is not there"),
        (MemoryError(), "its device has not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "not enough memory"),
        (ConnectionError("https://host/secret"), "could not be downloaded"),
        (ImportError("no module named secret"), "a package that it needs is not installed"),
        (RemoteError("the process 17 died; it last wrote: /secret"), "The process of the model ended while it started"),
        (ValueError("/secret is no checkpoint"), "its checkpoint or its device does not fit"),
        (RuntimeError("/secret"), "The model cannot be loaded."),
    ],
)
def test_a_start_that_fails_is_an_error_and_tried_again_by_the_next_use(error, words, caplog):
    maker = Maker(error, error)
    predictor = Predictor(maker, "cuda:0")
    for _ in range(2):
        with pytest.raises(StartError, match=words) as raised:
            use(predictor)
        assert raised.value.status == 503
        assert "secret" not in raised.value.message
        assert predictor.failure.message == raised.value.message
        assert not predictor.is_ready
    assert str(error) in caplog.text
    assert use(predictor)["model"] == "tiny"
    assert predictor.failure is None
    assert (maker.calls, predictor.starts, predictor.restarts) == (3, 1, 0)


def test_what_was_made_is_ended_where_it_does_not_answer():
    class Mute(FakeInference):
        def describe(self):
            raise RemoteError("no")

    mute = Mute()
    predictor = Predictor(lambda: mute)
    with pytest.raises(StartError):
        use(predictor)
    assert mute.is_shut


def test_whoever_waited_for_a_start_that_failed_gets_the_same_error_without_another_try():
    entered, go = threading.Event(), threading.Event()
    calls, messages = [], []

    def make():
        calls.append(1)
        entered.set()
        assert go.wait(10)
        raise FileNotFoundError("/secret")

    predictor = Predictor(make)

    def ask():
        try:
            use(predictor)
        except StartError as error:
            messages.append(error.message)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    threads[0].start()
    assert entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: predictor.turns.waiting == 4)
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(calls) == 1
    assert len(messages) == 5
    assert len(set(messages)) == 1
    with pytest.raises(StartError):
        use(predictor)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        RemoteError("the process 17 was killed by SIGKILL"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        pytest.param(KeyboardInterrupt(), id="interrupt"),
    ],
)
def test_a_process_that_dies_is_replaced_at_the_next_use_and_its_sessions_fail_by_name(predictor, maker, error):
    deaths = []
    predictor.on_death = lambda start: deaths.append((start, predictor.is_ready))
    use(predictor)
    maker.made[0].errors["memory"] = error
    raised = DiedError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(raised), predictor.turn("frame", 1) as inference:
        inference.memory()
    assert deaths == [(1, False)]
    assert maker.made[0].is_shut
    assert predictor.memory == {"allocated": None, "total": None, "sessions": {}}
    with pytest.raises(DiedError):
        use(predictor, 1)
    assert maker.calls == 1
    use(predictor)
    assert (maker.calls, predictor.starts, predictor.restarts) == (2, 2, 1)
    with pytest.raises(DiedError):
        use(predictor, 1)
    use(predictor, 2)
    assert deaths == [(1, False)]


def test_a_process_that_died_while_nobody_used_it_is_nobodys_error(predictor, maker):
    deaths = []
    predictor.on_death = deaths.append
    use(predictor)
    maker.made[0].dead = True
    use(predictor)
    assert deaths == [1]
    assert (maker.calls, predictor.starts, predictor.restarts) == (2, 2, 1)


def test_errors_of_the_inference_become_the_servers(predictor, maker):
    use(predictor)
    expected = {
        ValueError("There is no frame 7."): (ServerError, 400, "There is no frame 7."),
        torch.OutOfMemoryError("CUDA error: out of memory"): (Busy, 503, "no memory left"),
        MemoryError(): (Busy, 503, "no memory left"),
        NotFound("gone"): (NotFound, 404, "gone"),
        KeyError("session"): (KeyError, None, "session"),
        RuntimeError("odd"): (RuntimeError, None, "odd"),
    }
    for error, (kind, status, words) in expected.items():
        maker.made[0].errors["memory"] = error
        with pytest.raises(kind, match=words) as raised, predictor.turn("click", 1) as inference:
            inference.memory()
        assert type(raised.value) is kind
        assert getattr(raised.value, "status", None) == status
    assert (maker.calls, predictor.starts) == (1, 1)
    assert not maker.made[0].is_shut


def test_memory_is_asked_for_once_a_second(predictor, maker, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(predictors.time, "monotonic", lambda: now[0])
    use(predictor)
    assert len(maker.made[0].called("memory")) == 1
    for seconds, calls in ((0.5, 1), (0.5, 2), (0.1, 2)):
        now[0] += seconds
        with predictor.turn("click") as inference:
            predictor.note_memory(inference)
        assert len(maker.made[0].called("memory")) == calls
    with predictor.turn("click") as inference:
        inference.open("a", "a.mp4")
        predictor.note_memory(inference, now=True)
    assert predictor.memory["sessions"] == {"a": 10000}


def test_warm_starts_it_in_the_background():
    entered, go = threading.Event(), threading.Event()

    def make():
        entered.set()
        assert go.wait(10)
        return FakeInference()

    predictor = Predictor(make)
    predictor.warm()
    assert entered.wait(10)
    assert not predictor.is_ready
    go.set()
    assert predictor.describe()["model"] == "tiny"
    assert predictor.starts == 1


def test_warm_that_fails_says_why_and_does_no_harm(caplog):
    predictor = Predictor(Maker(FileNotFoundError("/secret")))
    predictor.warm()
    wait_until(lambda: predictor.failure is not None)
    assert "its checkpoint is not there" in predictor.failure.message
    use(predictor)
    assert predictor.is_ready


def test_a_closed_predictor_refuses(predictor, maker):
    use(predictor)
    predictor.close()
    assert maker.made[0].is_shut
    for start in (None, 1):
        with pytest.raises(Busy, match="The server is stopping"):
            use(predictor, start)
    predictor.close()
    assert maker.calls == 1


def test_closing_waits_for_the_call_in_progress_but_not_for_ever(predictor, maker):
    use(predictor)
    with predictor.turn("click"):
        predictor.close(timeout=0.01)
        assert not maker.made[0].is_shut
        closing = threading.Thread(target=predictor.close)
        closing.start()
        wait_until(lambda: predictor.turns.waiting == 1)
        assert not maker.made[0].is_shut
    closing.join(10)
    assert maker.made[0].is_shut


def test_what_is_closed_while_it_starts_does_not_stay():
    entered, go, messages = threading.Event(), threading.Event(), []
    made = FakeInference()

    def make():
        entered.set()
        assert go.wait(10)
        return made

    predictor = Predictor(make)

    def ask():
        try:
            use(predictor)
        except Busy as error:
            messages.append(error.message)

    asking = threading.Thread(target=ask)
    asking.start()
    assert entered.wait(10)
    predictor.close(timeout=0)
    go.set()
    asking.join(10)
    assert messages == ["The server is stopping."]
    assert made.is_shut
    assert not predictor.is_ready


def in_child(check):
    """Run it in a forked process; it must return True."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork among threads: this is what is tested
        pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if check() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
def test_a_forked_process_has_a_predictor_of_its_own(predictor, maker):
    use(predictor)

    def check():
        is_new = not predictor.is_ready and not predictor.memory["sessions"]
        use(predictor)  # though another thread of the parent had its turn
        return is_new and maker.calls == 2 and not maker.made[0].is_shut

    with predictor.turn("click") as inference:
        inference.open("a", "a.mp4")
        predictor.note_memory(inference, now=True)
        assert in_child(check) == 0
    assert not maker.made[0].is_shut
    use(predictor, 1)


# What is made for the settings.


def test_there_is_a_predictor_for_each_device_and_none_of_them_starts(monkeypatch):
    monkeypatch.setattr(predictors, "remote", lambda *args, **options: pytest.fail("it started"))
    made = make_predictors(Settings(device="cuda:0, cuda:1", predictor_timeout=90))
    assert [predictor.patience for predictor in made] == [90, 90]
    assert [predictor.device for predictor in made] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("settings", "model", "options"),
    [
        ({"model": "a/tiny.pt"}, "a/tiny.pt", {"random_weights": False}),
        (
            {"model": "a/base_plus.pt", "image_size": 512},
            "a/base_plus.pt",
            {"random_weights": False, "image_size": 512},
        ),
        ({"model": "base_plus", "random_weights": True}, "base-plus", {"random_weights": True}),
    ],
)
def test_the_settings_reach_the_model(monkeypatch, settings, model, options):
    asked = []
    monkeypatch.setattr(predictors, "remote", lambda *args, **named: asked.append((args, named)))
    monkeypatch.setattr(predictors, "has_processes", lambda: True)
    make_inference(Settings(**settings), "cuda:1")
    assert asked == [((model,), {"predictor": predictors._INFERENCE, "device": "cuda:1", **options})]


def test_where_there_is_no_remote_the_inference_is_in_this_process(monkeypatch):
    from omniops.server.inference import Inference

    monkeypatch.setattr(predictors, "has_processes", lambda: False)
    monkeypatch.setattr(predictors, "remote", lambda *args, **named: pytest.fail("there is no remote"))
    settings = Settings(model="tiny", random_weights=True, image_size=64)
    predictor = Predictor(lambda: make_inference(settings, "cpu"), "cpu")
    with predictor.turn("click") as inference:
        assert type(inference) is Inference
    assert predictor.describe()["image_size"] == 64
    assert predictor.describe()["random_weights"] is True
    predictor.close()


def test_windows_has_no_processes_and_others_have(monkeypatch):
    monkeypatch.setattr(predictors.os, "name", "nt")
    assert not predictors.has_processes()
    monkeypatch.setattr(predictors.os, "name", "posix")
    assert predictors.has_processes()


def test_importing_it_needs_neither_transformers_nor_a_device():
    program = (
        "import sys, omniops.server.predictors, omniops.server.sessions, torch\n"
        "assert 'transformers' not in sys.modules and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# In a process of its own.

needs_remote = pytest.mark.skipif(os.name != "posix", reason="remote needs POSIX")


def _in_process(model="no model"):
    return predictors._Process(remote(model, predictor=FAKE, device="cpu"))


def _pid(inference):
    return process_id(inference._remote)


@pytest.mark.slow
@needs_remote
def test_a_real_process_opens_closes_dies_and_is_replaced():
    predictor = Predictor(_in_process, "cpu")
    deaths = []
    predictor.on_death = deaths.append
    with predictor.turn("click") as inference:
        pid = _pid(inference)
        opened = inference.open("a", "a.mp4")
        assert opened == {"frames": 10, "width": 32, "height": 24, "fps": 24.0, "bytes": 10000}
        inference.open("b", "b.mp4")
        assert inference.add("a", 0, 1, [[0.5, 0.5]], [1])[0][0] == 1
        inference.close("a")  # not that of Remote
        assert set(inference.memory()["sessions"]) == {"b"}
        with pytest.raises(KeyError) as missing:
            inference.prompts("a")
        assert missing.value.args == ("a",)
    assert in_child(lambda: not predictor.is_ready) == 0  # who leaves the process to its parent
    with pytest.raises(ServerError, match="There is no frame 99") as wrong, predictor.turn("click", 1) as inference:
        inference.add("b", 99, 1, [[0.5, 0.5]], [1])
    assert wrong.value.status == 400
    with pytest.raises(DiedError), predictor.turn("frame", 1) as inference:
        inference.kill()
    assert is_gone(pid)
    assert deaths == [1]
    with predictor.turn("click") as inference:
        second = _pid(inference)
        assert inference.memory()["sessions"] == {}
    os.kill(second, signal.SIGKILL)
    assert use(predictor)["model"] == "tiny"
    assert deaths == [1, 2]
    with predictor.turn("click") as inference:
        third = _pid(inference)
    predictor.close()
    assert is_gone(third)


@pytest.mark.slow
@needs_remote
def test_a_process_that_hangs_is_killed_and_replaced(caplog):
    predictor = Predictor(_in_process, "cpu", patience=0.5)
    deaths = []
    predictor.on_death = deaths.append
    with predictor.turn("click") as inference:
        pid = _pid(inference)
    time.sleep(1)  # without anything to do, which is not to hang
    assert use(predictor)["model"] == "tiny"
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(DiedError), predictor.turn("click", 1) as inference:
        inference.open("a", "a.mp4")
    assert 0.5 < time.monotonic() - start < 5
    assert is_gone(pid)
    assert deaths == [1]
    assert "The predictor on cpu does not answer, and is killed" in caplog.text
    assert use(predictor)["model"] == "tiny"
    assert predictor.restarts == 1
    predictor.close()


@needs_remote
def test_a_real_process_without_its_checkpoint_says_so_by_name():
    predictor = Predictor(lambda: _in_process("missing.pt"), "cpu")
    with pytest.raises(StartError, match="its checkpoint is not there") as raised:
        use(predictor)
    assert "secret" not in raised.value.message


@pytest.mark.slow
@needs_remote
def test_the_process_ends_with_the_one_that_uses_it():
    program = f"""
import sys
sys.path.insert(0, {TESTS!r})
from omniops.remote import process_id
from omniops.sam2 import remote
from omniops.server import predictors
predictor = predictors.Predictor(lambda: predictors._Process(remote("a", predictor={FAKE!r}, device="cpu")))
with predictor.turn("click") as inference:
    print(process_id(inference._remote))
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, stdout=subprocess.PIPE)
    assert is_gone(int(output.stdout))
