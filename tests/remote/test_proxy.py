"""What the caller holds: most tests share one process."""

import copy
import gc
import os
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from omniops import remote as package
from omniops.remote import Handle, Remote, RemoteError, call, process_id


def test_it_is_the_object_in_another_process(shared):
    assert shared.gain == 2.0
    pid, parent = shared.process()
    assert pid == process_id(shared)
    assert pid != os.getpid() == parent
    assert os.getsid(pid) == pid  # Ctrl-C in the terminal is not meant for it
    assert repr(shared) == f"<remote StandIn, process {pid}>"


def test_its_process_is_not_a_forked_one(shared):
    assert shared.is_forked() is False


def test_arguments_and_results_pass(shared):
    array, tensor = np.arange(6.0).reshape(2, 3), torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    *back, named = shared.echo(array, "é", tensor, key=(None,))
    np.testing.assert_array_equal(back[0], array)
    torch.testing.assert_close(back[2], tensor, rtol=0, atol=0)
    assert (back[1], named) == ("é", {"key": (None,)})
    assert shared.named(name="of an argument of Remote's own methods") == "of an argument of Remote's own methods"
    np.testing.assert_array_equal(shared.doubled(array), array * 2)
    assert array[1, 2] == 5


@pytest.mark.parametrize("read", [lambda shared: shared.unknown(), lambda shared: shared.echo(torch.Size([2]))])
def test_what_is_no_plain_data_stays_in_the_process(shared, read):
    with pytest.raises(TypeError, match=r"(builtins.object|torch.Size) stays in the process of the remote object"):
        read(shared)
    with pytest.raises(TypeError, match=r"builtins.object stays in the process"):
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
    assert "standin.py" in str(caught.value.__cause__)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        shared.fail("memory")
    assert caught.value.args == ("out of memory", 17)
    with pytest.raises(RemoteError, match=r"remote.standin.OddError: oddly"):
        shared.fail("odd")
    with pytest.raises(RemoteError, match=r"builtins.SystemExit: enough"):
        shared.fail("exit")
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        shared.scaled(wrong=1)


def test_names_that_the_object_does_not_have(shared):
    with pytest.raises(AttributeError, match="has no attribute 'scalde'"):
        _ = shared.scalde
    assert not hasattr(shared, "scalde")
    assert not hasattr(shared, "_value")
    with pytest.raises(AttributeError):
        shared.gain = 3.0


def test_a_method_whose_name_the_proxy_has_itself(shared):
    assert call(shared, "close", "it") == "it is closed"
    assert shared.echo() == [{}]


def test_a_generator_runs_when_it_is_asked_and_no_longer_than_it_is_held(shared):
    opened = shared.open([0, 1, 2, 3])
    closed = shared.closed
    values = shared.walk(opened)
    assert shared.lengthen(opened, by=[4]) == 5  # between the values other calls pass
    assert next(values)[0] == 0
    number, pid, mask = next(values)
    assert (number, pid) == (1, shared.process()[0])
    torch.testing.assert_close(mask, torch.ones(2, 3))
    assert [value[0] for value in values] == [2, 3, 4]
    assert shared.closed == closed + 1
    values = shared.walk(opened)
    next(values)
    never_begun = shared.walk(opened)
    del values, never_begun
    gc.collect()
    assert shared.echo() == [{}]
    assert shared.closed == closed + 2


def test_a_generator_that_fails_has_given_what_came_before(shared):
    values = shared.walk(shared.open([0, 1, None, 3]))
    assert [next(values)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="item 2 is broken"):
        next(values)


def test_what_a_handle_stands_for_stays_in_the_process_while_it_is_held(shared):
    released = shared.released
    opened = shared.open([5, 6])
    assert type(opened) is Handle
    assert opened["items"] == [5, 6]
    assert opened.length == 2
    with pytest.raises(KeyError, match="nothing"):
        opened["nothing"]
    with pytest.raises(TypeError, match="generator stays in the process"):
        opened["generator"]
    with pytest.raises(AttributeError, match="clear"):
        _ = opened.clear
    with pytest.raises(AttributeError, match=r"what open\(\) returned has no attribute '_name'"):
        _ = opened._name
    del opened
    gc.collect()
    shared.echo()
    assert shared.released == released + 1


def test_a_handle_is_a_mapping_of_what_passes(shared):
    opened = shared.open([5, 6])
    assert "items" in opened
    assert "generator" not in opened  # which stays there
    assert 3 not in opened
    assert list(opened) == list(opened.keys()) == ["items"]
    assert len(opened) == 1
    assert dict(opened.items()) == {"items": [5, 6]}
    assert opened.get("nothing", 7) == 7
    assert opened != shared.open([5, 6])
    assert len({opened, opened}) == 1


def test_a_deep_copy_of_a_handle_stands_for_a_copy(shared):
    opened = shared.open([5, 6])
    assert copy.copy(opened) is opened
    twin = copy.deepcopy(opened)
    assert shared.lengthen(opened, by=[7]) == 3
    assert twin["items"] == [5, 6]
    del opened
    gc.collect()
    assert shared.lengthen(twin, by=[8]) == 3
    assert [value[0] for value in shared.walk(twin)] == [0, 1, 2]


def test_a_handle_of_another_remote_object_is_refused(shared):
    other = Remote("builtins:list")
    with pytest.raises(
        RemoteError, match=re.escape(f"what open() returned is in another process than that of this {other!r}")
    ):
        call(other, "append", shared.open([5, 6]))
    assert process_id(other) is None  # which has not been started


def test_threads_take_turns(shared):
    all_here = threading.Barrier(3, timeout=10)

    def are_right(number):
        all_here.wait()
        arrays = [np.full((50, 60), number * 100 + i) for i in range(20)]
        return all((shared.doubled(array) == array * 2).all() for array in arrays)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(are_right, range(3))) == [True] * 3


@pytest.mark.parametrize("target", ["picture", "", ":StandIn", "module:", "__main__:StandIn", "module:a b"])
def test_targets_that_no_other_process_can_import_are_refused(target):
    with pytest.raises(ValueError, match=f"target must be a class or a function in a module .* got '{target}'"):
        Remote(target)


def test_a_class_of_a_function_is_refused():
    class Local:
        pass

    with pytest.raises(ValueError, match="<locals>"):
        Remote(Local)


def test_windows_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(OSError, match="on Windows a process cannot be given open file descriptors"):
        Remote("builtins:list")


def test_the_package_has_no_other_names():
    assert all(getattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match=r"module 'omniops.remote' has no attribute 'remote'"):
        _ = package.remote
