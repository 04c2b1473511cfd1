"""Masks of objects through a video, with the names, arguments and results of the official ``SAM2VideoPredictor``.

As in the official predictor: which frames condition which, what a correction sees, what the memory encoder is given,
hole filling, and the frames' pre-processing. With the same weights the mask logits are the same. So is this: a
correction, after a propagation, of a frame with a first prompt shows in the call's result, but the next propagation
goes on from the first prompt (``reset_state`` or ``clear_all_prompts_in_frame`` takes that back).

What differs:

- Frames are decoded when they are needed and never kept on the device, so ``init_state`` returns at once, and
  ``offload_video_to_cpu`` and ``async_loading_frames`` have nothing left to do: while the model is at one frame of
  ``propagate_in_video`` threads decode the next eight. See ``omniops.sam2.frames``.
- Objects that look back at the same frames run as one batch, the official predictor's one by one.
- What is kept of a frame that was tracked. The official predictor keeps its map and mask as long as the state lives,
  0.75 MB for every frame and object at a size of 1024. Here the last 16 frames of each object keep them. Of an earlier
  one a pointer stays, about 3 kB, and its low-resolution mask goes to a temporary file without a name (where
  ``tempfile.gettempdir()`` says): 256 KiB for every frame and object at 1024, or 128 where the model computes in half
  precision. Where a frame looks back at such frames, as a correction does, their maps are made again, from the frame
  and that mask: the results do not change, but for the rounding of a given mask's edge in half precision. Frames with
  first prompts keep all.
- On CUDA four frames are encoded as one batch, so that a caller who breaks off may have three encoded in vain.
- A clear error comes before the model runs, ``ValueError`` or ``TypeError``, and leaves the state as it was. Unknown
  objects and frames are such errors. There is no progress bar.
- Where all first prompts of an object were taken back, the next one is a first prompt, on any frame. The official
  predictor fails on one that was tracked.
- A video that breaks off gives the masks of its frames up to there, then a warning that names the frame.
- ``clear_non_cond_mem_around_input``, for which the official package (1.1.0) calls a method that it does not have,
  works. It leaves the frame with the prompt itself alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import Sam2VideoModel

from omniops import device as devices
from omniops.sam2 import memory, network
from omniops.sam2.arguments import an_int, tensor
from omniops.sam2.checkpoints import require_model
from omniops.sam2.frames import FrameError, Frames
from omniops.sam2.state import InferenceState, a_frame, a_state, a_track
from omniops.sam2.tracking import Tracking, is_first, is_new

_AHEAD = 8
"""How many frames are decoded before the model comes to them, 3 MB each at 1024."""
_LOADERS = 4
"""The threads that decode them: a GPU is faster than one thread at decoding and resizing pictures."""

MasksOnFrame = tuple[int, list[Any], Tensor]
"""The frame, the objects' ids, and their mask logits (N, 1, H, W) at the size of the video, above 0 inside."""


class SAM2VideoPredictor(Tracking):
    """Follows objects through a video, from points, boxes or masks on any of its frames.

    Its methods may be called from several threads, for states of their own. On an Apple GPU they wait for each other, a
    frame of ``propagate_in_video`` at a time; what a thread does there with the masks that it gets, ``masks.cpu()``
    too, belongs within ``omniops.device.exclusive(predictor.device)``.

    Args:
        model: of ``omniops.sam2.load``.
        fill_hole_area: holes up to that many pixels of the low-resolution mask (a quarter of the resized frame) are
            filled; 0 for none. 8 as the official ``build_sam2_video_predictor`` has it.
        non_overlap_masks: a pixel belongs to the object with the highest logit there alone.
        clear_non_cond_mem_around_input: forget what was tracked within ``num_maskmem`` (7) frames of a new prompt,
            which may show the object as it was before a correction.
        add_all_frames_to_correct_as_cond: corrections of tracked frames condition all other frames, as first prompts
            do.
        binarize_mask_from_pts_for_mem_enc: what is remembered of a frame with prompts is its mask as it is seen,
            inside or outside; else how sure the model is of each pixel, as on tracked frames. As the official
            ``build_sam2_video_predictor`` has it.
        max_cond_frames_in_attn: at most so many frames with first prompts condition a frame, those nearest to it: the
            last before, the next after, then the others; -1 for all.
        upsampling: how masks come to the size of the video: ``bilinear`` as in the official predictor, or ``guided``
            by the frame's colours, with edges that follow its own (``omniops.sam2.upsampling``). What is remembered of
            a frame is the same.

    Raises:
        TypeError: where ``model`` or an argument is something else.
        ValueError: for an area below 0, less than 2 frames that are not -1, or another way of upsampling.
    """

    def __init__(
        self,
        model: Sam2VideoModel,
        *,
        fill_hole_area: int = 8,
        non_overlap_masks: bool = False,
        clear_non_cond_mem_around_input: bool = False,
        add_all_frames_to_correct_as_cond: bool = False,
        binarize_mask_from_pts_for_mem_enc: bool = True,
        max_cond_frames_in_attn: int = -1,
        upsampling: str = "bilinear",
    ) -> None:
        require_model(model, "model")
        self.model = model
        self.fill_hole_area = an_int("fill_hole_area", fill_hole_area)
        if self.fill_hole_area < 0:
            raise ValueError(f"fill_hole_area must not be negative, got {fill_hole_area}")
        self.non_overlap_masks = non_overlap_masks
        self.clear_non_cond_mem_around_input = clear_non_cond_mem_around_input
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond
        self.binarize_mask_from_pts_for_mem_enc = binarize_mask_from_pts_for_mem_enc
        self.max_cond_frames_in_attn = an_int("max_cond_frames_in_attn", max_cond_frames_in_attn)
        if self.max_cond_frames_in_attn != -1 and self.max_cond_frames_in_attn < 2:
            raise ValueError(f"max_cond_frames_in_attn must be -1 or at least 2, got {max_cond_frames_in_attn}")
        if upsampling not in ("bilinear", "guided"):
            raise ValueError(f"upsampling must be bilinear or guided, got {upsampling!r}")
        self.upsampling = upsampling

    def init_state(
        self,
        video_path: str | PathLike[str] | Frames,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
    ) -> InferenceState:
        """Open a video.

        Args:
            video_path: a video file of any kind that FFmpeg reads, or a folder of pictures, as ``Frames`` takes them,
                or ``Frames`` themselves, which several states may share.
            offload_video_to_cpu: no matter: frames are on the CPU until the encoder is given one.
            offload_state_to_cpu: keep masks and memories on the CPU; slower on a GPU, for many objects.
            async_loading_frames: no matter: frames are loaded when they are needed.

        Raises:
            FileNotFoundError, ImportError, TypeError, ValueError: as ``Frames``.
        """
        frames = video_path if isinstance(video_path, Frames) else Frames(video_path)
        return InferenceState(frames, self.image_size, self.device, offload_video_to_cpu, offload_state_to_cpu)

    @devices.exclusively
    @torch.inference_mode()
    def add_new_points_or_box(
        self,
        inference_state: InferenceState,
        frame_idx: int,
        obj_id: Hashable,
        points: ArrayLike | Tensor | None = None,
        labels: ArrayLike | Tensor | None = None,
        clear_old_points: bool = True,
        normalize_coords: bool = True,
        box: ArrayLike | Tensor | None = None,
    ) -> MasksOnFrame:
        """Show an object on a frame, new or known, or correct its mask there.

        Args:
            inference_state: of ``init_state``.
            frame_idx: from 0 to ``num_frames`` - 1.
            obj_id: a number or a name of your choice.
            points: (P, 2), x and y in pixels of the video.
            labels: (P), 1 where a point is of the object and 0 where it is not; -1 for a point to ignore.
            clear_old_points: the points replace those given before for this object and frame; else they join them.
            normalize_coords: the coordinates are pixels; else fractions of the frame, from 0 to 1.
            box: (4), x0, y0, x1, y1; points may come with it.

        Returns:
            The frame, all objects' ids, and their mask logits on this frame, (N, 1, H, W), float32, above 0 inside;
            -1024 for an object that is unknown there.

        Raises:
            TypeError: for arguments of wrong types.
            ValueError: for a frame that there is none, wrong shapes, labels, boxes, or no prompt at all.
        """
        state = a_state(inference_state)
        frame = a_frame(state, "frame_idx", frame_idx)
        where, which = self._prompt(state, points, labels, box, clear_old_points, normalize_coords)
        track = a_track(state, obj_id)
        if not clear_old_points and frame in track.points:
            before = track.points[frame]
            where, which = torch.cat((before[0], where), dim=1), torch.cat((before[1], which), dim=1)
        first = is_first(track, frame)
        conditioning = first or self.add_all_frames_to_correct_as_cond
        latest = track.latest(frame, conditioning)
        # As SAM was trained: a mask to correct is given within these bounds.
        mask = None if latest is None else self._mask(latest).clamp(-network.LARGEST_LOGIT, network.LARGEST_LOGIT)
        with network.precision(self.model):
            features = self._features(state, frame)
            if first:
                embedding = network.without_memory(self.model, features.embedding)
            else:
                embedding = self._conditioned(state, [track], frame, features, reverse=track.reverse[frame])
            seen = memory.segment(self.model, features, embedding, where, which, mask)
        with state.unchanged_on_error(obj_id):
            track.points[frame] = where, which
            track.prompted.add(frame)
            track.new(conditioning)[frame] = self._outputs(state, seen, prompted=True)[0]
            state._tracks[obj_id] = track
            return frame, state.obj_ids, self._masks_on(state, frame, conditioning)

    def add_new_points(self, *args: Any, **kwargs: Any) -> MasksOnFrame:
        """``add_new_points_or_box`` by its older name."""
        return self.add_new_points_or_box(*args, **kwargs)

    @devices.exclusively
    @torch.inference_mode()
    def add_new_mask(
        self, inference_state: InferenceState, frame_idx: int, obj_id: Hashable, mask: ArrayLike | Tensor
    ) -> MasksOnFrame:
        """Show an object on a frame by its mask, which is taken as it is.

        Args:
            inference_state, frame_idx, obj_id: as in ``add_new_points_or_box``.
            mask: (H, W), above 0 or True inside, of any size: it is resized to the frame's.

        Returns:
            As ``add_new_points_or_box``.

        Raises:
            TypeError: for arguments of wrong types.
            ValueError: for a frame that there is none, or a mask of another shape.
        """
        state = a_state(inference_state)
        frame = a_frame(state, "frame_idx", frame_idx)
        inside = tensor("mask", mask)
        if inside.dim() != 2 or 0 in inside.shape:
            raise ValueError(f"mask must be (H, W) with H, W >= 1, got {tuple(inside.shape)}")
        binary = (inside > 0).float()[None, None].to(self.device)
        if binary.shape[-2:] != (self.image_size, self.image_size):
            # Antialiased, as the official predictor; on the CPU, because not every device has it.
            size = (self.image_size, self.image_size)
            smooth = F.interpolate(binary.cpu(), size, mode="bilinear", align_corners=False, antialias=True)
            binary = (smooth >= 0.5).float().to(self.device)
        track = a_track(state, obj_id)
        conditioning = is_first(track, frame) or self.add_all_frames_to_correct_as_cond
        with network.precision(self.model):
            seen = memory.given(self.model, self._features(state, frame), binary)
        with state.unchanged_on_error(obj_id):
            track.points.pop(frame, None)
            track.prompted.add(frame)
            track.new(conditioning)[frame] = self._outputs(state, seen, prompted=True)[0]
            state._tracks[obj_id] = track
            return frame, state.obj_ids, self._masks_on(state, frame, conditioning)

    @devices.exclusively
    @torch.inference_mode()
    def preview(
        self,
        inference_state: InferenceState,
        frame_idx: int,
        points: ArrayLike | Tensor | None = None,
        labels: ArrayLike | Tensor | None = None,
        normalize_coords: bool = True,
        box: ArrayLike | Tensor | None = None,
    ) -> Tensor:
        """The mask that a prompt would give a new object, as where a pointer is over it; the state stays as it is.

        The encoder's features of the frame are kept, so that only the first preview on a frame waits for them.

        Args:
            inference_state, frame_idx, points, labels, normalize_coords, box: as in ``add_new_points_or_box``.

        Returns:
            Mask logits, (1, 1, H, W), float32, above 0 inside.

        Raises:
            TypeError, ValueError: as ``add_new_points_or_box``.
        """
        state = a_state(inference_state)
        frame = a_frame(state, "frame_idx", frame_idx)
        where, which = self._prompt(state, points, labels, box, True, normalize_coords)
        with network.precision(self.model):
            features = self._features(state, frame)
            embedding = network.without_memory(self.model, features.embedding)
            seen = memory.segment(self.model, features, embedding, where, which)
        return self._resized(state, frame, self._outputs(state, seen, prompted=True))

    @torch.inference_mode()
    def propagate_in_video(
        self,
        inference_state: InferenceState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[MasksOnFrame]:
        """Track all objects from frame to frame.

        Args:
            inference_state: of ``init_state``.
            start_frame_idx: the first frame; by default the earliest with a prompt.
            max_frame_num_to_track: how many frames to track after the first; by default all.
            reverse: towards the beginning of the video.

        Yields:
            For each frame what ``add_new_points_or_box`` returns. It may be broken off and called again.

        Raises:
            ValueError: where an object has no prompt, or there is none, or an argument is out of range.

        Warns:
            UserWarning: where a frame cannot be decoded; it ends there.
        """
        state = a_state(inference_state)
        if start_frame_idx is not None:
            start_frame_idx = a_frame(state, "start_frame_idx", start_frame_idx)
        count = state.num_frames
        if max_frame_num_to_track is not None:
            count = an_int("max_frame_num_to_track", max_frame_num_to_track)
        if count < 0:
            raise ValueError(f"max_frame_num_to_track must not be negative, got {count}")
        with devices.exclusive(self.device):
            self._settle(state)
        tracks = dict(state._tracks)
        start = min(t for track in tracks.values() for t in track.conditioning)
        if start_frame_idx is not None:
            start = start_frame_idx
        if reverse:  # from the first frame there is no way back
            order = range(start, max(start - count, 0) - 1, -1) if start > 0 else range(0)
        else:
            order = range(start, min(start + count, state.num_frames - 1) + 1)
        images = state._images
        with ThreadPoolExecutor(_LOADERS) as pool:
            try:
                for position, frame in enumerate(order, start=1):
                    coming = order[position : position + _AHEAD]
                    images.load([t for t in (frame, *coming) if t not in state._features], pool)
                    masks = self._propagate(state, tracks, frame, coming, reverse)
                    yield frame, list(tracks), masks
            except FrameError as error:
                warnings.warn(f"the masks end before frame {frame} of {len(state.frames)}: {error}", stacklevel=2)
            finally:  # also where it is broken off
                images.load((), pool)

    @devices.exclusively
    @torch.inference_mode()
    def clear_all_prompts_in_frame(
        self, inference_state: InferenceState, frame_idx: int, obj_id: Hashable, need_output: bool = True
    ) -> MasksOnFrame | None:
        """Take back an object's prompts on a frame; its mask there, if it was propagated, stays as if tracked.

        Returns:
            As ``add_new_points_or_box``, or None without ``need_output``.

        Raises:
            ValueError: for a frame or an object that there is none.
        """
        state = a_state(inference_state)
        frame = a_frame(state, "frame_idx", frame_idx)
        if obj_id not in state._tracks:
            raise ValueError(f"obj_id {obj_id!r} is unknown: the objects are {state.obj_ids}")
        self._clear(state, state._tracks[obj_id], frame)
        if not need_output:
            return None
        return frame, state.obj_ids, self._masks_on(state, frame, is_new(state, frame))

    @devices.exclusively
    @torch.inference_mode()
    def masks_on_frame(self, inference_state: InferenceState, frame_idx: int) -> MasksOnFrame:
        """What is known of all objects on a frame, as ``add_new_points_or_box`` returns it; nothing is tracked.

        Raises:
            ValueError: for a frame that there is none.
        """
        state = a_state(inference_state)
        frame = a_frame(state, "frame_idx", frame_idx)
        return frame, state.obj_ids, self._masks_on(state, frame, is_new(state, frame))

    @devices.exclusively
    @torch.inference_mode()
    def remove_object(
        self, inference_state: InferenceState, obj_id: Hashable, strict: bool = False, need_output: bool = True
    ) -> tuple[list[Any], list[tuple[int, Tensor]]]:
        """Forget an object.

        Args:
            inference_state: of ``init_state``.
            obj_id: of the object.
            strict: an object that there is none is an error.
            need_output: give the remaining objects' masks on the frames where this one had prompts.

        Returns:
            The remaining objects' ids, and for each such frame its number and their mask logits, (N, 1, H, W).

        Raises:
            ValueError: where it is unknown, and ``strict``.
        """
        state = a_state(inference_state)
        if obj_id not in state._tracks:
            if strict:
                raise ValueError(f"obj_id {obj_id!r} is unknown: the objects are {state.obj_ids}")
            return state.obj_ids, []
        removed = state._tracks.pop(obj_id)
        if not state._tracks or not need_output:
            return state.obj_ids, []
        return state.obj_ids, [(t, self._masks_on(state, t, is_new(state, t))) for t in sorted(removed.prompted)]

    def reset_state(self, inference_state: InferenceState) -> None:
        """Forget all objects, and what the encoder made of the frames; the video stays open."""
        state = a_state(inference_state)
        state._tracks.clear()
        state._features.clear()
