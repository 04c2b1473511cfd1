"""What an interrupted ``omniops segment`` keeps of a video, and how ``--resume`` goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from omniops.cli.common import CommandError
from omniops.cli.errors import reason, say
from omniops.cli.segment.files import state_of
from omniops.cli.segment.prompts import Prompts
from omniops.cli.segment.request import Request

if TYPE_CHECKING:
    from omniops.sam2.inference_state import InferenceState
    from omniops.sam2.video_predictor import SAM2VideoPredictor

_SECONDS_BETWEEN_SAVES = 20.0
_SHARE_OF_TIME = 20
"""Saving takes at most one part in so many of the time: of long videos it is seldom."""
_TOLERANCE = 0.01
"""Of a prompt's place, in pixels, which the state has as float32 of another size."""


class KeptState:
    """The file of a video's state: there from the first frame on, written anew now and then, and deleted at the end.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0.0

    def save_now_and_then(self, state: InferenceState) -> None:
        """Save where it is time; a failure is said, and tried again later."""
        if perf_counter() >= self._next:
            self.save(state)

    def save(self, state: InferenceState) -> None:
        """Save between two frames."""
        started = perf_counter()
        try:
            state.save(self._path)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no memory
            say(f"--resume will not find the last frames: cannot write {self._path}: {reason(error)}", "warning")
        ended = perf_counter()
        self._next = ended + max(_SECONDS_BETWEEN_SAVES, _SHARE_OF_TIME * (ended - started))

    def delete(self) -> None:
        """Nothing is left to go on with."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def load_state(
    predictor: SAM2VideoPredictor, request: Request, prompts: Mapping[tuple[int, int], Prompts]
) -> InferenceState | None:
    """The state that an earlier run of the same command has left; None where there is none."""
    path, source = state_of(request.out), request.source.path
    assert source is not None
    if not path.exists():
        return None
    try:
        state = predictor.load_state(path, source)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(
            f"{reason(error)}: without --resume, and with --overwrite, it begins anew", status=1
        ) from None
    if not _has_prompts(state, prompts):
        raise CommandError(f"{path} is of other prompts: --resume goes on with those of the run that was interrupted")
    return state


def tracked_frames(state: InferenceState) -> set[int]:
    """The frames to which all objects were tracked."""
    return set.intersection(*(set(frames) for frames in state.tracked_frames.values()))


def _has_prompts(state: InferenceState, prompts: Mapping[tuple[int, int], Prompts]) -> bool:
    scale = np.array([state.video_width, state.video_height]) / state.images.image_size
    saved = {
        (frame, state.obj_idx_to_id[index]): (inputs["point_coords"][0].cpu().numpy() * scale, inputs["point_labels"])
        for index, frames in state.point_inputs_per_obj.items()
        for frame, inputs in frames.items()
    }
    if saved.keys() != prompts.keys():
        return False
    for key, (points, labels) in saved.items():
        given = prompts[key]
        corners = [] if given.box is None else [given.box[:2], given.box[2:]]
        expected = np.array([*corners, *given.points], np.float64)
        kinds = [*([] if given.box is None else [2, 3]), *given.labels]  # as the prompt encoder numbers corners
        if kinds != labels[0].tolist() or not np.allclose(points, expected, rtol=0, atol=_TOLERANCE):
            return False
    return True
