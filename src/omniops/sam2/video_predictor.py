"""Masks of objects through a video, with the names, arguments and results of the official ``SAM2VideoPredictor``.

As in the official predictor: which frames are conditioning frames, what a correction attends to, what the memory
encoder takes, hole filling, and the frames' pre-processing. With the same weights the mask logits are the same. So is
this: a correction, after a propagation, of a frame with a first prompt shows in the call's result, but the next
propagation goes on from the first prompt (``reset_state`` or ``clear_all_prompts_in_frame`` takes that back).

What differs:

- Frames are decoded when they are needed and never kept on the device, so ``init_state`` returns at once, and
  ``offload_video_to_cpu`` and ``async_loading_frames`` have nothing left to do: while the model is at one frame of
  ``propagate_in_video`` threads decode the next eight. See ``omniops.sam2.frames``.
- Objects that attend to memories of the same frames run as one batch, the official predictor's one by one.
- What is kept of a frame that was tracked. The official predictor keeps its memory and mask as long as the state lives,
  0.75 MB for every frame and object at a size of 1024. Here the last 16 frames of each object keep them. Of an earlier
  one the object pointer stays, about 3 kB, and its low-resolution mask goes to a temporary file without a name (where
  ``tempfile.gettempdir()`` says): 256 KiB for every frame and object at 1024, or 128 where the model computes in half
  precision. Where a frame attends to such frames, as a correction does, their memories are encoded again, from the
  frame and that mask: the results do not change, but for the rounding of the edge of a user's mask in half precision.
  Frames with first prompts keep all.
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

import sys
import warnings
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from omniops import device as devices
from omniops.sam2.arguments import check_int, check_upsampling
from omniops.sam2.checkpoints import Pretrained, require_model
from omniops.sam2.frame_inference import (
    FrameInference,
    VideoOptions,
    apply_non_overlapping_constraints,
    frames_per_batch,
)
from omniops.sam2.frames import FrameError
from omniops.sam2.inference_state import InferenceState, check_frame_idx, check_state
from omniops.sam2.live_frames import LiveFrames, VideoSource, open_video
from omniops.sam2.modeling.sam2 import LARGEST_LOGIT, SAM2Base
from omniops.sam2.prompts import PointInputs, check_mask, check_obj_id, check_video_prompts
from omniops.sam2.saved_states import SavedState

_NUM_PREFETCHED = 8
"""How many frames are decoded before the model comes to them, 3 MB each at 1024."""
_NUM_DECODING_THREADS = 4
"""A GPU is faster than one thread at decoding and resizing frames."""

MasksOnFrame = tuple[int, list[Any], Tensor]
"""The frame, the objects' ids, and their mask logits (N, 1, H, W) at the size of the video, above 0 inside."""


class SAM2VideoPredictor(Pretrained):
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
            where the object may look as it did before a correction.
        add_all_frames_to_correct_as_cond: corrected frames become conditioning frames, to whose memories all other
            frames attend, as to those of first prompts.
        binarize_mask_from_pts_for_mem_enc: the memory encoder takes the mask of a frame with prompts as 0 and 1; else
            as the sigmoid of its logits, as on tracked frames. As the official ``build_sam2_video_predictor`` has it.
        max_cond_frames_in_attn: to how many conditioning frames a frame attends at most, those closest to it: the last
            before, the next after, then the others; -1 for all.
        upsampling: how masks come to the size of the video: ``bilinear`` as in the official predictor, or ``guided``
            by the frame's colours, with edges that follow its own (``omniops.sam2.upsampling``). Memories are
            the same.

    Raises:
        TypeError: where ``model`` or an argument is something else.
        ValueError: for an area below 0, less than 2 frames that are not -1, or another way of upsampling.

    Example:
        >>> predictor = SAM2VideoPredictor(omniops.sam2.load("tiny", random_weights=True, image_size=64))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(2):
        ...         Image.new("RGB", (64, 48)).save(f"{folder}/{i}.png")
        ...     state = predictor.init_state(folder)
        ...     _ = predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[32, 24]], labels=[1])
        ...     [(frame, ids, masks.shape) for frame, ids, masks in predictor.propagate_in_video(state)]
        [(0, [1], torch.Size([1, 1, 48, 64])), (1, [1], torch.Size([1, 1, 48, 64]))]
    """

    def __init__(
        self,
        model: SAM2Base,
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
        self.fill_hole_area = check_int("fill_hole_area", fill_hole_area)
        if self.fill_hole_area < 0:
            raise ValueError(f"fill_hole_area must not be negative, got {fill_hole_area}")
        self.non_overlap_masks = non_overlap_masks
        self.clear_non_cond_mem_around_input = clear_non_cond_mem_around_input
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond
        self.binarize_mask_from_pts_for_mem_enc = binarize_mask_from_pts_for_mem_enc
        self.max_cond_frames_in_attn = check_int("max_cond_frames_in_attn", max_cond_frames_in_attn)
        if self.max_cond_frames_in_attn != -1 and self.max_cond_frames_in_attn < 2:
            raise ValueError(f"max_cond_frames_in_attn must be -1 or at least 2, got {max_cond_frames_in_attn}")
        self.upsampling = check_upsampling(upsampling)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def image_size(self) -> int:
        """The side of the square that frames are resized to."""
        return self.model.image_size

    @property
    def frames_at_once(self) -> int:
        """How many frames the encoder is given as one batch."""
        return frames_per_batch(self.device)

    def init_state(
        self,
        video_path: VideoSource,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
    ) -> InferenceState:
        """Open a video.

        Args:
            video_path: a video file of any kind that FFmpeg reads, or a folder of pictures, as ``Frames`` takes them,
                or ``Frames`` themselves, which several states may share. Or a live video: an iterable of frames, the
                number of a camera, a URL or an open binary file, as ``LiveFrames`` takes them, or ``LiveFrames``.
            offload_video_to_cpu: no matter: frames are on the CPU until the encoder is given one.
            offload_state_to_cpu: keep masks and memories on the CPU; slower on a GPU, for many objects.
            async_loading_frames: no matter: frames are loaded when they are needed.

        Raises:
            FileNotFoundError, ImportError, TypeError, ValueError: as ``Frames`` and ``LiveFrames``.
        """
        return InferenceState(open_video(video_path), self.model, offload_video_to_cpu, offload_state_to_cpu)

    def load_state(self, path: str | PathLike[str], video: VideoSource, **options: bool) -> InferenceState:
        """A state from a file of its ``save``: it goes on as if it had not been interrupted, given the same options.

        Args:
            path: of the file. It is not trusted.
            video: the same one, as ``init_state`` takes it; of a live video one that goes on with the next frames.
            options: ``offload_video_to_cpu``, ``offload_state_to_cpu`` and ``async_loading_frames`` of ``init_state``.

        Raises:
            FileNotFoundError, ImportError, TypeError: as ``init_state``, and for the file.
            ValueError: where the file is none of ``save``, damaged, of a newer version, of another model or another
                video; and as ``init_state``.

        Example:
            >>> predictor = SAM2VideoPredictor(omniops.sam2.load("tiny", random_weights=True, image_size=64))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     for i in range(3):
            ...         Image.new("RGB", (64, 48)).save(f"{folder}/{i}.png")
            ...     state = predictor.init_state(folder)
            ...     _ = predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[32, 24]], labels=[1])
            ...     _ = list(predictor.propagate_in_video(state, max_frame_num_to_track=1))
            ...     state.save(f"{folder}/clip.safetensors")
            ...     state = predictor.load_state(f"{folder}/clip.safetensors", folder)
            ...     [frame for frame, *_ in predictor.propagate_in_video(state, start_frame_idx=2)]
            [2]
        """
        with SavedState(path, self.model) as saved:
            state = self.init_state(video, **options)
            saved.restore(state, self.frames_at_once)
        return state

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
            clear_old_points: the points replace the earlier ones of this object and frame; else they join them.
            normalize_coords: the coordinates are pixels; else fractions of the frame, from 0 to 1.
            box: (4), x0, y0, x1, y1; points may come with it.

        Returns:
            The frame, all objects' ids, and their mask logits on this frame, (N, 1, H, W), float32, above 0 inside;
            -1024 for an object without a mask on it.

        Raises:
            TypeError: for arguments of wrong types.
            ValueError: for a frame out of range, wrong shapes, labels, boxes, or no prompt at all.
        """
        state = check_state(inference_state)
        frame_idx = check_frame_idx(state, "frame_idx", frame_idx)
        point_inputs = self._point_inputs(state, points, labels, box, clear_old_points, normalize_coords)
        obj = state.object_or_new(check_obj_id(obj_id))
        if not clear_old_points and frame_idx in obj.point_inputs:
            point_inputs = obj.point_inputs[frame_idx].concat(point_inputs)
        is_init_cond_frame = obj.is_init_cond_frame(frame_idx)
        is_cond = is_init_cond_frame or self.add_all_frames_to_correct_as_cond
        inference = self._frame_inference(state)
        previous = obj.latest_output(frame_idx, is_cond)
        # Masks to correct were within these bounds when SAM was trained.
        logits = None if previous is None else inference.low_res_masks(previous).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        memory_banks = []
        if not is_init_cond_frame:
            memory_banks = [inference.select_memories(obj, frame_idx, reverse=obj.frames_tracked[frame_idx])]
        (output,) = inference.run_single_frame_inference(frame_idx, memory_banks, point_inputs, logits)
        with state.unchanged_on_error(obj_id):
            obj.set_prompt_output(frame_idx, point_inputs, output, is_cond)
            state.set_object(obj_id, obj)
            return self._consolidated(inference, frame_idx, is_cond)

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
            ValueError: for a frame out of range, or a mask of another shape.
        """
        state = check_state(inference_state)
        frame_idx = check_frame_idx(state, "frame_idx", frame_idx)
        mask_inputs = check_mask(mask)
        size = (self.image_size, self.image_size)
        if mask_inputs.shape[-2:] != size:
            # Antialiased, as in the official predictor; on the CPU, because not every device has it.
            resized = F.interpolate(mask_inputs.cpu(), size, mode="bilinear", align_corners=False, antialias=True)
            mask_inputs = (resized >= 0.5).float()
        obj = state.object_or_new(check_obj_id(obj_id))
        is_cond = obj.is_init_cond_frame(frame_idx) or self.add_all_frames_to_correct_as_cond
        inference = self._frame_inference(state)
        output = inference.use_mask_as_output(frame_idx, mask_inputs.to(self.device))
        with state.unchanged_on_error(obj_id):
            obj.set_prompt_output(frame_idx, None, output, is_cond)
            state.set_object(obj_id, obj)
            return self._consolidated(inference, frame_idx, is_cond)

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
        state = check_state(inference_state)
        frame_idx = check_frame_idx(state, "frame_idx", frame_idx)
        point_inputs = self._point_inputs(state, points, labels, box, True, normalize_coords)
        inference = self._frame_inference(state)
        outputs = inference.run_single_frame_inference(frame_idx, point_inputs=point_inputs)
        return inference.get_orig_video_res_output(frame_idx, outputs)

    @torch.inference_mode()
    def propagate_in_video(
        self,
        inference_state: InferenceState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[MasksOnFrame]:
        """Track all objects from frame to frame.

        Of a live video it goes on with the frame after the last that it came to, and waits for the next ones. Objects
        may be added, corrected and removed between any two frames, and count from the next frame on; before there is
        one, frames come without masks. ``inference_state.frames.latency`` is how long ago the latest frame came.

        Args:
            inference_state: of ``init_state``.
            start_frame_idx: the first frame; by default the earliest with a prompt.
            max_frame_num_to_track: how many frames to track after the first; by default all.
            reverse: towards the beginning of the video.

        Yields:
            For each frame what ``add_new_points_or_box`` returns. It may be broken off and called again.

        Raises:
            ValueError: where an object has no prompt, or there is none, or an argument is out of range; for a first
                frame of a live video, or its reverse.
            Exception: what an iterable of frames raises.

        Warns:
            UserWarning: where a frame cannot be decoded; it ends there.
        """
        state = check_state(inference_state)
        if start_frame_idx is not None:
            start_frame_idx = check_frame_idx(state, "start_frame_idx", start_frame_idx)
        if max_frame_num_to_track is None:
            max_frame_num_to_track = sys.maxsize if isinstance(state.frames, LiveFrames) else state.num_frames
        max_frame_num_to_track = check_int("max_frame_num_to_track", max_frame_num_to_track)
        if max_frame_num_to_track < 0:
            raise ValueError(f"max_frame_num_to_track must not be negative, got {max_frame_num_to_track}")
        if isinstance(state.frames, LiveFrames):
            if start_frame_idx is not None or reverse:
                raise ValueError("the frames of a live video come in order: leave out start_frame_idx and reverse")
            yield from self._propagate_in_live_video(state, max_frame_num_to_track)
            return
        with devices.exclusive(self.device):
            self._frame_inference(state).propagate_in_video_preflight()
        objects, images = state.objects, state.images
        processing_order = state.processing_order(start_frame_idx, max_frame_num_to_track, reverse=reverse)
        with ThreadPoolExecutor(_NUM_DECODING_THREADS) as pool:
            try:
                for i, frame_idx in enumerate(processing_order, start=1):
                    next_frames = processing_order[i : i + _NUM_PREFETCHED]
                    encoded = state.frames_with_features
                    images.prefetch([t for t in (frame_idx, *next_frames) if t not in encoded], pool)
                    inference = self._frame_inference(state)
                    masks = inference.track(list(objects.values()), frame_idx, next_frames, reverse=reverse)
                    yield frame_idx, list(objects), masks
            except FrameError as error:
                warnings.warn(f"the masks end before frame {frame_idx} of {len(state.frames)}: {error}", stacklevel=2)
            finally:  # also where the caller breaks off
                images.prefetch((), pool)

    @devices.exclusively
    @torch.inference_mode()
    def clear_all_prompts_in_frame(
        self, inference_state: InferenceState, frame_idx: int, obj_id: Hashable, need_output: bool = True
    ) -> MasksOnFrame | None:
        """Take back an object's prompts on a frame, whose mask, if it was propagated, stays as if it were tracked.

        Returns:
            As ``add_new_points_or_box``, or None without ``need_output``.

        Raises:
            ValueError: for a frame out of range, or an unknown object.
        """
        state = check_state(inference_state)
        frame_idx = check_frame_idx(state, "frame_idx", frame_idx)
        obj = state.get_object(obj_id)
        inference = self._frame_inference(state)
        inference.clear_prompts(obj, frame_idx)
        if not need_output:
            return None
        return self._consolidated(inference, frame_idx, state.has_temp_cond_outputs(frame_idx))

    @devices.exclusively
    @torch.inference_mode()
    def masks_on_frame(self, inference_state: InferenceState, frame_idx: int) -> MasksOnFrame:
        """The masks of all objects on a frame so far, as ``add_new_points_or_box`` returns them; nothing is tracked.

        Raises:
            ValueError: for a frame out of range.
        """
        state = check_state(inference_state)
        frame_idx = check_frame_idx(state, "frame_idx", frame_idx)
        inference = self._frame_inference(state)
        return self._consolidated(inference, frame_idx, state.has_temp_cond_outputs(frame_idx))

    @devices.exclusively
    @torch.inference_mode()
    def remove_object(
        self, inference_state: InferenceState, obj_id: Hashable, strict: bool = False, need_output: bool = True
    ) -> tuple[list[Any], list[tuple[int, Tensor]]]:
        """Forget an object.

        Args:
            inference_state: of ``init_state``.
            obj_id: of the object.
            strict: an unknown object is an error.
            need_output: give the remaining objects' masks on the frames where this one had prompts.

        Returns:
            The remaining objects' ids, and for each such frame its number and their mask logits, (N, 1, H, W).

        Raises:
            ValueError: where it is unknown, and ``strict``.
        """
        state = check_state(inference_state)
        if obj_id not in state.objects and not strict:
            return state.obj_ids, []
        removed = state.get_object(obj_id)
        state.remove_object(obj_id)
        if not state.objects or not need_output:
            return state.obj_ids, []
        inference = self._frame_inference(state)
        masks = [
            inference.consolidate_temp_output_across_obj(t, is_cond=state.has_temp_cond_outputs(t))
            for t in sorted(removed.prompt_frames)
        ]
        return state.obj_ids, list(zip(sorted(removed.prompt_frames), masks, strict=True))

    def reset_state(self, inference_state: InferenceState) -> None:
        """Forget all objects and the image encoder's features of frames; the video stays open."""
        state = check_state(inference_state)
        state.remove_all_objects()
        state.release_features()

    def _propagate_in_live_video(self, state: InferenceState, max_frame_num_to_track: int) -> Iterator[MasksOnFrame]:
        for _ in range(max_frame_num_to_track + 1):
            try:
                with torch.inference_mode(False):  # an iterable may compute its frames
                    frame_idx = state.take_live_frame()
            except FrameError as error:
                warnings.warn(f"the masks end after frame {state.num_frames - 1}: {error}", stacklevel=3)
                return
            if frame_idx is None:
                return
            obj_ids, masks = self._frame_inference(state).track_live(frame_idx)
            yield frame_idx, obj_ids, masks

    def _apply_non_overlapping_constraints(self, pred_masks: Tensor) -> Tensor:
        """``apply_non_overlapping_constraints``, which ``tools/vos_inference.py`` of the official repository calls."""
        return apply_non_overlapping_constraints(pred_masks)

    def _frame_inference(self, state: InferenceState) -> FrameInference:
        """The model on frames of that state, with the options as they are now."""
        return FrameInference(self.model, state, VideoOptions.of(self))

    def _point_inputs(
        self,
        state: InferenceState,
        points: ArrayLike | Tensor | None,
        labels: ArrayLike | Tensor | None,
        box: ArrayLike | Tensor | None,
        clear_old_points: bool,
        normalize_coords: bool,
    ) -> PointInputs:
        """The prompt in pixels of the resized frame, on the device."""
        size = state.video_size if normalize_coords else (1, 1)
        video_prompts = check_video_prompts(points, labels, box, clear_old_points)
        return video_prompts.scaled(size, self.image_size, self.device)

    def _consolidated(self, inference: FrameInference, frame_idx: int, is_cond: bool) -> MasksOnFrame:
        masks = inference.consolidate_temp_output_across_obj(frame_idx, is_cond=is_cond)
        return frame_idx, inference.state.obj_ids, masks
