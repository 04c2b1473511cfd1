"""SAM 2: how its parts work together, as the official ``SAM2Base`` with the settings of the published weights.

Of B objects at once. ``forward_image`` makes the features of frames, ``forward_sam_heads`` finds objects there,
``encode_new_memory`` makes memories of what was found, and ``prepare_memory_conditioned_features`` has a later frame's
features attend to them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniops import device as devices
from omniops.ops._library import without_autocast
from omniops.sam2.modeling.cuda_graphs import CudaGraphs
from omniops.sam2.modeling.fpn_neck import ImageEncoder
from omniops.sam2.modeling.hiera import HieraSize
from omniops.sam2.modeling.layers import MLP, project_rows, to_device
from omniops.sam2.modeling.mask_decoder import MaskDecoder, Masks
from omniops.sam2.modeling.memory_attention import MemoryAttention
from omniops.sam2.modeling.memory_encoder import MemoryEncoder
from omniops.sam2.modeling.position_encoding import get_1d_sine_pe
from omniops.sam2.modeling.prompt_encoder import NOT_A_POINT, PromptEncoder

NO_OBJ_SCORE = -1024.0
"""The logit of every pixel where the object is not in the frame."""
LARGEST_LOGIT = 32.0
"""Of masks that the model is given to start from, as it was trained."""
HIDDEN_DIM, MEM_DIM = 256, 64
"""Channels of features, and of memories."""

_Result = TypeVar("_Result")
_PIXEL_MEAN = (0.485, 0.456, 0.406)
_PIXEL_STD = (0.229, 0.224, 0.225)
_CURR_POS_SCALE = 0.1  # how much of the encoding of its positions is added to the frame that attends to memories
_MASK_SCALE, _MASK_BIAS = 20.0, -10.0  # the logits of a mask that a user gave: 10 inside, -10 outside


class ImageFeatures(NamedTuple):
    """What the image encoder makes of N images of side S."""

    image_embed: Tensor
    """(N, 256, S/16, S/16), without the embedding that says that there is no memory."""
    high_res_feats: tuple[Tensor, Tensor]
    """(N, 32, S/4, S/4) and (N, 64, S/8, S/8), what the mask decoder adds for sharp edges."""
    image_pe: Tensor
    """(1, 256, S/16, S/16), the encoding of positions that prompts have too."""

    def of(self, image: int) -> ImageFeatures:
        """Those of one image."""
        one = slice(image, image + 1)
        stride_4, stride_8 = self.high_res_feats
        return ImageFeatures(self.image_embed[one], (stride_4[one], stride_8[one]), self.image_pe)


class SAMOutput(NamedTuple):
    """B objects on a frame, a mask each."""

    low_res_masks: Tensor
    """(B, 1, S/4, S/4), float32 logits, ``NO_OBJ_SCORE`` all over where the object is not in the frame."""
    obj_ptr: Tensor
    """(B, 256), the object pointer."""
    object_score_logits: Tensor
    """(B, 1), above 0 where the object is in the frame."""
    ious: Tensor
    """(B, 1), the IoU of each mask that the decoder expects; 1 of a mask that was given."""


class SAM2Base(nn.Module):
    """The network, with random weights.

    Args:
        size: of the image encoder's trunk.
        version: "2.0" or "2.1", which tells a hidden object from a seen one in the memory, and gives object pointers
            a position in time.
        image_size: the side S of the square that images are resized to, a multiple of 32.

    Attributes:
        cuda_graphs: of the steps that predictors run again and again. A graph calls no hooks of modules: they need
            ``cuda_graphs.enabled = False``.
    """

    def __init__(self, size: HieraSize, version: str, image_size: int) -> None:
        super().__init__()
        self.version = version
        self.image_size = image_size
        self.num_maskmem = 7
        self.max_obj_ptrs_in_encoder = 16
        self.multimask_min_pt_num = 0
        self.multimask_max_pt_num = 1
        self.sigmoid_scale_for_mem_enc = 20.0
        self.sigmoid_bias_for_mem_enc = -10.0
        self.has_random_weights = False

        self.image_encoder = ImageEncoder(size, HIDDEN_DIM)
        self.mask_downsample = nn.Conv2d(1, 1, kernel_size=4, stride=4)
        self.memory_attention = MemoryAttention(HIDDEN_DIM, MEM_DIM)
        self.memory_encoder = MemoryEncoder(HIDDEN_DIM, MEM_DIM)
        self.sam_prompt_encoder = PromptEncoder(HIDDEN_DIM, image_size)
        self.sam_mask_decoder = MaskDecoder(HIDDEN_DIM)
        self.obj_ptr_proj = MLP(HIDDEN_DIM, HIDDEN_DIM, HIDDEN_DIM, num_layers=3)
        self.obj_ptr_tpos_proj = nn.Linear(HIDDEN_DIM, MEM_DIM) if version == "2.1" else None

        self.maskmem_tpos_enc = nn.Parameter(torch.empty(self.num_maskmem, 1, 1, MEM_DIM))
        self.no_mem_embed = nn.Parameter(torch.empty(1, 1, HIDDEN_DIM))
        self.no_mem_pos_enc = nn.Parameter(torch.empty(1, 1, HIDDEN_DIM))
        self.no_obj_ptr = nn.Parameter(torch.empty(1, HIDDEN_DIM))
        self.no_obj_embed_spatial = nn.Parameter(torch.empty(1, MEM_DIM)) if version == "2.1" else None
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.cuda_graphs = CudaGraphs()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.no_mem_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the image encoder, in which ``autocast`` computes."""
        return self.image_encoder.trunk.pos_embed.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast to the dtype of a model that was loaded in half precision; nothing of its own for one in float32."""
        return devices.autocast(self.device, self.dtype)

    def run(self, method: Callable[..., _Result], *args: Any, **options: Hashable) -> _Result:
        """``method(*args, **options)`` of this network, on CUDA by ``cuda_graphs``."""
        return self.cuda_graphs.run(method, *args, device=self.device, **options)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module."""
        self.cuda_graphs.clear()
        return super().load_state_dict(*args, **kwargs)

    def forward_image(self, img_batch: Tensor) -> ImageFeatures:
        """The features of (N, 3, S, S), as ``normalize`` gives them."""
        encoder, decoder = self.image_encoder, self.sam_mask_decoder
        if self.dtype == torch.float32 or self.device.type == "mps":
            stride_4, stride_8, stride_16, stride_32 = encoder.trunk(img_batch)
        else:
            # All of its weights are in that dtype: autocast would do no more than copy maps to float32 for the norms,
            # which compute in it anyway. MPS does not say in what its norms compute.
            with without_autocast(img_batch):
                stride_4, stride_8, stride_16, stride_32 = encoder.trunk(img_batch.to(self.dtype))
        return ImageFeatures(
            encoder.neck(stride_16, stride_32),
            (
                encoder.neck.project(3, stride_4, decoder.conv_s0),
                encoder.neck.project(2, stride_8, decoder.conv_s1),
            ),
            self.sam_prompt_encoder.get_dense_pe(),
        )

    def add_no_mem_embed(self, image_embed: Tensor) -> Tensor:
        """The embedding of an image by itself, or of a frame that has no memory to attend to."""
        return image_embed + self.no_mem_embed.reshape(1, -1, 1, 1)

    def predict_masks(
        self,
        features: ImageFeatures,
        image_embed: Tensor,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        mask_input: Tensor | None,
        *,
        multimask_output: bool,
    ) -> Masks:
        """The masks of B prompts.

        Args:
            features: of 1 image, or of B.
            image_embed: (1 or B, 256, S/16, S/16), that of the features, conditioned on memories or none.
            point_coords: (B, P, 2), x and y in pixels of the resized image.
            point_labels: (B, P): 1 inside, 0 outside, 2 and 3 the corners of a box, -1 to ignore.
            mask_input: (B, 1, S/4, S/4), logits.
            multimask_output: three masks, else one: the model's choice among all where its single mask is not stable.
        """
        prompts = self.sam_prompt_encoder
        if point_coords is not None and point_labels is not None:
            sparse = prompts.embed_points(point_coords, point_labels)
        else:
            sparse = image_embed.new_zeros(1 if mask_input is None else len(mask_input), 0, HIDDEN_DIM)
        image = (image_embed + prompts.embed_masks(mask_input)).expand(len(sparse), -1, -1, -1)
        if image.device.type == "mps":  # which may get matrix products of expanded tensors wrong (pytorch issue 180201)
            image = image.contiguous()
        masks: Masks = self.sam_mask_decoder(
            image, features.image_pe, sparse, features.high_res_feats, multimask_output=multimask_output
        )
        return masks

    def forward_sam_heads(
        self,
        features: ImageFeatures,
        image_embed: Tensor,
        point_coords: Tensor | None = None,
        point_labels: Tensor | None = None,
        mask_input: Tensor | None = None,
        *,
        multimask_output: bool = True,
    ) -> SAMOutput:
        """Find B objects on a frame.

        Args:
            features: of the frame, 1 image.
            image_embed: (1 or B, 256, S/16, S/16), conditioned on memories or on there being none.
            point_coords: (B, P, 2), x and y in pixels of the resized frame; without them the object is tracked.
            point_labels: (B, P)
            mask_input: (B, 1, S/4, S/4), the logits to start from.
            multimask_output: decode three masks and take the best where few points leave open which one is meant.
        """
        _, output = self.forward_sam_heads_with_masks(
            features, image_embed, point_coords, point_labels, mask_input, multimask_output=multimask_output
        )
        return output

    def forward_sam_heads_with_masks(
        self,
        features: ImageFeatures,
        image_embed: Tensor,
        point_coords: Tensor | None = None,
        point_labels: Tensor | None = None,
        mask_input: Tensor | None = None,
        *,
        multimask_output: bool = True,
    ) -> tuple[Masks, SAMOutput]:
        """As ``forward_sam_heads``, with all masks that were decoded: training has losses of each."""
        if point_coords is None or point_labels is None:
            count = len(image_embed) if mask_input is None else len(mask_input)
            point_coords = image_embed.new_zeros(count, 1, 2, dtype=torch.float32)
            point_labels = point_coords.new_full((count, 1), NOT_A_POINT, dtype=torch.int32)
            number = 0
        else:
            number = point_coords.shape[1]
        several = multimask_output and self.multimask_min_pt_num <= number <= self.multimask_max_pt_num
        masks = self.predict_masks(
            features, image_embed, point_coords, point_labels, mask_input, multimask_output=several
        )
        objects = torch.arange(len(masks.ious), device=masks.ious.device)
        best = masks.ious.argmax(dim=1) if several else torch.zeros_like(objects)
        logits = masks.low_res_masks[objects, best][:, None].float()
        is_obj_appearing = masks.object_score_logits > 0
        obj_ptr = project_rows(self.obj_ptr_proj, masks.sam_output_tokens[objects, best])
        return masks, SAMOutput(
            torch.where(is_obj_appearing[..., None, None], logits, NO_OBJ_SCORE),
            torch.where(is_obj_appearing, obj_ptr, self.no_obj_ptr),
            masks.object_score_logits.float(),
            masks.ious[objects, best][:, None].float(),
        )

    def use_mask_as_output(self, features: ImageFeatures, mask_inputs: Tensor) -> SAMOutput:
        """B objects whose masks are known, (B, 1, S, S) of 0 and 1: they are the result, the decoder gives pointers."""
        logits = mask_inputs * _MASK_SCALE + _MASK_BIAS
        size = features.high_res_feats[0].shape[-2:]
        # On the CPU, because not every device has it.
        low_res = F.interpolate(logits.cpu(), size, mode="bilinear", align_corners=False, antialias=True)
        decoded = self.forward_sam_heads(
            features, features.image_embed, mask_input=self.mask_downsample(mask_inputs), multimask_output=False
        )
        is_obj_appearing = mask_inputs.flatten(1).any(dim=1, keepdim=True)
        obj_ptr = torch.where(is_obj_appearing, decoded.obj_ptr, self.no_obj_ptr)
        return SAMOutput(
            low_res.to(mask_inputs.device),
            obj_ptr,
            is_obj_appearing * _MASK_SCALE + _MASK_BIAS,
            torch.ones_like(decoded.ious),
        )

    def encode_new_memory(
        self, image_embed: Tensor, low_res_masks: Tensor, object_score_logits: Tensor, *, is_mask_from_pts: bool
    ) -> Tensor:
        """The memories that later frames attend to, (B, 64, S/16, S/16).

        Args:
            image_embed: (1, 256, S/16, S/16), of the frame and not conditioned.
            low_res_masks: (B, 1, S/4, S/4), logits of the objects' masks.
            object_score_logits: (B, 1)
            is_mask_from_pts: the masks count as they are seen, inside or outside, as where a user saw and left them.

        Returns:
            bfloat16, to which the official predictor rounds them too.
        """
        return self.encode_unrounded_memory(
            image_embed, low_res_masks, object_score_logits, is_mask_from_pts=is_mask_from_pts
        ).to(torch.bfloat16)

    def encode_unrounded_memory(
        self, image_embed: Tensor, low_res_masks: Tensor, object_score_logits: Tensor, *, is_mask_from_pts: bool
    ) -> Tensor:
        """As ``encode_new_memory``, in the dtype that it is computed in, which the official training keeps."""
        high_res = F.interpolate(low_res_masks, scale_factor=4.0, mode="bilinear", align_corners=False)
        mask_for_mem = (high_res > 0).float() if is_mask_from_pts else high_res.sigmoid()
        scaled = mask_for_mem * self.sigmoid_scale_for_mem_enc + self.sigmoid_bias_for_mem_enc
        maskmem_features: Tensor = self.memory_encoder(image_embed, scaled)
        if self.no_obj_embed_spatial is not None:
            is_hidden = (object_score_logits <= 0)[..., None, None]
            maskmem_features = maskmem_features + is_hidden * self.no_obj_embed_spatial[..., None, None]
        return maskmem_features

    def prepare_memory_conditioned_features(
        self,
        image_embed: Tensor,
        maskmem_features: Tensor,
        maskmem_tpos_index: Tensor,
        obj_ptrs: Tensor | None,
        obj_ptr_pos: Tensor,
    ) -> Tensor:
        """A frame's features after their attention to B objects' memories, (B, 256, S/16, S/16).

        Args:
            image_embed: (1, 256, S/16, S/16), of the frame.
            maskmem_features: (R, B, 64, S/16, S/16), R >= 1 memories.
            maskmem_tpos_index: (R), which temporal encoding each memory has, of ``encode_times``.
            obj_ptrs: (P, B, 256); None where there are none.
            obj_ptr_pos: (P, 256), the sines of each pointer's time, of ``encode_times``.
        """
        device = image_embed.device
        channels, height, width = image_embed.shape[1:]
        position = self.memory_encoder.position_encoding(height, width, device)
        temporal = self.maskmem_tpos_enc[:, 0].index_select(0, to_device(maskmem_tpos_index, device))
        memory_pos = (position.flatten(2).transpose(1, 2) + temporal).flatten(0, 1)
        memory = maskmem_features.float().flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        num_obj_ptr_tokens = 0
        if obj_ptrs is not None:
            # Each is split into tokens as wide as those of a memory.
            tokens = obj_ptrs.float().transpose(0, 1).unflatten(2, (-1, MEM_DIM)).flatten(1, 2)
            memory = torch.cat((memory, tokens), dim=1)
            num_obj_ptr_tokens = tokens.shape[1]
            repeats = num_obj_ptr_tokens // len(obj_ptrs)
            pointer_pos = self._project_time(to_device(obj_ptr_pos, device))[:, None].expand(-1, repeats, -1)
            memory_pos = torch.cat((memory_pos, pointer_pos.flatten(0, 1)))
        curr_pos = self.image_encoder.neck.position_encoding(height, width, device)
        curr = (image_embed + _CURR_POS_SCALE * curr_pos).flatten(2).transpose(1, 2)
        attended: Tensor = self.memory_attention(curr, memory, memory_pos, (height, width), num_obj_ptr_tokens)
        return attended.transpose(1, 2).reshape(len(attended), channels, height, width)

    def track_step(
        self,
        features: ImageFeatures,
        maskmem_features: Tensor,
        maskmem_tpos_index: Tensor,
        obj_ptrs: Tensor | None,
        obj_ptr_pos: Tensor,
    ) -> tuple[SAMOutput, Tensor]:
        """B objects on a frame that attends to their memories, and what ``encode_new_memory`` makes of them.

        The arguments are those of ``prepare_memory_conditioned_features``, with the features of the frame.
        """
        image_embed = self.prepare_memory_conditioned_features(
            features.image_embed, maskmem_features, maskmem_tpos_index, obj_ptrs, obj_ptr_pos
        )
        output = self.forward_sam_heads(features, image_embed)
        return output, self.encode_new_memory(
            features.image_embed, output.low_res_masks, output.object_score_logits, is_mask_from_pts=False
        )

    def encode_times(
        self, maskmem_t_pos: Sequence[int], obj_ptr_t_diff: Sequence[int], max_t_diff: int
    ) -> tuple[Tensor, Tensor]:
        """The ``maskmem_tpos_index`` and ``obj_ptr_pos`` of ``prepare_memory_conditioned_features``, on the CPU.

        Args:
            maskmem_t_pos: how many frames ago each of R memories was made, 0 for those of conditioning frames.
            obj_ptr_t_diff: how many frames ago each of P object pointers was made.
            max_t_diff: the largest number of frames since that an object pointer may have.
        """
        # The last of the temporal encodings is that of conditioning frames.
        maskmem_tpos_index = torch.tensor([(t_pos - 1) % self.num_maskmem for t_pos in maskmem_t_pos])
        return maskmem_tpos_index, get_1d_sine_pe(torch.tensor(obj_ptr_t_diff) / max(max_t_diff, 1), HIDDEN_DIM)

    def _project_time(self, sines: Tensor) -> Tensor:
        """(P, 256) -> (P, 64), the encoding of how many frames ago object pointers were made; zeros in version 2.0."""
        if self.obj_ptr_tpos_proj is None:
            return sines.new_zeros(len(sines), MEM_DIM)
        return project_rows(self.obj_ptr_tpos_proj, sines)


def normalize(images: Tensor) -> Tensor:
    """(N, 3, S, S) from 0 to 1 -> what the image encoder takes."""
    mean, std = (
        to_device(torch.tensor(values, dtype=images.dtype), images.device)[:, None, None]
        for values in (_PIXEL_MEAN, _PIXEL_STD)
    )
    return (images - mean) / std
