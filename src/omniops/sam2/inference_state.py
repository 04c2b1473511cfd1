"""A video, its objects and the model's outputs for them so far: the state that ``init_state`` returns."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniops import device as devices
from omniops.sam2 import saved_states
from omniops.sam2.arguments import check_int
from omniops.sam2.frame_loader import VideoFrameLoader
from omniops.sam2.frames import Frames
from omniops.sam2.live_frames import LiveFrames
from omniops.sam2.mask_store import MaskStore
from omniops.sam2.modeling.sam2 import ImageFeatures, SAM2Base
from omniops.sam2.tracked_object import TrackedObject


class CachedFeatures(NamedTuple):
    """The image encoder's features of a frame."""

    batch: tuple[int, ...]
    """The frames that were encoded as one batch: another batch may give features that differ in their last bits."""
    features: ImageFeatures | None
    """None in a state that was loaded, until they are asked for."""


class InferenceState(Mapping[str, Any]):
    """A video, its objects and their masks so far; made by ``SAM2VideoPredictor.init_state``, for its other methods.

    The attributes and properties below can be read as those keys of the official predictor's dictionary too:
    ``state["num_frames"]``, ``"num_frames" in state``, ``state.items()``. A key cannot be set.

    ``copy.deepcopy(state)`` is a state of its own: what happens to one of the two does not show in the other. The
    frames, which are only read, they share.
    """

    frames: Frames | LiveFrames
    """The video, with its frames as they are."""
    images: VideoFrameLoader
    """Its frames as the encoder takes them: (3, S, S), float32, normalised, on the device, decoded when asked for."""
    video_height: int
    video_width: int
    device: torch.device
    """The model's."""
    storage_device: torch.device
    """The device of masks and memories."""
    offload_video_to_cpu: bool
    offload_state_to_cpu: bool

    _PROPERTIES = (
        "num_frames",
        "obj_ids",
        "obj_id_to_idx",
        "obj_idx_to_id",
        "point_inputs_per_obj",
        "frames_tracked_per_obj",
    )

    def __init__(
        self,
        frames: Frames | LiveFrames,
        model: SAM2Base,
        offload_video_to_cpu: bool,
        offload_state_to_cpu: bool,
    ) -> None:
        device = model.device
        self.frames = frames
        self.images = VideoFrameLoader(frames, model.image_size, device)
        self.video_height, self.video_width = frames.height, frames.width
        self.device = device
        self.storage_device = torch.device("cpu") if offload_state_to_cpu else device
        self.offload_video_to_cpu = offload_video_to_cpu
        self.offload_state_to_cpu = offload_state_to_cpu
        # With an underscore, for attributes without one are keys of the mapping.
        self._model = model
        self._objects: dict[Any, TrackedObject] = {}
        self._cached_features: OrderedDict[int, CachedFeatures] = OrderedDict()
        self._mask_store = MaskStore()
        self._num_tracked_live = 0

    @property
    def num_frames(self) -> int:
        """How many frames the video has; of a live one, how many have come so far."""
        return len(self.frames)

    @property
    def obj_ids(self) -> list[Any]:
        """The objects, in the order in which their masks come."""
        return list(self._objects)

    @property
    def obj_id_to_idx(self) -> dict[Any, int]:
        """The index of each object in that order."""
        return {obj_id: i for i, obj_id in enumerate(self._objects)}

    @property
    def obj_idx_to_id(self) -> dict[int, Any]:
        """The object of each index."""
        return dict(enumerate(self._objects))

    @property
    def point_inputs_per_obj(self) -> dict[int, dict[int, dict[str, Tensor]]]:
        """By an object's index and frame the points, (1, P, 2) in pixels of the resized frame, and labels, (1, P)."""
        return {
            i: {frame_idx: inputs._asdict() for frame_idx, inputs in obj.point_inputs.items()}
            for i, obj in enumerate(self._objects.values())
        }

    @property
    def frames_tracked_per_obj(self) -> dict[int, dict[int, dict[str, bool]]]:
        """By an object's index the frames that it was tracked to, and whether in reverse."""
        return {
            i: {frame_idx: {"reverse": reverse} for frame_idx, reverse in obj.frames_tracked.items()}
            for i, obj in enumerate(self._objects.values())
        }

    @property
    def tracked_frames(self) -> dict[Any, dict[int, bool]]:
        """By an object's id the frames that it was tracked to, and whether in reverse; of a live video the last 16."""
        return {obj_id: dict(obj.frames_tracked) for obj_id, obj in self._objects.items()}

    @property
    def model(self) -> SAM2Base:
        """The model that the outputs are of."""
        return self._model

    @property
    def video_size(self) -> tuple[int, int]:
        """The height and width of frames."""
        return self.video_height, self.video_width

    @property
    def objects(self) -> dict[Any, TrackedObject]:
        """What is kept of each object, by its id; a new dictionary of the same objects."""
        return dict(self._objects)

    @property
    def mask_store(self) -> MaskStore:
        """The store of old masks."""
        return self._mask_store

    @property
    def frames_with_features(self) -> list[int]:
        """The frames whose features are cached, the one used last at the end."""
        return list(self._cached_features)

    @devices.exclusively
    def predicted_ious(self, frame_idx: int) -> dict[Any, float]:
        """How good the masks of a frame are, as the mask decoder expects it: the ``predicted_iou`` of pictures' masks.

        It is the decoder's score of its own mask, before holes are filled and whatever the upsampling. The official
        predictor computes it too and drops it. The masks are those of ``masks_on_frame``.

        Args:
            frame_idx: from 0 to ``num_frames`` - 1.

        Returns:
            By the object's id from 0 to 1; 1 of a mask that the user gave, and 0 where the object is not to be seen,
            whose mask is empty. Objects without a mask on the frame are left out.

        Raises:
            ValueError: for a frame out of range.
        """
        frame_idx = check_frame_idx(self, "frame_idx", frame_idx)
        is_cond = self.has_temp_cond_outputs(frame_idx)
        latest = {obj_id: obj.latest_output(frame_idx, is_cond) for obj_id, obj in self.objects.items()}
        outputs = {obj_id: output for obj_id, output in latest.items() if output is not None}
        if not outputs:
            return {}
        is_visible = torch.cat([output.object_score_logits for output in outputs.values()])[:, 0] > 0
        ious = torch.cat([output.predicted_iou for output in outputs.values()])[:, 0]
        return dict(zip(outputs, torch.where(is_visible, ious, 0.0).tolist(), strict=True))

    def object_or_new(self, obj_id: Hashable) -> TrackedObject:
        """The object of an id; a new one, which the state does not have yet, for an id that it does not know."""
        return self._objects.get(obj_id) or TrackedObject()

    def set_object(self, obj_id: Hashable, obj: TrackedObject) -> None:
        """Make it the object of that id."""
        self._objects[obj_id] = obj

    def get_object(self, obj_id: Hashable) -> TrackedObject:
        """The object of an id; ValueError for an id that the state does not know."""
        if obj_id not in self._objects:
            raise ValueError(f"obj_id {obj_id!r} is unknown: the objects are {self.obj_ids}")
        return self._objects[obj_id]

    def remove_object(self, obj_id: Hashable) -> None:
        """Remove an object."""
        del self._objects[obj_id]

    def remove_all_objects(self) -> None:
        """Remove all objects."""
        self._objects.clear()

    def has_temp_cond_outputs(self, frame_idx: int) -> bool:
        """Whether the frame got prompts that make it a conditioning frame after the last propagation."""
        return any(frame_idx in obj.temp_output_dict.cond_frame_outputs for obj in self._objects.values())

    def processing_order(self, start_frame_idx: int | None, max_frame_num_to_track: int, *, reverse: bool) -> range:
        """The frames that a propagation comes to; none in reverse from the first, as in the official predictor."""
        if start_frame_idx is None:
            start_frame_idx = min(t for obj in self._objects.values() for t in obj.output_dict.cond_frame_outputs)
        if not reverse:
            return range(start_frame_idx, min(start_frame_idx + max_frame_num_to_track, self.num_frames - 1) + 1)
        if start_frame_idx == 0:
            return range(0)
        return range(start_frame_idx, max(start_frame_idx - max_frame_num_to_track, 0) - 1, -1)

    @property
    def num_tracked_live(self) -> int:
        """How many frames of a live video a propagation has come to."""
        return self._num_tracked_live

    def go_on_with_live_frame(self, frame_idx: int) -> None:
        """Have the next propagation of a live video begin with that frame."""
        self._num_tracked_live = frame_idx

    def take_live_frame(self) -> int | None:
        """The next frame of a live video, for which it waits; None at its end."""
        assert isinstance(self.frames, LiveFrames)
        if self._num_tracked_live == len(self.frames) and self.frames.take() is None:
            return None
        self._num_tracked_live = len(self.frames)
        return self._num_tracked_live - 1

    def read_from(self, frames: Frames) -> None:
        """Take the frames from another reader of the same video."""
        self.frames = frames
        self.images = VideoFrameLoader(frames, self.images.image_size, self.device)

    @property
    def cached_batches(self) -> dict[int, tuple[int, ...]]:
        """``frames_with_features``, and the frames that were encoded as one batch with each."""
        return {frame_idx: cached.batch for frame_idx, cached in self._cached_features.items()}

    def cache_features(self, frame_idx: int, batch: tuple[int, ...], features: ImageFeatures | None) -> None:
        """Keep the image encoder's features of a frame, and of which batch they are."""
        self._cached_features[frame_idx] = CachedFeatures(batch, features)

    def get_features(self, frame_idx: int) -> ImageFeatures | None:
        """The cached features of a frame, which are the last to be released from now on; None where a state that was
        loaded has yet to encode their batch again. KeyError without."""
        self._cached_features.move_to_end(frame_idx)
        return self._cached_features[frame_idx].features

    def release_features(self, keep: int = 0) -> None:
        """Release the image encoder's features of frames, but for those used last; they are encoded again when needed.

        Args:
            keep: of how many frames the features stay, some 20 MB each at an image size of 1024.
        """
        while len(self._cached_features) > keep:
            self._cached_features.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes in memory of the model's features, masks and memories so far, and of frames that are decoded ahead."""
        features = [cached.features for cached in self._cached_features.values() if cached.features is not None]
        tensors = [t for f in features for t in (f.image_embed, *f.high_res_feats)]
        tensors += [t for obj in self._objects.values() for t in obj.tensors()]
        # Views share the memory of what was computed as one batch.
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        return sum(storages.values()) + self.images.nbytes

    def save(self, path: str | PathLike[str]) -> None:
        """Write all but the video to a file, from which ``SAM2VideoPredictor.load_state`` goes on: bit for bit as here.

        It belongs between two frames of a propagation, or two calls. What was at the path is replaced once the new file
        is on the disk. See ``omniops.sam2.saved_states`` for what is in it.

        Args:
            path: of the file, as ``clip.safetensors``.

        Raises:
            FileNotFoundError: where its folder is not there.
            IsADirectoryError: where it is a folder.
            OSError: where it cannot be written.
            TypeError: for an object's id that is no number, text, None or tuple of them.
        """
        saved_states.save(self, path)

    @contextmanager
    def unchanged_on_error(self, obj_id: Hashable) -> Iterator[None]:
        """Within it an exception leaves the object as it was before, or unknown."""
        before = self._objects.get(obj_id)
        saved = None if before is None else before.copy()
        try:
            yield
        except BaseException:
            if saved is None:
                self._objects.pop(obj_id, None)
            else:
                self._objects[obj_id] = saved
            raise

    def __getitem__(self, key: str) -> Any:
        if key not in tuple(self):
            raise KeyError(f"{key!r}: the state has {', '.join(self)}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in vars(self) if not name.startswith("_"))
        yield from self._PROPERTIES

    def __len__(self) -> int:
        return sum(1 for _ in self)

    # States are compared by identity, and can be keys or in sets.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> InferenceState:
        if isinstance(self.frames, LiveFrames):
            raise TypeError("the state of a live video cannot be copied: each of its frames comes once")
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.frames)] = self.frames
        memo[id(self._model)] = self._model
        memo[id(self.images)] = VideoFrameLoader(self.frames, self.images.image_size, self.device)
        memo[id(self._cached_features)] = self._cached_features.copy()  # the features in it are never written to
        memo[id(self._mask_store)] = mask_store = MaskStore()
        memo[id(self._objects)] = {obj_id: obj.deep_copy(mask_store) for obj_id, obj in self._objects.items()}
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


def check_state(inference_state: object) -> InferenceState:
    """A state of ``init_state``; TypeError for anything else."""
    if not isinstance(inference_state, InferenceState):
        raise TypeError(f"inference_state must be what init_state(...) returns, got {type(inference_state).__name__}")
    return inference_state


def check_frame_idx(state: InferenceState, name: str, value: object) -> int:
    """A frame of the video; TypeError or ValueError for anything else, by the argument's name."""
    frame_idx = check_int(name, value)
    if isinstance(state.frames, LiveFrames) and frame_idx not in state.frames.kept:
        kept = state.frames.kept
        raise ValueError(
            f"{name} must be one of the last frames of the live video, {kept[0]} to {kept[-1]}, got {frame_idx}"
        )
    if not 0 <= frame_idx < state.num_frames:
        raise ValueError(f"{name} must be from 0 to {state.num_frames - 1}, got {frame_idx}")
    return frame_idx
