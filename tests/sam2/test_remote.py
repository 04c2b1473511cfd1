"""Predictors in a process of their own: what is of SAM 2. tests/remote has the process."""

import copy
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_clip

from omniops.remote import kill
from omniops.sam2 import RemoteError, SAM2ImagePredictor, checkpoints, load, remote
from omniops.sam2.remote import PREDICTORS, make_predictor

OPTIONS = {"device": "cpu", "dtype": "float32", "image_size": 64, "random_weights": True}


def test_the_function_and_not_its_file_has_the_name_however_it_is_imported():
    program = (
        "import sys; sys.argv = ['omniops']\n"  # which imports what it needs alone
        "from omniops.sam2.remote import RemoteError\n"
        "from omniops.sam2 import remote\n"
        "assert remote.__name__ == 'remote' and callable(remote)\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_options_go_to_the_model_and_to_the_predictor(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    standin = importlib.import_module("remote_standin")
    monkeypatch.setattr(checkpoints, "load", standin.load)
    options = {"image_size": 64, "gain": 2.0}
    predictor = make_predictor("remote_standin:Predictor", "a.pt", "cpu", torch.float16, options)
    assert predictor.made_with() == ("a.pt", "cpu", torch.float16, {"image_size": 64})
    assert predictor.gain == 2.0


def test_a_path_is_made_absolute_and_what_is_none_stays(monkeypatch, tmp_path):
    monkeypatch.setattr("omniops.remote.Remote", lambda target, args, **options: args)
    monkeypatch.chdir(tmp_path)
    Path("a.pt").touch()
    assert remote("a.pt", image_size=64) == (
        "omniops.sam2.image_predictor:SAM2ImagePredictor",
        str(tmp_path / "a.pt"),
        "auto",
        "auto",
        {"image_size": 64},
    )
    assert remote("tiny", device=torch.device("cuda:1"), dtype=torch.float16)[1:] == (
        "tiny",
        "cuda:1",
        torch.float16,
        {},
    )


def test_the_predictors_are_known_by_name():
    for name, path in PREDICTORS.items():
        assert repr(remote("a.pt", predictor=name)) == f"<remote {path.partition(':')[2]}, not started>"


@pytest.mark.parametrize("predictor", ["picture", "", ":Predictor", "module:", "__main__:Predictor", "module:a b"])
def test_predictors_that_no_other_process_can_import_are_refused(predictor):
    with pytest.raises(ValueError, match="predictor must be one of image, video, masks, or a class"):
        remote("a.pt", predictor=predictor)


def test_a_class_of_a_function_is_refused():
    class Local:
        pass

    with pytest.raises(ValueError, match="<locals>"):
        remote("a.pt", predictor=Local)


def test_a_video_is_tracked_and_its_state_copied_there(tmp_path):
    clip = write_clip(tmp_path / "clip", 3)
    with remote("tiny", predictor="video", **OPTIONS) as predictor:
        state = predictor.init_state(str(clip))
        predictor.add_new_mask(state, 0, 1, np.eye(20))
        assert copy.copy(state) is state
        twin = copy.deepcopy(state)
        predictor.add_new_mask(state, 0, 2, np.eye(30))
        assert (state["obj_ids"], twin["obj_ids"]) == ([1, 2], [1])
        assert state["obj_id_to_idx"] == {1: 0, 2: 1}
        assert {"num_frames", "video_height", "obj_ids", "frames_tracked_per_obj"} <= set(state)
        assert not {"images", "frames"} & set(state)
        assert [ids for _, ids, _ in predictor.propagate_in_video(twin)] == [[1]] * 3
        del state
        assert twin["num_frames"] == 3


def test_the_image_predictor_gives_the_same_masks_there():
    local = SAM2ImagePredictor(load("tiny", **OPTIONS), mask_threshold=0.1)
    image = np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8)
    prompt = {"point_coords": np.array([[20.0, 30.0]]), "point_labels": np.array([1]), "return_logits": True}
    local.set_image(image)
    with remote("tiny", predictor=SAM2ImagePredictor, mask_threshold=0.1, **OPTIONS) as there:
        there.set_image(image)
        for mine, its in zip(local.predict(**prompt), there.predict(**prompt), strict=True):
            np.testing.assert_allclose(its, mine, rtol=1e-5, atol=1e-5)
        masks, _, _ = there.predict(**{**prompt, "return_logits": False})
        assert masks.dtype == np.float32
        assert set(np.unique(masks)) <= {0, 1}
        masks *= 255
        assert there.device == torch.device("cpu")
        assert there.mask_threshold == 0.1
        with pytest.raises(ValueError, match="point"):
            there.predict(point_coords=np.zeros((1, 3)), point_labels=np.array([1]))
        kill(there)
        with pytest.raises(RemoteError, match=r"was killed by SIGKILL, at: predict\(\)\. .*what set_image\(\) set"):
            there.predict(**prompt)
        with pytest.raises(RemoteError, match="call set_image again"):
            there.predict(**prompt)


def test_the_example_runs_as_printed():
    results = doctest.testmod(importlib.import_module("omniops.sam2.remote"))
    assert results.attempted == 5
    assert results.failed == 0
