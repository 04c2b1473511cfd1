import threading
import time

import pytest
from server.waiting import wait_until

from omniops.server.turns import Turns


class Line:
    """Threads that stand in line, one after the other, and the order in which they were called."""

    def __init__(self):
        self.turns = Turns()
        self.order = []
        self.threads = []

    def stand(self, kind, name=None):
        name = name or f"{kind}{len(self.threads)}"
        before = self.turns.waiting

        def work():
            with getattr(self.turns, kind)():
                self.order.append(name)

        thread = threading.Thread(target=work)
        self.threads.append(thread)
        thread.start()
        wait_until(lambda: self.turns.waiting == before + 1)
        return name

    def finish(self):
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        return self.order


def test_clicks_go_before_frames_and_each_in_the_order_in_which_they_came():
    line = Line()
    with line.turns.click():
        frames = [line.stand("frame"), line.stand("frame")]
        clicks = [line.stand("click"), line.stand("click")]
        frames += [line.stand("frame")]
        clicks += [line.stand("click")]
        assert line.turns.waiting == 6
        assert line.order == []
    assert line.finish() == clicks + frames
    assert line.turns.waiting == 0


def test_sessions_that_are_tracked_take_turns_frame_by_frame():
    turns, order, rounds = Turns(), [], 20
    inside = threading.Barrier(3)

    def track(name):
        inside.wait(10)
        for _ in range(rounds):
            with turns.frame():
                order.append(name)
                wait_until(lambda: turns.waiting == 2 or len(order) > 3 * rounds - 6)

    threads = [threading.Thread(target=track, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(order) == 3 * rounds
    first = order[:3]
    assert sorted(first) == ["a", "b", "c"]
    for i in range(0, 3 * rounds - 9, 3):
        assert order[i : i + 3] == first


def test_a_frame_is_let_in_after_eight_clicks_that_need_not_have_waited_for_one():
    line = Line()
    with line.turns.click():
        frames = [line.stand("frame"), line.stand("frame")]
        clicks = [line.stand("click") for _ in range(30)]
    # Each click waits for one frame at most, so the second frame has to wait for all of them.
    assert line.finish() == [*clicks[:8], frames[0], *clicks[8:], frames[1]]


def test_clicks_that_came_while_a_frame_was_computed_wait_for_no_other():
    line = Line()
    with line.turns.frame():
        frames = [line.stand("frame")]
        clicks = [line.stand("click") for _ in range(20)]
    assert line.finish() == clicks + frames


def test_tracking_goes_on_however_fast_clicks_follow_each_other():
    turns, clicked, tracked = Turns(), [0], [0]
    is_done = threading.Event()

    def click():
        while not is_done.is_set():
            with turns.click():
                clicked[0] += 1

    threads = [threading.Thread(target=click) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with turns.frame():
            tracked[0] += 1
    is_done.set()
    for thread in threads:
        thread.join(10)
    assert tracked == [20]
    assert clicked[0] > 0


class Watched(Turns):
    """Notes, at each change, how many frames a click has had to wait for."""

    def __init__(self):
        super().__init__()
        self.met = {}
        self.frames_waited_for = 0

    def _advance(self):
        for click in self._clicks:
            self.met.setdefault(click, int(self._holder is not None and self._holder.is_frame))
        before = self._holder
        super()._advance()
        if self._holder is not before and self._holder is not None and self._holder.is_frame:
            for click in self._clicks:
                self.met[click] += 1
        self.frames_waited_for = max([self.frames_waited_for, *(self.met[click] for click in self._clicks)])


def test_of_many_threads_one_is_in_and_no_click_waits_for_two_frames():
    turns, inside, overlaps, served = Watched(), [0], [], [0, 0]

    def work(number):
        for i in range(200):
            kind = "click" if (number + i) % 3 else "frame"
            with getattr(turns, kind)():
                inside[0] += 1
                if inside[0] != 1:
                    overlaps.append(kind)
                served[kind == "frame"] += 1
                if i % 10 == 0:
                    time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert overlaps == []
    assert sum(served) == 12 * 200
    assert turns.frames_waited_for == 1
    assert turns.waiting == 0


@pytest.mark.parametrize("kind", ["click", "frame"])
def test_who_does_not_want_to_wait_longer_leaves_the_line(kind):
    turns = Turns()
    with turns.click():
        with pytest.raises(TimeoutError, match=r"within 0\.01 s"), getattr(turns, kind)(timeout=0.01):
            raise AssertionError("it was not its turn")
        assert turns.waiting == 0
    with getattr(turns, kind)(timeout=0):
        pass


def test_a_turn_ends_with_the_error_of_who_has_it():
    turns = Turns()
    for kind in (turns.click, turns.frame):
        with pytest.raises(KeyError), kind():
            raise KeyError("mine")
    with turns.click(timeout=0):
        pass


def test_who_is_interrupted_while_waiting_leaves_the_line(monkeypatch):
    turns = Turns()

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            raise KeyboardInterrupt

    with turns.click():
        monkeypatch.setattr(threading, "Event", Interrupted)
        with pytest.raises(KeyboardInterrupt), turns.click():
            raise AssertionError("it was not its turn")
        assert turns.waiting == 0
    with pytest.raises(KeyboardInterrupt), turns.frame():  # whose turn had come already
        raise AssertionError("it did not hear of it")
    monkeypatch.undo()
    with turns.frame(timeout=0):
        pass


def test_a_turn_that_comes_at_the_last_moment_is_taken():
    turns = Turns()

    class Late(threading.Event):
        def wait(self, timeout=None):
            return False  # as if the time ran out just before the turn came

    event, threading.Event = threading.Event, Late
    try:
        with turns.click(timeout=0):
            entered = True
    finally:
        threading.Event = event
    assert entered
    with turns.click(timeout=0):
        pass
