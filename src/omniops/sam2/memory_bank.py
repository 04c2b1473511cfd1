"""The memory bank (section 4 of the paper): which memories and object pointers of an object a frame attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from omniops.sam2.tracked_object import FrameOutput, TrackedObject


class SpatialMemory(NamedTuple):
    """A frame whose memory is attended to."""

    t_pos: int
    """How many frames ago it was, in the direction of tracking; 0 for a conditioning frame."""
    frame_idx: int
    output: FrameOutput


class ObjectPointer(NamedTuple):
    """A frame whose object pointer is attended to."""

    t_diff: int
    """How many frames ago it was, in the direction of tracking."""
    output: FrameOutput


class MemoryBank(NamedTuple):
    """What a frame attends to of an object."""

    obj: TrackedObject
    spatial_memories: list[SpatialMemory]
    obj_ptrs: list[ObjectPointer]

    @property
    def maskmem_t_pos(self) -> list[int]:
        """The temporal positions of the spatial memories."""
        return [memory.t_pos for memory in self.spatial_memories]

    @property
    def obj_ptr_t_diff(self) -> list[int]:
        """The temporal distances of the object pointers."""
        return [pointer.t_diff for pointer in self.obj_ptrs]


def select_memories(
    obj: TrackedObject,
    frame_idx: int,
    *,
    reverse: bool,
    num_maskmem: int,
    max_obj_ptrs: int,
    max_cond_frames: int,
) -> MemoryBank:
    """The memories of an object for a frame, as the official ``_prepare_memory_conditioned_features`` selects them.

    Args:
        obj: the object.
        frame_idx: the frame that attends to the memories.
        reverse: whether the object is tracked towards the beginning of the video.
        num_maskmem: the memories are those of conditioning frames, and of this number less one of frames before.
        max_obj_ptrs: the pointers are those of conditioning frames, and of this number less one of frames before.
        max_cond_frames: how many conditioning frames are attended to, the closest; -1 for all.
    """
    cond_outputs, non_cond_outputs = obj.output_dict.cond_frame_outputs, obj.output_dict.non_cond_frame_outputs
    if 0 <= max_cond_frames < len(cond_outputs):
        cond_outputs, unselected = select_closest_cond_frames(frame_idx, cond_outputs, max_cond_frames)
        non_cond_outputs = {**unselected, **non_cond_outputs}
        non_cond_outputs = {t: output for t, output in non_cond_outputs.items() if t not in cond_outputs}
    step = -1 if reverse else 1
    memories = [SpatialMemory(0, t, output) for t, output in cond_outputs.items()]
    for t_pos in range(num_maskmem - 1, 0, -1):
        t = frame_idx - t_pos * step
        if t in non_cond_outputs:
            memories.append(SpatialMemory(t_pos, t, non_cond_outputs[t]))
    # Pointers of conditioning frames that are yet to come are left out.
    pointers = [
        ObjectPointer((frame_idx - t) * step, output)
        for t, output in cond_outputs.items()
        if (frame_idx - t) * step >= 0
    ]
    for t_diff in range(1, max_obj_ptrs):
        t = frame_idx - t_diff * step
        if t in non_cond_outputs:
            pointers.append(ObjectPointer(t_diff, non_cond_outputs[t]))
    return MemoryBank(obj, memories, pointers)


def select_closest_cond_frames(
    frame_idx: int, cond_frame_outputs: Mapping[int, FrameOutput], max_cond_frame_num: int
) -> tuple[dict[int, FrameOutput], dict[int, FrameOutput]]:
    """The conditioning frames closest to a frame, and the others, as the official function of that name selects them.

    The last before the frame comes first, then the first from it on, then those closest to it of the rest.

    Args:
        frame_idx: the frame.
        cond_frame_outputs: of more frames than are selected.
        max_cond_frame_num: how many are selected, 2 or more.
    """
    neighbours = (
        max((t for t in cond_frame_outputs if t < frame_idx), default=None),
        min((t for t in cond_frame_outputs if t >= frame_idx), default=None),
    )
    frames = [t for t in neighbours if t is not None]
    rest = sorted((t for t in cond_frame_outputs if t not in frames), key=lambda t: abs(t - frame_idx))
    frames += rest[: max_cond_frame_num - len(frames)]
    selected = {t: cond_frame_outputs[t] for t in frames}
    return selected, {t: output for t, output in cond_frame_outputs.items() if t not in selected}
