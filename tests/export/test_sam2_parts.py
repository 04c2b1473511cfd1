"""SAM 2's parts: put together they are the predictors, by themselves and as files in other runtimes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from clips import HEIGHT, WIDTH, write_clip
from sam2_assembly import SIDE, Run, inputs_of, predict, small_model, track

from omniops import export
from omniops.export import sam2
from omniops.export.parts import Part
from omniops.sam2 import SAM2ImagePredictor, SAM2VideoPredictor

CLICK, LABEL = [[40.0, 50.0]], [1]
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def parts(model):
    return {part.name: part for part in sam2.parts(model)}


@pytest.fixture(scope="module")
def image():
    random = np.random.default_rng(0)
    image = random.integers(0, 60, (90, 140, 3), dtype=np.uint8)
    image[30:70, 20:60] += np.array([180, 20, 90], np.uint8)
    return image


@pytest.fixture(scope="module")
def modules(parts) -> Run:
    def run(name, *arrays):
        with torch.no_grad():
            outputs = parts[name].module(*map(torch.from_numpy, arrays))
        return tuple(t.numpy() for t in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return run


@pytest.fixture(scope="module")
def second_frame(model, tmp_path_factory):
    """The frames as the image encoder takes them, and what the predictor knows of the object on the second."""
    predictor = SAM2VideoPredictor(model, fill_hole_area=0)
    state = predictor.init_state(str(write_clip(tmp_path_factory.mktemp("video") / "clip", 2)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    frames = [(state.images[t] * std[:, None, None] + mean[:, None, None])[None].numpy() for t in (0, 1)]
    predictor.add_new_points(state, 0, obj_id=1, points=CLICK, labels=LABEL, normalize_coords=True)
    assert len(list(predictor.propagate_in_video(state))) == 2
    output = state.objects[1].output_dict.non_cond_frame_outputs[1]
    names = ("pred_masks", "obj_ptr", "object_score_logits", "maskmem_features")
    return frames, {name: getattr(output, name).float().numpy() for name in names}


def difference(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return np.abs(found - expected).max() / np.abs(expected).max()


def check_click(run: Run, model, image, tolerance):
    predictor = SAM2ImagePredictor(model)
    predictor.set_image(image)
    expected, scores, _ = predictor.predict(CLICK, LABEL, return_logits=True)
    masks, ious = predict(run, image, CLICK, LABEL)
    assert expected.std() > 0.1
    assert difference(masks, expected) <= tolerance
    assert difference(ious, scores) <= tolerance


def check_second_frame(run: Run, second_frame, tolerance):
    frames, expected = second_frame
    click = [[CLICK[0][0] / WIDTH * SIDE, CLICK[0][1] / HEIGHT * SIDE]]
    found = track(run, frames, click, LABEL)
    assert expected["object_score_logits"].item() > 0
    assert expected["pred_masks"].std() > 0.1
    for name in ("pred_masks", "obj_ptr", "object_score_logits"):
        assert difference(found[name], expected[name]) <= tolerance, name
    # It is kept in bfloat16, which has 8 bits.
    assert difference(found["maskmem_features"], expected["maskmem_features"]) <= max(tolerance, 2**-8)


def check_part(part: Part, run, inputs: Sequence[torch.Tensor], tolerance: float):
    with torch.no_grad():
        expected = part.module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = run(inputs)
    assert len(found) == len(expected) == len(part.output_names)
    for name, ours, theirs in zip(part.output_names, expected, found, strict=True):
        assert theirs.shape == ours.shape
        assert difference(theirs.numpy(), ours.numpy()) <= tolerance, name


def test_parts_give_the_masks_of_the_image_predictor(modules, model, image):
    check_click(modules, model, image, 1e-5)


def test_parts_give_the_second_frame_of_the_video_predictor(modules, second_frame):
    check_second_frame(modules, second_frame, 1e-5)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_parts_are_what_the_network_computes_of_several_objects(version):
    model = small_model(version)
    parts = {part.name: part.module for part in sam2.parts(model)}
    pix_feat, memories, t_pos, pointers, times = inputs_of("memory_attention", 2, 3)
    with torch.no_grad():
        index, sines = model.encode_times(t_pos.tolist(), [0, 1, 2, 3], 15)
        expected = model.prepare_memory_conditioned_features(pix_feat, memories, index, pointers, sines)
        assert difference(parts["memory_attention"](pix_feat, memories, t_pos, pointers, times), expected) < 1e-5

        pix_feat, masks, scores, from_points = inputs_of("memory_encoder", 2, 1)
        for number in (0, 1):
            one = slice(number, number + 1)
            expected = model.encode_unrounded_memory(
                pix_feat, masks[one], scores[one], is_mask_from_pts=bool(from_points[number])
            )
            found = parts["memory_encoder"](pix_feat, masks, scores, from_points)[one]
            assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("falls_back", [True, False])
def test_the_first_mask_is_that_of_multimask_output_false(falls_back):
    model = small_model()
    model.sam_mask_decoder.dynamic_multimask_via_stability = falls_back
    pictures = torch.rand(2, 3, SIDE, SIDE)
    encoder, decoder, *_ = (part.module for part in sam2.parts(model))
    *_, coords, labels, mask_input, has_mask_input = inputs_of("mask_decoder", 2, 3)
    with torch.no_grad():
        *features, _ = encoder(pictures)
        masks, ious, _, _ = decoder(*features, coords, labels, mask_input, has_mask_input)
        for number in (0, 1):
            predictor = SAM2ImagePredictor(model)
            predictor.set_image(pictures[number].permute(1, 2, 0).numpy())
            for chosen, multimask_output in ((slice(1), False), (slice(1, 4), True)):
                _, scores, logits = predictor.predict(
                    coords[number].numpy(),
                    labels[number].numpy(),
                    mask_input=mask_input[number].numpy() if has_mask_input[number] else None,
                    multimask_output=multimask_output,
                )
                assert difference(masks[number, chosen].clamp(-32, 32).numpy(), logits) < 1e-5
                assert difference(ious[number, chosen].numpy(), scores) < 1e-5


def test_half_keeps_inputs_outputs_and_the_encoding_of_coordinates(parts):
    part = parts["mask_decoder"].half()
    dtypes = {name: parameter.dtype for name, parameter in part.module.state_dict().items()}
    kept = {name for name, dtype in dtypes.items() if dtype != torch.float16}
    assert kept == {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"}
    with torch.no_grad():
        for found, expected in zip(part.module(*part.args), parts["mask_decoder"].module(*part.args), strict=True):
            assert found.dtype == torch.float32
            assert difference(found, expected) <= HALF_TOLERANCE
    assert next(parts["mask_decoder"].module.parameters()).dtype == torch.float32


def test_descriptions_name_every_input_and_output(parts):
    for part in parts.values():
        inputs, outputs = part.description.partition("Inputs:\n")[2].split("Outputs:\n")
        for names, text in ((part.input_names, inputs), (part.output_names, outputs)):
            assert [line.split(":")[0] for line in text.splitlines() if not line.startswith("  ")] == list(names)


def test_a_model_that_cannot_be_written_is_refused(model):
    with pytest.raises(TypeError, match=r"model must be a network of omniops\.sam2\.load or build_sam2, got Linear"):
        sam2.parts(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model must be in float32 on the CPU, got torch\.bfloat16"):
        sam2.parts(small_model().bfloat16())
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        sam2.parts(small_model().train())


FORMATS = ("onnx", "openvino")


@pytest.fixture(scope="module", params=FORMATS)
def files(request, parts, tmp_path_factory):
    """What runs each part's file of a format."""
    folder, suffix = tmp_path_factory.mktemp(request.param), export.FORMATS[request.param].suffix
    return {
        name: export.load(export.write_part(part, folder / f"{name}{suffix}", request.param))
        for name, part in parts.items()
    }


def assembled(files) -> Run:
    return lambda name, *arrays: tuple(t.numpy() for t in files[name]([torch.from_numpy(a) for a in arrays]))


@pytest.mark.slow
def test_files_give_the_predictors_masks(files, model, image, second_frame):
    check_click(assembled(files), model, image, TOLERANCE)
    check_second_frame(assembled(files), second_frame, TOLERANCE)


@pytest.mark.slow
def test_files_take_other_numbers_of_everything(files, parts):
    for count, number in ((1, 1), (3, 2)):
        for name, part in parts.items():
            check_part(part, files[name], inputs_of(name, count, number), TOLERANCE)


@pytest.mark.slow
def test_onnx_files_in_float16(parts, tmp_path):
    for name, part in parts.items():
        run = export.load(export.write_part(part, tmp_path / f"{name}.onnx", half=True))
        check_part(part, run, inputs_of(name, 2, 3), HALF_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask_decoder", "memory_attention"])  # the others take as long, and all are right
def test_aoti_files(parts, name, tmp_path):
    run = export.load(export.write_part(parts[name], tmp_path / f"{name}.pt2"))
    for count, number in ((1, 1), (3, 2)):
        check_part(parts[name], run, inputs_of(name, count, number), TOLERANCE)


@pytest.mark.slow
def test_executorch_files(model, tmp_path):
    for part in sam2.parts(model, dynamic=False):
        run = export.load(export.write_part(part, tmp_path / f"{part.name}.pte"))
        check_part(part, run, part.args, TOLERANCE)


@pytest.mark.slow
def test_coreml_programs_are_made(parts, tmp_path):
    for name, part in parts.items():
        written = export.write_part(part, tmp_path / f"{name}.mlpackage")
        assert written.path.is_dir()
        assert [value.name for value in written.inputs] == list(part.input_names)
