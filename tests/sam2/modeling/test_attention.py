"""Attention whose keys are split among the multiprocessors of a GPU; on other devices tests of the network see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omniops.sam2.modeling import attention

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")


def by_definition(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scores = (query.double() @ key.double().transpose(2, 3)) * query.shape[3] ** -0.5
    return (scores.softmax(dim=3) @ value.double()).to(query.dtype), scores.logsumexp(dim=3)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_parts_of_keys_are_put_together(batch: int, heads: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cudnn_attention", by_definition)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, 5, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(batch, heads, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    key[:, :, :4] *= 30  # so that parts count differently
    expected, _ = by_definition(query, key, value)
    torch.testing.assert_close(attention._by_parts_of_keys(query, key, value, parts), expected)


@pytest.mark.parametrize(
    ("query_shape", "keys", "parts"),
    [
        ((1, 1, 4096, 256), 28736, 4),  # a frame and its whole memory bank
        ((1, 1, 4096, 256), 4096, 4),
        ((1, 1, 4096, 256), 4096 + 4, 4),
        ((1, 1, 4096, 256), 4096 + 6, 2),
        ((1, 1, 4096, 256), 4096 + 5, 3),
        ((1, 1, 4096, 256), 4096 + 7, 1),
        ((2, 1, 4096, 256), 28736, 2),
        ((3, 1, 4096, 256), 28736, 1),
        ((1, 1, 1024, 256), 1024, 1),
        ((1, 8, 7, 16), 4096, 4),
        ((1, 1, 4096, 256), 28737, 3),
        ((0, 1, 4096, 256), 4096, 1),
        ((1, 1, 4096, 256), 0, 1),
    ],
)
def test_how_many_parts(query_shape: tuple[int, ...], keys: int, parts: int) -> None:
    assert attention._number_of_parts(query_shape, keys, multiprocessors=132) == parts


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(1, 4096, 28736), (2, 4096, 8196), (1, 100, 5000), (3, 4096, 4096)]
)
def test_on_a_gpu(batch: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(1, 1, queries, 256, generator=generator, device="cuda", dtype=dtype)
    key, value = (torch.randn(batch, 1, keys, 256, generator=generator, device="cuda", dtype=dtype) for _ in range(2))
    key[:, :, : keys // 4] *= 3
    with torch.inference_mode():
        attended = attention.scaled_dot_product_attention(query, key, value)
    expected, _ = by_definition(query.float(), key.float(), value.float())
    assert attended.dtype == dtype
    error = (attended.double() - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)
