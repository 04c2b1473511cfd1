"""What ``selftest`` and ``bench`` know of each operator: one file an operator, named as it is.

A file holds NAME (the operator's), ``checks()`` for selftest, and for bench ``shapes(device_type, quick)``,
``host_shape(device_type)`` (a tiny one, of which the host's time is taken), ``contenders(shape, dtype, device)``,
``traffic(shape)`` (the elements that each direction must at least read and write; an operator without gradients has one
direction) and GOALS. Everything else, dtypes and kernels among it, the dispatcher
and the backends say. An operator whose dtypes are not those of its backends has them in DTYPES, and those to be timed
in TIMED_DTYPES. One of matrix products has IN_TF32 = True: on CUDA its float32 is also timed with TF32 allowed.
"""

from types import ModuleType

import torch

from omniops.cli.cases import carafe, connected_components, deform_conv2d, multi_scale_deform_attn

CASES = (carafe, connected_components, deform_conv2d, multi_scale_deform_attn)


def dtypes(operator: str, backend: ModuleType) -> tuple[torch.dtype, ...]:
    """The dtypes in which a backend serves an operator."""
    own = {case.NAME: getattr(case, "DTYPES", ()) for case in CASES}
    return own.get(operator) or tuple(backend.DTYPES)
