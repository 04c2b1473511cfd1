"""How SAM 2 finds objects on a frame of a video: what it looks back at, what it keeps, and the masks that it gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import Sam2VideoModel

from omniops import device as devices
from omniops import fill_holes
from omniops.sam2 import memory, network
from omniops.sam2.arguments import points_and_box
from omniops.sam2.checkpoints import Pretrained
from omniops.sam2.frames import FrameError
from omniops.sam2.pictures import planes
from omniops.sam2.state import InferenceState, Output, Track
from omniops.sam2.upsampling import guided

_RECENT = 16
"""Of how many frames that were tracked last the state keeps everything; at least those that a frame looks back at."""
_FEATURES = 8
"""Of how many frames the state keeps the encoder's features, 20 MB each at 1024; those that were encoded as one batch
go when the last of them does."""
_ENCODED_AT_ONCE = {"cuda": 4}
"""How many frames are encoded as one batch, at most ``_FEATURES``; one elsewhere. CUDA has done the kernels of a small
model before Python has begun the next."""
_AT_ONCE = {"cpu": 2, "mps": 2}
"""How many objects run as one batch, 8 elsewhere. The caches of a CPU do not hold more, nor the memory of small Macs
what attention makes for them."""


class Tracking(Pretrained):
    """The frames of ``SAM2VideoPredictor``, one at a time; its arguments are these attributes."""

    model: Sam2VideoModel
    fill_hole_area: int
    non_overlap_masks: bool
    clear_non_cond_mem_around_input: bool
    binarize_mask_from_pts_for_mem_enc: bool
    max_cond_frames_in_attn: int
    upsampling: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    @property
    def image_size(self) -> int:
        """The side of the square that frames are resized to."""
        return int(self.model.image_size)

    @property
    def frames_at_once(self) -> int:
        """How many frames the encoder is given as one batch."""
        return min(_ENCODED_AT_ONCE.get(self.device.type, 1), _FEATURES)

    @devices.exclusively
    def _propagate(
        self, state: InferenceState, tracks: dict[Any, Track], frame: int, coming: Sequence[int], reverse: bool
    ) -> Tensor:
        """Track the objects to a frame: their masks there, (N, 1, H, W)."""
        tracked = [track for track in tracks.values() if frame not in track.conditioning]
        if tracked:
            self._track(state, tracked, frame, self._features(state, frame, coming), reverse)
        for track in tracks.values():
            if frame in track.conditioning and self.clear_non_cond_mem_around_input:
                self._forget_around(track, frame)
            track.reverse[frame] = reverse
        outputs = [track.conditioning.get(frame) or track.others[frame] for track in tracks.values()]
        return self._resized(state, frame, outputs)

    def _prompt(
        self,
        state: InferenceState,
        points: ArrayLike | Tensor | None,
        labels: ArrayLike | Tensor | None,
        box: ArrayLike | Tensor | None,
        clear_old_points: bool,
        normalize_coords: bool,
    ) -> tuple[Tensor, Tensor]:
        """Points, (1, P, 2), in pixels of the resized frame, and their labels, (1, P), on the device."""
        width, height = (state.video_width, state.video_height) if normalize_coords else (1, 1)
        where, which = points_and_box(points, labels, box, clear_old_points)
        where = where / where.new_tensor([width, height]) * self.image_size
        return where.to(self.device), which.to(self.device)

    def _features(self, state: InferenceState, frame: int, coming: Sequence[int] = ()) -> network.Features:
        """Those of a frame; where they have to be made, also those of frames that come next, as one batch."""
        if frame not in state._features:
            pixels = {frame: state.images[frame]}
            with suppress(FrameError):  # it is raised where that frame's turn comes
                for t in coming[: self.frames_at_once - 1]:
                    if t not in state._features:
                        pixels[t] = state.images[t]
            with network.precision(self.model):
                features = network.encode(self.model, torch.stack(list(pixels.values())))
            for i, t in enumerate(pixels):
                state._features[t] = features.of(i)
            while len(state._features) > _FEATURES:
                state._features.popitem(last=False)
        state._features.move_to_end(frame)
        return state._features[frame]

    def _outputs(self, state: InferenceState, seen: memory.Seen, *, prompted: bool) -> list[Output]:
        each = zip(seen.logits.to(state.storage_device), seen.pointer, seen.object_logits, strict=True)
        return [Output(logits[None], pointer[None], there[None], prompted) for logits, pointer, there in each]

    def _mask(self, output: Output, *, filled: bool = True) -> Tensor:
        """(1, 1, S/4, S/4), its small holes filled or not."""
        logits = output.logits.tensor() if isinstance(output.logits, memory.Shelved) else output.logits
        logits = logits.to(self.device, torch.float32)
        return fill_holes(logits, self.fill_hole_area) if filled and self.fill_hole_area > 0 else logits

    def _resized(self, state: InferenceState, frame: int, outputs: Sequence[Output | None]) -> Tensor:
        """The masks of a frame at the size of the video, (N, 1, H, W)."""
        size = (state.video_height, state.video_width)
        masks = torch.full((len(outputs), 1, *size), memory.NO_OBJECT, device=self.device)
        known = [i for i, output in enumerate(outputs) if output is not None]
        if known:
            low = torch.cat([self._mask(output) for output in outputs if output is not None])
            if self.upsampling == "guided":
                larger = guided(low, planes(state.frames[frame], self.device), size)
            else:
                larger = F.interpolate(low, size, mode="bilinear", align_corners=False)
            for i, mask in zip(known, larger, strict=True):  # a list as index would have CUDA waited for
                masks[i] = mask
        return self._apply_non_overlapping_constraints(masks) if self.non_overlap_masks else masks

    def _apply_non_overlapping_constraints(self, pred_masks: Tensor) -> Tensor:
        """Mask logits (N, 1, H, W) of N objects, each at most -10 wherever another object has the highest.

        By the official predictor's name: ``tools/vos_inference.py`` of the official repository calls it.
        """
        if len(pred_masks) <= 1:
            return pred_masks
        best = pred_masks.argmax(dim=0, keepdim=True)
        index = torch.arange(len(pred_masks), device=pred_masks.device)[:, None, None, None]
        return torch.where(best == index, pred_masks, pred_masks.clamp(max=-10))

    def _masks_on(self, state: InferenceState, frame: int, conditioning: bool) -> Tensor:
        return self._resized(state, frame, [track.latest(frame, conditioning) for track in state._tracks.values()])

    def _track(
        self, state: InferenceState, tracks: Iterable[Track], frame: int, features: network.Features, reverse: bool
    ) -> None:
        """Find objects without prompts on a frame, those that look back at the same frames as one batch."""
        most = self._most_pointers(state)
        at_once = _AT_ONCE.get(self.device.type, 8)
        alike: dict[Any, list[Track]] = {}
        for track in tracks:
            self._shelve(state, track, _RECENT - 1)  # for speed: it waits for the device, so before that is given work
            maps, pointers = self._looks_back(track, frame, reverse, most)
            key = tuple(since for since, *_ in maps), tuple(since for since, _ in pointers)
            alike.setdefault(key, []).append(track)
        for group in alike.values():
            for first in range(0, len(group), at_once):
                batch = group[first : first + at_once]
                with network.precision(self.model):
                    embedding = self._conditioned(state, batch, frame, features, reverse=reverse)
                    seen = memory.segment(self.model, features, embedding)
                    made = memory.remember(
                        self.model, features.embedding, seen.logits, seen.object_logits, binary=False
                    ).to(state.storage_device)
                for i, output in enumerate(self._outputs(state, seen, prompted=False)):
                    output.map = made[i : i + 1]
                    self._keep(state, batch[i], frame, output)

    def _conditioned(
        self, state: InferenceState, tracks: Sequence[Track], frame: int, features: network.Features, *, reverse: bool
    ) -> Tensor:
        """The features of a frame after its look back, (B, 256, S/16, S/16), of objects that look at alike frames."""
        most = self._most_pointers(state)
        looks = [self._looks_back(track, frame, reverse, most) for track in tracks]
        maps_since, pointers_since = ([since for since, *_ in each] for each in looks[0])
        maps = [
            [self._map(state, track, t, output) for _, t, output in seen]
            for track, (seen, _) in zip(tracks, looks, strict=True)
        ]
        pointers = [[output.pointer for _, output in pointed] for _, pointed in looks]
        return memory.condition(
            self.model,
            features.embedding,
            _joined(maps),
            maps_since,
            _joined(pointers) if pointers_since else None,
            pointers_since,
            longest=most - 1,
        )

    def _most_pointers(self, state: InferenceState) -> int:
        return min(state.num_frames, int(self.model.config.max_object_pointers_in_encoder))

    def _looks_back(
        self, track: Track, frame: int, reverse: bool, most: int
    ) -> tuple[list[tuple[int, int, Output]], list[tuple[int, Output]]]:
        """What a frame sees of an object: maps (frames since or 0 with prompts, frame, output), and up to most pointers
        (frames since, output)."""
        step = -1 if reverse else 1
        conditioning, others = track.conditioning, track.others
        if 0 <= self.max_cond_frames_in_attn < len(conditioning):
            near = _nearest(list(conditioning), frame, self.max_cond_frames_in_attn)
            # Those that are left out still count as neighbours.
            others = {**conditioning, **others}
            others = {t: output for t, output in others.items() if t not in near}
            conditioning = {t: conditioning[t] for t in near}
        maps = [(0, t, output) for t, output in conditioning.items()]
        pointers = [((frame - t) * step, output) for t, output in conditioning.items() if (frame - t) * step >= 0]
        for since in range(self.model.config.num_maskmem - 1, 0, -1):
            t = frame - since * step
            if t in others:
                maps.append((since, t, others[t]))
        for since in range(1, most):
            t = frame - since * step
            if t in others:
                pointers.append((since, others[t]))
        return maps, pointers

    def _map(self, state: InferenceState, track: Track, frame: int, output: Output) -> Tensor:
        """What an output leaves to later frames, (1, 64, S/16, S/16); made where it is missing."""
        if output.map is None:
            logits = self._mask(output, filled=output.prompted)
            embedding = self._features(state, frame).embedding
            binary = output.prompted and self.binarize_mask_from_pts_for_mem_enc
            made = memory.remember(self.model, embedding, logits, output.object_logits, binary=binary)
            output.map = made.to(state.storage_device)
            if track.others.get(frame) is output:
                self._keep(state, track, frame, output)
        return output.map.to(self.device, torch.float32)

    def _keep(self, state: InferenceState, track: Track, frame: int, output: Output) -> None:
        """Put an output among those of frames that do not condition others."""
        track.others[frame] = output
        track.recent[frame] = None
        track.recent.move_to_end(frame)
        self._shelve(state, track, _RECENT)

    def _shelve(self, state: InferenceState, track: Track, most: int) -> None:
        """Put what is oldest on the shelf, until all is kept of so many frames at most."""
        while len(track.recent) > most:
            old = track.others[track.recent.popitem(last=False)[0]]
            old.map = None
            if isinstance(old.logits, Tensor):
                old.logits = state._shelf.put(old.logits.to(self.model.vision_encoder.dtype))

    def _settle(self, state: InferenceState) -> None:
        """Let the prompts since the last propagation count."""
        if not state._tracks:
            raise ValueError("there is no object to propagate: call add_new_points_or_box or add_new_mask before")
        for obj_id, track in state._tracks.items():
            if not track.conditioning and not track.new_conditioning:
                raise ValueError(f"obj_id {obj_id!r} has no prompt: add one, or call remove_object")
        for track in state._tracks.values():
            new = [*track.new_others, *track.new_conditioning]
            for frame, output in track.new_others.items():
                self._keep(state, track, frame, output)
            track.conditioning.update(track.new_conditioning)
            track.new_others.clear()
            track.new_conditioning.clear()
            if self.clear_non_cond_mem_around_input:
                for frame in new:
                    self._forget_around(track, frame)
            for frame in track.conditioning:
                _forget(track, frame)

    def _forget_around(self, track: Track, frame: int) -> None:
        for t in range(frame - self.model.config.num_maskmem, frame + self.model.config.num_maskmem + 1):
            if t != frame:
                _forget(track, t)

    def _clear(self, state: InferenceState, track: Track, frame: int) -> None:
        track.points.pop(frame, None)
        track.prompted.discard(frame)
        track.new_conditioning.pop(frame, None)
        track.new_others.pop(frame, None)
        output = track.conditioning.pop(frame, None)
        if output is not None:
            self._keep(state, track, frame, output)
            track.reverse.pop(frame, None)


def _joined(objects: Sequence[Sequence[Tensor]]) -> Tensor:
    """B objects' N tensors (1, ...) -> (N, B, ...)."""
    slots = torch.cat([each for slot in zip(*objects, strict=True) for each in slot])
    return slots.reshape(-1, len(objects), *slots.shape[1:])


def _nearest(frames: Sequence[int], frame: int, most: int) -> list[int]:
    """Of several frames those nearest to one: the last before it, the first from it on, then the nearest others."""
    ends = [
        max((t for t in frames if t < frame), default=None),
        min((t for t in frames if t >= frame), default=None),
    ]
    near = [t for t in ends if t is not None]
    rest = sorted((t for t in frames if t not in near), key=lambda t: abs(t - frame))
    return near + rest[: most - len(near)]


def is_first(track: Track, frame: int) -> bool:
    """Whether a prompt on that frame shows the object, and does not correct what was tracked from another frame."""
    return frame not in track.reverse or not track.conditioning


def _forget(track: Track, frame: int) -> None:
    track.others.pop(frame, None)
    track.recent.pop(frame, None)


def is_new(state: InferenceState, frame: int) -> bool:
    """Whether a first prompt on that frame has come since the last propagation."""
    return any(frame in track.new_conditioning for track in state._tracks.values())
