"""The models that selftest runs: right on this machine, and such that a wrong part of them would show."""

from __future__ import annotations

import functools
import itertools
import json
import sys

import pytest
import torch

from omniops.cli.selftest import models as selftest_models
from omniops.cli.selftest.models import RESULT_TOLERANCES, models, picture
from omniops.cli.selftest.outcomes import check_model
from omniops.device import autocast_dtype

CPU = torch.device("cpu")
MODELS = models(64)
NAMES = [model.name for model in MODELS]


@pytest.fixture
def by_name():
    def find(name):
        model = next(model for model in MODELS if model.name == name)
        if model.missing():
            pytest.skip(model.missing())
        return model

    return find


@functools.cache
def _outcome(model, dtype):
    return check_model(model, CPU, dtype)


@functools.cache
def _run(model):
    """The results in float32, and the paths of modules whose outputs are constant."""
    network = model.build(CPU, torch.float32)
    silent = []

    def look(path):
        def hook(_module, _inputs, output):
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(tensor, torch.Tensor) and _is_silent(tensor) for tensor in tensors):
                silent.append(path)

        return hook

    for path, module in network.named_modules():
        module.register_forward_hook(look(path))
    return model.run(network, torch.float32), silent


def _is_silent(tensor):
    return tensor.is_floating_point() and tensor.numel() > 16 and tensor.float().std() < 1e-3 * tensor.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_every_model_is_right_on_this_machine(by_name, name, dtype):
    outcome = _outcome(by_name(name), dtype)
    assert outcome.is_right, outcome.sentence
    assert outcome.sentence == ""
    assert outcome.operators.unchecked == {}
    assert outcome.tolerance == RESULT_TOLERANCES[dtype]
    if dtype == torch.bfloat16:  # with room for devices that round elsewhere
        assert 0 < outcome.results[outcome.worst_result] < outcome.tolerance / 3
        assert "bfloat16" in {stage.dtype for stage in outcome.operators.stages.values()}


@pytest.mark.parametrize("name", NAMES)
def test_results_are_neither_constant_nor_the_same_on_all_frames(by_name, name):
    results, _ = _run(by_name(name))
    many = {result: tensor for result, tensor in results.items() if tensor.numel() > 100}
    assert many
    for result, tensor in many.items():
        assert tensor.isfinite().all()
        assert tensor.std() > 0.02 * tensor.abs().max(), result
    values = list(many.values())
    alike = [torch.equal(a, b) for a, b in itertools.pairwise(values) if a.shape == b.shape]
    assert not any(alike)
    for result, tensor in results.items():
        if result.startswith("mask logits of"):
            assert tensor.min() < 0 < tensor.max(), result


@pytest.mark.parametrize("name", NAMES)
def test_what_every_module_makes_says_something(by_name, name):
    """A constant or nothing but zeros would be right on every device."""
    _, silent = _run(by_name(name))
    assert silent == []


@pytest.mark.parametrize("name", ["sam2-image", "sam2-video"])
def test_every_module_of_sam2_is_among_the_stages(by_name, name):
    stages = _outcome(by_name(name), torch.float32).operators.stages.values()
    text = " ".join(stage.name for stage in stages)
    modules = [
        "patch_embed",
        *(f"blocks.{block}." for block in range(12)),
        "neck.convs.0",
        "sam_prompt_encoder",
        "sam_mask_decoder",
        "normalize",
        "mask_downscaling",
    ]
    modules += ["pred_obj_score_head", "iou_prediction_head", "output_hypernetworks_mlps.3", "transformer.layers.1."]
    if name == "sam2-video":
        modules = [name for name in modules if name != "mask_downscaling"]
        attentions = ("self_attn", "cross_attn_image")
        modules += [f"memory_attention.layers.{i}.{attention}" for i in range(4) for attention in attentions]
        modules += ["memory_encoder", "frame_inference"]
    assert [module for module in modules if module not in text] == []
    attention = [s for s in stages if s.operator == "scaled_dot_product_attention" and "memory" in s.name]
    assert len({stage.module for stage in attention}) == (8 if name == "sam2-video" else 0)


def test_what_is_remembered_shows_in_the_next_mask(by_name):
    model = by_name("sam2-video")
    network = model.build(CPU, torch.float32)
    usual = model.run(network, torch.float32)
    with torch.no_grad():
        for path, module in network.named_modules():
            if path.endswith("cross_attn_image.v_proj"):
                module.weight.mul_(0)
    forgetful = model.run(network, torch.float32)
    for result, tensor in usual.items():
        change = float((tensor - forgetful[result]).abs().max() / tensor.abs().max())
        assert (change > 10 * RESULT_TOLERANCES[torch.float32]) == ("frame 0" not in result), (result, change)


@pytest.mark.parametrize(("image_size", "expected"), [(128, 1), (1024, 3)])
def test_small_models_have_one_thread(monkeypatch, image_size, expected):
    thread_counts = []
    model = models(image_size)[-1]
    monkeypatch.setattr(model, "build", lambda device, dtype: thread_counts.append(torch.get_num_threads()))
    torch.set_num_threads(3)
    assert "AttributeError" in check_model(model, CPU, torch.float32).exception  # there is no network
    assert (thread_counts, torch.get_num_threads()) == ([expected], 3)


def test_half_precision_is_that_of_the_devices_users():
    (model, *_) = models(64)
    assert model.dtypes(CPU) == tuple(dict.fromkeys((torch.float32, autocast_dtype("cpu"))))
    assert model.dtypes(torch.device("mps")) == (torch.float32, torch.float16)


def test_the_reference_has_the_rounded_weights(by_name):
    model = by_name("sam2-image")
    network = model.build(CPU, torch.bfloat16)
    reference = model.reference(network)
    rounded = dict(network.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in reference.parameters())
    assert any(tensor.dtype == torch.bfloat16 for tensor in rounded.values())
    assert all(torch.equal(parameter, rounded[name].float()) for name, parameter in reference.named_parameters())


def test_weights_and_pictures_are_the_same_every_time(by_name):
    model = by_name("sam2-image")
    torch.manual_seed(5)
    first = model.build(CPU, torch.float32).state_dict()
    torch.manual_seed(6)
    before = torch.get_rng_state()
    second = model.build(CPU, torch.float32).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (picture(40, 120) == picture(40, 120)).all()
    assert (picture(90, 140, 1) != picture(90, 140, 2)).any()


@pytest.mark.parametrize(
    ("module", "names", "remedy"),
    [
        ("huggingface_hub", ("sam2-image", "sam2-video"), "pip install 'omniops[sam2]'"),
        ("av", ("sam2-image", "sam2-video"), "pip install 'omniops[sam2]'"),
        ("torchvision", ("faster-rcnn", "mask-rcnn"), "pip install 'omniops[detect]'"),
    ],
)
def test_what_is_not_installed_is_not_checked_and_said_so(omniops, monkeypatch, tmp_path, module, names, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "selftest.json"
    only = [option for name in ("fpn-carafe", *names) for option in ("--only", name)]
    result = omniops("selftest", "--device", "cpu", *only, "--json", str(path))
    assert result.status == 0
    said = [line for line in result.out.splitlines() if line.startswith("Not checked: ")]
    assert [line.split(": ")[1] for line in said] == list(names)
    assert all(f"{module} is" in line or f"needs {module}" in line or "SAM 2 needs" in line for line in said)
    assert all(line.endswith(remedy) for line in said)
    assert {row["model"] for row in json.loads(path.read_text())["models"]} == {"fpn-carafe"}


def test_a_wrong_model_ends_the_command_with_status_1_and_its_sentence(omniops, monkeypatch):
    run = selftest_models.FPNCARAFE.run

    calls = []

    def once_wrong(self, model, dtype):
        calls.append(model)
        results = run(self, model, dtype)
        if len(calls) == 2:
            results["level 3"] = results["level 3"] * 2
        return results

    monkeypatch.setattr(selftest_models.FPNCARAFE, "run", once_wrong)
    result = omniops("selftest", "--device", "cpu", "--only", "fpn-carafe")
    assert result.status == 1
    assert "FPNCarafe on cpu, float32: every stage alone is right, but level 3 differ: 1.0e+00 of the " in result.out
    assert "WRONG" in result.out
    assert "results are wrong" in result.err
