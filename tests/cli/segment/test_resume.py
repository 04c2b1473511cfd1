"""omniops segment --resume: what was interrupted goes on, what is done stays."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="needs PyAV")

from segment_files import read_frames, read_json, run, write_picture, write_video

from omniops.cli.segment import resume


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupt after so many frames, once."""

    def after(frames):
        left = [frames]
        save = resume.KeptState.save_now_and_then

        def save_or_interrupt(self, state):
            save(self, state)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(resume.KeptState, "save_now_and_then", save_or_interrupt)

    return after


PROMPTS = ("--point", "20,10@2", "--box", "5,5,40,30@3#2")


@pytest.mark.parametrize("frames", [1, 3, 4])  # the first three are found back from frame 2 to the beginning
def test_an_interrupted_video_goes_on_as_if_nothing_had_happened(omniops, loaded, tmp_path, interrupt, frames):
    path = write_video(tmp_path / "v.mp4")
    assert run(omniops, path, *PROMPTS, "--out", tmp_path / "whole.mp4").status == 0
    assert not (tmp_path / "whole.state.safetensors").exists()
    interrupt(frames)
    out = tmp_path / "out.mp4"
    assert run(omniops, path, *PROMPTS, "--out", out).status == 130
    assert (tmp_path / "out.state.safetensors").exists()
    assert len(read_json(tmp_path / "out.json")) == 2 * frames
    result = run(omniops, path, *PROMPTS, "--out", out, "--resume")
    assert (result.status, result.err) == (0, "")
    assert read_json(tmp_path / "out.json") == read_json(tmp_path / "whole.json")
    for ours, theirs in zip(read_frames(out), read_frames(tmp_path / "whole.mp4"), strict=True):
        assert np.array_equal(ours, theirs)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "out.json", "out.mp4", "v.mp4", "whole.json", "whole.mp4",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_has_left_its_state(omniops, loaded, tmp_path, monkeypatch):
    """Nothing can be done after SIGKILL: what was written before is there."""
    path, out = write_video(tmp_path / "v.mp4"), tmp_path / "out.mp4"
    monkeypatch.setattr(resume, "_SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(resume, "_SHARE_OF_TIME", 0)
    calls = []
    save = resume.KeptState.save

    def save_twice(self, state):
        if len(calls) < 2:
            save(self, state)
        calls.append(set(resume.tracked_frames(state)))
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.KeptState, "save", save_twice)
    assert run(omniops, path, *PROMPTS, "--out", out).status == 130
    monkeypatch.setattr(resume.KeptState, "save", save)
    (tmp_path / "out.json").unlink()
    assert run(omniops, path, *PROMPTS, "--out", out, "--resume").status == 0
    assert run(omniops, path, *PROMPTS, "--out", tmp_path / "whole.mp4").status == 0
    assert read_json(tmp_path / "out.json") == read_json(tmp_path / "whole.json")
    assert calls[1] == {1, 2}


def test_resume_begins_where_nothing_was_begun(omniops, loaded, tmp_path):
    path = write_video(tmp_path / "v.mp4")
    assert run(omniops, path, *PROMPTS, "--out", tmp_path / "out.mp4", "--resume").status == 0
    assert len(read_json(tmp_path / "out.json")) == 12


def test_what_is_done_stays(omniops, loaded, never_loaded, tmp_path):
    path, out = write_video(tmp_path / "v.mp4"), tmp_path / "out.mp4"
    out.write_text("done")
    (tmp_path / "out.json").write_text("done")
    result = run(omniops, path, "--point", "1,2", "--out", out, "--resume")
    assert (result.status, result.out, result.notes[-1]) == (0, "", "omniops: 1 of 1 are done already\n")
    assert out.read_text() == "done"


def test_of_many_pictures_the_rest_is_done(omniops, scripted, tmp_path):
    for name in "abc":
        write_picture(tmp_path / f"{name}.png")
    command = (str(tmp_path / "?.png"), "--point", "1,2", "--save", "json", "--out", tmp_path / "out")
    assert run(omniops, *command).status == 0
    (tmp_path / "out" / "b.json").unlink()
    before = {name: os.stat(tmp_path / "out" / f"{name}.json").st_mtime_ns for name in "ac"}
    result = run(omniops, *command, "--resume")
    assert result.status == 0
    assert "a.png" not in result.out
    assert f"{tmp_path}/b.png -> {tmp_path}/out/b.json: 1 object" in result.out
    assert all(os.stat(tmp_path / "out" / f"{name}.json").st_mtime_ns == time for name, time in before.items())


def test_a_file_of_all_pictures_cannot_be_added_to(fails, never_loaded, tmp_path):
    write_picture(tmp_path / "a.png")
    line = fails("segment", str(tmp_path / "*.png"), "--point", "1,2", "--save", "coco", "--resume", status=2)
    assert line.endswith("--resume cannot add to a file of all pictures: leave out it or --save coco")


@pytest.mark.parametrize("prompts", [
    ("--point", "20,10@2"),
    ("--point", "20,11@2", "--box", "5,5,40,30@3#2"),
    ("--point", "20,10,1@2", "--point", "21,10,0@2", "--box", "5,5,40,30@3#2"),
    ("--point", "20,10@1", "--box", "5,5,40,30@3#2"),
])  # fmt: skip
def test_other_prompts_are_refused(omniops, loaded, tmp_path, interrupt, prompts):
    path, out = write_video(tmp_path / "v.mp4"), tmp_path / "out.mp4"
    interrupt(2)
    assert run(omniops, path, *PROMPTS, "--out", out).status == 130
    before = out.read_bytes()
    result = run(omniops, path, *prompts, "--out", out, "--resume")
    assert result.status == 2
    assert "out.state.safetensors is of other prompts" in result.err
    assert out.read_bytes() == before
    assert (tmp_path / "out.state.safetensors").exists()


def test_a_state_of_another_video_or_model_is_refused(omniops, loaded, tmp_path, interrupt, monkeypatch):
    path, out = write_video(tmp_path / "v.mp4"), tmp_path / "out.mp4"
    interrupt(2)
    assert run(omniops, path, *PROMPTS, "--out", out).status == 130
    write_video(path, frames=9)
    result = run(omniops, path, *PROMPTS, "--out", out, "--resume")
    assert result.status == 1
    assert "frames" in result.err
    assert "without --resume, and with --overwrite, it begins anew" in result.err
    (tmp_path / "out.state.safetensors").write_bytes(b"damaged")
    assert "out.state.safetensors" in run(omniops, path, *PROMPTS, "--out", out, "--resume").err


def test_without_resume_or_overwrite_a_state_is_not_replaced(fails, never_loaded, tmp_path):
    path = write_video(tmp_path / "v.mp4")
    (tmp_path / "out.state.safetensors").write_text("kept")
    line = fails("segment", str(path), "--point", "1,2", "--out", str(tmp_path / "out.mp4"), status=2)
    assert "out.state.safetensors is there already" in line
    assert "--resume goes on" in line


def test_a_state_that_cannot_be_written_is_said_and_the_masks_are_kept(omniops, loaded, tmp_path, monkeypatch):
    from omniops.sam2.inference_state import InferenceState

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(InferenceState, "save", full)
    result = run(omniops, write_video(tmp_path / "v.mp4"), "--point", "1,2", "--out", tmp_path / "out.mp4")
    assert result.status == 0
    assert any("--resume will not find the last frames" in note for note in result.notes)
    assert len(json.loads((tmp_path / "out.json").read_text())) == 6
    assert torch.is_grad_enabled()


def test_the_rest_of_a_data_set_leaves_its_folder_as_it_is(omniops, scripted, tmp_path):
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        write_picture(tmp_path / name)
    command = (str(tmp_path / "?" / "?.png"), "--point", "1,2", "--save", "yolo", "--out", tmp_path / "out")
    assert run(omniops, *command).status == 0
    before = (tmp_path / "out" / "data.yaml").read_text()
    (tmp_path / "out" / "2.txt").unlink()
    assert run(omniops, *command, "--resume").status == 0
    assert (tmp_path / "out" / "2.txt").exists()
    assert (tmp_path / "out" / "data.yaml").read_text() == before


def test_labels_of_frames_that_a_run_before_has_found_are_deleted(omniops, loaded, tmp_path):
    path, labels = write_video(tmp_path / "v.mp4"), tmp_path / "out-labels"
    labels.mkdir()
    for name in ("00099.png", "mine.png"):
        (labels / name).write_text("")
    command = (path, "--point", "1,2", "--save", "labels", "--overwrite", "--out", tmp_path / "out.mp4")
    assert run(omniops, *command).status == 0
    assert sorted(file.name for file in labels.iterdir()) == [*(f"0000{i}.png" for i in range(6)), "mine.png"]


def test_a_folder_of_masks_is_whole_or_not_there(omniops, scripted, tmp_path, monkeypatch):
    path, out = write_picture(tmp_path / "a.png"), tmp_path / "out.png"
    command = (path, "--point", "1,2", "--point", "30,2#2", "--save", "masks", "--out", out)
    write = Path.write_bytes

    def killed(self, content):
        if self.name == "2.png":
            raise KeyboardInterrupt
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", killed)
    assert run(omniops, *command).status == 130
    monkeypatch.setattr(Path, "write_bytes", write)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert run(omniops, *command, "--resume").status == 0
    assert sorted(file.name for file in (tmp_path / "out-masks").iterdir()) == ["1.png", "2.png"]
