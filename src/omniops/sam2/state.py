"""A video, its objects and what the model made of them so far: the state that ``init_state`` returns."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from omniops import device as devices
from omniops.sam2 import memory, network
from omniops.sam2.arguments import an_int
from omniops.sam2.frames import Frames


@dataclass(eq=False)
class Output:
    """What the model made of an object on a frame."""

    logits: Tensor | memory.Shelved
    """(1, 1, S/4, S/4), holes not filled"""
    pointer: Tensor
    object_logits: Tensor
    prompted: bool
    map: Tensor | None = None
    """What later frames look at; None where it has to be made (again)."""


@dataclass(eq=False)
class Track:
    """An object: its points by frame, and what the model made of it by frame."""

    points: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    prompted: set[int] = field(default_factory=set)
    """The frames with points or a mask."""
    conditioning: dict[int, Output] = field(default_factory=dict)
    """Of the frames that every other frame looks at."""
    others: dict[int, Output] = field(default_factory=dict)
    """Of the frames that their neighbours look at."""
    new_conditioning: dict[int, Output] = field(default_factory=dict)
    new_others: dict[int, Output] = field(default_factory=dict)
    """Of prompts since the last propagation, which may still change."""
    reverse: dict[int, bool] = field(default_factory=dict)
    """The frames that were tracked, and whether backwards."""
    recent: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """The frames of ``others`` of which all is kept, the latest last."""

    def new(self, conditioning: bool) -> dict[int, Output]:
        """The outputs of prompts since the last propagation."""
        return self.new_conditioning if conditioning else self.new_others

    def latest(self, frame: int, conditioning: bool) -> Output | None:
        """Its last output on a frame, looked for where the official predictor looks."""
        for outputs in (self.new(conditioning), self.conditioning, self.others):
            if frame in outputs:
                return outputs[frame]
        return None

    def copy(self) -> Track:
        """Another with the same outputs."""
        copied = {each.name: copy.copy(getattr(self, each.name)) for each in fields(self)}
        return Track(**copied)


class Images(Sequence[Tensor]):
    """The frames as the encoder takes them, (3, S, S), float32, normalised, on the device."""

    def __init__(self, frames: Frames, side: int, device: torch.device) -> None:
        self.side = side
        self._frames, self._device = frames, device
        self._ahead: dict[int, Future[Tensor]] = {}

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if isinstance(index, range):
            return torch.stack([self[i] for i in index])
        loading = self._ahead.pop(index, None)
        pixels = loading.result() if loading else self._load(index)
        with devices.exclusive(self._device):
            pixels = pixels.to(self._device, non_blocking=self._device.type == "cuda")  # which has them pinned
            return network.normalised(pixels.permute(2, 0, 1).contiguous() / 255)

    def load(self, indices: Sequence[int], pool: ThreadPoolExecutor) -> None:
        """Begin to decode frames that will be asked for next; of others what has not begun does not."""
        for i in self._ahead.keys() - set(indices):
            self._ahead[i].cancel()
        self._ahead = {i: self._ahead.get(i) or pool.submit(self._load, i) for i in indices}

    def _load(self, index: int) -> Tensor:
        """(S, S, 3), uint8, on the CPU, from where CUDA fetches it without being waited for."""
        pixels = torch.from_numpy(self._frames.resized(index, self.side))
        return pixels.pin_memory() if self._device.type == "cuda" else pixels


class InferenceState(Mapping[str, Any]):
    """A video, its objects and their masks so far; made by ``SAM2VideoPredictor.init_state``, for its other methods.

    The attributes and properties below can be read as those keys of the official predictor's dictionary too:
    ``state["num_frames"]``, ``"num_frames" in state``, ``state.items()``. A key cannot be set.

    ``copy.deepcopy(state)`` is a state of its own: what happens to one of the two does not show in the other. The
    frames, which are only read, they share.
    """

    frames: Frames
    """The video, with its frames as they are."""
    images: Sequence[Tensor]
    """Its frames as the encoder takes them: (3, S, S), float32, normalised, on the device, made when asked for."""
    num_frames: int
    video_height: int
    video_width: int
    device: torch.device
    """The model's."""
    storage_device: torch.device
    """Where masks and memories are kept."""
    offload_video_to_cpu: bool
    offload_state_to_cpu: bool

    _PROPERTIES = ("obj_ids", "obj_id_to_idx", "obj_idx_to_id", "point_inputs_per_obj", "frames_tracked_per_obj")

    def __init__(
        self, frames: Frames, side: int, device: torch.device, offload_video_to_cpu: bool, offload_state_to_cpu: bool
    ) -> None:
        self.frames = frames
        self.images = self._images = Images(frames, side, device)
        self.num_frames = len(frames)
        self.video_height, self.video_width = frames.height, frames.width
        self.device = device
        self.storage_device = torch.device("cpu") if offload_state_to_cpu else device
        self.offload_video_to_cpu = offload_video_to_cpu
        self.offload_state_to_cpu = offload_state_to_cpu
        self._tracks: dict[Any, Track] = {}
        self._features: OrderedDict[int, network.Features] = OrderedDict()
        self._shelf = memory.Shelf()

    @property
    def obj_ids(self) -> list[Any]:
        """The objects, in the order in which their masks come."""
        return list(self._tracks)

    @property
    def obj_id_to_idx(self) -> dict[Any, int]:
        """The place of each object in that order."""
        return {obj_id: i for i, obj_id in enumerate(self._tracks)}

    @property
    def obj_idx_to_id(self) -> dict[int, Any]:
        """The object at each place."""
        return dict(enumerate(self._tracks))

    @property
    def point_inputs_per_obj(self) -> dict[int, dict[int, dict[str, Tensor]]]:
        """Of each place and frame the points, (1, P, 2) in pixels of the resized frame, and their labels, (1, P)."""
        return {
            i: {t: {"point_coords": where, "point_labels": which} for t, (where, which) in track.points.items()}
            for i, track in enumerate(self._tracks.values())
        }

    @property
    def frames_tracked_per_obj(self) -> dict[int, dict[int, dict[str, bool]]]:
        """Of each place the frames that were tracked, and whether backwards."""
        return {
            i: {t: {"reverse": reverse} for t, reverse in track.reverse.items()}
            for i, track in enumerate(self._tracks.values())
        }

    def read_from(self, frames: Frames) -> None:
        """Take the frames from another reader of the same video."""
        self.frames = frames
        self.images = self._images = Images(frames, self._images.side, self.device)

    def release_features(self, keep: int = 0) -> None:
        """Forget what the encoder made of the frames, but for those used last; they are encoded again when asked for.

        Args:
            keep: how many frames' features stay, some 20 MB each at a size of 1024.
        """
        while len(self._features) > keep:
            self._features.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of what the model made so far: features, masks and memories; and of frames decoded ahead."""
        tensors = [t for each in self._features.values() for t in (each.embedding, *each.fine)]
        for track in self._tracks.values():
            tensors += [tensor for pair in track.points.values() for tensor in pair]
            for outputs in (track.conditioning, track.others, track.new_conditioning, track.new_others):
                for output in outputs.values():
                    tensors += [output.logits] if isinstance(output.logits, Tensor) else []
                    tensors += [output.pointer, output.object_logits]
                    tensors += [] if output.map is None else [output.map]
        # Views share the memory of what was computed as one batch.
        storages = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        return sum(storages.values()) + len(self._images._ahead) * 3 * self._images.side**2

    @contextmanager
    def unchanged_on_error(self, obj_id: Hashable) -> Iterator[None]:
        """Within it an exception leaves the object as it was before, or unknown."""
        before = self._tracks.get(obj_id)
        copied = None if before is None else before.copy()
        try:
            yield
        except BaseException:
            if copied is None:
                self._tracks.pop(obj_id, None)
            else:
                self._tracks[obj_id] = copied
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

    # A state is itself alone, and may be a key or in a set.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> InferenceState:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        memo[id(self.frames)] = self.frames
        memo[id(self._images)] = Images(self.frames, self._images.side, self.device)
        memo[id(self._features)] = self._features.copy()  # in which nothing is written
        memo[id(self._shelf)] = made._shelf = memory.Shelf()
        made._tracks = {obj_id: _copied(track, made._shelf) for obj_id, track in self._tracks.items()}
        memo[id(self._tracks)] = made._tracks
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


def _copied(track: Track, shelf: memory.Shelf) -> Track:
    """With outputs of its own, which share their tensors: these are replaced, never written to."""
    made: dict[int, Output] = {}

    def own(output: Output) -> Output:
        if id(output) not in made:
            logits = output.logits
            if isinstance(logits, memory.Shelved):  # the file's place is one for all who read it
                logits = shelf.put(logits.tensor())
            made[id(output)] = replace(output, logits=logits)
        return made[id(output)]

    def owned(outputs: dict[int, Output]) -> dict[int, Output]:
        return {t: own(output) for t, output in outputs.items()}

    return Track(
        points=dict(track.points),
        prompted=set(track.prompted),
        conditioning=owned(track.conditioning),
        others=owned(track.others),
        new_conditioning=owned(track.new_conditioning),
        new_others=owned(track.new_others),
        reverse=dict(track.reverse),
        recent=track.recent.copy(),
    )


def a_state(value: object) -> InferenceState:
    """A state; TypeError for anything else."""
    if not isinstance(value, InferenceState):
        raise TypeError(f"inference_state must be what init_state(...) returns, got {type(value).__name__}")
    return value


def a_frame(state: InferenceState, name: str, value: object) -> int:
    """A frame of the video; TypeError or ValueError for anything else, by its name."""
    frame = an_int(name, value)
    if not 0 <= frame < state.num_frames:
        raise ValueError(f"{name} must be from 0 to {state.num_frames - 1}, got {frame}")
    return frame


def a_track(state: InferenceState, obj_id: object) -> Track:
    """The object of that id, or a new one; TypeError for what cannot be an id."""
    if not isinstance(obj_id, Hashable):
        raise TypeError(f"obj_id must be a number or a name, got {type(obj_id).__name__}")
    return state._tracks.get(obj_id) or Track()
