"""benchmarks/first_call.py: what it counts, and what it says where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from omniops.cli.errors import CommandError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "first_call.py"


@pytest.fixture
def first_call(monkeypatch):
    spec = importlib.util.spec_from_file_location("first_call", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "first_call", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(first_call, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first_call.main(json_file=tmp_path / "f.json")
    assert capsys.readouterr().out.strip() == (
        "No first calls were timed: Triton compiles for an NVIDIA GPU, and there is none here."
    )
    assert not (tmp_path / "f.json").exists()


def test_sizes_are_the_same_each_time_and_of_both_parities(first_call):
    drawn = first_call.sizes(40)
    assert drawn == first_call.sizes(40)
    assert len(set(drawn)) == 40
    for axis in (0, 1):
        assert {size[axis] % 2 for size in drawn} == {0, 1}
        assert any(size[axis] % 16 == 0 for size in drawn)


def test_every_call_goes_forward_and_backward(first_call):
    for operator, dtypes in first_call.DTYPES.items():
        for dtype in dtypes:
            first_call.call(operator, dtype, (5, 7), device_type="cpu")()


def test_a_compilation_is_a_kernel_in_tritons_cache(first_call, tmp_path):
    assert first_call.compiled(tmp_path / "none yet") == 0
    for name in ("a/forward.cubin", "a/forward.ptx", "b/backward.cubin", "c/launcher.so"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert first_call.compiled(tmp_path) == 2


def test_a_process_of_its_own_is_read_line_by_line(first_call, monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text("import os\nprint([1.5, 3])\nprint([0.5, len(os.environ['TRITON_CACHE_DIR'])])\n")
    monkeypatch.setattr(first_call, "__file__", str(child))
    beats = []
    figures = first_call.in_a_process_of_its_own("carafe", "float32", 2, Path("1234"), beats.append)
    assert figures == ([1.5, 0.5], [3, 4])
    assert beats == [1, 2]
    with pytest.raises(CommandError, match="carafe in float32 ended with 0"):
        first_call.in_a_process_of_its_own("carafe", "float32", 3, tmp_path, beats.append)
    child.write_text("print([1.5, 3])\nraise SystemExit(4)")
    with pytest.raises(CommandError, match="ended with 4"):
        first_call.in_a_process_of_its_own("carafe", "float32", 1, tmp_path, beats.append)


def test_goals_are_of_the_first_call_all_compilations_and_the_last_one(first_call):
    def met(seconds, compilations):
        return first_call.Result("carafe", "float32", first_call.EMPTY, seconds, compilations).met()

    assert met([2.0, 0.1, 0.1, 0.1], [4, 1, 1, 0])
    assert not met([2.1, 0.1, 0.1, 0.1], [4, 1, 1, 0])
    assert not met([2.0, 0.1, 0.1, 0.1], [5, 1, 1, 0])
    assert not met([2.0, 0.1, 0.1, 0.1], [4, 0, 0, 1])
    assert met([2.0, 0.1], [0, 0])


def test_the_table_and_the_file(first_call, monkeypatch, capsys, tmp_path):
    folders = []

    def measured(operator, dtype, count, cache, beat):
        is_new = cache not in folders
        folders.append(cache)
        return [1.25 if is_new else 0.25] * count, [2 if is_new else 0] * count

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(first_call.device, "title", lambda device: "a GPU")
    monkeypatch.setattr(first_call, "in_a_process_of_its_own", measured)
    path = tmp_path / "f.json"
    first_call.main(operator="carafe", count=3, json_file=path)
    out = capsys.readouterr().out
    assert out.count("met") == 2
    assert "missed" not in out
    report = json.loads(path.read_text())
    assert report["device"] == "a GPU"
    assert len(report["sizes"]) == 3
    assert [(row["dtype"], row["cache"]) for row in report["results"]] == [
        (dtype, cache) for dtype in ("float32", "float16") for cache in ("empty", "on disk")
    ]
    assert report["results"][0]["compilations"] == [2, 2, 2]
    assert report["results"][0]["last_size"] == 3
    assert len(set(folders)) == 2
    assert report["goals"]["met"] == dict.fromkeys(("carafe float32", "carafe float16"), True)
    with pytest.raises(
        CommandError, match="there are carafe, deform_conv2d, multi_scale_deform_attn, connected_components"
    ):
        first_call.main(operator="fly", count=3)
    with pytest.raises(CommandError, match=r"unknown dtype 'uint8': there are float32, float16$"):
        first_call.main(operator="carafe", dtype="uint8", count=3)
