"""The command as a whole: help, missing extras, what it imports."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import omniops as omniops_package
from omniops.cli import app, common
from omniops.formatting import digits

COMMANDS = ("doctor", "selftest", "bench", "demo", "detect", "detect-eval", "segment", "export", "serve")


def test_help_names_every_command(omniops):
    result = omniops("--help")
    assert result.status == 0
    assert all(command in result.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(omniops, command):
    result = omniops(command, "--help")
    assert result.status == 0
    assert f"Example: omniops {command}" in result.out


def test_an_unknown_command_is_wrong_use(omniops):
    result = omniops("fly")
    assert result.status == 2
    assert "fly" in result.err


@pytest.mark.parametrize("arguments", [("--help",), ("fly",)])
def test_the_package_is_the_command(omniops, arguments):
    """``python -m omniops``."""
    expected = omniops(*arguments)
    command = (sys.executable, "-m", "omniops", *arguments)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (expected.status, expected.out, expected.err)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_extra_is_named_with_its_command(package):
    code = f"sys.modules[{package!r}] = None; from omniops.cli import main; main(['doctor'])"
    result = _python(_AS_INSTALLED + code)
    assert result.returncode == 1
    assert result.stderr == (
        f"omniops: error: the command needs {package}, which is not installed: pip install 'omniops[cli]'\n"
    )


_AS_INSTALLED = """
import sys
sys.argv[0] = "/usr/bin/omniops"  # as in the script that pip makes
"""
_HELP = """
from omniops.cli import main
try: main(sys.argv[1:])
except SystemExit: pass
print({"matplotlib", "PIL", "triton", "torch", "numpy", "transformers", "av"} & set(sys.modules), file=sys.stderr)
"""
_PUBLIC_NAMES = """
import omniops
assert "torch" not in sys.modules
for name in sys.argv[1:]:
    value = getattr(omniops, name)
    print(name, type(value).__name__, getattr(value, "__module__", ""), value.__name__)
"""


_AS_MODULE = """
import atexit, runpy, sys
atexit.register(lambda: print(sorted({"torch", "numpy"} & set(sys.modules)), file=sys.stderr))
sys.orig_argv, sys.argv[0] = [sys.executable, "-m", "omniops"], "-m"  # as while Python looks for the module
runpy.run_module("omniops", run_name="__main__")
"""


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",), ("segment", "-h")])
def test_as_a_module_it_imports_nothing_heavy_either(arguments):
    result = _python(_AS_MODULE, *arguments)
    assert result.stdout.strip()
    assert "'torch'" not in result.stderr
    assert result.stderr.startswith("[")


def test_another_module_has_the_public_names_at_once():
    """Also where it imports omniops while Python still looks for its file."""
    code = "sys.orig_argv, sys.argv[0] = [sys.executable, '-m', 'another'], '-m'; import omniops; "
    result = _python("import sys; " + code + "print('torch' in sys.modules, 'carafe' in vars(omniops))")
    assert result.stdout == "True True\n"


@pytest.mark.parametrize("command", [(), ("segment",), ("detect",), ("serve",)])
def test_help_imports_nothing_heavy(command):
    result = _python(_AS_INSTALLED + _HELP, *command, "--help")
    assert "Usage: omniops" in result.stdout
    assert result.stderr in (("set()\n",) if not command else ("set()\n", "{'numpy'}\n"))


def test_the_command_s_process_has_all_public_names():
    result = _python(_AS_INSTALLED + _PUBLIC_NAMES, *omniops_package.__all__)
    values = {name: getattr(omniops_package, name) for name in omniops_package.__all__}
    assert result.stdout.splitlines() == [
        f"{name} {type(value).__name__} {getattr(value, '__module__', '')} {value.__name__}"
        for name, value in values.items()
    ]
    result = _python(_AS_INSTALLED + "from omniops import fly")
    assert "ImportError: cannot import name 'fly' from 'omniops'" in result.stderr


def test_the_first_lines_of_help_are_those_of_the_commands():
    for name, command in app.COMMANDS.items():
        function = getattr(import_module(f"omniops.cli.{command.module}"), command.function)
        first = " ".join(inspect.getdoc(function).partition("\n\n")[0].split())
        assert (name, command.summary) == (name, first)


@pytest.mark.parametrize(("module", "package"), [("PIL", "pillow"), ("matplotlib", "matplotlib")])
@pytest.mark.parametrize("arguments", [("demo", "--out"), ("bench", "--quick", "--plot")])
def test_pictures_missing_is_named_before_the_work(fails, monkeypatch, tmp_path, module, package, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    line = fails(*arguments, str(tmp_path / "picture.png"), status=1)
    assert line.endswith(f"pictures need {package}, which is not installed: pip install 'omniops[pictures]'")


@pytest.mark.parametrize(("command", "argument"), [("bench", "OP"), ("demo", "PHOTO")])
def test_an_argument_that_may_be_left_out_stands_in_one_pair_of_brackets(omniops, command, argument):
    usage = next(line for line in omniops(command, "--help").out.splitlines() if "Usage:" in line)
    assert usage.strip() == f"Usage: omniops {command} [OPTIONS] [{argument}]"


def test_every_command_shows_its_default_device(omniops):
    selftest, bench = (" ".join(omniops(command, "--help").out.split()) for command in ("selftest", "bench"))
    assert "[default: (every device found)]" in selftest
    assert "the GPU where there is one" not in selftest
    assert "[default: (the GPU where there is one)]" in bench


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0.1, "0.100"),
        (0.00789123, "0.00789"),
        (1, "1.00"),
        (12.34, "12.3"),
        (99.94, "99.9"),
        (99.96, "100"),
        (123.4, "123"),
        (999.7, "1000"),
        (1234.4, "1234"),
    ],
)
def test_numbers_have_three_significant_digits(number, written):
    assert digits(number) == written


@pytest.mark.parametrize("command", ["selftest", "bench", "demo"])
@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_an_unknown_device_is_refused(fails, command, device):
    line = fails(command, "--device", device, status=2)
    assert f"device {device!r}" in line
    assert "found here are cpu" in line


@pytest.mark.parametrize(("command", "option"), [("demo", "--out"), ("bench", "--json"), ("bench", "--plot")])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(fails, tmp_path, command, option):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    assert fails(command, option, str(tmp_path / "folder.png"), status=2).endswith("it is a folder")
    assert "cannot write" in fails(command, option, str(tmp_path / "file" / "below.png"), status=2)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("demo", "--out"), "a.png"),
        (("bench", "--json"), "a.json"),
        (("bench", "--plot"), "a.png"),
        (("bench", "sam2", "--json"), "a.json"),
        (("bench", "sam2", "--plot"), "a.png"),
        (("selftest", "--json"), "a.json"),
        (("detect-eval", "--images", ".", "--annotations", "x.json", "--random-weights", "--json"), "a.json"),
    ],
)
def test_what_is_there_is_not_replaced(fails, tmp_path, command, name):
    (tmp_path / name).write_text("another's")
    line = fails(*command, str(tmp_path / name), status=2)
    assert line == f"omniops: error: {tmp_path / name} is there already: --overwrite replaces what is there"
    assert (tmp_path / name).read_text() == "another's"


@pytest.mark.parametrize(("command", "option"), [("demo", "--out"), ("bench", "--plot")])
def test_a_picture_needs_a_name(fails, command, option):
    assert f"{option} .png: a name is missing before .png" in fails(command, option, ".png", status=2)


@pytest.mark.parametrize(("command", "option"), [("demo", "--out"), ("bench", "--plot")])
def test_a_picture_of_unknown_format_is_refused(fails, tmp_path, command, option):
    assert "a picture's name ends with .png" in fails(command, option, str(tmp_path / "picture.txt"), status=2)


def test_an_interrupt_ends_without_a_traceback(omniops, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("omniops.device.found", interrupt)
    result = omniops("selftest")
    assert result.status == 130
    assert "Traceback" not in result.err


def test_where_no_bar_is_seen_it_is_said_how_far_it_is(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(common, "perf_counter", lambda: clock[0])
    with common.progress() as bar:
        heartbeat = common.Heartbeat(bar)
        for clock[0] in (1.0, 11.0, 12.0, 20.0, 22.0):
            heartbeat.beat(f"at {clock[0]:g}")
    assert capsys.readouterr().err == "omniops: at 11\nomniops: at 22\n"


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
