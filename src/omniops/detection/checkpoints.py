"""Checkpoints of the detectors, fitted to the names of the models here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import Tensor, nn

from omniops import weights

# OpenMMLab's names, as patterns, and this package's.
_NAMES = {
    r"backbone\.": "backbone.body.",
    r"neck\.": "backbone.fpn.",
    r"rpn_head\.rpn_conv\.": "rpn.head.conv.0.0.",
    r"rpn_head\.rpn_cls\.": "rpn.head.cls_logits.",
    r"rpn_head\.rpn_reg\.": "rpn.head.bbox_pred.",
    r"roi_head\.bbox_head\.shared_fcs\.0\.": "roi_heads.box_head.fc6.",
    r"roi_head\.bbox_head\.shared_fcs\.1\.": "roi_heads.box_head.fc7.",
    r"roi_head\.bbox_head\.fc_cls\.": "roi_heads.box_predictor.cls_score.",
    r"roi_head\.bbox_head\.fc_reg\.": "roi_heads.box_predictor.bbox_pred.",
    r"roi_head\.mask_head\.convs\.(\d+)\.conv\.": r"roi_heads.mask_head.\1.0.",
    r"roi_head\.mask_head\.upsample\.": "roi_heads.mask_predictor.upsample.",
    r"roi_head\.mask_head\.conv_logits\.": "roi_heads.mask_predictor.mask_fcn_logits.",
}


def load_checkpoint(
    model: nn.Module, source: str | PathLike[str], *, fresh: Sequence[str] = (), progress: bool = True
) -> None:
    """Load a checkpoint into a detector of this package.

    Args:
        model: the detector.
        source: the path or the URL of OpenMMLab's checkpoint of the architecture, or of a state dict of such a model
            (``torch.save(model.state_dict(), path)``, or a ``.safetensors``). What a URL names is fetched once into
            torch's hub cache; a name that ends with ``-`` and hexadecimal digits is checked against them, and any other
            is preceded there by digits that tell its URL from others.
        fresh: the names of modules that keep what they have.
        progress: whether a download shows its progress.

    Raises:
        TypeError, ValueError, FileNotFoundError, ConnectionError: as ``faster_rcnn_resnet50_fpn_carafe``.

    Example:
        >>> model = omniops.detection.mask_rcnn_resnet50_fpn_carafe()
        >>> published = omniops.detection.COCO_WEIGHTS["mask_rcnn_resnet50_fpn_carafe"]
        >>> load_checkpoint(model, published)  # needs: the network
    """
    if isinstance(fresh, str):
        raise TypeError(f"fresh must be a sequence of names, got the string {fresh!r}: pass [{fresh!r}]")
    location = fspath(source)
    path = weights.fetch(location, progress) if re.match(r"\w+://", location) else Path(location)
    state = weights.read(path)
    if any(name.startswith("roi_head.") for name in state):
        state = from_openmmlab(state)
    modules = dict(model.named_modules())
    for name in fresh:
        if name not in modules:
            raise ValueError(f"fresh must name modules of the model, got {name!r}")
    own = model.state_dict()
    for name, value in own.items():
        # Files of old versions lack the counters, which nothing reads.
        if name.startswith(tuple(f"{module}." for module in fresh)) or name.endswith("num_batches_tracked"):
            state[name] = value
    if complaint := weights.complaint(own, state):
        raise ValueError(f"{path} does not fit the model: {complaint}{_advice(own, state)}")
    model.load_state_dict(state)


def from_openmmlab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of MMDetection's Faster or Mask R-CNN with CARAFE -> that of this package's model.

    MMDetection has the background last among the scores and nowhere else. Here, as in torchvision, it is the first of
    the scores, boxes and masks; what has no counterpart is zero, and never looked at. Names that are not known stay.

    Example:
        >>> scores = torch.arange(3.0)[:, None]  # two classes, and the background at the end
        >>> converted = from_openmmlab({"roi_head.bbox_head.fc_cls.weight": scores})
        >>> {name: tensor.flatten().tolist() for name, tensor in converted.items()}
        {'roi_heads.box_predictor.cls_score.weight': [2.0, 0.0, 1.0]}
    """
    converted = {}
    for name, value in state.items():
        for pattern, replacement in _NAMES.items():
            name, found = re.subn(f"^{pattern}", replacement, name)
            if found:
                break
        if ".cls_score." in name:
            value = value.roll(1, dims=0)
        elif ".box_predictor.bbox_pred." in name:
            value = torch.cat([torch.zeros_like(value[:4]), value])
        elif ".mask_fcn_logits." in name:
            value = torch.cat([torch.zeros_like(value[:1]), value])
        converted[name] = value
    return converted


def _advice(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What to do where the heads alone are of another shape."""
    names = [name for name in own if name in state and own[name].shape != state[name].shape and "_predictor." in name]
    heads = sorted({name.rpartition(".")[0] for name in names})
    return (
        f". For other classes than the checkpoint's num_classes takes their number and fresh={heads}" if heads else ""
    )
