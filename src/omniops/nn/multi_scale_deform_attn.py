"""Multi-scale deformable attention as a module, with mmcv's arguments, parameters and initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omniops.backends import accumulator
from omniops.nn._torchscript import compiled_as
from omniops.ops import _checks
from omniops.ops._torchscript import Pairs, is_tracing, sizes, traced_sizes
from omniops.ops.multi_scale_deform_attn import flat_sizes, multi_scale_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """Attention to a few points of several maps, around a reference (mmcv's module; Deformable DETR, arXiv:2010.04159).

    Each query predicts for each head, level and point where around its reference the level is read, and how much of it
    counts; the readings, weighted and summed, are projected, dropped out and added to ``identity``. Positions and
    weights are float32 where the module is of half precision.

        >>> attention = omniops.nn.MultiScaleDeformableAttention(embed_dims=64, num_levels=2, batch_first=True)
        >>> query, value = torch.randn(1, 100, 64), torch.randn(1, 32 * 48 + 16 * 24, 64)
        >>> reference_points = torch.rand(1, 100, 2, 2)
        >>> spatial_shapes = [(32, 48), (16, 24)]
        >>> attention(query, value=value, reference_points=reference_points, spatial_shapes=spatial_shapes).shape
        torch.Size([1, 100, 64])

    State dicts of mmcv's module and of Deformable DETR's own ``MSDeformAttn`` load strictly. The latter has
    (N, Q, embed_dims) and returns what here is added to ``identity``: ``batch_first=True``, ``dropout=0.0`` and a call
    with ``identity=query.new_zeros(())`` give the same.

    ``torch.jit.script`` compiles it without ``**kwargs``, and with ``spatial_shapes`` a tensor or a list of tuples.

    Args:
        embed_dims: the channels of queries and values.
        num_heads: M, which divides ``embed_dims`` and the channels of the projected value.
        num_levels: L, the number of maps.
        num_points: P, how many points each query reads of each level by each head.
        im2col_step: mmcv's, without effect: the batch is never taken in pieces.
        dropout: the probability with which numbers of the result are dropped, before ``identity`` is added.
        batch_first: whether query, value and result are (N, Q, embed_dims) and (N, S, embed_dims), and not
            (Q, N, embed_dims) and (S, N, embed_dims).
        norm_cfg: mmcv's, without effect there too.
        init_cfg: mmcv's, without effect there too.
        value_proj_ratio: the projected value has ``int(embed_dims * value_proj_ratio)`` channels.

    Raises:
        TypeError, ValueError: for an argument that no such attention can have.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: Any = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed_dims, self.num_heads, self.num_levels, self.num_points, self.im2col_step = _checks.integer(
            embed_dims=embed_dims,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            im2col_step=im2col_step,
        )
        (self.batch_first,) = _checks.boolean(batch_first=batch_first)
        self.norm_cfg, self.init_cfg = norm_cfg, init_cfg
        projected = int(self.embed_dims * _number("value_proj_ratio", value_proj_ratio))
        for name, channels in (("embed_dims", self.embed_dims), ("the channels of the projected value", projected)):
            if channels < 1 or channels % self.num_heads != 0:
                raise ValueError(f"num_heads must divide {name}, {channels}, got {self.num_heads}")
        if not 0 <= _number("dropout", dropout) <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.dropout = nn.Dropout(dropout)
        points = self.num_heads * self.num_levels * self.num_points
        self.sampling_offsets = nn.Linear(self.embed_dims, points * 2)
        self.attention_weights = nn.Linear(self.embed_dims, points)
        self.value_proj = nn.Linear(self.embed_dims, projected)
        self.output_proj = nn.Linear(projected, self.embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """mmcv's initialisation: each head looks in a direction of its own, each of its points a pixel further."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True)[0]
        steps = torch.arange(1, self.num_points + 1)[:, None]
        offsets = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        for parameter in self.attention_weights.parameters():
            nn.init.zeros_(parameter)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def _forward_without_kwargs(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | Pairs | None = None,
        level_start_index: Tensor | None = None,
    ) -> Tensor:
        """``forward`` where nothing else is given."""
        value = query if value is None else value
        identity = query if identity is None else identity
        if reference_points is None or spatial_shapes is None:
            raise TypeError("reference_points and spatial_shapes must be given")
        levels = _number_of(spatial_shapes)
        if levels != self.num_levels:
            raise ValueError(f"spatial_shapes must have num_levels = {self.num_levels} rows, got {levels}")
        boxes = reference_points.shape[-1] == 4
        return self._attend(
            query, value, identity, query_pos, key_padding_mask, reference_points, boxes, spatial_shapes, spatial_shapes
        )

    @compiled_as(_forward_without_kwargs)
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | Sequence[Sequence[int]] | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(Q, N, embed_dims) -> (Q, N, embed_dims); with ``batch_first`` (N, Q, embed_dims) -> (N, Q, embed_dims).

        Args:
            query: (Q, N, embed_dims), or with ``batch_first`` (N, Q, embed_dims).
            key: mmcv's, without effect there too.
            value: the pixels of all levels, one after the other, row by row: (S, N, embed_dims), or with
                ``batch_first`` (N, S, embed_dims); ``query`` by default.
            identity: what the result is added to, of the shape of ``query``, which it is by default.
            query_pos: is added to ``query`` for the offsets and weights, of its shape. Both are expanded where they
                have an axis of 1.
            key_padding_mask: (N, S), true where the projected value is taken as 0.
            reference_points: (N, Q, L, 2), x and y from 0 to 1, or (N, Q, L, 4), with the width and height of boxes,
                in which the offsets are then measured. An axis of 1 stands for all along it.
            spatial_shapes: the height and width of each level: an integer tensor (L, 2), or a list of pairs, of which
                nothing has to be read back from the device.
            level_start_index: mmcv's, without effect: the levels follow each other.
            kwargs: ``residual``, mmcv's older name of ``identity``; all else without effect, as in mmcv.

        Raises:
            TypeError: for an argument of the wrong type. ``reference_points`` and ``spatial_shapes`` are needed, though
                mmcv's signature has None.
            ValueError: for a wrong shape, or another device than that of ``query``.
        """
        value = query if value is None else value
        identity = kwargs.get("residual") if identity is None else identity
        identity = query if identity is None else identity
        if is_tracing() and reference_points is not None and spatial_shapes is not None:
            # Checks would compare the sizes of tensors, which are tensors to a trace; the operator has its own.
            levels: Tensor | Pairs = traced_sizes(spatial_shapes)
            boxes = sizes(reference_points)[-1] == 4
            return self._attend(
                query, value, identity, query_pos, key_padding_mask, reference_points, boxes, levels, levels
            )
        references = self._check(query, value, identity, query_pos, key_padding_mask, reference_points)
        pairs = self._pairs(spatial_shapes)
        is_near = isinstance(spatial_shapes, Tensor) and spatial_shapes.device == query.device
        levels = spatial_shapes if is_near and spatial_shapes is not None else pairs
        boxes = references.shape[-1] == 4
        return self._attend(query, value, identity, query_pos, key_padding_mask, references, boxes, pairs, levels)

    def _attend(
        self,
        query: Tensor,
        value: Tensor,
        identity: Tensor,
        query_pos: Tensor | None,
        key_padding_mask: Tensor | None,
        reference_points: Tensor,
        boxes: bool,
        spatial_shapes: Tensor | Pairs,
        levels: Tensor | Pairs,
    ) -> Tensor:
        """The attention, with ``levels`` as another form of ``spatial_shapes``, to divide offsets by on the device."""
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask.to(torch.bool)[..., None], 0.0)
        # The points of all levels follow each other, so that nothing has more than five axes, which is Core ML's limit.
        points = self.num_levels * self.num_points
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, points, 2))
        dtype = accumulator(offsets)  # positions of half precision would be off by pixels
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, points)).softmax(-1, dtype=dtype)
        offsets = offsets.to(dtype)
        references = reference_points.to(dtype).expand(-1, -1, self.num_levels, -1)[:, :, :, None]
        references = references.expand(-1, -1, -1, self.num_points, -1).flatten(2, 3)[:, :, None]
        if boxes:
            locations = references[..., :2] + offsets / self.num_points * references[..., 2:] * 0.5
        else:
            locations = references + offsets / _sides_like(offsets, levels).repeat_interleave(self.num_points, 0)
        result = multi_scale_deform_attn(
            value.unflatten(-1, (self.num_heads, -1)),
            spatial_shapes,
            locations,
            weights,
            [self.num_points] * self.num_levels,
        )
        result = self.output_proj(result)
        added: Tensor = self.dropout(result if self.batch_first else result.transpose(0, 1)) + identity
        return added

    def _pairs(self, spatial_shapes: Any) -> list[tuple[int, int]]:
        """The heights and widths, read back from a tensor once as long as the same one is given."""
        sides = flat_sizes(spatial_shapes)
        if len(sides) != 2 * self.num_levels:
            raise ValueError(f"spatial_shapes must have num_levels = {self.num_levels} rows, got {len(sides) // 2}")
        return list(zip(sides[::2], sides[1::2], strict=True))

    def _check(self, query: Tensor, value: Tensor, identity: Any, query_pos: Any, mask: Any, references: Any) -> Tensor:
        """Returns the reference points."""
        tensors = _checks.not_none(value=value, identity=identity, query_pos=query_pos, key_padding_mask=mask)
        _checks.tensor(query=query, **tensors, reference_points=references)
        _checks.on_device_of("query", query, **tensors, reference_points=references)
        for name, tensor, length in (("query", query, "Q"), ("value", value, "S")):
            if tensor.dim() != 3 or tensor.shape[2] != self.embed_dims:
                axes = f"(N, {length}" if self.batch_first else f"({length}, N"
                raise ValueError(
                    f"{name} must have shape {axes}, embed_dims) with embed_dims = {self.embed_dims}, "
                    f"got {tuple(tensor.shape)}"
                )
        batch, sequence = (0, 1) if self.batch_first else (1, 0)
        n, queries, pixels = query.shape[batch], query.shape[sequence], value.shape[sequence]
        if value.shape[batch] != n:
            raise ValueError(f"value must have the batch of query, N = {n}, got {value.shape[batch]}")
        for name, tensor in _checks.not_none(identity=identity, query_pos=query_pos).items():
            if not _is_expandable(tensor.shape, query.shape):
                shape = tuple(tensor.shape)
                raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}, got {shape}")
        if mask is not None:
            _checks.shape("key_padding_mask", mask, (n, pixels), "(N, S)")
        shape, sizes = tuple(references.shape), (n, queries, self.num_levels)
        if len(shape) != 4 or not _is_expandable(shape[:3], sizes) or shape[3] not in (2, 4):
            raise ValueError(f"reference_points must have shape (N, Q, L, 2 or 4) with N, Q, L = {sizes}, got {shape}")
        reference_points: Tensor = references
        return reference_points

    def extra_repr(self) -> str:
        """The sizes, as they are given."""
        names = ("embed_dims", "num_heads", "num_levels", "num_points", "batch_first")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _number_of(levels: Tensor | Pairs) -> int:
    return levels.shape[0] if isinstance(levels, Tensor) else len(levels)


def _sides_like(offsets: Tensor, levels: Tensor | Pairs) -> Tensor:
    """(L, 2), the width and height of each level, of the dtype and on the device of ``offsets``."""
    if isinstance(levels, Tensor):
        return levels.flip(1).to(offsets)
    sides: list[Tensor] = []
    for height, width in levels:  # filled on the device: a copy from the host would wait for it
        sides += [offsets.new_full((1,), width), offsets.new_full((1,), height)]
    return torch.cat(sides).view(-1, 2)


def _is_expandable(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether PyTorch's arithmetic expands a tensor of a shape to another."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in pairs)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
