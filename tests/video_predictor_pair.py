"""The official video predictor and ours with the same weights, and fixtures that tests of videos import."""

from __future__ import annotations

import copy

import pytest
import torch
from clips import SHARPER, write_clip

from omniops import connected_components
from omniops.sam2.modeling.sam2 import NO_OBJ_SCORE
from omniops.sam2.video_predictor import SAM2VideoPredictor

SIDE = 64
RED, GREEN = [36, 44], [98, 58, 122, 82]  # a point in one object and a box around the other, on frame 0


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "short", 6)


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "long", 11)


@pytest.fixture(scope="module")
def models(twins):
    """The models with weights under which masks differ, and memories matter; and objects come and go where
    something is taken from the scores of their being there."""
    cache = {}

    def make(version="2.1", less=0.0):
        if (version, less) not in cache:
            official, ours = (copy.deepcopy(model) for model in twins(version=version, image_size=SIDE, seed=3))
            with torch.no_grad():
                for name, parameter in official.named_parameters():
                    for part, factor in SHARPER.items():
                        if part in name:
                            parameter.mul_(factor)
                official.sam_mask_decoder.pred_obj_score_head.layers[2].bias.sub_(less)
            ours.load_state_dict(official.state_dict())
            cache[version, less] = official, ours
        return cache[version, less]

    return make


class PredictorPair:
    """The official predictor and ours: every call goes to both, and what they return must be alike."""

    def __init__(self, models, clip, share=1.0, **options):
        """A share of the pixels must be alike. Less than all where a threshold makes more of the last digits."""
        official, ours = models
        self.official = copy.deepcopy(official)  # whose options are set
        options = {"fill_hole_area": 0, **options}
        for name, value in options.items():
            setattr(self.official, name, value)
        self.ours = SAM2VideoPredictor(ours, **options)
        self.expected_state = self.official.init_state(str(clip))
        self.state = self.ours.init_state(clip)
        self.present, self.absent = 0, 0
        self.share = share

    def __getattr__(self, name):
        def call(*args, **kwargs):
            expected = getattr(self.official, name)(self.expected_state, *args, **kwargs)
            found = getattr(self.ours, name)(self.state, *args, **kwargs)
            if name == "propagate_in_video":
                pairs = list(zip(found, expected, strict=True))
                for pair in pairs:
                    self.compare(*pair)
                return [pair[0] for pair in pairs]
            if name == "remove_object":
                assert found[0] == expected[0]
                for (t, masks), (u, reference) in zip(found[1], sorted(expected[1]), strict=True):
                    self.compare((t, found[0], masks), (u, expected[0], reference))
            elif expected is not None:
                self.compare(found, expected)
            return found

        return call

    def compare(self, found, expected):
        frame, ids, masks = found
        assert (frame, list(ids)) == (expected[0], list(expected[1]))
        assert masks.shape == expected[2].shape
        assert masks.dtype == torch.float32
        for mask, reference in zip(masks, expected[2], strict=True):
            absent = reference == NO_OBJ_SCORE
            assert torch.equal(mask == NO_OBJ_SCORE, absent)
            if absent.all():
                self.absent += 1
                continue
            self.present += 1
            close = (mask - reference).abs() <= 1e-3 * reference[~absent].abs().max()
            assert close.float().mean() >= self.share
            inside, wanted = mask > 0, reference > 0
            assert (inside & wanted).sum() >= 0.999 * (inside | wanted).sum()


@pytest.fixture(autouse=True)
def oracle_fills_holes(monkeypatch):
    """It has no compiled extension here, and calls our function instead."""
    misc = pytest.importorskip("sam2.utils.misc", reason="the oracle: the official package, sam2 from PyPI")
    monkeypatch.setattr(misc, "get_connected_components", connected_components)
