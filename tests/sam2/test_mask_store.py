"""Old masks on disk."""

from __future__ import annotations

import gc

import torch

from omniops.sam2.mask_store import MaskStore


def test_a_mask_store_gives_back_what_it_was_given():
    store = MaskStore()
    tensors = [torch.randn(1, 3, 5).to(torch.bfloat16) for _ in range(3)]
    kept = [store.put(tensor) for tensor in tensors]
    del kept[1]
    gc.collect()
    kept.append(store.put(-tensors[1]))
    for stored, tensor in zip(kept, [tensors[0], tensors[2], -tensors[1]], strict=True):
        assert torch.equal(stored.tensor(), tensor)
    assert store.num_slots == 3


def test_a_mask_store_has_one_dtype_for_all():
    """Else a tensor of more bytes would be written over its neighbour."""
    store = MaskStore()
    tensors = [torch.randn(1, 3, 5, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
    for stored, tensor in zip([store.put(tensor) for tensor in tensors], tensors, strict=True):
        assert torch.equal(stored.tensor(), tensor.float())
