"""SAM 2 in four parts, each for a file of its own: image encoder, mask decoder, memory attention, memory encoder.

A picture needs the first two. On a later frame of a video memory attention comes between them, and the memory encoder
after them. What a predictor does beside, a few lines in any language, is in the parts' descriptions: resizing, choosing
a mask, and keeping the memories of past frames.

All inputs and outputs are float32, but for labels and times; of a part in float16 too, which casts them itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from omniops.export.parts import DynamicShapes, Part, require_exportable
from omniops.sam2.modeling.fpn_neck import FpnNeck
from omniops.sam2.modeling.position_encoding import PositionEmbeddingRandom, get_1d_sine_pe
from omniops.sam2.modeling.sam2 import HIDDEN_DIM, MEM_DIM, SAM2Base, normalize

__all__ = ["parts"]

_CURR_POS_SCALE = 0.1


def parts(model: SAM2Base, *, dynamic: bool = True) -> list[Part]:
    """The four parts of a network, with its weights as they are now.

    Args:
        model: of ``omniops.sam2.load`` or ``build_sam2``, in float32 on the CPU; ``Part.half`` gives those in float16.
        dynamic: whether the numbers of pictures, prompts, points, objects, memories and object pointers may be any;
            else they are 1, but for 2 points, which may be a box, and the memories and object pointers that a frame in
            the middle of a video attends to, 7 and 16.

    Raises:
        TypeError: for a model that is none of SAM 2.
        ValueError: for one in another dtype, on another device, or in training mode.

    Example:
        >>> from omniops.export import sam2
        >>> model = omniops.sam2.load("tiny", "cpu", "float32", random_weights=True, image_size=64)
        >>> encoder, decoder, *_ = sam2.parts(model, dynamic=False)
        >>> image_embed, high_res_feats_0, high_res_feats_1, pix_feat = encoder.module(torch.rand(1, 3, 64, 64))
        >>> image_embed.shape, decoder.output_names
        (torch.Size([1, 256, 4, 4]), ('low_res_masks', 'ious', 'obj_ptr', 'object_score_logits'))
    """
    if not isinstance(model, SAM2Base):
        raise TypeError(f"model must be a network of omniops.sam2.load or build_sam2, got {type(model).__name__}")
    require_exportable(model)
    return [make(model, dynamic) for make in (_image_encoder, _mask_decoder, _memory_attention, _memory_encoder)]


class ImageEncoderPart(nn.Module):
    """Pictures -> their features, as ``SAM2Base.forward_image`` and ``SAM2ImagePredictor`` have them."""

    no_mem_embed: Tensor

    def __init__(self, model: SAM2Base) -> None:
        super().__init__()
        self.trunk, self.neck = model.image_encoder.trunk, model.image_encoder.neck
        self.conv_s0 = _fused(_lateral(self.neck, 3), model.sam_mask_decoder.conv_s0)
        self.conv_s1 = _fused(_lateral(self.neck, 2), model.sam_mask_decoder.conv_s1)
        self.register_buffer("no_mem_embed", model.no_mem_embed.detach().reshape(1, -1, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, 3, S, S) from 0 to 1 -> image_embed, high_res_feats_0, high_res_feats_1, pix_feat."""
        stride_4, stride_8, stride_16, stride_32 = self.trunk(normalize(image.float()).to(self.no_mem_embed.dtype))
        pix_feat = self.neck(stride_16, stride_32)
        image_embed = pix_feat + self.no_mem_embed
        return image_embed.float(), self.conv_s0(stride_4).float(), self.conv_s1(stride_8).float(), pix_feat.float()


class MaskDecoderPart(nn.Module):
    """Prompts -> masks, as ``SAM2Base.predict_masks`` and ``forward_sam_heads`` decode them, all four of each."""

    image_pe: Tensor

    def __init__(self, model: SAM2Base) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.sam_prompt_encoder, model.sam_mask_decoder
        self.obj_ptr_proj, self.no_obj_ptr = model.obj_ptr_proj, model.no_obj_ptr
        self.register_buffer("image_pe", model.sam_prompt_encoder.get_dense_pe().detach().contiguous())

    def half(self) -> MaskDecoderPart:
        """With the encoding of positions in float32: in float16 coordinates would have steps of half a pixel."""
        kept = {
            module: module.positional_encoding_gaussian_matrix
            for module in self.modules()
            if isinstance(module, PositionEmbeddingRandom)
        }
        super().half()
        for module, matrix in kept.items():
            module.positional_encoding_gaussian_matrix = matrix
        return self

    def forward(
        self,
        image_embed: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inputs and outputs of ``_MASK_DECODER``."""
        prompts, decoder, dtype = self.prompt_encoder, self.mask_decoder, self.no_obj_ptr.dtype
        maps = [_for_each(point_coords, m).to(dtype) for m in (image_embed, high_res_feats_0, high_res_feats_1)]
        sparse = prompts.embed_points(point_coords.float(), point_labels).to(dtype)
        dense = torch.where(
            has_mask_input[:, None, None, None] > 0,
            prompts.embed_masks(mask_input.to(dtype)),
            prompts.embed_masks(None),
        )
        found = decoder.decode(maps[0] + dense, self.image_pe.to(dtype), sparse, (maps[1], maps[2]), slice(None))
        masks, ious = found.low_res_masks, found.ious
        if decoder.dynamic_multimask_via_stability:
            stable_masks, stable_ious = decoder.choose_stable(masks, ious)
            masks, ious = torch.cat((stable_masks, masks[:, 1:]), dim=1), torch.cat((stable_ious, ious[:, 1:]), dim=1)
        object_score_logits = found.object_score_logits
        obj_ptr = torch.where(
            object_score_logits[..., None] > 0, self.obj_ptr_proj(found.sam_output_tokens), self.no_obj_ptr
        )
        return masks.float(), ious.float(), obj_ptr.float(), object_score_logits.float()


class MemoryAttentionPart(nn.Module):
    """A frame's features and objects' memories -> features, as ``SAM2Base.prepare_memory_conditioned_features``."""

    curr_pos: Tensor
    memory_pos: Tensor
    maskmem_tpos_enc: Tensor

    def __init__(self, model: SAM2Base) -> None:
        super().__init__()
        side = model.image_size // 16
        self.memory_attention = model.memory_attention
        self.obj_ptr_tpos_proj = model.obj_ptr_tpos_proj
        curr_pos = model.image_encoder.neck.position_encoding(side, side, model.device)
        memory_pos = model.memory_encoder.position_encoding(side, side, model.device)
        self.register_buffer("curr_pos", _to_rows(curr_pos) * _CURR_POS_SCALE)
        self.register_buffer("memory_pos", _to_rows(memory_pos))
        self.register_buffer("maskmem_tpos_enc", model.maskmem_tpos_enc.detach()[:, 0])
        self.side = side

    def forward(
        self, pix_feat: Tensor, maskmem_features: Tensor, maskmem_t_pos: Tensor, obj_ptrs: Tensor, obj_ptr_time: Tensor
    ) -> Tensor:
        """The inputs and outputs of ``_MEMORY_ATTENTION``."""
        dtype = self.maskmem_tpos_enc.dtype
        # The last of the temporal encodings is that of conditioning frames.
        index = (maskmem_t_pos - 1) % len(self.maskmem_tpos_enc)
        memory_pos = (self.memory_pos + self.maskmem_tpos_enc[index]).flatten(0, 1)
        # Each pointer is split into tokens as wide as those of a memory.
        tokens_each = HIDDEN_DIM // MEM_DIM
        pointer_pos = self._pointer_pos(obj_ptr_time)[:, None].expand(-1, tokens_each, -1).flatten(0, 1)
        memories = maskmem_features.to(dtype).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        pointers = obj_ptrs.to(dtype).transpose(0, 1).unflatten(2, (tokens_each, MEM_DIM)).flatten(1, 2)
        attended = self.memory_attention(
            pix_feat.to(dtype).flatten(2).transpose(1, 2) + self.curr_pos,
            torch.cat((memories, pointers), dim=1),
            torch.cat((memory_pos, pointer_pos)),
            (self.side, self.side),
            pointers.shape[1],
        )
        features: Tensor = attended.transpose(1, 2).unflatten(2, (self.side, self.side))
        return features.float()

    def _pointer_pos(self, obj_ptr_time: Tensor) -> Tensor:
        if self.obj_ptr_tpos_proj is None:
            return self.memory_pos.new_zeros(obj_ptr_time.shape[0], MEM_DIM)
        sines = get_1d_sine_pe(obj_ptr_time.float(), HIDDEN_DIM)
        projected: Tensor = self.obj_ptr_tpos_proj(sines.to(self.memory_pos.dtype))
        return projected


class MemoryEncoderPart(nn.Module):
    """A frame's features and objects' masks -> memories, as ``SAM2Base.encode_unrounded_memory``."""

    def __init__(self, model: SAM2Base) -> None:
        super().__init__()
        self.memory_encoder, self.no_obj_embed_spatial = model.memory_encoder, model.no_obj_embed_spatial
        self.scale, self.bias = model.sigmoid_scale_for_mem_enc, model.sigmoid_bias_for_mem_enc

    def forward(
        self, pix_feat: Tensor, low_res_masks: Tensor, object_score_logits: Tensor, is_mask_from_pts: Tensor
    ) -> Tensor:
        """The inputs and outputs of ``_MEMORY_ENCODER``."""
        dtype = self.memory_encoder.pix_feat_proj.weight.dtype
        high_res = F.interpolate(low_res_masks.float(), scale_factor=4.0, mode="bilinear", align_corners=False)
        binary = is_mask_from_pts[:, None, None, None] > 0
        mask_for_mem = torch.where(binary, (high_res > 0).float(), high_res.sigmoid())
        # OpenVINO's CPU adds what one picture gives to several objects' masks in the picture's shape.
        pix_feat = _for_each(low_res_masks, pix_feat)
        memory = self.memory_encoder(pix_feat.to(dtype), (mask_for_mem * self.scale + self.bias).to(dtype))
        if self.no_obj_embed_spatial is not None:
            is_hidden = (object_score_logits <= 0)[..., None, None]
            memory = memory + torch.where(is_hidden, self.no_obj_embed_spatial[..., None, None], 0)
        result: Tensor = memory.float()
        return result


def _lateral(neck: FpnNeck, level: int) -> nn.Conv2d:
    convolution: nn.Conv2d = neck.convs[level].conv  # type: ignore[assignment]
    return convolution


def _fused(lateral: nn.Conv2d, then: nn.Conv2d) -> nn.Conv2d:
    """Two 1x1 convolutions as one, as ``FpnNeck.project`` multiplies them at every call."""
    fused = nn.Conv2d(lateral.in_channels, then.out_channels, kernel_size=1)
    assert lateral.bias is not None
    assert then.bias is not None
    assert fused.bias is not None
    with torch.no_grad():
        outer = then.weight.flatten(1)
        fused.weight.copy_((outer @ lateral.weight.flatten(1))[..., None, None])
        fused.bias.copy_(outer @ lateral.bias + then.bias)
    return fused.eval()


def _to_rows(maps: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C), contiguous: ExecuTorch 1.5 takes the strides of others for those of a constant."""
    return maps.flatten(2).transpose(1, 2).contiguous()


def _for_each(prompts: Tensor, maps: Tensor) -> Tensor:
    """Maps (1 or B, ...) -> (B, ...) for B prompts. A comparison of the two numbers would fix one of them in a file."""
    return maps[torch.arange(prompts.shape[0]).clamp(max=maps.shape[0] - 1)]


def _shapes(dynamic: bool, *dimensions: Sequence[Dim | None]) -> DynamicShapes | None:
    if not dynamic:
        return None
    return tuple({axis: dim for axis, dim in enumerate(dims) if dim is not None} for dims in dimensions)


_IMAGE_ENCODER = """\
The features of N pictures: what every prompt on them needs, computed once.
Inputs:
image: float32 (N, 3, {s}, {s}), red, green and blue from 0 to 1. A picture of any size is resized to the square,
  bilinearly with antialiasing, whatever its proportions; the file normalises it.
Outputs:
image_embed: float32 (N, 256, {s16}, {s16}), what the mask decoder takes for a picture, or a frame without memories.
high_res_feats_0: float32 (N, 32, {s4}, {s4}), for the mask decoder.
high_res_feats_1: float32 (N, 64, {s8}, {s8}), for the mask decoder.
pix_feat: float32 (N, 256, {s16}, {s16}), for memory attention and the memory encoder."""

_MASK_DECODER = """\
The masks of B prompts. Each of the B has four masks: the first for a prompt that means one thing, as a box or several
points, and the other three, to choose from by ious, for one that may mean several, as a single point.
Inputs:
image_embed: float32 (1 or B, 256, {s16}, {s16}), of the image encoder, or on later frames of memory attention.
high_res_feats_0: float32 (1 or B, 32, {s4}, {s4}), of the image encoder.
high_res_feats_1: float32 (1 or B, 64, {s8}, {s8}), of the image encoder.
point_coords: float32 (B, P, 2), x and y in pixels of the resized picture: x * {s} / its width, y * {s} / its height.
point_labels: int64 (B, P): 1 on the object, 0 beside it, 2 and 3 the first and the second corner of a box, which come
  before all points, -1 to ignore, as for an object that is tracked, which has one such point.
mask_input: float32 (B, 1, {s4}, {s4}), the logits of an earlier mask to start from, from -32 to 32.
has_mask_input: float32 (B): 1 where mask_input counts, 0 where it does not.
Outputs:
low_res_masks: float32 (B, 4, {s4}, {s4}), logits: above 0 is the object. They are resized to the picture bilinearly.
ious: float32 (B, 4), the IoU of each mask that the network expects.
obj_ptr: float32 (B, 4, 256), the object pointer of each mask, for later frames of a video.
object_score_logits: float32 (B, 1), above 0 where the object is in the frame. In videos a mask where it is not is
  -1024 all over."""

_MEMORY_ATTENTION = """\
A frame's features after their attention to the memories of B objects: the mask decoder's image_embed for that frame.
Inputs:
pix_feat: float32 (1, 256, {s16}, {s16}), of the image encoder.
maskmem_features: float32 (R, B, 64, {s16}, {s16}), of the memory encoder, of R frames: those with prompts, and up to 6
  before this one.
maskmem_t_pos: int64 (R): how many frames ago each was, 1 to 6; 0 for a frame with prompts.
obj_ptrs: float32 (P, B, 256), of the mask decoder, of P frames: those with prompts, and up to 15 before this one.
obj_ptr_time: float32 (P): how many frames ago each was, divided by 15, or in a video of fewer than 16 frames by their
  number less 1.
Outputs:
image_embed: float32 (B, 256, {s16}, {s16})."""

_MEMORY_ENCODER = """\
The memories that later frames attend to, of B objects on a frame.
Inputs:
pix_feat: float32 (1, 256, {s16}, {s16}), of the image encoder.
low_res_masks: float32 (B, 1, {s4}, {s4}), logits: one mask of each object, of the mask decoder.
object_score_logits: float32 (B, 1), of the mask decoder.
is_mask_from_pts: float32 (B): 1 where the mask is of a prompt on this frame, and counts as 0 or 1; else
  0, where the object was tracked.
Outputs:
maskmem_features: float32 (B, 64, {s16}, {s16}). The video predictor rounds them to bfloat16."""


def _described(text: str, model: SAM2Base) -> str:
    side = model.image_size
    return text.format(s=side, s4=side // 4, s8=side // 8, s16=side // 16)


def _image_encoder(model: SAM2Base, dynamic: bool) -> Part:
    pictures = Dim("pictures")
    side = model.image_size
    return Part(
        "image_encoder",
        ImageEncoderPart(model).eval(),
        (torch.rand(2 if dynamic else 1, 3, side, side),),
        ("image",),
        ("image_embed", "high_res_feats_0", "high_res_feats_1", "pix_feat"),
        _shapes(dynamic, [pictures]),
        _described(_IMAGE_ENCODER, model),
    )


def _mask_decoder(model: SAM2Base, dynamic: bool) -> Part:
    pictures, prompts, points = Dim("pictures"), Dim("prompts"), Dim("points")
    n, b, p = (2, 3, 4) if dynamic else (1, 1, 2)
    side = model.image_size
    args = {
        "image_embed": torch.rand(n, HIDDEN_DIM, side // 16, side // 16),
        "high_res_feats_0": torch.rand(n, HIDDEN_DIM // 8, side // 4, side // 4),
        "high_res_feats_1": torch.rand(n, HIDDEN_DIM // 4, side // 8, side // 8),
        "point_coords": torch.rand(b, p, 2) * side,
        "point_labels": torch.ones(b, p, dtype=torch.int64),
        "mask_input": torch.zeros(b, 1, side // 4, side // 4),
        "has_mask_input": torch.zeros(b),
    }
    dims: list[list[Dim | None]] = [[pictures], [pictures], [pictures], [prompts, points], [prompts, points]]
    return Part(
        "mask_decoder",
        MaskDecoderPart(model).eval(),
        tuple(args.values()),
        tuple(args),
        ("low_res_masks", "ious", "obj_ptr", "object_score_logits"),
        _shapes(dynamic, *dims, [prompts], [prompts]),
        _described(_MASK_DECODER, model),
    )


def _memory_attention(model: SAM2Base, dynamic: bool) -> Part:
    objects, memories, pointers = Dim("objects"), Dim("memories"), Dim("pointers")
    b, r, p = (2, 3, 4) if dynamic else (1, model.num_maskmem, model.max_obj_ptrs_in_encoder)
    side = model.image_size // 16
    args = {
        "pix_feat": torch.rand(1, HIDDEN_DIM, side, side),
        "maskmem_features": torch.rand(r, b, MEM_DIM, side, side),
        "maskmem_t_pos": torch.arange(r),
        "obj_ptrs": torch.rand(p, b, HIDDEN_DIM),
        "obj_ptr_time": torch.arange(p) / (model.max_obj_ptrs_in_encoder - 1),
    }
    dims: list[list[Dim | None]] = [[], [memories, objects], [memories], [pointers, objects], [pointers]]
    return Part(
        "memory_attention",
        MemoryAttentionPart(model).eval(),
        tuple(args.values()),
        tuple(args),
        ("image_embed",),
        _shapes(dynamic, *dims),
        _described(_MEMORY_ATTENTION, model),
    )


def _memory_encoder(model: SAM2Base, dynamic: bool) -> Part:
    objects = Dim("objects")
    b = 2 if dynamic else 1
    side = model.image_size
    args = {
        "pix_feat": torch.rand(1, HIDDEN_DIM, side // 16, side // 16),
        "low_res_masks": torch.randn(b, 1, side // 4, side // 4),
        "object_score_logits": torch.ones(b, 1),
        "is_mask_from_pts": torch.zeros(b),
    }
    return Part(
        "memory_encoder",
        MemoryEncoderPart(model).eval(),
        tuple(args.values()),
        tuple(args),
        ("maskmem_features",),
        _shapes(dynamic, [], [objects], [objects], [objects]),
        _described(_MEMORY_ENCODER, model),
    )
