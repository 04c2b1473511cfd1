"""What mmcv tells of its compiled extension in bug reports."""

from __future__ import annotations


def get_compiler_version() -> str:
    """Stands where mmcv names the compiler of its extension."""
    return "none: omniops stands in for mmcv._ext"


def get_compiling_cuda_version() -> str:
    """Stands where mmcv names the CUDA that its extension was compiled with."""
    return "none: omniops stands in for mmcv._ext"
