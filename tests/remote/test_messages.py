"""What crosses between a process and its caller, without the process."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from remote.standin import OddError

from omniops.remote import RemoteError
from omniops.remote.messages import (
    Reference,
    RemoteTraceback,
    can_cross,
    decode,
    encode,
    encode_error,
    rebuild_error,
    shared_memory,
)


@pytest.fixture
def memory():
    with shared_memory() as memory:
        yield memory


@pytest.fixture
def crossed(memory):
    """A function that sends a value to the process and back."""

    def cross(value):
        there = decode(encode(value, memory), memory, {})
        return decode(encode(there, memory, plain=True), memory)

    return cross


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", "complex64", ">f4", "<U5", "M8[s]"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5)])
def test_arrays_come_back_the_same(crossed, dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    back = crossed(array)
    assert type(back) is np.ndarray
    assert back.dtype == array.dtype
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)
    view = array.T[..., ::-1] if array.ndim else array
    np.testing.assert_array_equal(crossed(view), view)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.complex64],
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5)])
def test_tensors_come_back_the_same(crossed, dtype, shape):
    tensor = torch.randn(shape).mul(4).to(dtype)
    view = tensor.mT if tensor.ndim else tensor
    back, named = crossed((tensor, {"other": view}))
    assert back.dtype == dtype
    torch.testing.assert_close(back, tensor, rtol=0, atol=0)
    torch.testing.assert_close(named["other"], view, rtol=0, atol=0)


def test_a_tensor_leaves_its_history_behind_and_its_lazy_signs(crossed):
    tensor = torch.tensor([1 + 2j, 3 + 4j], requires_grad=True)
    back = crossed([tensor * 2, tensor.detach().conj(), tensor.detach().conj().imag])
    assert not back[0].requires_grad
    assert [array.tolist() for array in back] == [[2 + 4j, 6 + 8j], [1 - 2j, 3 - 4j], [-2, -4]]


@pytest.mark.parametrize("value", [torch.arange(4.0)[1::4], np.arange(4.0)[1::4]])
def test_a_single_element_of_a_row_comes_back_the_same(crossed, value):
    assert len(value) == 1  # which is called contiguous, whatever its stride
    assert crossed(value).tolist() == [1.0]


def test_plain_data_comes_back_the_same(crossed):
    values = [None, True, 3, 2.5, "é", b"\0", (1, (2,)), [3], {"a": {4}}, np.float32(0.5), np.bool_(True)]
    values += [torch.device("cpu"), torch.bfloat16]
    back = crossed(values)
    assert back == values
    assert [type(value) for value in back] == [type(value) for value in values]


def test_what_is_large_is_not_in_the_message(memory):
    picture = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    message = encode(("call", "echo", (picture, torch.from_numpy(picture)), {}), memory)
    assert len(message) < 500
    assert os.fstat(memory.fileno()).st_size == 2 * picture.nbytes


@pytest.mark.parametrize("has_memfd", [True, False])
def test_shared_memory_has_no_name_that_could_be_left_behind(monkeypatch, has_memfd):
    if not has_memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd")
    with shared_memory() as memory:
        assert os.fstat(memory.fileno()).st_nlink == 0
        value = [np.arange(7), {"a": torch.arange(5.0)}]
        back = decode(encode(value, memory), memory)
        np.testing.assert_array_equal(back[0], value[0])
        torch.testing.assert_close(back[1]["a"], value[1]["a"])


def test_shared_memory_that_ends_early_is_an_error(memory):
    message = encode(np.arange(7), memory)
    memory.truncate(10)
    with pytest.raises(EOFError, match="ends early"):
        decode(message, memory)


class _Call:
    def __reduce__(self):
        return os.system, ("echo called",)


def test_nothing_but_plain_data_is_read_from_the_process(memory, capfd):
    with pytest.raises(pickle.UnpicklingError, match=r"plain data.* got posix\.system"):
        decode(pickle.dumps(_Call()), memory)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("value", [object(), torch.Size([2]), SimpleNamespace(), [{"a": object()}]])
def test_what_is_no_plain_data_stays_in_the_process(memory, value):
    assert not can_cross(value, memory)
    with pytest.raises(TypeError, match=r"(object|torch.Size|types.SimpleNamespace) stays in the process of the rem"):
        encode(value, memory, plain=True)
    assert can_cross([1, np.arange(3)], memory)


@pytest.mark.parametrize("array", [np.array([None]), np.zeros(2, dtype=[("a", "f4")])])
def test_arrays_that_have_no_bytes_of_their_own_are_refused(memory, array):
    with pytest.raises(TypeError, match=r"an array of .* does not pass between processes"):
        encode(array, memory)


def test_a_reference_is_read_as_the_object_that_it_stands_for(memory):
    kept = object()
    _, [back] = decode(encode((1, [Reference(17)]), memory), memory, {17: kept})
    assert back is kept


def _rebuilt(error, memory):
    try:
        raise error
    except type(error) as raised:
        kind, details = decode(encode_error(raised, memory), memory)
    assert kind == "error"
    return rebuild_error(*details)


def test_an_exception_is_rebuilt_with_its_arguments_and_a_cause(memory):
    error = _rebuilt(FileNotFoundError(2, "there is none", "a.pt"), memory)
    assert type(error) is FileNotFoundError
    assert (error.errno, error.strerror, error.filename) == (2, "there is none", "a.pt")
    assert type(error.__cause__) is RemoteTraceback
    assert "in _rebuilt\n" in str(error.__cause__)
    error = _rebuilt(ValueError("no plain data:", object), memory)
    assert type(error) is ValueError
    assert error.args == (f"('no plain data:', {object!r})",)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OddError(what="oddly"), "remote.standin.OddError: oddly"),
        (SystemExit("enough"), "builtins.SystemExit: enough"),  # which must not end the caller
        (type("Local", (Exception,), {})("here"), "test_messages.Local: here"),
    ],
)
def test_an_exception_that_cannot_be_made_again_is_a_remote_error(memory, error, message):
    rebuilt = _rebuilt(error, memory)
    assert type(rebuilt) is RemoteError
    assert str(rebuilt).endswith(message)
    assert "in _rebuilt\n" in str(rebuilt.__cause__)
