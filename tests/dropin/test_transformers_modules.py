"""omniops.enable("transformers") on small modules like those of its versions: order of imports, kernels, signatures."""

import importlib
import sys
import warnings
from types import MethodType

import pytest
import torch
from torch.testing import assert_close

import omniops
from omniops.dropin import LIBRARIES

SHAPES = [(4, 3), (2, 2)]
VALUE, LOCATIONS, WEIGHTS = torch.randn(2, 16, 2, 8), torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
ARGUMENTS = VALUE, torch.tensor(SHAPES), SHAPES, torch.tensor([0, 12]), LOCATIONS, WEIGHTS, 64
OURS = omniops.multi_scale_deform_attn(VALUE, SHAPES, LOCATIONS, WEIGHTS)

CLASS = """
from torch import nn


class MultiScaleDeformableAttention(nn.Module):
    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        return "{answer}"
"""
NEW = "transformers.models.new_detr.modeling_new_detr"
USER = """
from transformers.models.new_detr.modeling_new_detr import MultiScaleDeformableAttention


class Derived(MultiScaleDeformableAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)
"""
FUNCTIONS = """
def multi_scale_deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights):
    return "theirs"


def multi_scale_deformable_attention_v2(
    value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
):
    return "theirs, " + method


class Attention:
    def __init__(self):
        self.core = multi_scale_deformable_attention_v2
"""
# As versions before 4.49 are: the compiled kernel, or None, by the name that is a class's later.
OLDER = """
from torch.autograd import Function

MultiScaleDeformableAttention = None


class MultiScaleDeformableAttentionFunction(Function):
    @staticmethod
    def forward(context, value, shapes, start, locations, weights, im2col_step):
        return value.new_zeros(1)


def multi_scale_deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights):
    return "theirs"
"""
DECORATED = """
import functools


def decorated(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return "decorated", function(*args, **kwargs)

    return call


@decorated
def multi_scale_deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights):
    return "theirs"
"""
OTHER_ARGUMENTS = """
class MultiScaleDeformableAttention:
    def forward(self, value, locations):
        return "theirs"


def multi_scale_deformable_attention(*args, **kwargs):
    return "theirs"
"""
INHERITED = """
from transformers.models.new_detr import modeling_new_detr


class MultiScaleDeformableAttention(modeling_new_detr.MultiScaleDeformableAttention):
    pass
"""


@pytest.fixture
def write(project):
    """Writes modules of transformers' models by their models' names, and others by their paths."""

    def files(**modules):
        project(
            {
                path.replace("__", "/") + ".py"
                if "__" in path
                else f"transformers/models/{path}/modeling_{path}.py": text
                for path, text in modules.items()
            }
        )

    return files


def modeling(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def is_ours(result):
    return isinstance(result, torch.Tensor) and torch.equal(result, OURS)


@pytest.mark.parametrize("imported", [False, True], ids=["before the import", "after the import"])
def test_a_class_of_a_model_that_is_new(write, imported):
    write(new_detr=CLASS.format(answer="theirs"), engine__user=USER)
    made = importlib.import_module("engine.user").Derived() if imported else None
    omniops.enable("transformers")
    assert imported or not any(name.partition(".")[0] == "transformers" for name in sys.modules)
    user = importlib.import_module("engine.user")
    for module in (modeling("new_detr").MultiScaleDeformableAttention(), user.Derived(), made or user.Derived()):
        assert is_ours(module(*ARGUMENTS))
        by_name = {"level_start_index": None, "im2col_step": 1, "attention_weights": WEIGHTS}
        # The tensor of shapes is not read.
        assert is_ours(module(VALUE, None, SHAPES, sampling_locations=LOCATIONS, **by_name))
    omniops.disable("transformers")
    assert modeling("new_detr").MultiScaleDeformableAttention()(*ARGUMENTS) == user.Derived()(*ARGUMENTS) == "theirs"
    if made:
        assert made(*ARGUMENTS) == "theirs"


@pytest.mark.parametrize("imported", [False, True], ids=["before the import", "after the import"])
def test_functions_that_models_hold(write, imported):
    write(new_detr=FUNCTIONS)
    made = modeling("new_detr").Attention() if imported else None
    omniops.enable("transformers")
    module = modeling("new_detr")
    assert is_ours(module.multi_scale_deformable_attention(VALUE, torch.tensor(SHAPES), LOCATIONS, WEIGHTS))
    assert is_ours(module.multi_scale_deformable_attention(VALUE, SHAPES, LOCATIONS, attention_weights=WEIGHTS))
    flat = VALUE, SHAPES, LOCATIONS.flatten(3, 4), WEIGHTS.flatten(3)
    while_enabled = module.Attention()
    for attention in (while_enabled, made or while_enabled):
        assert is_ours(attention.core(*flat, [3, 3]))
        different = attention.core(*flat, num_points_list=[5, 1])
        assert_close(different, omniops.multi_scale_deform_attn(*flat, [5, 1]))
        assert not torch.equal(different, OURS)
        discrete = attention.core(*flat, [3, 3], method="discrete")
        assert_close(discrete, omniops.multi_scale_deform_attn(*flat, [3, 3], "discrete"))
    omniops.disable("transformers")
    assert module.multi_scale_deformable_attention(*flat) == "theirs"
    assert while_enabled.core(*flat, [3, 3]) == "theirs, default"


def test_again_and_again(write):
    write(new_detr=CLASS.format(answer="theirs"))
    attention = modeling("new_detr").MultiScaleDeformableAttention()
    for devices in (None, ["cuda"], ["cuda", "mps"], None):
        omniops.enable("transformers", devices=devices)
        omniops.enable("transformers", devices=devices)
        assert is_ours(attention(*ARGUMENTS))
    omniops.disable()
    omniops.disable()
    assert attention(*ARGUMENTS) == "theirs"


def kernelize(module, layer):
    """As Hugging Face's kernels do: the kernel's forward is bound to it, or that of its own class for a fallback."""
    module.forward = MethodType(layer.forward, module)
    return module


@pytest.mark.parametrize("imported", [False, True], ids=["before the import", "after the import"])
def test_a_kernel_from_the_hub_stays_unless_asked_otherwise(write, imported):
    write(new_detr=CLASS.format(answer="theirs"), deformable_detr_1a2b__layers=CLASS.format(answer="the kernel"))

    def kernel():
        return importlib.import_module("deformable_detr_1a2b.layers").MultiScaleDeformableAttention

    attention = modeling("new_detr").MultiScaleDeformableAttention()
    if imported:
        kernelize(attention, kernel())
    omniops.enable("transformers")
    if not imported:
        kernelize(attention, kernel())
    assert attention(*ARGUMENTS) == "the kernel"
    omniops.enable("transformers", devices=["mps"])
    assert attention(*ARGUMENTS) == "the kernel"
    omniops.enable("transformers", devices=["cuda"])
    assert is_ours(attention(*ARGUMENTS))
    omniops.enable("transformers")
    assert attention(*ARGUMENTS) == "the kernel"
    omniops.enable("transformers", devices=["cuda"])
    omniops.disable()
    assert attention(*ARGUMENTS) == "the kernel"


def test_a_kernel_loaded_after_ours_were_asked_for(write):
    write(new_detr=CLASS.format(answer="theirs"), deformable_detr_1a2b__layers=CLASS.format(answer="the kernel"))
    omniops.enable("transformers", devices=["cuda"])
    attention = modeling("new_detr").MultiScaleDeformableAttention()
    kernelize(attention, importlib.import_module("deformable_detr_1a2b.layers").MultiScaleDeformableAttention)
    assert is_ours(attention(*ARGUMENTS))


@pytest.mark.parametrize("enabled", [False, True], ids=["before", "while enabled"])
def test_where_no_kernel_is_found_ours_serve(write, enabled):
    write(new_detr=CLASS.format(answer="theirs"))
    layer = modeling("new_detr").MultiScaleDeformableAttention
    if enabled:
        omniops.enable("transformers")
    attention = kernelize(layer(), layer)
    omniops.enable("transformers")
    assert is_ours(attention(*ARGUMENTS))
    omniops.disable()
    assert attention(*ARGUMENTS) == "theirs"


def test_versions_that_compile_their_kernel(write):
    write(older_detr=OLDER)
    module = modeling("older_detr")
    theirs, arguments = module.MultiScaleDeformableAttentionFunction, (*ARGUMENTS[:2], *ARGUMENTS[3:])
    omniops.enable("transformers")
    assert module.MultiScaleDeformableAttention is None
    assert is_ours(module.multi_scale_deformable_attention(VALUE, SHAPES, LOCATIONS, WEIGHTS))
    assert module.MultiScaleDeformableAttentionFunction is theirs
    omniops.enable("transformers", devices=["cuda"])
    assert is_ours(module.MultiScaleDeformableAttentionFunction.apply(*arguments))
    omniops.disable()
    assert module.MultiScaleDeformableAttentionFunction is theirs


def test_what_decorates_a_function_stays(write):
    write(new_detr=DECORATED)
    omniops.enable("transformers")
    decoration, result = modeling("new_detr").multi_scale_deformable_attention(VALUE, SHAPES, LOCATIONS, WEIGHTS)
    assert decoration == "decorated"
    assert is_ours(result)


def test_a_class_that_inherits_its_forward(write):
    write(new_detr=CLASS.format(answer="theirs"), newer_detr=INHERITED)
    omniops.enable("transformers")
    attention = modeling("newer_detr").MultiScaleDeformableAttention()
    assert is_ours(attention(*ARGUMENTS))
    omniops.disable()
    assert attention(*ARGUMENTS) == "theirs"


def test_arguments_that_are_not_known_are_left_alone(write):
    write(other_detr=OTHER_ARGUMENTS)
    module = modeling("other_detr")
    with pytest.warns(UserWarning, match="does not know the arguments") as caught:
        omniops.enable("transformers")
    assert [str(warning.message).partition(" in this version")[0] for warning in caught] == [
        f"omniops does not know the arguments of transformers.models.other_detr.modeling_other_detr.{name}"
        for name in ("MultiScaleDeformableAttention.forward", "multi_scale_deformable_attention")
    ]
    assert module.MultiScaleDeformableAttention().forward(VALUE, LOCATIONS) == "theirs"
    assert module.multi_scale_deformable_attention() == "theirs"


def test_a_version_with_none_of_it(write):
    write(bert="class BertModel: ...")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        omniops.enable("transformers")
        assert list(vars(modeling("bert"))).count("BertModel") == 1
        omniops.disable()


def test_without_names_it_is_enabled_where_it_is_installed(write):
    write(new_detr=CLASS.format(answer="theirs"))
    omniops.enable()
    assert is_ours(modeling("new_detr").MultiScaleDeformableAttention()(*ARGUMENTS))
    omniops.disable()
    assert not LIBRARIES["transformers"].enabled()


def test_who_serves(project, monkeypatch):
    library = LIBRARIES["transformers"]
    monkeypatch.setitem(sys.modules, "kernels", None)
    project({"engine/user.py": ""})
    assert set(library.serving().values()) == {"omniops"}
    monkeypatch.delitem(sys.modules, "kernels")
    project({"kernels/user.py": ""})
    kernels = "kernels from the Hub where they are loaded, otherwise omniops"
    assert library.serving() == {"cpu": "omniops", "cuda": kernels, "mps": "omniops", "any other": "omniops"}
    project({"transformers/models/bert/modeling_bert.py": ""})
    omniops.enable("transformers", devices=["cuda"])
    assert set(library.serving().values()) == {"omniops"}


def test_a_folder_of_the_name_is_not_transformers(tmp_path, monkeypatch):
    (tmp_path / "transformers").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    assert not LIBRARIES["transformers"].installed()
