"""What a detector refuses, on the pretended MPS device with values: by the same words as on the CPU."""

from __future__ import annotations

import pytest
import torch
from mps_device import mps_device

pytest.importorskip("omniops.detection", exc_type=ImportError, reason="needs torchvision")

from omniops.detection.inputs import require_values

RIGHT = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
BOXES, MASKS = torch.tensor([[1.0, 2, 3, 4], [0, 0, 7, 9]]), torch.ones(2, 9, 7, dtype=torch.uint8)
NONE = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 9, 7)}
CASES = {
    "right": (RIGHT, BOXES, MASKS, None),
    "bool": (RIGHT, BOXES, MASKS.bool(), None),
    "0 to 255": (RIGHT * 255, BOXES, MASKS, r"images\[1\] must be in \[0, 1\], got .*: divide it by 255"),
    "normalised": (RIGHT * 4 - 2, BOXES, MASKS, r"images\[1\] must be in \[0, 1\], got -[12].*: it is normalised here"),
    "a NaN": (RIGHT.index_fill(2, torch.tensor(2), torch.nan), BOXES, MASKS, "got NaN in 27 of 189 values"),
    "a box of NaN": (
        RIGHT,
        BOXES * torch.tensor([1, 1, torch.nan, 1]),
        MASKS,
        r"targets\[1\]\['boxes'\] must be finite",
    ),
    "no width": (RIGHT, BOXES * torch.tensor([1, 1, 0, 1]), MASKS, r"targets\[1\]\['boxes'\] must be .* as box 0"),
    "0 and 255": (RIGHT, BOXES, MASKS * 255, r"targets\[1\]\['masks'\] must be of 0 and 1"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values(case, dtype):
    image, boxes, masks, message = CASES[case]
    targets = [NONE, {"boxes": boxes, "masks": masks}]

    def look(device):
        moved = [{name: value.to(device) for name, value in target.items()} for target in targets]
        require_values([x.to(device, dtype) for x in (RIGHT, image)], moved, moved)

    said = []
    for device in ("cpu", "mps"):
        with mps_device(values=True) as mps:
            target_device = mps if device == "mps" else torch.device("cpu")
            if message is None:
                look(target_device)
                continue
            with pytest.raises(ValueError, match=message) as caught:
                look(target_device)
            said.append(str(caught.value))
    assert len(set(said)) == (message is not None)
