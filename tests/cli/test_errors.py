"""How the command ends: signals, output that nothing takes, and faults. Real processes where only they can show it."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from omniops.cli import app, common, errors, main, outputs

_COMMAND = (sys.executable, "-c", "import sys; sys.argv[0] = 'omniops'; from omniops.cli import main; main()")
"""As the script that pip makes."""


@pytest.fixture
def raises(monkeypatch, omniops):
    """Run a command that raises something."""

    def run(error):
        def imported(name):
            raise error

        monkeypatch.setattr(app, "_import_command", imported)
        return omniops("demo")

    return run


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (errors.CommandError("no such thing"), 2, "no such thing"),
        (errors.CommandError("it broke", status=1), 1, "it broke"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (errors.Terminated(signal.SIGTERM), 143, "terminated"),
        (errors.Terminated(signal.SIGHUP), 129, "terminated"),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "/a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write the output: No space left on device"),
        (OSError(1094995529, "Invalid data found", "a.mp4"), 1, "a.mp4: Invalid data found"),
        (MemoryError(), 1, "not enough memory: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"), 1, "not enough memory"),
    ],
)
def test_an_error_is_one_line(raises, error, status, said):
    result = raises(error)
    assert (result.status, result.out) == (status, "")
    (line,) = result.err.splitlines()
    assert line.startswith(f"omniops: error: {said}")


def test_a_fault_of_ours_has_a_plain_first_line(raises):
    result = raises(ZeroDivisionError("division by zero"))
    assert result.status == 1
    first, *rest = result.err.splitlines()
    assert first == (
        "omniops: error: a fault of omniops, please report it with what follows: ZeroDivisionError: division by zero"
    )
    assert rest[0].startswith("Traceback")


def test_a_closed_pipe_is_quiet(raises):
    result = raises(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (result.status, result.out, result.err) == (141, "", "")


def test_an_interrupt_while_the_commands_are_imported(capsys, monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "omniops.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "omniops.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "omniops: error: interrupted\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_an_import_drops_ends_the_command_all_the_same(omniops, monkeypatch, number, status):
    def imported(name):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        return import_module(name)

    monkeypatch.setattr(app, "import_module", imported)
    result = omniops("demo", "--help")
    assert (result.status, result.out) == (status, "")


def test_a_signal_that_was_dropped_ends_what_goes_on(omniops, monkeypatch):
    def imported(name):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with common.progress() as bar, pytest.raises(KeyboardInterrupt):
            common.Heartbeat(bar).beat("still at it")
        raise errors.CommandError("seen")

    monkeypatch.setattr(app, "import_module", imported)
    assert omniops("demo").err == "omniops: error: seen\n"


def test_signals_are_handled_as_before_afterwards(raises):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    raises(errors.CommandError(""))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run((*_COMMAND, "--help"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "omniops: error: cannot write the output: No space left on device\n"


def test_a_name_that_is_no_text_can_be_said(omniops, tmp_path, capsys):
    errors.escape_unencodable()
    print("\udcff")
    assert capsys.readouterr().out == "\\udcff\n"


# Videos, whose process ends.


@pytest.fixture
def long_video(tmp_path):
    """A folder of many frames."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(300):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg")
    return folder


def _ended(folder, out, how):
    """Follow an object until some frames are known, then end the process: its status and what it said."""
    pytest.importorskip("av", reason="needs PyAV")
    small = ("--random-weights", "--device", "cpu", "--dtype", "float32", "--image-size", "32")
    command = (*_COMMAND, "segment", str(folder), "--point", "1,2", *small, "--out", str(out))
    lines = out.with_suffix(".jsonl")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") >= 5):
            time.sleep(0.02)
        process.send_signal(how)
        said = process.stderr.read()
    return process.returncode, said


def _frame_count(path):
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.slow
def test_a_video_that_is_terminated_keeps_its_masks(long_video, tmp_path):
    status, said = _ended(long_video, tmp_path / "out.mp4", signal.SIGTERM)
    assert status == 143
    records = json.loads((tmp_path / "out.json").read_text())
    frames = [record["frame"] for record in records]
    assert 5 <= len(frames) < 300
    assert frames == list(range(len(frames)))
    assert said.splitlines()[-1] == f"omniops: error: terminated: the masks of {len(frames)} of 300 frames were kept"
    assert _frame_count(tmp_path / "out.mp4") in (len(frames), len(frames) - 1)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_a_video_that_is_killed_leaves_what_was_found(long_video, tmp_path):
    status, _ = _ended(long_video, tmp_path / "out.mp4", signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "out.json").exists()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["frame"] for record in records] == list(range(len(records)))
    assert 5 <= len(records) < 300
    assert 1 <= _frame_count(tmp_path / "out.mp4") <= len(records)


# Files.


def test_records_of_a_full_disk_are_whole_lines(tmp_path):
    records = outputs.Records(tmp_path / "out.json", overwrite=False)
    records.add([{"a": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, before[1]))  # the disk takes 4 bytes more, then fails
    try:
        with pytest.raises(errors.CommandError, match=r"cannot write .*out\.jsonl: File too large"):
            records.add([{"b": 2}, {"c": 3}])
        with pytest.raises(errors.CommandError, match=r"out\.jsonl has what was found, a line of JSON each"):
            records.finish([{"a": 1}, {"b": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == '{"a": 1}\n'


def test_a_file_is_complete_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    outputs.write_json(path, [1], overwrite=False)

    def fail():
        with outputs.writing(path, overwrite=True) as temporary:
            temporary.write_text("[2")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(errors.CommandError, match=r"cannot write .*a\.json: No space left on device"):
        fail()
    assert path.read_text() == "[1]\n"
    with pytest.raises(errors.CommandError, match="meanwhile it is there"):
        outputs.write_json(path, [3], overwrite=False)
    assert path.read_text() == "[1]\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_file_without_hard_links_is_not_replaced_either(tmp_path, monkeypatch):
    def unsupported(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(outputs.os, "link", unsupported)
    path = tmp_path / "a.json"
    outputs.write_json(path, [1], overwrite=False)
    with pytest.raises(errors.CommandError, match="meanwhile it is there"):
        outputs.write_json(path, [2], overwrite=False)
    assert path.read_text() == "[1]\n"


def test_what_is_no_file_is_written_to(tmp_path):
    outputs.require_new([outputs.Path("/dev/null")], overwrite=False)
    outputs.write_json(outputs.Path("/dev/null"), [1], overwrite=False)


def test_a_file_keeps_the_permissions_of_new_files(tmp_path):
    outputs.write_json(tmp_path / "a.json", [1], overwrite=False)
    (tmp_path / "b.json").write_text("")
    modes = [path.stat().st_mode for path in sorted(tmp_path.iterdir())]
    assert modes[0] == modes[1]
