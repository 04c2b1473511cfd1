"""A predictor in a process of its own. Most tests share one, whose predictor is a stand-in: see remote_standin.py."""

import ast
import copy
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_clip

from omniops.sam2 import SAM2ImagePredictor, load
from omniops.sam2.architectures import new
from omniops.sam2.remote_predictor import RemoteError, remote

STANDIN = "remote_standin:Predictor"
# The module, whose name in the package is the function's.
remote_module = importlib.import_module("omniops.sam2.remote_predictor")


def _is_gone(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module", autouse=True)
def _search_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def shared(_search_path):
    with remote("a.pt", predictor=STANDIN, device="cpu", dtype=torch.float16, image_size=64, gain=2.0) as predictor:
        yield predictor


def test_the_options_go_to_the_model_and_to_the_predictor(shared):
    assert shared.made_with() == ("a.pt", "cpu", torch.float16, {"image_size": 64})
    assert shared.gain == 2.0
    pid, parent = shared.process()
    assert pid != os.getpid() == parent
    assert os.getsid(pid) == pid  # Ctrl-C in the terminal is not meant for it
    assert repr(shared) == f"<remote Predictor, process {pid}>"


def test_the_process_is_not_a_forked_one(shared):
    assert shared.picked()[1] is False


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", "complex64", ">f4", "<U5", "M8[s]"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5)])
def test_arrays_come_back_the_same(shared, dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    back, _ = shared.echo(array)
    assert type(back) is np.ndarray
    assert back.dtype == array.dtype
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(
        shared.echo(array.T[..., ::-1] if array.ndim else array)[0], array.T[..., ::-1] if array.ndim else array
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.complex64],
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5)])
def test_tensors_come_back_the_same(shared, dtype, shape):
    tensor = torch.randn(shape).mul(4).to(dtype)
    back, named = shared.echo(tensor, other=tensor.mT if tensor.ndim else tensor)
    assert back.dtype == dtype
    torch.testing.assert_close(back, tensor, rtol=0, atol=0)
    torch.testing.assert_close(named["other"], tensor.mT if tensor.ndim else tensor, rtol=0, atol=0)


def test_plain_data_comes_back_the_same(shared):
    values = [None, True, 3, 2.5, "é", b"\0", (1, (2,)), [3], {"a": {4}}, np.float32(0.5), np.bool_(True)]
    values += [torch.device("cpu"), torch.bfloat16]
    *back, named = shared.echo(*values, key=(None,))
    assert back == values
    assert [type(each) for each in back] == [type(each) for each in values]
    assert named == {"key": (None,)}


def test_what_is_large_does_not_pass_through_the_socket(shared):
    frame = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    sent = shared._child.encoded(("call", "echo", (frame, torch.from_numpy(frame)), {}))
    assert len(sent) < 500
    np.testing.assert_array_equal(shared.doubled(frame), frame * 2)
    assert os.fstat(shared._child._memory.fileno()).st_nlink == 0  # it has no name that could be left behind


def test_much_memory_is_given_back(shared):
    many = np.ones(remote_module._KEPT_BYTES // 8 + 1)
    assert shared.echo(many)[0].sum() == len(many)
    assert os.fstat(shared._child._memory.fileno()).st_size == 0


def test_where_memory_cannot_be_without_a_file_that_file_has_no_name(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with remote_module._shared_memory() as memory:
        assert os.fstat(memory.fileno()).st_nlink == 0
        value = [np.arange(7), {"a": torch.arange(5.0)}]
        back = remote_module._decode(remote_module._encode(value, memory), memory)
        np.testing.assert_array_equal(back[0], value[0])
        torch.testing.assert_close(back[1]["a"], value[1]["a"])


class _Call:
    def __reduce__(self):
        return os.system, ("echo called",)


def test_nothing_but_plain_data_is_read_from_the_process(capfd):
    with (
        remote_module._shared_memory() as memory,
        pytest.raises(pickle.UnpicklingError, match=r"plain data.* got posix\.system"),
    ):
        remote_module._decode(pickle.dumps(_Call()), memory)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("read", [lambda shared: shared.unknown(), lambda shared: shared.echo(torch.Size([2]))])
def test_what_is_no_plain_data_stays_in_the_process(shared, read):
    with pytest.raises(TypeError, match=r"(builtins.object|torch.Size) stays in the process of the predictor"):
        read(shared)
    with pytest.raises(TypeError, match=r"types.SimpleNamespace stays in the process"):
        _ = shared.model


@pytest.mark.parametrize("argument", [np.array([None]), np.zeros(2, dtype=[("a", "f4")])])
def test_arrays_that_have_no_bytes_of_their_own_are_refused(shared, argument):
    with pytest.raises(TypeError, match=r"an array of .* does not pass between processes"):
        shared.echo(argument)
    assert shared.echo(1) == [1, {}]


def test_an_argument_that_cannot_be_sent_leaves_the_process_usable(shared):
    pid, _ = shared.process()
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError), match=r"lambda|local"):
        shared.echo(lambda: None)
    assert shared.process()[0] == pid


def test_exceptions_keep_their_type_and_say_where_they_are_from(shared):
    with pytest.raises(FileNotFoundError) as caught:
        shared.fail("file")
    assert caught.value.filename == "/nowhere/at all"
    assert "remote_standin.py" in str(caught.value.__cause__)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        shared.fail("memory")
    assert caught.value.args == ("out of memory", 17)
    with pytest.raises(RemoteError, match=r"remote_standin.OddError: oddly"):
        shared.fail("odd")
    with pytest.raises(RemoteError, match=r"builtins.SystemExit: enough"):
        shared.fail("exit")
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        shared.predict(wrong=1)


def test_names_that_the_predictor_does_not_have(shared):
    with pytest.raises(AttributeError, match="has no attribute 'predcit'"):
        _ = shared.predcit
    assert not hasattr(shared, "predcit")
    with pytest.raises(AttributeError):
        shared.gain = 3.0


def test_a_generator_runs_when_it_is_asked_and_no_longer_than_it_is_held(shared):
    state = shared.init_state([0, 1, 2, 3])
    closed = shared.closed
    values = shared.propagate(state)
    assert shared.lengthen(state, by=[4]) == 5  # between the values other calls pass
    assert next(values)[0] == 0
    number, pid, mask = next(values)
    assert (number, pid) == (1, shared.process()[0])
    torch.testing.assert_close(mask, torch.ones(2, 3))
    assert [each[0] for each in values] == [2, 3, 4]
    assert shared.closed == closed + 1
    values = shared.propagate(state)
    next(values)
    never_begun = shared.propagate(state)
    del values, never_begun
    gc.collect()
    assert shared.echo() == [{}]
    assert shared.closed == closed + 2
    assert len(shared._child.dropped) == 0


def test_a_generator_that_fails_has_given_what_came_before(shared):
    values = shared.propagate(shared.init_state([0, 1, None, 3]))
    assert [next(values)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="frame 2 is broken"):
        next(values)


def test_a_state_stays_in_the_process_while_it_is_held(shared):
    dropped = shared.dropped
    state = shared.init_state([5, 6])
    assert state["video"] == [5, 6]
    assert state.frames == 2
    with pytest.raises(KeyError, match="nothing"):
        state["nothing"]
    with pytest.raises(TypeError, match="generator stays in the process"):
        state["generator"]
    with pytest.raises(AttributeError, match="clear"):
        _ = state.clear
    del state
    gc.collect()
    shared.echo()
    assert shared.dropped == dropped + 1


def test_a_state_is_a_mapping_of_what_passes(shared):
    state = shared.init_state([5, 6])
    assert "video" in state
    assert "generator" not in state  # which stays there
    assert 3 not in state
    assert list(state) == list(state.keys()) == ["video"]
    assert len(state) == 1
    assert dict(state.items()) == {"video": [5, 6]}
    assert state.get("nothing", 7) == 7
    assert state != shared.init_state([5, 6])
    assert len({state, state}) == 1


def test_threads_take_turns(shared):
    all_here = threading.Barrier(3, timeout=10)

    def are_right(number):
        all_here.wait()
        arrays = [np.full((50, 60), number * 100 + i) for i in range(20)]
        return all((shared.doubled(array) == array * 2).all() for array in arrays)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(are_right, range(3))) == [True] * 3


def _of_a_forked_process(predictor, state):
    told = []
    for use in (lambda: predictor.predict(), lambda: state["video"]):
        with pytest.raises(RemoteError) as caught:
            use()
        told.append(str(caught.value))
    predictor.set_image([4.0])
    return [*told, predictor.process(), predictor.predict().item()]


def test_a_forked_process_starts_one_of_its_own_and_leaves_the_parents_alone(shared):
    shared.set_image([1.0])
    state = shared.init_state([1])
    pid, _ = shared.process()
    reading, writing = os.pipe()
    with shared._lock:  # as if another thread were in the middle of a call
        child = os.fork()
        if not child:
            try:
                told = repr(_of_a_forked_process(shared, state))
            except BaseException:
                told = traceback.format_exc()
            os.write(writing, told.encode())
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    assert told.startswith("["), told
    no_image, no_state, (own, parent), value = ast.literal_eval(told)
    assert no_image.endswith("which belongs to the process that this one was forked from: call set_image again")
    assert no_state.endswith("which belongs to the process that this one was forked from: call init_state again")
    assert own != pid
    assert parent == child
    assert value == 8.0
    assert _is_gone(own)
    assert shared.process()[0] == pid
    assert shared.predict().item() == 2.0


def test_a_process_that_dies_is_an_error_and_the_next_call_starts_another():
    predictor = remote("a.pt", predictor=STANDIN)
    assert repr(predictor) == "<remote Predictor, not started>"
    predictor.set_image([1.0])
    with pytest.raises(TypeError, match="image must be"):
        predictor.set_image(None)
    state = predictor.init_state([1, 2])
    assert predictor.lengthen(state, by=[3]) == 3
    values = predictor.propagate(state)
    next(values)
    pid, _ = predictor.process()

    started = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        predictor.end(signal.SIGKILL, heir_lives=20)
    assert time.monotonic() - started < 10
    assert str(caught.value) == (
        f"the process {pid} of a remote Predictor was killed by SIGKILL, at: end(). The next call starts a new "
        "process; the image that was set in this one is gone. It last wrote:\nfamous last words"
    )
    assert _is_gone(pid)
    for use in (lambda: predictor.lengthen(state, by=[]), lambda: next(values), lambda: state["video"]):
        with pytest.raises(RemoteError, match="is gone with its process, which was killed by SIGKILL: call init_state"):
            use()
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"the image .* which was killed by SIGKILL: call set_image again"):
            predictor.process()
    assert repr(predictor) == "<remote Predictor, not started>"
    predictor.set_image([3.0])
    assert predictor.predict() == [3.0]
    second, _ = predictor.process()
    assert second != pid

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            predictor.sleep(60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert _is_gone(second)
    with pytest.raises(RemoteError, match="which was stopped when KeyboardInterrupt broke off a call"):
        predictor.predict()


def test_a_start_that_takes_too_long_is_an_error(monkeypatch):
    monkeypatch.setattr(remote_module, "_PROGRAM", "import time; print('still here'); time.sleep(60)")
    monkeypatch.setattr(remote_module, "_GLANCE", 0.1)
    predictor = remote("a.pt", predictor=STANDIN, start_timeout=0.5)
    started = time.monotonic()
    with pytest.raises(
        RemoteError, match=r"(?s)did not answer within 0.5 s of its start and was stopped.*still here"
    ) as caught:
        predictor.start()
    assert time.monotonic() - started < 5
    assert _is_gone(int(str(caught.value).split()[2]))


def test_a_start_that_fails_says_why(monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        remote("missing.pt", predictor=STANDIN).start()
    assert caught.value.filename == "missing.pt"
    monkeypatch.setattr(remote_module, "_PROGRAM", "import no_such_module")
    with pytest.raises(
        RemoteError, match=r"(?s)ended with exit code 1, at: its start.*No module named 'no_such_module'"
    ):
        remote("a.pt", predictor=STANDIN).start()


# Answers all that it is asked, without the seconds that PyTorch takes to be imported.
AGREEABLE = """
import pickle, sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
while connection.recv_bytes():
    connection.send_bytes(pickle.dumps(("value", None)))
"""


def test_closing_and_forgetting_end_the_process(monkeypatch):
    monkeypatch.setattr(remote_module, "_PROGRAM", AGREEABLE)
    with remote("a.pt", predictor=STANDIN) as closed:
        pid = closed._child.pid
    assert _is_gone(pid)
    closed.close()
    assert repr(closed) == "<remote Predictor, closed>"
    for use in (closed.start, lambda: closed.predict):
        with pytest.raises(RemoteError, match="this remote Predictor is closed"):
            use()
    predictor = remote("a.pt", predictor=STANDIN).start()
    pid = predictor._child.pid
    del predictor
    gc.collect()
    assert _is_gone(pid)


@pytest.mark.parametrize("predictor", ["picture", "", ":Predictor", "module:", "__main__:Predictor", "module:a b"])
def test_predictors_that_no_other_process_can_import_are_refused(predictor):
    with pytest.raises(ValueError, match="predictor must be one of image, video, masks, or a class"):
        remote("a.pt", predictor=predictor)


def test_a_class_of_a_function_is_refused():
    class Local:
        pass

    with pytest.raises(ValueError, match="<locals>"):
        remote("a.pt", predictor=Local)


# No main guard, and a forked process that lives on when the caller is killed in the middle of a call.
SCRIPT = """
import os, threading, time
from omniops.sam2.remote_predictor import remote
predictor = remote("a.pt", predictor="remote_standin:Predictor")
pid = predictor.process()[0]
state = predictor.init_state([1])
heir = os.fork()
if not heir:
    time.sleep(60)
    os._exit(0)
threading.Thread(target=predictor.sleep, args=(60,)).start()
print(pid, heir, flush=True)
"""


def test_a_script_needs_no_guard_and_when_it_is_killed_nothing_is_left(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
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
        assert _is_gone(pid)
    finally:
        os.kill(heir, signal.SIGKILL)


def test_a_video_is_tracked_and_its_state_copied_there(tmp_path):
    torch.manual_seed(0)
    new("tiny", image_size=64).save_pretrained(tmp_path)
    clip = write_clip(tmp_path / "clip", 3)
    with remote(tmp_path, predictor="video", device="cpu", dtype="float32", image_size=64) as predictor:
        state = predictor.init_state(str(clip))
        predictor.add_new_mask(state, 0, 1, np.eye(20))
        assert copy.copy(state) is state
        twin = copy.deepcopy(state)
        predictor.add_new_mask(state, 0, 2, np.eye(30))
        assert (state["obj_ids"], twin["obj_ids"]) == ([1, 2], [1])
        assert state["obj_id_to_idx"] == {1: 0, 2: 1}
        assert {"num_frames", "video_height", "obj_ids", "frames_tracked_per_obj"} <= set(state)
        assert not {"images", "frames"} & set(state)
        assert [ids for _, ids, _ in predictor.propagate_in_video(twin)] == [[1]] * 3
        del state
        assert twin["num_frames"] == 3


def test_the_image_predictor_gives_the_same_masks_there(tmp_path):
    torch.manual_seed(0)
    new("tiny", image_size=64).save_pretrained(tmp_path)
    options = {"device": "cpu", "dtype": "float32", "image_size": 64}
    here = SAM2ImagePredictor(load(tmp_path, **options), mask_threshold=0.1)
    image = np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8)
    prompt = {"point_coords": np.array([[20.0, 30.0]]), "point_labels": np.array([1]), "return_logits": True}
    here.set_image(image)
    with remote(tmp_path, predictor=SAM2ImagePredictor, mask_threshold=0.1, **options) as there:
        there.set_image(image)
        for mine, its in zip(here.predict(**prompt), there.predict(**prompt), strict=True):
            np.testing.assert_allclose(its, mine, rtol=1e-5, atol=1e-5)
        masks, _, _ = there.predict(**{**prompt, "return_logits": False})
        assert masks.dtype == np.float32
        assert set(np.unique(masks)) <= {0, 1}
        masks *= 255
        assert there.device == torch.device("cpu")
        assert there.mask_threshold == 0.1
        with pytest.raises(ValueError, match="point"):
            there.predict(point_coords=np.zeros((1, 3)), point_labels=np.array([1]))
