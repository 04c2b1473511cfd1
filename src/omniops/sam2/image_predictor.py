"""Masks of prompts on a picture, with the names, arguments and results of the official ``SAM2ImagePredictor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import Sam2VideoModel

from omniops import device as devices
from omniops import fill_holes, remove_small_components
from omniops.sam2 import network
from omniops.sam2.checkpoints import Pretrained, require_model
from omniops.sam2.pictures import as_rgb, planes, resized
from omniops.sam2.upsampling import guided

if TYPE_CHECKING:
    from PIL.Image import Image

Predicted = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

_FILLED = 10.0


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
    """

    def __init__(
        self,
        sam_model: Sam2VideoModel,
        mask_threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        *,
        upsampling: str = "bilinear",
    ) -> None:
        require_model(sam_model, "sam_model")
        if upsampling not in ("bilinear", "guided"):
            raise ValueError(f"upsampling must be bilinear or guided, got {upsampling!r}")
        self.model = sam_model
        self.mask_threshold = mask_threshold
        self.max_hole_area = max_hole_area
        self.max_sprinkle_area = max_sprinkle_area
        self.upsampling = upsampling
        self.reset_predictor()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def reset_predictor(self) -> None:
        """Forget the picture."""
        self._features: network.Features | None = None
        self._sizes: list[tuple[int, int]] = []
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
        """Encode pictures, of any sizes, for ``predict_batch``; each as in ``set_image``."""
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

        As the official predictor, it takes places outside of the picture, and no prompt at all: then the masks are of
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
        prompts = self._prompts(0, normalize_coords, point_coords, point_labels, box, mask_input)
        return self._arrays(0, prompts, multimask_output, return_logits)

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
        count = len(self._sizes)
        given: dict[str, Sequence[ArrayLike | None] | None] = {
            "point_coords_batch": point_coords_batch,
            "point_labels_batch": point_labels_batch,
            "box_batch": box_batch,
            "mask_input_batch": mask_input_batch,
        }
        for name, batch in given.items():
            if batch is not None and len(batch) != count:
                raise ValueError(f"{name} must have one entry for each of {count} pictures, got {len(batch)}")
        results = []
        for i in range(count):
            each = [None if batch is None else batch[i] for batch in given.values()]
            prompts = self._prompts(i, normalize_coords, *each)
            results.append(self._arrays(i, prompts, multimask_output, return_logits))
        masks, scores, logits = zip(*results, strict=True)
        return list(masks), list(scores), list(logits)

    @devices.exclusively
    def get_image_embedding(self) -> Tensor:
        """(N, 256, 64, 64), what the encoder makes of the N pictures that are set."""
        if self._features is None:
            raise RuntimeError("no picture is set: call set_image(...) before get_image_embedding()")
        return self._features.embedding.clone()  # which autograd takes, as it does not what inference mode made

    def _encode(self, images: Sequence[NDArray[Any] | Image], *, is_batch: bool) -> None:
        self.reset_predictor()
        pictures = [as_rgb(image) for image in images]
        side = self.model.image_size
        with torch.inference_mode(), network.precision(self.model):
            pixels = torch.stack([resized(picture, side, self.device) for picture in pictures])
            features = network.encode(self.model, network.normalised(pixels))
            self._features = features._replace(embedding=network.without_memory(self.model, features.embedding))
        self._sizes = [picture.shape[:2] for picture in pictures]
        if self.upsampling == "guided":
            self._guides = [planes(picture, self.device) for picture in pictures]
        self._is_batch = is_batch

    def _prompts(
        self,
        image: int,
        normalize_coords: bool,
        point_coords: ArrayLike | None,
        point_labels: ArrayLike | None,
        box: ArrayLike | None,
        mask_input: ArrayLike | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Points (B, P, 2) in the resized picture, their labels (B, P), and a mask (B, 1, 256, 256)."""
        height, width = self._sizes[image] if normalize_coords else (1, 1)
        scale = self.model.image_size / torch.tensor([width, height], dtype=torch.float32)
        points, labels = [], []
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels must be given together")
        if box is not None:
            corners = torch.as_tensor(box, dtype=torch.float32).cpu()
            if corners.dim() not in (1, 2) or corners.shape[-1] != 4:
                raise ValueError(f"box must be (4) or (B, 4), got {tuple(corners.shape)}")
            corners = corners.reshape(-1, 2, 2)
            if not (corners[:, 0] <= corners[:, 1]).all():
                raise ValueError(
                    f"box must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {corners.flatten(1).tolist()}"
                )
            points.append(corners)
            labels.append(torch.tensor([[2, 3]]).expand(len(corners), 2))
        if point_coords is not None:
            coordinates = torch.as_tensor(point_coords, dtype=torch.float32).cpu()
            signs = torch.as_tensor(point_labels, dtype=torch.int64).cpu()
            if coordinates.dim() not in (2, 3) or coordinates.shape[-1] != 2:
                raise ValueError(f"point_coords must be (P, 2) or (B, P, 2), got {tuple(coordinates.shape)}")
            if signs.shape != coordinates.shape[:-1]:
                raise ValueError(
                    f"point_labels must be {tuple(coordinates.shape[:-1])} as point_coords say, got "
                    f"{tuple(signs.shape)}"
                )
            if not torch.isin(signs, torch.tensor([-1, 0, 1, 2, 3])).all():
                raise ValueError(f"point_labels must be 1 (object) or 0 (not), got {signs.unique().tolist()}")
            points.append(coordinates if coordinates.dim() == 3 else coordinates[None])
            labels.append(signs if signs.dim() == 2 else signs[None])
        mask = None
        side = self.model.image_size // 4
        if mask_input is not None:
            mask = torch.as_tensor(mask_input, dtype=torch.float32)
            mask = mask[None] if mask.dim() == 3 else mask
            if mask.dim() != 4 or mask.shape[1:] != (1, side, side):
                raise ValueError(
                    f"mask_input must be (1, {side}, {side}) or (B, 1, {side}, {side}), got {tuple(mask.shape)}"
                )
        counts = {len(each) for each in (*points, *([] if mask is None else [mask]))}
        if len(counts) > 1:
            raise ValueError(f"point_coords, box and mask_input must be of one number of prompts, got {sorted(counts)}")
        if 0 in counts:
            raise ValueError("point_coords, box and mask_input must hold a prompt or more, got none")
        if mask is not None:
            if not mask.isfinite().all():
                raise ValueError("mask_input must be finite")
            mask = mask.to(self.device)
        if not points:
            return None, None, mask
        where = torch.cat(points, dim=1)
        if not where.isfinite().all():
            raise ValueError("point_coords and box must be finite")
        return (where * scale).to(self.device), torch.cat(labels, dim=1).to(self.device), mask

    def _predict(
        self,
        image: int,
        prompts: tuple[Tensor | None, Tensor | None, Tensor | None],
        multimask_output: bool,
    ) -> network.Masks:
        """The low-resolution masks of prompts in the resized picture, in float32."""
        assert self._features is not None
        features = self._features.of(image)
        with torch.inference_mode(), network.precision(self.model):
            masks = network.decode(self.model, features, features.embedding, *prompts, multimask=multimask_output)
        return network.Masks(*(each.float() for each in masks))

    def _upsampled(self, image: int, logits: Tensor) -> Tensor:
        """(B, M, 256, 256) -> (B, M, H, W), small holes and specks mended before."""
        with torch.inference_mode():
            mask = logits > self.mask_threshold
            if self.max_hole_area > 0:
                filled = fill_holes(logits - self.mask_threshold, int(self.max_hole_area)) > 0
                logits = torch.where(filled & (logits <= self.mask_threshold), self.mask_threshold + _FILLED, logits)
            if self.max_sprinkle_area > 0:
                # As it was before holes were filled, one of which may lie in a speck.
                kept = remove_small_components(mask, int(self.max_sprinkle_area) + 1)
                logits = torch.where(mask & ~kept, self.mask_threshold - _FILLED, logits)
            if self.upsampling == "guided":
                return guided(logits, self._guides[image], self._sizes[image])
            return F.interpolate(logits, self._sizes[image], mode="bilinear", align_corners=False)

    def _arrays(
        self,
        image: int,
        prompts: tuple[Tensor | None, Tensor | None, Tensor | None],
        multimask_output: bool,
        return_logits: bool,
    ) -> Predicted:
        low = self._predict(image, prompts, multimask_output)
        masks = self._upsampled(image, low.logits)
        if not return_logits:
            masks = masks > self.mask_threshold
        each = (masks, low.scores, low.logits.clamp(-network.LARGEST_LOGIT, network.LARGEST_LOGIT))
        one = len(low.scores) == 1
        arrays = ((value[0] if one else value).cpu().numpy() for value in each)  # masks as bytes, a quarter of float32
        masks_found, scores, logits = (array.astype(np.float32, copy=False) for array in arrays)
        return masks_found, scores, logits
