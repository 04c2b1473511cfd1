"""The objects of a video in a file of ``saved_states``: what is written of each, and how it is read and checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from omniops.sam2.mask_store import MaskStore, StoredMask
from omniops.sam2.modeling.sam2 import HIDDEN_DIM, MEM_DIM, SAM2Base
from omniops.sam2.prompts import POINT_LABELS, PointInputs
from omniops.sam2.tensor_file import Parts, TensorFile
from omniops.sam2.tracked_object import FrameOutput, OutputDict, TrackedObject
from omniops.sam2.untrusted_json import Fields

_NUM_VALUES = {"obj_ptr": HIDDEN_DIM, "object_score_logits": 1, "predicted_iou": 1}
"""The attributes of an output that are rows, and of how many numbers."""
_MOST_POINTS = 2**31


def encode_id(obj_id: Any) -> Any:
    """An object's id as JSON has it; TypeError for one that it cannot have."""
    if obj_id is None or isinstance(obj_id, (bool, str)):
        return obj_id
    if isinstance(obj_id, tuple):
        return [encode_id(value) for value in obj_id]
    if isinstance(obj_id, float) and math.isfinite(obj_id):
        return float(obj_id)
    with suppress(TypeError):
        if not isinstance(obj_id, Tensor):
            return operator.index(obj_id)
    raise TypeError(
        f"obj_id {obj_id!r} cannot be written to a file: an id there must be a number, a text, None or a tuple of them"
    )


def decode_id(obj_id: Any) -> Any:
    """The id that ``encode_id`` was given; ValueError for another value of JSON."""
    if isinstance(obj_id, list):
        return tuple(decode_id(value) for value in obj_id)
    if isinstance(obj_id, dict):
        raise ValueError("an object's id must be a number, a text, null or a list of them, got an object of JSON")
    return obj_id


def describe_object(obj: TrackedObject, prefix: str, tensors: dict[str, Parts]) -> dict[str, Any]:
    """What is written of an object as JSON.

    Args:
        obj: the object.
        prefix: of the names of its tensors.
        tensors: those of the file, to which its own are added.
    """
    points = obj.point_inputs.values()
    tensors[prefix + "point_coords"] = [inputs.point_coords[0] for inputs in points]
    tensors[prefix + "point_labels"] = [inputs.point_labels[0] for inputs in points]
    described: dict[str, Any] = {
        "prompt_frames": sorted(obj.prompt_frames),
        "point_frames": list(obj.point_inputs),
        "num_points": [inputs.point_labels.shape[1] for inputs in points],
        "frames_tracked": list(obj.frames_tracked),
        "tracked_in_reverse": [t for t, reverse in obj.frames_tracked.items() if reverse],
        "recent_frames": list(obj.recent_frames),
    }
    for name in ("output_dict", "temp_output_dict"):
        output_dict: OutputDict = getattr(obj, name)
        for kind, outputs in vars(output_dict).items():
            described[f"{name}.{kind}"] = _describe_outputs(outputs, f"{prefix}{name}.{kind}.", tensors)
    return described


def _describe_outputs(
    outputs: Mapping[int, FrameOutput], prefix: str, tensors: dict[str, Parts]
) -> dict[str, list[int]]:
    values = outputs.values()
    for name in _NUM_VALUES:  # as one tensor, for which a GPU is asked once
        tensors[prefix + name] = [torch.cat([getattr(output, name) for output in values])] if values else []
    masks = [output.pred_masks for output in values]
    tensors[prefix + "pred_masks"] = [mask for mask in masks if not isinstance(mask, StoredMask)]
    tensors[prefix + "stored_masks"] = [mask for mask in masks if isinstance(mask, StoredMask)]
    memories = [output.maskmem_features for output in values]
    tensors[prefix + "maskmem_features"] = [memory for memory in memories if memory is not None]
    return {
        "frames": list(outputs),
        "with_prompt": [t for t, output in outputs.items() if output.has_prompt],
        "with_stored_mask": [t for t, output in outputs.items() if isinstance(output.pred_masks, StoredMask)],
        "with_memory": [t for t, output in outputs.items() if output.maskmem_features is not None],
    }


class ObjectReader:
    """Reads objects of a file that is not trusted.

    Args:
        file: with the tensors.
        model: to whose shapes they belong.
        storage_device: that of masks and memories.
        mask_store: in which old masks go.
        frames: all of the video.
        frames_with_pixels: those that can be encoded again; all but of a live video.
    """

    def __init__(
        self,
        file: TensorFile,
        model: SAM2Base,
        storage_device: torch.device,
        mask_store: MaskStore,
        frames: range,
        frames_with_pixels: range,
    ) -> None:
        self._file, self._model, self._storage_device = file, model, storage_device
        self._mask_store, self._frames, self._frames_with_pixels = mask_store, frames, frames_with_pixels

    def read(self, described: Fields, prefix: str) -> TrackedObject:
        """An object, as ``describe_object`` described it.

        Raises:
            ValueError: where a part is missing, or something else.
        """
        prompt_frames = described.frames("prompt_frames", self._frames)
        tracked = described.frames("frames_tracked", self._frames)
        in_reverse = set(described.frames("tracked_in_reverse", tracked))
        obj = TrackedObject(
            point_inputs=self._read_points(described, prefix, prompt_frames),
            prompt_frames=set(prompt_frames),
            frames_tracked={t: t in in_reverse for t in tracked},
        )
        for name in ("output_dict", "temp_output_dict"):
            output_dict: OutputDict = getattr(obj, name)
            for kind, outputs in vars(output_dict).items():
                group = f"{name}.{kind}"
                outputs.update(self._read_outputs(described.fields(group), f"{prefix}{group}."))
        recent_frames = described.frames("recent_frames", obj.output_dict.non_cond_frame_outputs)
        obj.recent_frames.update(dict.fromkeys(recent_frames))
        return obj

    def _read_points(self, described: Fields, prefix: str, prompt_frames: Container[int]) -> dict[int, PointInputs]:
        frames = described.frames("point_frames", prompt_frames)
        counts = described.integers("num_points", 1, _MOST_POINTS)
        if len(counts) != len(frames):
            raise ValueError(f"num_points must be of {len(frames)} frames, got {len(counts)}")
        if not frames:
            return {}
        coords = self._file.rows(prefix + "point_coords", (sum(counts), 2)).read().to(self._model.device)
        labels = self._file.rows(prefix + "point_labels", (sum(counts),), (torch.int32,)).read().to(self._model.device)
        if not coords.isfinite().all() or not torch.isin(labels, labels.new_tensor(POINT_LABELS)).all():
            raise ValueError(f"points must be finite and their labels from {min(POINT_LABELS)} to {max(POINT_LABELS)}")
        inputs = zip(coords[None].split(counts, dim=1), labels[None].split(counts, dim=1), strict=True)
        return {t: PointInputs(*tensors) for t, tensors in zip(frames, inputs, strict=True)}

    def _read_outputs(self, described: Fields, prefix: str) -> dict[int, FrameOutput]:
        frames = described.frames("frames", self._frames)
        if not frames:
            return {}
        known = frozenset(frames)
        with_prompt, with_stored_mask, with_memory = (
            frozenset(described.frames(name, known)) for name in ("with_prompt", "with_stored_mask", "with_memory")
        )
        for t in known - with_memory:
            if t not in self._frames_with_pixels:
                raise ValueError(f"frame {t} of the live video has neither a memory nor pixels")
        values = [
            self._file.rows(prefix + name, (len(frames), count)).read().to(self._model.device).split(1)
            for name, count in _NUM_VALUES.items()
        ]
        masks = self._read_masks(prefix, len(known - with_stored_mask))
        stored_masks = self._read_stored_masks(prefix, len(with_stored_mask))
        memories = self._read_memories(prefix, len(with_memory))
        return {
            t: FrameOutput(
                next(stored_masks) if t in with_stored_mask else next(masks),
                pointer,
                score,
                iou,
                t in with_prompt,
                next(memories) if t in with_memory else None,
            )
            for t, pointer, score, iou in zip(frames, *values, strict=True)
        }

    def _read_masks(self, prefix: str, count: int) -> Iterator[Tensor]:
        rows = self._rows(prefix + "pred_masks", count, (1, *self._mask_size), (torch.float32,))
        return (mask.to(self._storage_device) for mask in rows)

    def _read_stored_masks(self, prefix: str, count: int) -> Iterator[StoredMask]:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        rows = self._rows(prefix + "stored_masks", count, (1, *self._mask_size), dtypes)
        return (self._mask_store.put(mask.to(self._model.dtype)) for mask in rows)

    def _read_memories(self, prefix: str, count: int) -> Iterator[Tensor]:
        side = self._model.image_size // 16
        rows = self._rows(prefix + "maskmem_features", count, (MEM_DIM, side, side), (torch.bfloat16,))
        return (memory.to(self._storage_device) for memory in rows)

    def _rows(self, name: str, count: int, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> Iterable[Tensor]:
        """The rows of a tensor, which is not in the file where it would have none."""
        return self._file.rows(name, (count, *shape), dtypes) if count else ()

    @property
    def _mask_size(self) -> tuple[int, int]:
        return self._model.image_size // 4, self._model.image_size // 4
