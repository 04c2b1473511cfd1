"""``omniops export``: a model as a file for another runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniops.cli.common import CommandError, print_lines
from omniops.cli.errors import raise_received, say
from omniops.cli.export import user_function
from omniops.cli.export.models import detector_parts, is_detector, sam2_parts
from omniops.cli.export.options import (
    CheckOption,
    FixedOption,
    FormatName,
    FormatOption,
    HalfOption,
    ImageSizeOption,
    ModelArgument,
    OpsetOption,
    OutOption,
    PartName,
    PartOption,
    RandomWeightsOption,
    SizeOption,
    WeightsOption,
)
from omniops.cli.outputs import OverwriteOption, require_new

if TYPE_CHECKING:
    from omniops.export import Part, Written


def export(
    model: ModelArgument,
    out: OutOption,
    format: FormatOption = None,
    weights: WeightsOption = None,
    random_weights: RandomWeightsOption = False,
    part: PartOption = None,
    image_size: ImageSizeOption = None,
    size: SizeOption = None,
    fixed_sizes: FixedOption = False,
    opset: OpsetOption = None,
    half: HalfOption = False,
    check: CheckOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a model to a file for ONNX, OpenVINO, ExecuTorch, TorchScript, AOTInductor or Core ML.

    The file runs where omniops is not installed. What it takes and returns is printed: names, dtypes, and shapes with *
    where a size may be any.

    module:function is a function of yours, without arguments. It returns (module, args), or (module, args, options): a
    dict with dynamic_shapes, as torch.export takes them, input_names and output_names. The module is looked for in the
    working folder too, and is run.

    SAM 2 is four parts, for a file each: image-encoder and mask-decoder for pictures, memory-attention and
    memory-encoder for videos as well.

    Example: omniops export mask-rcnn-r50-carafe --weights coco --out detector.onnx

    Example: omniops export tiny --format openvino --out sam2-tiny --check

    Example: omniops export my_models:upsampler --out upsampler.pte
    """
    _require_options(model, weights, random_weights, part, image_size, size)
    say("loading PyTorch")
    from omniops.export import FORMATS
    from omniops.export.files import is_named

    suffixes = {described.suffix: name for name, described in FORMATS.items()}
    name = _format_of(out, format, suffixes)
    is_folder = part is None and not user_function.is_user_function(model) and not is_detector(model)
    if not is_folder:
        suffix = FORMATS[name].suffix
        if not is_named(out, suffix):
            raise CommandError(f"--out must be a name that ends with {suffix} for the format {name}, got {out}")
        _require_new([out], overwrite)
    elif out.suffix.lower() in suffixes:
        raise CommandError(f"--out must be a folder, for all parts of SAM 2, or one be named by --part; got {out}")
    _require_writable_format(name, opset, check)
    fixed = fixed_sizes or not FORMATS[name].is_dynamic
    options = {"half": half, "opset_version": opset, "overwrite": overwrite}
    if user_function.is_user_function(model):
        jobs = [_user_job(model, out, name, fixed, options)]
    else:
        if is_detector(model):
            parts = detector_parts(model, weights, random_weights, fixed, size)
        else:
            parts = sam2_parts(model, part and part.value, random_weights, image_size, fixed)
        targets = [out / f"{found.name}{FORMATS[name].suffix}" if is_folder else out for found in parts]
        _require_new(targets, overwrite)
        jobs = [_part_job(found, target, name, options) for found, target in zip(parts, targets, strict=True)]
    for job in jobs:
        _run(job, check)


@dataclass(frozen=True)
class _Job:
    """A file to write, and the module and the example that it is checked by."""

    path: Path
    write: Callable[[], Written]
    module: Any
    args: tuple[Any, ...]
    description: str = ""
    """What its inputs and outputs mean."""


def _user_job(model: str, out: Path, format: str, fixed: bool, options: dict[str, Any]) -> _Job:
    from omniops.export import write

    found = user_function.call(model)
    own = {**found.options, "dynamic_shapes": None} if fixed else found.options
    return _Job(out, lambda: write(found.module, found.args, out, format, **own, **options), found.module, found.args)


def _part_job(part: Part, target: Path, format: str, options: dict[str, Any]) -> _Job:
    from omniops.export import write_part

    write = partial(write_part, part, target, format, **options)
    return _Job(target, write, part.module, part.args, part.description)


def _run(job: _Job, check: bool) -> None:
    from omniops.export import ExportError, largest_difference

    raise_received()
    say(f"writing {job.path}")
    try:
        written = job.write()
        lines = [f"Wrote {written.path}, {_size(written.path)}"]
        lines += [f"  takes   {spec}" for spec in written.inputs]
        lines += [f"  returns {spec}" for spec in written.outputs]
        print_lines(*lines, *(f"  {line}" for line in job.description.splitlines()))
        if check:
            difference = largest_difference(written, job.module, job.args)
            print_lines(f"  differs from PyTorch by at most {difference:.1e} of the largest result")
    except FileExistsError as error:
        raise CommandError(str(error)) from None
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    except (ExportError, ImportError) as error:
        raise CommandError(str(error), status=1) from error


def _require_options(
    model: str,
    weights: str | None,
    random_weights: bool,
    part: PartName | None,
    image_size: int | None,
    size: tuple[int, int] | None,
) -> None:
    """Raise for options that are not of the model."""
    is_user = user_function.is_user_function(model)
    if weights is not None and not is_detector(model):
        raise CommandError(
            "--weights are of a detector; SAM 2 is named by its checkpoint, and a function loads its own"
        )
    if random_weights and is_user:
        raise CommandError(f"--random-weights are of a detector or SAM 2, and {model} is a function of yours")
    if (part is not None or image_size is not None) and (is_user or is_detector(model)):
        raise CommandError("--part and --image-size are of SAM 2")
    if size is not None and not is_detector(model):
        raise CommandError("--size is of a detector; SAM 2 has --image-size, and a function gives an example itself")


def _format_of(out: Path, format: FormatName | None, suffixes: dict[str, str]) -> str:
    """The format, by its name or by the ending of the file."""
    if format is not None:
        return format.value
    name = suffixes.get(out.suffix.lower())
    if name is None:
        raise CommandError(f"--format is missing, and {out} ends with none of {', '.join(suffixes)}")
    return name


def _require_writable_format(format: str, opset: int | None, check: bool) -> None:
    from omniops.export import ExportError, require_packages, require_runtime
    from omniops.export.formats import FIRST_OPSET

    if opset is not None and format != "onnx":
        raise CommandError(f"--opset is of ONNX, and the format is {format}")
    if opset is not None and opset < FIRST_OPSET:
        raise CommandError(
            f"--opset must be {FIRST_OPSET} or later, got {opset}: PyTorch writes no earlier one, and onnx's "
            "version_converter may make one of the file"
        )
    try:
        require_packages(format)
        if check:
            require_runtime(format)
    except (ExportError, ImportError) as error:
        raise CommandError(str(error), status=1) from None


def _require_new(paths: list[Path], overwrite: bool) -> None:
    """As of every command; Core ML's files are folders."""
    from omniops.export.files import names_of

    folders = [path for path in paths if path.suffix.lower() == ".mlpackage" and path.is_dir()]
    if folders and not overwrite:
        raise CommandError(f"{folders[0]} is there already: --overwrite replaces what is there")
    require_new([name for path in paths if path not in folders for name in names_of(path)], overwrite)


def _size(path: Path) -> str:
    from omniops.export.files import names_of

    count = sum(
        file.stat().st_size
        for name in (*names_of(path), path.with_name(f"{path.name}.data"))
        for file in ([name] if name.is_file() else name.rglob("*"))
        if file.is_file()
    )
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
