"""SAM 2's weights, from Meta's own file, from the hub, or from a folder as transformers writes it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import signature
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError

import torch
from huggingface_hub import hf_hub_url, snapshot_download
from torch import Tensor, nn

from omniops import device as devices
from omniops import weights
from omniops.sam2.architectures import IMAGE_SIZE, SIZES, cast, check_image_size, new, recognize
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.sam2.transformers_names import PREFIX as TRANSFORMERS_PREFIX
from omniops.sam2.transformers_names import from_transformers

_CONFIG, _TENSORS = "config.json", "model.safetensors"
_MODEL_TYPE = "sam2_video"
_SETTINGS: dict[str, tuple[str, float]] = {
    "max_obj_ptrs_in_encoder": ("max_object_pointers_in_encoder", 16),
    "multimask_min_pt_num": ("multimask_min_pt_num", 0),
    "multimask_max_pt_num": ("multimask_max_pt_num", 1),
    "sigmoid_scale_for_mem_enc": ("sigmoid_scale_for_mem_enc", 20.0),
    "sigmoid_bias_for_mem_enc": ("sigmoid_bias_for_mem_enc", -10.0),
}
"""Attributes of the model that transformers' configuration may set: their names in it, and the defaults."""

_Predictor = TypeVar("_Predictor")
_LOAD_OPTIONS = ("device", "dtype", "image_size", "compile_encoder", "random_weights")


def load(
    model: str | PathLike[str],
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    image_size: int | None = None,
    compile_encoder: bool = False,
    random_weights: bool = False,
) -> SAM2Base:
    """A model with its weights, for every predictor of ``omniops.sam2``.

    Args:
        model: the path or URL of Meta's checkpoint (``sam2.1_hiera_tiny.pt``, ...), whose size and version its tensors
            tell; a folder with transformers' ``config.json`` and ``model.safetensors``; the hub's id of one
            (``facebook/sam2.1-hiera-tiny``, ...); or ``tiny``, ``small``, ``base-plus`` or ``large`` for that of 2.1.
        device: as ``omniops.device.pick`` takes it.
        dtype: ``float32``, ``bfloat16`` or ``float16``, by name or torch's own. ``auto``: what
            ``omniops.device.autocast`` computes in on that device.
        image_size: the side of the square that pictures are resized to, a multiple of 32; by default the model's own,
            1024. Less is faster and coarser.
        compile_encoder: have ``torch.compile`` make the image encoder faster, at its first picture, and in videos on
            CUDA at the first batch of frames too: that takes minutes. On MPS torch 2.14 is needed.
        random_weights: nothing is fetched or read: ``model`` is a size alone, ``tiny``, ``small``, ``base-plus`` or
            ``large``, and its weights are drawn from a fixed seed, the same at every call. It finds an object wherever
            it is asked for one, and its masks mean nothing.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: for a path where nothing is.
        ConnectionError: where the network or the hub cannot be reached.
        ValueError: for files that are no checkpoint of SAM 2, tensors that are missing or left over, arguments that
            are none of the above, or ``compile_encoder`` on MPS before torch 2.14.

    Example:
        >>> model = load("tiny", "cpu", random_weights=True, image_size=64)  # load("tiny") fetches Meta's weights
        >>> model.image_size
        64
    """
    target = devices.pick(device)
    precision = to_torch_dtype(dtype, target)
    if compile_encoder:
        require_compiler(target)
    source = fspath(model)
    if random_weights:
        built = _random_model(source, IMAGE_SIZE if image_size is None else image_size)
    else:
        built = _read_model(source, image_size)
    cast(built, precision)
    if compile_encoder:
        built.image_encoder.trunk.compile()
    with devices.exclusive(target):
        return built.to(target).eval()


def _read_model(source: str, image_size: int | None) -> SAM2Base:
    """The model of a file, folder, URL, hub id or size, in float32 on the CPU."""
    side = IMAGE_SIZE if image_size is None else image_size
    if re.match(r"\w+://", source):
        return _from_meta(weights.fetch(source), side)
    if Path(source).is_dir():
        return _from_transformers(Path(source), image_size)
    if Path(source).is_file():
        return _from_meta(Path(source), side)
    if source in SIZES:
        return _from_transformers(_fetch(f"facebook/sam2.1-hiera-{source}"), image_size)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not source.endswith((".pt", ".pth")):
        return _from_transformers(_fetch(source), image_size)
    raise FileNotFoundError(
        f"there is no checkpoint at {source}: pass the path of Meta's .pt or of a folder with {_CONFIG} and "
        f"{_TENSORS}, a hub id as facebook/sam2.1-hiera-tiny, or one of {', '.join(SIZES)}"
    )


class Pretrained:
    """The base of predictors, which can be made of a model's name."""

    @classmethod
    def from_pretrained(cls: Callable[..., _Predictor], model_id: str, **options: Any) -> _Predictor:
        """A predictor of ``omniops.sam2.load(model_id)``; options are those of ``load`` and of the class."""
        of_load = load_options(options)
        signature(cls).bind(None, **options)  # raises TypeError for unknown options, before anything is fetched
        return cls(load(model_id, **of_load), **options)


def load_options(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of ``load`` from a call's options, and return them."""
    return {name: options.pop(name) for name in _LOAD_OPTIONS if name in options}


def require_model(model: object, argument: str) -> None:
    """Raise unless a predictor's model is one that ``load`` returns.

    Raises:
        TypeError: for another type.
        ValueError: for a model that is in half precision all over.
    """
    if not isinstance(model, SAM2Base):
        raise TypeError(
            f"{argument} must be a SAM2Base, got {type(model).__name__}: pass what omniops.sam2.load(...) returns"
        )
    dtype = model.memory_attention.norm.weight.dtype
    if dtype != torch.float32:
        raise ValueError(
            f"{argument} must have float32 where precision matters, as in its norms, got {dtype} all over: "
            "omniops.sam2.load(..., dtype=...) has the rest in half precision"
        )


def require_compiler(device: torch.device) -> None:
    """Raise where code of ``torch.compile`` is known to be wrong on the device.

    Raises:
        ValueError: on MPS before torch 2.14, whose compiled layer norms are wrong (pytorch issue 191976).
    """
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if device.type == "mps" and version < (2, 14):
        raise ValueError(
            f"compile_encoder must be False on MPS before torch 2.14, whose compiled layer norms are wrong there, got "
            f"True with torch {torch.__version__}"
        )


def to_torch_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype argument of ``load`` as torch's, on that device."""
    if dtype == "auto":
        return devices.autocast_dtype(device)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    return found


def _random_model(size: str, image_size: int) -> SAM2Base:
    if size not in SIZES:
        raise ValueError(f"random weights are of a size: model must be one of {', '.join(SIZES)}, got {size!r}")
    with torch.random.fork_rng(devices=()):  # the caller's random numbers do not change
        torch.manual_seed(0)
        model = new(size, image_size=image_size)
    with torch.no_grad():  # random weights would say of every object that it is not in the frame
        last: nn.Linear = model.sam_mask_decoder.pred_obj_score_head.layers[-1]  # type: ignore[assignment]
        last.bias.add_(1)
    model.has_random_weights = True
    return model


def _from_meta(path: Path, image_size: int) -> SAM2Base:
    state = weights.read(path, "model")
    if any(name.startswith(TRANSFORMERS_PREFIX) for name in state):
        raise ValueError(f"{path} holds the tensors of transformers' model: pass the folder that its {_CONFIG} is in")
    return _load_weights(state, path, image_size)


def _from_transformers(folder: Path, image_size: int | None) -> SAM2Base:
    for name in (_CONFIG, _TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {folder}")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if config.get("model_type") != _MODEL_TYPE:
            raise ValueError(f"its model_type is {config.get('model_type')!r}, not {_MODEL_TYPE!r}")
        if image_size is None:
            image_size = check_image_size(config.get("image_size", IMAGE_SIZE))
        settings = {name: type(default)(config.get(theirs, default)) for name, (theirs, default) in _SETTINGS.items()}
        if not all(map(math.isfinite, settings.values())):
            raise ValueError(f"its settings must be finite, got {settings}")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{folder / _CONFIG} is no configuration of SAM 2: {error}") from None
    model = _load_weights(from_transformers(weights.read(folder / _TENSORS)), folder / _TENSORS, image_size)
    for name, value in settings.items():
        setattr(model, name, value)
    return model


def _load_weights(state: Mapping[str, Tensor], path: Path, image_size: int) -> SAM2Base:
    """A model with the tensors of Meta's checkpoint."""
    try:
        size, version = recognize(state)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None
    model = new(size, version, image_size=image_size)
    if complaint := weights.complaint(model.state_dict(), state):
        raise ValueError(f"{path} does not fit SAM {version} {size}: {complaint}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # tensors without values, or sparse or quantized ones
        raise ValueError(f"{path} has tensors that SAM {version} {size} cannot take: {error}") from None
    return model


def _fetch(name: str) -> Path:
    """The hub's folder of that name in its own cache."""
    try:
        # Fails quickly where the hub cannot be reached: its own functions retry for long.
        with suppress(HTTPError):
            weights.ask(hf_hub_url(name, _CONFIG)).close()
        folder = snapshot_download(name, allow_patterns=[_CONFIG, _TENSORS])
    except (OSError, ValueError) as error:  # ValueError: no name of a repository
        try:  # files that were fetched before
            return Path(snapshot_download(name, allow_patterns=[_CONFIG, _TENSORS], local_files_only=True))
        except (OSError, ValueError):
            pass
        reason = str(error).partition("\n")[0]
        own = name.rpartition("/")[2].replace("-", "_") if name.startswith("facebook/sam2") else "sam2.1_hiera_tiny"
        raise ConnectionError(
            f"cannot fetch {name} from the Hugging Face hub: {reason}. Where there is a network, download "
            f"https://huggingface.co/{name}/resolve/main/{_CONFIG} and .../{_TENSORS} into a folder and pass that, or "
            f"Meta's checkpoint, {own}.pt, and pass its path"
        ) from None
    return Path(folder)
