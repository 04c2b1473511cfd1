"""What runs on machines that nobody here has: the files are well-formed, and their scripts do what they say."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
import tomllib
import torch
from packaging.specifiers import SpecifierSet

from omniops.environment import operators

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
    assert {row["torch"] for row in matrix["include"]} == set(matrix["torch"])
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
    targets = {target for row in job["strategy"]["matrix"]["include"] for target in row["run"].split()}
    assert targets == set(re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M))


@pytest.mark.parametrize("name", ["macos.yml", "linux.yml"])
def test_every_python_of_a_matrix_can_have_transformers(name):
    pytest.importorskip("transformers")
    pythons = [row["python"] for row in _workflow(name)["jobs"]["test"]["strategy"]["matrix"]["include"]]
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
    # By itself, or through backend_cases.py.
    asks = re.compile(
        r"\bmps\.is_available\(\)|\bcurrent_accelerator\(check_available=True\)|\bbackend_devices\b|\bBACKENDS\b"
    )
    uses_it = [path for path in (ROOT / "tests").rglob("test_*.py") if asks.search(path.read_text())]
    # Every test file that asks for MPS is in the list or in a folder of it, and the list has nothing else.
    entries = {next((entry for entry in on_it if ROOT / entry in (path, *path.parents)), path) for path in uses_it}
    assert entries == set(on_it)
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


def test_no_kernel_needs_a_header_beside_metals_own_and_ours():
    """Where torch's headers lie, the script does not say."""
    ours = list(METAL[0].parent.glob("*.h"))
    included = {
        name for source in (*METAL, *ours) for name in re.findall(r"^\s*#\s*include\s*(.*)$", source.read_text(), re.M)
    }
    assert included == {"<metal_stdlib>", *(f'"{header.name}"' for header in ours)}


def test_all_that_does_not_compile_is_named_at_the_end(tmp_path):
    bad = 'case "$*" in *carafe.metal*SCALAR=half*) echo "no such type" >&2; exit 1;; esac'
    status, out, _ = _run(tmp_path, bad)
    assert status == 1
    assert "no such type" in out
    last = out[out.index(" failed") :].splitlines()
    assert last[1:] == [f"  carafe.metal -std={std} -DSCALAR=half" for std in ("metal3.1", "metal3.2", "metal4.0")]


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
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    (text,) = [field["attributes"]["value"] for field in form["body"] if field["type"] == "markdown"]
    assert "omniops doctor --json doctor.json" in text
    assert "omniops selftest --json selftest.json" in text
    # Pasted, selftest.json is longer than GitHub lets an issue be.
    (files,) = [field["attributes"]["description"] for field in fields if field["id"] == "files"]
    assert "paste" not in files
    assert "tracebacks with the paths of files, in which your user name" in files


# --- wheels and releases ---


def _wheel_runners(job):
    return _workflow("wheels.yml")["jobs"][job]["strategy"]["matrix"]["runner"]


def test_every_wheel_meets_the_oldest_torch():
    runners = _wheel_runners("wheel")
    assert {name.partition("-")[0] for name in runners} == {"ubuntu", "macos", "windows"}
    assert _wheel_runners("oldest-torch") == runners
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    steps = [step.get("run", "") for step in _workflow("wheels.yml")["jobs"]["oldest-torch"]["steps"]]
    assert f"python -m pip install 'torch=={oldest}.0' numpy" in steps
    assert steps[-1] == "python tests/smoke.py"


def test_clang_compiles_the_kernels_for_windows():
    """MSVC has no vector extension: with it the wheel's kernels would be loops."""
    windows = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["windows"]
    assert windows["archs"] == ["AMD64"]
    assert windows["environment"] == {"CMAKE_GENERATOR_TOOLSET": "ClangCL"}
    assert "defined(__clang__)" in (ROOT / "csrc" / "simd.h").read_text()


def test_only_the_step_that_publishes_may_ask_for_a_token():
    workflow = _workflow("release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML takes the key "on" for a truth
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    permissions = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert permissions == {"publish": {"id-token": "write"}, "notes": {"contents": "write"}}
    assert [jobs[name].get("needs") for name in ("version", "wheels", "publish", "notes")] == [
        None,
        "version",
        "wheels",
        "publish",
    ]
    assert jobs["publish"]["environment"] == "pypi"
    assert jobs["wheels"]["uses"] == "./.github/workflows/wheels.yml"
    assert "workflow_call" in _workflow("wheels.yml")[True]
    text = (GITHUB / "workflows" / "release.yml").read_text()
    assert "secrets." not in text
    assert "password:" not in text


def test_all_that_is_built_is_published():
    steps = _workflow("release.yml")["jobs"]["publish"]["steps"]
    fetched = [step["with"] for step in steps if step["uses"].startswith("actions/download-artifact")]
    assert {step["path"] for step in fetched} == {"dist"}
    asked_for = [step.get("pattern") or step["name"] for step in fetched]
    built = [
        step["with"]["name"]
        for job in _workflow("wheels.yml")["jobs"].values()
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/upload-artifact")
    ]
    assert built == ["wheels-${{ matrix.runner }}", "sdist"]
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in asked_for) for name in built)


@pytest.mark.parametrize(
    ("tag", "wrong"),
    [
        ("v1.2.3", None),
        ("v1.2.4", "pyproject.toml"),
        ("v1.2.30", "pyproject.toml"),
        ("v1.2.3-CITATION.cff", "CITATION.cff"),
        ("v1.2.3-CHANGELOG.md", "CHANGELOG.md"),
    ],
)
def test_a_tag_must_be_the_version_that_the_files_name(tmp_path, tag, wrong):
    tag, _, stale = tag.partition("-")
    lines = {
        "pyproject.toml": 'version = "{}"\n',
        "CITATION.cff": "version: {}\n",
        "CHANGELOG.md": "## {} (2026-12-01)\n",
    }
    for name, line in lines.items():
        (tmp_path / name).write_text("first\n" + line.format("1.2.2" if name == stale else "1.2.3"))
    (run,) = [step["run"] for step in _workflow("release.yml")["jobs"]["version"]["steps"] if "run" in step]
    done = subprocess.run(
        ["bash", "-e", "-c", run], cwd=tmp_path, env={**os.environ, "TAG": tag}, capture_output=True, text=True
    )
    assert done.returncode == (wrong is not None)
    assert done.stdout.startswith("" if wrong is None else f"::error file={wrong}::")
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.3 (unreleased)\n")
    assert subprocess.run(["bash", "-e", "-c", run], cwd=tmp_path, env={**os.environ, "TAG": tag}).returncode == 1


def test_a_release_has_the_changelogs_part_of_its_version(tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 1.2.3 (2026-12-01)\n\n- new\n\n## 1.2.2 (2026-11-01)\n\n- old\n"
    )
    (tmp_path / "gh").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "gh").chmod(0o755)
    (run,) = [step["run"] for step in _workflow("release.yml")["jobs"]["notes"]["steps"] if "run" in step]
    environment = {**os.environ, "TAG": "v1.2.3", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.check_output(["bash", "-e", "-c", run], cwd=tmp_path, env=environment, text=True)
    assert said == "release create v1.2.3 --verify-tag --title omniops 1.2.3 --notes-file notes.md\n"
    assert (tmp_path / "notes.md").read_text().split() == ["-", "new"]


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem)
def test_every_form_and_the_pull_requests_ask_what_doctor_says(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "labels", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert "omniops doctor --json doctor.json" in path.read_text()
    assert "omniops doctor --json doctor.json" in (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text()


# --- the package's metadata ---


def test_the_citation_is_of_this_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
    assert (citation["license"], citation["authors"]) == (project["license"], project["authors"])
    assert {"cff-version", "message", "type"} <= set(citation)
    assert all({"type", "title", "authors", "year", "url"} <= set(reference) for reference in citation["references"])


def test_the_classifiers_name_every_python_that_is_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Programming Language :: Python :: 3\.(\d+)", "\n".join(project["classifiers"]))
    assert [int(minor) for minor in named] == list(range(int(named[0]), int(named[-1]) + 1))
    assert project["requires-python"] == f">=3.{named[0]}"
    assert "Typing :: Typed" in project["classifiers"]
    assert (ROOT / "src" / "omniops" / "py.typed").exists()


def test_the_sdist_has_what_git_has(tmp_path, monkeypatch):
    """Tests, their data and the documentation too, so that the suite passes from it."""
    build = pytest.importorskip("scikit_build_core.build", reason="scikit-build-core makes the sdist")
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout, so nothing says what belongs to the project")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    tracked = {name for name in listed if name and (ROOT / name).is_file()}
    checkout = tmp_path / "checkout"
    for name in tracked | {"build/made", ".venv/installed", "src/omniops/__pycache__/made.pyc"}:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes() if name in tracked else b"")
    monkeypatch.chdir(checkout)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert names == tracked | {"PKG-INFO"}


def test_the_papers_addresses_are_the_citations():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {url for name, url in urls.items() if name.startswith("Paper: ")} == {
        reference["url"] for reference in citation["references"]
    }
