"""What the network does otherwise on the CPU, to spare its caches: the same results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omniops.sam2.architectures import SIZES
from omniops.sam2.modeling import attention, hiera


@pytest.mark.parametrize(
    ("size", "side"), [("tiny", 256), ("tiny", 320), pytest.param("large", 128, marks=pytest.mark.slow)]
)
def test_stripes_of_a_map_are_the_whole(monkeypatch, size, side):
    """Also where windows reach over the edge, as those of 14 pixels do."""
    torch.manual_seed(0)
    trunk = hiera.Hiera(SIZES[size]).eval()
    images, counts = torch.randn(2, 3, side, side), []
    split = hiera.split_rows
    monkeypatch.setattr(hiera, "split_rows", lambda *args: counts.append(len(stripes := split(*args))) or stripes)
    with torch.no_grad():
        unsplit = trunk(images)
        assert max(counts) <= 4 * (side // 128) ** 2
        counts.clear()
        monkeypatch.setattr(hiera, "_PIXELS_AT_ONCE", 100)
        striped = trunk(images)
        assert len(counts) == sum(SIZES[size].stages)
        assert max(counts) >= side // 32
    with_grad = trunk(images)
    assert len(counts) == sum(SIZES[size].stages)
    for stage, expected, other in zip(striped, unsplit, with_grad, strict=True):
        torch.testing.assert_close(stage, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "dim"), [(1, 2, 300, 70, 24), (5, 1, 16, 16, 8), (2, 3, 33, 5, 16)]
)
def test_attention_in_bfloat16(monkeypatch, batch, heads, queries, keys, dim, autocast):
    monkeypatch.setattr(attention.devices, "autocast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(attention, "_CPU_SCORES", 0)
    monkeypatch.setattr(attention, "_CPU_QUERIES_AT_ONCE", 20)
    torch.manual_seed(0)
    query = torch.randn(1, heads, queries, dim, dtype=torch.bfloat16)
    key, value = (torch.randn(batch, keys, heads, dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    called = []
    ours = attention._in_bfloat16
    monkeypatch.setattr(attention, "_in_bfloat16", lambda *args: called.append(1) or ours(*args))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attention.scaled_dot_product_attention(query, key, value)
    assert called
    assert found.dtype == torch.bfloat16
    expected = F.scaled_dot_product_attention(query.double().expand(batch, -1, -1, -1), key.double(), value.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_no_prompts(monkeypatch, dtype):
    monkeypatch.setattr(attention.devices, "autocast_dtype", lambda _: torch.bfloat16)
    query, key = torch.zeros(0, 8, 16, 16, dtype=dtype), torch.zeros(0, 8, 7, 16, dtype=dtype)
    assert attention.scaled_dot_product_attention(query, key, key).shape == (0, 8, 16, 16)


@pytest.mark.parametrize(
    ("queries", "dtype", "grad"), [(15, torch.bfloat16, False), (16, torch.float32, False), (16, torch.bfloat16, True)]
)
def test_attention_is_pytorchs_elsewhere(monkeypatch, queries, dtype, grad):
    monkeypatch.setattr(attention, "_in_bfloat16", pytest.fail)
    query, key, value = (torch.randn(1, 1, count, 8, dtype=dtype) for count in (queries, 20, 20))
    with torch.set_grad_enabled(grad):
        found = attention.scaled_dot_product_attention(query, key, value)
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, value))


@torch.no_grad()
def test_attention_is_pytorchs_without_instructions_for_bfloat16(monkeypatch):
    """There matrix products in bfloat16 are emulated, and many times as slow."""
    monkeypatch.setattr(attention.devices, "autocast_dtype", lambda _: torch.float32)
    monkeypatch.setattr(attention, "_in_bfloat16", pytest.fail)
    query = torch.randn(1, 1, 16, 8, dtype=torch.bfloat16)
    assert torch.equal(
        attention.scaled_dot_product_attention(query, query, query),
        F.scaled_dot_product_attention(query, query, query),
    )
