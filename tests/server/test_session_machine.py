"""Sequences of operations on several sessions, against a model of what they should do."""

import gc
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from server.waiting import wait_for_background
from server.world import World

from omniops.server.errors import Busy, NotFound, ServerError

FRAMES = 5
MAX_SESSIONS = 3
TIMEOUT = 600.0

frame_numbers = st.integers(0, FRAMES - 1)
object_numbers = st.integers(0, 2)
picks = st.integers(0, 100)


@dataclass
class Expected:
    """What a session should be."""

    session: object
    device: int
    used: float
    leaves: float | None = None
    prompts: dict = field(default_factory=dict)  # {object: {frame: points}}
    tracked: dict = field(default_factory=dict)  # {frame: objects}, in the predictor
    found: dict = field(default_factory=dict)  # {frame: {object: size of its mask}}
    names: dict = field(default_factory=dict)
    stream: object = None
    pending: list | None = None  # the frames that will come by the stream

    def masks(self, frame):
        return {
            object: 1 + prompts[frame] if frame in prompts else int(object in self.tracked.get(frame, ()))
            for object, prompts in self.prompts.items()
        }

    def keep(self, frame):
        self.found[frame] = self.masks(frame)
        if not self.found[frame]:
            del self.found[frame]


def sizes(masks):
    """{object: pixels along a row of its rectangle}"""
    from omniops.sam2 import rle

    return {object: int(rle.decode(mask)[object:].any(0).sum()) for object, mask in masks}


class SessionMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.world = None
        self.live = {}  # {id: Expected}
        self.over = {}  # {id: (session, reason)}
        self.streams = []  # (stream, reason) of streams that ended, with the error that its reader gets once

    @initialize(devices=st.integers(1, 2))
    def begin(self, devices):
        self.world = World(devices, max_sessions=MAX_SESSIONS, session_timeout=TIMEOUT)
        for made in self.world.predictors:
            make = made._make
            made._make = lambda make=make: self._small(make())

    @staticmethod
    def _small(inference):
        inference.size = (FRAMES, 32, 24, 24.0)
        return inference

    def teardown(self):
        if self.world is not None:
            self.world.sessions.shutdown()

    # The model.

    def _pick(self, pick):
        return list(self.live.values())[pick % len(self.live)]

    def _used(self, expected):
        expected.used = self.world.now
        expected.leaves = None

    def _is_due(self, expected):
        now = self.world.now
        if expected.leaves is not None and now >= expected.leaves:
            return "was given back when its page was left"
        return "expired after 10 minutes without use" if now - expected.used > TIMEOUT else None

    def _end_stream(self, expected, error=None):
        if expected.stream is not None:
            self.streams.append((expected.stream, error))
        expected.stream = expected.pending = None

    def _ended(self, expected, reason, is_quiet=False):
        id = expected.session.id
        del self.live[id]
        self.over[id] = expected.session, reason
        self._end_stream(expected, None if is_quiet else reason)

    def _get(self, pick):
        """A session, as the routes get it; None if it has expired."""
        expected = self._pick(pick)
        reason = self._is_due(expected)
        if reason is not None:
            with pytest.raises(NotFound, match=reason):
                self.world.sessions.get(expected.session.id)
            self._ended(expected, reason)
            return None
        assert self.world.sessions.get(expected.session.id) is expected.session
        self._used(expected)
        return expected

    def _device_of(self, expected):
        return self.world.made[expected.device][-1]

    # What people do.

    @rule(guided=st.booleans())
    def start(self, guided):
        counts = [sum(session.device == i for session in self.live.values()) for i in range(len(self.world.predictors))]
        if len(self.live) == MAX_SESSIONS:
            left = [session for session in self.live.values() if session.leaves is not None]
            victim = min(left or self.live.values(), key=lambda session: session.used)
            if not left and self.world.now - victim.used <= 60:
                with pytest.raises(Busy, match="All 3 sessions"):
                    self.world.start()
                return
            self._ended(victim, "made room for another session")
            counts[victim.device] -= 1
        session = self.world.sessions.start(Path("clip.mp4"), "clip.mp4", guided=guided)
        device = self.world.predictors.index(session.predictor)
        assert counts[device] == min(counts)
        assert session.id not in {**self.live, **self.over}
        assert session.guided is guided
        self.live[session.id] = Expected(session, device, self.world.now)

    @precondition(lambda self: self.live)
    @rule(pick=picks, frame=frame_numbers, object=object_numbers, points=st.integers(1, 3))
    def click(self, pick, frame, object, points):
        expected = self._get(pick)
        if expected is None:
            return
        masks = expected.session.add_points(frame, object, [[0.5, 0.5]] * points, [1] * points)
        self._end_stream(expected)
        expected.prompts.setdefault(object, {})[frame] = points
        assert sizes(masks) == expected.masks(frame)
        assert [object_id for object_id, _ in masks] == list(expected.prompts)
        expected.keep(frame)

    @precondition(lambda self: self.live)
    @rule(pick=picks, frame=st.sampled_from([-1, FRAMES]), object=object_numbers)
    def wrong_click(self, pick, frame, object):
        expected = self._get(pick)
        if expected is None:
            return
        with pytest.raises(ServerError, match="There is no frame"):
            expected.session.add_points(frame, object, [[0.5, 0.5]], [1])
        self._end_stream(expected)

    @precondition(lambda self: self.live)
    @rule(pick=picks, frame=frame_numbers, object=object_numbers)
    def clear_frame(self, pick, frame, object):
        expected = self._get(pick)
        if expected is None:
            return
        self._end_stream(expected)
        if object not in expected.prompts:
            with pytest.raises(ServerError, match="is unknown"):
                expected.session.clear_frame(frame, object)
            return
        masks = expected.session.clear_frame(frame, object)
        expected.prompts[object].pop(frame, None)
        assert sizes(masks) == expected.masks(frame)
        expected.keep(frame)

    @precondition(lambda self: self.live)
    @rule(pick=picks, object=object_numbers)
    def remove(self, pick, object):
        expected = self._get(pick)
        if expected is None:
            return
        self._end_stream(expected)
        answer = expected.session.remove(object)
        prompted = sorted(expected.prompts.pop(object, {}))
        expected.names.pop(object, None)
        for objects in expected.tracked.values():
            objects.discard(object)
        for frame, found in list(expected.found.items()):
            found.pop(object, None)
            if not found:
                del expected.found[frame]
        assert [frame for frame, _ in answer] == (prompted if expected.prompts else [])
        for frame, masks in answer:
            assert sizes(masks) == expected.masks(frame)
            expected.keep(frame)

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def start_over(self, pick):
        expected = self._get(pick)
        if expected is None:
            return
        self._end_stream(expected)
        expected.session.clear_video()
        expected.prompts, expected.tracked, expected.found, expected.names = {}, {}, {}, {}

    @precondition(lambda self: self.live)
    @rule(pick=picks, object=object_numbers, name=st.sampled_from(["dog", ""]))
    def rename(self, pick, object, name):
        expected = self._get(pick)
        if expected is None:
            return
        expected.session.rename(object, name)
        expected.names.pop(object, None)
        if name:
            expected.names[object] = name

    @precondition(lambda self: self.live)
    @rule(pick=picks, frame=frame_numbers)
    def look(self, pick, frame):
        """What changes nothing, not even the propagation."""
        expected = self._get(pick)
        if expected is None:
            return
        expected.session.preview(frame, [[0.5, 0.5]], [1])
        expected.session.everything(frame)
        snapshot = expected.session.snapshot()
        assert {frame: sizes(masks) for frame, masks in snapshot["frames"]} == expected.found
        assert [frame for frame, _ in snapshot["frames"]] == sorted(expected.found)
        assert snapshot["tracking"] == (expected.stream is not None)
        assert [item["object_id"] for item in snapshot["objects"]] == list(expected.prompts)
        for item in snapshot["objects"]:
            prompts = {prompt["frame_index"]: len(prompt["points"]) for prompt in item["prompts"]}
            assert prompts == expected.prompts[item["object_id"]]
            assert item["name"] == expected.names.get(item["object_id"], "")

    @precondition(lambda self: self.live)
    @rule(pick=picks, start=frame_numbers)
    def track(self, pick, start):
        expected = self._get(pick)
        if expected is None:
            return
        self._end_stream(expected)
        if not any(expected.prompts.values()):
            with pytest.raises(ServerError, match="nothing to track"):
                expected.session.propagate(start)
            return
        expected.stream = expected.session.propagate(start)
        expected.pending = [*range(start, FRAMES), *(range(start, -1, -1) if start else ())]
        assert expected.stream.total == len(expected.pending)

    @precondition(lambda self: any(session.stream for session in self.live.values()))
    @rule(pick=picks, count=st.integers(1, 4))
    def read(self, pick, count):
        """Frames of a stream, without asking for the session anew."""
        tracking = [session for session in self.live.values() if session.stream]
        expected = tracking[pick % len(tracking)]
        for _ in range(count):
            result = next(expected.stream, None)
            expected.used = self.world.now
            if not expected.pending:
                assert result is None
                expected.stream = expected.pending = None
                return
            frame, masks = result
            assert frame == expected.pending.pop(0)
            expected.tracked[frame] = {object for object, prompts in expected.prompts.items() if prompts}
            assert sizes(masks) == expected.masks(frame)
            expected.keep(frame)

    @precondition(lambda self: self.live)
    @rule(pick=picks, how=st.sampled_from(["cancel", "close", "drop"]))
    def stop(self, pick, how):
        expected = self._get(pick)
        if expected is None:
            return
        if how == "cancel":
            expected.session.cancel()
            self._end_stream(expected)
        elif expected.stream is not None and how == "close":
            expected.stream.close()
            self._end_stream(expected)
        elif expected.stream is not None:
            expected.stream = expected.pending = None
            gc.collect(0)

    @precondition(lambda self: self.streams)
    @rule()
    def read_what_ended(self):
        stream, reason = self.streams.pop()
        if reason is not None:
            with pytest.raises(NotFound, match=reason):
                next(stream)
        assert list(stream) == []

    # How sessions end.

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def close(self, pick):
        expected = self._pick(pick)
        assert self.world.sessions.close(expected.session.id) is True
        self._ended(expected, "was closed", is_quiet=True)

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def leave(self, pick):
        expected = self._pick(pick)
        self.world.sessions.leave(expected.session.id)
        expected.leaves = self.world.now + 60

    @rule(seconds=st.sampled_from([1.0, 59.0, 61.0, 400.0]))
    def wait(self, seconds):
        self.world.now += seconds

    @rule()
    def sweep(self):
        self.world.sessions.sweep()
        for expected in list(self.live.values()):
            reason = self._is_due(expected)
            if reason is not None:
                self._ended(expected, reason)

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def die(self, pick):
        """The process of a predictor dies in a click."""
        expected = self._get(pick)
        if expected is None:
            return
        self._device_of(expected).dead = True
        with pytest.raises(NotFound, match="the process of its model died"):
            expected.session.snapshot()
        for session in [session for session in self.live.values() if session.device == expected.device]:
            self._ended(session, "ended when the process of its model died")

    @precondition(lambda self: self.over)
    @rule(pick=picks)
    def use_what_ended(self, pick):
        id = list(self.over)[pick % len(self.over)]
        session, reason = self.over[id]
        for use in (session.snapshot, lambda: session.propagate(0), lambda: self.world.sessions.get(id)):
            with pytest.raises(NotFound) as raised:
                use()
            assert raised.value.message == f"Cannot find session ID; it {reason}"
        session.cancel()
        assert not self.world.sessions.close(id)

    # What holds at all times.

    @invariant()
    def everything_is_as_expected(self):
        if self.world is None:
            return
        if self.world.sessions._thread is not None:
            wait_for_background(self.world.sessions)
        assert set(self.world.sessions._sessions) == set(self.live)
        for expected in self.live.values():
            session = expected.session
            assert session.tracking == (expected.stream is not None)
            assert session.names == expected.names
            assert {frame: set(found) for frame, found in session.found.items()} == {
                frame: set(found) for frame, found in expected.found.items()
            }
            assert not session.is_busy
            assert session.nbytes >= FRAMES * 1000
        for i, made in enumerate(self.world.made):
            on_device = {id: session for id, session in self.live.items() if session.device == i}
            if made and not made[-1].dead:
                assert set(made[-1].sessions) == set(on_device)
                for id, session in on_device.items():
                    assert (made[-1].sessions[id].pending or None) == (session.pending or None)
            else:
                assert not on_device
            assert all(inference.overlaps == [] for inference in made)
            assert self.world.predictors[i].turns.waiting == 0


SessionMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestSessions = SessionMachine.TestCase
