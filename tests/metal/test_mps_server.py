"""What the server asks of the model, on the pretended MPS device: at full size held to the rules of mps_rules.py, and
of small size with the CPU's masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mps_device import mps_device
from one_thread import one_thread as one_thread
from PIL import Image

from omniops import device as devices
from omniops.sam2 import rle
from omniops.sam2.architectures import cast, new
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator
from omniops.sam2.modeling import attention
from omniops.server.inference import Inference

HEIGHT, WIDTH = 90, 140
MASK = rle.encode(np.ones((HEIGHT, WIDTH)))
POINT = [0.3, 0.4]


def model(device: torch.device, dtype: torch.dtype = torch.float32, image_size: int = 1024) -> Any:
    torch.manual_seed(0)
    made = cast(new("tiny", image_size=image_size), dtype)
    with torch.no_grad():  # else no object is ever found
        made.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 1
    return made.to(device)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    folder = tmp_path / "clip"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for i in range(4):
        frame = noise.copy()
        frame[20:50, 10 + 5 * i : 50 + 5 * i] = [220, 40, 30]
        Image.fromarray(frame).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def memory_of_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.mps tells nothing of the pretended device."""
    monkeypatch.setattr(devices, "memory", lambda device: devices.Memory(1, 1, 1, 1))
    monkeypatch.setattr(devices, "empty_cache", lambda device: None)
    monkeypatch.setattr(devices, "title", lambda device: "pretended")


def found_by(served: Inference, frame: int, points_per_side: int) -> Any:
    """Everything on a frame of session a."""
    number = served.begin_everything("a", frame, points_per_side)
    while (found := served.next_everything("a", number)) is None:
        pass
    return found


def everything_asked(served: Inference, clip: str) -> list[Any]:
    """Every method, with corrections, previews, objects that come and go, and by turns two sessions, one guided."""
    served.describe()
    served.open("a", clip)
    served.open("b", clip, guided=True)
    answers: list[Any] = [
        served.add("a", 1, 1, [POINT], [1]),
        served.add("a", 1, 2, box=[0.1, 0.2, 0.6, 0.7]),
        served.add("a", 1, 2, [POINT, [0.9, 0.9]], [1, 0], clear=False),
        served.add_mask("a", 0, 3, MASK),
        served.preview("a", 2, [POINT], [1]),
        found_by(served, 0, 2),
        served.add("b", 0, 7, [POINT], [1]),
    ]
    served.begin("a", 1)
    served.begin("b", 0)
    for _ in range(4):
        answers += [served.next("a"), served.next("b")]
    answers += [served.clear_frame("a", 1, 1), served.add("a", 3, 2, [[0.8, 0.2]], [0])]
    served.begin("a", 3)
    answers += [served.next("a"), served.remove("a", 2)]
    served.memory()
    served.clear_video("a")
    for session in ("a", "b"):
        served.close(session)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_that_is_asked_keeps_the_rules(clip, dtype):
    with mps_device(values=False) as device:
        everything_asked(Inference(model(device, dtype)), clip)


@pytest.mark.slow
def test_masks_are_those_of_the_cpu(monkeypatch, clip):
    expected = everything_asked(Inference(model(torch.device("cpu"), image_size=64)), clip)
    monkeypatch.setattr(attention, "MAX_SCORES", 2**15)
    with mps_device(values=True) as device:
        found = everything_asked(Inference(model(device, image_size=64)), clip)
    ours, theirs = masks_in(found), masks_in(expected)
    assert len(ours) == len(theirs) > 20
    for mask, other in zip(ours, theirs, strict=True):
        # Where a logit is next to 0 its last digits decide.
        assert (mask != other).sum() <= 3
    assert len({rle.encode(mask)["counts"] for mask in theirs}) > 10


def test_where_no_mask_is_good_enough_nothing_is_found():
    with mps_device(values=True) as device:
        generator = SAM2AutomaticMaskGenerator(model(device, image_size=64), 2, pred_iou_thresh=2)
        assert generator.generate(np.full((HEIGHT, WIDTH, 3), 100, np.uint8)) == []


def masks_in(answer: Any) -> list[Any]:
    """All masks of answers, decoded."""
    if isinstance(answer, dict) and "counts" in answer:
        return [rle.decode(answer)]
    values = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (list, tuple)) else ()
    return [mask for value in values for mask in masks_in(value)]
