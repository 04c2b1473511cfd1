"""The network on one frame of a video: what it attends to, the masks that it predicts, and the memories that it leaves.

The methods have the names of those of the official predictor that do the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniops import device as devices
from omniops import fill_holes
from omniops.ops._library import without_autocast
from omniops.sam2.frames import FrameError
from omniops.sam2.inference_state import InferenceState
from omniops.sam2.live_frames import LiveFrames
from omniops.sam2.mask_store import StoredMask
from omniops.sam2.memory_bank import MemoryBank, SpatialMemory, select_memories
from omniops.sam2.modeling.sam2 import NO_OBJ_SCORE, ImageFeatures, SAM2Base, SAMOutput
from omniops.sam2.prompts import PointInputs
from omniops.sam2.tracked_object import FrameOutput, TrackedObject
from omniops.sam2.transforms import to_tensor
from omniops.sam2.upsampling import guided

NUM_RECENT_FRAMES = 16
"""Of how many frames that were tracked last an object keeps masks and memories in memory; at least those that the next
frame attends to."""
MAX_CACHED_FEATURES = 8
"""Of how many frames the state keeps the image encoder's features, 20 MB each at 1024. Those that were encoded as one
batch share their memory, which is freed with the last of them."""
FRAMES_PER_BATCH = {"cuda": 4}
"""How many frames are encoded as one batch, at most ``MAX_CACHED_FEATURES``; one on other devices. CUDA has finished
the kernels of a small model before Python has launched the next."""
OBJECTS_PER_BATCH = {"cpu": 2, "mps": 2}
"""How many objects are tracked as one batch, 8 on other devices. The caches of a CPU do not hold more, nor does the
memory of small Macs hold the attention of more."""


@dataclass(frozen=True)
class VideoOptions:
    """The arguments of ``SAM2VideoPredictor`` that matter on a frame."""

    fill_hole_area: int
    non_overlap_masks: bool
    clear_non_cond_mem_around_input: bool
    binarize_mask_from_pts_for_mem_enc: bool
    max_cond_frames_in_attn: int
    upsampling: str

    @classmethod
    def of(cls, predictor: object) -> VideoOptions:
        """The predictor's, as they are now."""
        return cls(**{option.name: getattr(predictor, option.name) for option in fields(cls)})


def frames_per_batch(device: torch.device) -> int:
    """How many frames the image encoder takes as one batch on that device."""
    return min(FRAMES_PER_BATCH.get(device.type, 1), MAX_CACHED_FEATURES)


class FrameInference:
    """The network on single frames of one video.

    Args:
        model: the network.
        state: of the video, in which features, outputs and memories are kept.
        options: of the predictor.
    """

    def __init__(self, model: SAM2Base, state: InferenceState, options: VideoOptions) -> None:
        self.model, self.state, self.options = model, state, options

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    def get_image_feature(self, frame_idx: int, next_frames: Sequence[int] = ()) -> ImageFeatures:
        """The image encoder's features of a frame. Next frames are encoded with it, as one batch, where it must be."""
        cached = self.state.cached_batches
        if frame_idx not in cached:
            images = {frame_idx: self.state.images[frame_idx]}
            with suppress(FrameError):  # the error of a next frame is raised when it is that frame's turn
                for t in next_frames[: frames_per_batch(self.device) - 1]:
                    if t not in cached:
                        images[t] = self.state.images[t]
            for t, features in self._encode(images).items():
                self.state.cache_features(t, tuple(images), features)
            self.state.release_features(keep=MAX_CACHED_FEATURES)
        elif self.state.get_features(frame_idx) is None:  # the state was loaded
            batch = cached[frame_idx]
            for t, features in self._encode({t: self.state.images[t] for t in batch}).items():
                if cached.get(t) == batch:
                    self.state.cache_features(t, batch, features)
        found = self.state.get_features(frame_idx)
        assert found is not None
        return found

    def _encode(self, images: Mapping[int, Tensor]) -> dict[int, ImageFeatures]:
        """The features of frames, encoded as one batch."""
        with self.model.autocast():
            features = self.model.run(self.model.forward_image, torch.stack(list(images.values())))
        return {t: features.of(i) for i, t in enumerate(images)}

    def select_memories(self, obj: TrackedObject, frame_idx: int, *, reverse: bool) -> MemoryBank:
        """What a frame attends to of an object."""
        return select_memories(
            obj,
            frame_idx,
            reverse=reverse,
            num_maskmem=self.model.num_maskmem,
            max_obj_ptrs=self._max_obj_ptrs,
            max_cond_frames=self.options.max_cond_frames_in_attn,
        )

    def run_single_frame_inference(
        self,
        frame_idx: int,
        memory_banks: Sequence[MemoryBank] = (),
        point_inputs: PointInputs | None = None,
        prev_sam_mask_logits: Tensor | None = None,
    ) -> list[FrameOutput]:
        """Predict the masks of B objects on a frame.

        Args:
            frame_idx: the frame.
            memory_banks: what the frame attends to, of each of B objects, whose memories and pointers have equal times.
                Without them the frame attends to nothing, and B is 1.
            point_inputs: the prompt of 1 object, in pixels of the resized frame; without one the objects are tracked.
            prev_sam_mask_logits: (1, 1, S/4, S/4), the mask that the prompt corrects.
        """
        with self.model.autocast():
            features = self.get_image_feature(frame_idx)
            output = self._forward_sam_heads(features, memory_banks, point_inputs, prev_sam_mask_logits)
        return self._split(output, has_prompt=point_inputs is not None)

    def use_mask_as_output(self, frame_idx: int, mask_inputs: Tensor) -> FrameOutput:
        """The output of a frame on which the object's mask is given, (1, 1, S, S) of 0 and 1."""
        with self.model.autocast():
            output = self.model.use_mask_as_output(self.get_image_feature(frame_idx), mask_inputs)
        return self._split(output, has_prompt=True)[0]

    @devices.exclusively
    def track(
        self, objects: Sequence[TrackedObject], frame_idx: int, next_frames: Sequence[int], *, reverse: bool
    ) -> Tensor:
        """Track objects to a frame: their mask logits on it, (N, 1, H, W), as ``get_orig_video_res_output``.

        Args:
            objects: all that are tracked. On their conditioning frames they have outputs already.
            frame_idx: the frame.
            next_frames: the frames that come after it.
            reverse: whether they are tracked towards the beginning of the video.
        """
        tracked = [obj for obj in objects if frame_idx not in obj.output_dict.cond_frame_outputs]
        if tracked:
            self._track(tracked, frame_idx, self.get_image_feature(frame_idx, next_frames), reverse)
        for obj in objects:
            if self.options.clear_non_cond_mem_around_input and frame_idx in obj.output_dict.cond_frame_outputs:
                self._clear_non_cond_mem_around_input(obj, frame_idx)
            obj.frames_tracked[frame_idx] = reverse
        return self.get_orig_video_res_output(frame_idx, [obj.tracked_output(frame_idx) for obj in objects])

    def track_live(self, frame_idx: int) -> tuple[list[Any], Tensor]:
        """Track to the latest frame of a live video all objects that have a prompt, which may be newer than the last.

        Returns:
            Their ids, and their mask logits, (N, 1, H, W), as ``track``. Nothing is kept of frames to which no other
            will attend.
        """
        objects = {
            obj_id: obj
            for obj_id, obj in self.state.objects.items()
            if obj.output_dict.cond_frame_outputs or obj.temp_output_dict.cond_frame_outputs
        }
        with devices.exclusive(self.device):
            self._add_prompt_outputs(objects.values())
            for obj in objects.values():
                obj.forget_before(frame_idx + 1 - NUM_RECENT_FRAMES, self.options.max_cond_frames_in_attn)
            masks = self.track(list(objects.values()), frame_idx, (), reverse=False)
        return list(objects), masks

    def propagate_in_video_preflight(self) -> None:
        """Move the outputs of prompts after the last propagation to those that frames attend to.

        Raises:
            ValueError: where there is no object, or one without a prompt.
        """
        objects = self.state.objects
        if not objects:
            raise ValueError("there is no object to propagate: call add_new_points_or_box or add_new_mask before")
        for obj_id, obj in objects.items():
            if not obj.output_dict.cond_frame_outputs and not obj.temp_output_dict.cond_frame_outputs:
                raise ValueError(f"obj_id {obj_id!r} has no prompt: add one, or call remove_object")
        self._add_prompt_outputs(objects.values())

    def _add_prompt_outputs(self, objects: Iterable[TrackedObject]) -> None:
        """Move the outputs of new prompts to those that frames attend to."""
        for obj in objects:
            temp_outputs, cond_outputs = obj.temp_output_dict, obj.output_dict.cond_frame_outputs
            prompt_frames = [*temp_outputs.non_cond_frame_outputs, *temp_outputs.cond_frame_outputs]
            for frame_idx, output in temp_outputs.non_cond_frame_outputs.items():
                self._add_non_cond_output(obj, frame_idx, output)
            cond_outputs.update(temp_outputs.cond_frame_outputs)
            temp_outputs.clear()
            if self.options.clear_non_cond_mem_around_input:
                for frame_idx in prompt_frames:
                    self._clear_non_cond_mem_around_input(obj, frame_idx)
            for frame_idx in cond_outputs:
                obj.remove_non_cond_output(frame_idx)

    def clear_prompts(self, obj: TrackedObject, frame_idx: int) -> None:
        """Forget an object's prompts on a frame, which is no conditioning frame from now on."""
        obj.clear_prompts(frame_idx)
        self._offload_old_outputs(obj, NUM_RECENT_FRAMES)

    def low_res_masks(self, *outputs: FrameOutput, fill: bool = True) -> Tensor:
        """(N, 1, S/4, S/4), float32 logits of N outputs on the device, small holes filled or not."""
        pred_masks = [output.pred_masks for output in outputs]
        tensors = [masks.tensor() if isinstance(masks, StoredMask) else masks for masks in pred_masks]
        masks = torch.cat([tensor.to(self.device, torch.float32) for tensor in tensors])
        area = self.options.fill_hole_area
        return fill_holes(masks, area) if fill and area > 0 else masks

    def consolidate_temp_output_across_obj(self, frame_idx: int, *, is_cond: bool) -> Tensor:
        """The latest mask logits of all objects on a frame, as ``get_orig_video_res_output``.

        Args:
            frame_idx: the frame.
            is_cond: whether outputs of prompts that make it a conditioning frame come first, or of others.
        """
        outputs = [obj.latest_output(frame_idx, is_cond) for obj in self.state.objects.values()]
        return self.get_orig_video_res_output(frame_idx, outputs)

    def get_orig_video_res_output(self, frame_idx: int, outputs: Sequence[FrameOutput | None]) -> Tensor:
        """Mask logits at the size of the video, (N, 1, H, W), float32; ``NO_OBJ_SCORE`` where there is no output."""
        size = self.state.video_size
        found = {i: output for i, output in enumerate(outputs) if output is not None}
        masks = torch.empty(0, 1, *size, device=self.device)
        if found:
            low_res = self.low_res_masks(*found.values())
            if self.options.upsampling == "guided":
                masks = guided(low_res, to_tensor(self.state.frames[frame_idx], self.device), size)
            else:
                masks = F.interpolate(low_res, size, mode="bilinear", align_corners=False)
        if len(found) < len(outputs):
            upsampled = masks
            masks = torch.full((len(outputs), 1, *size), NO_OBJ_SCORE, device=self.device)
            for i, mask in zip(found, upsampled, strict=True):  # with a list as index PyTorch would wait for CUDA
                masks[i] = mask
        return apply_non_overlapping_constraints(masks) if self.options.non_overlap_masks else masks

    @property
    def _max_obj_ptrs(self) -> int:
        most = self.model.max_obj_ptrs_in_encoder
        return most if isinstance(self.state.frames, LiveFrames) else min(self.state.num_frames, most)

    def _split(self, output: SAMOutput, *, has_prompt: bool) -> list[FrameOutput]:
        """The outputs of each of B objects, their masks where the state stores them."""
        masks = output.low_res_masks.to(self.state.storage_device)
        pointers, scores, ious = (t.split(1) for t in (output.obj_ptr, output.object_score_logits, output.ious))
        objects = zip(masks.split(1), pointers, scores, ious, strict=True)
        return [FrameOutput(*tensors, has_prompt) for tensors in objects]

    def _track(self, objects: Iterable[TrackedObject], frame_idx: int, features: ImageFeatures, reverse: bool) -> None:
        """Track objects to a frame; those that attend to the same times run as one batch."""
        per_batch = OBJECTS_PER_BATCH.get(self.device.type, 8)
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[MemoryBank]] = {}
        for obj in objects:
            # Offloading waits for the device, which has nothing to do yet at this point.
            self._offload_old_outputs(obj, NUM_RECENT_FRAMES - 1)
            bank = self.select_memories(obj, frame_idx, reverse=reverse)
            groups.setdefault((tuple(bank.maskmem_t_pos), tuple(bank.obj_ptr_t_diff)), []).append(bank)
        for group in groups.values():
            for first in range(0, len(group), per_batch):
                self._track_batch(group[first : first + per_batch], frame_idx, features)

    def _track_batch(self, memory_banks: Sequence[MemoryBank], frame_idx: int, features: ImageFeatures) -> None:
        with self.model.autocast():
            output, maskmem_features = self.model.run(
                self.model.track_step, features, *self._memory_inputs(memory_banks)
            )
            maskmem_features = maskmem_features.to(self.state.storage_device)
        frame_outputs = self._split(output, has_prompt=False)
        for bank, frame_output, memory in zip(memory_banks, frame_outputs, maskmem_features.split(1), strict=True):
            frame_output.maskmem_features = memory
            self._add_non_cond_output(bank.obj, frame_idx, frame_output)

    def _forward_sam_heads(
        self,
        features: ImageFeatures,
        memory_banks: Sequence[MemoryBank],
        point_inputs: PointInputs | None = None,
        prev_sam_mask_logits: Tensor | None = None,
    ) -> SAMOutput:
        """The network on a frame whose features are known, as ``run_single_frame_inference``."""
        if memory_banks:
            image_embed = self.model.prepare_memory_conditioned_features(
                features.image_embed, *self._memory_inputs(memory_banks)
            )
        else:
            image_embed = self.model.add_no_mem_embed(features.image_embed)
        coords, labels = (None, None) if point_inputs is None else point_inputs
        return self.model.forward_sam_heads(features, image_embed, coords, labels, prev_sam_mask_logits)

    def _memory_inputs(self, memory_banks: Sequence[MemoryBank]) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The memories and object pointers of B objects, as ``SAM2Base.prepare_memory_conditioned_features`` has it."""
        memories = [[self._memory(bank.obj, memory) for memory in bank.spatial_memories] for bank in memory_banks]
        pointers = [[pointer.output.obj_ptr for pointer in bank.obj_ptrs] for bank in memory_banks]
        bank = memory_banks[0]
        maskmem_tpos_index, obj_ptr_pos = self.model.encode_times(
            bank.maskmem_t_pos, bank.obj_ptr_t_diff, self._max_obj_ptrs - 1
        )
        obj_ptrs = _stack_objects(pointers) if bank.obj_ptrs else None
        return _stack_objects(memories), maskmem_tpos_index, obj_ptrs, obj_ptr_pos

    def _memory(self, obj: TrackedObject, memory: SpatialMemory) -> Tensor:
        """(1, 64, S/16, S/16), bfloat16, the memory of a frame, encoded where the object does not have it."""
        output = memory.output
        if output.maskmem_features is None:
            output.maskmem_features = self._run_memory_encoder(memory.frame_idx, output)
            if obj.output_dict.non_cond_frame_outputs.get(memory.frame_idx) is output:
                self._add_non_cond_output(obj, memory.frame_idx, output)
        return output.maskmem_features.to(self.device)

    def _run_memory_encoder(self, frame_idx: int, output: FrameOutput) -> Tensor:
        """(1, 64, S/16, S/16), bfloat16, where the state stores it."""
        masks = self.low_res_masks(output, fill=output.has_prompt)
        image_embed = self.get_image_feature(frame_idx).image_embed
        is_mask_from_pts = output.has_prompt and self.options.binarize_mask_from_pts_for_mem_enc
        maskmem_features = self.model.encode_new_memory(
            image_embed, masks, output.object_score_logits, is_mask_from_pts=is_mask_from_pts
        )
        return maskmem_features.to(self.state.storage_device)

    def _add_non_cond_output(self, obj: TrackedObject, frame_idx: int, output: FrameOutput) -> None:
        obj.add_non_cond_output(frame_idx, output)
        self._offload_old_outputs(obj, NUM_RECENT_FRAMES)

    def _offload_old_outputs(self, obj: TrackedObject, num_recent: int) -> None:
        obj.offload_old_outputs(num_recent, self.state.mask_store, self.model.dtype)

    def _clear_non_cond_mem_around_input(self, obj: TrackedObject, frame_idx: int) -> None:
        """Forget the outputs of the frames around a prompt, which would still show what it corrects."""
        for t in range(frame_idx - self.model.num_maskmem, frame_idx + self.model.num_maskmem + 1):
            if t != frame_idx:
                obj.remove_non_cond_output(t)


def apply_non_overlapping_constraints(pred_masks: Tensor) -> Tensor:
    """Mask logits (N, 1, H, W) of N objects, each at most -10 wherever another object has the highest."""
    if len(pred_masks) <= 1:
        return pred_masks
    best = pred_masks.argmax(dim=0, keepdim=True)
    index = torch.arange(len(pred_masks), device=pred_masks.device)[:, None, None, None]
    return torch.where(best == index, pred_masks, pred_masks.clamp(max=-10))


def _stack_objects(objects: Sequence[Sequence[Tensor]]) -> Tensor:
    """N tensors (1, ...) of each of B objects -> (N, B, ...)."""
    with without_autocast(objects[0][0]):  # which in float16 refuses memories, as they are in bfloat16
        tensors = torch.cat([tensor for of_all in zip(*objects, strict=True) for tensor in of_all])
    return tensors.reshape(-1, len(objects), *tensors.shape[1:])
