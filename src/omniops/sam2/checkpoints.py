"""SAM 2's weights, from the hub, a folder or Meta's own file, as transformers' model."""

from __future__ import annotations

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
from torch import Tensor
from transformers import Sam2VideoConfig, Sam2VideoModel

from omniops import device as devices
from omniops import weights
from omniops.sam2.architectures import IMAGE_SIZE, SIZES, cast, lightened, new, recognise, set_image_size

_CONFIG, _TENSORS = "config.json", "model.safetensors"

_Predictor = TypeVar("_Predictor")
_LOAD_OPTIONS = ("device", "dtype", "image_size", "compile_encoder", "random_weights")

# Meta's names, as patterns, and transformers'. The first that fits counts.
_NAMES = {
    r"maskmem_tpos_enc$": "memory_temporal_positional_encoding",
    r"no_mem_embed$": "no_memory_embedding",
    r"no_mem_pos_enc$": "no_memory_positional_encoding",
    r"no_obj_ptr$": "no_object_pointer",
    r"no_obj_embed_spatial$": "occlusion_spatial_embedding_parameter",
    r"obj_ptr_tpos_proj\.": "temporal_positional_encoding_projection_layer.",
    r"obj_ptr_proj\.": "object_pointer_proj.",
    r"image_encoder\.trunk\.patch_embed\.proj\.": "vision_encoder.backbone.patch_embed.projection.",
    r"image_encoder\.trunk\.": "vision_encoder.backbone.",
    r"image_encoder\.neck\.convs\.(\d)\.conv\.": r"vision_encoder.neck.convs.\1.",
    r"memory_attention\.norm\.": "memory_attention.layer_norm.",
    r"memory_encoder\.mask_downsampler\.encoder\.12\.": "memory_encoder.mask_downsampler.final_conv.",
    r"memory_encoder\.pix_feat_proj\.": "memory_encoder.feature_projection.",
    r"memory_encoder\.out_proj\.": "memory_encoder.projection.",
    r"memory_encoder\.fuser\.layers\.(\d)\.gamma$": r"memory_encoder.memory_fuser.layers.\1.scale",
    r"memory_encoder\.fuser\.layers\.(\d)\.dwconv\.": r"memory_encoder.memory_fuser.layers.\1.depthwise_conv.",
    r"memory_encoder\.fuser\.layers\.(\d)\.pwconv(\d)\.": r"memory_encoder.memory_fuser.layers.\1.pointwise_conv\2.",
    r"memory_encoder\.fuser\.layers\.(\d)\.norm\.": r"memory_encoder.memory_fuser.layers.\1.layer_norm.",
    r"sam_prompt_encoder\.mask_downscaling\.0\.": "prompt_encoder.mask_embed.conv1.",
    r"sam_prompt_encoder\.mask_downscaling\.1\.": "prompt_encoder.mask_embed.layer_norm1.",
    r"sam_prompt_encoder\.mask_downscaling\.3\.": "prompt_encoder.mask_embed.conv2.",
    r"sam_prompt_encoder\.mask_downscaling\.4\.": "prompt_encoder.mask_embed.layer_norm2.",
    r"sam_prompt_encoder\.mask_downscaling\.6\.": "prompt_encoder.mask_embed.conv3.",
    r"sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$": (
        "prompt_encoder.shared_embedding.positional_embedding"
    ),
    r"sam_prompt_encoder\.": "prompt_encoder.",
    r"sam_mask_decoder\.output_upscaling\.0\.": "mask_decoder.upscale_conv1.",
    r"sam_mask_decoder\.output_upscaling\.1\.": "mask_decoder.upscale_layer_norm.",
    r"sam_mask_decoder\.output_upscaling\.3\.": "mask_decoder.upscale_conv2.",
    r"sam_mask_decoder\.transformer\.norm_final_attn\.": "mask_decoder.transformer.layer_norm_final_attn.",
    r"sam_mask_decoder\.": "mask_decoder.",
}
# What is called otherwise inside of many modules.
_PARTS = {
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.out_proj\.": ".o_proj.",
}


def load(
    model: str | PathLike[str],
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    image_size: int | None = None,
    compile_encoder: bool = False,
    random_weights: bool = False,
) -> Sam2VideoModel:
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
        transformers' ``Sam2VideoModel`` in evaluation mode.

    Raises:
        FileNotFoundError: for a path where nothing is.
        ConnectionError: where the network or the hub cannot be reached.
        ValueError: for files that are no checkpoint of SAM 2, tensors that are missing or left over, arguments that
            are none of the above, or ``compile_encoder`` on MPS before torch 2.14.
    """
    place = devices.pick(device)
    precision = as_dtype(dtype, place)
    if compile_encoder:
        require_compiler(place)
    source = fspath(model)
    if random_weights:
        built = _random(source, image_size)
    elif re.match(r"\w+://", source):
        built = _meta(weights.fetch(source), image_size)
    elif Path(source).is_dir():
        built = _folder(Path(source), image_size)
    elif Path(source).is_file():
        built = _meta(Path(source), image_size)
    elif source in SIZES:
        built = _folder(_fetched(f"facebook/sam2.1-hiera-{source}"), image_size)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not source.endswith((".pt", ".pth")):
        built = _folder(_fetched(source), image_size)
    else:
        raise FileNotFoundError(
            f"there is no checkpoint at {source}: pass the path of Meta's .pt or of a folder with {_CONFIG} and "
            f"{_TENSORS}, a hub id as facebook/sam2.1-hiera-tiny, or one of {', '.join(SIZES)}"
        )
    cast(built, precision)
    if compile_encoder:
        built.vision_encoder.backbone.compile()
    with devices.exclusive(place):
        return built.to(place).eval()


class Pretrained:
    """What makes a predictor of a model's name."""

    @classmethod
    def from_pretrained(cls: Callable[..., _Predictor], model_id: str, **options: Any) -> _Predictor:
        """With the weights of ``omniops.sam2.load(model_id)``; its options and those of the class are told apart."""
        own = load_options(options)
        signature(cls).bind(None, **options)  # which raises TypeError, before anything is fetched
        return cls(load(model_id, **own), **options)


def load_options(options: dict[str, Any]) -> dict[str, Any]:
    """Takes those of ``load`` out of a call's options."""
    return {name: options.pop(name) for name in _LOAD_OPTIONS if name in options}


def require_model(model: object, argument: str) -> None:
    """Raise where a predictor is given something else than what ``load`` returns.

    Raises:
        TypeError: for another type.
        ValueError: for a model that is in half precision all over.
    """
    if not isinstance(model, Sam2VideoModel):
        raise TypeError(
            f"{argument} must be a Sam2VideoModel, got {type(model).__name__}: pass what omniops.sam2.load(...) returns"
        )
    dtype = model.memory_attention.layer_norm.weight.dtype
    if dtype != torch.float32:
        raise ValueError(
            f"{argument} must have float32 where precision matters, as in its norms, got {dtype} all over: "
            "omniops.sam2.load(..., dtype=...) has the rest in half precision"
        )


def require_compiler(device: torch.device) -> None:
    """Raise where what ``torch.compile`` makes for the device is known to be wrong.

    Raises:
        ValueError: on MPS before torch 2.14, whose compiled layer norms are wrong (pytorch issue 191976).
    """
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if device.type == "mps" and version < (2, 14):
        raise ValueError(
            f"compile_encoder must be False on MPS before torch 2.14, whose compiled layer norms are wrong there, got "
            f"True with torch {torch.__version__}"
        )


def as_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """What ``load`` takes for a dtype as torch's, on that device."""
    if dtype == "auto":
        return devices.autocast_dtype(device)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    return found


def from_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of Meta's checkpoint by the names of transformers' ``Sam2VideoModel``. Names not known stay."""
    depth: dict[str, int] = {}
    for name in state:  # of each multilayer perceptron: its last layer
        if found := re.match(r"(.*(?:_head|_mlps\.\d|ptr_proj|\.mlp))\.layers\.(\d)\.", name):
            depth[found[1]] = max(depth.get(found[1], 0), int(found[2]))
    converted = {}
    for name, value in state.items():
        if found := re.match(r"(.*)\.layers\.(\d)(\.\w+)$", name):
            perceptron, layer, rest = found.groups()
            if perceptron in depth:
                place = "proj_in" if layer == "0" else f"layers.{int(layer) - 1}"
                name = f"{perceptron}.{'proj_out' if int(layer) == depth[perceptron] else place}{rest}"
        if found := re.match(r"memory_encoder\.mask_downsampler\.encoder\.([0-9]|1[01])\.(\w+)$", name):
            block, layer = divmod(int(found[1]), 3)
            name = f"memory_encoder.mask_downsampler.layers.{block}.{'layer_norm' if layer else 'conv'}.{found[2]}"
        for pattern, replacement in _NAMES.items():
            name, found_here = re.subn(f"^{pattern}", replacement, name)
            if found_here:
                break
        for pattern, replacement in _PARTS.items():
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    labels = [name for i in range(4) if (name := f"prompt_encoder.point_embeddings.{i}.weight") in converted]
    if labels:
        converted["prompt_encoder.point_embed.weight"] = torch.cat([converted.pop(name) for name in labels])
    matrix = converted.get("prompt_encoder.shared_embedding.positional_embedding")
    if matrix is not None:
        converted["shared_image_embedding.positional_embedding"] = matrix
    return converted


def _random(size: str, image_size: int | None) -> Sam2VideoModel:
    if size not in SIZES:
        raise ValueError(f"random weights are of a size: model must be one of {', '.join(SIZES)}, got {size!r}")
    with torch.random.fork_rng(devices=()):  # the caller's own random numbers stay what they would have been
        torch.manual_seed(0)
        made = new(size, image_size=IMAGE_SIZE if image_size is None else image_size)
    with torch.no_grad():  # else the model says of every object on every frame that it is not there
        made.mask_decoder.pred_obj_score_head.proj_out.bias += 1
    made.has_random_weights = True
    return made


def _meta(path: Path, image_size: int | None) -> Sam2VideoModel:
    state = weights.read(path, "model")
    if "vision_encoder.backbone.pos_embed" in state:
        raise ValueError(f"{path} holds the tensors of transformers' model: pass the folder that its {_CONFIG} is in")
    try:
        size, version = recognise(state)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None
    side = IMAGE_SIZE if image_size is None else image_size
    model, converted = new(size, version, image_size=side), from_meta(state)
    if complaint := weights.complaint(model.state_dict(), converted):
        raise ValueError(f"{path} does not fit SAM {version} {size}: {complaint}")
    model.load_state_dict(converted)
    return model


def _folder(folder: Path, image_size: int | None) -> Sam2VideoModel:
    for name in (_CONFIG, _TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {folder}")
    try:
        content, _ = Sam2VideoConfig.get_config_dict(folder)
        if content.get("model_type") != Sam2VideoConfig.model_type:
            raise ValueError(f"its model_type is {content.get('model_type')!r}, not {Sam2VideoConfig.model_type!r}")
        config = Sam2VideoConfig.from_dict(content)
    except Exception as error:  # of many types, whatever the file holds
        raise ValueError(f"{folder / _CONFIG} is no configuration of SAM 2: {error}") from None
    if image_size is not None:
        set_image_size(config, image_size)
    try:
        model, report = Sam2VideoModel.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # of many types, whatever the file holds
        raise ValueError(f"{folder / _TENSORS} is no checkpoint, or a damaged one") from error
    wrong = {what: sorted(map(str, report[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {what} ({weights.shown(names)})" for what, names in wrong.items() if names)
        raise ValueError(f"{folder} does not fit SAM 2's video model: {listed}")
    return lightened(model)


def _fetched(name: str) -> Path:
    """The hub's folder of that name in its own cache."""
    try:
        # Whether the hub is there at all, which its own functions ask several times, and patiently.
        with suppress(HTTPError):
            weights.ask(hf_hub_url(name, _CONFIG)).close()
        folder = snapshot_download(name, allow_patterns=[_CONFIG, _TENSORS])
    except (OSError, ValueError) as error:  # ValueError: no name of a repository
        try:  # what was fetched before
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
