"""What the process of a predictor does for the server: sessions by id, asked and answered in plain data.

``omniops.sam2.remote(model, predictor="omniops.server.inference:Inference")`` runs it in a process of its own. One
thread calls it, one call at a time, and every call is short: a prompt, one frame of a propagation, a batch of points.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Sam2VideoModel

from omniops import device as devices
from omniops.sam2 import rle
from omniops.sam2.architectures import SIZES
from omniops.sam2.frames import FrameError, Frames
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator
from omniops.sam2.state import InferenceState
from omniops.sam2.video_predictor import SAM2VideoPredictor
from omniops.server.prompts import Prompt, checked, joined, whole

RLE = dict[str, Any]
"""{"size": [H, W], "counts": COCO's string}"""
Masks = list[tuple[int, RLE]]
"""The ids of all objects of a session, in the order of their first prompts, and their masks on a frame."""

MAX_OBJECTS = 255
"""Of a session."""
MAX_POINTS_PER_SIDE = 64
"""Of the grid of ``Inference.begin_everything``."""
_SESSIONS_WITH_FEATURES = 32
"""How many sessions keep what the encoder made of the frame that they used last: as many as may be open."""


@dataclass
class Session:
    """A video that is open, and the prompts in it."""

    state: InferenceState
    predictor: SAM2VideoPredictor
    frames: Frames
    """The video, which sessions on the same file share; but a propagation beside another's has a reader of its own."""
    prompts: dict[int, dict[int, Prompt]] = field(default_factory=dict)
    """By object and frame, objects in the order of their first prompts. One whose prompts were all taken back stays."""
    propagation: Generator[tuple[int, list[Any], Tensor], None, None] | None = None
    searches: dict[int, Generator[Any, None, list[dict[str, Any]]]] = field(default_factory=dict)
    """Those of everything on a frame that are not done, by number."""

    def stop(self) -> None:
        """End the propagation."""
        if self.propagation is not None:
            self.propagation.close()
            self.propagation = None
        if self.state.frames is not self.frames:
            self.state.read_from(self.frames)


class Inference:
    """Sessions of one model.

    An object is a number of the caller's, as is a session's id a text. Masks are COCO's RLE at the size of the video,
    and the answers of ``add``, ``add_mask``, ``clear_frame``, ``remove`` and ``next`` have all objects of the session,
    with an empty mask where there is nothing of one. A call that fails leaves all as it was.

    Args:
        model: of ``omniops.sam2.load``.
        options: of ``SAM2VideoPredictor``. By default a correction of a frame that was tracked conditions all others,
            so that it still counts when the video is tracked again.

    Raises:
        KeyError: by every method that takes a session, but ``close``: for one that there is none.
        ValueError: for a wrong argument, or a frame that cannot be decoded, in words for who uses the server.
    """

    def __init__(self, model: Sam2VideoModel, **options: Any) -> None:
        options = {"add_all_frames_to_correct_as_cond": True, **options}
        self.model = model
        self._predictors = {
            guided: SAM2VideoPredictor(model, upsampling="guided" if guided else "bilinear", **options)
            for guided in (False, True)
        }
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # the one used last is the last
        self._begun = 0  # searches for everything
        self._frames: WeakValueDictionary[tuple[object, ...], Frames] = WeakValueDictionary()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def describe(self) -> dict[str, Any]:
        """The device and the model: device, device_type, dtype, model, image_size, random_weights."""
        blocks = list(self.model.config.vision_config.backbone_config.blocks_per_stage)
        return {
            "device": devices.title(self.device),
            "device_type": self.device.type,
            "dtype": str(self.model.vision_encoder.dtype).removeprefix("torch."),
            "model": next((name for name, size in SIZES.items() if list(size.blocks) == blocks), "unknown"),
            "image_size": int(self.model.image_size),
            "random_weights": bool(getattr(self.model, "has_random_weights", False)),
        }

    def memory(self) -> dict[str, Any]:
        """Bytes of the device's memory, ``allocated`` and ``total``, None where unknown, and of ``sessions`` by id."""
        found = devices.memory(self.device)
        sessions = {name: self._bytes(session) for name, session in self._sessions.items()}
        return {"allocated": found.allocated, "total": found.limit, "sessions": sessions}

    def open(self, session: str, path: str, guided: bool = False) -> dict[str, Any]:
        """Open a video, a folder of pictures or a picture: its frames, width, height, fps (None of pictures), bytes.

        Args:
            session: its id, of the caller's choice.
            path: of the file.
            guided: masks follow the colours of the frames, as ``SAM2VideoPredictor(upsampling="guided")``.
        """
        if session in self._sessions:
            raise ValueError("There is a session of that id already.")
        frames = self._opened(path)
        predictor = self._predictors[bool(guided)]
        self._sessions[session] = opened = Session(predictor.init_state(frames), predictor, frames)
        return {
            "frames": len(frames),
            "width": frames.width,
            "height": frames.height,
            "fps": frames.fps,
            "bytes": self._bytes(opened),
        }

    def close(self, session: str) -> None:
        """Forget a session and give its memory back; one that there is none is no error."""
        if session in self._sessions:
            self._sessions.pop(session).stop()
            devices.empty_cache(self.device)

    @devices.exclusively
    @torch.inference_mode()
    def add(
        self,
        session: str,
        frame: int,
        object: int,
        points: Sequence[Sequence[float]] = (),
        labels: Sequence[int] = (),
        box: Sequence[float] | None = None,
        clear: bool = True,
    ) -> Masks:
        """Show an object on a frame, or correct its mask there.

        Args:
            session, frame, object: which.
            points: [x, y] of each, as fractions of the frame's width and height, from 0 to 1.
            labels: 1 for a point of the object, 0 for one that is not.
            box: [x0, y0, x1, y1], as fractions.
            clear: they replace the object's prompts on the frame; else the points join them.

        Returns:
            The masks on that frame.
        """
        used = self._used(session)
        frame = _frame(used, frame)
        object = _object(used, object)
        prompt = checked(points, labels, box)
        before = used.prompts.get(object, {}).get(frame)
        if not clear and before is not None:
            prompt = joined(before, prompt)
        used.stop()
        with used.state.unchanged_on_error(object), _in_words(frame):
            _, ids, logits = used.predictor.add_new_points_or_box(
                used.state,
                frame,
                object,
                points=prompt.points or None,
                labels=prompt.labels or None,
                box=prompt.box,
                normalize_coords=False,
            )
            masks = _masks(used, [*used.prompts, *({object} - set(used.prompts))], ids, logits)
        used.prompts.setdefault(object, {})[frame] = prompt
        return masks

    @devices.exclusively
    @torch.inference_mode()
    def add_mask(self, session: str, frame: int, object: int, mask: RLE) -> Masks:
        """Show an object on a frame by its mask, of the size of the video, in place of its other prompts there.

        Returns:
            The masks on that frame.
        """
        used = self._used(session)
        frame = _frame(used, frame)
        object = _object(used, object)
        inside = _decoded(mask, used.frames)
        used.stop()
        with used.state.unchanged_on_error(object), _in_words(frame):
            _, ids, logits = used.predictor.add_new_mask(used.state, frame, object, inside)
            masks = _masks(used, [*used.prompts, *({object} - set(used.prompts))], ids, logits)
        used.prompts.setdefault(object, {})[frame] = Prompt(mask=True)
        return masks

    @devices.exclusively
    @torch.inference_mode()
    def clear_frame(self, session: str, frame: int, object: int) -> Masks:
        """Take back an object's prompts on a frame; its mask there, if it was tracked, stays until the next tracking.

        Returns:
            The masks on that frame.
        """
        used = self._used(session)
        frame = _frame(used, frame)
        if object not in used.prompts:
            raise ValueError(f"Object {object} is unknown in this session.")
        used.stop()
        with used.state.unchanged_on_error(object), _in_words(frame):
            if object in used.state.obj_ids:
                used.predictor.clear_all_prompts_in_frame(used.state, frame, object, need_output=False)
            masks = _masks_on(used, frame, list(used.prompts))
        used.prompts[object].pop(frame, None)
        return masks

    def clear_video(self, session: str) -> None:
        """Forget all objects; the video stays open."""
        used = self._used(session)
        used.stop()
        for object in used.state.obj_ids:  # not reset_state, which forgets what the encoder made of the frame too
            used.predictor.remove_object(used.state, object, need_output=False)
        used.prompts.clear()

    @devices.exclusively
    @torch.inference_mode()
    def remove(self, session: str, object: int) -> list[tuple[int, Masks]]:
        """Forget an object; the others keep their ids. One that is unknown is no error.

        Returns:
            For each frame where it had prompts the frame and the masks of the other objects; nothing if there are none.
        """
        used = self._used(session)
        if object not in used.prompts:
            return []
        used.stop()
        rest = [each for each in used.prompts if each != object]
        answers = []
        with used.state.unchanged_on_error(object):
            used.predictor.remove_object(used.state, object, need_output=False)
            for frame in sorted(used.prompts[object]) if rest else ():
                with _in_words(frame):
                    answers.append((frame, _masks_on(used, frame, rest)))
        del used.prompts[object]
        return answers

    @devices.exclusively
    @torch.inference_mode()
    def preview(
        self,
        session: str,
        frame: int,
        points: Sequence[Sequence[float]] = (),
        labels: Sequence[int] = (),
        box: Sequence[float] | None = None,
    ) -> RLE:
        """The mask that ``add`` would give a new object; the session and its propagation stay as they are."""
        used = self._used(session)
        frame = _frame(used, frame)
        prompt = checked(points, labels, box)
        with _in_words(frame):
            logits = used.predictor.preview(
                used.state, frame, prompt.points or None, prompt.labels or None, False, prompt.box
            )
            return _encoded(logits)[0]

    def begin_everything(self, session: str, frame: int, points_per_side: int = 16) -> int:
        """Begin to look for everything on a frame, by a grid of points, as ``SAM2AutomaticMaskGenerator`` does.

        Args:
            session, frame: which.
            points_per_side: of the grid of points that the model is asked at, from 1 to 64.

        Returns:
            Its number, for ``next_everything``.
        """
        used = self._used(session)
        frame = _frame(used, frame)
        side = whole("The number of points along a side", points_per_side)
        if not 1 <= side <= MAX_POINTS_PER_SIDE:
            raise ValueError(f"The number of points along a side must be from 1 to {MAX_POINTS_PER_SIDE}, got {side}.")
        # Random weights are never sure and hardly stable: all masks count that are not found twice.
        is_random = getattr(self.model, "has_random_weights", False)
        thresholds: dict[str, Any] = {"pred_iou_thresh": 0, "stability_score_thresh": 0} if is_random else {}
        batch = 16 if self.device.type == "cpu" else 64  # a click waits for one of them
        generator = SAM2AutomaticMaskGenerator(
            self.model, side, points_per_batch=batch, output_mode="coco_rle", **thresholds
        )
        with _in_words(frame):
            steps = generator.steps(used.frames[frame])
        self._begun += 1
        used.searches[self._begun] = steps
        return self._begun

    def next_everything(self, session: str, number: int) -> list[dict[str, Any]] | None:
        """Go on with the next batch of points; one that fails ends what was begun.

        Returns:
            None while there are more. Then the masks, the surest first, for each ``mask``, RLE; ``predicted_iou`` and
            ``stability_score``; ``area`` in pixels; and ``box``, x0, y0, x1, y1 in pixels, of the first pixel and the
            last.
        """
        searches = self._used(session).searches
        steps = searches.pop(number, None)
        if steps is None:
            raise ValueError("This search for everything is over.")
        try:
            next(steps)
        except StopIteration as end:
            return [_record(each) for each in end.value]
        searches[number] = steps
        return None

    def begin(self, session: str, start: int = 0) -> int:
        """Begin to track all objects with prompts: from a frame to the last, then, if it is not the first, back to it.

        A propagation that was going on in the session ends. Objects without prompts have empty masks from here on, also
        on frames where they were tracked before.

        Returns:
            The number of frames that will come by ``next``.
        """
        used = self._used(session)
        start = _frame(used, start)
        if not any(used.prompts.values()):
            raise ValueError("There is nothing to track: show an object first, by points, a box or a mask.")
        used.stop()
        for object, prompts in used.prompts.items():
            if not prompts:
                used.predictor.remove_object(used.state, object, need_output=False)
        if any(each.propagation is not None and each.frames is used.frames for each in self._sessions.values()):
            # One decoder for two places of a long video would seek, and decode again, for every frame.
            used.state.read_from(_another_reader(used.frames))
        used.propagation = _propagation(used, start)
        return len(used.frames) - start + (start + 1 if start > 0 else 0)

    @devices.exclusively
    @torch.inference_mode()
    def next(self, session: str) -> tuple[int, Masks] | None:
        """The next frame of the propagation and the masks on it; None at its end, or where it was ended."""
        used = self._used(session)
        if used.propagation is None:
            return None
        try:
            frame, ids, logits = next(used.propagation)
            return frame, _masks(used, list(used.prompts), ids, logits)
        except BaseException as error:
            used.stop()
            if isinstance(error, StopIteration):
                return None
            raise

    def stop(self, session: str) -> None:
        """End the propagation, if there is one. What was tracked stays."""
        self._used(session).stop()

    def prompts(self, session: str) -> dict[int, dict[int, dict[str, Any]]]:
        """By object, in the order of their first prompts, and by frame: ``points``, ``labels``, ``box`` or None, and
        whether a ``mask`` was given. An object whose prompts were all taken back has no frame."""
        prompts = self._used(session).prompts
        return {object: {t: asdict(prompt) for t, prompt in by_frame.items()} for object, by_frame in prompts.items()}

    def _opened(self, path: str) -> Frames:
        """The frames of a file, those that another session has where it has the same file open."""
        try:
            place = os.path.realpath(path)
            about = os.stat(place)
            key = (place, about.st_ino, about.st_size, about.st_mtime_ns)
            frames = self._frames.get(key)
            if frames is None:
                frames = self._frames[key] = Frames(place)
            return frames
        except (OSError, ValueError) as error:  # whose message has the path
            raise ValueError("The file cannot be read as a video or a picture.") from error

    def _used(self, session: str) -> Session:
        """A session, which from now on is the one that was used last."""
        if session not in self._sessions:
            raise KeyError(session)
        self._sessions.move_to_end(session)
        others = [each for name, each in self._sessions.items() if name != session]
        for each in others[: -_SESSIONS_WITH_FEATURES + 1]:
            each.state.release_features()
        for each in others[-_SESSIONS_WITH_FEATURES + 1 :]:
            each.state.release_features(keep=each.predictor.frames_at_once)
        return self._sessions[session]

    def _bytes(self, session: Session) -> int:
        """Those of its own, and its share of the frames."""
        sharing = sum(each.frames is session.frames for each in self._sessions.values())
        own = session.state.frames.nbytes if session.state.frames is not session.frames else 0
        return session.state.nbytes + session.frames.nbytes // sharing + own


def _another_reader(frames: Frames) -> Frames:
    """One of the same video, or the same one where the file is gone or is another by now."""
    try:
        other = Frames(frames.path)
    except (OSError, ValueError):
        return frames
    is_same = (len(other), other.width, other.height) == (len(frames), frames.width, frames.height)
    return other if is_same else frames


def _propagation(session: Session, start: int) -> Generator[tuple[int, list[Any], Tensor], None, None]:
    """From a frame to the last, then, if it is not the first, back to it.

    Raises:
        ValueError: after all other frames, for one that cannot be decoded.
    """
    damaged = []
    ends = [(len(session.frames) - 1, False), (0, True)] if start > 0 else [(len(session.frames) - 1, False)]
    for end, reverse in ends:
        frame = None
        for found in session.predictor.propagate_in_video(session.state, start, reverse=reverse):
            yield found
            frame = found[0]
        if frame != end:
            damaged.append(start if frame is None else frame + (-1 if reverse else 1))
    if damaged:
        raise ValueError(f"Frame {damaged[0]} cannot be decoded: the file is damaged there, and tracking ended at it.")


def _masks_on(session: Session, frame: int, objects: Sequence[int]) -> Masks:
    _, ids, logits = session.predictor.masks_on_frame(session.state, frame)
    return _masks(session, objects, ids, logits)


def _masks(session: Session, objects: Sequence[int], ids: Sequence[int], logits: Tensor) -> Masks:
    """The masks of all objects, of which some have logits, (N, 1, H, W)."""
    size = [session.frames.height, session.frames.width]
    empty = {"size": size, "counts": rle.compressed(np.array([size[0] * size[1]]))}
    found = dict(zip(ids, _encoded(logits), strict=True))
    return [(object, found.get(object, empty)) for object in objects]


def _encoded(logits: Tensor) -> list[RLE]:
    """(N, 1, H, W), above 0 inside."""
    size = list(logits.shape[-2:])
    return [{"size": size, "counts": rle.compressed(counts)} for counts in rle.runs(logits[:, 0] > 0)]


def _record(found: dict[str, Any]) -> dict[str, Any]:
    x, y, width, height = found["bbox"]
    return {
        "mask": found["segmentation"],
        "predicted_iou": found["predicted_iou"],
        "stability_score": found["stability_score"],
        "area": found["area"],
        "box": [x, y, x + width, y + height],
    }


@contextmanager
def _in_words(frame: int) -> Iterator[None]:
    """Within it a frame that cannot be decoded is an error without the path of the file."""
    try:
        yield
    except FrameError as error:
        raise ValueError(f"Frame {frame} cannot be decoded: the file is damaged there.") from error


def _frame(session: Session, value: object) -> int:
    frame = whole("The frame", value)
    if not 0 <= frame < len(session.frames):
        raise ValueError(f"There is no frame {frame}: the video has frames 0 to {len(session.frames) - 1}.")
    return frame


def _object(session: Session, value: object) -> int:
    object = whole("The object", value)
    if object not in session.prompts and len(session.prompts) >= MAX_OBJECTS:
        raise ValueError(f"A session has at most {MAX_OBJECTS} objects: remove one first.")
    return object


def _decoded(mask: RLE, frames: Frames) -> NDArray[np.bool_]:
    size = [frames.height, frames.width]
    if not isinstance(mask, dict) or mask.get("size") not in (size, tuple(size)):
        raise ValueError(f"The mask must be of the size of the video, {size} (height, width).")
    try:
        return rle.decode({"size": size, "counts": mask["counts"]})
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("The counts of the mask are not COCO's of a mask of that size.") from None
