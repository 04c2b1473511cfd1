"""What the command and each of its commands take: version, help, completion, and how much is said."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest

import omniops as omniops_package
from omniops.cli import app, common, errors

COMMANDS = [name for name in app.COMMANDS if " " not in name]
LEVELS = ("error", "warning", "info", "debug")


# Those of talkative are meant.
pytestmark = pytest.mark.filterwarnings("ignore:a Python warning:UserWarning")


@pytest.fixture
def talkative(omniops, monkeypatch):
    """Run a command that says something of every level, and prints a result."""

    def talk(fail: bool = False) -> None:
        common.print_lines("the result")
        for level in LEVELS[1:]:
            errors.say(f"a {level}", level)
        warnings.warn("a Python warning", UserWarning, stacklevel=1)
        for level in LEVELS[:3]:
            logging.getLogger("a library").log(getattr(logging, level.upper()), "a library's %s", level)
        with common.progress() as bar:
            heartbeat = common.Heartbeat(bar)
            heartbeat._last -= 11
            heartbeat.beat("a heartbeat")
        if fail:
            raise errors.CommandError("it broke", status=1)

    monkeypatch.setattr(app, "import_module", lambda name: type("Module", (), {"doctor": staticmethod(talk)}))
    return lambda *arguments: omniops("doctor", *arguments)


def test_the_version_is_the_package_s(omniops):
    result = omniops("--version")
    assert (result.status, result.out, result.err) == (0, f"omniops {version('omniops')}\n", "")
    assert omniops_package.__version__ == version("omniops")


def test_the_short_help_is_the_long_one(omniops):
    for arguments in ((), *((command,) for command in COMMANDS), ("bench", "sam2")):
        short = omniops(*arguments, "-h")
        assert short.status == 0
        assert short.out == omniops(*arguments, "--help").out


def test_help_says_the_exit_statuses(omniops):
    shown = " ".join(omniops("--help").out.split())
    assert "Exit status: 0 done, 1 failed, 2 used wrongly, 130 interrupted (Ctrl-C), 143 terminated" in shown


@pytest.mark.parametrize("command", [*COMMANDS, "bench sam2"])
def test_every_command_takes_how_much_is_said(omniops, command):
    shown = " ".join(omniops(*command.split(), "--help").out.split())
    assert "--quiet -q" in shown
    assert re.search(r"--log-level [<[]error\|warning\|info\|debug[>\]]", shown)  # typer's brackets, by its version
    assert "[env var: OMNIOPS_LOG_LEVEL]" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ["warning", "info", "heartbeat"]),
        (("--log-level", "info"), ["warning", "info", "heartbeat"]),
        (("--log-level", "debug"), ["warning", "info", "debug", "heartbeat"]),
        (("--log-level", "warning"), ["warning"]),
        (("--log-level", "error"), []),
        (("--quiet",), []),
        (("-q", "--log-level", "debug"), []),
        (("--log-level", "debug", "-q"), []),
    ],
)
@pytest.mark.filterwarnings("always::UserWarning")
def test_what_is_said_and_the_result_in_every_case(talkative, caplog, recwarn, arguments, said):
    caplog.set_level("INFO")
    result = talkative(*arguments)
    assert (result.status, result.out, result.err) == (0, "the result\n", "")
    assert result.notes == [f"omniops: a {word}\n" for word in said]
    is_quiet, is_warning = said == [], said == ["warning"]
    libraries = LEVELS[: 1 if is_quiet else 2 if is_warning else 3]
    assert [record.message for record in caplog.records] == [f"a library's {level}" for level in libraries]
    assert len(recwarn) == (0 if is_quiet else 1)


def test_the_environment_says_it_where_no_option_does(talkative, monkeypatch):
    monkeypatch.setenv("OMNIOPS_LOG_LEVEL", "warning")
    assert talkative().notes == ["omniops: a warning\n"]
    assert len(talkative("--log-level", "debug").notes) == 4
    monkeypatch.setenv("OMNIOPS_LOG_LEVEL", "loud")
    result = talkative()
    assert (result.status, result.out) == (2, "")
    assert "OMNIOPS_LOG_LEVEL" in result.err


def test_one_run_leaves_the_next_what_it_says(talkative):
    assert talkative("--quiet").notes == []
    assert len(talkative().notes) == 3
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("option", ["--quiet", "--log-level=warning"])
def test_an_error_is_said_all_the_same(fails, option):
    line = fails("demo", "--device", "foo", option, status=2)
    assert "device 'foo'" in line


def test_debug_adds_where_an_error_came_from(omniops):
    assert "Traceback" not in omniops("demo", "--device", "foo").err
    result = omniops("demo", "--device", "foo", "--log-level", "debug")
    first, *traceback = result.err.splitlines()
    assert first.startswith("omniops: error: unknown device 'foo'")
    assert traceback[0].startswith("Traceback")
    assert any("choose_device" in line for line in traceback)


def test_in_a_terminal_there_is_a_bar_unless_quiet(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    with errors.levels():
        assert not common.progress().disable
        errors.set_level("error")
        assert common.progress().disable
    assert not common.progress().disable


@pytest.mark.skipif(shutil.which("bash") is None, reason="completion is tried in bash, which is not here")
def test_bash_completes_commands_and_options(tmp_path):
    program = tmp_path / "omniops"
    program.write_text(f"#!{sys.executable}\nfrom omniops.cli import main\nmain()\n")
    program.chmod(0o755)
    script = """
        eval "$(omniops --show-completion)"
        complete_words() {
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _omniops_completion omniops; echo "${COMPREPLY[@]}"
        }
        complete_words omniops s
        complete_words omniops segment --qui
        complete_words omniops segment --log-level ""
    """
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == ["selftest segment serve", "--quiet", "error warning info debug"], (
        result.stderr
    )
