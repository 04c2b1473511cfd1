"""What runs on machines that nobody here has: the files are well-formed, and their scripts do what they say."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omniops.cli.doctor import operators

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
COMPILE = "tests/metal/xcrun_compile.py"
METAL = sorted((ROOT / "src" / "omniops" / "backends" / "mps").glob("*.metal"))
yaml = pytest.importorskip("yaml", reason="YAML is read with PyYAML, which transformers brings")


def _workflow(name):
    return yaml.safe_load((GITHUB / "workflows" / name).read_text())


def _steps(job):
    return {step.get("name") or step.get("uses") or step["run"]: step for step in job["steps"]}


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.name)
def test_every_file_is_yaml_without_a_key_twice(path):
    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"{path.name}: twice among {keys}"
            return super().construct_mapping(node, deep)

    assert yaml.load(path.read_text(), Loader)


def test_each_macos_meets_the_oldest_and_the_newest_torch():
    job = _workflow("macos.yml")["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    assert matrix["os"] == ["macos-14", "macos-15", "macos-26"]
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    newest = re.search(r"^TORCH \?= torch==([\d.]+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert matrix["torch"] == [f"{oldest}.0", newest]
    assert {each["torch"] for each in matrix["include"]} == set(matrix["torch"])
    assert job["env"]["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "0.0"


def test_nothing_after_the_installation_hides_what_comes_later():
    steps = _workflow("macos.yml")["jobs"]["test"]["steps"]
    names = [step.get("name", step.get("uses")) for step in steps]
    installed = names.index("Install")
    assert names[installed + 1 : installed + 8] == [
        "The GPU",
        "omniops doctor",
        "omniops selftest on the CPU",
        "omniops selftest on the Apple GPU",
        "omniops selftest of SAM 2 at 1024 on the Apple GPU",
        "The tests on the Apple GPU",
        "The other tests",
    ]
    assert all("cancelled()" in step["if"] or "always()" in step["if"] for step in steps[installed + 1 :])


def test_only_a_virtual_gpu_may_fail():
    steps = _steps(_workflow("macos.yml")["jobs"]["test"])
    lenient = {name: step["continue-on-error"] for name, step in steps.items() if "continue-on-error" in step}
    assert set(lenient) == {name for name in steps if name.endswith("on the Apple GPU")}
    assert set(lenient.values()) == {"${{ steps.gpu.outputs.virtual == '1' }}"}
    ids = {step["id"] for step in steps.values() if "id" in step}
    text = (GITHUB / "workflows" / "macos.yml").read_text()
    assert set(re.findall(r"steps\.(\w+)\.", text)) <= ids


def test_all_tests_that_use_the_apple_gpu_run_in_one_process():
    steps = _steps(_workflow("macos.yml")["jobs"]["test"])
    assert " -n 0 -k mps tests/backends tests/ops" in steps["The tests on the Apple GPU"]["run"]
    uses_it = [
        path.relative_to(ROOT / "tests").parts[0]
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r'"mps"\]? if (torch\.backends\.)?mps\.is_available\(\)', path.read_text())
    ]
    assert set(uses_it) <= {"backends", "ops"}


@pytest.mark.parametrize("name", ["macos.yml", "linux.yml", "wheels.yml"])
def test_every_file_that_a_workflow_runs_is_there(name):
    text = (GITHUB / "workflows" / name).read_text()
    paths = set(re.findall(r"\btests/[\w./]+", text))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def _run(path, *lines):
    """Run the script that compiles, with an xcrun of these lines."""
    xcrun = path / "xcrun"
    xcrun.write_text("\n".join(["#!/bin/sh", f'echo "$@" >>{path}/log', *lines, "exit 0"]) + "\n")
    xcrun.chmod(xcrun.stat().st_mode | stat.S_IEXEC)
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, ROOT / COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    log = path / "log"
    return done.returncode, done.stdout, log.read_text().splitlines() if log.exists() else []


def test_every_kernel_is_compiled_in_every_version_and_dtype(tmp_path):
    status, out, log = _run(tmp_path)
    assert status == 0
    calls = [line for line in log if "empty.metal" not in line]
    for standard in ("metal3.1", "metal3.2", "metal4.0"):
        for source in METAL:
            own = [line for line in calls if str(source) in line and f"-std={standard} " in line]
            scalars = [re.search(r"-DSCALAR=(\w+)", line) for line in own]
            expected = ["float", "half", "bfloat"] if "SCALAR" in source.read_text() else [None]
            assert [found and found[1] for found in scalars] == expected
    assert out.splitlines()[-1] == f"{len(calls)} compiled, 0 failed"
    assert out.count(": compiled") == len(calls)


def test_a_version_that_xcode_lacks_is_named_and_no_failure(tmp_path):
    status, out, log = _run(tmp_path, 'case "$*" in *metal4.0*) echo "invalid value" >&2; exit 1;; esac')
    assert status == 0
    assert "-std=metal4.0: not available: invalid value" in out
    assert not any("metal4.0" in line for line in log if "empty.metal" not in line)


def test_all_that_does_not_compile_is_named_at_the_end(tmp_path):
    bad = 'case "$*" in *carafe.metal*SCALAR=half*) echo "no such type" >&2; exit 1;; esac'
    status, out, _ = _run(tmp_path, bad)
    assert status == 1
    assert "no such type" in out
    last = out[out.index(" failed") :].splitlines()
    assert last[1:] == [f"  carafe.metal -std={each} -DSCALAR=half" for each in ("metal3.1", "metal3.2", "metal4.0")]


def test_without_the_compiler_nothing_is_said_to_be_right(tmp_path):
    status, out, _ = _run(tmp_path, 'echo "missing Metal Toolchain" >&2; exit 1')
    assert status == 1
    assert out.endswith("no Metal compiler is available\n")


def test_the_smoke_test_has_every_operator():
    text = (ROOT / "tests" / "smoke.py").read_text()
    assert [name for name in operators() if f"omniops.{name}(" not in text] == []


def test_the_smoke_test_finds_a_wrong_gradient(monkeypatch):
    import smoke

    smoke.check("cpu")
    assert smoke.offers_metal() in (True, False)
    right = smoke.carafe
    monkeypatch.setattr(smoke, "carafe", lambda features, masks: right(features, masks.detach() + 0 * masks))
    with pytest.raises(AssertionError, match="on cpu: an error of"):
        smoke.check("cpu")


def test_a_gpu_without_memory_is_named_and_not_tested(monkeypatch, capsys):
    import smoke

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    def refuse(*_args, **_kwargs):
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(torch, "ones", refuse)
    assert not smoke.offers_metal()
    assert capsys.readouterr().out == "not tested on mps: MPS backend out of memory\n"


def test_the_issue_form_asks_for_both_files():
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "wrong-result.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [each for each in form["body"] if each["type"] != "markdown"]
    assert len({each["id"] for each in fields}) == len(fields)
    assert all(each["attributes"]["label"] for each in fields)
    (text,) = [each["attributes"]["value"] for each in form["body"] if each["type"] == "markdown"]
    assert "omniops doctor --json doctor.json" in text
    assert "omniops selftest --json selftest.json" in text
