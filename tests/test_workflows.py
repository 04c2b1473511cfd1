"""What runs on machines that nobody here has: the files are well-formed, and their scripts do what they say."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

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
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    newest = re.search(r"^TORCH \?= torch==([\d.]+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert matrix["torch"] == [f"{oldest}.0", newest]
    assert {each["torch"] for each in matrix["include"]} == set(matrix["torch"])
    assert job["env"]["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "0.0"


@pytest.mark.parametrize("job", ["test", "compile"])
def test_the_repository_may_name_other_macs_than_the_hosted_ones(job):
    job = _workflow("macos.yml")["jobs"][job]
    found = re.fullmatch(r"\$\{\{ fromJSON\(vars\.MACOS_RUNNERS \|\| '(.*)'\) \}\}", job["strategy"]["matrix"]["os"])
    assert json.loads(found[1]) == ["macos-15", "macos-26"]
    assert job["runs-on"] == "${{ matrix.os }}"


def test_linux_runs_what_ci_runs():
    job = _workflow("linux.yml")["jobs"]["test"]
    assert job["steps"][-1]["run"] == "make ${{ matrix.run }}"
    targets = {target for each in job["strategy"]["matrix"]["include"] for target in each["run"].split()}
    assert targets == set(re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M))


@pytest.mark.parametrize("name", ["macos.yml", "linux.yml"])
def test_every_python_of_a_matrix_can_have_transformers(name):
    pytest.importorskip("transformers")
    pythons = [each["python"] for each in _workflow(name)["jobs"]["test"]["strategy"]["matrix"]["include"]]
    asked = SpecifierSet(metadata.metadata("transformers")["Requires-Python"])
    assert pythons
    assert [python for python in pythons if python not in asked] == []


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


def test_a_gpu_that_hangs_leaves_time_for_the_rest():
    job = _workflow("macos.yml")["jobs"]["test"]
    limits = [step["timeout-minutes"] for name, step in _steps(job).items() if name.endswith("on the Apple GPU")]
    assert len(limits) == 3
    assert sum(limits) <= job["timeout-minutes"] - 40


def test_all_tests_that_use_the_apple_gpu_run_in_one_process(tmp_path):
    job = _workflow("macos.yml")["jobs"]["test"]
    steps = _steps(job)
    on_it = job["env"]["ON_THE_GPU"].split()
    asks = re.compile(r"\bmps\.is_available\(\)|\bcurrent_accelerator\(check_available=True\)")
    uses_it = [path for path in (ROOT / "tests").rglob("test_*.py") if asks.search(path.read_text())]
    # A folder or a file of the list for each that uses it, and none for nothing.
    assert {next((each for each in on_it if (ROOT / each) in (path, *path.parents)), path) for path in uses_it} == set(
        on_it
    )
    (own,) = _pytest_calls(tmp_path, steps["The tests on the Apple GPU"], job)
    assert own == ["-n", "0", "-k", "mps", *on_it]
    rest, others = _pytest_calls(tmp_path, steps["The other tests"], job)
    assert rest[-len(on_it) - 2 :] == ["-k", "not mps", *on_it]
    assert [others[i + 1] for i, word in enumerate(others) if word == "--ignore"] == on_it
    assert steps["The other tests"]["env"] == {"OMNIOPS_DEVICE": "cpu"}


def _pytest_calls(path, step, job):
    """The arguments of every pytest that a step runs, though each of them fails."""
    python = path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text('#!/bin/sh\nprintf "%s\\t" "$@"\necho\nexit 1\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    environment = {**os.environ, "ON_THE_GPU": job["env"]["ON_THE_GPU"]}
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]], cwd=path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    calls = [line.split("\t")[:-1] for line in done.stdout.splitlines()]
    assert all(call[:2] == ["-m", "pytest"] for call in calls)
    return [call[2:] for call in calls]


@pytest.mark.parametrize("name", ["macos.yml", "linux.yml", "wheels.yml"])
def test_every_file_that_a_workflow_runs_is_there(name):
    text = (GITHUB / "workflows" / name).read_text()
    paths = set(re.findall(r"\btests/[\w./]+", text))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def _run(path, *lines, required=()):
    """Run the script that compiles, with an xcrun of these lines."""
    xcrun = path / "xcrun"
    xcrun.write_text("\n".join(["#!/bin/sh", f'echo "$@" >>{path}/log', *lines, "exit 0"]) + "\n")
    xcrun.chmod(xcrun.stat().st_mode | stat.S_IEXEC)
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, ROOT / COMPILE, *required], env=environment, capture_output=True, text=True, check=False
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


def test_a_version_that_xcode_lacks_fails_where_it_is_required(tmp_path):
    lacks = 'case "$*" in *metal4.0*) echo "invalid value" >&2; exit 1;; esac'
    status, out, log = _run(tmp_path, lacks, required=["metal3.2", "metal4.0"])
    assert status == 1
    assert out.endswith("required and not available: metal4.0\n")
    assert any("carafe.metal" in line for line in log)  # the others are compiled all the same
    assert _run(tmp_path, lacks, required=["metal3.1", "metal3.2"])[0] == 0
    status, out, _ = _run(tmp_path, required=["metal5"])
    assert (status, out) == (2, "unknown: metal5; there are metal3.1, metal3.2, metal4.0\n")


@pytest.mark.parametrize(
    ("runner", "required"),
    [
        ("macos-15", "metal3.1 metal3.2"),
        ("macos-26", "metal3.1 metal3.2 metal4.0"),
        ("one-of-ours", "metal3.1"),
    ],
)
def test_each_mac_requires_the_versions_that_its_xcode_has(tmp_path, runner, required):
    run = _steps(_workflow("macos.yml")["jobs"]["compile"])["Every kernel, in every language version and dtype"]["run"]
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = run.replace("${{ matrix.os }}", runner)
    assert (
        subprocess.check_output(["bash", "-e", "-c", script], env=environment, text=True) == f"{COMPILE} {required}\n"
    )


def test_what_the_compiler_warns_of_is_printed(tmp_path):
    warns = 'case "$*" in *carafe.metal*SCALAR=half*) echo "warning: unused variable" >&2;; esac'
    status, out, _ = _run(tmp_path, warns)
    assert status == 0
    assert out.count("SCALAR=half: compiled\nwarning: unused variable\n") == 3


def test_no_kernel_needs_a_header_beside_metals_own():
    """Where torch's headers lie, the script does not say."""
    included = {name for source in METAL for name in re.findall(r"^\s*#\s*include\s*(.*)$", source.read_text(), re.M)}
    assert included == {"<metal_stdlib>"}


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


def test_a_gpu_without_memory_is_named_and_not_tested(monkeypatch, capsys, tmp_path):
    import smoke

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    def refuse(*_args, **_kwargs):
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(torch, "ones", refuse)
    for answer, name in (("1", "mps, a virtual GPU"), ("0", "mps")):
        _answer(tmp_path, monkeypatch, answer)
        smoke.check_metal()
        assert capsys.readouterr().out == f"not tested on {name}: MPS backend out of memory\n"


def _answer(path, monkeypatch, answer):
    """Have sysctl say of the virtual machine what is given."""
    sysctl = path / "sysctl"
    sysctl.write_text(f'#!/bin/sh\n[ "$*" = "-n kern.hv_vmm_present" ] && echo {answer}\n')
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(path), prepend=os.pathsep)


@pytest.mark.parametrize(("answer", "name"), [("1", "mps, a virtual GPU"), ("0", "mps")])
def test_a_gpu_that_gives_something_wrong_is_named(monkeypatch, tmp_path, answer, name):
    import smoke

    def wrong(device):
        raise AssertionError(f"carafe on {device}: an error of 1.0e+00")

    _answer(tmp_path, monkeypatch, answer)
    monkeypatch.setattr(smoke, "offers_metal", lambda: True)
    monkeypatch.setattr(smoke.mps, "AVAILABLE", True)
    monkeypatch.setattr(smoke, "check", wrong)
    with pytest.raises(RuntimeError, match=f"^omniops fails on {name}: carafe on mps: an error of"):
        smoke.check_metal()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert smoke.metal() == "mps"


def test_a_virtual_gpu_has_its_memory_where_a_wheel_is_tested():
    jobs = _workflow("wheels.yml")["jobs"]
    assert jobs["oldest-torch"]["env"] == {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.0"}
    text = (ROOT / "pyproject.toml").read_text()
    macos = text.split("[tool.cibuildwheel.macos]\n")[1].split("\n[")[0]
    assert 'test-environment = { PYTORCH_MPS_HIGH_WATERMARK_RATIO = "0.0" }' in macos.splitlines()


def test_the_issue_form_asks_for_both_files():
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "wrong-result.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [each for each in form["body"] if each["type"] != "markdown"]
    assert len({each["id"] for each in fields}) == len(fields)
    assert all(each["attributes"]["label"] for each in fields)
    (text,) = [each["attributes"]["value"] for each in form["body"] if each["type"] == "markdown"]
    assert "omniops doctor --json doctor.json" in text
    assert "omniops selftest --json selftest.json" in text
    # Pasted, selftest.json is longer than GitHub lets an issue be.
    (files,) = [each["attributes"]["description"] for each in fields if each["id"] == "files"]
    assert "paste" not in files
    assert "tracebacks with the paths of files, in which your user name" in files
