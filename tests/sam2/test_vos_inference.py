"""The calls that the official repository's ``tools/vos_inference.py`` makes, with its imports changed: for all objects
at once, one by one, and where objects appear later."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from clips import HEIGHT, SHARPER, WIDTH, write_clip
from one_thread import one_thread as one_thread
from PIL import Image

import omniops.sam2
from omniops import connected_components

SIDE = 64
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
SIZE = [
    f"++model.image_size={SIDE}",
    *(f"++model.memory_attention.layer.{part}_attention.feat_sizes=[4,4]" for part in ("self", "cross")),
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip", 5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, twins):
    """Meta's file, of weights under which memories matter."""
    state = {name: value.clone() for name, value in twins(image_size=SIDE, seed=3)[0].state_dict().items()}
    for name, value in state.items():
        for part, factor in SHARPER.items():
            if part in name:
                value.mul_(factor)
    path = tmp_path_factory.mktemp("checkpoints") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": state}, path)
    return path


@pytest.fixture
def builders(monkeypatch):
    """The official function of that name, and ours."""
    build_sam = pytest.importorskip("sam2.build_sam", reason="the oracle: the official package, sam2 from PyPI")
    from sam2.utils import misc

    monkeypatch.setattr(misc, "get_connected_components", connected_components)

    def official(**arguments):
        predictor = build_sam.build_sam2_video_predictor(**arguments, device="cpu")
        # Without autocast, and with no pointer beside them, it leaves its memories in bfloat16 and fails.
        predictor.memory_attention.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "memory": kwargs["memory"].float()}), with_kwargs=True
        )
        return predictor

    def ours(**arguments):
        return omniops.sam2.build_sam2_video_predictor(**arguments, device="cpu", dtype="float32")

    return official, ours


def objects(frame: int) -> dict[int, np.ndarray]:
    """The masks that the data set has of a frame: of two objects that overlap at first, and of one from frame 2 on."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = {1: (abs(x - 35 - 6 * frame) < 16) & (abs(y - 45) < 16), 2: (abs(x - 60) < 16) & (abs(y - 50) < 16)}
    if frame >= 2:
        masks[5] = (abs(x - 110 + 6 * frame) < 11) & (abs(y - 70) < 11)
    return masks


def together(predictor, clip, score_thresh=0.0):
    """Masks of all objects of the first frame, as the script's ``vos_inference``."""
    inference_state = predictor.init_state(video_path=str(clip), async_loading_frames=False)
    height, width = inference_state["video_height"], inference_state["video_width"]
    assert (height, width) == (HEIGHT, WIDTH)
    for object_id, mask in objects(0).items():
        predictor.add_new_mask(inference_state=inference_state, frame_idx=0, obj_id=object_id, mask=mask)
    found = {}
    for frame_idx, ids, logits in predictor.propagate_in_video(inference_state):
        found[frame_idx] = {ids[i]: (logits[i] > score_thresh).cpu().numpy() for i in range(len(ids))}
    assert len(found) == inference_state["num_frames"]
    return found


def one_by_one(predictor, clip, *, overlapping, score_thresh=0.0):
    """Masks of objects that appear whenever they do, as the script's ``vos_separate_inference_per_object``."""
    inference_state = predictor.init_state(video_path=str(clip), async_loading_frames=False)
    height, width = inference_state["video_height"], inference_state["video_width"]
    inputs = defaultdict(dict)
    for frame_idx in (0, 2):
        for object_id, mask in objects(frame_idx).items():
            inputs[object_id][frame_idx] = mask
    scores = defaultdict(dict)
    for object_id in sorted(inputs):
        frames = sorted(inputs[object_id])
        predictor.reset_state(inference_state)
        for frame_idx in frames:
            predictor.add_new_mask(
                inference_state=inference_state,
                frame_idx=frame_idx,
                obj_id=object_id,
                mask=inputs[object_id][frame_idx],
            )
        for frame_idx, _, logits in predictor.propagate_in_video(
            inference_state, start_frame_idx=min(frames), reverse=False
        ):
            scores[object_id][frame_idx] = logits.cpu().numpy()
    found = {}
    for frame_idx in range(inference_state["num_frames"]):
        together = torch.full((len(inputs), 1, height, width), -1024.0)
        for i, object_id in enumerate(sorted(inputs)):
            if frame_idx in scores[object_id]:
                together[i] = torch.from_numpy(scores[object_id][frame_idx])
        if not overlapping:
            together = predictor._apply_non_overlapping_constraints(together)
        found[frame_idx] = {
            object_id: (together[i] > score_thresh).cpu().numpy() for i, object_id in enumerate(sorted(inputs))
        }
    return found


def assert_alike(found, expected):
    """But for one pixel in a thousand: where two objects are next to equal, the last digits say whose a pixel is."""
    assert list(found) == list(expected)
    for frame_idx, masks in found.items():
        assert list(masks) == list(expected[frame_idx])
        for object_id, mask in masks.items():
            right = expected[frame_idx][object_id]
            assert mask.shape == right.shape == (1, HEIGHT, WIDTH)
            assert (mask != right).mean() <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apply_postprocessing", "overlapping"),
    [
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_the_script_runs_with_its_imports_changed(builders, checkpoint, clip, apply_postprocessing, overlapping):
    results = []
    for build in builders:
        predictor = build(
            config_file=CONFIG,
            ckpt_path=str(checkpoint),
            apply_postprocessing=apply_postprocessing,
            hydra_overrides_extra=[f"++model.non_overlap_masks={'true' if not overlapping else 'false'}", *SIZE],
            vos_optimized=False,
        )
        with torch.inference_mode():
            results.append((together(predictor, clip), one_by_one(predictor, clip, overlapping=overlapping)))
    for found, expected in zip(*results[::-1], strict=True):
        assert_alike(found, expected)
    first = results[1][0][0]
    assert (first[1] & first[2]).any() == overlapping
    assert not results[1][1][1][5].any()  # which is not there yet
    assert results[1][1][2][5].any()


def test_as_pictures(builders, checkpoint, clip, tmp_path):
    """Written as the script writes them: a palette picture of all objects, or a folder for each."""
    predictor = builders[1](
        config_file=CONFIG, ckpt_path=str(checkpoint), hydra_overrides_extra=["++model.non_overlap_masks=true", *SIZE]
    )
    for frame_idx, masks in together(predictor, clip).items():
        picture = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        for object_id in sorted(masks)[::-1]:
            picture[masks[object_id].reshape(HEIGHT, WIDTH)] = object_id
        image = Image.fromarray(picture)
        image.putpalette(bytes(range(256)) * 3)
        image.save(tmp_path / f"{frame_idx:05d}.png")
        assert set(np.unique(np.array(Image.open(tmp_path / f"{frame_idx:05d}.png")))) <= {0, 1, 2}


def test_non_overlapping_constraints_are_the_official_ones(builders, twins):
    official, _ = twins(image_size=SIDE)
    _, ours = twins(image_size=SIDE)
    predictor = omniops.sam2.SAM2VideoPredictor(ours)
    logits = torch.randn(4, 1, 9, 11) * 12
    logits[2] = logits[0]  # of equal ones the first keeps its own
    for count in (0, 1, 2, 4):
        found = predictor._apply_non_overlapping_constraints(logits[:count])
        assert found.shape == (count, 1, 9, 11)
        if count:
            assert torch.equal(found, official._apply_non_overlapping_constraints(logits[:count]))
