"""Each rule of mps_rules.py refuses the call that it is for, and takes what we do in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mps_device import mps_device
from mps_rules import RULES, RuleError
from torch import Tensor


@pytest.fixture(autouse=True)
def mps() -> Iterator[torch.device]:
    with mps_device(values=False) as device, torch.no_grad():
        yield device


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="mps:0")


def attend(query: Tensor, key: Tensor, value: Tensor | None = None, **options: object) -> Tensor:
    return F.scaled_dot_product_attention(query, key, key if value is None else value, **options)


half, byte, long = torch.float16, torch.uint8, torch.int64

# The rule, a call that breaks it, and one beside it that does not.
CALLS = [
    ("a long reduction", lambda: empty(16, 32767) @ empty(32767, 16), lambda: empty(16, 32766) @ empty(32766, 16)),
    ("a long reduction", lambda: torch.bmm(empty(1, 64, 49152), empty(1, 49152, 576)), lambda: None),
    (
        "a long reduction",
        lambda: torch.baddbmm(empty(1, 64, 576), empty(1, 64, 32768), empty(1, 32768, 576)),
        lambda: torch.baddbmm(empty(1, 64, 576), empty(1, 64, 32736), empty(1, 32736, 576)),
    ),
    (
        "a long reduction",
        lambda: F.linear(empty(16, 40000), empty(16, 40000)),
        lambda: empty(15, 40000) @ empty(40000, 16),
    ),
    (
        "a result that is a view",
        lambda: torch.bmm(empty(1, 8, 4), empty(1, 4, 8), out=empty(2, 8, 8)[1:]),
        lambda: torch.bmm(empty(1, 8, 4), empty(1, 4, 8), out=empty(2, 8, 8)[:1]),
    ),
    (
        "a result that is a view",
        lambda: torch.ne(empty(2, 4), empty(2, 4), out=empty(2, 6, dtype=torch.bool)[:, 1:5]),
        lambda: empty(2, 6)[:, 1:5].copy_(empty(2, 4)),
    ),
    (
        "a result that is a view",
        lambda: empty(2, 8, 8)[1].addmm_(empty(8, 4), empty(4, 8)),
        lambda: empty(2, 8)[1].add_(1),
    ),
    (
        "a large side of a product",
        lambda: torch.bmm(empty(1, 3, 32), empty(1, 32, 65536)),
        lambda: torch.bmm(empty(1, 3, 32), empty(1, 32, 32768)),
    ),
    ("a large side of a product", lambda: torch.bmm(empty(65537, 2, 2), empty(65537, 2, 2)), lambda: None),
    (
        "many matrices with a bias",
        lambda: F.linear(empty(65537, 2, 8), empty(4, 8), empty(4)),
        lambda: F.linear(empty(65537, 2, 8), empty(4, 8)),
    ),
    (
        "a single row with a bias",
        lambda: F.linear(empty(1, 256), empty(4, 256), empty(4)),
        lambda: F.linear(empty(2, 256), empty(4, 256), empty(4)),
    ),
    (
        "a single row with a bias",
        lambda: F.linear(empty(80, 1, 2), empty(4, 2), empty(4)),
        lambda: F.linear(empty(80, 1, 2), empty(4, 2)),
    ),
    (
        "an expanded operand",
        lambda: F.linear(empty(1, 16, 8).expand(4, -1, -1), empty(8, 8)),
        lambda: F.linear(empty(1, 16, 8).expand(4, -1, -1).contiguous(), empty(8, 8)),
    ),
    (
        "an expanded operand",
        lambda: attend(empty(1, 1, 64, 32).expand(2, -1, -1, -1), empty(2, 1, 64, 32)),
        lambda: attend(empty(1, 1, 64, 32).expand(1, -1, -1, -1), empty(1, 1, 64, 32)),
    ),
    (
        "a whole score matrix",
        lambda: attend(empty(8, 1, 4096, 256), empty(8, 1, 28736, 256)),
        lambda: attend(empty(2, 1, 1024, 256), empty(2, 1, 28736, 256)),
    ),
    (
        "few queries",
        lambda: attend(empty(2, 8, 3, 96).transpose(1, 2), empty(2, 64, 3, 96).transpose(1, 2)),
        lambda: attend(empty(2, 3, 8, 96), empty(2, 3, 64, 96)),
    ),
    (
        "few queries",
        lambda: attend(empty(2, 3, 8, 96), empty(2, 3, 31, 96)),
        lambda: attend(empty(2, 3, 9, 96), empty(2, 3, 31, 96)),
    ),
    (
        "values of another width",
        lambda: attend(empty(1, 1, 16, 32), empty(1, 1, 16, 32), empty(1, 1, 16, 64)),
        lambda: None,
    ),
    (
        "a mask for many queries in half precision",
        lambda: attend(empty(1, 1, 4096, 32, dtype=half), empty(1, 1, 4096, 32, dtype=half), is_causal=True),
        lambda: attend(empty(1, 1, 4096, 32, dtype=half), empty(1, 1, 4096, 32, dtype=half)),
    ),
    (
        "an input that only looks like channels_last",
        lambda: F.max_pool2d(empty(1, 64, 3, 96)[:, :, 0].unflatten(1, (8, 8)).permute(0, 3, 1, 2), 2),
        lambda: F.max_pool2d(empty(1, 64, 96).unflatten(1, (8, 8)).permute(0, 3, 1, 2), 2),
    ),
    (
        "an input that only looks like channels_last",
        lambda: F.conv2d(empty(2, 8, 8, 16).permute(0, 3, 1, 2)[1:], empty(4, 16, 1, 1)),
        lambda: F.conv2d(empty(2, 16, 8, 8)[1:], empty(4, 16, 1, 1)),
    ),
    (
        "an input that only looks like channels_last",
        lambda: F.batch_norm(empty(1, 8, 8, 32).permute(0, 3, 1, 2)[:, :16], empty(16), empty(16)),
        lambda: F.batch_norm(empty(1, 8, 8, 16).permute(0, 3, 1, 2), empty(16), empty(16)),
    ),
    (
        "a convolution's strided weight",
        lambda: F.conv2d(empty(1, 4, 8, 8), empty(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)),
        lambda: F.conv2d(empty(1, 4, 8, 8), empty(8, 4, 1, 1).contiguous(memory_format=torch.channels_last)),
    ),
    ("a strided input of an activation", lambda: F.softplus(empty(4, 8).T), lambda: F.softplus(empty(4, 8))),
    ("the best of all of a strided input", lambda: empty(4, 8).T.argmax(), lambda: empty(4, 8).T.argmax(dim=1)),
    ("the best of five axes", lambda: empty(1, 2, 3, 4, 5).topk(1, dim=0), lambda: empty(2, 3, 4, 5).topk(1, dim=0)),
    (
        "a linear layer's strided weight",
        lambda: F.linear(empty(16, 8), empty(8, 4).T),
        lambda: F.linear(empty(16, 8), empty(4, 8)),
    ),
    (
        "a large side of a product",
        lambda: torch.bmm(empty(1, 3, 32), empty(1, 32, 65536)[..., :32768]),
        lambda: torch.bmm(empty(1, 3, 32), empty(1, 32, 65536)[..., :32768].contiguous()),
    ),
    (
        "a large side of a product",
        lambda: F.linear(empty(9, 1024, 1), empty(50304, 1)),
        lambda: F.linear(empty(9, 1024, 1), empty(32768, 1)),
    ),
    (
        "the places of many elements",
        lambda: empty(2**24 + 1)[empty(2**24 + 1) > 0],
        lambda: empty(2**24)[empty(2**24) > 0],
    ),
    ("integers through float32", lambda: empty(8, dtype=torch.int32).abs(), lambda: empty(8).abs()),
    (
        "zeros of 4 GiB",
        lambda: torch.zeros(2**15, 2**15, device="mps:0"),
        lambda: torch.zeros(2**15, 2**15, dtype=half, device="mps:0"),
    ),
    (
        "zeros of 4 GiB",
        lambda: torch.zeros_like(empty(2**30, dtype=half), dtype=torch.float32),
        lambda: empty(9).zero_(),
    ),
    ("integers through float32", lambda: empty(8, dtype=torch.bool).sort(), lambda: empty(8).sort()),
    ("a bound that rounds to zero", lambda: attend(empty(1, 1, 9, 32), empty(1, 1, 9, 32), scale=1e-8), lambda: None),
    (
        "more elements than MPS can address",
        lambda: torch.cat([empty(2**15, 2**15)] * 2),
        lambda: torch.cat([empty(2**14, 2**15)] * 2),
    ),
    (
        "more elements than MPS can address",
        lambda: torch.bmm(empty(2, 2**15, 2**14), empty(2, 2**14, 16)),
        lambda: torch.bmm(empty(2, 2**14, 2**14), empty(2, 2**14, 16)),
    ),
    (
        "a convolution's strided weight",
        lambda: F.conv2d(empty(1, 4, 8, 8), empty(4, 8, 3, 3).transpose(0, 1)),
        lambda: F.conv2d(empty(1, 4, 8, 8), empty(8, 4, 3, 3)),
    ),
    (
        "a channels_last gradient",
        lambda: torch.ops.aten.avg_pool2d_backward(
            empty(1, 16, 4, 4), empty(1, 8, 8, 16).permute(0, 3, 1, 2), [2, 2], [2, 2], [0, 0], False, True, None
        ),
        lambda: torch.ops.aten.avg_pool2d_backward(
            empty(1, 16, 4, 4), empty(1, 16, 8, 8), [2, 2], [2, 2], [0, 0], False, True, None
        ),
    ),
    ("a sort of what is not dense", lambda: empty(4, 8).T.sort(), lambda: empty(4, 8).sort()),
    ("the places of many elements", lambda: empty(2**24 + 1).nonzero(), lambda: empty(2**24).nonzero()),
    ("integers through float32", lambda: empty(8, dtype=long).sort(), lambda: empty(8, dtype=torch.int32).sort()),
    (
        "bytes filled from between words",
        lambda: empty(8, dtype=byte)[3:].fill_(1),
        lambda: empty(8, dtype=byte)[4:].fill_(1),
    ),
    (
        "a copy that is not waited for",
        lambda: empty(8).copy_(torch.zeros(8), non_blocking=True),
        lambda: empty(8).copy_(torch.zeros(8)),
    ),
    (
        "a copy that is not waited for",
        lambda: torch.zeros(8).to("mps:0", non_blocking=True),
        lambda: torch.zeros(8).to("mps:0"),
    ),
    ("a bound that rounds to zero", lambda: empty(8).clamp(min=1e-7), lambda: empty(8).clamp(min=1e-6)),
    ("a dtype that MPS has not", lambda: empty(8).double(), lambda: empty(8).bfloat16()),
    (
        "a dtype that MPS has not",
        lambda: torch.zeros(8, dtype=torch.uint16).to("mps:0"),
        lambda: empty(8).to(torch.int16),
    ),
    ("an operand without elements", lambda: empty(0, 8).softmax(1), lambda: empty(0, 8).flatten()),
    ("more elements than MPS can address", lambda: empty(2**16, 2**15) + 1, lambda: empty(2**16, 2**15 - 1) + 1),
]


@pytest.mark.parametrize(("rule", "broken", "kept"), CALLS, ids=[f"{i}: {rule}" for i, (rule, *_) in enumerate(CALLS)])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference"])
def test_a_rule(rule, broken, kept, inference):
    with torch.inference_mode(inference):
        with pytest.raises(RuleError, match=f": {rule}: "):
            broken()
        kept()


def test_every_rule_has_a_call():
    assert {rule.name for rule in RULES} == {rule for rule, *_ in CALLS}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_says_where_it_is_from_and_when_it_may_go(rule):
    assert any(word in rule.upstream for word in ("issue", "pull request", ".mm"))
    assert rule.versions
    assert rule.until


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_documentation_lists_a_rule(rule):
    table = (Path(__file__).parents[2] / "docs" / "metal.md").read_text(encoding="utf-8")
    assert f"\n| {rule.name}" in table


def test_tensors_of_two_devices_do_not_meet():
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        empty(8) + torch.zeros(8)
    assert (empty(8) + torch.tensor(1.0)).device.type == "mps"


def test_kernels_have_their_arguments_checked():
    from omniops.backends.mps._library import library

    kernel = library("carafe", torch.float32).carafe
    tensors = empty(1, 8, 4, 4), empty(1, 25, 8, 8), empty(1, 8, 8, 8)
    sizes = [1, 8, 4, 4, 5, 2, 1]
    kernel(*tensors, sizes, threads=(8, 8, 1), group_size=(8, 8, 1), arg_casts={3: "int32"})
    with pytest.raises(TypeError):
        kernel(
            *(tensor.half() for tensor in tensors),
            sizes,
            threads=(8, 8, 1),
            group_size=(8, 8, 1),
            arg_casts={3: "int32"},
        )
    with pytest.raises(TypeError):
        kernel(*tensors, "sizes", threads=(8, 8, 1), group_size=(8, 8, 1))
    with pytest.raises(ValueError, match="threads"):
        kernel(*tensors, sizes, threads=(64, 64, 1), group_size=(64, 64, 1), arg_casts={3: "int32"})


def test_other_devices_are_left_alone():
    assert torch.zeros(4, dtype=torch.float64).clamp(min=1e-9).device.type == "cpu"
