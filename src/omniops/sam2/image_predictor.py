"""Masks of prompts on a picture, with the names, arguments and results of the official ``SAM2ImagePredictor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from omniops import device as devices
from omniops import fill_holes, remove_small_components
from omniops.sam2.arguments import check_upsampling
from omniops.sam2.checkpoints import Pretrained, require_model
from omniops.sam2.modeling.mask_decoder import Masks
from omniops.sam2.modeling.sam2 import LARGEST_LOGIT, ImageFeatures, SAM2Base, normalize
from omniops.sam2.prompts import ImagePrompts, check_image_prompts
from omniops.sam2.transforms import resize, to_rgb, to_tensor
from omniops.sam2.upsampling import guided

if TYPE_CHECKING:
    from PIL.Image import Image

Predicted = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

_MENDED_LOGIT = 10.0
"""How far pixels of holes are put above the threshold, and pixels of specks below it, as in the official package."""


class SAM2ImagePredictor(Pretrained):
    """Encodes a picture once, then gives the masks of as many prompts as are asked for.

    Its methods may be called from several threads, on an Apple GPU too, where they wait for each other; the picture is
    one for all of them.

    Args:
        sam_model: of ``omniops.sam2.load`` or ``build_sam2``.
        mask_threshold: the logit above which a pixel belongs to a mask.
        max_hole_area: holes up to that many pixels of the low-resolution mask (a quarter of the resized picture) are
            filled; 0 for none.
        max_sprinkle_area: the same for specks, which are removed.
        upsampling: how masks come to the size of the picture: ``bilinear`` as in the official predictor, or ``guided``
            by the picture's colours, with edges that follow its own (``omniops.sam2.upsampling``).

    Raises:
        TypeError: where ``sam_model`` is something else.
        ValueError: for another way of upsampling.

    Example:
        >>> predictor = SAM2ImagePredictor(omniops.sam2.load("tiny", random_weights=True, image_size=64))
        >>> predictor.set_image(np.zeros((48, 64, 3), np.uint8))
        >>> masks, scores, logits = predictor.predict(point_coords=[[32, 24]], point_labels=[1])
        >>> masks.shape, scores.shape
        ((3, 48, 64), (3,))
    """

    def __init__(
        self,
        sam_model: SAM2Base,
        mask_threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        *,
        upsampling: str = "bilinear",
    ) -> None:
        require_model(sam_model, "sam_model")
        self.model = sam_model
        self.mask_threshold = mask_threshold
        self.max_hole_area = max_hole_area
        self.max_sprinkle_area = max_sprinkle_area
        self.upsampling = check_upsampling(upsampling)
        self.reset_predictor()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def reset_predictor(self) -> None:
        """Forget the picture."""
        self._features: ImageFeatures | None = None
        self._orig_hw: list[tuple[int, int]] = []
        self._guides: list[Tensor] = []
        self._is_batch = False

    @devices.exclusively
    def set_image(self, image: NDArray[Any] | Image) -> None:
        """Encode a picture.

        Args:
            image: RGB as PIL's or as an array: (H, W, 3) or (H, W, 4), whose alpha is dropped, or (H, W) or (H, W, 1)
                of grey; uint8, uint16, or floating from 0 to 1.

        Raises:
            TypeError: for anything else, or another dtype.
            ValueError: for another shape, or values out of range.
        """
        self._encode([image], is_batch=False)

    @devices.exclusively
    def set_image_batch(self, image_list: Sequence[NDArray[Any] | Image]) -> None:
        """Encode pictures, of any sizes, for ``predict_batch``.

        Args:
            image_list: pictures as ``set_image`` takes them.

        Raises:
            TypeError, ValueError: as ``set_image``, and for anything else than a list of one picture or more.
        """
        if not isinstance(image_list, (list, tuple)):
            raise TypeError(f"image_list must be a list of pictures, got {type(image_list).__name__}")
        if not image_list:
            raise ValueError("image_list must not be empty")
        self._encode(image_list, is_batch=True)

    @devices.exclusively
    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> Predicted:
        """The masks of a prompt, or of B prompts at once.

        As the official predictor, it takes points outside of the picture, and no prompt at all: then the masks are of
        what the model finds first.

        Args:
            point_coords: (P, 2) or (B, P, 2), x and y in pixels of the picture.
            point_labels: (P) or (B, P), 1 where a point is of the object and 0 where it is not.
            box: (4) or (B, 4), x0, y0, x1, y1.
            mask_input: (1, H, W) or (B, 1, H, W) with H = W = 256, the logits of an earlier prediction.
            multimask_output: three masks, to choose from by their scores; else one.
            return_logits: logits in place of 0 and 1.
            normalize_coords: the coordinates are pixels; else fractions of the picture, from 0 to 1.

        Returns:
            masks (M, H, W) of 0 and 1, or of logits, at the size of the picture; scores (M), the IoU that the model
            expects; logits (M, 256, 256), from -32 to 32. All are float32, as in the official predictor; ``masks > 0``
            is bool. Of B > 1 prompts (B, M, ...).

        Raises:
            RuntimeError: where no picture is set.
            ValueError: for prompts of wrong shapes, labels or boxes.
        """
        if self._features is None:
            raise RuntimeError("no picture is set: call set_image(...) before predict(...)")
        if self._is_batch:
            raise RuntimeError(
                "pictures were set by set_image_batch: call predict_batch(...), or set_image(...) before"
            )
        return self._predict(
            0, (point_coords, point_labels, box, mask_input), multimask_output, return_logits, normalize_coords
        )

    @devices.exclusively
    def predict_batch(
        self,
        point_coords_batch: Sequence[ArrayLike | None] | None = None,
        point_labels_batch: Sequence[ArrayLike | None] | None = None,
        box_batch: Sequence[ArrayLike | None] | None = None,
        mask_input_batch: Sequence[ArrayLike | None] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        """``predict`` for each picture of ``set_image_batch``, with a list of each result."""
        if self._features is None or not self._is_batch:
            raise RuntimeError("no pictures are set: call set_image_batch(...) before predict_batch(...)")
        count = len(self._orig_hw)
        batches: dict[str, Sequence[ArrayLike | None] | None] = {
            "point_coords_batch": point_coords_batch,
            "point_labels_batch": point_labels_batch,
            "box_batch": box_batch,
            "mask_input_batch": mask_input_batch,
        }
        for name, batch in batches.items():
            if batch is not None and len(batch) != count:
                raise ValueError(f"{name} must have one entry for each of {count} pictures, got {len(batch)}")
        results = []
        for i in range(count):
            prompts = tuple(None if batch is None else batch[i] for batch in batches.values())
            results.append(self._predict(i, prompts, multimask_output, return_logits, normalize_coords))
        masks, scores, logits = zip(*results, strict=True)
        return list(masks), list(scores), list(logits)

    @devices.exclusively
    def get_image_embedding(self) -> Tensor:
        """(N, 256, 64, 64), the image embeddings of the N pictures that are set."""
        if self._features is None:
            raise RuntimeError("no picture is set: call set_image(...) before get_image_embedding()")
        return self._features.image_embed.clone()  # autograd refuses tensors of inference mode, and takes their copies

    @devices.exclusively
    def predict_low_res_masks(self, prompts: ImagePrompts, *, multimask_output: bool = True, img_idx: int = 0) -> Masks:
        """``predict`` for checked prompts, up to the masks of low resolution: what the mask generator batches.

        Args:
            prompts: on the device.
            multimask_output: as in ``predict``.
            img_idx: of the picture, where several are set.

        Returns:
            low_res_masks (B, M, 256, 256), logits; ious (B, M); object_score_logits and tokens; all in float32.

        Raises:
            RuntimeError: where no picture is set.
        """
        if self._features is None:
            raise RuntimeError("no picture is set: call set_image(...) before predict_low_res_masks(...)")
        features = self._features.of(img_idx)
        with torch.inference_mode(), self.model.autocast():
            masks = self.model.run(
                self.model.predict_masks, features, features.image_embed, *prompts, multimask_output=multimask_output
            )
        return Masks(*(tensor.float() for tensor in masks))

    @devices.exclusively
    def postprocess_masks(self, low_res_masks: Tensor, *, img_idx: int = 0) -> Tensor:
        """(B, M, 256, 256) -> (B, M, H, W), small holes filled and specks removed before; as the official transforms.

        Args:
            low_res_masks: logits, of ``predict_low_res_masks``.
            img_idx: of the picture, where several are set.
        """
        with torch.inference_mode():
            logits = self._mend(low_res_masks)
            if self.upsampling == "guided":
                return guided(logits, self._guides[img_idx], self._orig_hw[img_idx])
            return F.interpolate(logits, self._orig_hw[img_idx], mode="bilinear", align_corners=False)

    def _encode(self, images: Sequence[NDArray[Any] | Image], *, is_batch: bool) -> None:
        self.reset_predictor()
        pictures = [to_rgb(image) for image in images]
        side = self.model.image_size
        with torch.inference_mode(), self.model.autocast():
            pixels = torch.stack([resize(picture, side, self.device) for picture in pictures])
            features = self.model.run(self.model.forward_image, normalize(pixels))
            self._features = features._replace(image_embed=self.model.add_no_mem_embed(features.image_embed))
        self._orig_hw = [picture.shape[:2] for picture in pictures]
        if self.upsampling == "guided":
            self._guides = [to_tensor(picture, self.device) for picture in pictures]
        self._is_batch = is_batch

    def _predict(
        self,
        img_idx: int,
        prompts: tuple[ArrayLike | None, ...],
        multimask_output: bool,
        return_logits: bool,
        normalize_coords: bool,
    ) -> Predicted:
        """``predict`` for one of the pictures that are set."""
        size = self._orig_hw[img_idx] if normalize_coords else (1, 1)
        image_prompts = check_image_prompts(*prompts, size=size, image_size=self.model.image_size)
        predicted = self.predict_low_res_masks(
            image_prompts.to(self.device), multimask_output=multimask_output, img_idx=img_idx
        )
        masks = self.postprocess_masks(predicted.low_res_masks, img_idx=img_idx)
        if not return_logits:
            masks = masks > self.mask_threshold
        logits = predicted.low_res_masks.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        return (
            _to_array(masks),
            _to_array(predicted.ious),
            _to_array(logits),
        )

    def _mend(self, logits: Tensor) -> Tensor:
        """The logits with small holes above the threshold, and small specks below it."""
        mask = logits > self.mask_threshold
        if self.max_hole_area > 0:
            filled = fill_holes(logits - self.mask_threshold, int(self.max_hole_area)) > 0
            holes = filled & (logits <= self.mask_threshold)
            logits = torch.where(holes, self.mask_threshold + _MENDED_LOGIT, logits)
        if self.max_sprinkle_area > 0:
            # Of the mask before holes were filled: a speck may have a hole.
            kept = remove_small_components(mask, int(self.max_sprinkle_area) + 1)
            logits = torch.where(mask & ~kept, self.mask_threshold - _MENDED_LOGIT, logits)
        return logits


def _to_array(values: Tensor) -> NDArray[np.float32]:
    """Float32 on the CPU, without the first dimension where there is one prompt."""
    values = values[0] if len(values) == 1 else values
    # Converted after the copy: bool masks are a quarter of the bytes of float32. By PyTorch, which uses all cores.
    array: NDArray[np.float32] = values.cpu().float().numpy()
    return array
