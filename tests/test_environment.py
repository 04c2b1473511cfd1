"""What is here, and what the dispatcher calls."""

import omniops
from omniops import environment
from omniops.backends import cpu, cuda, reference
from omniops.cli.cases import CASES


def test_it_knows_every_operator_and_so_do_selftest_and_bench():
    assert omniops.carafe.__name__ in environment.operators()
    assert [case.NAME for case in CASES] == environment.operators()


def test_what_serves_is_what_the_dispatcher_calls(monkeypatch):
    assert environment.serving("carafe", "cpu") is (cpu if cpu.AVAILABLE else reference)
    assert environment.serving("carafe", "cuda") is (cuda if cuda.AVAILABLE else reference)
    assert environment.serving("carafe", "xpu") is reference
    monkeypatch.setattr(environment, "has_kernel", lambda name, key: False)
    assert environment.serving("carafe", "cpu") is reference


def test_a_macs_system_is_its_macos(monkeypatch):
    monkeypatch.setattr(environment.platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(environment.platform, "machine", lambda: "arm64")
    assert environment.machine()["machine"].startswith("macOS 15.5 on arm64, ")
