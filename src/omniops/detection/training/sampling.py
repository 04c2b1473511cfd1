"""Anchors and proposals drawn for each picture by itself, so that a loss does not depend on what else is in its batch.

torchvision draws from one stream of random numbers, so that a picture's sample depends on the pictures before it and
on the process that it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from omniops.detection.carafe_rcnn import CARAFERCNN
from omniops.distributed import Processes


class SeededSampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]
    """torchvision's, which draws for each picture from a seed of its own, and counts what it drew.

    Args:
        like: whose numbers it takes.
    """

    def __init__(self, like: BalancedPositiveNegativeSampler) -> None:
        super().__init__(like.batch_size_per_image, like.positive_fraction)
        self.seeds: Sequence[int] = ()
        """One for each picture of the batch."""
        self.drawn = 0
        """How many it drew of the last batch."""
        self.positive = 0
        """How many of them are positive."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each picture (A,) of 1 and more, 0, and -1 -> masks (A,) of those drawn among the first two."""
        self.positive = self.drawn = 0
        positive, negative = [], []
        for matched, seed in zip(matched_idxs, self.seeds, strict=True):
            generator = np.random.default_rng(seed)  # of the CPU, so that every device draws the same
            limit = int(self.batch_size_per_image * self.positive_fraction)
            mask, count = _draw(matched >= 1, limit, generator)
            positive.append(mask)
            self.positive += count
            self.drawn += count
            mask, count = _draw(matched == 0, self.batch_size_per_image - count, generator)
            negative.append(mask)
            self.drawn += count
        return positive, negative


def _draw(candidates: Tensor, limit: int, generator: np.random.Generator) -> tuple[Tensor, int]:
    """A mask (A,) of at most so many of the candidates (A,), and how many they are."""
    indices = candidates.nonzero()[:, 0]
    count = len(indices)
    if count > limit:
        drawn = torch.from_numpy(generator.choice(count, limit, replace=False, shuffle=False))
        indices, count = indices[drawn.to(indices.device)], limit
    mask = torch.zeros_like(candidates, dtype=torch.uint8)
    if count:  # not every operator takes an empty tensor on MPS
        mask[indices] = 1
    return mask, count


class JointLosses:
    """The losses of a batch that several processes share, as if one of them had it all.

    Each loss is a mean over the samples that a process drew. Where processes draw different numbers, as of small
    pictures or few objects, the mean of their means is not the mean of all; so each is weighted.
    """

    def __init__(self, model: CARAFERCNN, processes: Processes) -> None:
        self._model = model
        self._processes = processes
        self._anchors = SeededSampler(model.rpn.fg_bg_sampler)
        self._proposals = SeededSampler(model.roi_heads.fg_bg_sampler)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Meanwhile the model draws by the seeds."""
        model = self._model
        before = model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler
        model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = self._anchors, self._proposals
        try:
            yield
        finally:
            model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = before

    def seed(self, seeds: Sequence[int]) -> None:
        """Seed what is drawn for each picture of the batch that follows."""
        self._anchors.seeds = seeds
        self._proposals.seeds = [seed ^ 1 for seed in seeds]

    def weigh(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's losses -> such that the mean over the processes is the loss of the whole batch."""
        if not self._processes.are_several:
            return dict(losses)
        counts = torch.tensor([self._anchors.drawn, self._proposals.drawn, self._proposals.positive], dtype=torch.int64)
        total = counts.clone()
        dist.all_reduce(total)
        weights = (counts * dist.get_world_size() / total.clamp(min=1)).tolist()
        anchors, proposals, masks = weights
        of = {"loss_objectness": anchors, "loss_rpn_box_reg": anchors, "loss_mask": masks}
        return {name: loss * of.get(name, proposals) for name, loss in losses.items()}

    def mean(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of each over the processes."""
        values = torch.stack([loss.detach().float() for loss in losses.values()]).cpu()
        if self._processes.are_several:
            dist.all_reduce(values)
            values /= dist.get_world_size()
        return dict(zip(losses, values.tolist(), strict=True))
