"""Every cell of the table of docs/export.md, which says what of omniops was seen to run where."""

from functools import partial
from pathlib import Path

import pytest
import tiny_detectors
import torch
from sam2_assembly import inputs_of, small_model
from torch import nn

import omniops
from omniops import export
from omniops.export import Part, detection, sam2
from omniops.nn import FPNCarafe, PAFPNCarafe

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
RUNS, IN_ONE_SIZE, CONVERTS, NO = "runs", "runs in one size", "converts", "no"
TOLERANCE = 1e-4
ANY = torch.export.Dim.DYNAMIC


def table():
    """The cells by row and format; the header names the formats as ``omniops export --format`` does."""
    lines = [
        [cell.strip() for cell in line.strip()[1:-1].split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and "---" not in line
    ]
    (start,) = (number for number, cells in enumerate(lines) if cells[1:] == [f"`{name}`" for name in export.FORMATS])
    rows = {}
    for cells in lines[start + 1 :]:
        if len(cells) != len(export.FORMATS) + 1:
            break
        rows[cells[0].strip("`")] = dict(zip(export.FORMATS, cells[1:], strict=True))
    return rows


TABLE = table() if PAGE.exists() else {}
CELLS = [(row, name, cell) for row, cells in TABLE.items() for name, cell in cells.items()]


class Attention(nn.Module):
    """Multi-scale deformable attention, whose levels are no tensor."""

    def __init__(self):
        super().__init__()
        self.attention = omniops.MultiScaleDeformableAttention(16, num_heads=2, num_levels=2, batch_first=True)
        nn.init.normal_(self.attention.attention_weights.weight)

    def forward(self, query, value, reference_points):
        return self.attention(query, value=value, reference_points=reference_points, spatial_shapes=[(4, 4), (2, 2)])


class Points(nn.Module):
    """RT-DETRv2's attention to the nearest pixels, of points that are given, all levels' in one axis."""

    def forward(self, value, locations, weights):
        return omniops.multi_scale_deform_attn(value, [(4, 4), (2, 2)], locations, weights, [3, 3], method="discrete")


class Cleaned(nn.Module):
    """A convolution's masks without holes or small components."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 1, 1), function

    def forward(self, x):
        return self.function(self.conv(x), 3)


class Pyramid(nn.Module):
    """A neck, whose levels are arguments of their own."""

    def __init__(self, neck):
        super().__init__()
        self.neck = neck([8, 16, 32], 8)

    def forward(self, fine, middle, coarse):
        return self.neck([fine, middle, coarse])


def levels(n, height, width):
    return tuple(torch.randn(n, 8 << i, height * 4 >> i, width * 4 >> i) for i in range(3))


def of_pictures(module):
    """With pictures of another number and size than the example's."""
    dynamic = ({0: ANY, 2: ANY, 3: ANY},)
    part = Part("", module.eval(), (torch.randn(2, 4, 6, 7),), ("x",), ("y",), dynamic, "")
    return part, (torch.randn(3, 4, 9, 17),)  # of CARAFE, three tiles where the example is one


def of_levels(neck):
    n, height, width = (torch.export.Dim(name, min=2, max=1024) for name in ("n", "height", "width"))
    dynamic = tuple({0: n, 2: height * (4 >> i), 3: width * (4 >> i)} for i in range(3))
    names = ("fine", "middle", "coarse")
    outputs = tuple(f"{name}_features" for name in names)
    return Part("", Pyramid(neck).eval(), levels(2, 2, 3), names, outputs, dynamic, ""), levels(3, 3, 2)


def of_queries():
    def inputs(n, queries):
        return torch.randn(n, queries, 16), torch.randn(n, 20, 16), torch.rand(n, queries, 2, 2)

    dynamic = ({0: ANY, 1: ANY}, {0: ANY}, {0: ANY, 1: ANY})
    names = ("query", "value", "reference_points")
    return Part("", Attention().eval(), inputs(2, 5), names, ("y",), dynamic, ""), inputs(3, 7)


def of_points():
    def inputs(n, queries):
        return torch.randn(n, 20, 2, 8), torch.rand(n, queries, 2, 6, 2), torch.rand(n, queries, 2, 6)

    dynamic = ({0: ANY}, {0: ANY, 1: ANY}, {0: ANY, 1: ANY})
    names = ("value", "locations", "weights")
    return Part("", Points(), inputs(2, 5), names, ("y",), dynamic, ""), inputs(3, 7)


def deform_conv2d_pack(pack):
    module = pack(4, 6, 3, padding=1, groups=2, deform_groups=2)
    nn.init.normal_(module.conv_offset.weight, std=0.3)
    return of_pictures(module)


def of_sam2(name):
    parts = {part.name: part for part in sam2.parts(small_model())}
    return parts[name], inputs_of(name, 2, 5)


def of_detector(build, dynamic=True):
    torch.manual_seed(0)
    (part,) = detection.parts(build(box_score_thresh=0.0).eval(), dynamic=dynamic, size=(64, 80))
    return part, (torch.rand(3, 96, 72),)


CASES = {
    "CARAFEPack": lambda: of_pictures(omniops.CARAFEPack(4, 2, up_group=2, compressed_channels=4)),
    "CARAFEDownsamplePack": lambda: of_pictures(omniops.CARAFEDownsamplePack(4, 2, compressed_channels=4)),
    "DeformConv2dPack": partial(deform_conv2d_pack, omniops.DeformConv2dPack),
    "ModulatedDeformConv2dPack": partial(deform_conv2d_pack, omniops.ModulatedDeformConv2dPack),
    "MultiScaleDeformableAttention": of_queries,
    'multi_scale_deform_attn(method="discrete")': of_points,
    "FPNCarafe": lambda: of_levels(FPNCarafe),
    "PAFPNCarafe": lambda: of_levels(PAFPNCarafe),
    "fill_holes": lambda: of_pictures(Cleaned(omniops.fill_holes)),
    "remove_small_components": lambda: of_pictures(Cleaned(omniops.remove_small_components)),
    "faster_rcnn_resnet50_fpn_carafe": partial(of_detector, tiny_detectors.faster_rcnn),
    "mask_rcnn_resnet50_fpn_carafe": partial(of_detector, tiny_detectors.mask_rcnn),
    "SAM 2 image_encoder": lambda: of_sam2("image_encoder"),
    "SAM 2 mask_decoder": lambda: of_sam2("mask_decoder"),
    "SAM 2 memory_attention": lambda: of_sam2("memory_attention"),
    "SAM 2 memory_encoder": lambda: of_sam2("memory_encoder"),
}


def test_the_table_has_a_row_for_each_case():
    assert list(TABLE) == list(CASES)
    assert {cell for _, _, cell in CELLS} <= {RUNS, IN_ONE_SIZE, CONVERTS, NO}


@pytest.mark.slow
@pytest.mark.parametrize(("row", "name", "cell"), CELLS, ids=[f"{row}-{name}" for row, name, _ in CELLS])
def test_cell(tmp_path, row, name, cell):
    for package in (*export.FORMATS[name].packages, export.FORMATS[name].runtime):
        pytest.importorskip(package or "torch", reason=f"needs {package}, of the extra runtimes")
    torch.manual_seed(0)
    part, args = CASES[row](dynamic=False) if cell == IN_ONE_SIZE else CASES[row]()
    path = tmp_path / f"file{export.FORMATS[name].suffix}"
    if cell == NO:
        with pytest.raises(export.ExportError, match="ONNX"):
            export.write_part(part, path)
        return
    written = export.write_part(part, path)
    if cell == CONVERTS:
        assert path.exists()
        return
    for inputs in (part.args, args) if export.FORMATS[name].is_dynamic and cell == RUNS else (part.args,):
        assert export.largest_difference(written, part.module, inputs) < TOLERANCE
