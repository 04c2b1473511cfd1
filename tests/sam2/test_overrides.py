"""Hydra's overrides against what the official package makes of them."""

from __future__ import annotations

import warnings

import pytest
from one_thread import one_thread as one_thread

from omniops.sam2 import build_sam2, build_sam2_video_predictor
from omniops.sam2.overrides import parse_overrides

SIDE = 64
SIZE = [
    f"++model.image_size={SIDE}",
    *(f"++model.memory_attention.layer.{part}_attention.feat_sizes=[4, 4]" for part in ("self", "cross")),
]
PREDICTOR = (
    "fill_hole_area",
    "non_overlap_masks",
    "clear_non_cond_mem_around_input",
    "add_all_frames_to_correct_as_cond",
    "binarize_mask_from_pts_for_mem_enc",
    "max_cond_frames_in_attn",
    "image_size",
)
DECODER = (
    "dynamic_multimask_via_stability",
    "dynamic_multimask_stability_delta",
    "dynamic_multimask_stability_thresh",
)
MODEL = (
    "sigmoid_scale_for_mem_enc",
    "sigmoid_bias_for_mem_enc",
    "multimask_min_pt_num",
    "multimask_max_pt_num",
    "max_obj_ptrs_in_encoder",
)
OVERRIDES = {
    "none": [],
    "of the maintainers' script": ["++model.non_overlap_masks=true"],
    "of the predictor": [
        "++model.fill_hole_area=3",
        "++model.clear_non_cond_mem_around_input=True",
        "++model.add_all_frames_to_correct_as_cond=true",
        "++model.max_cond_frames_in_attn=4",
        "++model.non_overlap_masks=false",
    ],
    "of postprocessing": [
        "++model.fill_hole_area=0",
        "++model.binarize_mask_from_pts_for_mem_enc=false",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.1",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=1",
    ],
    "of the model": [
        "++model.sigmoid_scale_for_mem_enc=10",
        "++model.sigmoid_bias_for_mem_enc=-5.0",
        "model.multimask_min_pt_num=1",
        "model.multimask_max_pt_num=2",
        "++model.max_obj_ptrs_in_encoder=4",
    ],
    "twice": ["++model.fill_hole_area=3", "++model.fill_hole_area=5"],
    "what is so anyway": [
        "++model.use_mask_input_as_output_without_sam=true",
        "++model.non_overlap_masks_for_mem_enc=true",
        "++model.num_maskmem=7",
    ],
}

# By postprocessing.
UNDONE = {
    "of the predictor": {"fill_hole_area"},
    "twice": {"fill_hole_area"},
    "of postprocessing": {
        "fill_hole_area",
        "binarize_mask_from_pts_for_mem_enc",
        "dynamic_multimask_stability_delta",
        "dynamic_multimask_stability_thresh",
    },
}


@pytest.fixture(autouse=True)
def quickly_built(uninitialised):
    with uninitialised:
        yield


@pytest.mark.parametrize(
    ("case", "apply_postprocessing"),
    [*((case, False) for case in OVERRIDES), *((case, True) for case in UNDONE), ("of the model", True)],
)
def test_overrides_are_those_of_the_official_package(case, apply_postprocessing):
    build_sam = pytest.importorskip("sam2.build_sam", reason="the oracle: the official package, sam2 from PyPI")
    arguments = {
        "config_file": "configs/sam2.1/sam2.1_hiera_t.yaml",
        "device": "cpu",
        "hydra_overrides_extra": [*SIZE, *OVERRIDES[case]],
        "apply_postprocessing": apply_postprocessing,
    }
    official = build_sam.build_sam2_video_predictor(**arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = build_sam2_video_predictor(**arguments)
    undone = {str(warning.message).split()[2] for warning in caught if "hydra_overrides_extra" in str(warning.message)}
    assert undone == (UNDONE.get(case, set()) if apply_postprocessing else set())
    for name in PREDICTOR:
        assert (name, getattr(ours, name)) == (name, getattr(official, name))
    for name in DECODER:
        assert getattr(ours.model.sam_mask_decoder, name) == getattr(official.sam_mask_decoder, name)
    for name in MODEL:
        assert getattr(ours.model, name) == getattr(official, name)
    assert arguments["hydra_overrides_extra"] == [*SIZE, *OVERRIDES[case]]


def test_overrides_of_a_model_for_pictures():
    model = build_sam2("sam2.1_hiera_t", None, "cpu", "eval", [*SIZE, "++model.max_cond_frames_in_attn=2"])
    assert model.image_size == SIDE
    assert model.sam_mask_decoder.dynamic_multimask_via_stability
    with pytest.raises(
        ValueError, match=r"cannot have '\+\+model.fill_hole_area=0' here: of model\. it takes binarize_"
    ):
        build_sam2("sam2.1_hiera_t", None, "cpu", "eval", ["++model.fill_hole_area=0"])
    with pytest.raises(ValueError, match=r"feat_sizes of \[32, 32\], where image_size 64 has \[4, 4\]"):
        build_sam2("sam2.1_hiera_t", None, "cpu", "eval", [SIZE[0], SIZE[1].replace("4, 4", "32,32")])


def test_arguments_count_more_than_overrides():
    predictor = build_sam2_video_predictor(
        "sam2.1_hiera_t",
        None,
        "cpu",
        hydra_overrides_extra=["++model.image_size=128", "++model.non_overlap_masks=true"],
        image_size=SIDE,
        fill_hole_area=2,
    )
    assert (predictor.image_size, predictor.non_overlap_masks, predictor.fill_hole_area) == (SIDE, True, 2)


WRONG = {
    "unknown": (
        ["++model.fill_holes=8"],
        ValueError,
        r"cannot have '\+\+model.fill_holes=8' here: .* it takes fill_hole_a",
    ),
    "of the architecture": (
        ["++model.image_encoder.trunk.embed_dim=96"],
        ValueError,
        "embed_dim=96' here: of model. it",
    ),
    "of something else": (["++scratch.resolution=512"], ValueError, r"must hold overrides of the model, as .*scratch"),
    "taken away": (["~model.fill_hole_area"], ValueError, "must hold overrides of the model"),
    "no value": (["++model.fill_hole_area"], ValueError, "must hold overrides of the model"),
    "fixed": (["++model.num_maskmem=3"], ValueError, r"cannot have '\+\+model.num_maskmem=3' here: every model has 7"),
    "a type": (["++model.fill_hole_area=true"], ValueError, r"fill_hole_area=true', which must be of int"),
    "half": (["++model.image_size=64.5"], ValueError, r"image_size=64.5', which must be of int"),
    "a str": ("++model.fill_hole_area=8", TypeError, "must be a list of str, got the str"),
    "numbers": ([8], TypeError, "must be a list of str, got int in it"),
    "one frame": (
        ["++model.max_cond_frames_in_attn=1"],
        ValueError,
        "max_cond_frames_in_attn must be -1 or at least 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_overridden(case):
    overrides, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        build_sam2_video_predictor("sam2.1_hiera_t", None, "cpu", "eval", overrides, image_size=SIDE)


def test_values_are_read_as_hydra_does():
    read = parse_overrides(
        ["++model.fill_hole_area=+3", "model.sigmoid_scale_for_mem_enc = 2e1 ", "+model.image_size=64"], video=True
    )
    assert read.predictor == {"fill_hole_area": 3}
    assert read.model == {"sigmoid_scale_for_mem_enc": 20.0}
    assert read.image_size == 64
