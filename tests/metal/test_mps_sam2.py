"""SAM 2 on the pretended MPS device: at full size held to the rules of mps_rules.py, and of small size with the CPU's
results, where the ways around what MPS gets wrong compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mps_device import mps_device
from mps_rules import RuleError
from PIL import Image
from planted import planted
from torch import Tensor

from omniops import device as devices
from omniops.sam2 import rle, upsampling
from omniops.sam2.architectures import SIZES, cast, new
from omniops.sam2.image_predictor import SAM2ImagePredictor
from omniops.sam2.mask_generator import SAM2AutomaticMaskGenerator
from omniops.sam2.modeling import attention, hiera, mask_decoder, memory_attention
from omniops.sam2.modeling.sam2 import SAM2Base
from omniops.sam2.video_predictor import SAM2VideoPredictor

PICTURE = np.zeros((768, 1024, 3), np.uint8)
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def rules() -> Iterator[torch.device]:
    with mps_device(values=False) as device:
        yield device


def model(device: torch.device, size: str = "tiny", dtype: torch.dtype = torch.float32, image_size: int = 1024) -> Any:
    torch.manual_seed(0)
    made = cast(new(size, image_size=image_size), dtype)
    with torch.no_grad():  # else no object is ever found
        made.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 1
    return made.to(device)


def write_clip(folder: Path, count: int, height: int = 90, width: int = 140) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    for i in range(count):
        frame = noise.copy()
        frame[20:50, 10 + 5 * i : 50 + 5 * i] = [220, 40, 30]
        Image.fromarray(frame).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *(pytest.param(size, torch.float32, marks=() if size == "tiny" else pytest.mark.slow) for size in SIZES),
        ("tiny", torch.float16),
    ],
)
def test_pictures(rules, size, dtype):
    predictor = SAM2ImagePredictor(model(rules, size, dtype), max_hole_area=8, max_sprinkle_area=8)
    predictor.set_image(PICTURE)
    _, _, logits = predictor.predict([[10, 10]], [1])
    predictor.predict([[10, 10], [20, 20]], [1, 0], mask_input=logits[:1], multimask_output=False)
    masks, _, _ = predictor.predict(box=np.tile([10, 10, 30, 30], (64, 1)))
    assert masks.shape == (64, 3, 768, 1024)
    predictor.set_image_batch([PICTURE, PICTURE[:500]])
    predictor.predict_batch([[[10, 10]], [[20, 20]]], [[1], [1]])


@dtypes
def test_guided_upsampling(rules, dtype):
    predictor = SAM2ImagePredictor(model(rules, dtype=dtype), upsampling="guided")
    predictor.set_image(PICTURE)
    predictor.predict([[10, 10]], [1])


@pytest.mark.slow
@pytest.mark.parametrize("upsampling", ["bilinear", "guided"])
@dtypes
def test_masks_of_everything(rules, dtype, upsampling):
    generator = SAM2AutomaticMaskGenerator(
        model(rules, dtype=dtype),
        upsampling=upsampling,
        points_per_side=8,
        pred_iou_thresh=0.1,  # of masks without contents two pass a threshold
        stability_score_thresh=0.1,
        min_mask_region_area=8,
        use_m2m=True,
        crop_n_layers=1,
    )
    generator.generate(PICTURE)


def eight_objects(predictor: SAM2VideoPredictor, clip: Path) -> None:
    """Two prompted frames, frames that look back at these and at others, and a correction."""
    state = predictor.init_state(clip)
    for obj_id in range(8):
        predictor.add_new_points_or_box(state, 0, obj_id, points=[[10 + obj_id, 10]], labels=[1])
        predictor.add_new_points_or_box(state, 1, obj_id, box=[10, 10, 30, 30])
    predictor.add_new_mask(state, 1, 0, np.ones((90, 140)))
    frames = []
    for frame, *_ in predictor.propagate_in_video(state):
        assert list(state.predicted_ious(frame)) == list(range(8))
        frames.append(frame)
    assert frames == list(range(state.num_frames))
    predictor.add_new_points_or_box(state, frames[-1], 2, points=[[10, 10]], labels=[0])


@pytest.mark.slow
@dtypes
def test_videos(rules, dtype, tmp_path):
    eight_objects(SAM2VideoPredictor(model(rules, dtype=dtype)), write_clip(tmp_path / "clip", 5))


@pytest.mark.slow
@dtypes
def test_videos_with_every_option(rules, dtype, tmp_path):
    """And of a state that was copied."""
    predictor = SAM2VideoPredictor(
        model(rules, dtype=dtype),
        non_overlap_masks=True,
        clear_non_cond_mem_around_input=True,
        add_all_frames_to_correct_as_cond=True,
        binarize_mask_from_pts_for_mem_enc=False,
        max_cond_frames_in_attn=2,
    )
    state = predictor.init_state(write_clip(tmp_path / "clip", 5))
    for frame in (0, 1, 3):
        for obj_id in range(2):
            predictor.add_new_points_or_box(state, frame, obj_id, points=[[10 + obj_id, 10]], labels=[1])
    list(predictor.propagate_in_video(state, max_frame_num_to_track=2))
    twin = copy.deepcopy(state)
    assert [frame for frame, *_ in predictor.propagate_in_video(twin)] == [0, 1, 2, 3, 4]
    list(predictor.propagate_in_video(state, start_frame_idx=4, reverse=True))
    scores = torch.empty(3, 1, 90, 140, device=rules)
    assert predictor._apply_non_overlapping_constraints(scores).shape == scores.shape


def everything(device: torch.device, clip: Path) -> None:
    predictor = SAM2ImagePredictor(model(device))
    predictor.set_image(PICTURE)
    predictor.predict([[10, 10]], [1])
    predictor.predict(np.full((64, 1, 2), 10), np.ones((64, 1)))
    eight_objects(SAM2VideoPredictor(predictor.model), clip)


PLANTED = {
    "queries are not sliced": ((attention, "MAX_SCORES", 2**62), "a whole score matrix"),
    "pooling of a view": (
        (
            hiera.MultiScaleAttention,
            "forward",
            planted(hiera.MultiScaleAttention.forward, ".flatten(2).contiguous()", ".flatten(2)"),
        ),
        "an input that only looks like channels_last",
    ),
    "an expanded image": (
        (
            SAM2Base,
            "predict_masks",
            planted(SAM2Base.predict_masks, 'image.device.type == "mps"', "False"),
        ),
        "an expanded operand",
    ),
    "expanded queries": (
        (
            memory_attention,
            "scaled_dot_product_attention",
            planted(attention.scaled_dot_product_attention, ".contiguous(), key, value", ", key, value"),
        ),
        "an expanded operand",
    ),
    "one row": (
        (devices, "without_single_row", planted(devices.without_single_row, '"mps"', '"none"')),
        "a single row with a bias",
    ),
    "a wide product": (
        (mask_decoder, "_product", planted(mask_decoder._product, '"mps"', '"none"')),
        "a large side of a product",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "rule"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(rules, monkeypatch, tmp_path, fault, rule):
    monkeypatch.setattr(*fault)
    clip = write_clip(tmp_path / "clip", 4)
    with pytest.raises(RuleError, match=f": {rule}: "):
        everything(rules, clip)


def test_two_objects_at_once(rules, monkeypatch, tmp_path):
    counts = []
    forward = SAM2Base.forward_sam_heads
    monkeypatch.setattr(SAM2Base, "forward_sam_heads", lambda *args: counts.append(len(args[2])) or forward(*args))
    predictor = SAM2VideoPredictor(model(rules, image_size=64))
    state = predictor.init_state(write_clip(tmp_path / "clip", 2))
    for obj_id in range(5):
        predictor.add_new_points_or_box(state, 0, obj_id, points=[[10, 10]], labels=[1])
    list(predictor.propagate_in_video(state))
    assert counts == [1] * 5 + [2, 2, 1]


@pytest.mark.slow
def test_a_long_video_with_every_kind_of_call(rules, tmp_path):
    torch.manual_seed(0)
    network_ = cast(new("tiny", "2.0", image_size=128), torch.bfloat16).to(rules)
    predictor = SAM2VideoPredictor(network_, non_overlap_masks=True, clear_non_cond_mem_around_input=True)
    state = predictor.init_state(write_clip(tmp_path / "clip", 19))
    for obj_id in range(2):
        predictor.add_new_points_or_box(state, 1, obj_id, points=[[10, 10]], labels=[1])
    assert len(list(predictor.propagate_in_video(state))) == 18
    predictor.add_new_points_or_box(state, 2, 1, points=[[10, 10]], labels=[0])  # a frame whose map was let go
    predictor.add_new_mask(state, 6, 1, np.ones((90, 140)))
    predictor.clear_all_prompts_in_frame(state, 2, 1)
    predictor.remove_object(state, 0)
    assert len(list(predictor.propagate_in_video(state, start_frame_idx=7, reverse=True))) == 8
    predictor.reset_state(state)


@pytest.mark.slow
def test_a_live_video(rules):
    torch.manual_seed(0)
    predictor = SAM2VideoPredictor(cast(new("tiny", "2.1", image_size=64), torch.float32).to(rules))
    state = predictor.init_state(np.full((45, 70, 3), 25 * t, np.uint8) for t in range(4))
    seen = []
    for t, ids, _ in predictor.propagate_in_video(state):
        seen.append(ids)
        if t < 2:
            predictor.add_new_points_or_box(state, t, t, points=[[10, 10]], labels=[1])
    assert seen == [[], [0], [0, 1], [0, 1]]


def test_runs_on_the_device_are_found(rules, monkeypatch):
    masks = torch.empty(4, 768, 1024, dtype=torch.bool, device=rules)
    rle.count_runs(masks)
    into_view = planted(
        rle.count_runs,
        "changes[:, 1:h] = masks[:, 1:] != masks[:, :-1]",
        "torch.ne(masks[:, 1:], masks[:, :-1], out=changes[:, 1:h])",
    )
    with pytest.raises(RuleError, match="a result that is a view"):
        into_view(masks)
    sorted_there = planted(
        rle.count_runs, "changes.nonzero()", "changes.nonzero().flatten().sort().values[:, None].repeat(1, 3)"
    )
    with pytest.raises(RuleError, match="integers through float32"):
        sorted_there(masks)


def test_nonzero_of_a_large_mask_runs_on_the_cpu(rules):
    masks = torch.empty(1, 5000, 4000, dtype=torch.bool, device=rules)
    rle.count_runs(masks)
    on_device = planted(rle.count_runs, 'changes.device.type == "mps"', "False")
    with pytest.raises(RuleError, match="the places of many elements"):
        on_device(masks)


def test_results_into_views_are_found(rules, monkeypatch):
    kernels = planted(
        upsampling._kernels,
        "exponent.copy_(lengths[:, 0][near] - across[v]).sub_(down[u].view(h, s, 1)[first:last])",
        "torch.sub(lengths[:, 0][near] - across[v], down[u].view(h, s, 1)[first:last], out=exponent)",
    )
    monkeypatch.setattr(upsampling, "_kernels", kernels)
    with pytest.raises(RuleError, match="a result that is a view"):
        upsampling.guided(
            torch.empty(1, 1, 64, 64, device=rules), torch.empty(1, 3, 256, 256, device=rules), (256, 256)
        )


SMALL = 64


def of_picture(device: torch.device) -> list[Tensor]:
    predictor = SAM2ImagePredictor(model(device, image_size=SMALL), max_hole_area=2, max_sprinkle_area=2)
    predictor.set_image(np.random.default_rng(1).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    results = [
        *predictor.predict([[10, 10]], [1], return_logits=True),
        *predictor.predict(box=[[10, 10, 30, 30], [0, 0, 50, 50]], multimask_output=False, return_logits=True),
    ]
    return [predictor.get_image_embedding().cpu(), *map(torch.from_numpy, results)]


def of_video(device: torch.device, clip: Path) -> list[Tensor]:
    predictor = SAM2VideoPredictor(model(device, image_size=SMALL))
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, points=[[30, 30]], labels=[1])
    predictor.add_new_points_or_box(state, 0, 2, box=[60, 40, 90, 80])
    masks = [masks for _, _, masks in predictor.propagate_in_video(state)]
    masks.append(predictor.add_new_points_or_box(state, 2, 1, points=[[70, 70]], labels=[0])[2])
    return [mask.cpu() for mask in masks]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.unique().numel() > 1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_pictures_have_the_masks_of_the_cpu(monkeypatch):
    expected = of_picture(torch.device("cpu"))
    monkeypatch.setattr(attention, "MAX_SCORES", 2**14)
    with mps_device(values=True) as device:
        assert_alike(of_picture(device), expected)


def test_videos_have_the_masks_of_the_cpu(monkeypatch, tmp_path):
    clip = write_clip(tmp_path / "clip", 4)
    expected = of_video(torch.device("cpu"), clip)
    monkeypatch.setattr(attention, "MAX_SCORES", 2**15)
    with mps_device(values=True) as device:
        assert_alike(of_video(device, clip), expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("scrambled", [False, True])
@dtypes
def test_attention(monkeypatch, batch, queries, scrambled, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, queries, 16), (batch, 2, 50, 16), (batch, 2, 50, 16)
    # Scores of up to 75, which half precision rounds by hundredths.
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    tensors = [x.to(dtype) for x in (8 * query, 8 * key, value)]
    expected = attention.scaled_dot_product_attention(*(x.double() for x in tensors))
    monkeypatch.setattr(attention, "MAX_SCORES", 2**14)
    monkeypatch.setattr(attention, "_scrambles_half", lambda: scrambled)
    by_hand, calls = attention._by_hand, []
    monkeypatch.setattr(attention, "_by_hand", lambda *args: calls.append(args) or by_hand(*args))
    with mps_device(values=True) as device, torch.autocast("mps", dtype=torch.float16, enabled=dtype == torch.float16):
        found = attention.scaled_dot_product_attention(*(x.to(device) for x in tensors)).cpu()
    assert bool(calls) == (queries <= 8 or (scrambled and dtype == torch.float16))
    assert found.dtype == dtype
    tolerance = (1e-5 if dtype == torch.float32 else 2e-3) * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("torch_version", "macos", "expected"),
    [
        ("2.13.0", "26.1", True),
        ("2.13.1", "27.0", True),
        ("2.13.0", "15.6", False),
        ("2.14.0", "26.1", False),
        ("2.12.1", "26.1", False),
        ("2.13.0", "", False),
    ],
)
def test_half_precision_is_scrambled_by_torch_2_13_on_macos_26_alone(monkeypatch, torch_version, macos, expected):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr("platform.mac_ver", lambda: (macos, ("", "", ""), ""))
    attention._scrambles_half.cache_clear()
    try:
        assert attention._scrambles_half() == expected
    finally:
        attention._scrambles_half.cache_clear()
