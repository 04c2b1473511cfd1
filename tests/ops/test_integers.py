"""Integers in every form: what has ``__index__`` is one, as for PyTorch's own functions; a bool or a float is none."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import omniops
from omniops.ops import _checks

FEATURES = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
MASKS = torch.rand(1, 18, 6, 10, generator=torch.Generator().manual_seed(1))
SMALL = torch.rand(1, 9, 2, 3, generator=torch.Generator().manual_seed(2))
OFFSET = torch.randn(1, 18, 2, 3, generator=torch.Generator().manual_seed(3))
WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(4))
MASK = torch.rand(1, 1, 6, 7, generator=torch.Generator().manual_seed(5)) > 0.5
PLACES = torch.rand(1, 2, 3, 3, 2, generator=torch.Generator().manual_seed(6))
WEIGHTS = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(7))

# Of each function: how it is called with these numbers.
CALLS = {
    "carafe": (lambda *n: omniops.carafe(FEATURES, MASKS, *n), (3, 2, 2)),
    "carafe_downsample": (lambda *n: omniops.carafe_downsample(FEATURES, SMALL, *n), (3, 1, 2)),
    "deform_conv2d": (lambda *n: omniops.deform_conv2d(FEATURES, OFFSET, WEIGHT, None, *n), (2, 1, 1)),
    "deform_conv2d, pairs": (
        lambda *n: omniops.deform_conv2d(FEATURES, OFFSET, WEIGHT, None, (2, n[0]), [n[1], 1], (n[2], 1)), (2, 1, 1),
    ),
    "modulated_deform_conv2d": (
        lambda *n: omniops.modulated_deform_conv2d(FEATURES, OFFSET, SMALL, WEIGHT, None, *n), (2, 1, 1, 1, 1),
    ),
    "multi_scale_deform_attn": (
        lambda h, w, p: omniops.multi_scale_deform_attn(FEATURES, [(h, 1), (1, w)], PLACES, WEIGHTS, [p, 1]), (3, 1, 2),
    ),
    "connected_components": (lambda *n: omniops.connected_components(MASK, *n)[1], (4,)),
    "fill_holes": (lambda *n: omniops.fill_holes(MASK.float(), *n), (2,)),
    "remove_small_components": (lambda *n: omniops.remove_small_components(MASK, *n), (3,)),
}  # fmt: skip


class Index:
    """An integer of somebody's own."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


KINDS = [
    *(np.int64, np.int32, np.uint8, np.array, torch.tensor, Index),
    lambda value: torch.tensor(value, dtype=torch.uint8),
]


class Numbers(TorchDispatchMode):
    """The types of the numbers that our operators are given."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "omniops":
            for arg, described in zip(args, func._schema.arguments, strict=False):
                if not isinstance(arg, torch.Tensor) and arg is not None and str(described.type) != "bool":
                    self.types |= {type(number) for number in (arg if isinstance(arg, (list, tuple)) else (arg,))}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_is_the_int_that_it_stands_for(name):
    call, numbers = CALLS[name]
    expected = call(*numbers)
    for kind in KINDS:
        with Numbers() as mode:
            assert torch.equal(call(*map(kind, numbers)), expected)
        assert mode.types == {int}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_integer_is_refused(name):
    call, numbers = CALLS[name]
    wrong = (True, np.bool_(True), 1.0, np.float32(1), torch.tensor(1.0), torch.tensor(True), torch.tensor([1]))
    for value in (*wrong, np.array([1]), np.array(1.0), np.array(True), b"1", None):
        for index in range(len(numbers)):
            with pytest.raises(TypeError, match=r"^\w+ must (be an int( or two)?|hold ints), got "):
                call(*numbers[:index], value, *numbers[index + 1 :])


@pytest.mark.parametrize("name", CALLS)
def test_numpys_integers_below_one_are_refused_by_the_same_words(name):
    call, numbers = CALLS[name]
    least = "4 or 8" if name == "connected_components" else r"at least \d"
    for kind in (int, np.int64, torch.tensor):
        with pytest.raises(ValueError, match=rf"^\w+ must be {least}, got (\(\d, )?\(?-3"):
            call(kind(-3), *numbers[1:])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_of_a_traced_tensor(name, dynamic):
    """While torch.compile traces they may be what stands for ints."""
    call, numbers = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda like: call(*(like.shape[i] for i in range(len(numbers)))),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    torch.testing.assert_close(compiled(torch.empty(numbers)), call(*numbers))


@pytest.mark.parametrize("name", ["carafe", "carafe_downsample", "deform_conv2d", "modulated_deform_conv2d"])
def test_integers_of_ones_own_under_compile(name):
    """NumPy's become arrays there, whose values PyTorch's own convolution cannot take either."""
    call, numbers = CALLS[name]
    indices = tuple(map(Index, numbers))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: call(*indices), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), call(*numbers))


def test_what_the_checks_return():
    assert _checks.integer(a=np.int64(3), b=4) == [3, 4]
    assert _checks.an_int(a=np.int8(-1)) == [-1]
    assert _checks.pair("a", (np.int64(1), torch.tensor(2))) == [1, 2]
    for two in (np.array([1, 2]), torch.tensor([1, 2])):  # as torch.nn.Conv2d takes them
        assert _checks.pair("a", two) == [1, 2]
        assert {type(number) for number in _checks.pair("a", two)} == {int}
    for wrong in (np.array([1.0, 2.0]), np.array([True, False]), torch.tensor([1, 2, 3]), np.array([[1, 2]])):
        with pytest.raises(TypeError, match=r"^a must be an int or two, got "):
            _checks.pair("a", wrong)
    assert _checks.whole_number(a=2.0, b=np.float32(3), c=np.int64(4)) == [2, 3, 4]
    assert _checks.boolean(a=np.True_, b=False) == [True, False]
    with pytest.raises(ValueError, match=r"^a must be below 2\*\*63, got 9223372036854775808$"):
        _checks.integer(a=np.uint64(2**63))
    with pytest.raises(TypeError, match=r"^a must be a bool, got 1$"):
        _checks.boolean(a=1)
