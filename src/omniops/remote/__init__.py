"""An object in a process of its own, for processes that cannot use the GPU themselves: web workers that were forked.

``Remote`` is what the caller holds, and knows the object's methods by nothing but their names. The rooms, each of which
imports those after it alone: proxy (what the caller holds), process (its life), worker (what runs in it), messages
(what crosses), errors. What is asked for is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from omniops.remote.errors import RemoteError

if TYPE_CHECKING:
    from omniops.remote.proxy import Handle, Remote, call, import_path, is_import_path, kill, process_id

__all__ = ["Handle", "Remote", "RemoteError", "call", "import_path", "is_import_path", "kill", "process_id"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.proxy"), name)
    globals()[name] = value
    return value
