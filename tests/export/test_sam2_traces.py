"""SAM 2's parts traced by torch.jit, with sizes that stay those of the trace."""

import pytest
import torch
from sam2_assembly import small_model
from torchscripts import IGNORED, assert_as_eager

from omniops.export import sam2

PARTS = ("image_encoder", "mask_decoder", "memory_attention", "memory_encoder")


@pytest.fixture(scope="module")
def parts():
    return {part.name: part for part in sam2.parts(small_model(), dynamic=False)}


# The sizes of pictures, prompts and memories are numbers to the network: a trace warns that it keeps them.
@pytest.mark.filterwarnings(*IGNORED, "ignore::torch.jit.TracerWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_trace(parts, name):
    part = parts[name]
    part.module(*part.args)  # the tables of positions are made at a first call, and kept
    with torch.no_grad():
        assert_as_eager(torch.jit.trace(part.module, part.args), part.module, [part.args])
