"""States of videos in files, from which an interrupted tracking goes on as if nothing had happened.

A file is one of safetensors, with JSON in its metadata and no pickle, so that nothing in it runs. It holds the objects
with their prompts, the model's outputs by frame with the memories that are kept, which frames were tracked, and of a
live video the pixels of its last frames. The frames of other videos are not in it, nor the weights, nor the predictor's
options. One file, and not a folder, can be replaced at once: whenever writing is interrupted, the old one stays.

The image encoder's features are not in it either, 20 MB a frame at 1024, but which frames were encoded as one batch:
they are encoded so again, for in another batch the last bits of a GPU's results may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike, fsdecode
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from omniops import device as devices
from omniops.sam2 import tensor_file
from omniops.sam2.architectures import recognize
from omniops.sam2.live_frames import NUM_KEPT_FRAMES, LiveFrames
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.sam2.saved_objects import ObjectReader, decode_id, describe_object, encode_id
from omniops.sam2.tensor_file import Parts, TensorFile
from omniops.sam2.untrusted_json import Fields, parse

if TYPE_CHECKING:
    from omniops.sam2.inference_state import InferenceState

_KIND, _VERSION = "omniops.sam2 state", 1
_SETTINGS = (
    "max_obj_ptrs_in_encoder",
    "multimask_min_pt_num",
    "multimask_max_pt_num",
    "sigmoid_scale_for_mem_enc",
    "sigmoid_bias_for_mem_enc",
)
_MOST_FRAMES = 2**53


def save(state: InferenceState, path: str | PathLike[str]) -> None:
    """Write a file for ``SavedState``: ``InferenceState.save``, which says what is raised."""
    target = Path(fsdecode(path))
    tensors: dict[str, Parts] = {}
    content: dict[str, Any] = {
        "num_frames": state.num_frames,
        "height": state.video_height,
        "width": state.video_width,
        "batches": [{"frame": t, "batch": batch} for t, batch in state.cached_batches.items()],
    }
    if isinstance(state.frames, LiveFrames):
        content["live"] = {"num_tracked": state.num_tracked_live}
        tensors["frames"] = [torch.from_numpy(state.frames[t])[None] for t in state.frames.kept]
    with devices.exclusive(state.device), torch.inference_mode():
        content["model"] = _describe(state.model)
        content["objects"] = [
            {"id": encode_id(obj_id), **describe_object(obj, f"{i}.", tensors)}
            for i, (obj_id, obj) in enumerate(state.objects.items())
        ]
        metadata = {"kind": _KIND, "version": str(_VERSION), "state": json.dumps(content, separators=(",", ":"))}
        tensor_file.write(target, {name: parts for name, parts in tensors.items() if parts}, metadata)


def _describe(model: SAM2Base) -> dict[str, Any]:
    """What must be the same of the model with which a tracking goes on."""
    size = "of another architecture"
    with suppress(ValueError):
        size, _ = recognize(model.state_dict())
    settings = {name: getattr(model, name) for name in _SETTINGS}
    return {
        "size": size,
        "version": model.version,
        "image_size": model.image_size,
        **settings,
        "weights": _fingerprint(model),
    }


def _fingerprint(model: SAM2Base) -> str:
    """Of the weights that are float32 whatever dtype the model was loaded in, which are few."""
    digits = hashlib.sha256()
    for module_name, module in model.named_modules():
        is_cast = isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        if not is_cast and not module_name.startswith("image_encoder"):
            for name, parameter in module.named_parameters(module_name, recurse=False):
                digits.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    return digits.hexdigest()[:16]


class SavedState:
    """A file of ``save``, which is not trusted; a context manager.

    Args:
        path: of the file.
        model: with which the tracking goes on.

    Raises:
        FileNotFoundError: where there is no file.
        ImportError: without safetensors.
        ValueError: where it is no file of ``save``, of another version, damaged, or of another model.
    """

    def __init__(self, path: str | PathLike[str], model: SAM2Base) -> None:
        self._path = Path(fsdecode(path))
        self._model = model
        self._file = TensorFile(self._path)
        try:
            self._content = self._checked_content(self._file.metadata)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SavedState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _checked_content(self, metadata: Mapping[str, str]) -> Fields:
        if metadata.get("kind") != _KIND:
            raise ValueError(f"{self._path} is no state of a video: expected is a file that state.save(path) wrote")
        if metadata.get("version") != str(_VERSION):
            raise ValueError(
                f"{self._path} is a state in version {metadata.get('version')!r:.20} of the format, and this omniops "
                f"reads version '{_VERSION}': load it with the omniops that wrote it"
            )
        with self._damage_named():
            content = parse(metadata.get("state", ""))
            model = content.fields("model")
        with devices.exclusive(self._model.device):
            own = _describe(self._model)
        different = [
            f"{name} {model.get(name)!r:.40} and not {value!r}"
            for name, value in own.items()
            if model.get(name) != value
        ]
        if different:
            raise ValueError(
                f"{self._path} was saved with another model than this predictor has: {', '.join(different)}"
            )
        return content

    def restore(self, state: InferenceState, frames_at_once: int) -> None:
        """Give a state that is new what is in the file.

        Args:
            state: of the video.
            frames_at_once: how many frames the image encoder takes as one batch.

        Raises:
            ValueError: where the video is another one, or the file is damaged.
        """
        with self._damage_named():
            size = tuple(self._content.integer(name, 1, _MOST_FRAMES) for name in ("height", "width"))
            num_frames = self._content.integer("num_frames", 1, _MOST_FRAMES)
            is_live = "live" in self._content
        self._require_video(state, size, num_frames, is_live)
        frames = with_pixels = range(num_frames)
        if isinstance(state.frames, LiveFrames):
            with self._damage_named():
                num_tracked = self._content.fields("live").integer("num_tracked", 0, num_frames)
                last = self._last_frames(size, num_frames)
            state.frames.go_on_from(num_frames, last)
            state.go_on_with_live_frame(num_tracked)
            with_pixels = state.frames.kept
        with self._damage_named(), devices.exclusive(state.device):
            self._restore_batches(state, with_pixels, frames_at_once)
            reader = ObjectReader(self._file, self._model, state.storage_device, state.mask_store, frames, with_pixels)
            for i, described in enumerate(self._content.list_of_fields("objects")):
                obj_id = decode_id(described["id"])
                if obj_id in state.objects:
                    raise ValueError(f"two objects have the id {obj_id!r:.60}")
                state.set_object(obj_id, reader.read(described, f"{i}."))
            self._file.require_all_read()

    def _require_video(self, state: InferenceState, size: Sequence[int], num_frames: int, is_live: bool) -> None:
        if isinstance(state.frames, LiveFrames) != is_live:
            kinds = ("a live video", "a file or folder")
            saved, given = kinds if is_live else kinds[::-1]
            raise ValueError(f"{self._path} is the state of {saved}, and video is {given}")
        described = f"{size[1]} x {size[0]} pixels"
        own = f"{state.video_width} x {state.video_height} pixels"
        if not is_live:
            described += f" and {num_frames} frames"
            own += f" and {state.num_frames} frames"
        if described != own:
            raise ValueError(f"{self._path} is the state of a video of {described}, and video has {own}")

    def _last_frames(self, size: tuple[int, ...], num_frames: int) -> list[NDArray[np.uint8]]:
        """Of a live video."""
        frames = self._file.rows("frames", (None, *size, 3), (torch.uint8,))
        most = min(NUM_KEPT_FRAMES, num_frames)
        if not 1 <= len(frames) <= most:
            raise ValueError(f"the pixels must be of 1 to {most} frames, got {len(frames)}")
        return [frame[0].numpy() for frame in frames]

    def _restore_batches(self, state: InferenceState, frames: range, frames_at_once: int) -> None:
        for described in self._content.list_of_fields("batches"):
            batch = described.frames("batch", frames)
            frame_idx = described.frame("frame", batch)
            if len(batch) <= frames_at_once:  # another device may take less than the one before
                state.cache_features(frame_idx, tuple(batch), None)

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        """Within it errors say that the file is damaged."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self._path} is a damaged state of a video: {error}") from None
