"""One thread at a time is on Apple's GPU: device.exclusive, and who enters it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from omniops import device as devices

MPS = torch.device("mps", 0)


class Waiting:
    """Whether a call waits for the thread that is on the device."""

    def __init__(self, call):
        self._call = call
        self.error: Exception | None = None

    def _run(self):
        try:
            self._call()
        except Exception as error:
            self.error = error

    def waits(self) -> bool:
        thread = threading.Thread(target=self._run)
        with devices.exclusive(MPS):
            thread.start()
            thread.join(timeout=0.3)
            waited = thread.is_alive()
        thread.join(timeout=60)
        assert not thread.is_alive()
        return waited


def test_threads_take_turns_on_mps_alone():
    inside, largest = 0, 0
    lock = threading.Lock()

    class Model:
        device = MPS

        @devices.exclusively
        def run(self, deeper: int = 2) -> int:
            nonlocal inside, largest
            with lock:
                inside += 1
                largest = max(largest, inside)
            threading.Event().wait(0.01)
            with lock:
                inside -= 1
            return self.run(deeper - 1) + 1 if deeper else 0  # a thread may enter again

    threads = [threading.Thread(target=lambda: results.append(Model().run())) for _ in range(8)]
    results: list[int] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2] * 8
    assert largest == 1


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "meta"])
def test_other_devices_are_not_waited_for(device):
    def enter(device):
        with devices.exclusive(device):
            pass

    assert not Waiting(lambda: enter(device)).waits()
    assert Waiting(lambda: enter("mps:0")).waits()


def test_a_child_does_not_wait_for_its_parents_threads():
    before = devices.exclusive(MPS)
    devices._after_fork()
    try:
        assert devices.exclusive(MPS) is not before
    finally:
        devices._forked_since_import = False


@pytest.mark.parametrize("function", [devices.synchronize, devices.empty_cache])
def test_waiting_and_freeing(monkeypatch, function):
    called = []
    monkeypatch.setattr(torch.accelerator, "synchronize", called.append)
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(empty_cache=lambda: called.append(device))
    )
    assert Waiting(lambda: function(MPS)).waits()
    assert called == [MPS]


IMAGE = {
    "set_image": (),
    "set_image_batch": (),
    "predict": (),
    "predict_batch": (),
    "get_image_embedding": (),
}
VIDEO = {
    "add_new_points_or_box": (None, 0, 1),
    "add_new_points": (None, 0, 1),
    "add_new_mask": (None, 0, 1, np.ones((4, 4))),
    "clear_all_prompts_in_frame": (None, 0, 1),
    "remove_object": (None, 1),
}


@pytest.fixture(scope="module")
def model():
    from omniops.sam2.architectures import new

    return new("tiny", image_size=64)


@pytest.mark.parametrize(("kind", "method", "arguments"), [
    *(("SAM2ImagePredictor", *call) for call in IMAGE.items()),
    *(("SAM2VideoPredictor", *call) for call in VIDEO.items()),
])  # fmt: skip
def test_the_predictors_methods_wait(model, monkeypatch, kind, method, arguments):
    from omniops import sam2

    predictor = getattr(sam2, kind)(model)
    call = Waiting(lambda: getattr(predictor, method)(*arguments))
    assert not call.waits()
    monkeypatch.setattr(type(predictor), "device", MPS)
    assert call.waits()
    assert call.error is not None  # it did get to its arguments, which are wrong


def test_a_video_and_the_masks_of_everything_wait_at_each_step(model, monkeypatch, tmp_path):
    from PIL import Image

    from omniops.sam2 import SAM2AutomaticMaskGenerator, SAM2VideoPredictor

    for i in range(2):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / f"{i}.png")
    video = SAM2VideoPredictor(model)
    state = video.init_state(tmp_path)
    video.add_new_points_or_box(state, 0, 1, points=[[10, 10]], labels=[1])
    generator = SAM2AutomaticMaskGenerator(model, points_per_side=1)
    frames = video.propagate_in_video(state)
    # The tensors stay on the CPU: only what is asked before the lock is taken says otherwise.
    monkeypatch.setattr(devices, "exclusive", lambda device: devices._mps)
    assert Waiting(lambda: next(frames)).waits()
    assert Waiting(lambda: generator.generate(np.zeros((40, 60, 3), np.uint8))).waits()
    assert Waiting(lambda: state.images[0]).waits()
    # Between two frames others may.
    assert Waiting(lambda: next(frames)).waits()


def test_no_work_on_the_device_is_done_without_the_lock(model, monkeypatch, tmp_path):
    from PIL import Image

    from omniops.sam2 import SAM2VideoPredictor

    class Checked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            free.append((func, Taken().now()))  # by another thread, if this one did not hold it
            return func(*args, **kwargs or {})

    class Taken:
        def _try(self):
            self.got = devices._mps.acquire(blocking=False)
            if self.got:
                devices._mps.release()

        def now(self) -> bool:
            thread = threading.Thread(target=self._try)
            thread.start()
            thread.join()
            return self.got

    free: list[tuple[object, bool]] = []
    for i in range(18):  # more than keep all that was made of them
        Image.fromarray(np.full((40, 60, 3), 14 * i, np.uint8)).save(tmp_path / f"{i}.png")
    video = SAM2VideoPredictor(model)
    state = video.init_state(tmp_path)
    video.add_new_points_or_box(state, 0, 1, points=[[10, 10]], labels=[1])
    list(video.propagate_in_video(state))
    # A correction of a frame that was tracked takes the place of another, which is put on the disk.
    video.add_new_points_or_box(state, 1, 1, points=[[20, 20]], labels=[0])
    monkeypatch.setattr(devices, "exclusive", lambda device: devices._mps)
    frames = video.propagate_in_video(state)
    with Checked():
        next(frames)
        next(frames)
    assert len(free) > 100
    assert [func for func, could in free if could] == []
