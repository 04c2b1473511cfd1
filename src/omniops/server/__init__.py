"""The server of ``omniops serve``: SAM 2's demo API, sessions, uploads and the page.

    gunicorn --worker-class gthread 'omniops.server:app()' --workers 1 --threads 8 --bind 127.0.0.1:7263

The web process computes nothing with a model: predictors run in processes of their own, one for each device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

    from omniops.server.settings import Settings

__all__ = ["app", "create_app"]


def app() -> Flask:
    """The WSGI application, set up by the environment's variables, as ``Settings.from_environment`` reads them."""
    from omniops.server.settings import Settings

    return create_app(Settings.from_environment())


def create_app(settings: Settings, **options: Any) -> Flask:
    """The WSGI application; see ``omniops.server.web.create_app``.

    Raises:
        ImportError: that says what to install, where Flask or strawberry-graphql is missing.
    """
    try:
        from omniops.server import web
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("flask", "werkzeug", "strawberry", "graphql", "av"):
            raise
        raise ImportError(f"omniops.server needs {error.name}: pip install 'omniops[server]'") from error
    return web.create_app(settings, **options)
