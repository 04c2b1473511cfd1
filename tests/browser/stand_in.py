"""An Inference that knows where the balloons of scene.py are, in the place of a model that would find them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from browser import scene
from numpy.typing import NDArray

from omniops.sam2 import rle

Masks = list[tuple[int, dict[str, Any]]]


class StandIn:
    """Answers as ``omniops.server.inference.Inference`` does; an object is the balloon that it was clicked on.

    Args:
        delay: seconds that a frame of tracking takes.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self._sessions: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
        self._tracking: dict[str, Iterator[int]] = {}

    def describe(self) -> dict[str, Any]:
        return {
            "device": "Stand-in",
            "device_type": "cuda",
            "dtype": "bfloat16",
            "model": "tiny",
            "image_size": 1024,
            "random_weights": False,
        }

    def memory(self) -> dict[str, Any]:
        return {"allocated": None, "total": None, "sessions": {}}

    def open(self, session: str, path: str, guided: bool = False) -> dict[str, Any]:
        self._sessions[session] = {}
        size = {"width": scene.WIDTH, "height": scene.HEIGHT}
        return {"frames": scene.FRAMES, "fps": float(scene.FPS), "bytes": 1000, **size}

    def close(self, session: str) -> None:
        self._sessions.pop(session, None)

    def add(self, session, frame, object, points=(), labels=(), box=None, clear=True) -> Masks:
        prompt = {"points": [list(p) for p in points], "labels": list(labels), "box": box, "mask": False}
        self._sessions[session].setdefault(object, {})[frame] = prompt
        return self._masks(session, frame)

    def add_mask(self, session, frame, object, mask) -> Masks:
        inside = rle.decode(mask).astype(bool)
        y, x = (float(np.median(indices)) for indices in np.nonzero(inside))
        self.add(session, frame, object, [[x / scene.WIDTH, y / scene.HEIGHT]], [1])
        return self._masks(session, frame)

    def clear_frame(self, session, frame, object) -> Masks:
        self._sessions[session][object].pop(frame, None)
        return self._masks(session, frame)

    def clear_video(self, session) -> None:
        self._sessions[session].clear()

    def remove(self, session, object) -> list[tuple[int, Masks]]:
        frames = self._sessions[session].pop(object, {})
        return [(frame, self._masks(session, frame)) for frame in frames] if self._sessions[session] else []

    def preview(self, session, frame, points, labels, box=None) -> dict[str, Any]:
        return rle.encode(_mask({"points": points, "labels": labels, "box": box}, frame, frame))

    def begin_everything(self, session, frame, points_per_side) -> int:
        return frame

    def next_everything(self, session, number) -> list[dict[str, Any]]:
        found = []
        for mask in scene.masks(number):
            y, x = np.nonzero(mask)
            box = [float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)]
            score = {"predicted_iou": 0.9, "stability_score": 0.95}
            found.append({"mask": rle.encode(mask), "area": int(mask.sum()), "box": box, **score})
        return found

    def begin(self, session, start) -> int:
        order = [*range(start, scene.FRAMES), *(range(start, -1, -1) if start else ())]
        self._tracking[session] = iter(order)
        return len(order)

    def next(self, session) -> tuple[int, Masks] | None:
        time.sleep(self.delay)
        frame = next(self._tracking[session], None)
        return None if frame is None else (frame, self._masks(session, frame))

    def stop(self, session) -> None:
        self._tracking.pop(session, None)

    def prompts(self, session) -> dict[int, dict[int, dict[str, Any]]]:
        return self._sessions[session]

    def _masks(self, session: str, frame: int) -> Masks:
        answer = []
        for object, prompts in self._sessions[session].items():
            inside = np.zeros((scene.HEIGHT, scene.WIDTH), bool)
            if prompts:
                clicked = frame if frame in prompts else min(prompts)
                inside = _mask(prompts[clicked], clicked, frame)
            answer.append((object, rle.encode(inside)))
        return answer


def _mask(prompt: dict[str, Any], clicked: int, frame: int) -> NDArray[np.bool_]:
    """On ``frame`` the balloon that was clicked on ``clicked``; nothing where there was none."""
    positions = [point for point, label in zip(prompt["points"], prompt["labels"], strict=True) if label]
    if prompt["box"] is not None:
        x0, y0, x1, y1 = prompt["box"]
        positions = [[(x0 + x1) / 2, (y0 + y1) / 2]]
    there = scene.masks(clicked)
    inside = np.zeros((scene.HEIGHT, scene.WIDTH), bool)
    for x, y in positions:
        column, row = min(int(x * scene.WIDTH), scene.WIDTH - 1), min(int(y * scene.HEIGHT), scene.HEIGHT - 1)
        for balloon in range(len(there)):
            if there[balloon][row, column]:
                inside |= scene.masks(frame)[balloon]
    return inside
