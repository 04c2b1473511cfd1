"""The server's sessions in the predictor's process, whose methods take and return plain data.

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

import torch
from torch import Tensor

from omniops import device as devices
from omniops.sam2.architectures import SIZES
from omniops.sam2.frames import FrameError, Frames
from omniops.sam2.inference_state import InferenceState
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.sam2.video_predictor import SAM2VideoPredictor
from omniops.server.masks import RLE, Masks, decode_mask, masks_of_objects, to_record, to_rle
from omniops.server.prompts import Prompt, append_points, make_prompt, require_int

MAX_OBJECTS = 255
"""Of a session."""
MAX_POINTS_PER_SIDE = 64
"""Of the grid of ``Inference.begin_everything``."""
SESSIONS_WITH_FEATURES = 32
"""How many sessions keep the image encoder's features of the frame that they used last: as many as may be open."""


@dataclass
class Session:
    """A video that is open, and the prompts in it."""

    state: InferenceState
    predictor: SAM2VideoPredictor
    frames: Frames
    """The video, shared by sessions on the same file; a propagation beside another one has a reader of its own."""
    prompts: dict[int, dict[int, Prompt]] = field(default_factory=dict)
    """By object and frame, objects in the order of their first prompts. All prompts of one may have been taken back."""
    propagation: Generator[tuple[int, list[Any], Tensor], None, None] | None = None
    searches: dict[int, Generator[Any, None, list[dict[str, Any]]]] = field(default_factory=dict)
    """The unfinished searches for everything on a frame, by number."""

    def stop(self) -> None:
        """End the propagation."""
        if self.propagation is not None:
            self.propagation.close()
            self.propagation = None
        if self.state.frames is not self.frames:
            self.state.read_from(self.frames)


class Inference:
    """Sessions of one model.

    The caller numbers the objects, and chooses the sessions' ids, texts. Masks are COCO's RLE at the size of the video,
    and the answers of ``add``, ``add_mask``, ``clear_frame``, ``remove`` and ``next`` have all objects of the session,
    an empty one where an object is not on the frame. A call that fails changes nothing.

    Args:
        model: of ``omniops.sam2.load``.
        options: of ``SAM2VideoPredictor``. By default a correction of a frame that was tracked conditions all others,
            so that it still counts when the video is tracked again.

    Raises:
        KeyError: by every method that takes a session, but ``close``: for an unknown one.
        ValueError: for a wrong argument, or a frame that cannot be decoded, in words for the users of the server.
    """

    def __init__(self, model: SAM2Base, **options: Any) -> None:
        options = {"add_all_frames_to_correct_as_cond": True, **options}
        self.model = model
        self._predictors = {
            guided: SAM2VideoPredictor(model, upsampling="guided" if guided else "bilinear", **options)
            for guided in (False, True)
        }
        self.sessions: OrderedDict[str, Session] = OrderedDict()  # in the order of their last use
        self._num_searches = 0
        self.open_frames: WeakValueDictionary[tuple[object, ...], Frames] = WeakValueDictionary()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def describe(self) -> dict[str, Any]:
        """The device and the model: device, device_type, dtype, model, image_size, random_weights."""
        trunk = self.model.image_encoder.trunk.size
        return {
            "device": devices.title(self.device),
            "device_type": self.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "model": next((name for name, size in SIZES.items() if size == trunk), "unknown"),
            "image_size": self.model.image_size,
            "random_weights": self.model.has_random_weights,
        }

    def memory(self) -> dict[str, Any]:
        """Bytes of the device's memory, ``allocated`` and ``total``, None where unknown, and of ``sessions`` by id."""
        found = devices.memory(self.device)
        sessions = {name: self._nbytes(session) for name, session in self.sessions.items()}
        return {"allocated": found.allocated, "total": found.limit, "sessions": sessions}

    def open(self, session: str, path: str, guided: bool = False) -> dict[str, Any]:
        """Open a video, a folder of pictures or a picture: its frames, width, height, fps (None of pictures), bytes.

        Args:
            session: its id, of the caller's choice.
            path: of the file.
            guided: masks follow the colours of the frames, as ``SAM2VideoPredictor(upsampling="guided")``.
        """
        if session in self.sessions:
            raise ValueError("There is a session of that id already.")
        frames = self._open_frames(path)
        predictor = self._predictors[bool(guided)]
        self.sessions[session] = opened = Session(predictor.init_state(frames), predictor, frames)
        return {
            "frames": len(frames),
            "width": frames.width,
            "height": frames.height,
            "fps": frames.fps,
            "bytes": self._nbytes(opened),
        }

    def close(self, session: str) -> None:
        """Forget a session and give its memory back; one that there is none is no error."""
        if session in self.sessions:
            self.sessions.pop(session).stop()
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
        opened = self._use(session)
        frame = _check_frame(opened, frame)
        object = _check_object(opened, object)
        prompt = make_prompt(points, labels, box)
        previous = opened.prompts.get(object, {}).get(frame)
        if not clear and previous is not None:
            prompt = append_points(previous, prompt)
        opened.stop()
        with opened.state.unchanged_on_error(object), _plain_frame_errors(frame):
            _, ids, logits = opened.predictor.add_new_points_or_box(
                opened.state,
                frame,
                object,
                points=prompt.points or None,
                labels=prompt.labels or None,
                box=prompt.box,
                normalize_coords=False,
            )
            masks = masks_of_objects([*opened.prompts, *({object} - set(opened.prompts))], ids, logits, opened.frames)
        opened.prompts.setdefault(object, {})[frame] = prompt
        return masks

    @devices.exclusively
    @torch.inference_mode()
    def add_mask(self, session: str, frame: int, object: int, mask: RLE) -> Masks:
        """Show an object on a frame by its mask, of the size of the video, in place of its other prompts there.

        Returns:
            The masks on that frame.
        """
        opened = self._use(session)
        frame = _check_frame(opened, frame)
        object = _check_object(opened, object)
        inside = decode_mask(mask, opened.frames)
        opened.stop()
        with opened.state.unchanged_on_error(object), _plain_frame_errors(frame):
            _, ids, logits = opened.predictor.add_new_mask(opened.state, frame, object, inside)
            masks = masks_of_objects([*opened.prompts, *({object} - set(opened.prompts))], ids, logits, opened.frames)
        opened.prompts.setdefault(object, {})[frame] = Prompt(mask=True)
        return masks

    @devices.exclusively
    @torch.inference_mode()
    def clear_frame(self, session: str, frame: int, object: int) -> Masks:
        """Take back an object's prompts on a frame; its mask there, if it was tracked, stays until the next tracking.

        Returns:
            The masks on that frame.
        """
        opened = self._use(session)
        frame = _check_frame(opened, frame)
        if object not in opened.prompts:
            raise ValueError(f"Object {object} is unknown in this session.")
        opened.stop()
        with opened.state.unchanged_on_error(object), _plain_frame_errors(frame):
            if object in opened.state.obj_ids:
                opened.predictor.clear_all_prompts_in_frame(opened.state, frame, object, need_output=False)
            masks = _masks_on(opened, frame, list(opened.prompts))
        opened.prompts[object].pop(frame, None)
        return masks

    def clear_video(self, session: str) -> None:
        """Forget all objects; the video stays open."""
        opened = self._use(session)
        opened.stop()
        for object in opened.state.obj_ids:  # not reset_state, which would release the features of frames too
            opened.predictor.remove_object(opened.state, object, need_output=False)
        opened.prompts.clear()

    @devices.exclusively
    @torch.inference_mode()
    def remove(self, session: str, object: int) -> list[tuple[int, Masks]]:
        """Forget an object; the others keep their ids. One that is unknown is no error.

        Returns:
            For each frame where it had prompts the frame and the masks of the other objects; nothing if there are none.
        """
        opened = self._use(session)
        if object not in opened.prompts:
            return []
        opened.stop()
        others = [other for other in opened.prompts if other != object]
        answers = []
        with opened.state.unchanged_on_error(object):
            opened.predictor.remove_object(opened.state, object, need_output=False)
            for frame in sorted(opened.prompts[object]) if others else ():
                with _plain_frame_errors(frame):
                    answers.append((frame, _masks_on(opened, frame, others)))
        del opened.prompts[object]
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
        opened = self._use(session)
        frame = _check_frame(opened, frame)
        prompt = make_prompt(points, labels, box)
        with _plain_frame_errors(frame):
            logits = opened.predictor.preview(
                opened.state, frame, prompt.points or None, prompt.labels or None, False, prompt.box
            )
            return to_rle(logits)[0]

    def begin_everything(self, session: str, frame: int, points_per_side: int = 16) -> int:
        """Begin to look for everything on a frame, by a grid of points, as ``SAM2AutomaticMaskGenerator`` does.

        Args:
            session, frame: which.
            points_per_side: of the grid of points that the model is asked at, from 1 to 64.

        Returns:
            Its number, for ``next_everything``.
        """
        opened = self._use(session)
        frame = _check_frame(opened, frame)
        side = require_int("The number of points along a side", points_per_side)
        if not 1 <= side <= MAX_POINTS_PER_SIDE:
            raise ValueError(f"The number of points along a side must be from 1 to {MAX_POINTS_PER_SIDE}, got {side}.")
        # Masks of random weights have low scores and are hardly stable: no threshold leaves them out.
        is_random = getattr(self.model, "has_random_weights", False)
        thresholds: dict[str, Any] = {"pred_iou_thresh": 0, "stability_score_thresh": 0} if is_random else {}
        batch = 16 if self.device.type == "cpu" else 64  # a click has to wait for the end of a batch
        generator = SAM2AutomaticMaskGenerator(
            self.model, side, points_per_batch=batch, output_mode="coco_rle", **thresholds
        )
        with _plain_frame_errors(frame):
            steps = generator.steps(opened.frames[frame])
        self._num_searches += 1
        opened.searches[self._num_searches] = steps
        return self._num_searches

    def next_everything(self, session: str, number: int) -> list[dict[str, Any]] | None:
        """Go on with the next batch of points; one that fails ends what was begun.

        Returns:
            None while there are more. Then the masks, the surest first, for each ``mask``, RLE; ``predicted_iou`` and
            ``stability_score``; ``area`` in pixels; and ``box``, x0, y0, x1, y1 in pixels, of the first pixel and the
            last.
        """
        searches = self._use(session).searches
        steps = searches.pop(number, None)
        if steps is None:
            raise ValueError("This search for everything is over.")
        try:
            next(steps)
        except StopIteration as end:
            return [to_record(mask) for mask in end.value]
        searches[number] = steps
        return None

    def begin(self, session: str, start: int = 0) -> int:
        """Begin to track all objects with prompts: from a frame to the last, then, if it is not the first, back to it.

        A propagation that was going on in the session ends. Objects without prompts have empty masks from here on, also
        on frames where they were tracked before.

        Returns:
            The number of frames that will come by ``next``.
        """
        opened = self._use(session)
        start = _check_frame(opened, start)
        if not any(opened.prompts.values()):
            raise ValueError("There is nothing to track: show an object first, by points, a box or a mask.")
        opened.stop()
        for object, prompts in opened.prompts.items():
            if not prompts:
                opened.predictor.remove_object(opened.state, object, need_output=False)
        if any(other.propagation is not None and other.frames is opened.frames for other in self.sessions.values()):
            # One decoder at two positions of a long video would seek, and decode a group again, for every frame.
            opened.state.read_from(_another_reader_of(opened.frames))
        opened.propagation = _propagation(opened, start)
        return len(opened.frames) - start + (start + 1 if start > 0 else 0)

    @devices.exclusively
    @torch.inference_mode()
    def next(self, session: str) -> tuple[int, Masks] | None:
        """The next frame of the propagation and the masks on it; None at its end, or where it was ended."""
        opened = self._use(session)
        if opened.propagation is None:
            return None
        try:
            frame, ids, logits = next(opened.propagation)
            return frame, masks_of_objects(list(opened.prompts), ids, logits, opened.frames)
        except BaseException as error:
            opened.stop()
            if isinstance(error, StopIteration):
                return None
            raise

    def stop(self, session: str) -> None:
        """End the propagation, if there is one. What was tracked stays."""
        self._use(session).stop()

    def prompts(self, session: str) -> dict[int, dict[int, dict[str, Any]]]:
        """By object, in the order of their first prompts, and by frame: ``points``, ``labels``, ``box`` or None, and
        whether a ``mask`` was given. An object whose prompts were all taken back has no frame."""
        prompts = self._use(session).prompts
        return {object: {t: asdict(prompt) for t, prompt in by_frame.items()} for object, by_frame in prompts.items()}

    def _open_frames(self, path: str) -> Frames:
        """The frames of a file, those of another session where it has the same file open."""
        try:
            path = os.path.realpath(path)
            status = os.stat(path)
            key = (path, status.st_ino, status.st_size, status.st_mtime_ns)
            frames = self.open_frames.get(key)
            if frames is None:
                frames = self.open_frames[key] = Frames(path)
            return frames
        except (OSError, ValueError) as error:  # the message of which has the path
            raise ValueError("The file cannot be read as a video or a picture.") from error

    def _use(self, session: str) -> Session:
        """A session, now the one that was used last. Sessions that have not been used for long release features."""
        if session not in self.sessions:
            raise KeyError(session)
        self.sessions.move_to_end(session)
        others = [other for name, other in self.sessions.items() if name != session]
        for other in others[: -SESSIONS_WITH_FEATURES + 1]:
            other.state.release_features()
        for other in others[-SESSIONS_WITH_FEATURES + 1 :]:
            other.state.release_features(keep=other.predictor.frames_at_once)
        return self.sessions[session]

    def _nbytes(self, session: Session) -> int:
        """Bytes of its state and its own reader of frames, and its share of the frames that sessions share."""
        num_sharing = sum(other.frames is session.frames for other in self.sessions.values())
        own_reader = session.state.frames.nbytes if session.state.frames is not session.frames else 0
        return session.state.nbytes + session.frames.nbytes // num_sharing + own_reader


def _another_reader_of(frames: Frames) -> Frames:
    """Another reader of the same video; the same one where the file is gone or has changed."""
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
    damaged_frames = []
    ends = [(len(session.frames) - 1, False), (0, True)] if start > 0 else [(len(session.frames) - 1, False)]
    for end, reverse in ends:
        frame = None
        for result in session.predictor.propagate_in_video(session.state, start, reverse=reverse):
            yield result
            frame = result[0]
        if frame != end:
            damaged_frames.append(start if frame is None else frame + (-1 if reverse else 1))
    if damaged_frames:
        raise ValueError(
            f"Frame {damaged_frames[0]} cannot be decoded: the file is damaged there, and tracking ended at it."
        )


def _masks_on(session: Session, frame: int, objects: Sequence[int]) -> Masks:
    _, ids, logits = session.predictor.masks_on_frame(session.state, frame)
    return masks_of_objects(objects, ids, logits, session.frames)


@contextmanager
def _plain_frame_errors(frame: int) -> Iterator[None]:
    """Within it a frame that cannot be decoded is an error without the path of the file."""
    try:
        yield
    except FrameError as error:
        raise ValueError(f"Frame {frame} cannot be decoded: the file is damaged there.") from error


def _check_frame(session: Session, value: object) -> int:
    frame = require_int("The frame", value)
    if not 0 <= frame < len(session.frames):
        raise ValueError(f"There is no frame {frame}: the video has frames 0 to {len(session.frames) - 1}.")
    return frame


def _check_object(session: Session, value: object) -> int:
    object = require_int("The object", value)
    if object not in session.prompts and len(session.prompts) >= MAX_OBJECTS:
        raise ValueError(f"A session has at most {MAX_OBJECTS} objects: remove one first.")
    return object
