"""What is kept of an object of a video: its prompts, and the model's outputs by frame.

The names are those of the official predictor's dictionaries.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omniops.sam2.mask_store import MaskStore, StoredMask
from omniops.sam2.prompts import PointInputs


@dataclass(eq=False)
class FrameOutput:
    """The model's output for an object on a frame."""

    pred_masks: Tensor | StoredMask
    """(1, 1, S/4, S/4), logits, before holes are filled."""
    obj_ptr: Tensor
    """(1, 256), the object pointer."""
    object_score_logits: Tensor
    """(1, 1), above 0 where the object is in the frame."""
    predicted_iou: Tensor
    """(1, 1), the IoU of the mask that the decoder expects; 1 of a mask that was given."""
    has_prompt: bool
    """Whether it was predicted from points or a mask, not tracked."""
    maskmem_features: Tensor | None = None
    """(1, 64, S/16, S/16), bfloat16, the memory of the frame; None where it has yet to be encoded, or encoded again."""

    def tensors(self) -> list[Tensor]:
        """Those that are in memory."""
        found = (
            self.pred_masks,
            self.obj_ptr,
            self.object_score_logits,
            self.predicted_iou,
            self.maskmem_features,
        )
        return [tensor for tensor in found if isinstance(tensor, Tensor)]


@dataclass(eq=False)
class OutputDict:
    """The outputs of an object by frame."""

    cond_frame_outputs: dict[int, FrameOutput] = field(default_factory=dict)
    """Of conditioning frames, whose memories every other frame attends to."""
    non_cond_frame_outputs: dict[int, FrameOutput] = field(default_factory=dict)
    """Of the other frames, whose memories only the frames near them attend to."""

    def of_kind(self, is_cond: bool) -> dict[int, FrameOutput]:
        """The outputs of conditioning frames, or of the others."""
        return self.cond_frame_outputs if is_cond else self.non_cond_frame_outputs

    def clear(self) -> None:
        """Forget all of them."""
        self.cond_frame_outputs.clear()
        self.non_cond_frame_outputs.clear()

    def outputs(self) -> list[FrameOutput]:
        """All of them."""
        return [*self.cond_frame_outputs.values(), *self.non_cond_frame_outputs.values()]


@dataclass(eq=False)
class TrackedObject:
    """An object of a video: its prompts, and the model's outputs by frame."""

    point_inputs: dict[int, PointInputs] = field(default_factory=dict)
    prompt_frames: set[int] = field(default_factory=set)
    """The frames with points or a mask."""
    output_dict: OutputDict = field(default_factory=OutputDict)
    temp_output_dict: OutputDict = field(default_factory=OutputDict)
    """Of prompts after the last propagation, which the next one moves to ``output_dict``."""
    frames_tracked: dict[int, bool] = field(default_factory=dict)
    """The frames that a propagation came to, and whether it was a reverse one."""
    recent_frames: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """The non-conditioning frames whose memories are kept, the latest last."""

    def is_init_cond_frame(self, frame_idx: int) -> bool:
        """Whether a prompt on that frame shows the object, and does not correct what was tracked from another frame."""
        return frame_idx not in self.frames_tracked or not self.output_dict.cond_frame_outputs

    def latest_output(self, frame_idx: int, is_cond: bool) -> FrameOutput | None:
        """Its last output on a frame, in the order in which the official predictor looks for it."""
        for outputs in (
            self.temp_output_dict.of_kind(is_cond),
            self.output_dict.cond_frame_outputs,
            self.output_dict.non_cond_frame_outputs,
        ):
            if frame_idx in outputs:
                return outputs[frame_idx]
        return None

    def tracked_output(self, frame_idx: int) -> FrameOutput:
        """Its output on a frame that a propagation came to."""
        output = self.output_dict.cond_frame_outputs.get(frame_idx)
        return output or self.output_dict.non_cond_frame_outputs[frame_idx]

    def add_non_cond_output(self, frame_idx: int, output: FrameOutput) -> None:
        """Make it the output of a frame that is no conditioning frame, and that frame the most recent."""
        self.output_dict.non_cond_frame_outputs[frame_idx] = output
        self.recent_frames[frame_idx] = None
        self.recent_frames.move_to_end(frame_idx)

    def remove_non_cond_output(self, frame_idx: int) -> None:
        """Forget the output of a frame that is no conditioning frame, if it has one."""
        self.output_dict.non_cond_frame_outputs.pop(frame_idx, None)
        self.recent_frames.pop(frame_idx, None)

    def forget_before(self, frame_idx: int, max_cond_frames: int) -> None:
        """Forget the outputs of earlier frames, to which none of a live video attends any more.

        Args:
            frame_idx: the first whose output stays.
            max_cond_frames: of how many conditioning frames, the latest, the outputs stay; -1 for all.
        """
        cond_outputs = self.output_dict.cond_frame_outputs
        if max_cond_frames >= 0:
            for t in sorted(cond_outputs)[: max(0, len(cond_outputs) - max_cond_frames)]:
                if t < frame_idx:
                    del cond_outputs[t]
        for t in [t for t in self.output_dict.non_cond_frame_outputs if t < frame_idx]:
            self.remove_non_cond_output(t)
        for t in [t for t in self.frames_tracked if t < frame_idx]:
            del self.frames_tracked[t]
        for t in [t for t in self.prompt_frames if t < frame_idx and t not in cond_outputs]:
            self.prompt_frames.discard(t)
            self.point_inputs.pop(t, None)

    def offload_old_outputs(self, num_recent: int, mask_store: MaskStore, dtype: torch.dtype) -> None:
        """Keep the memories of so many recent frames at most: of older frames the masks go to the store."""
        while len(self.recent_frames) > num_recent:
            frame_idx, _ = self.recent_frames.popitem(last=False)
            output = self.output_dict.non_cond_frame_outputs[frame_idx]
            output.maskmem_features = None
            if isinstance(output.pred_masks, Tensor):
                output.pred_masks = mask_store.put(output.pred_masks.to(dtype))

    def set_prompt_output(
        self, frame_idx: int, point_inputs: PointInputs | None, output: FrameOutput, is_cond: bool
    ) -> None:
        """Make it the output of a frame's prompt, which is those points, or a mask."""
        if point_inputs is None:
            self.point_inputs.pop(frame_idx, None)
        else:
            self.point_inputs[frame_idx] = point_inputs
        self.prompt_frames.add(frame_idx)
        self.temp_output_dict.of_kind(is_cond)[frame_idx] = output

    def clear_prompts(self, frame_idx: int) -> None:
        """Forget the prompts on a frame. A conditioning frame becomes one that was tracked."""
        self.point_inputs.pop(frame_idx, None)
        self.prompt_frames.discard(frame_idx)
        self.temp_output_dict.cond_frame_outputs.pop(frame_idx, None)
        self.temp_output_dict.non_cond_frame_outputs.pop(frame_idx, None)
        output = self.output_dict.cond_frame_outputs.pop(frame_idx, None)
        if output is not None:
            self.add_non_cond_output(frame_idx, output)
            self.frames_tracked.pop(frame_idx, None)

    def tensors(self) -> list[Tensor]:
        """Those of its prompts and outputs that are in memory."""
        outputs = self.output_dict.outputs() + self.temp_output_dict.outputs()
        points = [tensor for inputs in self.point_inputs.values() for tensor in inputs]
        return points + [tensor for output in outputs for tensor in output.tensors()]

    def copy(self) -> TrackedObject:
        """Another object with the same outputs, in which prompts and outputs can be added and removed."""
        return TrackedObject(
            dict(self.point_inputs),
            set(self.prompt_frames),
            _copy_of(self.output_dict),
            _copy_of(self.temp_output_dict),
            dict(self.frames_tracked),
            self.recent_frames.copy(),
        )

    def deep_copy(self, mask_store: MaskStore) -> TrackedObject:
        """Another object with outputs of its own, whose stored masks are in that store.

        They share their tensors, which are replaced and never written to.
        """
        copies: dict[int, FrameOutput] = {}

        def copy_once(output: FrameOutput) -> FrameOutput:
            if id(output) not in copies:
                masks = output.pred_masks
                if isinstance(masks, StoredMask):  # all who read a file share its position
                    masks = mask_store.put(masks.tensor())
                copies[id(output)] = replace(output, pred_masks=masks)
            return copies[id(output)]

        copied = self.copy()
        for output_dict in (copied.output_dict, copied.temp_output_dict):
            for outputs in (output_dict.cond_frame_outputs, output_dict.non_cond_frame_outputs):
                outputs.update({frame_idx: copy_once(output) for frame_idx, output in outputs.items()})
        return copied


def _copy_of(output_dict: OutputDict) -> OutputDict:
    return OutputDict(dict(output_dict.cond_frame_outputs), dict(output_dict.non_cond_frame_outputs))
