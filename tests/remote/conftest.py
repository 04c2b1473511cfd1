"""A remote object that tests share, because a process takes seconds to start."""

import os

import pytest

from omniops.remote import Remote


@pytest.fixture(scope="session")
def make():
    """Makes remote objects of one kind."""
    if os.name != "posix":
        pytest.skip("omniops.remote needs a POSIX system")
    roles = {"setters": ("set_value",), "resetters": ("reset",), "handles": ("open",)}
    return lambda **options: Remote("remote.standin:StandIn", **roles, **options)


@pytest.fixture(scope="session")
def shared(make):
    with make(kwargs={"gain": 2.0}) as remote:
        yield remote
