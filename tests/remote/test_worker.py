"""The process's side, in this process."""

import gc

import pytest

from omniops.remote.messages import SERVED, Reference, decode, encode, shared_memory
from omniops.remote.worker import Worker


class Asker:
    """Asks a worker as a process does."""

    def __init__(self, memory):
        self.memory = memory
        self.worker = Worker(memory)

    def __call__(self, *request, released=()):
        answer = self.worker.answer(encode((list(released), request), self.memory))
        return decode(answer, self.memory)

    def call(self, name, *args, keep=False, released=()):
        return self("call", name, args, {}, keep, released=released)


@pytest.fixture
def ask():
    with shared_memory() as memory:
        ask = Asker(memory)
        assert ask("create", "remote.standin:StandIn", (), {"gain": 2.0}) == ("value", None)
        yield ask


def test_attributes_are_values_or_methods(ask):
    assert ask("attribute", SERVED, "gain") == ("value", 2.0)
    assert ask("attribute", SERVED, "echo") == ("method", None)
    assert ask("attribute", SERVED, "nothing")[0] == "error"
    assert ask("attribute", SERVED, "model")[1][:2] == ("builtins", "TypeError")


def test_results_come_back_or_stay(ask):
    assert ask.call("echo", 1) == ("value", [1, {}])
    kind, number = ask.call("open", [5, 6], keep=True)
    assert kind == "object"
    assert ask("item", number, "items") == ("value", [5, 6])
    assert ask("attribute", number, "length") == ("value", 2)
    assert ask("keys", number) == ("value", ["items"])  # a generator stays there
    kind, iterator = ask.call("walk", Reference(number))
    assert kind == "iterator"
    assert iterator != number
    assert [ask("next", iterator)[0] for _ in range(4)] == ["value", "value", "end", "end"]


def test_a_copy_is_an_object_of_its_own(ask):
    ask.worker.create("builtins:dict", (), {"items": [1]})
    kind, number = ask("copy", SERVED)
    assert kind == "object"
    assert ask.call("clear") == ("value", None)
    assert ask("keys", number) == ("value", ["items"])


def test_what_is_released_is_dropped(ask):
    _, number = ask.call("open", [5, 6], keep=True)
    assert ask("attribute", SERVED, "released") == ("value", 0)
    assert ask.call("echo", released=[number, 99]) == ("value", [{}])
    gc.collect()
    assert ask("attribute", SERVED, "released") == ("value", 1)
    assert ask("item", number, "items")[1][:3] == ("builtins", "KeyError", (number,))


def test_whatever_an_object_raises_is_an_answer(ask):
    for kind, name in (("file", "FileNotFoundError"), ("exit", "SystemExit"), ("odd", "OddError")):
        answer, (_, raised, *_) = ask.call("fail", kind)
        assert (answer, raised) == ("error", name)
    assert ask.call("echo") == ("value", [{}])


def test_a_target_is_whatever_can_be_called(ask):
    assert ask("create", "operator:itemgetter", (1,), {}) == ("value", None)
    assert ask.call("__call__", "ab") == ("value", "b")
    assert ask("create", "remote.standin:StandIn.nothing", (), {})[1][1] == "AttributeError"
