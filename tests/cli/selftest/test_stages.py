"""Operators of a model one by one: what is wrong is found where it is, and nothing else is."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from omniops.cli.selftest import stages as selftest_stages
from omniops.cli.selftest.models import models
from omniops.cli.selftest.outcomes import check_model
from omniops.cli.selftest.stages import check_operators

MODELS = models(64)


class Planted(TorchDispatchMode):
    """An operator that is wrong below Python, as a device's would be, except in float64: the oracle stays right.

    It gives ``wrong(result)``, or ``wrong(func, args, result)``, in place of each tensor that an operator returns.
    Where the oracle is not in float64 the device is told by being the first to call.
    """

    def __init__(self, operator, wrong, *, sees_inputs=False, also_float64=False, only_first=False):
        super().__init__()
        self.operator, self.wrong = operator, wrong
        self.sees_inputs, self.also_float64 = sees_inputs, also_float64
        self.only_first, self.calls = only_first, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        is_oracle = any(tensor.dtype == torch.float64 for tensor in tensors)
        if self.operator not in str(func) or (is_oracle and not self.also_float64):
            return result
        self.calls += 1
        if self.only_first and self.calls > 1:
            return result
        if self.sees_inputs:
            return tree_map_only(torch.Tensor, lambda tensor: self.wrong(func, tensors, tensor), result)
        return tree_map_only(torch.Tensor, self.wrong, result)


def _found(function, *plants, model=None):
    with check_operators(model or nn.Identity()) as found, torch.inference_mode():
        for plant in plants:
            plant.__enter__()
        try:
            function()
        finally:
            for plant in reversed(plants):
                plant.__exit__(None, None, None)
    return found


def _stages(found):
    return [stage.operator for stage in found.stages.values() if stage.calls]


class _Block(nn.Module):
    """Uses a part of one of its modules, which is never called, as SAM 2's memory attention is."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.linears = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.attention = nn.Module()
        self.attention.projection = nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.linears[1](self.linears[0](x)).tanh()
        return self.attention.projection(x).exp()


def test_stages_have_the_names_of_modules_and_of_what_they_call():
    model = nn.Sequential(_Block(), nn.Sigmoid())
    found = _found(lambda: model(torch.randn(2, 4)) * 2, model=model)
    assert [(stage.module, stage.operator) for stage in found.stages.values()] == [
        ("0.first", "linear"),
        ("0", "relu"),
        ("0.linears.0", "linear"),
        ("0.linears.1", "linear"),
        ("0", "tanh"),
        ("0.attention.projection", "linear"),
        ("0.attention", "exp"),
        ("1", "sigmoid"),
        ("", "mul"),
    ]
    assert found.first_wrong is None
    assert found.unchecked == {}
    assert all(f"{__name__}:" in stage.place or "test_stages" in stage.place for stage in found.stages.values())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda result: result * 1.001,
        lambda result: torch.where(result == result.max(), float("nan"), result),
        lambda result: torch.where(result == result.max(), float("inf"), result),
        torch.zeros_like,
        lambda result: result[..., :-1],
    ],
    ids=["scaled", "NaN", "infinite", "never written", "another shape"],
)
def test_the_first_that_is_wrong_is_named_and_what_follows_is_not(wrong):
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(dim=-1), nn.Linear(8, 8))
    inputs = torch.randn(3, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model[2], "forward", lambda x: F.linear(x, model[2].weight[:, : x.shape[1]]))
        found = _found(lambda: model(inputs), Planted("softmax", wrong), model=model)
    assert (found.first_wrong.module, found.first_wrong.operator) == ("1", "softmax")
    assert found.worst is found.first_wrong
    assert found.first_wrong.error > found.first_wrong.tolerance == 1e-4
    assert found.first_wrong.inputs == "float32 (3, 8)"
    assert [stage.right for stage in found.stages.values()] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_lowest_precision_of_a_call_decides_on_its_tolerance(dtype):
    x = torch.randn(5, 6)
    found = _found(lambda: (x.to(dtype) @ x.T.to(dtype), x.exp()))
    tolerances = {stage.operator: stage.tolerance for stage in found.stages.values()}
    assert tolerances["matmul"] == selftest_stages.STAGE_TOLERANCES[dtype]
    assert tolerances["exp"] == selftest_stages.STAGE_TOLERANCES[torch.float32]
    slightly = selftest_stages.STAGE_TOLERANCES[dtype] * 3
    found = _found(lambda: x.to(dtype) @ x.T.to(dtype), Planted("matmul", lambda result: result * (1 + slightly)))
    assert found.first_wrong.operator == "matmul"


def _writes_in_place():
    x = torch.randn(4, 6)
    x[:, ::2].addcmul_(x[:, 1::2], x[:, 1::2], value=-1)
    x += 1
    x[0] = 3.0
    x[x > 1] = 0.5
    torch.exp(x, out=torch.empty(4, 6))
    F.relu(x, inplace=True)


def test_what_is_written_in_place_is_compared_with_what_it_was_before():
    found = _found(_writes_in_place)
    assert _stages(found) == ["addcmul_", "add_", "__setitem__", "gt", "__setitem__", "exp", "relu"]
    assert found.first_wrong is None


@pytest.mark.parametrize(
    ("operator", "expected"),
    [("addcmul_", "addcmul_"), ("exp.out", "exp"), ("relu_", "relu"), ("fill_", "__setitem__")],
)
def test_a_wrong_write_in_place_is_found(operator, expected):
    found = _found(_writes_in_place, Planted(operator, lambda result: result.add_(0.1)))
    assert found.first_wrong.operator == expected


def test_views_are_no_stages_and_copies_are():
    x = torch.randn(4, 6)
    found = _found(lambda: (x.T, x.view(24), x[1:], x.expand(2, 4, 6), x.contiguous(), x.unbind(), x.detach()))
    assert _stages(found) == []
    assert set(_stages(_found(lambda: (x.T.contiguous(), x.T.reshape(24), x.clone())))) == {
        "contiguous",
        "reshape",
        "clone",
    }


def test_the_oracle_gets_the_strides_and_the_device_is_judged_by_values():
    """An operator that goes wrong on stride 0, as Apple's matrix product does, is told with the strides."""
    x, weight = torch.randn(1, 5, 6), torch.randn(3, 6, 7)

    def wrong_where_expanded(func, args, result):
        return result * 2 if any(0 in value.stride() for value in args) else result

    found = _found(lambda: torch.bmm(x.expand(3, 5, 6), weight), Planted("bmm", wrong_where_expanded, sees_inputs=True))
    assert found.first_wrong.operator == "bmm"
    assert found.first_wrong.inputs == "float32 (3, 5, 6) with strides (0, 6, 1); float32 (3, 6, 7)"
    found = _found(lambda: torch.bmm(x.repeat(3, 1, 1)[:, 1:], weight))
    assert found.first_wrong is None


def test_equal_values_may_be_sorted_in_any_order():
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])

    def other_order(result):
        return result.flip(-1) if result.dtype == torch.int64 else result

    def indices():
        x.argmax(dim=1)
        x.sort(dim=1, descending=True)
        x.topk(2, dim=1)
        x.max(dim=1)
        x.argsort(dim=0)

    assert _found(indices).first_wrong is None
    same = torch.ones(3, 4)
    assert _found(lambda: same.sort(dim=1), Planted("sort", other_order)).first_wrong is None
    wrong = _found(lambda: x.sort(dim=1), Planted("sort", other_order)).first_wrong
    assert wrong.operator == "sort"
    assert (
        _found(lambda: x.argmax(dim=1), Planted("argmax", lambda result: result * 0)).first_wrong.operator == "argmax"
    )


def test_integers_are_exact_and_comparisons_in_either_precision():
    half = torch.tensor([0.05, 0.06], dtype=torch.bfloat16)  # the first is 0.0501, and so is 0.05 in bfloat16
    assert _found(lambda: half > 0.05).first_wrong is None
    numbers = torch.arange(2**31 - 10, 2**31 - 1)
    assert _found(lambda: numbers.sum()).first_wrong is None
    plant = Planted("add", lambda result: result.float().long(), only_first=True)
    assert _found(lambda: numbers + 1, plant).first_wrong.tolerance == 0


def _refuse(_result):
    raise NotImplementedError("not implemented for MPS")


def test_the_stage_that_raises_is_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=-1))
    with pytest.raises(NotImplementedError), check_operators(model) as found, Planted("softmax", _refuse):
        model(torch.randn(2, 4))
    assert (found.raising.module, found.raising.operator) == ("1", "softmax")
    # And nothing of it stays behind.
    assert len(torch.nn.modules.module._global_forward_hooks) == 0
    assert len(torch.nn.modules.module._global_forward_pre_hooks) == 0


class _Swallows(nn.Module):
    """Tries what raises, and goes on with something else."""

    def __init__(self):
        super().__init__()
        self.attempt, self.instead = nn.Softmax(dim=-1), nn.Tanh()

    def forward(self, x):
        try:
            return self.attempt(x)
        except NotImplementedError:
            return self.instead(x).exp()


def test_what_a_model_catches_is_not_blamed_later():
    model = _Swallows()
    found = _found(lambda: model(torch.randn(2, 4)), Planted("softmax", _refuse), model=model)
    assert found.raising is None
    assert [stage.name.split(" at ")[0] for stage in found.stages.values() if stage.calls] == ["instead, tanh", "exp"]
    with pytest.raises(ZeroDivisionError), check_operators(model) as found, Planted("softmax", _refuse):
        assert 1 / (model(torch.randn(2, 4)).numel() - 8)
    assert found.raising is None


def _reading_raises_after(reads, monkeypatch):
    """As where Metal finds out later that a kernel failed."""
    read, left = torch.UntypedStorage.cpu, iter(range(reads))

    def cpu(storage):
        if next(left, None) is None:
            raise RuntimeError("Caused GPU Address Fault Error")
        return read(storage)

    monkeypatch.setattr(torch.UntypedStorage, "cpu", cpu)


@pytest.mark.parametrize("operator", ["sigmoid", "sigmoid_"])
@pytest.mark.parametrize("reads", [0, 1])
def test_what_the_device_raises_where_it_is_read_is_kept_with_its_stage(monkeypatch, operator, reads):
    x = torch.randn(2, 4)
    _reading_raises_after(reads, monkeypatch)
    with pytest.raises(RuntimeError, match="Address Fault"), check_operators(nn.Identity()) as found:
        getattr(x, operator)()
    assert found.raising.operator == operator
    assert found.unchecked == {}


def test_what_the_cpu_cannot_judge_is_counted():
    def refuse_float64(func, args, result):
        if result.dtype == torch.float64:
            raise NotImplementedError("no kernel of float64\nwith details")
        return result

    found = _found(lambda: torch.randn(3).exp(), Planted("exp", refuse_float64, sees_inputs=True, also_float64=True))
    assert found.first_wrong is None
    assert found.unchecked == {"exp: NotImplementedError: no kernel of float64": 1}


def test_a_device_may_be_as_inexact_as_the_cpu(monkeypatch):
    x = torch.tensor([1e8, 1.0, -1e8, 3.0])
    assert _found(lambda: (x * 1.1).sum()).first_wrong.operator == "sum"
    monkeypatch.setattr(selftest_stages, "_is_on_cpu", lambda tensor: False)
    assert _found(lambda: (x * 1.1).sum()).first_wrong is None
    y = torch.randn(40)
    plant = Planted("sigmoid", lambda result: result + 1e-2, only_first=True)
    assert _found(lambda: y.sigmoid(), plant).first_wrong.operator == "sigmoid"


@functools.cache
def _networks(model, dtype):
    """The one on the device and the one that it is compared with."""
    network = model.build(torch.device("cpu"), dtype)
    return network, model.reference(network)


@pytest.fixture(autouse=True, scope="module")
def _networks_are_freed():
    yield
    _networks.cache_clear()


class _OnWrongDevice:
    """A model whose operators are wrong on the device, and right on the CPU that it is compared with."""

    def __init__(self, model, *plant, **options):
        self.model, self.plant = model, Planted(*plant, **options)
        self.name, self.title, self.is_small = model.name, model.title, model.is_small

    def build(self, device, dtype):
        self._network, self._reference = _networks(self.model, dtype)
        return self._network

    def reference(self, network):
        return self._reference

    def run(self, network, dtype):
        if network is self._reference:
            return self.model.run(network, dtype)
        with self.plant:
            return self.model.run(network, dtype)


def _wrong(model, *plant, dtype=torch.float32, **options):
    model = _OnWrongDevice(model, *plant, **options)
    outcome = check_model(model, torch.device("cpu"), dtype)
    assert model.plant.calls > 0
    assert not outcome.is_right
    assert outcome.sentence.startswith(f"{model.title} on cpu, {outcome.dtype}: ")
    return outcome


def _a_tenth_more(result):
    return result * 1.1


def _where_heads_are(width):
    """Wrong for attention in heads of that width alone: SAM 2's memory attention has one of 256."""

    def wrong(func, args, result):
        is_of_heads = args[0].dim() == 4 and args[0].shape[-1] == width
        return result * 1.1 if is_of_heads and result.dtype.is_floating_point else result

    return wrong


_IN_SAM2 = {
    "convolution": ("conv2d", "conv2d", "patch_embed", _a_tenth_more),
    "layer norm": ("layer_norm", "layer_norm", "blocks.0", _a_tenth_more),
    "attention": ("scaled_dot_product", "scaled_dot_product_attention", "blocks.0.attn", _a_tenth_more),
    "pooling": ("max_pool2d", "max_pool2d", "blocks.1", lambda result: result.roll(1, -1)),
    "rotary encoding": ("addcmul_", "addcmul_", "memory_attention.layers.0.self_attn", lambda result: result.mul_(1.1)),
    "upsampled masks": ("upsample_bilinear2d", "interpolate", "", lambda result: result.roll(1, -1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _IN_SAM2)
def test_a_wrong_operator_of_sam2_is_named_with_its_stage(sam2_video, name):
    planted, operator, module, wrong = _IN_SAM2[name]
    outcome = _wrong(sam2_video, planted, wrong)
    first = outcome.operators.first_wrong
    assert first.operator == operator
    assert module in first.module
    assert first.error > first.tolerance
    assert f"the first stage that differs is {first.name}: {first.error:.1e} of its largest value, " in outcome.sentence
    assert not outcome.results_are_right
    # What comes after it is given what it made, and is right.
    wrong_ones = {stage.operator for stage in outcome.operators.stages.values() if not stage.right}
    assert wrong_ones == {operator}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "planted", "operator"),
    [
        (torch.float32, "scaled_dot_product", "scaled_dot_product_attention"),
        (torch.bfloat16, "matmul", "matmul"),  # which attention is made of there on CPUs
    ],
)
def test_wrong_attention_to_memories_alone_is_named(sam2_video, dtype, planted, operator):
    outcome = _wrong(sam2_video, planted, _where_heads_are(256), dtype=dtype, sees_inputs=True)
    first = outcome.operators.first_wrong
    assert first.module.endswith("memory_attention.layers.0.self_attn")
    assert first.operator == operator
    wrong_ones = {stage.module.rpartition(".")[2] for stage in outcome.operators.stages.values() if not stage.right}
    assert wrong_ones == {"self_attn", "cross_attn_image"}


@pytest.mark.slow
def test_nan_is_found_where_it_begins(sam2_video):
    plant = "conv_transpose2d", lambda result: torch.where(result == result.max(), float("nan"), result)
    outcome = _wrong(sam2_video, *plant)
    assert "sam_mask_decoder" in outcome.operators.first_wrong.module
    assert outcome.operators.first_wrong.operator == "conv_transpose2d"
    assert outcome.operators.first_wrong.error == float("inf")
    assert float("inf") in outcome.results.values()


def test_what_raises_is_named_with_its_stage(sam2_video):
    def refuse(_result):
        raise NotImplementedError("aten::gelu is not implemented for MPS\nwith details")

    outcome = _wrong(sam2_video, "gelu", refuse)
    assert outcome.operators.first_wrong is None
    raised = "NotImplementedError: aten::gelu is not implemented for MPS"
    assert outcome.sentence.endswith(f"({outcome.operators.raising.place.rpartition('(')[2]} raised {raised}")
    assert "blocks.0.mlp" in outcome.operators.raising.module
    assert outcome.exception == raised
    written = outcome.as_json()
    assert written["raising"]["operator"] == "gelu"
    assert "Traceback" in written["traceback"]
    assert written["right"] is False


def test_what_is_wrong_only_undisturbed_is_said_so(sam2_video):
    """As where a device does not wait for itself: every comparison of operators waits for it."""
    model = _OnWrongDevice(sam2_video, "gelu", lambda result: result)
    runs = []
    run = model.run

    def second_run_differs(network, dtype):
        results = run(network, dtype)
        runs.append(network)
        return {name: tensor + (len(runs) == 2) * 30 for name, tensor in results.items()}

    model.run = second_run_differs
    outcome = check_model(model, torch.device("cpu"), torch.float32)
    assert outcome.operators.first_wrong is None
    assert "every stage alone is right, but mask logits of " in outcome.sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "operator", "module"),
    [
        ("carafe", "carafe", "backbone.fpn.upsample_modules.3"),
        ("batch_norm", "batch_norm", "backbone.body.bn1"),
        ("roi_align", "roi_align", "roi_heads.box_roi_pool"),
        ("nms", "nms", "rpn"),
        ("grid_sampler", "grid_sample", ""),
    ],
)
def test_a_wrong_operator_of_the_detectors_is_named_with_its_stage(planted, operator, module):
    pytest.importorskip("torchvision", reason="the detectors need torchvision")
    # These two are judged in their own dtype, so the device is told by being the first to call.
    only_first = operator in ("nms", "roi_align")
    wrong = (lambda result: result[:1]) if operator == "nms" else _a_tenth_more
    outcome = _wrong(_by_name("mask-rcnn"), planted, wrong, only_first=only_first)
    first = outcome.operators.first_wrong
    assert first.operator == operator
    assert first.module.endswith(module)
    assert first.place.startswith(("omniops.", "torchvision.models."))


def _by_name(name):
    return next(model for model in MODELS if model.name == name)


@pytest.fixture
def sam2_video():
    model = _by_name("sam2-video")
    if model.missing():
        pytest.skip(model.missing())
    return model
