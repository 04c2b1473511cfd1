"""Models made with omniops as files for other runtimes: ONNX, OpenVINO, ExecuTorch, TorchScript, AOTInductor, Core ML.

``write`` takes any module. The files run where omniops, and but for TorchScript and AOTInductor PyTorch, are not
installed. ``omniops export`` is the command for it.
"""

from omniops.export.compare import largest_difference, load, require_runtime
from omniops.export.errors import ExportError
from omniops.export.formats import FORMATS, Format, Written, require_packages, write, write_part
from omniops.export.parts import Part
from omniops.export.program import TensorSpec

__all__ = [
    "FORMATS",
    "ExportError",
    "Format",
    "Part",
    "TensorSpec",
    "Written",
    "largest_difference",
    "load",
    "require_packages",
    "require_runtime",
    "write",
    "write_part",
]
