"""What SAM 2 remembers of an object, and how the next frame looks at it.

An object on a frame leaves a map of its place and looks, ``remember``, and a pointer, one vector, ``Seen.pointer``. The
next frame's features attend to those of the frames before, ``condition``, and the mask decoder finds the object there,
``segment``. All as the official ``SAM2Base`` with the settings of the published weights, but for B objects at once.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from typing import IO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2VideoModel

from omniops.sam2 import network
from omniops.sam2.mask_decoder import project_rows
from omniops.sam2.memory_attention import look_back

NO_OBJECT = -1024.0
"""The logit of every pixel where the object is not in the frame."""

_PLACES = 0.1  # how much of the encoding of its places is added to the frame that looks back
_GIVEN_SCALE, _GIVEN_BIAS = 20.0, -10.0  # the logits of a mask that a user gave: 10 inside, -10 outside


class Seen(NamedTuple):
    """B objects on a frame."""

    logits: Tensor
    """(B, 1, S/4, S/4), float32, ``NO_OBJECT`` all over where the object is not in the frame."""
    pointer: Tensor
    """(B, 256)"""
    object_logits: Tensor
    """(B, 1), above 0 where the object is in the frame."""


def segment(
    model: Sam2VideoModel,
    features: network.Features,
    embedding: Tensor,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    may_be_several: bool = True,
) -> Seen:
    """Find B objects on a frame.

    Args:
        features: of the frame, 1 image.
        embedding: (1 or B, 256, S/16, S/16), conditioned on memories or on there being none.
        points: (B, P, 2), x and y in pixels of the resized frame; without them the object is tracked.
        labels: (B, P)
        mask: (B, 1, S/4, S/4), the logits to start from.
        may_be_several: decode three masks and take the best wherever few points leave open which one is meant.
    """
    if points is None or labels is None:
        count = len(embedding) if mask is None else len(mask)
        points = embedding.new_zeros(count, 1, 2, dtype=torch.float32)
        labels = points.new_full((count, 1), -1, dtype=torch.int32)
        number = 0
    else:
        number = points.shape[1]
    config = model.config
    several = may_be_several and config.multimask_min_pt_num <= number <= config.multimask_max_pt_num
    masks = network.decode(model, features, embedding, points, labels, mask, multimask=several)
    each = torch.arange(len(masks.logits), device=masks.logits.device)
    best = masks.scores.argmax(dim=1) if several else torch.zeros_like(each)
    logits = masks.logits[each, best][:, None].float()
    is_there = masks.object_logits > 0
    return Seen(
        torch.where(is_there[..., None, None], logits, NO_OBJECT),
        _pointer(model, project_rows(model.object_pointer_proj, masks.tokens[each, best]), is_there),
        masks.object_logits.float(),
    )


def given(model: Sam2VideoModel, features: network.Features, mask: Tensor) -> Seen:
    """An object whose mask is known, (1, 1, S, S) of 0 and 1: it is taken as it is, of the decoder only the pointer."""
    logits = mask * _GIVEN_SCALE + _GIVEN_BIAS
    size = features.fine[0].shape[-2:]
    # On the CPU, because not every device has it.
    smaller = F.interpolate(logits.cpu(), size, mode="bilinear", align_corners=False, antialias=True).to(mask.device)
    prompt = model.mask_downsample(mask)
    decoded = segment(model, features, features.embedding, mask=prompt, may_be_several=False)
    is_there = mask.flatten(1).any(dim=1, keepdim=True)
    object_logits = is_there * _GIVEN_SCALE + _GIVEN_BIAS
    return Seen(smaller, _pointer(model, decoded.pointer, is_there), object_logits)


def _pointer(model: Sam2VideoModel, pointer: Tensor, is_there: Tensor) -> Tensor:
    return torch.where(is_there, pointer, model.no_object_pointer)


def remember(
    model: Sam2VideoModel, embedding: Tensor, logits: Tensor, object_logits: Tensor, *, binary: bool
) -> Tensor:
    """The maps that later frames look at, (B, 64, S/16, S/16).

    Args:
        embedding: (1, 256, S/16, S/16), of the frame and not conditioned.
        logits: (B, 1, S/4, S/4), of the objects' masks.
        object_logits: (B, 1)
        binary: the masks count as they are seen, inside or outside, as where a user saw them and left them so.

    Returns:
        bfloat16, to which the official predictor rounds them too.
    """
    larger = F.interpolate(logits, scale_factor=4.0, mode="bilinear", align_corners=False)
    soft = (larger > 0).float() if binary else larger.sigmoid()
    scaled = soft * model.config.sigmoid_scale_for_mem_enc + model.config.sigmoid_bias_for_mem_enc
    encoder = model.memory_encoder
    memory: Tensor = encoder.projection(
        encoder.memory_fuser(encoder.feature_projection(embedding) + encoder.mask_downsampler(scaled))
    )
    hidden = model.occlusion_spatial_embedding_parameter  # of version 2.1
    if hidden is not None:
        memory = memory + (object_logits <= 0)[..., None, None] * hidden[..., None, None]
    return memory.to(torch.bfloat16)


def condition(
    model: Sam2VideoModel,
    embedding: Tensor,
    memories: Tensor,
    memories_since: Sequence[int],
    pointers: Tensor | None,
    pointers_since: Sequence[int],
    longest: int,
) -> Tensor:
    """A frame's features after a look at B objects' memories, (B, 256, S/16, S/16).

    Args:
        embedding: (1, 256, S/16, S/16), of the frame.
        memories: (R, B, 64, S/16, S/16), R >= 1, float32.
        memories_since: R numbers of frames since, 0 for a frame with prompts.
        pointers: (P, B, 256); None where there are none.
        pointers_since: P numbers of frames since.
        longest: the largest number of frames since that a pointer may have.
    """
    _, channels, height, width = embedding.shape
    width_of_memory = memories.shape[2]
    encoding = _encoding(model.memory_encoder.position_encoding, (1, width_of_memory, height, width), embedding.device)
    # The last of the temporal encodings is that of frames with prompts.
    when = torch.stack([model.memory_temporal_positional_encoding[since - 1, 0] for since in memories_since])
    places = (encoding.flatten(2).transpose(1, 2) + when).flatten(0, 1)
    tokens = memories.flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
    still = 0
    if pointers is not None:
        # Each split into tokens as wide as those of a memory.
        parts = pointers.float().transpose(0, 1).unflatten(2, (-1, width_of_memory)).flatten(1, 2)
        tokens = torch.cat((tokens, parts), dim=1)
        still = parts.shape[1]
        when = parts.new_zeros(len(pointers), width_of_memory)
        if model.config.enable_temporal_pos_encoding_for_object_pointers:
            sines = _sines(torch.tensor(pointers_since) / max(longest, 1), channels)
            projection = model.temporal_positional_encoding_projection_layer
            when = project_rows(projection, network.sent(sines, embedding.device))
        places = torch.cat((places, when.repeat_interleave(still // len(pointers), dim=0)))
    frame_places = _encoding(model.vision_encoder.neck.position_encoding, tuple(embedding.shape), embedding.device)
    frame = (embedding + _PLACES * frame_places).flatten(2).transpose(1, 2)
    attended = look_back(model.memory_attention, frame, tokens, places, still)
    return attended.transpose(1, 2).reshape(len(attended), channels, height, width)


@functools.lru_cache(maxsize=8)
def _encoding(module: nn.Module, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of places. Every frame takes two, and transformers remembers one alone; here are those of four models."""
    with torch.inference_mode(False):
        encoding: Tensor = module(shape, device, torch.float32)
        return encoding


def _sines(position: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """(N) -> (N, dim), the sines and cosines of Vaswani et al. (2017), https://arxiv.org/abs/1706.03762."""
    half = dim // 2
    power = torch.arange(half, device=position.device) // 2 * 2 / half
    angles = position[:, None] / temperature**power
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class Shelf:
    """Tensors of one shape, in a temporary file that goes with this object, all in the dtype of the first."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._dtype: torch.dtype | None = None
        self._free: list[int] = []
        self._count = 0

    def put(self, tensor: Tensor) -> Shelved:
        """Write a tensor; its place is free again when what is returned is forgotten."""
        self._dtype = self._dtype or tensor.dtype
        data = tensor.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().tobytes()
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the shelf
        if not self._free:
            self._free.append(self._count)
            self._count += 1
        place = self._free.pop()
        self._file.seek(place * len(data))
        self._file.write(data)
        return Shelved(self._file, self._free, place, len(data), tensor.shape, self._dtype)


class Shelved:
    """A tensor on a ``Shelf``."""

    def __init__(
        self, file: IO[bytes], free: list[int], place: int, size: int, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self._file, self._free, self._place, self._size = file, free, place, size
        self._shape, self._dtype = shape, dtype

    def tensor(self) -> Tensor:
        """It, on the CPU."""
        self._file.seek(self._place * self._size)
        return torch.frombuffer(bytearray(self._file.read(self._size)), dtype=self._dtype).view(self._shape)

    def __del__(self) -> None:
        self._free.append(self._place)
