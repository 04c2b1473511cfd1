"""Which memories a frame attends to, against the official package's choice of conditioning frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omniops.sam2.memory_bank import select_closest_cond_frames, select_memories
from omniops.sam2.tracked_object import FrameOutput, TrackedObject


def output() -> FrameOutput:
    one = torch.zeros(1, 1)
    return FrameOutput(torch.zeros(1, 1, 4, 4), torch.zeros(1, 256), one, one, has_prompt=False)


def tracked(cond_frames, non_cond_frames) -> TrackedObject:
    obj = TrackedObject()
    obj.output_dict.cond_frame_outputs.update({t: output() for t in cond_frames})
    obj.output_dict.non_cond_frame_outputs.update({t: output() for t in non_cond_frames})
    return obj


@pytest.mark.parametrize("seed", range(20))
def test_the_closest_conditioning_frames_are_the_official_ones(seed):
    utils = pytest.importorskip("sam2.modeling.sam2_utils", reason="the oracle: the official package, sam2 from PyPI")
    generator = np.random.default_rng(seed)
    frames = generator.permutation(40)[:8].tolist()
    outputs = {t: output() for t in frames}
    frame_idx, count = int(generator.integers(40)), int(generator.integers(2, 8))
    selected, unselected = select_closest_cond_frames(frame_idx, outputs, count)
    expected, rest = utils.select_closest_cond_frames(frame_idx, outputs, count)
    assert len(selected) == count
    assert selected == expected
    assert unselected == rest


@pytest.mark.parametrize(("reverse", "frame_idx"), [(False, 20), (True, 4)])
def test_the_memories_of_a_frame(reverse, frame_idx):
    """Frame 12 has a prompt, 25 comes later and 1 earlier; all others were tracked."""
    obj = tracked([1, 12, 25], [t for t in range(30) if t not in (1, 12, 25)])
    bank = select_memories(obj, frame_idx, reverse=reverse, num_maskmem=7, max_obj_ptrs=16, max_cond_frames=-1)
    step = -1 if reverse else 1
    near = [(t_pos, frame_idx - t_pos * step) for t_pos in (6, 5, 4, 3, 2, 1)]
    expected = [(0, 1), (0, 12), (0, 25), *((t_pos, t) for t_pos, t in near if t not in (1, 12, 25))]
    assert [(memory.t_pos, memory.frame_idx) for memory in bank.spatial_memories] == expected
    assert bank.maskmem_t_pos == [t_pos for t_pos, _ in expected]
    past = [t for t in (1, 12, 25) if (frame_idx - t) * step >= 0]
    tracked_before = [t_diff for t_diff in range(1, 16) if frame_idx - t_diff * step not in (1, 12, 25)]
    assert bank.obj_ptr_t_diff == [abs(frame_idx - t) for t in past] + tracked_before


def test_conditioning_frames_that_are_too_many_count_as_others():
    obj = tracked([0, 3, 8, 20], [9])
    bank = select_memories(obj, 10, reverse=False, num_maskmem=8, max_obj_ptrs=4, max_cond_frames=2)
    memories = [(memory.t_pos, memory.frame_idx) for memory in bank.spatial_memories]
    assert memories == [(0, 8), (0, 20), (7, 3), (1, 9)]
    assert bank.obj_ptr_t_diff == [2, 1]
